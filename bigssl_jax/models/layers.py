"""Small layers that every module of the Conformer uses: padding, norm, dropout, dense, FFN.

Shape letters: B batch, T frames, D model, M hidden width of the feed-forward module.

Initialisation: kernels Glorot uniform over their whole fan-in and fan-out, biases zero, norm
scales one. Only the attention position biases and the depthwise kernel differ; they say so.

Every module zeroes what it reads from padded frames. Multiplying by a zero gradient would not be
enough: 0 * NaN = NaN, in the forward pass and again in the gradient of a kernel.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigssl_jax.models.config import ConformerConfig
from bigssl_jax.parallel import constrain, stored

RESIDUAL = ('batch', 'time', 'embed')
HIDDEN = ('batch', 'time', 'mlp')
HEADS = ('batch', 'time', 'heads', 'head_dim')


def zero_padding(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` [B, T, ...] with every padded frame (mask [B, T] False) replaced by zero."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def named(init: Any, *axes: str | None) -> Any:
    """An initialiser whose parameter carries logical axis names (see `parallel`)."""
    return nn.with_logical_partitioning(init, axes)


def glorot(in_axes: Sequence[int], out_axes: Sequence[int]) -> Any:
    """Glorot uniform for a kernel whose fan-in and fan-out span several axes."""
    return nn.initializers.variance_scaling(
        1.0, 'fan_avg', 'uniform', in_axis=tuple(in_axes), out_axis=tuple(out_axes)
    )


class LayerNorm(nn.Module):
    """Layer norm over the last axis, float32 inside, result in `dtype`. Parameters 2 D."""

    axis: str = 'embed'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1:]
        scale = self.param('scale', named(nn.initializers.ones, self.axis), size)
        bias = self.param('bias', named(nn.initializers.zeros, self.axis), size)
        scale, bias = (stored(p, (self.axis,), jnp.float32) for p in (scale, bias))
        return layer_norm(x, scale, bias).astype(self.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-6) * scale + bias over the last axis, in float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-6) * scale + bias


class Dropout(nn.Module):
    """Inverted dropout for [B, T, ...] with a counter-based mask.

    The bit of an element is a hash of (key, row, frame, feature), not a slice of a random
    stream: it can be recomputed anywhere, so it fuses into the neighbouring operations, costs a
    fifth of threefry on a CPU, and is the same however the array is sharded.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0.0:
            return x
        return dropout(x, self.make_rng('dropout'), self.rate)


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """x / (1 - rate) where kept, else 0; each element is kept with probability 1 - rate."""
    seeds = jax.random.bits(key, (2,), jnp.uint32)
    rows = jax.lax.broadcasted_iota(jnp.uint32, (*x.shape[:2], *([1] * (x.ndim - 2))), 0)
    frames = jax.lax.broadcasted_iota(jnp.uint32, rows.shape, 1)
    outer = _mix(_mix(rows + seeds[0]) + frames)
    inner = jnp.arange(x[0, 0].size, dtype=jnp.uint32).reshape(x.shape[2:])
    bits = _mix(outer + inner * jnp.uint32(0x9E3779B9) + seeds[1])
    threshold = jnp.uint32(min(int(rate * 2**32), 2**32 - 1))
    kept = x * jnp.asarray(1.0 / (1.0 - rate), x.dtype)
    return jnp.where(bits >= threshold, kept, jnp.zeros((), x.dtype))


def row_dropout(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Dropout of [B, T, D] with one key per row [B], the same whatever the row's batch mates."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def _mix(x: jax.Array) -> jax.Array:
    """A 32-bit integer mixer of full avalanche: xor-shifts between two odd multiplications."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product_float32(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum(spec, a, b) accumulated and returned in float32, whatever the operands' dtype.

    No index of `a` may be absent from both `b` and the result, nor the other way round. JAX's
    own derivative would multiply the float32 cotangent as it is, a float32 product eight times
    as dear on accelerators; here it is rounded to the operands' dtype first.
    """
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _product_forward(spec: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    return product_float32(spec, a, b), (a, b)


def _product_backward(spec: str, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = saved
    of_a, of_b, result = spec.replace('->', ',').split(',')
    cotangent = cotangent.astype(a.dtype)
    return (
        jnp.einsum(f'{result},{of_b}->{of_a}', cotangent, b),
        jnp.einsum(f'{result},{of_a}->{of_b}', cotangent, a),
    )


product_float32.defvjp(_product_forward, _product_backward)


class Dense(nn.Module):
    """x [B, T, *inputs] -> [B, T, *outputs] through one kernel and a bias.

    `axes` names the kernel's axes, inputs first; the last len(outputs) of them name the bias.  The
    kernel is stored with its 'embed' axis in front, be it input or output: that is the axis which
    fsdp splits, and the TPU compiler turns the sum of a gradient into a reduce-scatter dependably
    only along the outermost one.
    """

    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num_in = len(self.axes) - len(self.outputs)
        sizes = (*x.shape[x.ndim - num_in :], *self.outputs)
        order = sorted(range(len(sizes)), key=lambda axis: self.axes[axis] != 'embed')
        stored_at = [order.index(axis) for axis in range(len(sizes))]
        names = tuple(self.axes[axis] for axis in order)
        init = named(glorot(stored_at[:num_in], stored_at[num_in:]), *names)
        kernel = self.param('kernel', init, tuple(sizes[axis] for axis in order))
        contract = (tuple(range(x.ndim - num_in, x.ndim)), tuple(stored_at[:num_in]))
        y = jax.lax.dot_general(
            x.astype(self.dtype), stored(kernel, names, self.dtype), (contract, ((), ()))
        )
        if self.use_bias:
            axes = self.axes[num_in:]
            bias = self.param('bias', named(nn.initializers.zeros, *axes), self.outputs)
            y = y + stored(bias, axes, self.dtype)
        return y


class FeedForward(nn.Module):
    """LayerNorm -> D to M -> Swish -> dropout -> M to D -> dropout. 2 m D^2 + (m + 3) D."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        h = LayerNorm(dtype=dtype, name='norm')(zero_padding(x, mask))
        h = Dense((config.ffn_dim,), ('embed', 'mlp'), dtype, name='expand')(h)
        h = constrain(nn.swish(h), HIDDEN)
        h = Dropout(config.dropout, name='inner_dropout')(h, deterministic)
        h = Dense((config.model_dim,), ('mlp', 'embed'), dtype, name='project')(h)
        return Dropout(config.dropout, name='dropout')(constrain(h, RESIDUAL), deterministic)
