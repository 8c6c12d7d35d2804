"""Transducer losses: every path through a lattice of frames and labels (Graves, 1211.3711).

Three labels (a, b, c), four frames.  At node (t, u) the model has heard frame t and said u labels.
A blank moves it to the next frame, a label to the next label of the same frame:

      u
      3   o-----o-----o-----o====>  end: one last blank
          |     |     |     |                                 label   (t, u+1)
      c   |     |     |     |                                            ^
          |     |     |     |                                  P(label)  |
      2   o-----o-----o-----o                                            |
          |     |     |     |                                         (t, u) -----> (t+1, u)
      b   |     |     |     |                                             P(blank)
          |     |     |     |
      1   o-----o-----o-----o
          |     |     |     |
      a   |     |     |     |
          |     |     |     |
      0   o-----o-----o-----o
      t   0     1     2     3

A path from (0, 0) to the end has T blanks and U labels; the loss is -log of the summed probability
of all of them.  Unlike CTC a frame may carry any number of labels, so there is a path whenever
there is a frame.  Unlike CTC the probabilities depend on the labels said so far, so that they
differ at each of the T (U+1) nodes, and logits [B, T, U+1, V] are larger than anything in the
encoder: 10.6 GB at B 16, T 400, U 100, V 4096.

So each loss has two forms with the same values and gradients: a reference form that is given the
logits, and a fused form that is given what they are made of and computes them in tiles
(`transducer_joint.py`).  Both share the walk through the lattice (`transducer_lattice.py`) and the
derivative in closed form, and are float32 whatever the dtype of the products.

RNN-T draws blank and labels from one softmax.  HAT (Variani et al., 2003.07705) first asks whether
there is a label at all, P(blank) = sigmoid(b), and then which, with a softmax over the others; so
that the labels alone are a language model.

FastEmit (Yu et al., 2010.11148) hurries a streaming model: the gradient that flows into the label
arcs is multiplied by 1 + lambda, that into the blank arcs is not.  Here the value stays the plain
negative log-likelihood, which can be compared between models; the toolkits that multiply it by
1 + lambda have the same gradient.
"""

import jax
import jax.numpy as jnp

from bigssl_jax.objectives.transducer_joint import (
    HAT,
    RNNT,
    Factorisation,
    arcs_of_joint,
    arcs_of_logits,
    default_tile,
)
from bigssl_jax.objectives.transducer_lattice import lattice_loss

__all__ = ['fused_hat_loss', 'fused_rnnt_loss', 'hat_loss', 'rnnt_loss', 'transducer_valid']


def rnnt_loss(
    logits: jax.Array,
    labels: jax.Array,
    frame_counts: jax.Array,
    label_counts: jax.Array,
    blank_id: int = 0,
    *,
    fastemit: float = 0.0,
) -> jax.Array:
    """-log P(labels | logits) of an RNN-T, float32 [B]: the reference form.

    Args:
      logits: [B, T, U+1, V], any float dtype; may hold anything, NaN included, at padded nodes
        (t >= frame_counts or u > label_counts), whose gradient is 0.
      labels: int32 [B, U]; padding may hold anything.
      frame_counts, label_counts: int32 [B], at most T and U.
      blank_id: of the blank.
      fastemit: lambda of FastEmit, at least 0; acts on the gradient, not on the value.

    Returns:
      The losses; 0, with zero gradient, for rows without frames.

    Raises:
      ValueError: shapes that do not fit together, or a negative `fastemit`.
    """
    return _loss(RNNT, logits, labels, frame_counts, label_counts, blank_id, fastemit)


def hat_loss(
    logits: jax.Array,
    labels: jax.Array,
    frame_counts: jax.Array,
    label_counts: jax.Array,
    blank_id: int = 0,
    *,
    fastemit: float = 0.0,
) -> jax.Array:
    """As `rnnt_loss`, factorised as in HAT: the logit of `blank_id` is that of the sigmoid."""
    return _loss(HAT, logits, labels, frame_counts, label_counts, blank_id, fastemit)


def fused_rnnt_loss(
    encoded: jax.Array,
    predicted: jax.Array,
    output_kernel: jax.Array,
    output_bias: jax.Array,
    labels: jax.Array,
    frame_counts: jax.Array,
    label_counts: jax.Array,
    blank_id: int = 0,
    *,
    fastemit: float = 0.0,
    tile_frames: int | None = None,
) -> jax.Array:
    """`rnnt_loss` of the logits tanh(encoded + predicted) @ kernel + bias, which never exist whole.

    Args:
      encoded: [B, T, J], the encoder's frames projected; padding may hold anything.
      predicted: [B, U+1, J], the prediction network's outputs projected, position u after u labels;
        padding may hold anything.
      output_kernel: [J, V].  output_bias: [V].
      labels, frame_counts, label_counts, blank_id, fastemit: as in `rnnt_loss`.
      tile_frames: frames computed at a time (default: see `default_tile`).

    The products run in the dtype of `encoded` and add up in float32.  Inside
    `parallel.use_mesh` rows are spread over the devices and V over 'tensor'.

    Returns:
      float32 [B].

    Raises:
      ValueError: as `rnnt_loss`; or `tile_frames` below 1.
    """
    arguments = (encoded, predicted, output_kernel, output_bias)
    counts = (frame_counts, label_counts)
    return _fused_loss(RNNT, arguments, labels, counts, blank_id, fastemit, tile_frames)


