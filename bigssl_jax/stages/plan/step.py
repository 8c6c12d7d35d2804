"""The program that a plan prices: a stage's own jitted function, its arguments described, not held.

    pretrain, finetune   Trainer.train_step()            state, batches, rates, key
    pseudo_label         recognition.decoder(...)        parameters, statistics, batch

Nothing here knows a TPU: the arguments are ShapeDtypeStructs with the shardings that `bigssl run`
gives the real arrays, so what is lowered for a pod is, text for text, what would be lowered there.

Shapes come from the config alone, since a plan is made before there is data: every row is as long
as `max_seconds` allows (the largest bucket decides memory) and holds `max_labels` labels.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bigssl_jax.config import ConfigError, UserError, choose
from bigssl_jax.data import buckets
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.decoding.fusion import make_fusion
from bigssl_jax.objectives import CTC
from bigssl_jax.parallel import batch_sharding, replicated, use_mesh
from bigssl_jax.parallel.layout import check_layout, landed
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.recognition import decoder
from bigssl_jax.stages.training_stage import make_trainer
from bigssl_jax.training.signals import StopRequest
from bigssl_jax.training.trainer import parameter_layout

TRAINING_KINDS = ('pretrain', 'finetune')
KINDS = (*TRAINING_KINDS, 'pseudo_label')
# Of a tokenizer whose config leaves the size to the texts ('char' with None): the letters, digits
# and signs of one European language.
ASSUMED_VOCABULARY = 64
# Of a selection to be labelled where the config names no limit: 30 s, the usual cap of the field.
ASSUMED_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Batch:
    """One stream's largest batch.

    Attributes:
      rows: of the global batch.
      multiple: of which `rows` is a multiple.
      samples: of every row, at 16 kHz.
      labels: of every row; 0 without labels.
    """

    rows: int
    multiple: int
    samples: int
    labels: int

    @property
    def seconds(self) -> float:
        """Seconds of audio, padding included."""
        return self.rows * self.samples / buckets.SAMPLE_RATE


@dataclasses.dataclass(frozen=True)
class Program:
    """A stage's jitted function with the description of its arguments.

    Attributes:
      function: jitted; call it inside `use_mesh(mesh)`.
      arguments: ShapeDtypeStructs, those of arrays on the mesh with their sharding.
      mesh: the devices it is for.
      batches: stream name -> its batch.
      parameters: number of parameters.
      parts: what lies in memory between two steps -> bytes per device.
      turns: assumed of a loop whose number of turns only the running program knows.
    """

    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    batches: Mapping[str, Batch]
    parameters: int
    parts: Mapping[str, int]
    turns: int = 1

    @property
    def audio_seconds(self) -> float:
        """Seconds of audio in one step, padding included."""
        return sum(batch.seconds for batch in self.batches.values())

    def call(self, *arguments: Any) -> Any:
        """The function, traced for its mesh."""
        with use_mesh(self.mesh):
            return self.function(*arguments)

    def lower(self) -> Any:
        """The lowered program, as `jax.jit(...).lower` gives it."""
        with use_mesh(self.mesh):
            return self.function.lower(*self.arguments)


def plannable_stages(config: Mapping[str, Any], stage: str | None = None) -> list[str]:
    """The stages of a recipe that a plan can price, or the one that is named.

    Raises:
      ConfigError: `stage` is not in the recipe or of another kind; there is none at all.
    """
    stages = config['stages']
    fit = [name for name in config['recipe'] if stages[name]['kind'] in KINDS]
    if not fit:
        raise ConfigError(
            f'config field recipe is {tuple(config["recipe"])!r}: no stage of it is of kind'
            f' {", ".join(KINDS)}, which are those that a plan can price'
        )
    return fit if stage is None else [choose('--stage', stage, fit)]


def is_training(config: Mapping[str, Any], stage: str) -> bool:
    """Whether a stage trains."""
    return config['stages'][stage]['kind'] in TRAINING_KINDS


def stage_program(config: Mapping[str, Any], stage: str, mesh: Mesh) -> Program:
    """The program of a stage of a resolved config, on a mesh (of devices that need not exist).

    Raises:
      ConfigError, DataError: the mesh splits the batch or the parameters in a way that does not
        come out even.
    """
    if is_training(config, stage):
        return _training_program(config, stage, mesh)
    return _labelling_program(config, stage, mesh)


def _training_program(config: Mapping[str, Any], stage: str, mesh: Mesh) -> Program:
    fields = config['stages'][stage]
    trainer = make_trainer(config, stage, mesh, vocabulary_size(config))
    check_layout(landed(trainer.abstract_params, mesh), mesh, config['compute']['max_replicated'])
    statistics = _statistics(trainer.audio.num_mels)
    state = trainer.abstract_state(statistics)
    streams = stage_batches(config, stage, mesh)
    batches = {
        name: _abstract_batch(streams[given['stream']], mesh)
        for name, given in fields['objectives'].items()
    }
    rates = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in fields['optimizer']['groups']}
    return Program(
        function=trainer.train_step(),
        arguments=(state, batches, rates, jax.eval_shape(lambda: jax.random.key(0))),
        mesh=mesh,
        batches={name: streams[given['stream']] for name, given in fields['objectives'].items()},
        parameters=_count(state.params),
        parts={
            'parameters': shard_bytes(state.params),
            'optimizer': shard_bytes(state.optimizer),
            'average': shard_bytes(state.ema),
            'constants': shard_bytes(state.constants),
            'batch': shard_bytes(batches),
        },
    )


def _labelling_program(config: Mapping[str, Any], stage: str, mesh: Mesh) -> Program:
    teacher = make_trainer(
        config, config['stages'][stage]['teacher'], mesh, vocabulary_size(config)
    )
    name = teacher.transcript_head()
    search, top_k = (
        DecoderConfig(**config['stages'][stage]['decoder']),
        config['stages'][stage]['top_k'],
    )
    head = teacher.objectives[name]
    check_layout(landed(teacher.abstract_params, mesh), mesh, config['compute']['max_replicated'])
    layout = parameter_layout(teacher.encoder, {name: head}, mesh)
    params = {'encoder': layout['encoder'], 'head': layout['heads'][name]}
    constants = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))
        for name, x in _statistics(teacher.audio.num_mels).items()
    }
    # Without language models: what they would cost is not known before their stage has run.
    fusion = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        jax.eval_shape(make_fusion),
    )
    streams = stage_batches(config, stage, mesh)
    batch = _abstract_batch(streams[stage], mesh)
    return Program(
        function=decoder(teacher.encoder, teacher.audio, head, mesh, search.program, top_k),
        arguments=(params, constants, fusion, batch),
        mesh=mesh,
        batches=streams,
        parameters=_count(params),
        parts={
            'parameters': shard_bytes(params),
            'constants': shard_bytes(constants),
            'batch': shard_bytes(batch),
        },
        turns=_moves(config, stage, streams[stage], head),
    )


def _moves(config: Mapping[str, Any], stage: str, batch: Batch, head: Any) -> int:
    """Moves of a transducer's search: one for every frame, one for every label that is allowed."""
    if isinstance(head, CTC):
        return 1
    teacher = config['stages'][config['stages'][stage]['teacher']]
    labels = max(stream['max_labels'] for stream in teacher['streams'].values())
    return int(buckets.encoder_frames(np.array(batch.samples))) + labels


