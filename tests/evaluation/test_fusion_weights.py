"""Tuning on n-best lists: lists whose best weights are known, and bounds that must hold."""

import numpy as np
import pytest

from bigssl_jax.evaluation.fusion_weights import tune_weights


def planted(weights, seed=0, utterances=80, width=6):
    """Lists whose first hypothesis by `weights` has no error, the others one to five."""
    random = np.random.default_rng(seed)
    acoustic = random.normal(0, 3, (utterances, width))
    parts = {name: random.normal(-10, 6, (utterances, width)) for name in weights}
    total = acoustic + sum(w * parts[name] for name, w in weights.items())
    errors = random.integers(1, 6, (utterances, width))
    errors[np.arange(utterances), total.argmax(axis=1)] = 0
    return acoustic, parts, errors


def test_finds_the_weights_that_lists_were_made_with():
    truth = {'lm': 0.4, 'length': -0.7}
    acoustic, parts, errors = planted(truth)
    grid = {'lm': np.arange(0, 11) / 10, 'length': np.arange(-10, 11) / 10}
    found = tune_weights(acoustic, parts, errors, grid, {'lm': 0.0, 'length': 0.0})
    assert found.weights == pytest.approx(truth)
    assert found.errors == found.oracle_errors == 0 and found.points == 231
    first = np.take_along_axis(errors, acoustic.argmax(axis=1)[:, None], axis=1)
    assert found.start_errors == first.sum() > 50


def test_a_part_without_a_grid_keeps_its_weight():
    acoustic, parts, errors = planted({'lm': 0.4, 'ngram': 0.2})
    grid = {'lm': (0.0, 0.4)}
    kept = tune_weights(acoustic, parts, errors, grid, {'ngram': 0.2})
    assert kept.weights == {'lm': 0.4, 'ngram': 0.2} and kept.errors == 0
    assert tune_weights(acoustic, parts, errors, grid, {}).errors > 0


def test_of_equal_weights_the_smallest_wins_and_missing_hypotheses_never_do():
    acoustic = np.array([[-1.0, -2.0, -np.inf]])
    parts = {'lm': np.array([[-5.0, -5.0, 0.0]])}
    errors = np.array([[2, 3, 0]])
    found = tune_weights(acoustic, parts, errors, {'lm': (1.0, 0.5, 0.0)}, {'lm': 1.0})
    assert found.weights == {'lm': 0.0}
    assert (found.errors, found.start_errors, found.oracle_errors) == (2, 2, 2)


def test_hypotheses_that_a_model_rules_out_lose():
    acoustic = np.array([[-1.0, -2.0]])
    parts = {'ngram': np.array([[-np.inf, -9.0]])}
    found = tune_weights(acoustic, parts, np.array([[4, 1]]), {'ngram': (0.0, 0.3)}, {})
    assert found.weights == {'ngram': 0.3} and (found.errors, found.start_errors) == (1, 4)


def test_refuses_what_it_cannot_search():
    acoustic, parts, errors = planted({'lm': 0.4})
    with pytest.raises(ValueError, match="no part \\['ml'\\]"):
        tune_weights(acoustic, parts, errors, {'ml': (0.0,)}, {})
    with pytest.raises(ValueError, match='a grid of 200000 points'):
        tune_weights(acoustic, parts, errors, {'lm': np.arange(200000)}, {})
    with pytest.raises(ValueError, match='a grid of 0 points'):
        tune_weights(acoustic, parts, errors, {'lm': ()}, {})
