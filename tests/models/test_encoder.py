"""Counts, presets, scan, remat, dtype, dropout and initialisation of the encoder."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.config import ConfigError
from bigssl_jax.models import (
    ConformerBlock,
    ConformerConfig,
    Encoder,
    parameter_count,
    presets,
    subsampled_count,
)
from bigssl_jax.models.attention import distance_sinusoid, sinusoid
from bigssl_jax.models.layers import dropout

TINY = ConformerConfig(
    num_layers=2, model_dim=16, num_heads=2, dropout=0.0, subsampling_channels=(3, 4), num_mels=8
)


def inputs(frames=21, rows=3):
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(rows, frames, 8)), jnp.float32)
    mask = jnp.arange(frames) < jnp.array([frames, 10, 1])[:rows, None]
    return features, mask


@functools.cache
def parameters(config):
    return nn.unbox(jax.jit(Encoder(config).init)(jax.random.key(0), *inputs()))


def apply(config, params, *arrays, deterministic=True, key=0, method=None):
    """The jitted encoder: eager, every operation would be compiled by itself."""

    def run(params, arrays, key):
        rngs = {'dropout': key}
        return Encoder(config).apply(params, *arrays, deterministic, rngs=rngs, method=method)

    return jax.jit(run)(params, arrays, jax.random.key(key))


def subsampling_count(c):
    (c1, c2), mels = c.subsampling_channels, subsampled_count(c.num_mels)
    return 10 * c1 + (9 * c1 + 1) * c2 + mels * c2 * c.model_dim + c.model_dim


@pytest.mark.parametrize(
    'name, relative, stack',
    [
        ('L', True, 107_503_104),
        ('XL', False, 579_649_536),
        ('XL', True, 604_864_512),
        ('XXL', False, 1_014_386_688),
        ('XXL', True, 1_058_512_896),
        ('G', False, 7_817_748_480),
        ('G', True, 8_157_708_288),
    ],
)
def test_stacks_have_exactly_the_parameters_of_the_arithmetic(name, relative, stack):
    config = presets.conformer(name, relative_attention=relative)
    d, k = config.model_dim, config.kernel_size
    block = (24 * d * d + (31 + k) * d) if relative else (23 * d * d + (29 + k) * d)
    assert config.num_layers * block == stack
    assert parameter_count(config) - subsampling_count(config) == stack


@pytest.mark.parametrize('multiplier', [2, 6])
def test_other_ffn_widths_follow_the_arithmetic(multiplier):
    config = dataclasses.replace(TINY, ffn_multiplier=multiplier)
    d, k, m = config.model_dim, config.kernel_size, multiplier
    block = 4 * m * d * d + 2 * (m + 3) * d + 4 * d * d + 6 * d + 3 * d * d + (k + 7) * d + 2 * d
    assert parameter_count(config) == 2 * block + subsampling_count(config)


@pytest.mark.parametrize('name', ['XL', 'G'])
def test_a_wider_kernel_costs_one_width_per_layer_and_frame(name):
    narrow, wide = (parameter_count(presets.conformer(name, kernel_size=k)) for k in (5, 32))
    config = presets.conformer(name)
    assert wide - narrow == (32 - 5) * config.model_dim * config.num_layers


@pytest.mark.parametrize(
    'name, relative, wide, decoder, low, high',
    [
        ('L', True, False, 5.3e6, 113e6, 114e6),
        ('L', True, True, 5.3e6, 119e6, 121e6),
        ('XL', False, False, 8.9e6, 588e6, 590e6),
        ('XL', False, True, 8.9e6, 618e6, 620e6),
        ('XL', True, False, 8.9e6, 613e6, 615e6),
        ('XL', True, True, 8.9e6, 643e6, 645e6),
        ('XXL', False, False, 8.9e6, 1.02e9, 1.03e9),
        ('XXL', False, True, 8.9e6, 1.05e9, 1.06e9),
        ('XXL', True, False, 8.9e6, 1.065e9, 1.075e9),
        ('XXL', True, True, 8.9e6, 1.095e9, 1.105e9),
        ('G', False, False, 14.2e6, 7.83e9, 7.84e9),
        ('G', False, True, 14.2e6, 8.10e9, 8.11e9),
        ('G', True, False, 14.2e6, 8.17e9, 8.18e9),
        ('G', True, True, 14.2e6, 8.44e9, 8.45e9),
    ],
)
def test_totals_with_the_decoder_match_the_published_labels(
    name, relative, wide, decoder, low, high
):
    width = presets.conformer(name).model_dim
    config = presets.conformer(
        name,
        relative_attention=relative,
        subsampling_channels=(width, width) if wide else (128, 32),
    )
    assert low < parameter_count(config) + decoder < high


def test_usm_presets_are_near_their_labels():
    assert 0.59e9 < parameter_count(presets.conformer('USM-600M')) < 0.62e9
    assert 1.8e9 < parameter_count(presets.conformer('USM-2B')) < 1.9e9


def test_subsampled_counts_and_shapes_are_the_ceiling_of_the_ceiling():
    for frames in range(1, 30):
        expected = math.ceil(math.ceil(frames / 2) / 2)
        assert subsampled_count(frames) == expected
        assert int(subsampled_count(jnp.int32(frames))) == expected
    np.testing.assert_array_equal(subsampled_count(np.array([0, 1, 4, 5])), [0, 1, 1, 2])
    params = parameters(TINY)
    for frames in (1, 2, 18, 19):
        features = jnp.zeros((frames, frames, 8))
        mask = jnp.arange(frames) < jnp.arange(1, frames + 1)[:, None]
        out, mask4 = apply(TINY, params, features, mask)
        assert out.shape == (frames, subsampled_count(frames), 16)
        np.testing.assert_array_equal(mask4.sum(1), subsampled_count(mask.sum(1)))
        assert not np.asarray(out)[~np.asarray(mask4)].any()


@pytest.mark.parametrize('relative', [False, True])
def test_scanned_equals_unrolled(relative):
    config = dataclasses.replace(TINY, relative_attention=relative)
    params = parameters(config)
    features, mask = inputs()

    @jax.jit
    def subsample(params):
        return Encoder(config).apply(params, features, mask, method=Encoder.subsample)

    e, mask4 = subsample(params)
    scanned = apply(config, params, e, mask4, method=Encoder.context)

    @jax.jit
    def unrolled(params, x):
        distances = distance_sinusoid(x.shape[1], 16) if relative else None
        if not relative:
            x = x + sinusoid(jnp.arange(x.shape[1]), 16)
        for i in range(config.num_layers):
            layer = jax.tree.map(lambda leaf: leaf[i], params['params']['blocks'])  # noqa: B023
            x, _ = ConformerBlock(config).apply({'params': layer}, x, mask4, distances, True)
        return x

    real, expected = np.asarray(mask4), np.asarray(unrolled(params, e))
    np.testing.assert_allclose(np.asarray(scanned)[real], expected[real], atol=1e-5)
    both, _ = apply(config, params, features, mask)
    np.testing.assert_allclose(both, scanned, atol=1e-6)


@functools.cache
def loss_and_gradients(name):
    features, mask = inputs()
    params = parameters(TINY)
    config = dataclasses.replace(TINY, remat=name, dropout=0.2)

    def loss(params):
        y, _ = Encoder(config).apply(
            params, features, mask, False, rngs={'dropout': jax.random.key(3)}
        )
        return jnp.sum(jnp.sin(y))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize('remat', ['dots', 'block', 'full'])
def test_remat_changes_no_result_and_no_gradient(remat):
    loss, gradients = loss_and_gradients(remat)
    expected, expected_gradients = loss_and_gradients('none')
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_remat_keeps_less_the_stricter_it_is():
    """Residuals saved for the backward pass, counted by JAX itself."""
    from jax._src.ad_checkpoint import saved_residuals

    features, mask = inputs()

    def saved(name):
        config = dataclasses.replace(TINY, remat=name)
        params = parameters(config)
        found = saved_residuals(
            lambda p: jnp.sum(Encoder(config).apply(p, features, mask)[0]), params
        )
        return sum(np.prod(aval.shape) for aval, _ in found)

    full, block, dots, none = map(saved, ('full', 'block', 'dots', 'none'))
    assert full < block < dots < none


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_layer_means_are_those_of_the_shallower_encoders(remat):
    config = dataclasses.replace(TINY, remat=remat)
    features, mask = inputs()

    def means(features, mask):
        return jax.jit(
            lambda params: Encoder(config).apply(
                params, features, mask, method='layer_means', mutable='layers'
            )[0]
        )(parameters(config))

    found = means(features, mask)
    e, mask4 = Encoder(TINY).apply(parameters(TINY), features, mask, method='subsample')
    expected = [e]
    for depth in (1, 2):
        shallow = dict(parameters(TINY)['params'])
        shallow['blocks'] = jax.tree.map(lambda leaf: leaf[:depth], shallow['blocks'])  # noqa: B023
        fewer = dataclasses.replace(TINY, num_layers=depth)
        expected.append(apply(fewer, {'params': shallow}, features, mask)[0])
    for layer, frames in enumerate(expected):
        for row, count in enumerate(mask4.sum(axis=1)):
            np.testing.assert_allclose(
                found[row, layer], frames[row, :count].mean(axis=0), atol=1e-5
            )
    # Padding and batch mates: the second utterance alone, its padding NaN.
    alone = means(features[1:2].at[:, 10:].set(jnp.nan)[:, :17], mask[1:2, :17])
    np.testing.assert_allclose(alone[0], found[1], atol=1e-5)


def test_initial_parameters_are_the_same_under_jit_and_differ_per_layer():
    features, mask = inputs()
    eager = nn.unbox(Encoder(TINY).init(jax.random.key(0), features, mask))
    jax.tree.map(np.testing.assert_array_equal, eager, parameters(TINY))
    kernel = eager['params']['blocks']['ffn_in']['expand']['kernel']
    assert kernel.shape == (2, 16, 64) and (kernel[0] != kernel[1]).all()


def test_initial_scales_are_as_documented():
    """Glorot uniform over whole fans, and activations of order one through a deep stack."""
    config = dataclasses.replace(TINY, model_dim=64, num_heads=4, relative_attention=True)
    tree = parameters(config)['params']['blocks']
    for path, fans in {
        ('ffn_in', 'expand'): (64, 256),
        ('ffn_out', 'project'): (256, 64),
        ('attention', 'query'): (64, 64),
        ('attention', 'output'): (64, 64),
        ('convolution', 'expand'): (64, 128),
        ('convolution', 'project'): (64, 64),
    }.items():
        kernel = np.asarray(tree[path[0]][path[1]]['kernel'])
        limit = np.sqrt(6 / sum(fans))
        assert np.abs(kernel).max() <= limit and np.abs(kernel).max() > 0.95 * limit
        assert not np.asarray(tree[path[0]][path[1]]['bias']).any()
    assert np.abs(tree['convolution']['depthwise']).max() <= np.sqrt(3 / 5)
    assert not np.asarray(tree['attention']['position_bias']).any()


def test_bfloat16_computes_in_bfloat16_and_promises_float32():
    config = dataclasses.replace(TINY, dtype='bfloat16', relative_attention=True)
    features, mask = inputs()
    params = parameters(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    encoder = Encoder(config)
    e, _ = jax.eval_shape(
        lambda p: encoder.apply(p, features, mask, method=Encoder.subsample), params
    )
    gradients = jax.eval_shape(
        jax.grad(lambda p: encoder.apply(p, features, mask)[0].sum()), params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype('float32')}
    out, _ = apply(config, params, features, mask)
    assert e.dtype == jnp.bfloat16 and out.dtype == jnp.float32
    exact, _ = apply(dataclasses.replace(config, dtype='float32'), params, features, mask)
    assert np.abs(out - exact).max() < 0.25 and np.abs(out - exact).mean() < 0.02


def test_no_float32_product_in_the_program_of_a_bfloat16_encoder():
    config = dataclasses.replace(TINY, dtype='bfloat16', relative_attention=True)
    params, (features, mask) = parameters(config), inputs()

    def loss(params):
        return Encoder(config).apply(params, features, mask)[0].sum()

    def operands(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
                yield tuple(v.aval.dtype.name for v in equation.invars)
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')
            ):
                inner = getattr(value, 'jaxpr', value)
                if hasattr(inner, 'eqns'):
                    yield from operands(inner)

    forward = list(operands(jax.make_jaxpr(loss)(params).jaxpr))
    both = list(operands(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert len(forward) > 10 and len(both) > 2 * len(forward)
    assert set(forward) == set(both) == {('bfloat16', 'bfloat16')}


def test_dropout_keeps_the_stated_share_and_the_mean():
    x = jnp.ones((8, 50, 3, 64))
    for rate in (0.1, 0.5):
        y = np.asarray(dropout(x, jax.random.key(1), rate))
        kept = y != 0
        n = kept.size
        assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / n)
        np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
        for axis in range(4):  # no stripes along any axis
            share = kept.mean(axis=tuple(a for a in range(4) if a != axis))
            per = n / x.shape[axis]
            assert abs(share - (1 - rate)).max() < 6 * np.sqrt(rate * (1 - rate) / per)
        flat = kept.reshape(8 * 50, -1).astype(float) - (1 - rate)
        for a, b in ((flat[1:], flat[:-1]), (flat[:, 1:], flat[:, :-1])):
            assert abs((a * b).mean()) < 6 * rate * (1 - rate) / np.sqrt(a.size)


def test_dropout_is_new_per_layer_module_and_key_and_off_when_deterministic():
    config = dataclasses.replace(TINY, dropout=0.3)
    features, mask = inputs()
    params = parameters(config)

    @jax.jit
    def dropped(key):
        return Encoder(config).apply(params, features, mask, False, rngs={'dropout': key})[0]

    def run(key):
        return np.asarray(dropped(jax.random.key(key)))

    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).any()
    off, _ = apply(config, params, features, mask)
    np.testing.assert_array_equal(off, apply(TINY, params, features, mask)[0])


def test_parameters_carry_the_promised_logical_axes():
    config = dataclasses.replace(TINY, relative_attention=True)
    shapes = jax.eval_shape(Encoder(config).init, jax.random.key(0), *inputs())
    boxed = jax.tree.leaves(shapes, is_leaf=lambda v: isinstance(v, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in boxed)
    names = {name for leaf in boxed for name in leaf.names}
    assert names <= {
        'embed',
        'mlp',
        'heads',
        'head_dim',
        'kernel',
        'channel',
        'mel',
        'vocab',
        'layer',
        None,
    }
    assert all(len(leaf.names) == leaf.value.ndim for leaf in boxed)
    blocks = jax.tree.leaves(
        shapes['params']['blocks'], is_leaf=lambda v: isinstance(v, nn.LogicallyPartitioned)
    )
    assert all(leaf.names[0] == 'layer' for leaf in blocks)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: presets.conformer('XLL'), "no Conformer preset 'XLL'; allowed: tiny"),
        (lambda: presets.conformer('XL', layers=3), "no field 'layers'; allowed: num_layers"),
        (lambda: presets.conformer('tiny', num_heads=5), 'model_dim=144 is not a multiple'),
        (lambda: presets.conformer('tiny', remat='some'), "model.remat is 'some'; allowed: none"),
        (lambda: presets.conformer('tiny', dtype='float16'), "model.dtype is 'float16'"),
        (lambda: presets.conformer('tiny', depthwise_norm='batch'), 'model.depthwise_norm'),
        (lambda: presets.conformer('tiny', dropout=1.0), 'model.dropout is 1.0'),
        (lambda: presets.conformer('tiny', num_layers=0), 'model.num_layers is 0'),
        (lambda: presets.conformer('tiny', subsampling_channels=(8,)), 'subsampling_channels'),
    ],
)
def test_a_bad_model_config_is_one_clear_line(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_other_features_than_the_model_expects_are_refused():
    with pytest.raises(ValueError, match='features have 9 mels, model.num_mels is 8'):
        Encoder(TINY).init(jax.random.key(0), jnp.zeros((1, 8, 9)), jnp.ones((1, 8), bool))
