"""The sum over all paths of a transducer lattice, and how much of it crosses each arc.

The lattice is drawn in `transducer.py`.  A node (t, u) is reached from its left (a blank) or from
below (a label), and both of these lie on the diagonal t + u - 1.  So all nodes of a diagonal are
computed at once, from the diagonal before:

    alpha[t, u] = logaddexp(alpha[t-1, u] + blank[t-1, u], alpha[t, u-1] + label[t, u-1])

T + U steps on arrays [B, U+1], every step a few element-wise operations.  (A row of frames at a
time needs T steps, but each then is a running sum over u of products of label probabilities, which
float32 loses: it subtracts partial sums of the logarithms.)  To have diagonals as slices, column
u of a plane is shifted by u: 'skewed', which is a pad and a reshape.

Two things keep float32 exact enough at any length.  Each diagonal is stored relative to its best
node, and the distances are added up apart.  And the gradient never needs a difference of large
numbers, as exp(alpha + arc + beta - total) does: the forward pass keeps the probability that a
path which is at a node has come there from below,

    up[t, u] = exp(alpha[t, u-1] + label[t, u-1] - alpha[t, u])  = sigmoid(of a difference)

and the backward pass walks from the end and hands the probability of being at a node, which is 1
there, down to its two predecessors.  What crosses an arc (its occupation probability, which is
what alpha and beta would have given) is minus the derivative of the loss by the arc's
log-probability.  The occupations of a diagonal sum to 1 whatever is rounded.
"""

import functools

import jax
import jax.numpy as jnp

__all__ = ['lattice_loss']

# The logarithm of 0: so large that its exponential is 0, and finite, so that no inf - inf arises.
NEVER = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def lattice_loss(
    blank: jax.Array,
    label: jax.Array,
    frame_counts: jax.Array,
    label_counts: jax.Array,
    fastemit: float,
) -> jax.Array:
    """-log of the summed probability of all paths, float32 [B].

    Args:
      blank: float32 [B, T, U+1], log-probability of the blank at each node.
      label: float32 [B, T, U+1], log-probability of label u+1 at each node; u = U is not read.
        Both must be finite inside the lattice of a row; outside they may hold anything.
      frame_counts, label_counts: int32 [B].
      fastemit: lambda; the derivative by `label` is multiplied by 1 + lambda, the value is not.

    Returns:
      The losses; 0 with zero gradient for rows without frames.
    """
    return _forward(blank, label, frame_counts, label_counts, fastemit)[0]


def _forward(
    blank: jax.Array,
    label: jax.Array,
    frame_counts: jax.Array,
    label_counts: jax.Array,
    fastemit: float,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The losses, and what the gradient needs: `up` [T+U, B, U+1] and the counts."""
    del fastemit
    frames, columns = blank.shape[1:]
    u = jnp.arange(columns)
    inside = jnp.arange(frames)[:, None] < frame_counts[:, None, None]
    inside = inside & (u <= label_counts[:, None, None])
    blank = jnp.where(inside, jnp.maximum(blank, NEVER), NEVER)
    label = jnp.where(inside & (u < label_counts[:, None, None]), label, NEVER)
    label = jnp.maximum(label, NEVER)
    last = u == label_counts[:, None]

    def step(carry: tuple[jax.Array, ...], arcs: tuple[jax.Array, ...]) -> tuple:
        from_left, from_below = carry
        alpha = jnp.logaddexp(from_left, from_below)
        up = jax.nn.sigmoid(from_below - from_left)
        best = jnp.max(alpha, axis=1)
        alpha = jnp.maximum(alpha - best[:, None], NEVER)
        blank, label = arcs
        ended = alpha + blank
        carry = ended, _shift(alpha + label, 1, NEVER)
        return carry, (up, best, jnp.sum(jnp.where(last, ended, 0.0), axis=1))

    start = jnp.full_like(blank[:, 0], NEVER)
    # The first node is reached with probability 1; `_forward` never looks at its `up`.
    start = (jnp.where(u == 0, 0.0, start), start)
    _, (up, best, ended) = jax.lax.scan(step, start, (_skew(blank), _skew(label)))
    diagonal = jnp.arange(up.shape[0])[:, None]
    end = frame_counts - 1 + label_counts
    total = jnp.sum(jnp.where(diagonal <= end, best, 0.0), axis=0)
    total = total + jnp.sum(jnp.where(diagonal == end, ended, 0.0), axis=0)
    losses = jnp.where(frame_counts > 0, -total, 0.0)
    return losses, (up, frame_counts, label_counts)


def _backward(
    fastemit: float, kept: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    """Minus the occupation of every arc, from the end of the lattice to its beginning."""
    up, frame_counts, label_counts = kept
    columns = up.shape[2]
    last = jnp.arange(columns) == label_counts[:, None]
    end = jnp.where(frame_counts > 0, frame_counts - 1 + label_counts, -1)

    def step(carry: tuple[jax.Array, ...], now: tuple[jax.Array, ...]) -> tuple:
        by_blank, by_label = carry  # what the next diagonal hands to this one
        up, diagonal = now
        by_blank = by_blank + jnp.where(last & (diagonal == end)[:, None], 1.0, 0.0)
        here = by_blank + by_label
        from_below = here * up
        return (here - from_below, _shift(from_below, -1, 0.0)), (by_blank, by_label)

    nothing = jnp.zeros_like(up[0])
    diagonals = jnp.arange(up.shape[0])
    _, occupied = jax.lax.scan(step, (nothing, nothing), (up, diagonals), reverse=True)
    scale = -cotangent[:, None, None]
    by_blank, by_label = (_unskew(x) * scale for x in occupied)
    return by_blank, by_label * (1.0 + fastemit), None, None


lattice_loss.defvjp(_forward, _backward)


def _shift(x: jax.Array, by: int, fill: float) -> jax.Array:
    """Moves the columns of [B, U+1] up by one (1) or down by one (-1)."""
    if by > 0:
        return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=fill)
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=fill)


def _skew(plane: jax.Array) -> jax.Array:
    """[B, T, U+1] -> [T+U, B, U+1]: entry (t + u, b, u) is plane[b, t, u], the rest NEVER."""
    rows, frames, columns = plane.shape
    wide = jnp.pad(plane.transpose(0, 2, 1), ((0, 0), (0, 0), (0, columns)), constant_values=NEVER)
    # Rows one shorter than they are: each begins one further to the right than the one above.
    flat = wide.reshape(rows, columns * (frames + columns))[:, : columns * (frames + columns - 1)]
    return flat.reshape(rows, columns, frames + columns - 1).transpose(2, 0, 1)


def _unskew(skewed: jax.Array) -> jax.Array:
    """[T+U, B, U+1] -> [B, T, U+1]: the inverse of `_skew`."""
    diagonals, rows, columns = skewed.shape
    flat = skewed.transpose(1, 2, 0).reshape(rows, columns * diagonals)
    wide = jnp.pad(flat, ((0, 0), (0, columns))).reshape(rows, columns, diagonals + 1)
    return wide[:, :, : diagonals + 1 - columns].transpose(0, 2, 1)
