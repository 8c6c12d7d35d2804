"""Streams: endless, ordered batches of one or several sources; batch k is a function of k alone.

    config + seed --> sources (rows, labels) --> order (order.py) --> plan (plan.py)
                                                                        |
    .batch(k)    numpy, one batch, for tests and tools       <----------+---> fingerprint
    .batches(k)  tf.data in threads, k, k+1, ... for training <---------+

Nothing has to be saved to continue: open the same stream and start at k. Host h of H reads rows
[h B / H, (h + 1) B / H) of every global batch, so another number of hosts continues the same run;
the `fingerprint` tells whether it is still the same stream. `one_pass` is the finite form for
evaluation and labelling.

A batch is a dict of numpy arrays (B rows of this host, S samples, U labels):

    audio          int16 [B, S]   16 kHz, zero padded
    sample_counts  int32 [B]      0 marks a filler row
    labels         int32 [B, U]   token ids, 0 padded           (labelled streams only)
    label_counts   int32 [B]                                    (labelled streams only)
    rows           int32 [B]      row in the global batch, for per-row random keys
    sources        int32 [B]      number of the source, in the order of names; -1 = filler
    utterances     int32 [B]      row in that source; -1 = filler
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError
from bigssl_jax.data import buckets as buckets_lib
from bigssl_jax.data.batch_iterator import Batch, BatchIterator
from bigssl_jax.data.errors import BadAudio, DataError
from bigssl_jax.data.order import ORDER_VERSION, SEGMENT_SIZE, Order
from bigssl_jax.data.plan import Members, PassPlan, StreamPlan
from bigssl_jax.data.sources import SOURCE_DEFAULTS, Source, open_source
from bigssl_jax.data.tensorflow_start import tensorflow
from bigssl_jax.data.text import check_normaliser
from bigssl_jax.data.tokenizer import Tokenizer

DEFAULTS: dict[str, Any] = {
    'sources': {},  # name -> source, see sources.SOURCE_DEFAULTS
    'selections': {},  # named selections that sources and `exclude` may refer to
    'rates': 'proportional',  # 'proportional': rows x weight, so that weight 1 keeps epochs equal;
    # 'weights': the weights themselves
    'tokenizer': None,  # a .model file; required for labelled sources
    'normaliser': 'english',
    'batch_seconds': 64.0,  # padded seconds of a global batch, at most
    'max_batch': None,  # utterances of a global batch, at most
    'multiple_of': 1,  # every batch size is a multiple of this
    'num_buckets': 4,
    'bucket_seconds': None,  # explicit bounds instead of the optimal ones
    'min_seconds': 0.0,
    'max_seconds': None,
    'max_labels': None,
    'for_ctc': True,  # leaves out what CTC cannot align; a transducer can
    'max_left_out': 1.0,  # fraction of texts that may be unusable: empty, too long, impossible ...
    'max_unknown': 0.05,  # fraction of texts that may hold characters the tokenizer lacks
    'segment_size': SEGMENT_SIZE,  # positions with exact quotas per source; part of the order
}
# What makes a row one.
FILLER = {'sample_counts': 0, 'sources': -1, 'utterances': -1, 'label_counts': 0}
_LABEL_STEP = 8  # U is a multiple of this, so that small changes of text do not change shapes


def stream(
    config: Any,
    seed: int,
    host: int = 0,
    num_hosts: int = 1,
    cursor: Mapping[str, Any] | None = None,
) -> 'Stream':
    """Opens an endless stream.

    Args:
      config: a mapping with fields as in `DEFAULTS`; unknown fields are errors.
      seed: everything random follows from it.
      host, num_hosts: which slice of the global batches `batch` and `batches` give.
      cursor: optional, from `Stream.cursor`; makes the first batch of a very large corpus quick,
        and refuses to continue another stream.

    Raises:
      ConfigError, DataError: a bad field, an incomplete corpus or label set, nothing to train on.
    """
    config = resolve(config)
    sources = _open_sources(config)
    rates = [s.weight * (len(s) if config['rates'] == 'proportional' else 1) for s in sources]
    order = Order.create([len(s) for s in sources], rates, seed, config['segment_size'])
    shapes = _shapes(config, sources, np.asarray(order.quotas, np.float64))
    plan = StreamPlan(order, [s.lengths for s in sources], shapes.bounds, shapes.sizes)
    opened = Stream(sources, shapes, plan, host, num_hosts, ('stream', seed, order.quotas))
    if cursor is not None:
        opened.restore(cursor)
    return opened


def one_pass(
    config: Any, host: int = 0, num_hosts: int = 1, part: tuple[int, int] | None = None
) -> 'Stream':
    """Opens a finite pass: every utterance once, longest first, last batches filled up.

    Args:
      config: as for `stream`; weights and rates have no meaning here.
      part: (i, n) takes the i-th of n equal runs of the rows of each source, in row order, so that
        work can be cut into parts whose results are written one by one.

    Returns:
      a `Stream` with `num_batches`. Rows of a batch find their place in the selection's order by
      its `sources` and `utterances` (which count within the whole source, not within the part).
    """
    config = resolve(config)
    sources = _open_sources(config)
    shapes = _shapes(config, sources, np.array([len(s) for s in sources], float))
    return _pass(sources, shapes, host, num_hosts, part)


def _pass(
    sources: list[Source],
    shapes: '_Shapes',
    host: int,
    num_hosts: int,
    part: tuple[int, int] | None,
) -> 'Stream':
    ranges = [_part_range(len(s), part) for s in sources]
    plan = PassPlan([s.lengths for s in sources], shapes.bounds, shapes.sizes, ranges)
    return Stream(sources, shapes, plan, host, num_hosts, ('pass', part))


def resolve(config: Any) -> dict[str, Any]:
    """A stream config with every field set. ConfigError names an unknown or mistyped field."""
    config = config_lib.merge('stream', DEFAULTS, config_lib.to_dict(config))
    check_normaliser(config['normaliser'])
    config_lib.choose('stream.rates', config['rates'], ('proportional', 'weights'))
    for field in ('batch_seconds', 'multiple_of', 'num_buckets', 'segment_size'):
        if config[field] <= 0:
            raise ConfigError(f'stream.{field} is {config[field]!r}; it must be above 0')
    if not config['sources']:
        raise ConfigError('stream.sources is empty; it must name at least one source')
    sources: dict[str, Any] = {}
    for name, spec in config['sources'].items():
        sources.update(_expand(name, spec, config['rates']))
    # By name, not as written: configs read back from JSON are sorted; the order must not change.
    config['sources'] = {name: sources[name] for name in sorted(sources)}
    return config


def _expand(name: str, spec: Any, rates: str) -> dict[str, Any]:
    """Sources that a name in the seqio registry stands for; others as they are."""
    spec = {'task': spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping):
        raise ConfigError(f'stream.sources.{name} is {spec!r}; it must be a group of fields')
    spec = config_lib.merge(f'stream.sources.{name}', SOURCE_DEFAULTS, spec)
    if spec['task'] is None:
        return {name: spec}
    tensorflow()
    from bigssl_jax.data import tasks

    return tasks.expand(name, spec, rates)


def _open_sources(config: Mapping[str, Any]) -> list[Source]:
    tokenizer = Tokenizer(config['tokenizer']) if config['tokenizer'] else None
    sources = [
        open_source(name, spec, config, tokenizer) for name, spec in config['sources'].items()
    ]
    labelled = [s.label_values is not None for s in sources]
    if any(labelled) and not all(labelled):
        names = [s.name for s, has in zip(sources, labelled, strict=True) if not has]
        raise ConfigError(
            f'stream.sources: {", ".join(names)} has no labels while others have;'
            ' put unlabelled sources into a stream of their own'
        )
    for source in sources:
        if source.excluded or source.unknown['rows']:
            logging.info(
                'source %s: %d utterances; left out %s; unknown characters in %s',
                source.name,
                len(source),
                source.excluded or 'none',
                source.unknown['rows'],
            )
    return sources


class _Shapes:
    """The buckets of a stream: bounds in samples, batch sizes, label widths, padding."""

    def __init__(
        self, bounds: np.ndarray, sizes: list[int], widths: list[int] | None, padding: float
    ):
        self.bounds, self.sizes, self.widths, self.padding = bounds, sizes, widths, padding

    def shapes(self) -> list[tuple[int, int, int]]:
        widths = self.widths or [0] * len(self.sizes)
        return [
            (int(b), int(s), int(u))
            for b, s, u in zip(self.sizes, self.bounds, widths, strict=True)
        ]


def _shapes(config: Mapping[str, Any], sources: list[Source], rates: np.ndarray) -> _Shapes:
    longest = max(int(block.max()) for s in sources for block in s.lengths.blocks())
    step = buckets_lib.bin_step(longest)
    total = np.zeros(-(-longest // step))
    samples = 0.0
    for source, rate in zip(sources, rates, strict=True):
        weight = float(rate) / len(source)
        total += buckets_lib.length_histogram(source.lengths.blocks(), longest, weight)[1]
        samples += weight * source.samples
    edges: np.ndarray = np.arange(1, total.size + 1, dtype=np.int64) * step
    if config['bucket_seconds'] is None:
        bounds = buckets_lib.optimal_bounds(edges, total, config['num_buckets'])
    else:
        bounds = np.unique(np.round(np.asarray(config['bucket_seconds']) * 16000).astype(np.int64))
        if bounds[-1] < longest:
            raise ConfigError(
                f'stream.bucket_seconds ends at {bounds[-1] / 16000:g} s, the longest utterance has'
                f' {longest / 16000:.2f} s: add a bound or set max_seconds'
            )
    sizes = buckets_lib.batch_sizes(
        bounds, config['batch_seconds'], config['multiple_of'], config['max_batch']
    )
    used = buckets_lib.bucket_of(edges, bounds)  # bins may straddle explicit bounds: approximate
    padded = float((bounds[np.minimum(used, bounds.size - 1)] * total).sum())
    widths = _label_widths(sources, bounds) if sources[0].label_values is not None else None
    return _Shapes(bounds, sizes, widths, 1.0 - samples / padded)


def _label_widths(sources: list[Source], bounds: np.ndarray) -> list[int]:
    widths: np.ndarray = np.ones(bounds.size, np.int64)
    for source in sources:
        first = 0
        for block in source.lengths.blocks():
            counts = source.label_counts(np.arange(first, first + block.size))
            np.maximum.at(widths, buckets_lib.bucket_of(block, bounds), counts)
            first += block.size
    return (-(-widths // _LABEL_STEP) * _LABEL_STEP).tolist()


def _part_range(size: int, part: tuple[int, int] | None) -> range:
    if part is None:
        return range(size)
    index, count = part
    if not 0 <= index < count:
        raise ConfigError(f'part is {part!r}; it must be (i, n) with 0 <= i < n')
    return range(index * size // count, (index + 1) * size // count)


class Stream:
    """Batches of sources, endless or finite. Made by `stream` and `one_pass`.

    Attributes:
      shapes: [(B, S, U)] of each bucket, for the global batch; U = 0 without labels.
      num_batches: number of batches of a finite pass; None for an endless stream.
      num_utterances, hours: what the sources hold after exclusions.
      excluded: {source: {reason: utterances}}.
      unknown: {source: {'rows', 'tokens', 'characters'}}: text outside the tokenizer.
      padding_fraction: expected share of padded samples that are padding.
      fingerprint: hex; equal for streams that give equal global batches.
    """

    def __init__(
        self,
        sources: list[Source],
        shapes: _Shapes,
        plan: StreamPlan | PassPlan,
        host: int,
        num_hosts: int,
        kind: tuple,
    ):
        if not 0 <= host < num_hosts:
            raise ConfigError(f'host {host} of {num_hosts} hosts')
        # The batch sizes must not follow the number of hosts: another number continues this run.
        if any(size % num_hosts for size in shapes.sizes):
            raise ConfigError(
                f'stream.multiple_of must be a multiple of the {num_hosts} hosts:'
                f' batch sizes are {shapes.sizes}'
            )
        self.sources, self.plan, self._shapes = sources, plan, shapes
        self.host, self.num_hosts = host, num_hosts
        self.shapes = shapes.shapes()
        self.padding_fraction = shapes.padding
        self.num_batches = plan.num_batches
        self.num_utterances = sum(map(len, sources))
        self.hours = sum(s.samples for s in sources) / 57.6e6
        self.excluded = {s.name: s.excluded for s in sources}
        self.unknown = {s.name: s.unknown for s in sources}
        self.has_labels = shapes.widths is not None
        content = [ORDER_VERSION, kind, self.shapes, [[s.name, s.identity] for s in sources]]
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError('an endless stream has no length')
        return self.num_batches

    def part(self, index: int, count: int) -> 'Stream':
        """The `index`-th of `count` parts of a finite pass, as `one_pass(part=)` gives it."""
        return _pass(self.sources, self._shapes, self.host, self.num_hosts, (index, count))

    def shape_of(self, k: int) -> tuple[int, int, int]:
        """(B, S, U) of global batch k."""
        return self.shapes[self.plan.bucket(k)]

    def batch(self, k: int, bad: list[dict[str, str]] | None = None) -> Batch:
        """This host's rows of batch k, read by numpy alone.

        Args:
          k: number of the batch.
          bad: is given {'id', 'reason', 'detail'} of each utterance that cannot be read, whose row
            becomes a filler; None: such an utterance is an error.

        Raises:
          DataError: a shard is damaged.
        """
        members = self._mine(k)
        batch = self._frame(k, members)
        shape = members.source.size, self.shapes[members.bucket][1]
        audio: np.ndarray = np.zeros(shape, np.int16)
        for place in np.flatnonzero(members.source >= 0):
            source = self.sources[members.source[place]]
            row = int(source.corpus_rows(members.row[place]))
            try:
                samples = source.corpus.read(row)
            except BadAudio as error:
                if bad is None:
                    raise
                name = source.corpus.column('id')[row].as_py()
                detail = f'{os.path.basename(error.source)}: {error.detail}'
                bad.append({'id': name, 'reason': error.reason, 'detail': detail})
                for key in FILLER.keys() & batch.keys():
                    batch[key][place] = FILLER[key]
            else:
                audio[place, : samples.size] = samples
        return {'audio': audio, **batch}

    def batches(
        self,
        start: int = 0,
        prefetch: int = 4,
        threads: int = 2,
        bad: list[dict[str, str]] | None = None,
    ) -> 'BatchIterator':
        """Batches start, start + 1, ... read ahead by tf.data; the same as `batch`, also in `bad`.

        Use it as a context manager, or call `close`. Ends after the last batch of a finite pass.
        """
        tensorflow()  # imported here once, not by several threads at a time
        read = functools.partial(self.read, bad=bad)
        return BatchIterator(read, start, self.num_batches, prefetch, threads)

    def ids(self, k: int) -> list[str]:
        """Ids of this host's utterances in batch k; '' for fillers."""
        members = self._mine(k)
        names = []
        for number, row in zip(members.source, members.row, strict=True):
            if number < 0:
                names.append('')
            else:
                source = self.sources[number]
                names.append(source.corpus.column('id')[int(source.corpus_rows(row))].as_py())
        return names

    def left_out(self) -> Iterator[dict[str, str]]:
        """{'source', 'id', 'reason'} of each utterance whose text cannot be learned from."""
        for source in self.sources:
            for reason, rows in source.left_out.items():
                for name in source.corpus.column('id').take(rows).to_pylist():
                    yield {'source': source.name, 'id': name, 'reason': reason}

    def epochs(self, k: int) -> dict[str, float]:
        """How often each source was gone through before batch k of an endless stream."""
        if not isinstance(self.plan, StreamPlan):
            raise TypeError('only an endless stream has epochs')
        draws = self.plan.draws(self.plan.members(k - 1).end if k > 0 else 0)
        return {s.name: float(d) / len(s) for s, d in zip(self.sources, draws, strict=True)}

    def cursor(self, k: int) -> dict[str, Any]:
        """A few numbers (plain JSON) with which `stream(..., cursor=)` finds batch k at once."""
        if not isinstance(self.plan, StreamPlan):
            raise TypeError('only an endless stream has a cursor')
        return {'fingerprint': self.fingerprint, 'batch': int(k), **self.plan.cursor(k)}

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Takes over a cursor. DataError if it is of another stream."""
        if not isinstance(self.plan, StreamPlan):
            raise TypeError('only an endless stream has a cursor')
        if cursor['fingerprint'] != self.fingerprint:
            raise DataError(
                f'the stream has changed: its fingerprint is {self.fingerprint[:16]}, the'
                f' checkpoint was made with {cursor["fingerprint"][:16]} (other corpus, labels,'
                ' sources, weights, buckets or seed): restore the config, or start a new run'
            )
        self.plan.restore(dict(cursor))

    def read(self, k: int, bad: list[dict[str, str]] | None = None) -> Batch:
        """This host's rows of batch k, read by tf.data; `bad` as for `batch`."""
        from bigssl_jax.data import tf_reader

        members = self._mine(k)
        batch = self._frame(k, members)
        samples = self.shapes[members.bucket][1]
        real = np.flatnonzero(members.source >= 0)  # fillers, if any, come last
        audio: np.ndarray = np.zeros((0, samples), np.int16)
        if real.size:
            paths, offsets = self._records(members, real)
            try:
                audio = tf_reader.read_audio_batch(
                    paths, offsets, batch['sample_counts'][real], samples
                )
            except DataError as error:
                by_row = self.batch(k, bad)  # the plain reader names the shard and the row
                if bad is not None:
                    return by_row
                raise DataError(f'batch {k}: {error}') from None
        if real.size < members.source.size:
            audio = np.concatenate(
                [audio, np.zeros((members.source.size - real.size, samples), np.int16)]
            )
        return {'audio': audio, **batch}

    def _mine(self, k: int) -> Members:
        members = self.plan.members(k)
        size = members.source.size
        mine = slice(self.host * size // self.num_hosts, (self.host + 1) * size // self.num_hosts)
        return Members(
            members.bucket,
            members.source[mine],
            members.row[mine],
            members.epoch[mine],
            members.end,
        )

    def _frame(self, k: int, members: Members) -> Batch:
        """Everything of a batch but its audio."""
        size, (total, _, width) = members.source.size, self.shapes[members.bucket]
        first = self.host * total // self.num_hosts
        batch: Batch = {
            'sample_counts': np.zeros(size, np.int32),
            'rows': np.arange(first, first + size, dtype=np.int32),
            'sources': members.source.astype(np.int32),
            'utterances': members.row.astype(np.int32),
        }
        if self.has_labels:
            batch['labels'] = np.zeros((size, width), np.int32)
            batch['label_counts'] = np.zeros(size, np.int32)
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(members.source == number)
            rows = members.row[places]
            batch['sample_counts'][places] = source.lengths[rows]
            if self.has_labels:
                for place, row in zip(places, rows, strict=True):
                    labels = source.labels(row)
                    batch['labels'][place, : labels.size] = labels
                    batch['label_counts'][place] = labels.size
        return batch

    def _records(self, members: Members, real: np.ndarray) -> tuple[list[str], np.ndarray]:
        paths = [''] * real.size
        offsets: np.ndarray = np.zeros(real.size, np.int64)
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(members.source[real] == number)
            rows = source.corpus_rows(members.row[real[places]])
            offsets[places] = source.corpus.offset_of[rows]
            for place, shard in zip(places, source.corpus.shard_of[rows], strict=True):
                paths[place] = source.corpus.shard_paths[shard]
        return paths, offsets
