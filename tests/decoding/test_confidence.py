"""Measures of confidence, worked by hand on made-up n-best lists."""

import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.config import ConfigError
from bigssl_jax.decoding.confidence import MEASURES, posteriors, token_confidences
from bigssl_jax.decoding.nbest import NBest, certainty


def some_nbest():
    """Row 0: three hypotheses with posteriors .5, .3, .2; row 1: one alone."""
    tokens = np.zeros((2, 3, 4), np.int32)
    starts = np.zeros((2, 3, 4), np.int32)
    lists = [
        [([3, 4, 5], [0, 10, 20]), ([3, 6, 5], [1, 10, 21]), ([3, 4], [9, 12])],
        [([7], [2]), ([], []), ([], [])],
    ]
    for b, hypotheses in enumerate(lists):
        for k, (ids, frames) in enumerate(hypotheses):
            tokens[b, k, : len(ids)], starts[b, k, : len(ids)] = ids, frames
    scores = np.array([np.log([0.5, 0.3, 0.2]) - 40.0, [-5.0, -np.inf, -np.inf]], np.float32)
    confidence = np.linspace(0.1, 0.9, 24).reshape(2, 3, 4).astype(np.float32)
    counts = np.array([[3, 3, 2], [1, 0, 0]], np.int32)
    ends = starts + 1
    arrays = (tokens, counts, scores, scores, 0 * counts, confidence, confidence / 2, starts, ends)
    return NBest(*map(jnp.asarray, arrays))


def test_posterior_is_the_share_of_the_list_that_agrees_in_label_and_time():
    found = token_confidences(some_nbest(), 'posterior')
    # The third hypothesis has its 3 too far away, its 4 two frames apart, and no 5.
    np.testing.assert_allclose(found[0], [0.8, 0.7, 0.8, 0.0], atol=1e-6)
    np.testing.assert_allclose(found[1], [1.0, 0.0, 0.0, 0.0], atol=1e-6)


def test_the_other_measures_are_those_of_the_search():
    nbest = some_nbest()
    np.testing.assert_array_equal(
        token_confidences(nbest, 'max_probability'), nbest.token_confidence[:, 0]
    )
    np.testing.assert_array_equal(token_confidences(nbest, 'entropy'), nbest.token_certainty[:, 0])
    with pytest.raises(ConfigError, match="did you mean 'entropy'"):
        token_confidences(nbest, 'entropi')
    assert len(set(MEASURES)) == 3


def test_posteriors_sum_to_one():
    found = np.asarray(posteriors(some_nbest().scores))
    np.testing.assert_allclose(found, [[0.5, 0.3, 0.2], [1, 0, 0]], atol=1e-6)


def test_certainty_of_certain_and_uniform_distributions():
    sure = np.array([0.0, -np.inf, -np.inf, -np.inf], np.float32)
    flat = np.full(4, -np.log(4), np.float32)
    pair = np.array([np.log(0.5), np.log(0.5), -np.inf, -np.inf], np.float32)
    found = certainty(jnp.stack([sure, flat, pair]))
    np.testing.assert_allclose(found, [1.0, 0.0, 0.5], atol=1e-6)
