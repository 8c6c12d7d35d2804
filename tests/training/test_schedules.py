"""The rate follows its formula at warm-up, peak, decay and end."""

import math

import pytest

from bigssl_jax.config import ConfigError
from bigssl_jax.training.schedules import Schedule


def test_inverse_sqrt_is_the_peak_parameterised_form():
    schedule = Schedule(peak=2e-3, warmup=100, shape='inverse_sqrt', total_steps=1000)
    for step in (0, 1, 50, 99, 100, 101, 400, 999):
        s = step + 1
        assert schedule(step) == pytest.approx(2e-3 * min(s / 100, math.sqrt(100 / s)))
    assert max(schedule(s) for s in range(1000)) == pytest.approx(2e-3)


@pytest.mark.parametrize('shape', ['linear', 'cosine'])
def test_decay_ends_at_zero_and_halves_in_the_middle(shape):
    schedule = Schedule(peak=1.0, warmup=10, shape=shape, total_steps=110)
    assert schedule(9) == 1.0
    assert schedule(59) == pytest.approx(0.5)
    assert schedule(109) == pytest.approx(0.0, abs=1e-12)


def test_start_keeps_the_rate_at_zero_and_then_warms_up():
    schedule = Schedule(peak=1.0, warmup=4, shape='constant', total_steps=100, start=10)
    assert [schedule(s) for s in (0, 9, 10, 13, 50)] == [0.0, 0.0, 0.25, 1.0, 1.0]


def test_unknown_shape_names_the_allowed_ones():
    with pytest.raises(ConfigError, match='inverse_sqrt'):
        Schedule(peak=1.0, warmup=1, shape='inverse_sqr', total_steps=2)
