"""Multi-head self-attention, without positions or with Transformer-XL relative ones.

Shape letters: B batch, T frames (queries), S frames (keys, = T), D model, H heads, K head
dimension, P = 2T - 1 distances.

Relative attention (arXiv 1901.02860, section 3.3) scores query t against key s as

    (q_t + u) . k_s  +  (q_t + v) . r_{t-s}          r = sinusoid(distance) @ W

The second term is one product with all P distances, [T, P], whose row t must then be shifted so
that column s holds distance t - s. With distances running T-1 ... -(T-1) along P, that is the
element (t, s + T - 1 - t). Padding each row by one and reading the flat array with rows of length
P instead of P + 1 does it without a gather:

    T = 3, P = 5, rows a, b, c; wanted a2 a3 a4 / b1 b2 b3 / c0 c1 c2
    padded, flat:   a0 a1 a2 a3 a4 .  b0 b1 b2 b3 b4 .  c0 c1 c2 c3 c4 .
    from T - 1 on:        a2 a3 a4 .  b0 b1 b2 b3 b4 .  c0 c1 c2 c3 c4 .
    rows of P:           [a2 a3 a4 . b0] [b1 b2 b3 b4 .] [c0 c1 c2 c3 c4] -> first T columns
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigssl_jax.models.attention_kernels import fused_attend
from bigssl_jax.models.config import ConformerConfig
from bigssl_jax.models.layers import (
    HEADS,
    RESIDUAL,
    Dense,
    Dropout,
    LayerNorm,
    named,
    product_float32,
    zero_padding,
)
from bigssl_jax.parallel import constrain

# Finite, so that a row without any real key has a uniform softmax and no NaN.
MASKED_SCORE = -1e30


def sinusoid(positions: jax.Array, size: int) -> jax.Array:
    """[N] positions -> float32 [N, size]: sines then cosines of wavelengths 2 pi to 2e4 pi."""
    half = size // 2
    rates = jnp.exp(jnp.arange(half) * (-jnp.log(10000.0) / max(half - 1, 1)))
    angles = positions.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def distance_sinusoid(num_frames: int, size: int) -> jax.Array:
    """float32 [2T - 1, size]: the sinusoids of distances T-1, ..., 0, ..., -(T-1)."""
    return sinusoid(jnp.arange(num_frames - 1, -num_frames, -1), size)


def relative_shift(scores: jax.Array) -> jax.Array:
    """[..., T, 2T - 1] by distance -> [..., T, T] by key (the drawing above)."""
    *lead, frames, distances = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, 1)])
    flat = padded.reshape(*lead, frames * (distances + 1))[..., frames - 1 :]
    flat = flat[..., : frames * distances]
    return flat.reshape(*lead, frames, distances)[..., :frames]


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, bias: Any = None
) -> jax.Array:
    """softmax(query . key + bias over real keys) @ value.

    Args:
        query: [B, T, H, K], already divided by sqrt(K). key, value: [B, S, H, K], finite.
        mask: bool [B, S], real keys.
        bias: float32 [B, H, T, S] added to the scores, or None.
    Returns:
        [B, T, H, K] in the dtype of `value`; scores and softmax are float32.
    """
    scores = product_float32('bthk,bshk->bhts', query, key)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(mask[:, None, None, :], scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum('bhts,bshk->bthk', weights, value)


class SelfAttention(nn.Module):
    """LayerNorm -> attention over all real frames -> output product -> dropout.

    4 D^2 + 6 D parameters, D^2 + 2 D more with relative positions. The softmax has no dropout:
    fused attention kernels have none either.
    """

    config: ConformerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, distances: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """x [B, T, D], mask [B, T], distances [2T - 1, D] when relative -> [B, T, D]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        heads = (config.num_heads, config.head_dim)
        h = LayerNorm(dtype=dtype, name='norm')(zero_padding(x, mask))

        def project(name: str, source: jax.Array, use_bias: bool = True) -> jax.Array:
            axes = ('embed', 'heads', 'head_dim')
            return Dense(heads, axes, dtype, use_bias=use_bias, name=name)(source)

        query = constrain(project('query', h) * config.head_dim**-0.5, HEADS)
        key = constrain(project('key', h), HEADS)
        value = constrain(project('value', h), HEADS)
        bias = None
        if config.relative_attention:
            if distances is None:
                raise ValueError('relative attention needs `distances`: distance_sinusoid(T, D)')
            # Zero at the start: attention begins as if positions did not matter.
            zeros = named(nn.initializers.zeros, 'heads', 'head_dim')
            scale = config.head_dim**-0.5
            content = self.param('content_bias', zeros, heads).astype(dtype) * scale
            position = self.param('position_bias', zeros, heads).astype(dtype) * scale
            projected = project('distance', distances[None], use_bias=False)[0]
            by_distance = product_float32('bthk,phk->bhtp', query + position, projected)
            bias = relative_shift(by_distance)
            query = query + content
        # Parameters do not depend on the kernel, and are made wherever they are needed.
        if config.attention == 'plain' or self.is_initializing():
            h = attend(query, key, value, mask, bias)
        else:
            h = fused_attend(config.attention, query, key, value, mask)
        h = constrain(h, HEADS)
        h = Dense((config.model_dim,), ('heads', 'head_dim', 'embed'), dtype, name='output')(h)
        return Dropout(config.dropout, name='dropout')(constrain(h, RESIDUAL), deterministic)
