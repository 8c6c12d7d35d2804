"""The paired test is exact where it can be, symmetric, and uniform when nothing differs."""

import numpy as np
import pytest
import scipy.stats

from bigssl_jax.evaluation import paired_test
from bigssl_jax.evaluation.significance import compare, randomisation_p


@pytest.mark.parametrize('seed', range(8))
def test_few_units_equal_scipy_exact_permutation_test(seed):
    generator = np.random.default_rng(seed)
    differences = generator.integers(-3, 4, 10)
    expected = scipy.stats.permutation_test(
        (differences, np.zeros(10)), lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type='samples', vectorized=True, n_resamples=np.inf,
    )  # fmt: skip
    assert randomisation_p(differences, 10_000, 0) == pytest.approx(min(expected.pvalue, 1.0))


def test_many_units_approach_the_exact_value():
    differences = np.array([2, -1, 1, 1, 0, 3, -2, 1, 1, 2, -1, 1])
    exact = randomisation_p(differences, 2**12, 0)
    assert randomisation_p(differences, 2**11 - 1, 0) == pytest.approx(exact, abs=0.03)


def test_all_units_better_gives_the_closed_form():
    assert randomisation_p(np.full(8, -1), 10_000, 0) == 2 / 2**8


def test_p_is_never_zero():
    assert randomisation_p(np.full(500, -1), 999, 0) == 1 / 1000


def test_swapping_the_systems_negates_the_difference():
    references = ['a b c d', 'e f', '', 'g h i'] * 5
    first = ['a b c d', 'e x', 'y', 'g'] * 5
    second = ['a b c', 'e f', '', 'g h i'] * 5
    forward = paired_test(references, first, second)
    backward = paired_test(references, second, first)
    assert forward.difference == -backward.difference < 0
    assert forward.p_value == backward.p_value
    np.testing.assert_allclose(forward.interval, [-limit for limit in backward.interval[::-1]])
    assert (forward.fewer_errors, forward.more_errors) == (15, 5)
    assert (backward.fewer_errors, backward.more_errors) == (5, 15)


def test_equal_systems_do_not_differ():
    texts = ['a b', 'c', 'd e f']
    result = paired_test(texts, texts, texts)
    assert (result.difference, result.p_value, result.interval) == (0, 1, (0, 0))


def test_p_is_uniform_when_the_systems_are_the_same(counts_of):
    generator = np.random.default_rng(11)
    values = []
    for trial in range(400):
        words = generator.integers(2, 12, 80)
        a, b = (counts_of(generator.binomial(words, 0.3), words) for _ in range(2))
        values.append(compare(a, b, replicates=400, seed=trial).p_value)
    assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.09
    # Not up to 1: differences are whole numbers, the smallest of which have p = 1.
    for level in (0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(values) <= level) == pytest.approx(level, abs=0.07)


def test_a_clear_difference_is_found_and_covered(counts_of):
    generator = np.random.default_rng(12)
    words = np.full(400, 10)
    a, b = (counts_of(generator.binomial(words, rate), words) for rate in (0.4, 0.3))
    result = compare(a, b)
    assert result.p_value < 0.001
    assert result.interval[0] < -0.1 < result.interval[1] < 0


def test_units_are_speakers_when_known():
    references = ['a b'] * 12
    worse, speakers = ['a x'] * 12, [f's{n % 3}' for n in range(12)]
    result = paired_test(references, worse, references, speakers)
    # Three speakers: no pattern of signs can be rarer than 2 of 8.
    assert (result.units, result.resampled, result.p_value) == (3, 'speaker', 0.25)
