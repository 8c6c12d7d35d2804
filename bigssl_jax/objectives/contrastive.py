"""The contrastive loss of wav2vec 2.0 (arXiv 2006.11477, equation 3), for static shapes.

For a masked frame t with context c_t, its own target q_t competes with K targets of other masked
frames of the same utterance:

    L_t = -log  exp(cos(c_t, q_t) / k) / sum over {t} + K negatives j of exp(cos(c_t, q_j) / k)

Negatives are drawn uniformly, with replacement, from the masked frames except t: list the n masked
frames in order; t stands at rank r; draw u from 0..n-2 and skip over r (u + 1 where u >= r).
"""

import jax
import jax.numpy as jnp


def draw_negatives(keys: jax.Array, masked: jax.Array, num_negatives: int) -> jax.Array:
    """Which frames serve as negatives.

    Args:
      keys: [B], one per row.
      masked: bool [B, T].
      num_negatives: K.

    Returns:
      int32 [B, T, K]: masked frames other than t, for every masked t of a row with at least two;
      elsewhere some frame of the row, without meaning.
    """

    def one(key: jax.Array, row: jax.Array) -> jax.Array:
        size = row.shape[0]
        count = jnp.sum(row, dtype=jnp.int32)
        order = jnp.argsort(~row, stable=True).astype(jnp.int32)  # masked frames first
        rank = jnp.cumsum(row, dtype=jnp.int32) - 1
        draw = jax.random.randint(key, (size, num_negatives), 0, jnp.maximum(count - 1, 1))
        draw = draw + (draw >= rank[:, None])
        return order[jnp.minimum(draw, size - 1)]

    return jax.vmap(one)(keys, masked)


def unit(x: jax.Array) -> jax.Array:
    """x / ||x|| over the last axis in float32; a zero vector stays zero, with finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def contrastive_loss(
    contexts: jax.Array,
    targets: jax.Array,
    negatives: jax.Array,
    scored: jax.Array,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Loss of every scored frame.

    Args:
      contexts, targets: [B, T, P]; frames that are neither scored nor negatives may hold anything.
      negatives: int32 [B, T, K].
      scored: bool [B, T].
      temperature: k.

    Returns:
      loss: float32 [B, T], 0 where not scored.
      correct: bool [B, T]: scored, and its own target is strictly nearer than all negatives.
    """
    c = unit(jnp.where(scored[..., None], contexts, 0.0))
    q = unit(jnp.where(scored[..., None], targets, 0.0))
    cosines = jnp.einsum('btp,bsp->bts', c, q, precision=jax.lax.Precision.HIGHEST)
    positive = jnp.diagonal(cosines, axis1=1, axis2=2)[..., None]
    drawn = jnp.take_along_axis(cosines, negatives, axis=-1)
    logits = jnp.concatenate([positive, drawn], axis=-1) / temperature
    nats = jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]
    correct = scored & (positive[..., 0] > jnp.max(drawn, axis=-1))
    return jnp.where(scored, nats, 0.0), correct


def spread(vectors: jax.Array, scored: jax.Array) -> jax.Array:
    """How much unit vectors vary within their utterance; float32 scalar, a sum over scored frames.

    Sum over rows of sum_t ||v_t - mean||^2 = n - ||sum_t v_t||^2 / n.  Divided by the number of
    frames it lies between 0 (every frame of an utterance the same vector: collapsed) and 1.
    """
    v = unit(jax.lax.stop_gradient(jnp.where(scored[..., None], vectors, 0.0)))
    count = jnp.sum(scored, axis=1, dtype=jnp.float32)
    total = jnp.sum(jnp.where(scored[..., None], v, 0.0), axis=1)
    length = jnp.sum(jnp.where(scored[..., None], v**2, 0.0), axis=(1, 2))
    rows = length - jnp.sum(total**2, axis=-1) / jnp.maximum(count, 1.0)
    return jnp.sum(jnp.maximum(rows, 0.0))
