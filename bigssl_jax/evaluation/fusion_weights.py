"""Tuning of fusion weights on n-best lists: which weights put the right hypotheses first.

    score(y) = acoustic(y) + sum over parts of weight * part(y)

The parts of every hypothesis (log-probability by the language model, by the n-gram model, minus
that of the internal one, number of labels) are known once the audio has been decoded; every point
of a grid of weights then costs one argmax per utterance.  What a grid finds is bound to the lists:
hypotheses that other weights would have found are not on them.  The winner is therefore to be
decoded with once more before it is believed.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

MAX_POINTS = 100_000


@dataclasses.dataclass(frozen=True)
class TunedWeights:
    """The best point of a grid.

    Attributes:
      weights: part -> weight.
      errors: edits of the hypotheses that come first with these weights.
      start_errors: the same with the weights of the search.
      oracle_errors: edits of the best hypothesis of each list: what reordering could reach.
      points: size of the grid.
    """

    weights: dict[str, float]
    errors: int
    start_errors: int
    oracle_errors: int
    points: int


def tune_weights(
    acoustic: np.ndarray,
    parts: Mapping[str, np.ndarray],
    errors: np.ndarray,
    grid: Mapping[str, Sequence[float]],
    start: Mapping[str, float],
) -> TunedWeights:
    """Searches a whole grid.

    Of weights with equally few errors those nearest to the origin win.

    Args:
      acoustic: float [N, K], log-probabilities; -inf where a list has fewer than K hypotheses.
      parts: name -> float [N, K].
      errors: int [N, K], edits of each hypothesis against its reference.
      grid: name of a part -> weights to try; a part without an entry keeps its start weight.
      start: name -> weight that the search ran with.

    Raises:
      ValueError: a name without a part, or a grid of more than MAX_POINTS.
    """
    unknown = {*grid, *start} - {*parts}
    if unknown:
        raise ValueError(f'no part {sorted(unknown)}; there are {sorted(parts)}')
    names = sorted(parts)
    axes = [tuple(grid.get(name, (start.get(name, 0.0),))) for name in names]
    points = sorted(itertools.product(*axes), key=lambda point: np.abs(point).sum())
    if not 0 < len(points) <= MAX_POINTS:
        raise ValueError(f'a grid of {len(points)} points; allowed: 1 to {MAX_POINTS}')
    exists = np.isfinite(acoustic)
    stacked = np.stack([np.where(exists, parts[name], 0.0) for name in names])

    def count(point: Sequence[float]) -> int:
        with np.errstate(invalid='ignore'):
            added = np.where(np.isneginf(stacked), -1e30, stacked)
            scores = acoustic + np.tensordot(np.asarray(point), added, axes=1)
        first = np.argmax(scores, axis=1)
        return int(np.take_along_axis(errors, first[:, None], axis=1).sum())

    totals = [count(point) for point in points]
    best = int(np.argmin(totals))
    return TunedWeights(
        weights=dict(zip(names, map(float, points[best]), strict=True)),
        errors=totals[best],
        start_errors=count([start.get(name, 0.0) for name in names]),
        oracle_errors=int(np.where(exists, errors, np.iinfo(np.int64).max).min(axis=1).sum()),
        points=len(points),
    )
