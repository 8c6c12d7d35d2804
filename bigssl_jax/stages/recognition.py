"""From audio to hypotheses: what labelling, evaluation, dev scores and transcription share."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bigssl_jax.audio import AudioConfig
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.decoding import greedy_ctc
from bigssl_jax.decoding.words import Word, words
from bigssl_jax.models import ConformerConfig, Encoder, attention_kernels
from bigssl_jax.objectives import CTC, EncoderCall
from bigssl_jax.parallel import replicated, use_mesh
from bigssl_jax.stages.model import Model
from bigssl_jax.stages.schema import make_objective
from bigssl_jax.training.loop import HOST_KEYS, to_devices
from bigssl_jax.training.trainer import parameter_layout

# What is told of the whole batch, also in a process that was given a slice of it.
WHOLE_KEYS = ('its_sources', 'its_utterances', 'sample_counts')
DECODER = 'greedy_ctc-1'  # changes whenever its results would


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """What a model heard in one utterance.

    Attributes:
      source, utterance: where it stands in its stream.
      text: of the tokens.
      tokens, token_confidence, start_frames, end_frames: [U]; a frame is 40 ms.
      confidence: mean token confidence, in [0, 1].
      score: log-probability of the best path per token.
      log_probability: of the best path.
      frames: encoder frames.
      seconds: of audio.
    """

    source: int
    utterance: int
    text: str
    tokens: np.ndarray
    token_confidence: np.ndarray
    start_frames: np.ndarray
    end_frames: np.ndarray
    confidence: float
    score: float
    log_probability: float
    frames: int
    seconds: float

    def words(self, tokenizer: Tokenizer, frame_seconds: float) -> list[Word]:
        """Words with confidences and times."""
        return words(
            self.tokens.tolist(),
            self.start_frames.tolist(),
            self.end_frames.tolist(),
            self.token_confidence.tolist(),
            [tokenizer.piece(i) for i in range(tokenizer.vocabulary_size)],
            frame_seconds=frame_seconds,
        )


class Recogniser:
    """A model ready to decode batches on a mesh.

    Args:
      encoder, audio, head: the model's parts.
      params, constants: {'encoder': ..., 'head': ...}, arrays on the mesh or numpy.
      tokenizer: turns ids into text.
      mesh: devices.
    """

    def __init__(
        self,
        encoder: ConformerConfig,
        audio: AudioConfig,
        head: CTC,
        params: Any,
        constants: Any,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
    ):
        self._decode = decoder(encoder, audio, head, mesh)
        self._params, self._constants, self._mesh = params, constants, mesh
        self._tokenizer = tokenizer

    @classmethod
    def of_model(cls, model: Model, mesh: jax.sharding.Mesh) -> 'Recogniser':
        """A finished model's recogniser; each device reads its own part of the parameters."""
        name = model.transcript_head()
        tokenizer = Tokenizer(model.tokenizer_path)
        head = make_objective(model.heads[name], tokenizer.vocabulary_size, model.audio.num_mels)
        encoder = attention_kernels.portable(model.encoder, mesh.devices.flat[0].platform)
        arrays = model.read(
            {
                'params': parameter_layout(encoder, {name: head}, mesh),
                'constants': {'encoder': model.shapes()['constants']['encoder']},
            }
        )
        params = {'encoder': arrays['params']['encoder'], 'head': arrays['params']['heads'][name]}
        constants = jax.device_put(arrays['constants']['encoder'], replicated(mesh))
        return cls(encoder, model.audio, head, params, constants, tokenizer, mesh)

    def recognise(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Hypothesis]:
        """Decodes batches; fillers are skipped, the rest comes in the order of the batches.

        Where the mesh spans several processes, all of them call this together, each with its slice
        of every batch, and each is given the hypotheses of the whole batch.
        """
        for batch in batches:
            with use_mesh(self._mesh):
                named = {f'its_{key}': batch[key] for key in HOST_KEYS}
                on_devices = to_devices({'': {**batch, **named}}, self._mesh)['']
                result = self._decode(self._params, self._constants, on_devices)
            host, frames, whole = jax.device_get(result)
            for row in range(len(frames)):
                if whole['its_utterances'][row] >= 0:
                    yield self._hypothesis(whole, host, frames, row)

    def _hypothesis(
        self, batch: Mapping[str, np.ndarray], result: Any, frames: np.ndarray, row: int
    ) -> Hypothesis:
        count = int(result.token_counts[row])
        tokens = result.tokens[row, :count]
        return Hypothesis(
            source=int(batch['its_sources'][row]),
            utterance=int(batch['its_utterances'][row]),
            text=self._tokenizer.decode(tokens.tolist()),
            tokens=tokens,
            token_confidence=result.token_confidence[row, :count],
            start_frames=result.token_start_frames[row, :count],
            end_frames=result.token_end_frames[row, :count],
            confidence=float(result.confidence[row]),
            score=float(result.score[row]),
            log_probability=float(result.log_probability[row]),
            frames=int(frames[row]),
            seconds=float(batch['sample_counts'][row]) / 16000,
        )


@functools.lru_cache(maxsize=16)
def decoder(
    encoder: ConformerConfig, audio: AudioConfig, head: CTC, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
    """One jitted decoder for every model of the same shape; every process has its results."""

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def decode(params: Any, constants: Any, batch: Mapping[str, jax.Array]) -> Any:
        call = EncoderCall(
            encoder=Encoder(encoder),
            params=params['encoder'],
            constants=constants,
            audio=audio,
            deterministic=True,
        )
        logits, mask = head.predict(call, params['head'], batch)
        whole = {key: value for key, value in batch.items() if key in WHOLE_KEYS}
        return greedy_ctc(logits, mask, head.blank_id), mask.sum(axis=1), whole

    return decode
