"""From audio to hypotheses: what labelling, evaluation, dev scores and transcription share."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bigssl_jax.audio import AudioConfig
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.decoding.beam_transducer import internal_lm_scores
from bigssl_jax.decoding.fusion import Fusion, sequence_scores
from bigssl_jax.decoding.nbest import NBest
from bigssl_jax.decoding.posteriors import Posteriors
from bigssl_jax.decoding.words import Word, words
from bigssl_jax.models import ConformerConfig, Encoder, attention_kernels
from bigssl_jax.objectives import CTC, RNNT, EncoderCall
from bigssl_jax.parallel import replicated, use_mesh
from bigssl_jax.stages.model import Model
from bigssl_jax.stages.schema import make_objective
from bigssl_jax.stages.search import (
    Head,
    LanguageModels,
    decoder_name,
    load_models,
    search_batch,
)
from bigssl_jax.training.loop import HOST_KEYS, to_devices
from bigssl_jax.training.trainer import parameter_layout

# What is told of the whole batch, also in a process that was given a slice of it.
WHOLE_KEYS = ('its_sources', 'its_utterances', 'sample_counts')
GREEDY = DecoderConfig()
SCORED_AT_ONCE = 256  # hypotheses whose parts are computed by one call


class Alternative(NamedTuple):
    """One entry of an n-best list.

    Attributes:
      text: of the tokens.
      tokens: int32 [U].
      score: what the list is ranked by.
      log_probability: log P(tokens | audio).
      lm_score: what fusion added.
    """

    text: str
    tokens: np.ndarray
    score: float
    log_probability: float
    lm_score: float


class FramePosteriors(NamedTuple):
    """The most probable labels of an utterance's frames, see `decoding.posteriors`.

    Attributes:
      ids: int32 [T, k].
      log_probs: float16 [T, k].
      mass: mean over frames of the probability that was kept.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    mass: float


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """What a model heard in one utterance.

    Attributes:
      source, utterance: where it stands in its stream.
      text: of the tokens.
      tokens, token_confidence, start_frames, end_frames: [U]; a frame is 40 ms.
      confidence: mean token confidence, in [0, 1].
      score: log-probability of the best path per token.
      log_probability: of the best path; of a beam search, of all its paths that were kept.
      frames: encoder frames.
      seconds: of audio.
      alternatives: the n-best list of a beam search, this hypothesis first; () of a greedy one.
      posteriors: of every frame, where the recogniser was asked for them.
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
    alternatives: tuple[Alternative, ...] = ()
    posteriors: FramePosteriors | None = None

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
      language_models: that `search` names.
      top_k: labels of each frame whose posteriors are told; 0: none. Only CTC has any.
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
        language_models: LanguageModels = LanguageModels(),
        top_k: int = 0,
    ):
        self._model = encoder, audio, head, params, constants, tokenizer, mesh
        self._decode = decoder(encoder, audio, head, mesh, search.program, top_k)
        self._head, self._encoder = head, encoder
        self.decoder_name = decoder_name(head, search, language_models.hashes)
        self._params, self._constants, self._mesh = params, constants, mesh
        self._tokenizer, self._search, self._language_models = tokenizer, search, language_models
        self._fusion = jax.device_put(language_models.fusion(search), replicated(mesh))

    @classmethod
    def of_model(
        cls,
        model: Model,
        mesh: jax.sharding.Mesh,
        search: DecoderConfig = GREEDY,
        workdir: pathlib.Path | None = None,
        top_k: int = 0,
    ) -> 'Recogniser':
        """A finished model's recogniser; each device reads its own part of the parameters.

        Args:
          model: with a transcript head.
          mesh: devices.
          search: how hypotheses are searched for.
          workdir: where the stages lie whose language models `search` names, if it names stages.
          top_k: labels of each frame whose posteriors are told.

        Raises:
          UserError: the model has no transcript head, or not the tokenizer of its training; a
            language model is missing, damaged or of another tokenizer.
        """
        name = model.transcript_head()
        model.check_tokenizer()
        tokenizer = Tokenizer(model.tokenizer_path)
        language_models = load_models(search, tokenizer, workdir, mesh)
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
        parts = encoder, model.audio, head, params, constants, tokenizer, mesh
        return cls(*parts, search, language_models, top_k)

    def searching(self, search: DecoderConfig) -> 'Recogniser':
        """The same model and language models with another search (the same models named)."""
        return Recogniser(*self._model, search, self._language_models)

    def recognise(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Hypothesis]:
        """Decodes batches; fillers are skipped, the rest comes in the order of the batches.

        Where the mesh spans several processes, all of them call this together, each with its slice
        of every batch, and each is given the hypotheses of the whole batch.
        """
        for batch in batches:
            with use_mesh(self._mesh):
                named = {f'its_{key}': batch[key] for key in HOST_KEYS}
                on_devices = to_devices({'': {**batch, **named}}, self._mesh)['']
                result = self._decode(self._params, self._constants, self._fusion, on_devices)
            found, frames, whole = jax.device_get(result)
            for row in range(len(frames)):
                if whole['its_utterances'][row] >= 0:
                    heard = self._hypothesis(whole, found.best, frames, row)
                    others = self._alternatives(found.nbest, row)
                    top = _posteriors(found.posteriors, row, heard.frames)
                    yield dataclasses.replace(heard, alternatives=others, posteriors=top)

    def fusion_parts(self, sequences: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """What each weight of a `FusionConfig` is multiplied with, for whole label sequences.

        Args:
          sequences: N token sequences.

        Returns:
          Name of the weight -> float64 [N]; weights whose model is not there are left out.
        """
        models = self._language_models
        width = max(map(len, sequences), default=0)
        columns: dict[str, list[np.ndarray]] = {'length_reward': []}
        for first in range(0, len(sequences), SCORED_AT_ONCE):
            chunk = sequences[first : first + SCORED_AT_ONCE]
            tokens = np.zeros((SCORED_AT_ONCE, width), np.int32)
            counts = np.zeros(SCORED_AT_ONCE, np.int32)
            for row, sequence in enumerate(chunk):
                tokens[row, : len(sequence)], counts[row] = sequence, len(sequence)
            found = {'length_reward': counts}
            with use_mesh(self._mesh):
                for name in ('lm', 'ngram'):
                    if (model := getattr(models, name)) is not None:
                        found[f'{name}_weight'] = _score(model, tokens, counts)
                if not isinstance(self._head, CTC):
                    score = internal_scorer(self._head, self._encoder, self._mesh)
                    found['internal_lm_weight'] = -score(self._params['head'], tokens, counts)
            for name, column in found.items():
                columns.setdefault(name, []).append(np.asarray(column)[: len(chunk)])
        return {name: np.concatenate(rows).astype(np.float64) for name, rows in columns.items()}

    def _alternatives(self, nbest: NBest | None, row: int) -> tuple[Alternative, ...]:
        if nbest is None:
            return ()
        found = []
        for rank in range(self._search.nbest):
            if np.isfinite(nbest.scores[row, rank]):
                tokens = nbest.tokens[row, rank, : nbest.token_counts[row, rank]]
                text = self._tokenizer.decode(tokens.tolist())
                scores = (nbest.scores, nbest.log_probability, nbest.lm_score)
                found.append(Alternative(text, tokens, *(float(x[row, rank]) for x in scores)))
        return tuple(found)

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


def _posteriors(found: Posteriors | None, row: int, frames: int) -> FramePosteriors | None:
    if found is None:
        return None
    ids, log_probs = np.asarray(found.ids), np.asarray(found.log_probs)
    # Copies: slices would keep the whole batch in memory.
    return FramePosteriors(
        ids[row, :frames].copy(), log_probs[row, :frames].copy(), float(found.mass[row])
    )


@functools.lru_cache(maxsize=16)
def decoder(
    encoder: ConformerConfig,
    audio: AudioConfig,
    head: Head,
    mesh: jax.sharding.Mesh,
    search: DecoderConfig = GREEDY,
    top_k: int = 0,
) -> Callable[..., Any]:
    """One jitted decoder for every model of the same shape; every process has its results."""

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def decode(params: Any, constants: Any, fusion: Fusion, batch: Mapping[str, jax.Array]) -> Any:
        call = EncoderCall(
            encoder=Encoder(encoder),
            params=params['encoder'],
            constants=constants,
            audio=audio,
            deterministic=True,
        )
        found, mask = search_batch(call, params['head'], head, batch, search, fusion, top_k)
        whole = {key: value for key, value in batch.items() if key in WHOLE_KEYS}
        return found, mask.sum(axis=1), whole

    return decode


_score = jax.jit(sequence_scores)


@functools.lru_cache(maxsize=16)
def internal_scorer(
    head: RNNT, encoder: ConformerConfig, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
    """(params of the head, tokens [N, U], counts [N]) -> internal-LM score [N], jitted."""

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def score(params: Any, tokens: jax.Array, counts: jax.Array) -> jax.Array:
        return internal_lm_scores(head.transducer(params, encoder.dtype), tokens, counts)

    return score
