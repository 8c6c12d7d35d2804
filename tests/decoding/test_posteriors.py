"""Kept posteriors against numpy's full distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.decoding.posteriors import top_posteriors

SIZES = (3, 7, 11)


def distributions() -> tuple[np.ndarray, np.ndarray]:
    """(logits with NaN in the padding, mask)."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, SIZES).astype(np.float32)
    mask = np.arange(SIZES[1]) < np.array([7, 4, 0])[:, None]
    logits[~mask] = np.nan
    return logits, mask


@pytest.mark.parametrize('k', [1, 4, 11, 50])
def test_the_largest_are_kept_in_falling_order(k):
    logits, mask = distributions()
    found = jax.jit(top_posteriors, static_argnums=2)(jnp.asarray(logits), jnp.asarray(mask), k)
    shifted = np.where(mask[..., None], logits, 0).astype(np.float64)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    order = np.argsort(-log_p, axis=-1)[..., :k]
    expected = np.take_along_axis(log_p, order, axis=-1)
    assert found.ids.shape == found.log_probs.shape == (*SIZES[:2], min(k, SIZES[2]))
    assert found.log_probs.dtype == jnp.float16 and found.ids.dtype == jnp.int32
    np.testing.assert_array_equal(found.ids[mask], order[mask])
    np.testing.assert_allclose(found.log_probs[mask], expected[mask], rtol=2e-3, atol=1e-3)
    assert not np.asarray(found.ids)[~mask].any() and not np.asarray(found.log_probs)[~mask].any()
    kept = np.where(mask, np.exp(expected).sum(axis=-1), 0).sum(axis=1)
    np.testing.assert_allclose(found.mass, kept / np.maximum(mask.sum(axis=1), 1), rtol=1e-5)
    if k >= SIZES[2]:
        np.testing.assert_allclose(found.mass, [1, 1, 0], rtol=1e-5)


def test_batch_mates_and_padding_change_nothing():
    logits, mask = distributions()
    whole = top_posteriors(jnp.asarray(logits), jnp.asarray(mask), 3)
    alone = top_posteriors(jnp.asarray(logits[1:2, :5]), jnp.asarray(mask[1:2, :5]), 3)
    np.testing.assert_array_equal(whole.ids[1:2, :5], alone.ids)
    np.testing.assert_array_equal(whole.log_probs[1:2, :5], alone.log_probs)
    np.testing.assert_allclose(whole.mass[1:2], alone.mass, rtol=1e-6)
