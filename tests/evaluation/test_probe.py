"""Probes: planted answers, scikit-learn's own grid search, what no scale may change, bad sets."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bigssl_jax.config import UserError
from bigssl_jax.evaluation.probe import ProbeSet, probe

STRENGTHS = (0.01, 1.0)


def planted(count, seed, separation=(0.0, 0.6, 3.0, 3.0), size=6):
    """Three classes whose centres lie `separation` deviations apart, by layer."""
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, count)
    noise = random.standard_normal((count, len(separation), size))
    centres = np.eye(3, size)[classes]
    features = noise + np.asarray(separation)[None, :, None] * centres[:, None]
    labels = [('anna', 'ben', 'cem')[number] for number in classes]
    speakers = [f's{number % 7}' for number in range(count)]
    return ProbeSet(features.astype(np.float32), labels, speakers)


SETS = planted(150, 0), planted(90, 1), planted(120, 2)


@pytest.fixture(scope='module')
def result():
    return probe(*SETS, STRENGTHS)


def test_the_layer_that_knows_is_found_and_no_layer_beats_the_best_possible(result):
    assert result.best.layer in (2, 3)
    # Centres 3 / sqrt(2) deviations from the border to each of two: about 3 % errors.
    assert result.best.test > 0.9 and result.low < result.best.test <= result.high
    # Nothing is planted in layer 0: 1/3 and five deviations of 120 draws.
    assert abs(result.layers[0].test - 1 / 3) < 5 * np.sqrt(2 / 9 / 120)
    assert result.layers[1].test < result.best.test
    assert (result.classes, result.utterances, result.unknown) == (3, (150, 90, 120), (0, 0))
    assert (result.units, result.resampled) == (7, 'speaker')


def test_accuracies_on_dev_are_those_of_a_grid_search(result):
    train, dev, _ = SETS
    fold = PredefinedSplit([-1] * 150 + [0] * 90)
    labels = [*train.labels, *dev.labels]
    features = np.concatenate([train.features, dev.features]).astype(np.float64)
    for layer in range(4):
        scores = [
            GridSearchCV(
                make_pipeline(StandardScaler(), LogisticRegression(class_weight=weight)),
                {'logisticregression__C': STRENGTHS}, cv=fold, refit=False,
            ).fit(features[:, layer], labels).best_score_
            for weight in (None, 'balanced')
        ]  # fmt: skip
        found = result.layers[layer]
        # LDA may be better still.
        assert found.dev >= max(scores) - 1e-9
        if found.classifier != 'LDA':
            assert found.dev == pytest.approx(max(scores))


def test_scale_offset_and_constant_features_change_nothing(result):
    changed = [
        dataclasses.replace(
            part,
            features=np.concatenate(
                [300 * part.features + 5, np.full((*part.features.shape[:2], 1), 1e4)], axis=2
            ).astype(np.float32),
        )
        for part in SETS
    ]
    other = probe(*changed, STRENGTHS)
    for ours, theirs in zip(result.layers, other.layers, strict=True):
        assert theirs.dev == pytest.approx(ours.dev, abs=0.03)
    assert other.best.layer == result.best.layer


def test_a_rare_class_is_heard_by_the_balanced_classifier():
    random = np.random.default_rng(0)

    def rare(count):
        labels = np.array(['common'] * count + ['rare'] * (count // 20))
        features = random.standard_normal((len(labels), 1, 2)) * 0.7
        features[:, 0, 0] += labels == 'rare'
        return ProbeSet(features.astype(np.float32), list(labels), [''] * len(labels))

    train, dev, test = rare(400), rare(40), rare(40)
    # A dev set of rare ones only: whoever guesses 'common' is wrong.
    dev = ProbeSet(dev.features[40:], dev.labels[40:], dev.speakers[40:])
    found = probe(train, dev, test, (1.0,))
    assert found.best.classifier == 'balanced logistic'
    assert found.chance == 40 / 42
    assert found.resampled == 'utterance'


def test_classes_that_training_does_not_know_are_errors_and_counted():
    train, dev, test = SETS
    strange = dataclasses.replace(test, labels=['dora'] * 30 + list(test.labels[30:]))
    found = probe(train, dev, strange, STRENGTHS)
    assert found.unknown == (0, 30)
    assert found.best.test <= 0.75


@pytest.mark.parametrize(
    ('train', 'message'),
    [
        (ProbeSet(np.zeros((0, 4, 6), np.float32), [], []), 'train set .* no utterance'),
        (ProbeSet(np.zeros((3, 4, 6), np.float32), ['a'] * 3, [''] * 3), "label 'a'; .* two"),
    ],
)
def test_sets_without_a_task_are_refused(train, message):
    with pytest.raises(UserError, match=message):
        probe(train, *SETS[1:], STRENGTHS)
