"""The random-projection quantizer against a float64 numpy twin, and what normalisation buys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.models import subsampled_count
from bigssl_jax.objectives.quantizer import (
    STACK,
    argmax,
    init_codebooks,
    init_projection,
    quantize,
    stack_frames,
    stack_mask,
)


def twin(features, projection, codebooks):
    """argmin over v of || norm(c_v) - norm(z A) ||, one codebook, the definition of the paper."""
    z = features.astype(np.float64) @ projection.astype(np.float64)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    c = codebooks / np.linalg.norm(codebooks.astype(np.float64), axis=-1, keepdims=True)
    return np.linalg.norm(z[..., None, :] - c, axis=-1).argmin(-1)


def test_codes_equal_the_nearest_code_on_the_sphere():
    features = np.random.default_rng(0).normal(size=(2, 30, 24)).astype(np.float32)
    a = np.asarray(init_projection(jax.random.key(1), 3, 24, 8))
    c = np.asarray(init_codebooks(jax.random.key(2), 3, 128, 8))
    codes = np.asarray(jax.jit(quantize)(features, a, c))
    assert codes.shape == (2, 30, 3) and codes.dtype == np.int32
    for n in range(3):
        np.testing.assert_array_equal(codes[..., n], twin(features, a[n], c[n]))
    one = np.asarray(quantize(jnp.asarray(features), a[1], c[1]))
    np.testing.assert_array_equal(one[..., 0], codes[..., 1])


def test_codes_ignore_scale_and_input_dtype_is_widened():
    features = np.random.default_rng(0).normal(size=(1, 20, 12)).astype(np.float32)
    a, c = init_projection(jax.random.key(1), 1, 12, 4), init_codebooks(jax.random.key(2), 1, 64, 4)
    codes = np.asarray(quantize(features, a, c))
    np.testing.assert_array_equal(codes, quantize(features * 8, a, c))
    np.testing.assert_array_equal(codes, quantize(features, a, c * 3))
    half = jnp.asarray(features, jnp.bfloat16)
    np.testing.assert_array_equal(quantize(half, a, c), quantize(half.astype(jnp.float32), a, c))


@pytest.mark.parametrize(
    'shapes',
    [
        ((1, 2, 12), (1, 11, 4), (1, 8, 4)),
        ((1, 2, 12), (2, 12, 4), (1, 8, 4)),
        ((1, 2, 12), (1, 12, 4), (1, 8, 5)),
        ((1, 2, 12), (12, 4), (1, 8, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match='do not fit'):
        quantize(*[jnp.zeros(shape) for shape in shapes])


@pytest.mark.parametrize('size', [1, 63, 64, 100, 128, 8192])
def test_argmax_equals_numpy_with_ties(size):
    random = np.random.default_rng(size)
    x = random.integers(0, 6, (4, 7, size)).astype(np.float32)  # ties everywhere
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), x.argmax(-1))
    x = random.normal(size=(4, 7, size)).astype(np.float32)
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), x.argmax(-1))


@pytest.mark.parametrize('frames', [1, 3, 4, 5, 8, 13])
def test_stacks_line_up_with_subsampled_frames(frames):
    x = np.arange(2 * frames * 3, dtype=np.float32).reshape(2, frames, 3)
    stacked = np.asarray(stack_frames(jnp.asarray(x)))
    assert STACK == 4
    assert stacked.shape == (2, subsampled_count(frames), 12)
    for i in range(stacked.shape[1]):
        part = x[:, 4 * i : 4 * i + 4].reshape(2, -1)
        np.testing.assert_array_equal(stacked[:, i, : part.shape[1]], part)
        assert not stacked[:, i, part.shape[1] :].any()


def test_output_frame_of_the_subsampler_reads_its_own_stack(bench):
    """Frame i of the encoder's front must see input frames 4i .. 4i + 3, centred there."""
    features = np.random.default_rng(0).normal(size=(1, 32, 16)).astype(np.float32)
    mask = np.ones((1, 32), bool)
    i = 4
    front = jax.jit(
        jax.grad(lambda x: jnp.sum(jnp.abs(bench.encode().subsample(x, mask)[0][0, i])))
    )
    seen = np.flatnonzero(np.abs(front(features))[0].sum(-1))
    assert set(range(4 * i, 4 * i + 4)) <= set(seen)
    assert seen.min() >= 4 * i - 3 and seen.max() <= 4 * i + 3


def test_stack_mask_any_and_all():
    mask = np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0]], bool)
    some, every = stack_mask(jnp.asarray(mask))
    np.testing.assert_array_equal(some, [[True, True, False]])
    np.testing.assert_array_equal(every, [[True, False, False]])


def test_initialisers_have_their_published_variance():
    a = np.asarray(init_projection(jax.random.key(0), 4, 320, 16))
    bound = np.sqrt(6 / 336)
    assert a.shape == (4, 320, 16) and np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.99 * bound
    np.testing.assert_allclose(a.var(), 2 / 336, rtol=0.03)
    c = np.asarray(init_codebooks(jax.random.key(0), 1, 8192, 16))
    assert abs(c.mean()) < 0.01 and abs(c.std() - 1) < 0.01


def test_normalised_input_uses_many_more_codes_than_raw():
    """Coloured features with a large common offset, as log-mel has (acceptance check A1)."""
    random = np.random.default_rng(0)
    colour = random.normal(size=(80, 80)) / 9 + np.eye(80)
    raw = random.normal(size=(1, 3200, 80)) @ colour * random.uniform(1, 3, 80) + 40
    normal = (raw - raw.mean((0, 1))) / raw.std((0, 1))
    a = init_projection(jax.random.key(1), 1, 320, 16)
    c = init_codebooks(jax.random.key(2), 1, 8192, 16)
    function = jax.jit(quantize)

    def used(x):
        codes = np.asarray(function(stack_frames(jnp.asarray(x, jnp.float32)), a, c))
        return len(np.unique(codes))

    assert used(normal) >= 5 * used(raw)
