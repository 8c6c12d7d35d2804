"""The most probable labels of every frame: what a student may learn instead of one best label.

Of each frame's distribution over V labels the k largest log-probabilities are kept, as float16
(three digits, which is more than a teacher knows), with their ids; `mass` says how much probability
they hold, so that nobody has to guess whether k was enough.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Posteriors(NamedTuple):
    """Of B utterances of T frames.

    Attributes:
      ids: int32 [B, T, k], by falling probability; 0 on padded frames.
      log_probs: float16 [B, T, k], ln P(id | audio), the blank included; 0 on padded frames.
      mass: float32 [B], mean over real frames of the probability that was kept; 0 without frames.
    """

    ids: jax.Array
    log_probs: jax.Array
    mass: jax.Array


def top_posteriors(logits: jax.Array, mask: jax.Array, k: int) -> Posteriors:
    """The k most probable labels of every frame; to be called inside `jax.jit` (`k` static).

    Args:
      logits: [B, T, V], any float dtype; padded frames may hold anything, NaN included.
      mask: bool [B, T], True = real frame.
      k: at most V are kept.
    """
    logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
    log_p, ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), min(k, logits.shape[-1]))
    kept = jnp.where(mask, jnp.sum(jnp.exp(log_p), axis=-1), 0.0)
    return Posteriors(
        ids=jnp.where(mask[..., None], ids, 0).astype(jnp.int32),
        log_probs=jnp.where(mask[..., None], log_p, 0.0).astype(jnp.float16),
        mass=jnp.sum(kept, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1),
    )
