"""Greedy CTC decoding: the most probable label of every frame, runs merged, blanks removed.

    frame      0  1  2  3  4  5  6  7
    best       -  a  a  -  a  b  b  -        (- is the blank)
    tokens        a        a  b
    start, end    1,3      4,5 5,7           end is exclusive

All shapes are static: token u of a row is scattered to column u, found by counting run starts.

Confidences.  Of a token: the largest probability that its label has in its run (a CTC model puts a
label's mass on one or two frames of the run).  Of an utterance, three measures, for a filter to
choose from: `confidence`, the mean over tokens; `score`, the log-probability of the best path per
token; `entropy`, the mean over frames of the normalised entropy (0 certain, 1 uniform).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GreedyResult(NamedTuple):
    """Hypotheses of B utterances; columns from `token_counts` on are 0.

    Attributes:
      tokens: int32 [B, T].
      token_counts: int32 [B].
      token_confidence: float32 [B, T], in (0, 1].
      token_start_frames: int32 [B, T], first frame of the run.
      token_end_frames: int32 [B, T], one past its last frame.
      confidence: float32 [B], mean token confidence; 0 for an empty hypothesis.
      score: float32 [B], log_probability / max(token_counts, 1).
      log_probability: float32 [B], of the best path: sum over real frames of the largest log p.
      entropy: float32 [B], mean over real frames of H(p) / ln V, in [0, 1].
    """

    tokens: jax.Array
    token_counts: jax.Array
    token_confidence: jax.Array
    token_start_frames: jax.Array
    token_end_frames: jax.Array
    confidence: jax.Array
    score: jax.Array
    log_probability: jax.Array
    entropy: jax.Array


def greedy_ctc(logits: jax.Array, mask: jax.Array, blank_id: int = 0) -> GreedyResult:
    """Decodes a batch; to be called inside `jax.jit` (`blank_id` static).

    Args:
      logits: [B, T, V], any float dtype; padded frames may hold anything, NaN included.
      mask: bool [B, T], True = real frame, real frames first.
      blank_id: of the blank.
    """
    size, vocabulary = logits.shape[1:]
    logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    top = jnp.max(log_p, axis=-1)
    best = jnp.where(mask, jnp.argmax(log_p, axis=-1), blank_id).astype(jnp.int32)
    before = jnp.pad(best, ((0, 0), (1, 0)), constant_values=blank_id)[:, :-1]
    is_label = best != blank_id
    starts = is_label & (best != before)
    # Column of the token that a frame belongs to; `size` is out of bounds: dropped.
    column = jnp.where(is_label, jnp.cumsum(starts, axis=1) - 1, size)

    def scatter(column: jax.Array, best: jax.Array, top: jax.Array, starts: jax.Array):
        frames = jnp.arange(size, dtype=jnp.int32)
        ints, floats = jnp.zeros((size,), jnp.int32), jnp.zeros((size,), jnp.float32)
        tokens = ints.at[column].set(best, mode='drop')
        confidence = floats.at[column].max(jnp.exp(top), mode='drop')
        first = ints.at[jnp.where(starts, column, size)].set(frames, mode='drop')
        end = ints.at[column].max(frames + 1, mode='drop')
        return tokens, confidence, first, end

    tokens, confidence, first, end = jax.vmap(scatter)(column, best, top, starts)
    counts = jnp.sum(starts, axis=1, dtype=jnp.int32)
    num_tokens = jnp.maximum(counts, 1)
    num_frames = jnp.maximum(jnp.sum(mask, axis=1), 1)
    log_probability = jnp.sum(jnp.where(mask, top, 0.0), axis=1)
    frame_entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1) / jnp.log(float(max(vocabulary, 2)))
    return GreedyResult(
        tokens=tokens,
        token_counts=counts,
        token_confidence=confidence,
        token_start_frames=first,
        token_end_frames=end,
        confidence=jnp.sum(confidence, axis=1) / num_tokens,
        score=log_probability / num_tokens,
        log_probability=log_probability,
        entropy=jnp.sum(jnp.where(mask, frame_entropy, 0.0), axis=1) / num_frames,
    )
