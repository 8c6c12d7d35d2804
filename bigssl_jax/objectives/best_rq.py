"""BEST-RQ: predict the random-projection codes of masked speech (arXiv 2202.01855).

    features x ----stack 4, quantize (un-masked)----> codes y [B, T4, N]
        |                                                |
        +--spans replaced by N(0, 0.1)--> encoder --> softmax n: cross-entropy at masked frames

A subsampled frame counts as masked when any of its 4 stacked frames is.  Only frames whose 4
stacked frames are all real are scored: a code never reads padding, and the last, partly padded
frame of an utterance has none.  Several codebooks (arXiv 2303.01037) have one softmax each; the
loss is the mean of their cross-entropies.

Mask rate: starts are drawn at the *input*, per 10-ms frame: 0.01 with 400 ms masks 33 % of it.  The
same probability drawn after subsampling would mask 9.6 %.

Collapse of the targets is judged by their entropy relative to the most there could be.  On real
speech this share is 0.65 to 0.7 for 256 to 8192 codes with normalised features, and below 0.2 with
raw log-mel (perplexity 3 of 8192).  The perplexity itself hardly grows with the codebook.

Collapse of the predictions (one code, whatever the audio) looks like every healthy beginning: a
model learns how frequent the codes are long before it hears them.  The quickstart's predictions had
a perplexity of 13 after 20 steps, 1.5 after 60, 2 after 120, 14 after 500, and their accuracy rose
above that of the most frequent code at step 140.  So only time tells the two apart, and the alarm
keeps silent for `collapse_after_steps`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bigssl_jax.audio import row_keys
from bigssl_jax.objectives.encoder_call import (
    Batch,
    EncoderCall,
    dropout_key,
    named_key,
    span_mask,
)
from bigssl_jax.objectives.quantizer import (
    STACK,
    argmax,
    init_codebooks,
    init_projection,
    quantize,
    stack_frames,
    stack_mask,
)

__all__ = ['BestRQ', 'mask_features', 'masked_cross_entropy', 'quantize']


@dataclasses.dataclass(frozen=True)
class BestRQ:
    """The objective; fields are config fields.

    Attributes:
      num_codebooks: N, independent codebooks with a softmax each.
      codebook_size: V, codes per codebook.
      code_dim: E, dimension in which codes are compared.
      mask_start_probability: that a 10-ms input frame starts a masked span.
      mask_span_ms: length of a span.
      noise_std: masked input is replaced by N(0, noise_std).
      num_mels: dimension of the features.
      min_entropy_share: `health` complains when the codes' entropy falls below this share of
        ln(codebook size) (or of ln(scored frames), when those are fewer).
      collapse_after_steps: from this step on `health` judges the predictions too.  Leave room for
        the learning rate to warm up: long spans and many codes teach nothing for long.
      min_predicted_perplexity: `health` then complains when the perplexity of the predictions is
        below this (1 is always the same code), or their accuracy is not above chance.
    """

    num_codebooks: int = 1
    codebook_size: int = 8192
    code_dim: int = 16
    mask_start_probability: float = 0.01
    mask_span_ms: float = 400.0
    noise_std: float = 0.1
    num_mels: int = 80
    min_entropy_share: float = 0.3
    collapse_after_steps: int = 5000
    min_predicted_perplexity: float = 1.5
    name: str = 'best_rq'

    def __post_init__(self) -> None:
        for field in ('num_codebooks', 'codebook_size', 'code_dim', 'num_mels'):
            if getattr(self, field) < 1:
                raise ValueError(f'best_rq.{field} is {getattr(self, field)}; it must be >= 1')
        if not 0.0 < self.mask_start_probability < 1.0:
            raise ValueError(
                f'best_rq.mask_start_probability is {self.mask_start_probability}; allowed: above '
                '0, below 1 (a probability per input frame, for example 0.01)'
            )
        if self.mask_span_ms <= 0:
            raise ValueError(f'best_rq.mask_span_ms is {self.mask_span_ms}; it must be above 0')
        if self.collapse_after_steps < 0:
            raise ValueError(
                f'best_rq.collapse_after_steps is {self.collapse_after_steps}; it must be >= 0'
            )
        if not 1.0 <= self.min_predicted_perplexity <= self.codebook_size:
            raise ValueError(
                f'best_rq.min_predicted_perplexity is {self.min_predicted_perplexity}; allowed: 1'
                f' to the codebook_size, {self.codebook_size}'
            )

    def init_params(self, key: jax.Array, encoder_config: Any) -> dict[str, Any]:
        """Boxed head: kernel [N, D, V] (LeCun normal) and bias [N, V], float32."""
        dim = encoder_config.model_dim
        shape = (self.num_codebooks, dim, self.codebook_size)
        kernel = jax.random.normal(key, shape, jnp.float32) * dim**-0.5
        bias = jnp.zeros((self.num_codebooks, self.codebook_size), jnp.float32)
        return {
            'kernel': nn.LogicallyPartitioned(kernel, (None, 'embed', 'vocab')),
            'bias': nn.LogicallyPartitioned(bias, (None, 'vocab')),
        }

    def init_constants(self, key: jax.Array) -> dict[str, jax.Array]:
        """{'projection': [N, STACK x mels, E], 'codebooks': [N, V, E]}, float32, never trained."""
        dims = STACK * self.num_mels
        return {
            'projection': init_projection(
                named_key(key, 'projection'), self.num_codebooks, dims, self.code_dim
            ),
            'codebooks': init_codebooks(
                named_key(key, 'codebooks'), self.num_codebooks, self.codebook_size, self.code_dim
            ),
        }

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
          loss: float32, sum over scored frames of the cross-entropy, averaged over codebooks.
          weight: float32, scored frames (masked, not padding).
          correct: int32, right predictions, summed over codebooks.
          masked, frames: int32, scored frames and all frames that could have been.
          code_counts, predicted_counts: int32 [N, V] over the scored frames.
        """
        features, real = encode.features(batch)
        stacked_real = stack_mask(real)[1]
        codes = quantize(stack_frames(features), constants['projection'], constants['codebooks'])
        span = max(1, round(self.mask_span_ms / encode.audio.hop_ms))
        masked_input, masked = mask_features(
            features,
            real,
            row_keys(named_key(key, 'mask'), batch['rows']),
            self.mask_start_probability,
            span,
            self.noise_std,
        )
        frames, frame_mask = encode.encode(masked_input, real, dropout_key(key, batch))
        scored = stack_mask(masked)[0] & stacked_real & frame_mask
        loss, predicted = masked_cross_entropy(
            frames.astype(encode.dtype), params['kernel'], params['bias'], codes, scored
        )
        return {
            'loss': loss,
            'weight': jnp.sum(scored, dtype=jnp.float32),
            'correct': jnp.sum((predicted == codes) & scored[..., None], dtype=jnp.int32),
            'masked': jnp.sum(scored, dtype=jnp.int32),
            'frames': jnp.sum(stacked_real & frame_mask, dtype=jnp.int32),
            'code_counts': _counts(codes, scored, self.codebook_size),
            'predicted_counts': _counts(predicted, scored, self.codebook_size),
        }

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Readable metrics of (summed) totals.

        loss: nats per scored frame.  masked_accuracy: against `chance`, the share of the most
        frequent code.  masked_fraction: of the frames.  code_perplexity: exp(entropy) of the
        targets, and predicted_perplexity of the predictions (1 at the start and when collapsed).
        codes_used: share of the codebook among the targets.  All are means over codebooks;
        code_entropy_share: of the worst codebook, as `health` judges it.
        """
        masked = max(int(totals['masked']), 1)
        counts = np.asarray(totals['code_counts'], np.float64)
        perplexities = _perplexity(counts)
        return {
            'loss': float(totals['loss']) / max(float(totals['weight']), 1.0),
            'masked_accuracy': int(totals['correct']) / (masked * self.num_codebooks),
            'chance': float(np.mean(counts.max(axis=-1))) / masked,
            'masked_fraction': int(totals['masked']) / max(int(totals['frames']), 1),
            'masked_frames': float(totals['masked']),
            'code_perplexity': float(np.mean(perplexities)),
            'predicted_perplexity': float(np.mean(_perplexity(totals['predicted_counts']))),
            'codes_used': float(np.mean(counts > 0)),
            'code_entropy_share': float(np.log(np.min(perplexities)))
            / math.log(max(min(self.codebook_size, masked), 2)),
        }

    def health(self, summary: Mapping[str, float], step: int) -> str | None:
        """Advice when targets or predictions have collapsed or nothing is masked, else None."""
        if summary['masked_frames'] == 0:
            return (
                'no frame was masked: raise best_rq.mask_start_probability '
                f'({self.mask_start_probability}) or check that the batches hold audio'
            )
        if (
            summary['masked_frames'] >= 200
            and summary['code_entropy_share'] < self.min_entropy_share
        ):
            return (
                f'the codes have collapsed: perplexity {summary["code_perplexity"]:.1f} of '
                f'{self.codebook_size} codes, {summary["code_entropy_share"]:.2f} of the largest '
                f'entropy (best_rq.min_entropy_share={self.min_entropy_share}); check that '
                'feature_mean and feature_std are those of this corpus, per dimension, and that '
                'the audio is not silence'
            )
        # Fewer frames than these would make chance, a share of the most frequent, look too good.
        if summary['masked_frames'] >= 1000 and step >= self.collapse_after_steps:
            return self._prediction_advice(summary)
        return None

    def _prediction_advice(self, summary: Mapping[str, float]) -> str | None:
        """Advice when (nearly) one code is predicted for everything, else None."""
        accuracy, chance = summary['masked_accuracy'], summary['chance']
        perplexity = summary['predicted_perplexity']
        if accuracy > chance and perplexity >= self.min_predicted_perplexity:
            return None
        return (
            f'the predictions have collapsed: their perplexity is {perplexity:.2f} (least allowed: '
            f'best_rq.min_predicted_perplexity={self.min_predicted_perplexity}), their accuracy '
            f'{accuracy:.1%}, and always naming the most frequent code would reach {chance:.1%}; '
            'lower the peak learning rate or lengthen its warm-up, shorten best_rq.mask_span_ms, '
            'or, where learning is only slow, raise best_rq.collapse_after_steps '
            f'({self.collapse_after_steps})'
        )


def mask_features(
    features: jax.Array,
    real: jax.Array,
    keys: jax.Array,
    probability: float,
    span: int,
    noise_std: float,
) -> tuple[jax.Array, jax.Array]:
    """Replaces random spans of features [B, T, F] by N(0, noise_std), one key per row [B].

    Returns:
      (features with noise [B, T, F], masked bool [B, T]).
    """
    masked = span_mask(keys, real, probability, span)
    shape = features.shape[1:]
    noise = jax.vmap(lambda key: jax.random.normal(named_key(key, 'noise'), shape))(keys)
    return jnp.where(masked[..., None], noise_std * noise, features), masked


def masked_cross_entropy(
    frames: jax.Array, kernel: jax.Array, bias: jax.Array, codes: jax.Array, scored: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of N linear softmaxes at the scored frames.

    Args:
      frames: [B, T, D]; the product runs in their dtype and accumulates in float32.
      kernel, bias: [N, D, V], [N, V] float32.
      codes: int32 [B, T, N].
      scored: bool [B, T]; other frames may hold anything, NaN included.

    Returns:
      loss: float32 scalar, sum over scored frames of the mean over codebooks.
      predicted: int32 [B, T, N], the most probable codes.
    """
    frames = jnp.where(scored[..., None], frames, jnp.zeros((), frames.dtype))

    def one(args: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, b, targets = args
        logits = b + jnp.matmul(frames, w.astype(frames.dtype), preferred_element_type=jnp.float32)
        at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - at_target
        predicted = argmax(jax.lax.stop_gradient(logits))
        return jnp.sum(jnp.where(scored, nats, 0.0)), predicted

    if kernel.shape[0] == 1:
        loss, predicted = one((kernel[0], bias[0], codes[..., 0]))
        return loss, predicted[..., None]
    # One softmax at a time, recomputed in the backward pass: N x V logits a frame are too many.
    losses, predicted = jax.lax.map(jax.checkpoint(one), (kernel, bias, jnp.moveaxis(codes, -1, 0)))
    return jnp.mean(losses), jnp.moveaxis(predicted, 0, -1)


def _counts(codes: jax.Array, scored: jax.Array, size: int) -> jax.Array:
    """int32 [N, V]: how often each code occurs among the scored frames of codes [B, T, N]."""
    weights = jnp.broadcast_to(scored[..., None], codes.shape).astype(jnp.int32)
    columns = jnp.arange(codes.shape[-1])
    return jnp.zeros((codes.shape[-1], size), jnp.int32).at[columns, codes].add(weights)


def _perplexity(counts: Any) -> np.ndarray:
    """exp(entropy) of each row of counts [N, V]; 1 for an empty row."""
    counts = np.asarray(counts, np.float64)
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.exp(-np.sum(shares * logs, axis=-1))
