"""What a beam search returns, and the steps that both searches share.

A hypothesis is a row of a token buffer; columns from its count on hold -1 inside a search and 0 in
a result.  In every step a hypothesis either stays (a blank, or a repetition of its last label) or
is extended by a label:

    beam       stay              extended by c
    "a"        "a"               "aa"  "ab"  ...
    "ab"       "ab" <-- same! --------/

A prefix may thus arise twice in one step, and the two are one hypothesis whose probabilities add
up.  That can only happen between a hypothesis and its parent, the hypothesis without its last
label, if both are in the beam.  `parents` finds these pairs by comparing the buffers themselves:
exact, and for beams of tens cheaper than one softmax.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EMPTY = -1  # in the columns of a search's token buffer that hold no token


class NBest(NamedTuple):
    """The K best hypotheses of B utterances, best first; columns from `token_counts` on are 0.

    A row may have fewer hypotheses than K: those that do not exist have a score of -inf and no
    tokens.

    Attributes:
      tokens: int32 [B, K, U].
      token_counts: int32 [B, K].
      scores: float32 [B, K], what they are ranked by: log_probability + lm_score.
      log_probability: float32 [B, K], log P(tokens | audio), summed over the alignments that
        survived in the beam: a lower bound that a wide beam reaches.
      lm_score: float32 [B, K], all that fusion added, weighted (see `fusion`).
      token_confidence: float32 [B, K, U], probability of the label at its best frame, in (0, 1].
      token_certainty: float32 [B, K, U], 1 - H(p) / ln V at the same frame, in [0, 1].
      token_start_frames, token_end_frames: int32 [B, K, U], end exclusive.
    """

    tokens: jax.Array
    token_counts: jax.Array
    scores: jax.Array
    log_probability: jax.Array
    lm_score: jax.Array
    token_confidence: jax.Array
    token_certainty: jax.Array
    token_start_frames: jax.Array
    token_end_frames: jax.Array


def parents(tokens: jax.Array, counts: jax.Array, alive: jax.Array) -> jax.Array:
    """Which hypothesis is which one's parent.

    Args:
      tokens: int32 [B, K, U], EMPTY from `counts` on; rows that are alive differ from each other.
      counts: int32 [B, K].
      alive: bool [B, K].

    Returns:
      bool [B, K, K]: [b, child, parent]; at most one parent per child.
    """
    is_last = jnp.arange(tokens.shape[2]) == counts[..., None] - 1
    shortened = jnp.where(is_last, EMPTY, tokens)
    equal = jnp.all(shortened[:, :, None] == tokens[:, None], axis=-1)
    return equal & (counts > 0)[..., None] & alive[:, :, None] & alive[:, None]


def last_tokens(tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """The last token of each row of [B, K, U], EMPTY for those without: int32 [B, K]."""
    column = jnp.maximum(counts - 1, 0)[..., None]
    return jnp.where(counts > 0, jnp.take_along_axis(tokens, column, axis=2)[..., 0], EMPTY)


def take(tree: Any, source: jax.Array) -> Any:
    """Rows of arrays [B, K, ...] by `source` int32 [B, N]: arrays [B, N, ...]."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, index: row[index])(x, source), tree)


def put(buffer: jax.Array, column: jax.Array, value: jax.Array, where: jax.Array) -> jax.Array:
    """`buffer` [B, K, U] with `value` [B, K] in `column` [B, K] of the rows `where` [B, K]."""
    chosen = (jnp.arange(buffer.shape[2]) == column[..., None]) & where[..., None]
    return jnp.where(chosen, value[..., None], buffer)


def flat(tree: Any) -> Any:
    """Arrays [B, K, ...] as [B K, ...], which language models and decoders work on."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def folded(tree: Any, rows: int) -> Any:
    """Arrays [B K, ...] as [B, K, ...]."""
    return jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]), tree)


def choose(where: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `where` holds, else `old`; arrays whose leading axes are those of `where`."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(where.reshape(where.shape + (1,) * (a.ndim - where.ndim)), a, b)

    return jax.tree.map(one, new, old)


def advance_where(
    advance: Callable[[Any, jax.Array], Any], old: Any, tokens: jax.Array, where: jax.Array
) -> Any:
    """Networks of every hypothesis, moved on by one token where it has a new one.

    Args:
      advance: (arrays [B K, ...], tokens int32 [B K]) -> the same arrays moved on; not run in a
        step in which no hypothesis has a new token.
      old: arrays [B, K, ...].
      tokens: int32 [B, K].
      where: bool [B, K].
    """

    def run() -> Any:
        return choose(where, folded(advance(flat(old), tokens.reshape(-1)), tokens.shape[0]), old)

    return jax.lax.cond(jnp.any(where), run, lambda: old)


def certainty(log_p: jax.Array) -> jax.Array:
    """1 - H(p) / ln V over the last axis: 1 certain, 0 uniform; log_p may hold -inf."""
    entropy = -jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)
    return 1.0 - entropy / jnp.log(float(max(log_p.shape[-1], 2)))
