"""CTC (Graves et al. 2006): a linear softmax on encoder frames, summed over all alignments.

A pair is possible only if it has a frame per label and one more between equal neighbours:

    frames >= labels + repeats

An impossible pair has probability 0.  A loss computed in log space with a finite "minus infinity"
answers with a huge number *and a gradient*, so such rows are taken out before the loss, weigh
nothing, and are counted as 'invalid'.  So are rows with a label that is the blank or not in the
vocabulary.  An utterance without labels is possible: all its frames are blank.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bigssl_jax.objectives.encoder_call import Batch, EncoderCall
from bigssl_jax.objectives.labelled import (
    check_fields,
    heard,
    heard_plainly,
    labelled_health,
    labelled_summary,
    labelled_totals,
)

__all__ = ['CTC', 'ctc_loss', 'ctc_valid']


@dataclasses.dataclass(frozen=True)
class CTC:
    """The objective; fields are config fields.

    Attributes:
      vocabulary_size: V, blank included.
      blank_id: also the padding id of the tokenizer.
      normalise: the loss is per 'label' or per 'utterance'.
      dropout: on the frames before the head.
      max_invalid: `health` complains when a larger share of the utterances is invalid.
    """

    vocabulary_size: int
    blank_id: int = 0
    normalise: str = 'label'
    dropout: float = 0.0
    max_invalid: float = 0.2
    name: str = 'ctc'

    def __post_init__(self) -> None:
        check_fields('ctc', self.normalise, self.blank_id, self.vocabulary_size, self.dropout)

    def init_params(self, key: jax.Array, encoder_config: Any) -> dict[str, Any]:
        """Boxed head: kernel [D, V] (LeCun normal) and bias [V], float32."""
        dim = encoder_config.model_dim
        kernel = jax.random.normal(key, (dim, self.vocabulary_size), jnp.float32) * dim**-0.5
        bias = jnp.zeros((self.vocabulary_size,), jnp.float32)
        return {
            'kernel': nn.LogicallyPartitioned(kernel, ('embed', 'vocab')),
            'bias': nn.LogicallyPartitioned(bias, ('vocab',)),
        }

    def init_constants(self, key: jax.Array) -> dict[str, jax.Array]:
        """{}: nothing but the parameters decides the loss."""
        del key
        return {}

    def logits(self, params: Mapping[str, jax.Array], frames: jax.Array) -> jax.Array:
        """Frames [B, T, D] -> float32 [B, T, V]; the product runs in the frames' dtype."""
        kernel = params['kernel'].astype(frames.dtype)
        return params['bias'] + jnp.matmul(frames, kernel, preferred_element_type=jnp.float32)

    def predict(
        self, encode: EncoderCall, params: Mapping[str, jax.Array], batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """For decoding: (logits float32 [B, T4, V], mask [B, T4]), without augmentation."""
        frames, mask = heard_plainly(encode, batch)
        return self.logits(params, frames), mask

    def losses(
        self, params: Mapping[str, jax.Array], frames: jax.Array, mask: jax.Array, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Of frames [B, T, D]: (losses float32 [B], 0 where there is none; possible bool [B])."""
        labels, counts = batch['labels'], batch['label_counts']
        possible = ctc_valid(labels, counts, mask, self.vocabulary_size, self.blank_id)
        valid = possible & (batch['sample_counts'] > 0)
        logits = self.logits(params, frames)
        return ctc_loss(logits, mask, labels, counts, valid, self.blank_id), possible

    def totals(
        self,
        encode: EncoderCall,
        params: Mapping[str, jax.Array],
        constants: Mapping[str, jax.Array],
        batch: Batch,
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        """`labelled_totals` of one labelled batch; invalid are rows that CTC cannot align."""
        del constants
        frames, mask = heard(encode, batch, key, 'ctc', self.dropout)
        losses, possible = self.losses(params, frames, mask, batch)
        return labelled_totals(losses, possible, mask, batch, self.normalise)

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """See `labelled_summary`."""
        return labelled_summary(totals)

    def health(self, summary: Mapping[str, float], step: int) -> str | None:
        """Advice when many utterances cannot be aligned, else None."""
        return labelled_health(
            summary,
            'ctc',
            self.max_invalid,
            f'more labels than frames or labels outside the vocabulary of {self.vocabulary_size}',
            'use a tokenizer with longer pieces, or check that transcripts and tokenizer belong to'
            ' this audio',
        )


def ctc_valid(
    labels: jax.Array, label_counts: jax.Array, mask: jax.Array, vocabulary_size: int, blank_id: int
) -> jax.Array:
    """Which rows CTC can align: bool [B].

    Args:
      labels: int32 [B, U].  label_counts: int32 [B].  mask: bool [B, T].
      vocabulary_size, blank_id: labels must lie in [0, V) and differ from the blank.
    """
    real = jnp.arange(labels.shape[1]) < label_counts[:, None]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & real[:, 1:], axis=1)
    known = (labels >= 0) & (labels < vocabulary_size) & (labels != blank_id)
    enough = jnp.sum(mask, axis=1) >= label_counts + repeats
    return enough & jnp.all(known | ~real, axis=1) & (label_counts <= labels.shape[1])


def ctc_loss(
    logits: jax.Array,
    mask: jax.Array,
    labels: jax.Array,
    label_counts: jax.Array,
    valid: jax.Array,
    blank_id: int = 0,
) -> jax.Array:
    """-log P(labels | logits), float32 [B]; exactly 0, with zero gradient, where not `valid`.

    Args:
      logits: float32 [B, T, V]; padded frames and invalid rows may hold anything, NaN included.
      mask: bool [B, T].  labels: int32 [B, U].  label_counts: int32 [B].
      valid: bool [B], from `ctc_valid`.
      blank_id: of the blank.
    """
    used = mask & valid[:, None]
    logits = jnp.where(used[..., None], logits.astype(jnp.float32), 0.0)
    real = (jnp.arange(labels.shape[1]) < label_counts[:, None]) & valid[:, None]
    losses = optax.ctc_loss(
        logits,
        1.0 - used.astype(jnp.float32),
        jnp.where(real, labels, 0),
        1.0 - real.astype(jnp.float32),
        blank_id=blank_id,
    )
    return jnp.where(valid, losses, 0.0)
