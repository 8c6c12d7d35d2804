"""Bootstrap intervals of error rates, by resampling whole units.

An error rate is a ratio of sums, errors over words, so its interval comes from resampling the units
that were drawn independently, and summing both:

    rate*_r = sum_g n_rg errors_g / sum_g n_rg words_g,   n_r ~ Multinomial(G, 1/G),  r = 1..R

A unit is a speaker when speakers are known, else an utterance: utterances of one speaker are hard
or easy together, and an interval that takes them for independent is too narrow.  With few speakers
the interval is coarse, so every result says how many units it rests on.

Legend: N utterances, G units, K quantities, R replicates.
Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance
evaluation", ICASSP 2004.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Entries of an index matrix held at once; bounds memory whatever the number of units.
_CHUNK = 1 << 22


def units_of(count: int, speakers: Sequence[str | None] | None) -> tuple[np.ndarray, str]:
    """Numbers the independent units of `count` utterances.

    Args:
      count: number of utterances N.
      speakers: their speakers, '' or None where unknown (such an utterance is a unit by itself).

    Returns:
      (unit of each utterance int64 [N] in 0..G-1, 'speaker' | 'utterance').

    Raises:
      ValueError: the number of speakers is not N.
    """
    by_utterance = np.arange(count), 'utterance'
    if speakers is None:
        return by_utterance
    if len(speakers) != count:
        raise ValueError(f'{count} utterances but {len(speakers)} speakers; give one for each')
    if len({s for s in speakers if s}) < 2:
        return by_utterance
    names = [('speaker', s) if s else ('utterance', n) for n, s in enumerate(speakers)]
    numbers = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names]), 'speaker'


def unit_totals(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Sums `values` [N, K] over the utterances of each unit: int64 [G, K]."""
    totals = np.zeros((int(units.max()) + 1, values.shape[1]), np.int64)
    np.add.at(totals, units, values)
    return totals


def resampled_sums(totals: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Sums of `totals` [G, K] over `replicates` resamples of G units: int64 [R, K]."""
    generator = np.random.default_rng(seed)
    count = len(totals)
    rows = max(1, _CHUNK // count)
    sums = []
    for first in range(0, replicates, rows):
        picks = generator.integers(count, size=(min(rows, replicates - first), count))
        sums.append(np.stack([column[picks].sum(1) for column in totals.T], axis=1))
    return np.concatenate(sums)


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central `level` percentile interval of `samples` [R].

    Replicates that drew no reference words have no rate (NaN) and are left out.
    """
    if not np.isfinite(samples).any():
        return float('nan'), float('nan')
    tail = 50.0 * (1.0 - level)
    low, high = np.nanpercentile(samples, [tail, 100.0 - tail])
    return float(low), float(high)


def ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """Element-wise float64 quotient, NaN where the denominator is 0."""
    safe = np.where(denominator == 0, 1, denominator)
    return np.where(denominator == 0, np.nan, numerator / safe)
