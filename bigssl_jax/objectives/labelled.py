"""What the objectives over transcripts share: hearing a batch, counting its rows, reporting them.

A row is *present* when it holds audio (others are fillers) and *possible* when its labels can be
aligned to its frames.  A present row that is not possible weighs nothing and is counted as
'invalid'.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigssl_jax.audio import row_keys
from bigssl_jax.models.layers import row_dropout
from bigssl_jax.objectives.encoder_call import Batch, EncoderCall, dropout_key, named_key

NORMALISATIONS = ('label', 'utterance')


def check_fields(
    name: str, normalise: str, blank_id: int, vocabulary_size: int, dropout: float
) -> None:
    """Raises ValueError for a field of the objective `name` that is out of its range."""
    if normalise not in NORMALISATIONS:
        raise ValueError(f"{name}.normalise is {normalise!r}; allowed: 'label', 'utterance'")
    if not 0 <= blank_id < vocabulary_size:
        raise ValueError(f'{name}.blank_id is {blank_id}; allowed: 0 to {vocabulary_size - 1}')
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f'{name}.dropout is {dropout}; allowed: 0 to below 1')


def heard(
    encode: EncoderCall, batch: Batch, key: jax.Array, name: str, dropout: float
) -> tuple[jax.Array, jax.Array]:
    """Frames [B, T4, D] and mask [B, T4] of an augmented batch, with `dropout` on the frames.

    Args:
      encode: the encoder.
      batch: a Batch.
      key: of the step.
      name: of the objective, which names its dropout.
      dropout: rate.
    """
    features, real = encode.features(batch)
    rows = batch['rows']
    features = encode.augment(features, real, row_keys(named_key(key, 'spec_augment'), rows))
    frames, mask = encode.encode(features, real, dropout_key(key, batch))
    if dropout and not encode.deterministic:
        frames = row_dropout(frames, row_keys(named_key(key, f'{name}_dropout'), rows), dropout)
    return frames, mask


def heard_plainly(encode: EncoderCall, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Frames [B, T4, D] and mask [B, T4] for decoding: no augmentation, no dropout."""
    encode = dataclasses.replace(encode, deterministic=True)
    features, real = encode.features(batch)
    return encode.encode(features, real, jax.random.key(0))


def labelled_totals(
    losses: jax.Array, possible: jax.Array, mask: jax.Array, batch: Batch, normalise: str
) -> dict[str, jax.Array]:
    """Additive totals of one labelled batch.

    Args:
      losses: float32 [B], -log P(labels | audio), 0 where a row is not present or not possible.
      possible: bool [B].
      mask: bool [B, T], of the encoder's frames.
      batch: a labelled Batch.
      normalise: 'label' or 'utterance'.

    Returns:
      loss: float32, sum over valid utterances.
      weight: float32, valid labels or valid utterances.
      utterances, invalid: int32, real rows and those of them that are not possible.
      frames, labels: int32, of the valid utterances.
    """
    counts, present = batch['label_counts'], batch['sample_counts'] > 0
    valid = present & possible
    num_labels = jnp.sum(jnp.where(valid, counts, 0), dtype=jnp.int32)
    num_valid = jnp.sum(valid, dtype=jnp.int32)
    weight = num_labels if normalise == 'label' else num_valid
    return {
        'loss': jnp.sum(losses),
        'weight': weight.astype(jnp.float32),
        'utterances': jnp.sum(present, dtype=jnp.int32),
        'invalid': jnp.sum(present & ~possible, dtype=jnp.int32),
        'frames': jnp.sum(mask & valid[:, None], dtype=jnp.int32),
        'labels': num_labels,
    }


def labelled_health(
    summary: Mapping[str, float], name: str, max_invalid: float, fault: str, cure: str
) -> str | None:
    """Advice when many utterances cannot be aligned, else None.

    Args:
      summary: from `labelled_summary`.
      name: of the objective.
      max_invalid: the largest share of the utterances that may be invalid.
      fault, cure: what such utterances have, and what to do.
    """
    share = summary['invalid_fraction']
    if share <= max_invalid:
        return None
    return (
        f'{share:.0%} of the utterances have {fault} (allowed: {name}.max_invalid={max_invalid});'
        f' {cure}'
    )


def labelled_summary(totals: Mapping[str, Any]) -> dict[str, float]:
    """loss (per weight), loss_per_label, loss_per_utterance, loss_per_frame, and invalid,
    invalid_fraction, frames_per_label, of `labelled_totals`."""
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
