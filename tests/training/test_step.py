"""The train step on a least-squares problem whose gradient is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigssl_jax.training.optimizers import GROUP_DEFAULTS, make_optimizer, make_schedules
from bigssl_jax.training.state import TrainState
from bigssl_jax.training.step import StepSettings, Term, make_train_step

RATES = {'all': np.float32(0.1)}


def totals(params, constants, batch, key):
    error = batch['x'] @ params['kernel'] - batch['y']
    rows = batch['real'].astype(jnp.float32)
    return {'loss': jnp.sum(rows * error**2), 'weight': jnp.sum(rows)}


def problem(rows=8):
    rng = np.random.default_rng(0)
    batch = {
        'x': rng.normal(size=(rows, 3)).astype(np.float32),
        'y': rng.normal(size=rows).astype(np.float32),
        'real': np.arange(rows) != 2,
    }
    return {'kernel': jnp.asarray([0.5, -1.0, 2.0])}, batch


def run(settings, batch, params, terms=(Term('a', totals, 1.0),), steps=1):
    optimizer, labels = make_optimizer(params, {'all': GROUP_DEFAULTS})
    state = TrainState(
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        params=params,
        optimizer=optimizer.init(params),
        ema=params if settings.ema_decay else {},
        constants={},
    )
    step = jax.jit(make_train_step(terms, optimizer, labels, settings))
    for _ in range(steps):
        state, report = step(state, {t.name: batch for t in terms}, RATES, jax.random.key(0))
    return state, report


def test_gradient_norm_is_that_of_the_normalised_loss():
    params, batch = problem()
    _, report = run(StepSettings(), batch, params)
    x, y = batch['x'][batch['real']], batch['y'][batch['real']]
    expected = 2 * x.T @ (x @ np.asarray(params['kernel']) - y) / len(y)
    assert report['grad_norm'] == pytest.approx(np.linalg.norm(expected), rel=1e-5)


@pytest.mark.parametrize('pieces', [2, 4])
def test_micro_batches_change_nothing(pieces):
    params, batch = problem()
    whole, _ = run(StepSettings(), batch, params, steps=3)
    cut, report = run(StepSettings(micro_batches=pieces), batch, params, steps=3)
    np.testing.assert_allclose(cut.params['kernel'], whole.params['kernel'], rtol=1e-5)
    assert report['totals']['a']['weight'] == 7


def test_two_terms_add_with_their_weights():
    params, batch = problem()
    twice = (Term('a', totals, 0.25), Term('b', totals, 0.75))
    one, report_one = run(StepSettings(), batch, params)
    two, report_two = run(StepSettings(), batch, params, twice)
    np.testing.assert_allclose(two.params['kernel'], one.params['kernel'], rtol=1e-6)
    assert report_two['grad_norm'] == pytest.approx(float(report_one['grad_norm']), rel=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_no_parameter_and_is_counted(bad):
    params, batch = problem()
    batch['y'][0] = bad
    state, report = run(StepSettings(ema_decay=0.9), batch, params)
    assert not report['finite'] and int(state.skipped) == 1 and int(state.step) == 1
    np.testing.assert_array_equal(state.params['kernel'], params['kernel'])
    np.testing.assert_array_equal(state.ema['kernel'], params['kernel'])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.optimizer))


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    params, batch = problem()
    optimizer, labels = make_optimizer(params, {'all': GROUP_DEFAULTS})
    seen = []
    spy = optax.GradientTransformation(
        optimizer.init, lambda g, s, p: (seen.append(g), optimizer.update(g, s, p))[1]
    )
    step = make_train_step((Term('a', totals, 1.0),), spy, labels, StepSettings(clip_norm=0.5))
    zero = jnp.int32(0)
    state = TrainState(zero, zero, params, optimizer.init(params), {}, {})
    _, report = step(state, {'a': batch}, RATES, jax.random.key(0))
    assert report['grad_norm'] > 0.5
    assert optax.global_norm(seen[0]) == pytest.approx(0.5, rel=1e-5)


def test_average_follows_the_ramp():
    params, batch = problem()
    state, _ = run(StepSettings(ema_decay=0.5), batch, params)
    expected = params['kernel'] + (1 - 1 / 10) * (state.params['kernel'] - params['kernel'])
    np.testing.assert_allclose(state.ema['kernel'], expected, rtol=1e-6)


@pytest.mark.parametrize('algorithm', ['adamw', 'adafactor'])
def test_a_group_stands_still_to_the_bit_until_its_start(algorithm):
    """Neither weight decay nor the average moves a frozen encoder; the head learns meanwhile."""
    start, steps = 3, 6
    groups = {
        'encoder': {'pattern': '^encoder/', 'start': start, 'warmup': 2, 'weight_decay': 0.5},
        'head': {'pattern': '^heads/', 'warmup': 1},
    }
    groups = {n: {**GROUP_DEFAULTS, 'algorithm': algorithm, **g} for n, g in groups.items()}
    schedules = make_schedules(groups, steps)
    plain, batch = problem()
    first = {'encoder': {'kernel': plain['kernel']}, 'heads': {'kernel': plain['kernel']}}

    def both(params, constants, batch, key):
        product = {'kernel': params['encoder']['kernel'] * params['heads']['kernel']}
        return totals(product, constants, batch, key)

    optimizer, labels = make_optimizer(first, groups)
    zero = jnp.int32(0)
    state = TrainState(zero, zero, first, optimizer.init(first), first, {})
    settings = StepSettings(ema_decay=0.9)
    step = jax.jit(make_train_step((Term('a', both, 1.0),), optimizer, labels, settings))
    moved = []
    for number in range(steps):
        rates = {name: np.float32(schedule(number)) for name, schedule in schedules.items()}
        new, report = step(state, {'a': batch}, rates, jax.random.key(0))
        assert report['finite'] and report['grad_norm'] > 0
        now = {name: np.asarray(new.params[name]['kernel']) for name in first}
        moved.append({n: (now[n] != state.params[n]['kernel']).all() for n in first})
        if number < start:
            np.testing.assert_array_equal(now['encoder'], first['encoder']['kernel'])
            np.testing.assert_array_equal(new.ema['encoder']['kernel'], now['encoder'])
        state = new
    assert [m['encoder'] for m in moved] == [False] * start + [True] * (steps - start)
    assert all(m['heads'] for m in moved)
    assert schedules['encoder'](start) == pytest.approx(GROUP_DEFAULTS['peak'] / 2)
