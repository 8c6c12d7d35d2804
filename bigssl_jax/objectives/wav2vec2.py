"""wav2vec 2.0 on a log-mel Conformer with linear targets: the pre-training of BigSSL.

    features --subsample--> e [B, T4, D] --linear--> q    targets, from the un-masked e
                            |
                            +--spans replaced by one learned vector--> context --linear--> c
    contrastive loss between c_t and q_t at masked t (contrastive.py)

There is no quantizer.  The mask is drawn *after* subsampling: a start probability of 0.065 per
40-ms frame and spans of 400 ms mask about 1 - 0.935^10 = 49 % of the frames.

By default the gradient flows through the targets too, as it does into wav2vec 2.0's quantizer; with
`stop_target_gradient` only c learns.  An utterance with fewer than two masked frames has no
negative and weighs nothing.

Collapse is judged by the variance of the unit-length targets within an utterance: 0.45 on real
speech at the start, towards 0 when the targets become one constant vector.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigssl_jax.audio import row_keys
from bigssl_jax.models import SUBSAMPLING
from bigssl_jax.objectives.contrastive import contrastive_loss, draw_negatives, spread
from bigssl_jax.objectives.encoder_call import (
    Batch,
    EncoderCall,
    dropout_key,
    named_key,
    span_mask,
)


@dataclasses.dataclass(frozen=True)
class Wav2Vec2:
    """The objective; fields are config fields.

    Attributes:
      target_dim: P, dimension of targets and projected contexts.
      num_negatives: K, other masked frames of the same utterance per masked frame.
      temperature: k.
      mask_start_probability: that a 40-ms frame starts a masked span.
      mask_span_ms: length of a span.
      stop_target_gradient: True lets no gradient through the targets.
      min_target_variance: `health` complains below this variance of the unit-length targets within
        an utterance (0: all equal, 1: no common direction).
    """

    target_dim: int = 256
    num_negatives: int = 100
    temperature: float = 0.1
    mask_start_probability: float = 0.065
    mask_span_ms: float = 400.0
    stop_target_gradient: bool = False
    min_target_variance: float = 0.02
    name: str = 'wav2vec2'

    def __post_init__(self) -> None:
        for field in ('target_dim', 'num_negatives'):
            if getattr(self, field) < 1:
                raise ValueError(f'wav2vec2.{field} is {getattr(self, field)}; it must be >= 1')
        for field in ('temperature', 'mask_span_ms'):
            if getattr(self, field) <= 0:
                raise ValueError(f'wav2vec2.{field} is {getattr(self, field)}; it must be above 0')
        if not 0.0 < self.mask_start_probability < 1.0:
            raise ValueError(
                f'wav2vec2.mask_start_probability is {self.mask_start_probability}; allowed: above '
                '0, below 1 (a probability per 40-ms frame, for example 0.065)'
            )

    def init_params(self, key: jax.Array, encoder_config: Any) -> dict[str, Any]:
        """Boxed head, float32: target and context kernels [D, P] with biases [P] (LeCun normal),
        mask_embedding [D] (N(0, 0.1))."""
        dim = encoder_config.model_dim

        def kernel(purpose: str) -> nn.LogicallyPartitioned:
            shape = (dim, self.target_dim)
            value = jax.random.normal(named_key(key, purpose), shape, jnp.float32) * dim**-0.5
            return nn.LogicallyPartitioned(value, ('embed', None))

        def bias() -> nn.LogicallyPartitioned:
            return nn.LogicallyPartitioned(jnp.zeros((self.target_dim,), jnp.float32), (None,))

        embedding = 0.1 * jax.random.normal(named_key(key, 'mask_embedding'), (dim,), jnp.float32)
        return {
            'target_kernel': kernel('target_kernel'),
            'target_bias': bias(),
            'context_kernel': kernel('context_kernel'),
            'context_bias': bias(),
            'mask_embedding': nn.LogicallyPartitioned(embedding, ('embed',)),
        }

    def init_constants(self, key: jax.Array) -> dict[str, jax.Array]:
        """{}: nothing but the parameters decides the loss."""
        del key
        return {}

    def totals(
        self,
        encode: EncoderCall,
        params: Mapping[str, jax.Array],
        constants: Mapping[str, jax.Array],
        batch: Batch,
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        """Additive totals of one batch.

        Returns:
          loss: float32, summed over scored frames.
          weight: float32, scored frames (masked, real, of utterances with at least two).
          correct: int32, frames nearer to their own target than to every negative.
          scored, masked, frames: int32; `masked` counts utterances without negatives too.
          target_spread, context_spread: float32, see `contrastive.spread`.
        """
        del constants
        features, real = encode.features(batch)
        e, mask = encode.subsample(features, real)
        hop_ms = SUBSAMPLING * encode.audio.hop_ms
        span = max(1, round(self.mask_span_ms / hop_ms))
        rows = batch['rows']
        masked = span_mask(
            row_keys(named_key(key, 'mask'), rows), mask, self.mask_start_probability, span
        )
        hidden = jnp.where(masked[..., None], params['mask_embedding'].astype(e.dtype), e)
        frames = encode.context(hidden, mask, dropout_key(key, batch))
        contexts = _linear(frames, params['context_kernel'], params['context_bias'], encode.dtype)
        targets = _linear(e, params['target_kernel'], params['target_bias'], encode.dtype)
        if self.stop_target_gradient:
            targets = jax.lax.stop_gradient(targets)
        scored = masked & (jnp.sum(masked, axis=1, keepdims=True) >= 2)
        keys = row_keys(named_key(key, 'negatives'), rows)
        negatives = draw_negatives(keys, scored, self.num_negatives)
        loss, correct = contrastive_loss(contexts, targets, negatives, scored, self.temperature)
        return {
            'loss': jnp.sum(loss),
            'weight': jnp.sum(scored, dtype=jnp.float32),
            'correct': jnp.sum(correct, dtype=jnp.int32),
            'scored': jnp.sum(scored, dtype=jnp.int32),
            'masked': jnp.sum(masked, dtype=jnp.int32),
            'frames': jnp.sum(mask, dtype=jnp.int32),
            'target_spread': spread(targets, scored),
            'context_spread': spread(contexts, scored),
        }

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """loss (nats per scored frame), contrastive_accuracy against chance = 1 / (K + 1),
        masked_fraction, masked_frames, and target_variance, context_variance within utterances."""
        scored = max(int(totals['scored']), 1)
        return {
            'loss': float(totals['loss']) / max(float(totals['weight']), 1.0),
            'contrastive_accuracy': int(totals['correct']) / scored,
            'chance': 1.0 / (self.num_negatives + 1),
            'masked_fraction': int(totals['masked']) / max(int(totals['frames']), 1),
            'masked_frames': float(totals['scored']),
            'target_variance': float(totals['target_spread']) / scored,
            'context_variance': float(totals['context_spread']) / scored,
        }

    def health(self, summary: Mapping[str, float], step: int) -> str | None:
        """Advice when the targets have collapsed or nothing is masked, else None."""
        if summary['masked_frames'] == 0:
            return (
                'no frame was masked: raise wav2vec2.mask_start_probability '
                f'({self.mask_start_probability}) or check that the batches hold audio'
            )
        if summary['target_variance'] < self.min_target_variance:
            return (
                f'the targets have collapsed: their variance within utterances is '
                f'{summary["target_variance"]:.2g}, below wav2vec2.min_target_variance='
                f'{self.min_target_variance}; check the feature statistics, lower the peak '
                'learning rate, or try stop_target_gradient=True'
            )
        return None


def _linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: Any) -> jax.Array:
    """x @ kernel + bias with the product in `dtype`, the result in float32."""
    product = jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    return product + bias
