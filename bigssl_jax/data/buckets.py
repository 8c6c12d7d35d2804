"""Buckets: the few lengths that batches are padded to, and how many utterances fit each.

Accelerators want static shapes; utterances have every length. So each utterance goes to the
smallest bucket that holds it and is padded to the bucket's bound:

    count |      _                      bounds   b1     b2       b3            b4
          |    _| |_                             |      |        |             |
          |  _|     |__                 padding: the area between each utterance and
          |_|          |_____           the next bound to its right
          +------------------ length

The bounds that waste least are found exactly, by dynamic programming over a histogram of lengths:
W(k, j) = min over i < j of W(k - 1, i) + b_j * count(i, j], the padded length when the first j bins
are covered by k buckets. Quantile bounds waste far more on the skewed lengths of speech.
Every bucket then takes the number of utterances that makes about the same seconds per batch, so
that steps cost about the same time and memory.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from bigssl_jax.data.errors import DataError

SAMPLE_RATE = 16000
ENCODER_FRAME = 640  # samples per encoder frame: a hop of 10 ms, subsampled by four
BOUND_STEP = 2 * ENCODER_FRAME  # bounds are multiples of 80 ms
_MAX_BINS = 512


def encoder_frames(sample_counts: np.ndarray) -> np.ndarray:
    """Encoder frames (40 ms) that so many samples make, at the least: int64, same shape.

    Windows of 25 ms every 10 ms that lie wholly inside the audio, T = 1 + (S - 400) // 160, then
    ceil(T / 4). A front end that pads the ends makes more frames, never fewer.
    """
    samples = np.asarray(sample_counts, np.int64)
    windows = np.where(samples >= 400, 1 + (samples - 400) // 160, 0)
    return -(-windows // 4)


def length_histogram(
    blocks: np.ndarray | Iterable[np.ndarray], longest: int | None = None, weight: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of lengths with upper edges: (edges int64 [N] in samples, counts float64 [N]).

    Bin i holds lengths in (edges[i - 1], edges[i]]; bins are the least multiple of 80 ms wide that
    covers `longest` samples with at most 512 bins.

    Args:
      blocks: sample counts, one array or several (so that an index need not be in memory at once).
      longest: length that the last bin must hold; needed with several arrays.
      weight: what each utterance counts.
    """
    if isinstance(blocks, np.ndarray):
        longest = int(blocks.max(initial=0)) if longest is None else longest
        blocks = [blocks]
    if not longest:
        raise DataError('no utterances to make buckets from: loosen the selection')
    step = bin_step(longest)
    bins = max(1, -(-longest // step))
    counts: np.ndarray = np.zeros(bins, np.int64)
    for block in blocks:
        last = -(-np.asarray(block, np.int64) // step) - 1
        counts += np.bincount(np.maximum(last, 0), minlength=bins)
    return np.arange(1, bins + 1, dtype=np.int64) * step, counts * float(weight)


def bin_step(longest: int) -> int:
    """Width in samples of a histogram's bins for utterances of up to `longest` samples."""
    return BOUND_STEP * max(1, math.ceil(longest / (BOUND_STEP * _MAX_BINS)))


def optimal_bounds(edges: np.ndarray, counts: np.ndarray, num_buckets: int) -> np.ndarray:
    """The bucket bounds with the least padding, by dynamic programming.

    Args:
      edges: int64 [N], upper edges of the bins, increasing (samples).
      counts: [N], utterances (or weights) in each bin.
      num_buckets: at most this many bounds; fewer when fewer bins are occupied.

    Returns:
      int64 [K <= num_buckets], increasing; the last is the edge of the last occupied bin.
    """
    edges, counts = np.asarray(edges, np.int64), np.asarray(counts, np.float64)
    occupied = np.flatnonzero(counts > 0)
    if occupied.size == 0 or num_buckets < 1:
        raise DataError(f'cannot choose {num_buckets} buckets for {occupied.size} lengths')
    edges, counts = edges[occupied], counts[occupied]
    size = edges.size
    below = np.concatenate([[0.0], np.cumsum(counts)])
    # cost[i, j]: bins i..j-1 padded to edge j-1.
    cost = edges[None, :] * (below[None, 1:] - below[:-1, None])
    cost[np.tri(size, k=-1, dtype=bool)] = np.inf
    best, choices = cost[0], []
    for _ in range(min(num_buckets, size) - 1):
        candidates = best[:-1, None] + cost[1:, :]  # [last bin of the rest, end], rest is one less
        choice = np.argmin(candidates, axis=0)
        choices.append(choice)
        fresh = candidates[choice, np.arange(size)]
        # An end that k buckets cannot use up keeps the value of fewer buckets unreachable (inf).
        best = fresh
    end, bounds = size - 1, [int(edges[-1])]
    for choice in reversed(choices):
        end = int(choice[end])
        bounds.append(int(edges[end]))
    return np.array(bounds[::-1], np.int64)


def bucket_of(sample_counts: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Number of the smallest bucket that holds each length: int8 [N]. Bounds are inclusive."""
    return np.searchsorted(bounds, sample_counts, side='left').astype(np.int8)


def batch_sizes(
    bounds: Sequence[int] | np.ndarray,
    batch_seconds: float,
    multiple_of: int = 1,
    max_batch: int | None = None,
) -> list[int]:
    """Utterances per batch for each bucket, so that every batch holds about `batch_seconds`.

    Args:
      bounds: bucket bounds in samples.
      batch_seconds: padded seconds per (global) batch; never exceeded.
      multiple_of: every size is a multiple of this, e.g. the number of devices.
      max_batch: an upper limit for the buckets of short utterances.

    Raises:
      DataError: `batch_seconds` does not hold `multiple_of` of the longest utterances.
    """
    sizes = []
    for bound in bounds:
        size = int(batch_seconds * SAMPLE_RATE // int(bound))
        if max_batch is not None:
            size = min(size, max_batch)
        size -= size % multiple_of
        if size < 1:
            seconds = int(bound) / SAMPLE_RATE
            raise DataError(
                f'batch_seconds={batch_seconds:g} does not hold {multiple_of} utterance(s) of'
                f' {seconds:.2f} s: raise batch_seconds to {seconds * multiple_of:.2f} or lower'
                ' max_seconds'
            )
        sizes.append(size)
    return sizes


def padding_waste(edges: np.ndarray, counts: np.ndarray, bounds: np.ndarray) -> float:
    """Fraction of the padded length that is padding, each bin counted at its upper edge."""
    edges, counts = np.asarray(edges, np.float64), np.asarray(counts, np.float64)
    padded = np.asarray(bounds, np.float64)[np.searchsorted(bounds, edges, side='left')]
    return float(1.0 - (edges * counts).sum() / (padded * counts).sum())
