"""Viterbi alignment of label sequences to CTC frames: when each token was said, and how surely.

states    -  a  -  b  -         2 U + 1: every token between blanks
frame 0   *
      1      *                  each frame stays, goes on by one state, or skips a blank
      2      *                  between two different tokens
      3            *
      4               *
a: frames 1 to 3 (end exclusive), b: frame 3
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bigssl_jax.decoding.nbest import certainty


class Alignment(NamedTuple):
    """Of N sequences; columns from their counts on are 0.

    Attributes:
      start_frames, end_frames: int32 [N, U], end exclusive.
      confidence: float32 [N, U], probability of the label at the best frame of its run.
      certainty: float32 [N, U], 1 - normalised entropy at that frame.
      log_probability: float32 [N], of the best alignment; -inf where the labels do not fit, and
        then the other fields mean nothing.
    """

    start_frames: jax.Array
    end_frames: jax.Array
    confidence: jax.Array
    certainty: jax.Array
    log_probability: jax.Array


def align_ctc(
    log_p: jax.Array, mask: jax.Array, tokens: jax.Array, counts: jax.Array, blank_id: int = 0
) -> Alignment:
    """The most probable alignment of each sequence.

    Args:
      log_p: float32 [N, T, V], log-probabilities, finite in padded frames too.
      mask: bool [N, T], True = real frame, real frames first.
      tokens: int32 [N, U]; columns from `counts` on may hold anything.
      counts: int32 [N].
      blank_id: of the blank.
    """
    rows, width = tokens.shape
    real = jnp.arange(width) < counts[:, None]
    states = (
        jnp.full((rows, 2 * width + 1), blank_id).at[:, 1::2].set(jnp.where(real, tokens, blank_id))
    )
    skips = jnp.pad(states[:, 2:] != states[:, :-2], ((0, 0), (2, 0)))
    skips &= jnp.arange(2 * width + 1) % 2 == 1

    def forward(best: jax.Array, inputs: tuple[jax.Array, jax.Array]):
        log_frame, inside = inputs
        one = jnp.pad(best, ((0, 0), (1, 0)), constant_values=-jnp.inf)[:, :-1]
        two = jnp.pad(best, ((0, 0), (2, 0)), constant_values=-jnp.inf)[:, :-2]
        options = jnp.stack([best, one, jnp.where(skips, two, -jnp.inf)])
        came = jnp.where(inside[:, None], jnp.argmax(options, axis=0), 0)
        new = jnp.max(options, axis=0) + jnp.take_along_axis(log_frame, states, axis=1)
        return jnp.where(inside[:, None], new, best), came.astype(jnp.int8)

    # Before the first frame one stands in state 0, from where a stay leads to the first blank and
    # a step to the first token: the only two that an alignment may begin with.
    first = jnp.where(jnp.arange(2 * width + 1) == 0, 0.0, -jnp.inf)
    initial = jnp.broadcast_to(first, (rows, 2 * width + 1))
    best, came = jax.lax.scan(forward, initial, (jnp.swapaxes(log_p, 0, 1), mask.T))
    ends = jnp.stack([2 * counts, jnp.maximum(2 * counts - 1, 0)], axis=1)
    totals = jnp.take_along_axis(best, ends, axis=1)
    last = jnp.take_along_axis(ends, jnp.argmax(totals, axis=1)[:, None], axis=1)[:, 0]

    def backward(state: jax.Array, came: jax.Array):
        before = state - jnp.take_along_axis(came, state[:, None], axis=1)[:, 0]
        return before, state

    _, path = jax.lax.scan(backward, last, came, reverse=True)  # [T, N]
    column = jnp.where(mask & (path.T % 2 == 1), path.T // 2, width)
    label = jnp.take_along_axis(states, path.T, axis=1)
    label_log_p = jnp.take_along_axis(log_p, label[..., None], axis=2)[..., 0]
    start, end, confidence, sure = jax.vmap(_runs, in_axes=(0, 0, 0, None))(
        column, label_log_p, certainty(log_p), width
    )
    return Alignment(start, end, confidence, sure, jnp.max(totals, axis=1))


def _runs(
    column: jax.Array, label_log_p: jax.Array, sure: jax.Array, width: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One row: (start, end, confidence, certainty) [U] of the frames [T] with that column."""
    frames = jnp.arange(column.shape[0], dtype=jnp.int32)
    big = column.shape[0]
    start = jnp.full((width,), big).at[column].min(frames, mode='drop')
    end = jnp.zeros((width,), jnp.int32).at[column].max(frames + 1, mode='drop')
    peak = jnp.full((width,), -jnp.inf).at[column].max(label_log_p, mode='drop')
    at_peak = label_log_p == jnp.take(peak, column, mode='fill', fill_value=jnp.nan)
    peak_column = jnp.where(at_peak, column, width)
    certain = jnp.zeros((width,)).at[peak_column].max(sure, mode='drop')
    return jnp.where(start == big, 0, start), end, jnp.exp(peak), certain
