"""Is one system better than another on the same utterances?  A paired test.

Both systems heard the same units (speakers, or utterances), so what matters is the difference of
their errors on each unit, d_g = errors_b(g) - errors_a(g).

- The interval of the difference of rates resamples units, the same ones for both systems.
- The p value is that of the approximate randomisation test: if the systems were the same, swapping
  their outputs on any unit would change nothing but the sign of d_g, so

      p = share of sign patterns with |sum_g +-d_g| >= |sum_g d_g|

  over all 2^G patterns when there are few units, else over R random ones; then
  p = (1 + hits) / (1 + R), so that a finite number of patterns never yields p = 0.

Sources: Noreen, "Computer-intensive methods for testing hypotheses", 1989 (randomisation); Bisani
and Ney, ICASSP 2004 (bootstrap of the difference).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigssl_jax.evaluation import bootstrap
from bigssl_jax.evaluation.wer import ErrorCounts, Unit, count_errors, finite_or_none

REPLICATES = 10_000
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """System b against system a.

    Attributes:
      difference: rate of b - rate of a; negative when b is better; NaN without reference words.
      interval: bootstrap interval (low, high) of the difference; NaN with fewer than two units.
      p_value: two-sided, of "the systems are the same".
      fewer_errors: utterances on which b makes fewer errors than a; likewise `more_errors`.
      utterances: number of utterances.
      resampled: 'speaker' or 'utterance'.
      units: number of such units.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    fewer_errors: int
    more_errors: int
    utterances: int
    resampled: str
    units: int

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not defined are null."""
        return {
            'difference': finite_or_none(self.difference),
            'low': finite_or_none(self.interval[0]),
            'high': finite_or_none(self.interval[1]),
            'p': self.p_value,
            'fewer_errors': self.fewer_errors,
            'more_errors': self.more_errors,
            'utterances': self.utterances,
            'resampled': self.resampled,
            'units': self.units,
        }


def paired_test(
    references: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    speakers: Sequence[str | None] | None = None,
    *,
    unit: Unit = 'word',
    replicates: int = REPLICATES,
    level: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Compares two systems on the same utterances.

    Args:
      references: N normalised texts.
      a: the first system's N texts.
      b: the second system's N texts.
      speakers: N speakers; units are speakers when there are at least two, else utterances.
      unit: 'word' or 'character'.
      replicates: bootstrap resamples, and sign patterns of the randomisation test.
      level: probability of the interval.
      seed: of both.

    Raises:
      ValueError: no utterances, or lists of different lengths.
    """
    counts_a, counts_b = (count_errors(references, system, unit) for system in (a, b))
    return compare(counts_a, counts_b, speakers, replicates=replicates, level=level, seed=seed)


def compare(
    a: ErrorCounts,
    b: ErrorCounts,
    speakers: Sequence[str | None] | None = None,
    *,
    replicates: int = REPLICATES,
    level: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """`paired_test` of per-utterance counts of the same utterances."""
    words = a.reference_words
    delta = b.errors - a.errors
    units, resampled = bootstrap.units_of(len(words), speakers)
    totals = bootstrap.unit_totals(np.stack([delta, words], 1), units)
    low = high = float('nan')
    if len(totals) > 1:
        sums = bootstrap.resampled_sums(totals, replicates, seed)
        low, high = bootstrap.interval(bootstrap.ratio(sums[:, 0], sums[:, 1]), level)
    return PairedTest(
        difference=float(bootstrap.ratio(delta.sum(), words.sum())),
        interval=(low, high),
        p_value=randomisation_p(totals[:, 0], replicates, seed),
        fewer_errors=int((delta < 0).sum()),
        more_errors=int((delta > 0).sum()),
        utterances=len(words),
        resampled=resampled,
        units=len(totals),
    )


def randomisation_p(differences: np.ndarray, replicates: int, seed: int) -> float:
    """Two-sided p value of the randomisation test.

    Args:
      differences: errors of b - errors of a on each unit, int64 [G].
      replicates: random sign patterns, used when 2^G exceeds it.
      seed: of the patterns.
    """
    # Units without a difference contribute nothing under any sign.
    differences = differences[differences != 0]
    observed = abs(int(differences.sum()))
    count = len(differences)
    if 2**count <= replicates:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return float((abs((2 * bits - 1) @ differences) >= observed).mean())
    generator = np.random.default_rng(seed)
    rows, hits = max(1, _CHUNK // count), 0
    for first in range(0, replicates, rows):
        shape = min(rows, replicates - first), count
        signs = 2 * generator.integers(2, size=shape, dtype=np.int8) - 1
        hits += int((abs(signs @ differences) >= observed).sum())
    return (1 + hits) / (1 + replicates)