def fused_hat_loss(
    encoded: jax.Array,
    predicted: jax.Array,
    output_kernel: jax.Array,
    output_bias: jax.Array,
    labels: jax.Array,
    frame_counts: jax.Array,
    label_counts: jax.Array,
    blank_id: int = 0,
    *,
    fastemit: float = 0.0,
    tile_frames: int | None = None,
) -> jax.Array:
    """As `fused_rnnt_loss`, factorised as in HAT."""
    arguments = (encoded, predicted, output_kernel, output_bias)
    counts = (frame_counts, label_counts)
    return _fused_loss(HAT, arguments, labels, counts, blank_id, fastemit, tile_frames)


def transducer_valid(
    labels: jax.Array,
    label_counts: jax.Array,
    frame_counts: jax.Array,
    vocabulary_size: int,
    blank_id: int,
) -> jax.Array:
    """Which rows a transducer can align: bool [B].

    There must be a frame, and every label must lie in [0, V) and differ from the blank.  More
    labels than frames are possible.

    Args:
      labels: int32 [B, U].  label_counts, frame_counts: int32 [B].
      vocabulary_size, blank_id: of the joint network.
    """
    real = jnp.arange(labels.shape[1]) < label_counts[:, None]
    known = (labels >= 0) & (labels < vocabulary_size) & (labels != blank_id)
    fits = (label_counts >= 0) & (label_counts <= labels.shape[1])
    return (frame_counts > 0) & fits & jnp.all(known | ~real, axis=1)


def _loss(
    factorisation: Factorisation,
    logits: jax.Array,
    labels: jax.Array,
    frame_counts: jax.Array,
    label_counts: jax.Array,
    blank_id: int,
    fastemit: float,
) -> jax.Array:
    rows, frames, columns, vocabulary = logits.shape
    _check(rows, columns, vocabulary, labels, frame_counts, label_counts, blank_id, fastemit)
    heard, said = _real(frames, columns, frame_counts, label_counts)
    logits = jnp.where((heard[:, :, None] & said[:, None])[..., None], logits, 0.0)
    following = _following(labels, label_counts)
    blank, label = arcs_of_logits(logits, following, blank_id, factorisation)
    return lattice_loss(blank, label, frame_counts, label_counts, fastemit)


def _fused_loss(
    factorisation: Factorisation,
    arguments: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    labels: jax.Array,
    counts: tuple[jax.Array, jax.Array],
    blank_id: int,
    fastemit: float,
    tile_frames: int | None,
) -> jax.Array:
    encoded, predicted, kernel, bias = arguments
    rows, frames, joint = encoded.shape
    columns, vocabulary = predicted.shape[1], kernel.shape[-1]
    wanted = ((rows, columns, joint), (joint, vocabulary), (vocabulary,))
    found = (predicted.shape, kernel.shape, bias.shape)
    if found != wanted:
        raise ValueError(f'predicted, kernel, bias have shapes {found}; wanted: {wanted}')
    _check(rows, columns, vocabulary, labels, *counts, blank_id, fastemit)
    tile = default_tile(rows, frames, columns, vocabulary) if tile_frames is None else tile_frames
    if tile < 1:
        raise ValueError(f'tile_frames is {tile}; allowed: 1 or more')
    heard, said = _real(frames, columns, *counts)
    encoded = jnp.where(heard[..., None], encoded, 0.0)
    predicted = jnp.where(said[..., None], predicted, 0.0)
    following = _following(labels, counts[1])
    blank, label = arcs_of_joint(
        encoded, predicted, kernel, bias, following, blank_id, factorisation, min(tile, frames)
    )
    return lattice_loss(blank, label, *counts, fastemit)


def _real(
    frames: int, columns: int, frame_counts: jax.Array, label_counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """bool [B, T] of real frames and [B, U+1] of positions after at most all real labels."""
    heard = jnp.arange(frames) < frame_counts[:, None]
    return heard, jnp.arange(columns) <= label_counts[:, None]


def _following(labels: jax.Array, label_counts: jax.Array) -> jax.Array:
    """int32 [B, U+1]: the label that comes next at each u, 0 where there is none."""
    real = jnp.arange(labels.shape[1]) < label_counts[:, None]
    return jnp.pad(jnp.where(real, labels, 0), ((0, 0), (0, 1)))


def _check(
    rows: int,
    columns: int,
    vocabulary: int,
    labels: jax.Array,
    frame_counts: jax.Array,
    label_counts: jax.Array,
    blank_id: int,
    fastemit: float,
) -> None:
    found = (labels.shape, frame_counts.shape, label_counts.shape)
    wanted = ((rows, columns - 1), (rows,), (rows,))
    if found != wanted:
        raise ValueError(
            f'labels, frame_counts, label_counts have shapes {found}; wanted: {wanted}'
        )
    if not 0 <= blank_id < vocabulary:
        raise ValueError(f'blank_id is {blank_id}; allowed: 0 to {vocabulary - 1}')
    if not fastemit >= 0.0:
        raise ValueError(f'fastemit is {fastemit}; allowed: 0 or more')
