"""From audio to hypotheses: what labelling, evaluation, dev scores and transcription share."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bigssl_jax.audio import AudioConfig
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.decoding import DecoderConfig, GreedyResult, greedy_ctc, greedy_transducer
from bigssl_jax.decoding.words import Word, words
from bigssl_jax.models import ConformerConfig, Encoder, attention_kernels
from bigssl_jax.objectives import CTC, RNNT, EncoderCall
from bigssl_jax.parallel import per_row, replicated, use_mesh
from bigssl_jax.stages.model import Model
from bigssl_jax.stages.schema import make_objective
from bigssl_jax.training.loop import HOST_KEYS, to_devices
from bigssl_jax.training.trainer import parameter_layout

# What is told of the whole batch, also in a process that was given a slice of it.
WHOLE_KEYS = ('its_sources', 'its_utterances', 'sample_counts')
# Names of the searches; one changes whenever its results would.
GREEDY_CTC, GREEDY_TRANSDUCER = 'greedy_ctc-1', 'greedy_transducer-1'
GREEDY = DecoderConfig()
Head = CTC | RNNT


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
      search: how hypotheses are searched for.
    """

    def __init__(
        self,
        encoder: ConformerConfig,
        audio: AudioConfig,
        head: Head,
        params: Any,
        constants: Any,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        search: DecoderConfig = GREEDY,
    ):
        self._decode = decoder(encoder, audio, head, mesh, search)
        self.decoder_name = decoder_name(head, search)
        self._params, self._constants, self._mesh = params, constants, mesh
        self._tokenizer = tokenizer

    @classmethod
    def of_model(
        cls, model: Model, mesh: jax.sharding.Mesh, search: DecoderConfig = GREEDY
    ) -> 'Recogniser':
        """A finished model's recogniser; each device reads its own part of the parameters.

        Raises:
          UserError: the model has no transcript head, or not the tokenizer of its training.
        """
        name = model.transcript_head()
        model.check_tokenizer()
        tokenizer = Tokenizer(model.tokenizer_path)
        head = make_objective(model.heads[name], tokenizer.vocabulary_size, model.audio.num_mels)
        assert model.encoder is not None, model.directory  # a transcript head has one
        encoder = attention_kernels.portable(model.encoder, mesh.devices.flat[0].platform)
        arrays = model.read(
            {
                'params': parameter_layout(encoder, {name: head}, mesh),
                'constants': {'encoder': model.shapes()['constants']['encoder']},
            }
        )
        params = {'encoder': arrays['params']['encoder'], 'head': arrays['params']['heads'][name]}
        constants = jax.device_put(arrays['constants']['encoder'], replicated(mesh))
        return cls(encoder, model.audio, head, params, constants, tokenizer, mesh, search)

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
    encoder: ConformerConfig,
    audio: AudioConfig,
    head: Head,
    mesh: jax.sharding.Mesh,
    search: DecoderConfig = GREEDY,
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
        result, mask = _search(call, params['head'], head, batch, search)
        whole = {key: value for key, value in batch.items() if key in WHOLE_KEYS}
        return result, mask.sum(axis=1), whole

    return decode


def decoder_name(head: Head, search: DecoderConfig) -> str:
    """Names the search in the identity of what it wrote."""
    if isinstance(head, CTC):
        return GREEDY_CTC
    return f'{GREEDY_TRANSDUCER} max_symbols={search.max_symbols}'


def _search(
    encode: EncoderCall,
    params: Any,
    head: Head,
    batch: Mapping[str, jax.Array],
    search: DecoderConfig,
) -> tuple[GreedyResult, jax.Array]:
    """Hypotheses of a batch, and the mask of the encoder's frames."""
    scores, mask = head.predict(encode, params, batch)
    if isinstance(head, CTC):
        return greedy_ctc(scores, mask, head.blank_id), mask

    # Each device decodes its own rows: it waits for no other before it goes on to a next frame.
    def decode_rows(rows: Mapping[str, jax.Array], params: Any) -> GreedyResult:
        transducer = head.transducer(params, encode.dtype)
        return greedy_transducer(rows['scores'], rows['mask'], transducer, search.max_symbols)

    return per_row(decode_rows, {'scores': scores, 'mask': mask}, params), mask
