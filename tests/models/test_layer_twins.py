"""Layers against loops in numpy: attention, relative attention, depthwise, subsampling, norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from bigssl_jax.models import ConformerConfig
from bigssl_jax.models.attention import (
    SelfAttention,
    attend,
    distance_sinusoid,
    relative_shift,
    sinusoid,
)
from bigssl_jax.models.convolution import depthwise
from bigssl_jax.models.layers import layer_norm, product_float32
from bigssl_jax.models.subsampling import strided_convolution

RNG = np.random.default_rng(5)


def numpy_attend(query, key, value, mask, bias):
    out = np.zeros_like(query, dtype=np.float64)
    rows, frames, heads, _ = query.shape
    for b in range(rows):
        real = np.flatnonzero(mask[b])
        for t in range(frames):
            for h in range(heads):
                scores = np.array([query[b, t, h] @ key[b, s, h] + bias[b, h, t, s] for s in real])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, t, h] = sum(w * value[b, s, h] for w, s in zip(weights, real, strict=True))
    return out


def test_attend_equals_a_loop():
    query, key, value = RNG.normal(size=(3, 2, 5, 3, 4))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    bias = RNG.normal(size=(2, 3, 5, 5))
    arrays = [jnp.asarray(a, jnp.float32) for a in (query, key, value)]
    expected = numpy_attend(query, key, value, mask, bias)
    np.testing.assert_allclose(
        attend(*arrays, jnp.asarray(mask), jnp.asarray(bias, jnp.float32)), expected, atol=1e-5
    )
    expected = numpy_attend(query, key, value, mask, 0 * bias)
    np.testing.assert_allclose(attend(*arrays, jnp.asarray(mask)), expected, atol=1e-5)


def test_attend_without_a_real_key_is_finite():
    x = jnp.ones((1, 3, 1, 2))
    out, vjp = jax.vjp(lambda q: attend(q, x, x, jnp.zeros((1, 3), bool)), x)
    assert np.isfinite(out).all() and np.isfinite(vjp(out)[0]).all()


@pytest.mark.parametrize('frames', [1, 2, 3, 7])
def test_relative_shift_picks_distance_t_minus_s(frames):
    distances = np.arange(frames - 1, -frames, -1.0)
    scores = (
        np.broadcast_to(distances, (2, frames, len(distances)))
        + 100 * np.arange(frames)[None, :, None]
    )
    shifted = relative_shift(jnp.asarray(scores))
    expected = np.array([[t - s + 100 * t for s in range(frames)] for t in range(frames)], float)
    np.testing.assert_array_equal(shifted, np.broadcast_to(expected, (2, frames, frames)))


def test_sinusoids_have_the_stated_wavelengths():
    table = np.asarray(sinusoid(jnp.arange(50), 8))
    rates = 10000.0 ** (-np.arange(4) / 3)
    angles = np.arange(50)[:, None] * rates
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(table, expected, atol=1e-5)
    by_distance = np.asarray(distance_sinusoid(3, 8))
    np.testing.assert_allclose(by_distance[2], sinusoid(jnp.array([0]), 8)[0], atol=1e-6)
    np.testing.assert_allclose(by_distance[0], table[2], atol=1e-6)
    np.testing.assert_allclose(by_distance[4][:4], -table[2][:4], atol=1e-6)


def test_relative_attention_equals_transformer_xl_by_loops():
    """Appendix B of arXiv 1901.02860, term by term: (a) + (b) + (c) + (d)."""
    size, heads, width, frames = 12, 3, 4, 6
    config = ConformerConfig(
        num_layers=1, model_dim=size, num_heads=heads, dropout=0.0, relative_attention=True
    )
    x = RNG.normal(size=(2, frames, size)).astype(np.float32)
    mask = np.arange(frames) < np.array([6, 4])[:, None]
    distances = distance_sinusoid(frames, size)
    module = SelfAttention(config)
    params = nn.unbox(module.init(jax.random.key(0), x, mask, distances, True))
    params = jax.tree.map(lambda p: RNG.normal(size=p.shape).astype(np.float32) * 0.4, params)
    out = module.apply(params, x, mask, distances, True)

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params['params'])
    zeroed = np.where(mask[..., None], x, 0)
    centred = zeroed - zeroed.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    normed = normed * p['norm']['scale'] + p['norm']['bias']

    def project(name):
        kernel = p[name]['kernel'].reshape(size, heads, width)
        return np.einsum('btd,dhk->bthk', normed, kernel) + p[name]['bias'].reshape(heads, width)

    query, key, value = map(project, ('query', 'key', 'value'))
    u, v = p['content_bias'], p['position_bias']
    attended = np.zeros_like(query)
    for b in range(2):
        real = np.flatnonzero(mask[b])
        for t in range(frames):
            for h in range(heads):
                scores = []
                for s in real:
                    r = np.asarray(sinusoid(jnp.array([t - s]), size))[0]
                    r = r @ p['distance']['kernel'].reshape(size, heads, width)[:, h]
                    a, c = query[b, t, h] @ key[b, s, h], u[h] @ key[b, s, h]
                    bb, d = query[b, t, h] @ r, v[h] @ r
                    scores.append((a + bb + c + d) / np.sqrt(width))
                weights = np.exp(np.array(scores) - max(scores))
                attended[b, t, h] = weights @ value[b, real, h] / weights.sum()
    kernel = p['output']['kernel'].reshape(size, heads, width)
    expected = np.einsum('bthk,dhk->btd', attended, kernel) + p['output']['bias']
    np.testing.assert_allclose(np.asarray(out)[mask], expected[mask], atol=2e-4)


@pytest.mark.parametrize('size', [1, 2, 5, 15, 32])
def test_depthwise_and_its_gradients_equal_a_loop(size):
    x = RNG.normal(size=(2, 11, 3))
    kernel = RNG.normal(size=(size, 3))
    weights = RNG.normal(size=x.shape)
    expected, x_gradient, k_gradient = np.zeros_like(x), np.zeros_like(x), np.zeros_like(kernel)
    for t in range(11):
        for j in range(size):
            s = t + j - (size - 1) // 2
            if 0 <= s < 11:
                expected[:, t] += x[:, s] * kernel[j]
                x_gradient[:, s] += weights[:, t] * kernel[j]
                k_gradient[j] += (weights[:, t] * x[:, s]).sum(0)
    out, vjp = jax.vjp(depthwise, jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    gradients = vjp(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(gradients[0], x_gradient, atol=1e-5)
    np.testing.assert_allclose(gradients[1], k_gradient, atol=1e-5)


@pytest.mark.parametrize('frames, mels, channels', [(7, 6, 1), (8, 5, 3), (1, 4, 2), (2, 1, 1)])
def test_strided_convolution_and_its_gradients_equal_a_loop(frames, mels, channels):
    x = RNG.normal(size=(2, frames, mels, channels))
    kernel = RNG.normal(size=(3, 3, channels, 4))
    out, vjp = jax.vjp(
        strided_convolution, jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    )
    weights = RNG.normal(size=out.shape)
    expected, x_gradient, k_gradient = np.zeros(out.shape), np.zeros_like(x), np.zeros_like(kernel)
    for t, f, i, j in np.ndindex(out.shape[1], out.shape[2], 3, 3):
        s, g = 2 * t + i - 1, 2 * f + j - 1
        if 0 <= s < frames and 0 <= g < mels:
            expected[:, t, f] += x[:, s, g] @ kernel[i, j]
            x_gradient[:, s, g] += weights[:, t, f] @ kernel[i, j].T
            k_gradient[i, j] += x[:, s, g].T @ weights[:, t, f]
    assert out.shape == (2, -(-frames // 2), -(-mels // 2), 4)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    gradients = vjp(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(gradients[0], x_gradient, atol=1e-5)
    np.testing.assert_allclose(gradients[1], k_gradient, atol=1e-4)


@pytest.mark.parametrize('spec', ['bthk,bshk->bhts', 'bthk,phk->bhtp'])
def test_product_float32_and_its_gradients_equal_einsum(spec):
    a = jnp.asarray(RNG.normal(size=(2, 5, 3, 4)), jnp.float32)
    b = a[:, ::-1] if 'bshk' in spec else jnp.asarray(RNG.normal(size=(9, 3, 4)), jnp.float32)
    out, vjp = jax.vjp(lambda a, b: product_float32(spec, a, b), a, b)
    expected, expected_vjp = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), a, b)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for x, y in zip(vjp(jnp.cos(out)), expected_vjp(jnp.cos(out)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    low = product_float32(spec, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32


def test_layer_norm_equals_its_definition_and_finite_differences():
    x = RNG.normal(size=(3, 4, 9)) * 3 + 5
    scale, bias = RNG.normal(size=(2, 9))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = expected * scale + bias
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, scale, bias)]
    np.testing.assert_allclose(layer_norm(*arrays), expected, atol=1e-5)
    check_grads(layer_norm, arrays, order=1, modes=['rev'], atol=2e-2, rtol=2e-2)