# ---------------------------------------------------------------------------------------------
# shapes


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Ids of the tokenizer, which need not exist yet: the config's, else ASSUMED_VOCABULARY."""
    return config['tokenizer']['vocabulary_size'] or ASSUMED_VOCABULARY


@dataclasses.dataclass(frozen=True)
class Stream:
    """What the config says of a stream.

    Attributes:
      path: of its fields in the config.
      samples: of the longest utterance, rounded up to its bucket's bound.
      labels: of every row; 0 without labels.
      multiple: of which the rows of a batch are a multiple.
      batch_seconds: padded seconds of a batch, at most.
    """

    path: str
    samples: int
    labels: int
    multiple: int
    batch_seconds: float

    @property
    def seconds(self) -> float:
        """Of the longest utterance."""
        return self.samples / buckets.SAMPLE_RATE

    @property
    def units(self) -> int:
        """How many times `multiple` rows a batch holds; at least 1."""
        return max(1, int(self.batch_seconds // (self.seconds * self.multiple)))

    @property
    def rows(self) -> int:
        """Of the largest batch."""
        return self.units * self.multiple

    def seconds_of(self, rows: int) -> float:
        """The `batch_seconds` that makes a batch of so many rows."""
        # Upwards to a hundredth: a rounding error downwards would cost a whole multiple of rows.
        return math.ceil(rows * self.samples / buckets.SAMPLE_RATE * 100) / 100


def stage_batches(config: Mapping[str, Any], stage: str, mesh: Mesh) -> dict[str, Batch]:
    """The largest batch of every stream of a stage: stream name -> Batch.

    A pseudo_label stage has one stream, of the stage's name.

    Raises:
      DataError: `batch_seconds` does not hold the rows that the mesh needs.
    """
    batches = {}
    for name, stream in _streams(config, stage, mesh).items():
        try:
            rows = buckets.batch_sizes([stream.samples], stream.batch_seconds, stream.multiple)[0]
        except UserError as error:
            raise ConfigError(f'{stream.path}: {error}') from error
        batches[name] = Batch(rows, stream.multiple, stream.samples, stream.labels)
    return batches


def _streams(config: Mapping[str, Any], stage: str, mesh: Mesh) -> dict[str, Stream]:
    context = Context(config, stage, pathlib.Path(), mesh, StopRequest())
    fields, path = context.fields, f'stages.{stage}'
    if fields['kind'] == 'pseudo_label':
        samples = _bound(_longest(config, [fields['selection']], _usual_seconds(config)))
        multiple = context.pass_config(fields['selection'])['multiple_of']
        return {stage: Stream(path, samples, 0, multiple, fields['batch_seconds'])}
    found = {}
    for name, stream in fields['streams'].items():
        selections = [source['selection'] for source in stream['sources'].values()]
        labelled = any(source['labels'] for source in stream['sources'].values())
        found[name] = Stream(
            path=f'{path}.streams.{name}',
            samples=_bound(_longest(config, selections, stream['max_seconds'])),
            labels=stream['max_labels'] if labelled else 0,
            multiple=context.stream_config(stream)['multiple_of'],
            batch_seconds=stream['batch_seconds'],
        )
    return found


def _bound(seconds: float) -> int:
    """The bound in samples of the bucket that holds utterances of so many seconds."""
    longest = math.ceil(seconds * buckets.SAMPLE_RATE)
    step = buckets.bin_step(longest)
    return -(-longest // step) * step


def _longest(config: Mapping[str, Any], selections: Sequence[str], limit: float) -> float:
    """The longest utterance in seconds: a stream's limit, or the selections' if that is lower."""
    known = [config['selections'][name].get('max_seconds') or math.inf for name in selections]
    return min(limit, max(known))


def _usual_seconds(config: Mapping[str, Any]) -> float:
    """The longest utterance that the config's training streams take."""
    streams = [s for stage in config['stages'].values() for s in stage.get('streams', {}).values()]
    return max((stream['max_seconds'] for stream in streams), default=ASSUMED_SECONDS)


def _abstract_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What `training.loop.to_devices` makes of a batch of this shape."""
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        'audio': ((batch.rows, batch.samples), jnp.int16),
        'sample_counts': ((batch.rows,), jnp.int32),
        'rows': ((batch.rows,), jnp.int32),
    }
    if batch.labels:
        shapes['labels'] = ((batch.rows, batch.labels), jnp.int32)
        shapes['label_counts'] = ((batch.rows,), jnp.int32)
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def _statistics(num_mels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The feature statistics of the prepare stage."""
    return {
        name: jax.ShapeDtypeStruct((num_mels,), jnp.float32)
        for name in ('feature_mean', 'feature_std')
    }


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


# ---------------------------------------------------------------------------------------------
# changes to a config, as a user would write them on the command line


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config with some fields set, named by their path: {'encoder.remat': 'full'}."""
    result = dict(config)
    for path, value in changes.items():
        *groups, last = path.split('.')
        node = result
        for name in groups:
            node[name] = dict(node[name])
            node = node[name]
        node[last] = value
    return result


def largest_stream(config: Mapping[str, Any], stage: str, mesh: Mesh) -> Stream:
    """The stream of a stage with the largest batch."""
    return max(_streams(config, stage, mesh).values(), key=lambda stream: stream.batch_seconds)


def row_changes(config: Mapping[str, Any], stage: str, mesh: Mesh, units: int) -> dict[str, Any]:
    """The changes that give the largest batch of a stage `units` times its multiple of rows.

    The other streams of the stage keep their proportion to it.
    """
    largest = largest_stream(config, stage, mesh).batch_seconds
    changes = {}
    for stream in _streams(config, stage, mesh).values():
        rows = max(1, round(units * stream.batch_seconds / largest)) * stream.multiple
        changes[f'{stream.path}.batch_seconds'] = stream.seconds_of(rows)
    return changes
