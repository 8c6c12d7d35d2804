"""FLOPs against sums by hand, against XLA's own count, and against the formulas of the encoder."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from bigssl_jax.models import Encoder, parameter_count, presets
from bigssl_jax.parallel.cost import count_flops


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def product(x, w):
    return x @ w


X, W = array(4, 8), array(8, 8)
ONCE = 2 * 4 * 8 * 8  # product(X, W)


def test_products_by_hand():
    found = count_flops(product, array(3, 5), array(5, 7))
    assert found.by_kind == {('dot_general', 'float32'): 2 * 3 * 5 * 7}
    batched = count_flops(
        lambda q, k: jnp.einsum('bthk,bshk->bhts', q, k), array(2, 5, 3, 4), array(2, 6, 3, 4)
    )
    assert batched.total == batched.matmul == 2 * (2 * 3) * 5 * 6 * 4


def test_dtypes_are_told_apart_and_precise_float32_takes_more_passes():
    def both(x, w):
        narrow = jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
        exact = jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)
        return narrow.sum() + exact.sum() + (x @ w).sum()

    found = count_flops(both, X, W)
    assert found.by_dtype == {'bfloat16': ONCE, 'float32_highest': ONCE, 'float32': ONCE}
    assert found.bfloat16_passes == (1 + 6 + 1) * ONCE


def strided(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 2)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def spread(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), ((3, 0),), (2,), (3,), dimension_numbers=('NWC', 'WIO', 'NWC')
    )


@pytest.mark.parametrize(
    ('function', 'shapes'),
    [
        (strided, (array(2, 9, 10, 3), array(3, 3, 3, 4))),
        (
            jax.grad(lambda x, k: strided(x, k).sum(), (0, 1)),
            (array(2, 9, 8, 3), array(3, 3, 3, 4)),
        ),
        (spread, (array(2, 11, 3), array(3, 3, 5))),
    ],
)
def test_convolutions_agree_with_the_count_of_xla(function, shapes):
    """XLA counts a program without loops rightly, and these programs are nothing but products."""
    theirs = jax.jit(function).lower(*shapes).compile().cost_analysis()['flops']
    assert count_flops(function, *shapes).total == pytest.approx(theirs, rel=1e-6)


def test_a_depthwise_convolution_by_hand():
    def depthwise(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), ((2, 2),), dimension_numbers=('NWC', 'WIO', 'NWC'),
            feature_group_count=6,
        )  # fmt: skip

    # 9 outputs of 5 elements each, less 2 + 1 at either end that see padding.
    assert count_flops(depthwise, array(2, 9, 6), array(5, 1, 6)).total == 2 * 2 * 6 * (45 - 6)


def layers(x, ws, body):
    return jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0].sum()


def test_a_scan_counts_its_length_and_rematerialisation_one_more_forward_pass():
    stack = array(7, 8, 8)

    def body(x, w):
        return jnp.tanh(x @ w)

    forward = functools.partial(layers, body=body)
    assert count_flops(forward, X, stack).total == 7 * ONCE
    gradient = jax.grad(forward, argnums=(0, 1))
    assert count_flops(gradient, X, stack).total == 3 * 7 * ONCE
    rematerialised = jax.grad(functools.partial(layers, body=jax.checkpoint(body)), (0, 1))
    assert count_flops(jax.jit(rematerialised), X, stack).total == 4 * 7 * ONCE


def test_scans_within_scans_multiply():
    def body(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x)

    found = count_flops(functools.partial(layers, body=body), X, array(7, 8, 8))
    assert (found.total, found.unknown_loops) == (5 * 7 * ONCE, 0)


def test_of_a_conditional_the_dearest_branch_counts():
    def choose(flag, x, w):
        return jax.lax.switch(flag, [lambda x: x, lambda x: x @ w, lambda x: x @ w @ w], x)

    assert count_flops(choose, array(dtype=jnp.int32), X, W).total == 2 * ONCE


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    def until_small(x, w):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ w, x)

    found = count_flops(until_small, X, W)
    assert (found.total, found.unknown_loops) == (ONCE, 1)


def test_a_loop_of_unknown_length_counts_as_often_as_assumed():
    def stacked(x, ws):
        body = jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ ws[0], x)
        return jax.lax.scan(lambda x, w: (x @ w, None), body, ws)[0]

    found = count_flops(stacked, X, array(7, 8, 8), turns=5)
    assert (found.total, found.unknown_loops) == ((5 + 7) * ONCE, 1)


def test_own_derivatives_count_as_they_are_written():
    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g @ W8))
    assert count_flops(own, X, W).total == ONCE
    found = count_flops(jax.value_and_grad(lambda x, w: own(x, w).sum(), (0, 1)), X, W)
    assert found.total == 3 * ONCE + 2 * 8 * 8 * 8


W8 = jnp.eye(8)


def test_products_that_no_result_needs_do_not_count():
    assert count_flops(lambda x, w: (x @ w @ w, x @ w)[1], X, W).total == ONCE


def test_a_mapped_body_counts_once_per_device():
    mesh = AbstractMesh((4, 2), ('data', 'tensor'), axis_types=(AxisType.Auto, AxisType.Auto))
    split = PartitionSpec('data')
    mapped = jax.shard_map(product, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split)
    # Rows are split over 4 devices, and the 2 of each row of the mesh do the same work.
    assert count_flops(jax.jit(mapped), array(16, 8), W).total == 2 * 2 * 16 * 8 * 8


def kernel(x_ref, w_ref, o_ref):
    o_ref[...] = x_ref[...] @ w_ref[...]


@pytest.mark.parametrize('estimate', [None, pallas.CostEstimate(12345, 0, 0)])
def test_a_kernel_counts_by_its_estimate_or_its_grid(estimate):
    call = pallas.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[
            pallas.BlockSpec((4, 8), lambda i: (i, 0)),
            pallas.BlockSpec((8, 8), lambda i: (0, 0)),
        ],
        out_specs=pallas.BlockSpec((4, 8), lambda i: (i, 0)),
        out_shape=array(16, 8),
        cost_estimate=estimate,
    )
    assert count_flops(call, array(16, 8), W).total == (12345 if estimate else 4 * ONCE)


def encoder_flops(config, rows, frames):
    """FLOPs of the encoder and all its gradients, parameters abstract."""
    features = array(rows, frames, config.num_mels)
    mask = array(rows, frames, dtype=jnp.bool_)
    encoder = Encoder(config)
    params = jax.eval_shape(encoder.init, jax.random.key(0), features, mask)

    def loss(params, features, mask):
        return encoder.apply(params, features, mask)[0].sum()

    return count_flops(jax.grad(loss), params, features, mask)


def closed_form(config, rows, frames):
    """Forward FLOPs of the blocks, and of what needs a gradient and what needs only one, by hand.

    A block multiplies every frame with its 23 d^2 weights and, twice, with all T frames.  The
    first convolution and the projection of distances have inputs that need no gradient.

    Returns:
      blocks, other products with two gradients, products with one gradient.
    """
    t, d = frames // 4, config.model_dim
    first, second = config.subsampling_channels
    mels = config.num_mels
    blocks = config.num_layers * rows * t * (46 * d**2 + 4 * t * d)
    one = rows * (frames // 2) * (mels // 2) * 2 * 9 * first
    if config.relative_attention:
        blocks += config.num_layers * (2 * t - 1) * 2 * rows * t * d
        one += config.num_layers * (2 * t - 1) * 2 * d**2
    two = rows * t * (mels // 4) * second * (2 * 9 * first + 2 * d)
    return blocks, two, one


@pytest.mark.parametrize('name', ['XL', 'G', 'L'])
def test_the_encoder_costs_what_its_formula_says(name):
    rows, frames = 2, 3200
    config = presets.conformer(name, remat='none')
    blocks, two, one = closed_form(config, rows, frames)
    expected = 3 * blocks + 3 * two + 2 * one
    found = encoder_flops(config, rows, frames)
    assert found.total == pytest.approx(expected, rel=2e-3)
    if not config.relative_attention:
        tokens, t = rows * frames // 4, frames // 4
        short = 6 * parameter_count(config) + 12 * config.num_layers * t * config.model_dim
        assert found.total == pytest.approx(tokens * short, rel=0.02)
    assert math.isclose(found.total, found.by_dtype['bfloat16'])  # no float32 product


def test_full_rematerialisation_costs_one_more_forward_pass_of_the_blocks():
    rows, frames = 2, 1600
    config = presets.conformer('XL', remat='full')
    blocks, two, one = closed_form(config, rows, frames)
    expected = 4 * blocks + 3 * two + 2 * one
    assert encoder_flops(config, rows, frames).total == pytest.approx(expected, rel=2e-3)
