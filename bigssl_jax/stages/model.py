"""A trained model as a folder: what every later stage, and `bigssl transcribe`, reads.

<stage>/model/
  model.json        encoder and audio config, heads, tokenizer hash, step, fingerprints of arrays
  arrays/           {'params': {'encoder', 'heads'}, 'constants': {'encoder', 'heads'}}, by Orbax
  tokenizer.model   for models with a transcript head

A model may be larger than any machine's memory.  It is therefore written by all processes
together, each what its devices hold, and read into the layout that the reader wants, on any mesh;
in memory as a whole it exists only where somebody asks for numpy arrays.  What is read is checked
against the fingerprints, which are computed on the devices (`parallel/fingerprint.py`).
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util
from jax.experimental import multihost_utils

from bigssl_jax.audio import AudioConfig
from bigssl_jax.config import UserError
from bigssl_jax.models import ConformerConfig
from bigssl_jax.objectives import TRANSCRIPT
from bigssl_jax.parallel.fingerprint import combine, fingerprints
from bigssl_jax.stages import artefacts
from bigssl_jax.training.checkpoint import restore_arrays, save_arrays, stored_shapes

# The part of a model that `init_from` takes.
ENCODER = ('params/encoder/', 'constants/encoder/')


@dataclasses.dataclass(frozen=True)
class Model:
    """A model folder; its arrays stay on disk until `read`.

    Attributes:
      directory: its folder.
      encoder: encoder config; None for a language model, which has none.
      audio: audio config.
      heads: objective name -> {'objective', its fields}.
      arrays: name of an array, e.g. 'params/encoder/norm/scale' -> its fingerprint.
      hash: one fingerprint of all arrays.
      tokenizer: hash of the tokenizer whose ids the heads know; None without one.
    """

    directory: pathlib.Path
    encoder: ConformerConfig | None
    audio: AudioConfig
    heads: Mapping[str, Mapping[str, Any]]
    arrays: Mapping[str, str]
    hash: str
    tokenizer: str | None = None

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The sentencepiece model of the transcript head."""
        return self.directory / 'tokenizer.model'

    def transcript_head(self) -> str:
        """The name of the first head that writes text.

        Raises:
          UserError: the model has none: it is pre-trained only.
        """
        for name, fields in self.heads.items():
            if fields['objective'] in TRANSCRIPT:
                return name
        raise UserError(
            f'{self.directory} has no transcript head (heads: {", ".join(self.heads)});'
            ' name the folder of a fine-tuned stage'
        )

    def check_tokenizer(self) -> None:
        """Makes sure that ids mean what they meant in training.

        Raises:
          UserError: the tokenizer in the folder is not the one that the heads were trained with.
        """
        found = artefacts.file_hash(self.tokenizer_path)
        if found != self.tokenizer:
            raise UserError(
                f'{self.tokenizer_path} is not the tokenizer that this model was trained with (hash'
                f' {found[:12]}, in model.json {str(self.tokenizer)[:12]}): its heads would write'
                ' other pieces; put back the file that the training stage wrote'
            )

    def shapes(self) -> Any:
        """{'params': ..., 'constants': ...} of `jax.ShapeDtypeStruct`; reads no array."""
        return stored_shapes(self.directory / 'arrays')

    def read(self, wanted: Any) -> Any:
        """Arrays of the model, checked.

        Args:
          wanted: `shapes()` or branches of it; a leaf with a sharding arrives laid out so, each
            device reading its own piece, one without as numpy.  Where a layout spans several
            processes, all of them call this together.

        Raises:
          UserError: an array is not in the model, has another shape, or is damaged.
        """
        stored = traverse_util.flatten_dict(self.shapes(), sep='/')
        for name, leaf in traverse_util.flatten_dict(wanted, sep='/').items():
            if name not in stored or stored[name].shape != leaf.shape:
                there = f'has shape {stored[name].shape}' if name in stored else 'is missing'
                raise UserError(
                    f'{self.directory}: {name} {there}, and shape {leaf.shape} is needed;'
                    ' name a model of the same encoder'
                )
        arrays = restore_arrays(self.directory / 'arrays', wanted)
        for name, text in fingerprints(arrays).items():
            if text != self.arrays.get(name):
                raise UserError(
                    f'{self.directory}/arrays is damaged: the fingerprint of {name} is not the one'
                    ' in model.json'
                )
        return arrays


def save_model(
    directory: pathlib.Path,
    encoder: ConformerConfig | None,
    audio: AudioConfig,
    heads: Mapping[str, Mapping[str, Any]],
    params: Any,
    constants: Any,
    tokenizer: pathlib.Path | None,
    step: int,
) -> dict[str, Any]:
    """Writes a model folder under a temporary name, renames it, returns what `model.json` says.

    In several processes all of them call this together.

    Args:
      directory: the folder; one that is there, left by a stage that did not finish, is replaced.
      encoder, audio: of the model.
      heads: objective name -> its config fields.
      params, constants: {'encoder': ..., 'heads': {objective name: ...}}, laid out in any way.
      tokenizer: file to copy beside the arrays, or None.
      step: of the training stage.
    """
    arrays = {'params': params, 'constants': constants}
    texts = fingerprints(arrays)
    info = {
        'encoder': None if encoder is None else dataclasses.asdict(encoder),
        'audio': dataclasses.asdict(audio),
        'heads': {name: dict(fields) for name, fields in heads.items()},
        'tokenizer': artefacts.file_hash(tokenizer) if tokenizer else None,
        'step': step,
        'arrays': texts,
        'encoder_hash': combine({n: t for n, t in texts.items() if n.startswith(ENCODER)}),
        'hash': combine(texts),
    }
    temporary = directory.with_name(f'.{directory.name}.tmp').absolute()
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    multihost_utils.sync_global_devices(f'{directory} may be written')
    save_arrays(temporary / 'arrays', arrays)
    if first:
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / 'tokenizer.model')
        artefacts.write_json(temporary / 'model.json', info)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    multihost_utils.sync_global_devices(f'{directory} is written')
    return info


def load_model(directory: pathlib.Path) -> Model:
    """Opens a model folder, or the stage folder that holds one; `Model.read` reads its arrays.

    Raises:
      UserError: there is no model, or its model.json contradicts itself.
    """
    directory, info = artefacts.model_info(pathlib.Path(directory))
    if combine(info['arrays']) != info['hash']:
        raise UserError(f'{directory}/model.json is damaged: its hash is not that of its arrays')
    return Model(
        directory=directory,
        encoder=None if info['encoder'] is None else ConformerConfig(**info['encoder']),
        audio=AudioConfig(**info['audio']),
        heads=info['heads'],
        arrays=info['arrays'],
        hash=info['hash'],
        tokenizer=info['tokenizer'],
    )
