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

from bigssl_jax.audio import row_keys
from bigssl_jax.objectives.encoder_call import Batch, EncoderCall, dropout_key, named_key

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
        if self.normalise not in ('label', 'utterance'):
            raise ValueError(f"ctc.normalise is {self.normalise!r}; allowed: 'label', 'utterance'")
        if not 0 <= self.blank_id < self.vocabulary_size:
            raise ValueError(
                f'ctc.blank_id is {self.blank_id}; allowed: 0 to {self.vocabulary_size - 1}'
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'ctc.dropout is {self.dropout}; allowed: 0 to below 1')

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
        encode = dataclasses.replace(encode, deterministic=True)
        features, real = encode.features(batch)
        frames, mask = encode.encode(features, real, jax.random.key(0))
        return self.logits(params, frames), mask

    def totals(
        self,
        encode: EncoderCall,
        params: Mapping[str, jax.Array],
        constants: Mapping[str, jax.Array],
        batch: Batch,
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        """Additive totals of one labelled batch.

        Returns:
          loss: float32, sum of -log P(labels | audio) over valid utterances.
          weight: float32, valid labels or valid utterances (field `normalise`).
          utterances, invalid: int32, real rows and those of them that CTC cannot align.
          frames, labels: int32, of the valid utterances.
        """
        del constants
        features, real = encode.features(batch)
        rows = batch['rows']
        features = encode.augment(features, real, row_keys(named_key(key, 'spec_augment'), rows))
        frames, mask = encode.encode(features, real, dropout_key(key, batch))
        if self.dropout and not encode.deterministic:
            frames = _dropout(frames, row_keys(named_key(key, 'ctc_dropout'), rows), self.dropout)
        logits = self.logits(params, frames)
        labels, counts = batch['labels'], batch['label_counts']
        present = batch['sample_counts'] > 0
        possible = ctc_valid(labels, counts, mask, self.vocabulary_size, self.blank_id)
        valid = present & possible
        losses = ctc_loss(logits, mask, labels, counts, valid, self.blank_id)
        num_labels = jnp.sum(jnp.where(valid, counts, 0), dtype=jnp.int32)
        num_valid = jnp.sum(valid, dtype=jnp.int32)
        weight = num_labels if self.normalise == 'label' else num_valid
        return {
            'loss': jnp.sum(losses),
            'weight': weight.astype(jnp.float32),
            'utterances': jnp.sum(present, dtype=jnp.int32),
            'invalid': jnp.sum(present & ~possible, dtype=jnp.int32),
            'frames': jnp.sum(mask & valid[:, None], dtype=jnp.int32),
            'labels': num_labels,
        }

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """loss (per `normalise`), loss_per_label, loss_per_utterance, loss_per_frame, and
        invalid_fraction, frames_per_label."""
        loss = float(totals['loss'])
        utterances, invalid = int(totals['utterances']), int(totals['invalid'])
        labels, frames = max(int(totals['labels']), 1), int(totals['frames'])
        return {
            'loss': loss / max(float(totals['weight']), 1.0),
            'loss_per_label': loss / labels,
            'loss_per_utterance': loss / max(utterances - invalid, 1),
            'loss_per_frame': loss / max(frames, 1),
            'invalid': float(invalid),
            'invalid_fraction': invalid / max(utterances, 1),
            'frames_per_label': frames / labels,
        }

    def health(self, summary: Mapping[str, float], step: int) -> str | None:
        """Advice when many utterances cannot be aligned, else None."""
        if summary['invalid_fraction'] > self.max_invalid:
            return (
                f'{summary["invalid_fraction"]:.0%} of the utterances have more labels than '
                f'frames or labels outside the vocabulary of {self.vocabulary_size} (allowed: '
                f'ctc.max_invalid={self.max_invalid}); use a tokenizer with longer pieces, or '
                'check that transcripts and tokenizer belong to this audio'
            )
        return None


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


def _dropout(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Dropout of [B, T, D] with one key per row [B]."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
