"""Linear probes: what a frozen encoder's layers know of a label, by classifiers of scikit-learn.

    features [N, L, D]       one mean over frames for every utterance and layer
        for every layer, kind of classifier and regularisation:  fit on train, accuracy on dev
        for every layer:  the classifier that is best on dev  -> accuracy on test (the curve)
        of all layers:    the one that is best on dev         -> the result, with its interval

Everything is chosen on dev; test is looked at once.  Ties go to the earlier layer, and to the
stronger regularisation.  Implements the evaluation of NOSS (arXiv 2002.12764) as BigSSL
(2109.13226) used it on its encoders: averages over time, linear classifiers, the best layer.

Legend: N utterances, L layers, D features, C classes.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bigssl_jax.config import UserError
from bigssl_jax.evaluation.bootstrap import interval, ratio, resampled_sums, unit_totals, units_of

REPLICATES = 1000
MAX_ITERATIONS = 1000
# C of scikit-learn: the inverse of the strength, so the strongest comes first.
REGULARISATION = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclasses.dataclass(frozen=True)
class ProbeSet:
    """Utterances with labels.

    Attributes:
      features: float32 [N, L, D].
      labels: N names of classes.
      speakers: N, '' where unknown; the units of the interval.
    """

    features: np.ndarray
    labels: Sequence[str]
    speakers: Sequence[str]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """The classifier of one layer that is best on dev.

    Attributes:
      layer: 0 is the first of the features' layers.
      classifier: 'logistic', 'balanced logistic' or 'LDA'.
      regularisation: C of the logistic ones, else None (LDA's shrinkage is Ledoit and Wolf's).
      dev, test: accuracies.
    """

    layer: int
    classifier: str
    regularisation: float | None
    dev: float
    test: float


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What the probes of one task found in one model.

    Attributes:
      best: of the layer that is best on dev.
      low, high: 95 % bootstrap interval of its accuracy on test.
      units: how many units the interval rests on; `resampled` says of what.
      chance: share of the largest class of the training set, on test.
      layers: one result for every layer.
      classes: C.
      utterances: of train, dev and test.
      unknown: utterances of dev and test whose class the training set does not have (errors all).
      unconverged: fits that reached the limit of iterations.
    """

    best: LayerResult
    low: float
    high: float
    units: int
    resampled: str
    chance: float
    layers: tuple[LayerResult, ...]
    classes: int
    utterances: tuple[int, int, int]
    unknown: tuple[int, int]
    unconverged: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def probe(
    train: ProbeSet,
    dev: ProbeSet,
    test: ProbeSet,
    regularisation: Sequence[float] = REGULARISATION,
    seed: int = 0,
) -> ProbeResult:
    """Fits linear classifiers to every layer; see the module's docstring.

    Args:
      train, dev, test: with the same layers and features.
      regularisation: C of the logistic regressions, ascending.
      seed: of the bootstrap.

    Raises:
      UserError: a set is empty, or train has one class only.
    """
    for name, part in (('train', train), ('dev', dev), ('test', test)):
        if not len(part.labels):
            raise UserError(f'the {name} set of the task has no utterance with a label')
    names, labels = np.unique(np.asarray(train.labels), return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f'all {len(labels)} utterances of the train set have the label {str(names[0])!r};'
            ' a task needs two classes or more'
        )
    numbers = {name: number for number, name in enumerate(names)}
    truth = [np.array([numbers.get(name, -1) for name in part.labels]) for part in (dev, test)]
    layers, guesses, unconverged = [], [], 0
    for layer in range(train.features.shape[1]):
        scaled = _scaled(*(part.features[:, layer] for part in (train, dev, test)))
        result, guess, slow = _best_of_layer(layer, scaled, labels, truth, regularisation)
        layers.append(result)
        guesses.append(guess)
        unconverged += slow
    best = max(layers, key=lambda result: result.dev)  # the first of equals
    units, resampled = units_of(len(test.labels), test.speakers)
    right = guesses[best.layer] == truth[1]
    totals = unit_totals(np.stack([right, np.ones_like(right)], axis=1).astype(np.int64), units)
    sums = resampled_sums(totals, REPLICATES, seed)
    low, high = interval(ratio(sums[:, 0], sums[:, 1]))
    return ProbeResult(
        best=best,
        low=low,
        high=high,
        units=len(totals),
        resampled=resampled,
        chance=float(np.mean(truth[1] == np.bincount(labels).argmax())),
        layers=tuple(layers),
        classes=len(names),
        utterances=(len(labels), len(truth[0]), len(truth[1])),
        unknown=(int(np.sum(truth[0] < 0)), int(np.sum(truth[1] < 0))),
        unconverged=unconverged,
    )


def _scaled(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """All sets with mean 0 and deviation 1 of the training set; constant features become 0."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation = np.where(deviation > 1e-6 * np.maximum(np.abs(mean), 1.0), deviation, np.inf)
    return [((part - mean) / deviation).astype(np.float64) for part in (train, *others)]


def _best_of_layer(
    layer: int,
    sets: Sequence[np.ndarray],
    labels: np.ndarray,
    truth: Sequence[np.ndarray],
    regularisation: Sequence[float],
) -> tuple[LayerResult, np.ndarray, int]:
    """(the result, its guesses on test, fits that did not converge)."""
    train, dev, test = sets
    best, guess, unconverged = None, truth[1], 0
    for classifier, strength, model in _classifiers(regularisation):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what matters in them is counted below
            model.fit(train, labels)
        unconverged += int(np.max(getattr(model, 'n_iter_', 0)) >= MAX_ITERATIONS)
        accuracy = float(np.mean(model.predict(dev) == truth[0]))
        if best is None or accuracy > best.dev:
            guess = model.predict(test)
            score = float(np.mean(guess == truth[1]))
            best = LayerResult(layer, classifier, strength, accuracy, score)
    assert best is not None
    return best, guess, unconverged


def _classifiers(regularisation: Sequence[float]) -> Iterator[tuple[str, float | None, Any]]:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression

    for name, weight in (('logistic', None), ('balanced logistic', 'balanced')):
        for strength in regularisation:
            model = LogisticRegression(C=strength, class_weight=weight, max_iter=MAX_ITERATIONS)
            yield name, strength, model
    yield 'LDA', None, LinearDiscriminantAnalysis(solver='lsqr', shrinkage='auto')
