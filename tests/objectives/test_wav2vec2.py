"""Contrastive loss against numpy, the drawing of negatives, and the objective's own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.audio import row_keys
from bigssl_jax.objectives import Wav2Vec2
from bigssl_jax.objectives.contrastive import contrastive_loss, draw_negatives, spread

SMALL = Wav2Vec2(8, 5, mask_start_probability=0.3, mask_span_ms=80.0, min_target_variance=0.005)


def keys_of(rows):
    return row_keys(jax.random.key(0), jnp.asarray(rows, jnp.int32))


def test_negatives_are_other_masked_frames_evenly():
    masked = np.zeros((2, 12), bool)
    masked[0, [1, 4, 5, 9]] = True
    masked[1, [0, 11]] = True
    drawn = np.asarray(draw_negatives(keys_of([0, 1]), jnp.asarray(masked), 3000))
    for row in range(2):
        frames = np.flatnonzero(masked[row])
        for t in frames:
            others = frames[frames != t]
            values, counts = np.unique(drawn[row, t], return_counts=True)
            np.testing.assert_array_equal(values, others)
            assert (np.abs(counts / 3000 - 1 / len(others)) < 0.04).all()
    assert (np.asarray(draw_negatives(keys_of([0]), jnp.ones((1, 6), bool), 50))[0, 2] != 2).all()


def test_negatives_do_not_depend_on_padding_or_batch_mates():
    masked = np.random.default_rng(0).random((3, 20)) < 0.5
    drawn = np.asarray(draw_negatives(keys_of([3, 4, 5]), jnp.asarray(masked), 7))
    wide = draw_negatives(keys_of([3, 4, 5]), jnp.pad(masked, ((0, 0), (0, 9))), 7)
    alone = draw_negatives(keys_of([4]), jnp.asarray(masked[1:2]), 7)
    np.testing.assert_array_equal(np.asarray(wide)[:, :20][masked], drawn[masked])
    np.testing.assert_array_equal(np.asarray(alone)[0][masked[1]], drawn[1][masked[1]])


def test_contrastive_loss_equals_numpy_and_ignores_the_rest():
    random = np.random.default_rng(0)
    c, q = random.normal(size=(2, 2, 8, 5)).astype(np.float32)
    scored = np.zeros((2, 8), bool)
    scored[0, [1, 2, 6]] = scored[1, [0, 3, 4, 5]] = True
    negatives = np.asarray(draw_negatives(keys_of([0, 1]), jnp.asarray(scored), 6))
    expected, right = np.zeros((2, 8)), np.zeros((2, 8), bool)
    for b, t in zip(*np.nonzero(scored), strict=True):

        def cosine(u, b=b, t=t):
            x, y = c[b, t].astype(np.float64), q[b, u].astype(np.float64)
            return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

        all_of = np.array([cosine(t)] + [cosine(u) for u in negatives[b, t]])
        expected[b, t] = -np.log(np.exp(all_of[0] / 0.1) / np.exp(all_of / 0.1).sum())
        right[b, t] = all_of[0] > all_of[1:].max()
    c[~scored] = np.nan
    q[~scored] = np.nan

    def total(c, q):
        loss, correct = contrastive_loss(c, q, negatives, scored, 0.1)
        return jnp.sum(loss), (loss, correct)

    function = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    gradients, (loss, correct) = function(c, q)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(correct, right)
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[~scored].any()
        assert np.asarray(gradient)[scored].all()


def test_zero_vectors_have_finite_gradients():
    scored = jnp.ones((1, 4), bool)
    negatives = draw_negatives(keys_of([0]), scored, 3)
    zeros = jnp.zeros((1, 4, 3))
    gradient = jax.grad(lambda c: jnp.sum(contrastive_loss(c, zeros, negatives, scored, 0.1)[0]))
    assert np.isfinite(gradient(zeros)).all()


def test_spread_in_closed_form():
    scored = jnp.array([[True, True, False], [True, True, True]])
    same = jnp.broadcast_to(jnp.array([3.0, 4.0]), (2, 3, 2))
    np.testing.assert_allclose(spread(same, scored), 0.0, atol=1e-6)
    opposite = same * jnp.array([1.0, -1.0, jnp.nan])[:, None]
    # Row 0: mean 0, two frames.  Row 1 is left out.
    alone = spread(opposite, scored & jnp.array([[True], [False]]))
    np.testing.assert_allclose(alone, 2.0, rtol=1e-6)


def test_rows_with_fewer_than_two_masked_frames_weigh_nothing(bench, batches):
    objective = Wav2Vec2(8, 5, mask_start_probability=1e-6)
    params, constants = bench.init(objective)
    totals, gradient = bench.gradient(objective, params, constants, batches())
    assert totals['weight'] == totals['loss'] == 0
    for leaf in jax.tree.leaves(gradient):
        assert not leaf.any()
    assert 'mask_start_probability' in objective.health(objective.summarise(totals), step=1)


def test_targets_learn_unless_stopped(bench, batches):
    params, constants = bench.init(SMALL)
    stopped = Wav2Vec2(
        8, 5, mask_start_probability=0.3, mask_span_ms=80.0, stop_target_gradient=True
    )
    flowing, gradient = bench.gradient(SMALL, params, constants, batches())
    still, other = bench.gradient(stopped, params, constants, batches())
    assert flowing['loss'] == still['loss']
    assert gradient['head']['target_kernel'].any()
    assert not other['head']['target_kernel'].any() and other['head']['context_kernel'].any()


def test_health_notices_collapsed_targets(bench, batches):
    params, constants = bench.init(SMALL)
    totals, _ = bench.gradient(SMALL, params, constants, batches())
    summary = SMALL.summarise(totals)
    assert SMALL.health(summary, step=1) is None
    assert 0 < summary['target_variance'] < 1
    assert abs(summary['masked_fraction'] - (1 - 0.7**2)) < 0.25
    params['head']['target_kernel'] *= 0.0
    params['head']['target_bias'] += 1.0
    totals, _ = bench.gradient(SMALL, params, constants, batches())
    summary = SMALL.summarise(totals)
    np.testing.assert_allclose(summary['target_variance'], 0.0, atol=1e-6)
    np.testing.assert_allclose(summary['loss'], np.log(6), rtol=1e-4)
    assert 'collapsed' in SMALL.health(summary, step=1)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'num_negatives': 0}, 'num_negatives'),
        ({'temperature': 0.0}, 'temperature'),
        ({'mask_start_probability': 0.0}, 'mask_start_probability'),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Wav2Vec2(**fields)
