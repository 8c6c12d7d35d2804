"""Greedy decoding of a transducer: the most probable move at every point of the lattice.

    frame 0 --a--> frame 0 --blank--> frame 1 --blank--> frame 2 --b--> frame 2 --blank--> end

A label is written and the frame stays; a blank goes on to the next frame.  At most `max_symbols`
labels are written in one frame; the blank that follows them is taken whatever its probability.

All rows move at once, each with its own pointer to its own frame; the loop ends with the slowest
row, and a row that has ended stands still.  The prediction network only moves where a label was
written.  A row's result depends on neither its batch mates nor the padding.
"""

import jax
import jax.numpy as jnp

from bigssl_jax.decoding.greedy_ctc import GreedyResult
from bigssl_jax.models.transducer import Transducer

__all__ = ['MAX_SYMBOLS', 'GreedyResult', 'Transducer', 'greedy_transducer']

# Nothing spoken has as many labels in 40 ms; a model that has gone astray would never end [ours].
MAX_SYMBOLS = 5


def greedy_transducer(
    encoded: jax.Array, mask: jax.Array, transducer: Transducer, max_symbols: int = MAX_SYMBOLS
) -> GreedyResult:
    """Decodes a batch; to be called inside `jax.jit`.

    Args:
      encoded: [B, T, J], the encoder's part of the joint; padding may hold anything, NaN included.
      mask: bool [B, T], True = real frame, real frames first.
      transducer: the head.
      max_symbols: labels in one frame, at most.

    Returns:
      A GreedyResult with T x max_symbols columns.  A token's confidence is its probability where
      it was written, and its frames are that frame alone; `log_probability` is of the path, forced
      blanks included; `entropy` is the mean over all moves of the path.
    """
    size = encoded.shape[1]
    rows = jnp.arange(encoded.shape[0])
    ends = jnp.sum(mask, axis=1, dtype=jnp.int32)
    encoded = jnp.where(mask[..., None], encoded, jnp.zeros((), encoded.dtype))
    blanks = jnp.full(rows.shape, transducer.blank_id, jnp.int32)
    state, projected = transducer.advance(transducer.initial(rows.size), blanks)
    ints = jnp.zeros((rows.size, size * max_symbols), jnp.int32)
    zeros = jnp.zeros(rows.shape, jnp.int32)
    first = {
        'state': state,
        'projected': projected,
        'frame': zeros,
        'in_frame': zeros,  # labels written in this frame
        'count': zeros,
        'tokens': ints,
        'frames': ints,
        'confidence': ints.astype(jnp.float32),
        'log_probability': zeros.astype(jnp.float32),
        'entropy': zeros.astype(jnp.float32),
    }

    def move(now: dict) -> dict:
        active = now['frame'] < ends
        here = jnp.take_along_axis(
            encoded, jnp.minimum(now['frame'], size - 1)[:, None, None], axis=1
        )[:, 0]
        log_p = transducer.log_probs(here, now['projected'])
        full = now['in_frame'] >= max_symbols
        best = jnp.where(full, transducer.blank_id, jnp.argmax(log_p, axis=1)).astype(jnp.int32)
        gained = jnp.take_along_axis(log_p, best[:, None], axis=1)[:, 0]
        writes = active & (best != transducer.blank_id)
        column = jnp.where(writes, now['count'], ints.shape[1])  # out of bounds: dropped

        def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
            return buffer.at[rows, column].set(value, mode='drop')

        state, projected = transducer.advance(now['state'], best)
        state, projected = jax.tree.map(
            lambda new, old: jnp.where(writes.reshape((-1,) + (1,) * (new.ndim - 1)), new, old),
            (state, projected),
            (now['state'], now['projected']),
        )
        return {
            'state': state,
            'projected': projected,
            'frame': now['frame'] + (active & ~writes),
            'in_frame': jnp.where(writes, now['in_frame'] + 1, 0),
            'count': now['count'] + writes,
            'tokens': put(now['tokens'], best),
            'frames': put(now['frames'], now['frame']),
            'confidence': put(now['confidence'], jnp.exp(gained)),
            'log_probability': now['log_probability'] + jnp.where(active, gained, 0.0),
            'entropy': now['entropy'] + jnp.where(active, _entropy(log_p), 0.0),
        }

    last = jax.lax.while_loop(lambda now: jnp.any(now['frame'] < ends), move, first)
    return _result(last, ends)


def _entropy(log_p: jax.Array) -> jax.Array:
    """H(p) / ln V over the last axis, in [0, 1]."""
    p_log_p = jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0)
    return -jnp.sum(p_log_p, axis=-1) / jnp.log(float(max(log_p.shape[-1], 2)))


def _result(last: dict, ends: jax.Array) -> GreedyResult:
    counts = last['count']
    written = jnp.arange(last['tokens'].shape[1]) < counts[:, None]
    num_tokens = jnp.maximum(counts, 1)
    return GreedyResult(
        tokens=last['tokens'],
        token_counts=counts,
        token_confidence=last['confidence'],
        token_start_frames=last['frames'],
        token_end_frames=jnp.where(written, last['frames'] + 1, 0),
        confidence=jnp.sum(last['confidence'], axis=1) / num_tokens,
        score=last['log_probability'] / num_tokens,
        log_probability=last['log_probability'],
        entropy=last['entropy'] / jnp.maximum(ends + counts, 1),
    )
