"""RNN-T (Graves 2012) and HAT (Variani et al. 2020): labels given the audio *and* earlier labels.

    frames  --encoder_projection-->  encoded [B, T, J]
    labels  --prediction network-->  predicted [B, U + 1, J]
    encoded + predicted  ->  the sum over all alignments   (transducer.py holds the mathematics)

Unlike CTC it may write several labels in one frame, so there may be more labels than frames; what
cannot be aligned is an utterance without frames, or a label that is the blank or outside of the
vocabulary.  Such rows weigh nothing and are counted as 'invalid'.

With `ctc_weight` the same frames also carry a CTC head: its loss is added, and reported beside the
transducer's.  Utterances that CTC alone cannot align then train the transducer alone.

The prediction network is small and its loop is long, so each device runs it on its own rows with
all of its parameters (`parallel.per_row`), and their gradient is summed over devices once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bigssl_jax.audio import row_keys
from bigssl_jax.models.layers import zero_padding
from bigssl_jax.models.prediction import Prediction, PredictionConfig
from bigssl_jax.models.transducer import (
    Transducer,
    TransducerConfig,
    bind,
    init_transducer,
    project_encoder,
    project_prediction,
)
from bigssl_jax.objectives.ctc import CTC
from bigssl_jax.objectives.encoder_call import Batch, EncoderCall, named_key
from bigssl_jax.objectives.labelled import (
    check_fields,
    heard,
    heard_plainly,
    labelled_health,
    labelled_summary,
    labelled_totals,
)
from bigssl_jax.objectives.transducer import fused_hat_loss, fused_rnnt_loss, transducer_valid
from bigssl_jax.parallel import per_row

LOSSES = {'softmax': fused_rnnt_loss, 'hat': fused_hat_loss}


@dataclasses.dataclass(frozen=True)
class RNNT:
    """The objective; fields are config fields.

    Attributes:
      vocabulary_size: V, blank included.
      blank_id: also the padding id of the tokenizer, and <start> of the prediction network.
      normalise: the loss is per 'label' or per 'utterance'.
      dropout: on the frames before the head.
      max_invalid: `health` complains when a larger share of the utterances is invalid.
      prediction: kind of the prediction network, 'lstm' or 'stateless'.
      prediction_layers: of the LSTM: 2 for XL, XXL and G [recalled].
      prediction_dim: P, of embedding and LSTM: 640 [recalled].
      prediction_context: labels that a stateless network sees.
      prediction_dropout: in the prediction network.
      joint_dim: J: 640 [recalled].
      fastemit: lambda of FastEmit (Yu et al. 2021); 0: none.
      tile_frames: frames of a tile of the loss; 0: chosen by the loss.
      ctc_weight: of a CTC loss on the same frames; 0: none.
    """

    vocabulary_size: int
    blank_id: int = 0
    normalise: str = 'label'
    dropout: float = 0.0
    max_invalid: float = 0.2
    prediction: str = 'lstm'
    prediction_layers: int = 2
    prediction_dim: int = 640
    prediction_context: int = 2
    prediction_dropout: float = 0.0
    joint_dim: int = 640
    fastemit: float = 0.0
    tile_frames: int = 0
    ctc_weight: float = 0.0
    name: str = 'rnnt'

    factorisation: ClassVar[str] = 'softmax'

    def __post_init__(self) -> None:
        check_fields(self.name, self.normalise, self.blank_id, self.vocabulary_size, self.dropout)
        for field in ('fastemit', 'tile_frames', 'ctc_weight'):
            if getattr(self, field) < 0:
                value = getattr(self, field)
                raise ValueError(f'{self.name}.{field} is {value}; it must be at least 0')
        self.decoder('float32')

    def decoder(self, dtype: Any) -> TransducerConfig:
        """The networks of the head, with products in `dtype`."""
        prediction = PredictionConfig(
            vocabulary_size=self.vocabulary_size,
            kind=self.prediction,
            num_layers=self.prediction_layers,
            dim=self.prediction_dim,
            context=self.prediction_context,
            dropout=self.prediction_dropout,
            blank_id=self.blank_id,
            dtype=jnp.dtype(dtype).name,
        )
        return TransducerConfig(prediction, self.joint_dim, self.factorisation)

    @property
    def ctc(self) -> CTC:
        """The CTC objective beside this one."""
        return CTC(self.vocabulary_size, self.blank_id, self.normalise)

    def init_params(self, key: jax.Array, encoder_config: Any) -> dict[str, Any]:
        """Boxed head of `init_transducer`, and 'ctc' where `ctc_weight` asks for it."""
        params = init_transducer(key, self.decoder('float32'), encoder_config.model_dim)
        if self.ctc_weight:
            params['ctc'] = self.ctc.init_params(named_key(key, 'ctc'), encoder_config)
        return params

    def init_constants(self, key: jax.Array) -> dict[str, jax.Array]:
        """{}: nothing but the parameters decides the loss."""
        del key
        return {}

    def predict(
        self, encode: EncoderCall, params: Mapping[str, Any], batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """For decoding: (encoded float32 [B, T4, J], mask [B, T4]), without augmentation."""
        frames, mask = heard_plainly(encode, batch)
        return project_encoder(params, frames, encode.dtype), mask

    def transducer(self, params: Mapping[str, Any], dtype: Any) -> Transducer:
        """For decoding: the head as a search wants it, with products in `dtype`."""
        return bind(self.decoder(dtype), params, dtype)

    def totals(
        self,
        encode: EncoderCall,
        params: Mapping[str, Any],
        constants: Mapping[str, jax.Array],
        batch: Batch,
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        """`labelled_totals` of one labelled batch.

        With a CTC head `loss` is the weighted sum, and there are besides:
          transducer_loss, ctc_loss: float32, of each alone.
          ctc_weight: float32, labels or utterances that CTC can align.
          ctc_invalid: int32, rows that CTC cannot align.
        """
        del constants
        frames, mask = heard(encode, batch, key, self.name, self.dropout)
        keys = None
        if self.prediction_dropout and not encode.deterministic:
            keys = row_keys(named_key(key, 'prediction_dropout'), batch['rows'])
        losses, possible = self.losses(params, frames, mask, batch, keys, encode.dtype)
        totals = labelled_totals(losses, possible, mask, batch, self.normalise)
        if not self.ctc_weight:
            return totals
        losses, possible = self.ctc.losses(params['ctc'], frames, mask, batch)
        beside = labelled_totals(losses, possible, mask, batch, self.normalise)
        return totals | {
            'loss': totals['loss'] + self.ctc_weight * beside['loss'],
            'transducer_loss': totals['loss'],
            'ctc_loss': beside['loss'],
            'ctc_weight': beside['weight'],
            'ctc_invalid': beside['invalid'],
        }

    def losses(
        self,
        params: Mapping[str, Any],
        frames: jax.Array,
        mask: jax.Array,
        batch: Batch,
        keys: jax.Array | None,
        dtype: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Of frames [B, T, D]: (losses float32 [B], 0 where there is none; possible bool [B]).

        Args:
          params: the head's.
          frames: padded frames may hold anything, NaN included.
          mask: bool [B, T].
          batch: a labelled Batch.
          keys: [B], of the dropout in the prediction network, or None.
          dtype: of the products.
        """
        labels, counts = batch['labels'], batch['label_counts']
        frame_counts = jnp.sum(mask, axis=1, dtype=jnp.int32)
        possible = transducer_valid(
            labels, counts, frame_counts, self.vocabulary_size, self.blank_id
        )
        valid = possible & (batch['sample_counts'] > 0)
        frames = zero_padding(frames, mask & valid[:, None])
        decoder = self.decoder(dtype).prediction

        def predict(rows: Mapping[str, Any], params: Any) -> jax.Array:
            return Prediction(decoder).apply({'params': params}, rows['labels'], rows['keys'])

        predicted = per_row(predict, {'labels': labels, 'keys': keys}, params['prediction'])
        losses = LOSSES[self.factorisation](
            project_encoder(params, frames, dtype).astype(dtype),
            project_prediction(params, predicted, dtype).astype(dtype),
            params['output']['kernel'],
            params['output']['bias'],
            labels,
            # Of a row that is not valid, one frame without labels: a finite loss, masked below.
            jnp.where(valid, frame_counts, 1),
            jnp.where(valid, counts, 0),
            self.blank_id,
            fastemit=self.fastemit,
            tile_frames=self.tile_frames or None,
        )
        return jnp.where(valid, losses, 0.0), possible

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """See `labelled_summary`; with a CTC head also transducer_loss, ctc_loss, ctc_invalid."""
        summary = labelled_summary(totals)
        if not self.ctc_weight:
            return summary
        return summary | {
            'transducer_loss': float(totals['transducer_loss']) / max(float(totals['weight']), 1.0),
            'ctc_loss': float(totals['ctc_loss']) / max(float(totals['ctc_weight']), 1.0),
            'ctc_invalid': float(totals['ctc_invalid']),
        }

    def health(self, summary: Mapping[str, float], step: int) -> str | None:
        """Advice when many utterances cannot be aligned, else None."""
        return labelled_health(
            summary,
            self.name,
            self.max_invalid,
            f'no frames, or labels outside the vocabulary of {self.vocabulary_size}',
            'check that transcripts and tokenizer belong to this audio',
        )


@dataclasses.dataclass(frozen=True)
class HAT(RNNT):
    """The hybrid autoregressive transducer: RNNT with a sigmoid of its own for the blank."""

    name: str = 'hat'

    factorisation: ClassVar[str] = 'hat'
