"""SeqIO tasks and mixtures over the plan: names, rates and vocabularies that other tools know.

A task is a source of a stream under a registered name: `stream` accepts the name in place of a
selection, and a mixture's name stands for all its tasks with their rates. The other way round, any
SeqIO program can read a task: `PlanSource` gives one epoch in the order that the plan's permutation
gives, sharded at will, by tf.data without a Python operation. Batching, buckets and resuming belong
to `bigssl_jax.data.stream`; SeqIO's own packer and shuffle buffers are not used.

Importing this module imports SeqIO and TensorFlow (seconds), so it is imported only where a task is
named.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError
from bigssl_jax.data import tf_reader
from bigssl_jax.data.order import derive_key, permute
from bigssl_jax.data.sources import SOURCE_DEFAULTS, Source, open_source
from bigssl_jax.data.tensorflow_start import tensorflow
from bigssl_jax.data.tokenizer import Tokenizer, load_tokenizer

_SHUFFLE = 0x73687566666C65  # keeps this order apart from the orders of streams


class PlanSource(seqio.DataSource):
    """One source of a stream as a SeqIO data source; opened at first use.

    Elements: id (string), audio (int16 [S]) and, with labels, labels (int32 [U]).
    `seed` names the order; shuffle=False gives row order.
    """

    def __init__(self, spec: Mapping[str, Any], settings: Mapping[str, Any], name: str):
        super().__init__(
            splits=('train',),
            num_input_examples=None,
            caching_permitted=False,
            performs_internal_shuffling=True,
        )
        self.spec, self.settings, self.name = dict(spec), dict(settings), name

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def num_input_examples(self, split: str) -> None:
        """Unknown on purpose: SeqIO would keep small sets, decoded, in memory."""
        return None

    def list_shards(self, split: str) -> list[str]:
        return ['0']

    @functools.cached_property
    def opened(self) -> Source:
        """The opened source; DataError if it has nothing usable."""
        path = self.settings['tokenizer']
        return open_source(self.name, self.spec, self.settings, Tokenizer(path) if path else None)

    def get_dataset(
        self,
        split: str = 'train',
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
    ) -> Any:
        """One epoch as a tf.data.Dataset. Every shard of `shard_info` takes every n-th element."""
        tf = tensorflow()
        if split not in self.splits:
            raise ConfigError(f'task {self.name!r} has no split {split!r}: its selection is all')
        source, rows = self.opened, np.arange(len(self.opened))
        if shuffle:
            rows = permute(rows, rows.size, derive_key(int(seed or 0), _SHUFFLE))
        if shard_info is not None:
            rows = rows[shard_info.index :: shard_info.num_shards]
        corpus, where = source.corpus, source.corpus_rows(rows)
        elements = {
            'id': corpus.column('id').take(where).to_pylist(),
            'path': [corpus.shard_paths[shard] for shard in corpus.shard_of[where]],
            'offset': np.asarray(corpus.offset_of[where], np.int64),
        }
        if source.label_values is not None:
            counts = source.label_counts(rows)
            values = np.concatenate([source.labels(int(row)) for row in rows]).astype(np.int32)
            elements['labels'] = tf.RaggedTensor.from_row_lengths(values, counts)

        def decode(element, record):
            kept = {'id': element['id'], 'audio': tf.io.decode_raw(record, tf.int16)}
            if 'labels' in element:
                kept['labels'] = tf.convert_to_tensor(element['labels'])
            return kept

        def read(element):
            records = tf_reader.record_dataset(element['path'], element['offset'])
            return records.map(lambda record: decode(element, record))

        return tf.data.Dataset.from_tensor_slices(elements).flat_map(read)


def register_task(
    name: str,
    source: Mapping[str, Any],
    *,
    tokenizer: str | None = None,
    normaliser: str = 'english',
    **limits: Any,
) -> seqio.Task:
    """Registers a source of a stream as a SeqIO task.

    Args:
      name: letters, digits, `_`, `.` and `:`, not registered yet.
      source: `selection`, `labels` and `filter`, as in a stream's source.
      tokenizer: path of a .model file; required with labels. Its vocabulary becomes the feature's.
      normaliser, limits: as in a stream's config (min_seconds, max_seconds, max_labels, ...).
    """
    from bigssl_jax.data.stream import DEFAULTS  # stream.py imports this module too, on demand

    spec = config_lib.merge(f'task {name}', SOURCE_DEFAULTS, config_lib.to_dict(source))
    settings = config_lib.merge(
        f'task {name}', DEFAULTS, {'tokenizer': tokenizer, 'normaliser': normaliser, **limits}
    )
    features: dict[str, Any] = {'audio': seqio.ContinuousFeature(dtype='int16', rank=1)}
    if spec['labels'] is not None:
        if tokenizer is None:
            raise ConfigError(f'task {name!r} has labels, so it needs a tokenizer')
        features['labels'] = seqio.Feature(load_tokenizer(tokenizer), add_eos=False)
    return seqio.TaskRegistry.add(
        name,
        source=PlanSource(spec, settings, name),
        output_features=features,
        preprocessors=[],
        shuffle_buffer_size=None,
    )


def register_mixture(name: str, rates: Mapping[str, float]) -> seqio.Mixture:
    """Registers a mixture of registered tasks with their rates (shares of utterances)."""
    return seqio.MixtureRegistry.add(name, [(task, float(rate)) for task, rate in rates.items()])


def expand(name: str, spec: Mapping[str, Any], rates: str) -> dict[str, dict[str, Any]]:
    """The sources that a registered name stands for: {source name: source}.

    Args:
      name: the name of the source in the stream.
      spec: a source with `task` set; its labels and filter, if set, replace the task's.
      rates: the stream's `rates`; a mixture states shares, so it needs 'weights'.

    Raises:
      ConfigError: the name is not registered, is no task of ours, or is a mixture in a stream with
        proportional rates.
    """
    task_name = spec['task']
    if spec['selection'] is not None:
        raise ConfigError(f'sources.{name} has both a task and a selection; keep one')
    if task_name in seqio.TaskRegistry.names():
        return {name: _source_of(seqio.TaskRegistry.get(task_name), spec, spec['weight'])}
    if task_name in seqio.MixtureRegistry.names():
        if rates != 'weights':
            raise ConfigError(
                f'sources.{name}: mixture {task_name!r} states rates, so the stream'
                " needs rates='weights'"
            )
        mixture = seqio.MixtureRegistry.get(task_name)
        return {
            f'{name}/{task.name}': _source_of(
                task, spec, spec['weight'] * mixture.get_rate(task) / mixture.total_rate
            )
            for task in mixture.tasks
        }
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    raise config_lib.unknown_field(f'sources.{name}.task', str(task_name), names)


def _source_of(task: seqio.Task, spec: Mapping[str, Any], weight: float) -> dict[str, Any]:
    if not isinstance(task.source, PlanSource):
        raise ConfigError(f'seqio task {task.name!r} was not made by register_task')
    own = task.source.spec
    return {
        **own,
        'task': None,
        'weight': float(weight),
        'labels': own['labels'] if spec['labels'] is None else spec['labels'],
        'filter': own['filter'] if spec['filter'] is None else spec['filter'],
    }
