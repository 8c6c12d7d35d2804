"""What every stage is given: the resolved config, its folder, the mesh, the way to its inputs."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from bigssl_jax.config import ConfigError, config_hash
from bigssl_jax.parallel import batch_parts
from bigssl_jax.parallel.distributed import process_index
from bigssl_jax.parallel.watchdog import Watchdog
from bigssl_jax.stages import artefacts, schema
from bigssl_jax.stages.label_fields import with_folders
from bigssl_jax.training.signals import StopRequest


@dataclasses.dataclass(frozen=True)
class Context:
    """One stage's surroundings.

    Attributes:
      config: the resolved experiment.
      name: the stage's name in the config.
      workdir: the run's folder.
      mesh: devices.
      stop: set when a signal has asked for a stop; long loops look at it.
      later_audio_seconds: audio that later stages will train on.
      accept: go on with checkpoints of another config, corpus or tokenizer.
    """

    config: Mapping[str, Any]
    name: str
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    stop: StopRequest
    later_audio_seconds: float = 0.0
    accept: bool = False

    @property
    def fields(self) -> Mapping[str, Any]:
        """The stage's own config fields."""
        return self.config['stages'][self.name]

    @property
    def directory(self) -> pathlib.Path:
        """The stage's folder."""
        return self.workdir / self.name

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the stage's result follows from."""
        return schema.identity_of(self.config, self.name)

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The sentencepiece model that the prepare stage trained."""
        return self.workdir / 'tokenizer' / 'tokenizer.model'

    @property
    def statistics_path(self) -> pathlib.Path:
        """Feature statistics of the training audio, from the prepare stage."""
        return self.workdir / 'prepare' / 'statistics.npz'

    def corpus_directory(self, corpus: str) -> pathlib.Path:
        """Where the prepared `corpus` lives."""
        base = self.config['data_dir'] or self.workdir / 'corpora'
        return pathlib.Path(base) / corpus

    def selection(self, name: str) -> dict[str, Any]:
        """The named selection with its corpus as a folder and its exclusions spelt out."""
        spec = dict(self.config['selections'][name])
        spec['corpus'] = str(self.corpus_directory(spec['corpus']))
        if spec.get('exclude'):
            spec['exclude'] = tuple(self.selection(other) for other in spec['exclude'])
        return spec

    def stream_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A stage's stream fields as the data room wants them: folders and files, not names."""
        sources = {}
        for name, source in fields['sources'].items():
            labels = source['labels']
            resolved = {
                'selection': self.selection(source['selection']),
                'labels': labels or None,
                'filter': with_folders(source['filter'], self.workdir),
                'weight': source['weight'],
            }
            if labels not in ('', 'text'):
                resolved['labels'] = str(self.workdir / labels / 'labels')
            sources[name] = resolved
        labelled = any(source['labels'] for source in fields['sources'].values())
        return {
            **{k: v for k, v in fields.items() if k not in ('sources', 'rows_multiple')},
            'sources': sources,
            'tokenizer': str(self.tokenizer_path) if labelled else None,
            'normaliser': self.config['tokenizer']['normaliser'],
            'multiple_of': self.rows_multiple(fields['rows_multiple']),
        }

    def watchdog(self) -> Watchdog:
        """A watchdog over this process's part of the stage."""
        stacks = self.directory / f'stacks-process{process_index()}.txt'
        return Watchdog(self.name, self.config['compute']['watchdog_minutes'], stacks)

    def pass_config(self, selection: str, mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
        """The stream config of one pass over a selection, on `mesh` or that of the stage."""
        fields = self.fields
        return {
            'sources': {selection: {'selection': self.selection(selection), 'labels': None}},
            'batch_seconds': fields.get('batch_seconds', 128.0),
            'num_buckets': fields.get('num_buckets', 6),
            'multiple_of': batch_parts(mesh or self.mesh),
        }

    def rows_multiple(self, wanted: int) -> int:
        """What the rows of a training batch are a multiple of.

        Raises:
          ConfigError: `wanted` rows do not divide among the devices and micro-batches.
        """
        pieces = self.fields['optimizer']['micro_batches']
        needed = batch_parts(self.mesh) * pieces
        if wanted % needed:
            raise ConfigError(
                f'stages.{self.name}: a stream has rows_multiple={wanted}, which does not divide by'
                f' {needed} ({batch_parts(self.mesh)} parts of the mesh x {pieces} micro-batches);'
                f' set it to a multiple of {needed}, or choose another mesh'
            )
        began = None if wanted else self._began_with()
        if began and began % needed:
            raise ConfigError(
                f'{self.directory} holds training with batches of a multiple of {began} utterances,'
                f' which do not divide by {needed} ({batch_parts(self.mesh)} parts of the mesh x'
                f' {pieces} micro-batches); continue on a number of devices that divides {began},'
                ' or delete that folder, and set rows_multiple of its streams to a multiple of both'
            )
        return wanted or began or needed

    def _began_with(self) -> int | None:
        """What batches were a multiple of when the training began that checkpoints continue.

        Without it, another number of devices could mean other sizes of batches: another stream.
        """
        record = artefacts.read_json(self.directory / 'batches.json')
        saved = any((self.directory / 'checkpoints').glob('[0-9]*'))
        return record['rows_multiple'] if record and saved else None

    def remember_batches(self) -> None:
        """Notes what batches are a multiple of, for a run that continues on other devices.

        Streams that say so themselves need no note.
        """
        if all(stream['rows_multiple'] for stream in self.fields['streams'].values()):
            return
        multiple = self.rows_multiple(0)
        artefacts.write_json(self.directory / 'batches.json', {'rows_multiple': multiple})

    def input_hashes(self) -> dict[str, str]:
        """Hashes of the finished stages that this one is made from."""
        hashes = {}
        for upstream in ('prepare', *schema.upstream_of(self.fields)):
            done = artefacts.read_done(self.workdir / upstream)
            if done is None:
                raise RuntimeError(f'stage {upstream!r} is not finished')
            hashes[upstream] = artefacts.output_hash(done)
        return hashes

    def identity_hash(self) -> str:
        """The hash that names the stage's identity in checkpoints and label sets."""
        return config_hash(self.identity)
