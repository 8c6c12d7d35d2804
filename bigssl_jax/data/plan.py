"""Plans: which utterances form batch k. Arithmetic only; nothing here touches audio.

`StreamPlan` is endless. Positions of the order fall into buckets by length; a bucket emits a batch
when it is full, and batches are numbered in the order of the positions that filled them:

    position   0  1  2  3  4  5  6  7  8 ...          bucket 0 takes 3, bucket 1 takes 2
    bucket     0  1  0  0  0  1  0  0  1 ...
    batch               0     1     2                 batch 1 = positions 1 and 5

What a bucket has not emitted at the end of a segment is carried into the next, so nothing is lost.
Batch k needs no replay: how many members each bucket had before segment g follows from the counts
of whole epochs, which never change, plus one partial epoch per source; the carried members are the
last ones of earlier segments. Those counts (a few integers) are the whole state of a stream.

`PassPlan` is finite: every utterance once, longest first, buckets completed by fillers (source -1).
"""

import collections
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigssl_jax.data.buckets import bucket_of
from bigssl_jax.data.order import Order

_BLOCK = 1 << 16
_KEPT_SEGMENTS = 4
_KEPT_ANCHORS = 4096


class Lengths(Protocol):
    """Sample counts by row: an array, or something that reads them from an index on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Members(NamedTuple):
    """One global batch: its bucket and, row by row, source int32 [B], row and epoch int64 [B].

    `end` is the stream position after the batch's last member (0 in a finite pass).
    """

    bucket: int
    source: np.ndarray
    row: np.ndarray
    epoch: np.ndarray
    end: int


class _Segment(NamedTuple):
    source: np.ndarray  # [S]
    row: np.ndarray  # [S]
    epoch: np.ndarray  # [S]
    place: np.ndarray  # [S] positions within the segment, sorted by bucket, then position
    start: np.ndarray  # [K + 1] where each bucket's positions begin in `place`


class StreamPlan:
    """Batches of an endless stream.

    Args:
      order: which row stands where.
      lengths: for each source, sample counts by row.
      bounds: bucket bounds in samples [K].
      batch_sizes: utterances per (global) batch of each bucket [K].
    """

    num_batches: int | None = None

    def __init__(
        self,
        order: Order,
        lengths: Sequence[Lengths],
        bounds: np.ndarray,
        batch_sizes: Sequence[int],
    ):
        self.order, self.bounds = order, np.asarray(bounds, np.int64)
        self.sizes = np.asarray(batch_sizes, np.int64)
        self._lengths = list(lengths)
        self._segments: collections.OrderedDict[int, _Segment] = collections.OrderedDict()
        self._emissions: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}
        self._anchors: dict[int, np.ndarray] = {0: np.zeros(len(self.sizes), np.int64)}
        self._epoch_counts = [self._count_rows(s, np.arange(0)) for s in range(len(lengths))]
        for source, size in enumerate(order.sizes):
            for start in range(0, size, _BLOCK):
                rows = np.arange(start, min(start + _BLOCK, size))
                self._epoch_counts[source] += self._count_rows(source, rows)
        self._lock = threading.RLock()

    def members(self, k: int) -> Members:
        """The utterances of batch k >= 0, in stream order. Thread-safe."""
        with self._lock:
            number, bucket, first = self._find(int(k))
            segment = self._segment(number)
            size = int(self.sizes[bucket])
            begin = segment.start[bucket]
            place = segment.place[begin + max(first, 0) : begin + first + size]
            parts = self._before(number, bucket, -first)
            parts.append((segment.source[place], segment.row[place], segment.epoch[place]))
            end = number * self.order.segment_size + int(place[-1]) + 1
        source, row, epoch = map(np.concatenate, zip(*parts, strict=True))
        return Members(bucket, source, row, epoch, end)

    def bucket(self, k: int) -> int:
        """The bucket of batch k."""
        with self._lock:
            return self._find(int(k))[1]

    def draws(self, position: int) -> np.ndarray:
        """How often each source was drawn before a stream position: int64 [sources]."""
        number, place = divmod(position, self.order.segment_size)
        quotas = np.asarray(self.order.quotas, np.int64)
        part = np.bincount(self.order.interleave(number)[:place], minlength=quotas.size)
        return number * quotas + part

    def cursor(self, k: int) -> dict:
        """What makes batch k cheap to find: {'segment': int, 'counts': [int]}, plain JSON."""
        with self._lock:
            number = self._find(int(k))[0]
            return {'segment': number, 'counts': self._counts_before(number).tolist()}

    def restore(self, cursor: dict) -> None:
        """Takes over a cursor of the same plan."""
        with self._lock:
            self._anchors[int(cursor['segment'])] = np.asarray(cursor['counts'], np.int64)

    def _find(self, k: int) -> tuple[int, int, int]:
        """(segment, bucket, index of the first member in the segment's bucket) of batch k.

        The index is negative when members were carried over from earlier segments.
        """
        if k < 0:
            raise IndexError(f'batch {k}: batches are numbered from 0')
        number = self._segment_of_batch(k)
        if number not in self._emissions:
            while len(self._emissions) >= _KEPT_SEGMENTS:
                self._emissions.pop(next(iter(self._emissions)))
            self._emissions[number] = self._emission(number)
        before, bucket, first = self._emissions[number]
        return number, int(bucket[k - before]), int(first[k - before])

    def _emission(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(batches before a segment, bucket and first member of each batch emitted in it)."""
        before, segment = self._counts_before(number), self._segment(number)
        carry = before % self.sizes
        emitted = (carry + np.diff(segment.start)) // self.sizes
        bucket: np.ndarray = np.repeat(np.arange(self.sizes.size), emitted)
        index = np.arange(bucket.size) - np.repeat(np.cumsum(emitted) - emitted, emitted)
        first = index * self.sizes[bucket] - carry[bucket]
        filled_at = segment.place[segment.start[bucket] + first + self.sizes[bucket] - 1]
        order = np.argsort(filled_at, kind='stable')
        return int((before // self.sizes).sum()), bucket[order], first[order]

    def _segment_of_batch(self, k: int) -> int:
        share = sum(
            c * q / n
            for c, q, n in zip(self._epoch_counts, self.order.quotas, self.order.sizes, strict=True)
        )
        per_segment = float((share / self.sizes).sum())  # mean batches per segment
        latest = next(reversed(self._segments), 0)
        number = latest if abs(k / per_segment - latest) < 3 else int(k / per_segment)
        for _ in range(4):
            jump = (k - self._batches_before(number)) / per_segment
            if -1 < jump < 2:
                break
            number = max(0, number + int(jump))
        while self._batches_before(number) > k:
            number -= 1
        while self._batches_before(number + 1) <= k:
            number += 1
        return number

    def _batches_before(self, number: int) -> int:
        return int((self._counts_before(number) // self.sizes).sum())

    def _counts_before(self, number: int) -> np.ndarray:
        """Members that each bucket received before a segment: int64 [K]."""
        if number not in self._anchors:
            if number - 1 in self._anchors:
                counts = self._anchors[number - 1] + np.diff(self._segment(number - 1).start)
            elif number + 1 in self._anchors:
                counts = self._anchors[number + 1] - np.diff(self._segment(number).start)
            else:
                counts = np.zeros(len(self.sizes), np.int64)
                for source, quota in enumerate(self.order.quotas):
                    counts = counts + self._counts_of_draws(source, number * quota)
            while len(self._anchors) >= _KEPT_ANCHORS:
                self._anchors.pop(next(a for a in self._anchors if a != 0))
            self._anchors[number] = counts
        return self._anchors[number]

    def _counts_of_draws(self, source: int, draws: int) -> np.ndarray:
        """Members of each bucket among the first draws of a source: whole epochs and a rest."""
        epochs, rest = divmod(draws, self.order.sizes[source])
        counts: np.ndarray = epochs * self._epoch_counts[source]
        for start in range(draws - rest, draws, _BLOCK):
            block = np.arange(start, min(start + _BLOCK, draws))
            counts = counts + self._count_rows(source, self.order.source_rows(source, block)[0])
        return counts

    def _count_rows(self, source: int, rows: np.ndarray) -> np.ndarray:
        buckets = bucket_of(self._lengths[source][rows], self.bounds)
        return np.bincount(buckets, minlength=len(self.sizes)).astype(np.int64)

    def _segment(self, number: int) -> _Segment:
        if number in self._segments:
            self._segments.move_to_end(number)
            return self._segments[number]
        source, row, epoch = self.order.segment(number)
        bucket: np.ndarray = np.empty(source.size, np.int8)
        for index, lengths in enumerate(self._lengths):
            mine = slice(None) if len(self._lengths) == 1 else np.flatnonzero(source == index)
            bucket[mine] = bucket_of(lengths[row[mine]], self.bounds)
        counts = np.bincount(bucket, minlength=len(self.sizes))
        segment = _Segment(
            source,
            row,
            epoch,
            np.argsort(bucket, kind='stable'),
            np.concatenate([[0], np.cumsum(counts)]),
        )
        while len(self._segments) >= _KEPT_SEGMENTS:
            self._segments.popitem(last=False)
        self._segments[number] = segment
        return segment

    def _before(self, number: int, bucket: int, count: int) -> list[tuple[np.ndarray, ...]]:
        """The last `count` members of a bucket before a segment, as parts in stream order."""
        parts: list[tuple[np.ndarray, ...]] = []
        while count > 0:
            number -= 1
            segment = self._segment(number)
            begin, end = segment.start[bucket], segment.start[bucket + 1]
            place = segment.place[max(begin, end - count) : end]
            parts.insert(0, (segment.source[place], segment.row[place], segment.epoch[place]))
            count -= place.size
        return parts


class PassPlan:
    """Batches of one finite pass over everything, longest utterances first.

    Args as in `StreamPlan`; `ranges` are the rows of each source that are passed over.
    The last batch of each bucket is completed by rows of source -1.
    """

    def __init__(
        self,
        lengths: Sequence[Lengths],
        bounds: np.ndarray,
        batch_sizes: Sequence[int],
        ranges: Sequence[range],
    ):
        source: np.ndarray = np.repeat(
            np.arange(len(ranges), dtype=np.int32), [len(r) for r in ranges]
        )
        row = np.concatenate([np.arange(r.start, r.stop, dtype=np.int64) for r in ranges])
        samples = np.concatenate(
            [
                np.asarray(n[np.arange(r.start, r.stop)], np.int64)
                for n, r in zip(lengths, ranges, strict=True)
            ]
        )
        order = np.argsort(-samples, kind='stable')
        self._source, self._row = source[order], row[order]
        bucket = bucket_of(samples[order], np.asarray(bounds))
        self._batches: list[tuple[int, int, int]] = []  # bucket, first, one after the last
        self.sizes = np.asarray(batch_sizes, np.int64)
        for number in reversed(range(len(self.sizes))):
            mine = np.flatnonzero(bucket == number)  # contiguous, since sorted by length
            for start in range(0, mine.size, int(self.sizes[number])):
                end = min(start + int(self.sizes[number]), mine.size)
                self._batches.append((number, int(mine[start]), int(mine[end - 1]) + 1))
        self.num_batches = len(self._batches)

    def members(self, k: int) -> Members:
        """The utterances of batch k; IndexError past the end."""
        bucket, first, last = self._batches[self._checked(k)]
        size = int(self.sizes[bucket])
        source: np.ndarray = np.full(size, -1, np.int32)
        row: np.ndarray = np.full(size, -1, np.int64)
        source[: last - first], row[: last - first] = (
            self._source[first:last],
            self._row[first:last],
        )
        return Members(bucket, source, row, np.zeros(size, np.int64), 0)

    def bucket(self, k: int) -> int:
        """The bucket of batch k."""
        return self._batches[self._checked(k)][0]

    def _checked(self, k: int) -> int:
        if not 0 <= k < self.num_batches:
            raise IndexError(f'batch {k} of a pass with {self.num_batches} batches')
        return int(k)
