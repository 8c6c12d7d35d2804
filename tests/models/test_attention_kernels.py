"""Fused attention against plain attention: results, gradients, padding, and who refuses what.

Splash runs in Pallas' interpreter here; a whole encoder with it, split over devices, is in
test_eight_devices.py, and what TPUs get is in test_tpu_programs.py. cuDNN's kernel needs a GPU:
without one its arguments are checked through JAX's own twin.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.models import ConformerConfig, Encoder, attention_kernels, parameter_count, presets
from bigssl_jax.models.attention import attend
from bigssl_jax.stages import schema

TINY = ConformerConfig(
    num_layers=1,
    model_dim=16,
    num_heads=2,
    dropout=0.0,
    subsampling_channels=(3, 4),
    num_mels=8,
)


def heads(frames, counts, head_dim, dtype):
    """query, key, value [B, T, 2, K], mask [B, T], and weights that are zero in padding."""
    rng = np.random.default_rng(3)
    shape = (len(counts), frames, 2, head_dim)
    query, key, value, weights = rng.normal(size=(4, *shape)).astype(np.float32)
    mask = np.arange(frames) < np.array(counts)[:, None]
    weights[~mask] = 0
    arrays = [jnp.asarray(a, dtype) for a in (query / head_dim**0.5 * 3, key, value)]
    return arrays, jnp.asarray(mask), weights


def result_and_gradients(attention, arrays, mask, weights):
    """The real frames' result, and the gradients of its weighted sum by query, key and value."""

    def loss(arrays):
        attended = attention(*arrays, mask)
        return jnp.sum(attended.astype(jnp.float32) * weights), attended

    (_, attended), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    real = np.asarray(mask)
    return [np.asarray(attended, np.float32)[real]] + [np.asarray(g, np.float32) for g in gradients]


def assert_close(ours, plain, tolerance):
    for a, b in zip(ours, plain, strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() < tolerance * np.abs(b).max()


@pytest.mark.parametrize(
    'dtype, head_dim, frames, counts, tolerance',
    [
        ('float32', 24, 130, [130, 128, 65, 1, 0], 1e-5),  # one block of 256
        ('float32', 8, 600, [600, 257], 1e-5),  # five blocks of 128, the last partly there
        ('bfloat16', 192, 130, [130, 70, 0], 3e-2),  # the head dimension of G
    ],
)
def test_splash_equals_plain_attention_forward_and_backward(
    dtype, head_dim, frames, counts, tolerance
):
    arguments = heads(frames, counts, head_dim, dtype)
    splash = functools.partial(attention_kernels.splash, interpret=True)
    ours = result_and_gradients(splash, *arguments)
    assert_close(ours, result_and_gradients(attend, *arguments), tolerance)
    padded = ~np.asarray(arguments[1])
    assert not any(gradient[padded].any() for gradient in ours[1:])


def test_blocks_divide_the_padded_length_and_are_as_large_as_allowed():
    found = {frames: attention_kernels.block_size(frames) for frames in range(128, 2049, 128)}
    assert all(frames % block == 0 and block % 128 == 0 for frames, block in found.items())
    assert (found[128], found[384], found[768], found[896], found[2048]) == (
        128, 384, 384, 128, 512,
    )  # fmt: skip


def test_cudnn_arguments_mean_plain_attention():
    """Through JAX's reference implementation of the very call that cuDNN gets."""
    arguments = heads(40, [40, 17, 1, 0], 8, 'float32')
    reference = functools.partial(attention_kernels.cudnn, implementation='xla')
    ours = result_and_gradients(reference, *arguments)
    assert_close(ours, result_and_gradients(attend, *arguments), 1e-5)


def test_cudnn_never_reads_padding():
    (query, key, value), mask, weights = heads(40, [40, 17, 1, 0], 8, 'float32')
    reference = functools.partial(attention_kernels.cudnn, implementation='xla')
    clean = result_and_gradients(reference, [query, key, value], mask, weights)
    dirty = [jnp.where(mask[..., None, None], x, jnp.nan) for x in (query, key, value)]
    for a, b in zip(clean, result_and_gradients(reference, dirty, mask, weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(
    jax.default_backend() != 'gpu',
    reason='needs a GPU: JAX_PLATFORMS=cuda CUDA_VISIBLE_DEVICES=0 pytest tests/models',
)
@pytest.mark.parametrize('head_dim', [64, 128])
def test_cudnn_equals_plain_attention_on_a_gpu(head_dim):
    arguments = heads(200, [200, 131, 1, 0], head_dim, 'bfloat16')
    ours = result_and_gradients(attention_kernels.cudnn, *arguments)
    assert_close(ours, result_and_gradients(attend, *arguments), 3e-2)


def test_a_kernel_of_another_platform_is_one_clear_line_when_the_program_is_traced():
    encoder = Encoder(dataclasses.replace(TINY, attention='splash'))
    features, mask = jnp.zeros((1, 8, 8)), jnp.ones((1, 8), bool)
    params = jax.eval_shape(encoder.init, jax.random.key(0), features, mask)
    message = "encoder.attention is 'splash', which runs on TPU only.*are CPU; set --config"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(encoder.apply, params, features, mask)


def test_a_model_can_be_counted_and_decoded_where_its_kernel_does_not_exist():
    config = presets.conformer('G', attention='splash')
    assert parameter_count(config) == parameter_count(presets.conformer('G'))
    assert attention_kernels.portable(config, 'cpu') == presets.conformer('G')
    assert attention_kernels.portable(config, 'tpu') is config


@pytest.mark.parametrize(
    'overrides, message',
    [
        (dict(attention='flash'), "model.attention is 'flash'; allowed: plain, splash, cudnn"),
        (dict(attention='splash', relative_attention=True), 'cannot add relative positions'),
        (dict(attention='cudnn', relative_attention=True), 'cannot add relative positions'),
        (dict(attention='cudnn', dtype='float32'), "model.dtype is 'float32'; set model.dtype="),
        (dict(attention='cudnn', num_heads=256), 'head dimension 12 .* multiples of 8 up to 128'),
        (dict(attention='cudnn', num_heads=8), 'head dimension 384 .* up to 256'),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_before_anything_runs(overrides, message):
    with pytest.raises(ConfigError, match=message):
        presets.conformer('G', **overrides)


def test_an_experiment_names_its_own_field():
    with pytest.raises(ConfigError, match="encoder.attention is 'cudnn'.*encoder.dtype"):
        schema.resolve({'encoder': {'preset': 'tiny', 'attention': 'cudnn'}})
