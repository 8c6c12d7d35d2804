"""EncoderCall: everything an objective needs to get from a Batch to encoder frames.

    batch['audio'] --log_mel--> --normalise--> features [B, T, F], mask [B, T]
    features --augment--> --subsample--> e [B, T4, D] --context--> frames [B, T4, D]
                            \\___________ encode ____________/

An objective chooses where it interferes: BEST-RQ replaces spans of the features, wav2vec 2.0 spans
of e, CTC only augments.  Objectives see no mesh, file or optimizer.

Random numbers are named: `named_key(key, 'mask')` is the key of one purpose; per-row purposes
fold in the row's number in the global batch (`row_keys`), so that an utterance meets the same mask,
noise and SpecAugment whatever its batch mates, the micro-batches, the hosts or the padded length.
(The last holds because JAX's partitionable threefry gives element i of a vector the same bits at
every length.)  Dropout alone takes one key for the whole (micro-)batch.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigssl_jax.audio import (
    AudioConfig,
    SpecAugmentConfig,
    frame_mask,
    log_mel,
    normalise,
    spec_augment,
)

Batch = Mapping[str, jax.Array]


def named_key(key: jax.Array, purpose: str) -> jax.Array:
    """The key for one purpose: fold_in(key, crc32(purpose))."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


@dataclasses.dataclass(frozen=True)
class EncoderCall:
    """A Conformer bound to parameters, feature statistics and a front end.

    Attributes:
      encoder: `bigssl_jax.models.Encoder`.
      params: its parameters, unboxed.
      constants: {'feature_mean': float32 [F], 'feature_std': float32 [F]} of the training set.
      audio: the front end.
      spec_augment: SpecAugment settings, or None for none.
      deterministic: True switches dropout and SpecAugment off.
    """

    encoder: nn.Module
    params: Any
    constants: Mapping[str, Any]
    audio: AudioConfig
    spec_augment: SpecAugmentConfig | None = None
    deterministic: bool = False

    @property
    def dtype(self) -> Any:
        """The compute dtype, for the products of the heads (frames arrive as float32)."""
        return jnp.dtype(self.encoder.config.dtype)

    def features(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Normalised log-mel float32 [B, T, F] (padding 0) and mask bool [B, T] of a Batch."""
        features, counts = log_mel(batch['audio'], batch['sample_counts'], self.audio)
        mask = frame_mask(counts, features.shape[1])
        mean, std = self.constants['feature_mean'], self.constants['feature_std']
        return normalise(features, mask, mean, std), mask

    def augment(self, features: jax.Array, mask: jax.Array, keys: jax.Array) -> jax.Array:
        """SpecAugment with one key per row [B]; the identity when deterministic or not wanted."""
        if self.deterministic or self.spec_augment is None:
            return features
        return spec_augment(features, mask, keys, self.spec_augment)

    def encode(
        self, features: jax.Array, mask: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Features [B, T, F] -> frames [B, T4, D], mask [B, T4]; `key` is for dropout."""
        return self._apply(key, features, mask, method=None)

    def subsample(self, features: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features [B, T, F] -> e [B, T4, D], mask [B, T4]: the front of `encode`."""
        return self.encoder.apply({'params': self.params}, features, mask, method='subsample')

    def context(self, e: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
        """e [B, T4, D] -> frames [B, T4, D]: the Conformer blocks; `key` is for dropout."""
        return self._apply(key, e, mask, method='context')

    def layer_means(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        """Features -> float32 [B, L + 1, D]: means over frames of e and of every block's frames."""
        means, _ = self.encoder.apply(
            {'params': self.params}, features, mask, method='layer_means', mutable='layers'
        )
        return means

    def _apply(self, key: jax.Array, x: jax.Array, mask: jax.Array, method: str | None) -> Any:
        rngs = {} if self.deterministic else {'dropout': key}
        return self.encoder.apply(
            {'params': self.params}, x, mask, self.deterministic, rngs=rngs, method=method
        )


def dropout_key(key: jax.Array, batch: Batch) -> jax.Array:
    """The encoder's dropout key for this (micro-)batch: differs between pieces of one batch."""
    return jax.random.fold_in(named_key(key, 'dropout'), batch['rows'][0])


def span_mask(keys: jax.Array, real: jax.Array, probability: float, span: int) -> jax.Array:
    """Every real frame starts a masked span of `span` frames with `probability`.

    Args:
      keys: [B], one per row.
      real: bool [B, T].
      probability: of a start, per frame; away from the utterance's beginning the masked share is
        1 - (1 - probability)^span.
      span: frames, at least 1.

    Returns:
      bool [B, T]: frame t is masked when one of t - span + 1 .. t is a start; never padding.
    """
    size = real.shape[1]
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, probability, (size,)))
    starts = jnp.cumsum(draw(keys) & real, axis=1, dtype=jnp.int32)
    before = jnp.pad(starts, ((0, 0), (min(span, size), 0)))[:, :size]
    return (starts > before) & real
