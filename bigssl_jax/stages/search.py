"""What a stage's `decoder` field asks for: the search, and the language models that it listens to.

    DecoderConfig --load_models--> LanguageModels --fusion--> Fusion, an argument of the program
    encoder frames of a batch --search_batch--> Found: the best hypotheses, and n-best lists

Every device searches for its own rows alone, with the whole head and the whole language models.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigssl_jax.config import UserError
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.decoding import DecoderConfig, GreedyResult, greedy_ctc, greedy_transducer
from bigssl_jax.decoding.beam_ctc import beam_ctc
from bigssl_jax.decoding.beam_transducer import beam_transducer
from bigssl_jax.decoding.confidence import token_confidences
from bigssl_jax.decoding.fusion import Fusion, LanguageModel, make_fusion
from bigssl_jax.decoding.nbest import NBest
from bigssl_jax.decoding.ngram import load_ngram
from bigssl_jax.decoding.posteriors import Posteriors, top_posteriors
from bigssl_jax.objectives import CTC, RNNT, EncoderCall
from bigssl_jax.parallel import per_row, replicated
from bigssl_jax.parallel.distributed import say
from bigssl_jax.stages.decoder_fields import is_file, model_hash
from bigssl_jax.stages.fusion_model import load_language_model

# Names of the searches; one changes whenever its results would.
NAMES = {
    ('greedy', True): 'greedy_ctc-1',
    ('greedy', False): 'greedy_transducer-1',
    ('beam', True): 'beam_ctc-1',
    ('beam', False): 'beam_transducer-1',
}
Head = CTC | RNNT
NGRAM_FILE = 'model.arpa'  # in the folder of an ngram stage


class Found(NamedTuple):
    """What a search found in a batch.

    Attributes:
      best: of each utterance; of a beam search `log_probability` is log P(tokens | audio), and
        `entropy` the mean over tokens, not frames, of the normalised entropy.
      nbest: all hypotheses that were asked for; None of a greedy search.
      posteriors: of every frame, where they were asked for.
    """

    best: GreedyResult
    nbest: NBest | None
    posteriors: Posteriors | None = None


@dataclasses.dataclass(frozen=True)
class LanguageModels:
    """The models that a decoder config names.

    Attributes:
      lm, ngram: None where none is named.
      hashes: field -> hash of what it names, for the identity of labels.
    """

    lm: LanguageModel | None = None
    ngram: LanguageModel | None = None
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def fusion(self, search: DecoderConfig) -> Fusion:
        """The models with the config's weights."""
        return make_fusion(search.fusion, self.lm, self.ngram)


def load_models(
    search: DecoderConfig,
    tokenizer: Tokenizer,
    workdir: pathlib.Path | None,
    mesh: jax.sharding.Mesh,
) -> LanguageModels:
    """Reads the language models that `search` names.

    Args:
      search: of a stage, or of the command line.
      tokenizer: of the acoustic model; the language models must know its pieces.
      workdir: where the stages lie; None: only files and folders can be named.
      mesh: devices; each is given whole language models.

    Raises:
      UserError: a file is missing or damaged, or of another tokenizer.
    """
    paths = {
        field: pathlib.Path(name) if is_file(name) else _stage_file(field, name, workdir)
        for field in ('lm', 'ngram')
        if (name := getattr(search, field))
    }
    models: dict[str, LanguageModel] = {}
    if 'lm' in paths:
        models['lm'] = load_language_model(paths['lm'], tokenizer, mesh)
    if 'ngram' in paths:
        models['ngram'] = _load_ngram(paths['ngram'], tokenizer)
    placed = {field: jax.device_put(model, replicated(mesh)) for field, model in models.items()}
    hashes = {field: model_hash(field, path) for field, path in paths.items()}
    return LanguageModels(**placed, hashes=hashes)


def _stage_file(field: str, name: str, workdir: pathlib.Path | None) -> pathlib.Path:
    if workdir is None:
        raise UserError(
            f'decoder.{field} is {name!r}; name a file or folder (with a / in it): there is no run'
            ' here whose stage this could be'
        )
    return workdir / name / NGRAM_FILE if field == 'ngram' else workdir / name


def _load_ngram(path: pathlib.Path, tokenizer: Tokenizer) -> LanguageModel:
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocabulary_size)]
    model, summary = load_ngram(path, pieces)
    if summary.skipped:
        say(
            f'{path}: {summary.skipped} n-grams skipped, whose words are no pieces of the tokenizer'
            f' (for example {", ".join(map(repr, summary.examples))})'
        )
    return model


def decoder_name(head: Head, search: DecoderConfig, hashes: Mapping[str, str]) -> str:
    """Names the search in the identity of what it wrote: all that its results depend on."""
    name = NAMES[search.kind, isinstance(head, CTC)]
    fields = {k: hashes.get(k, v) for k, v in search.decisive(isinstance(head, CTC)).items()}
    return ' '.join([name, *(f'{key}={value}' for key, value in fields.items())])


def search_batch(
    encode: EncoderCall,
    params: Any,
    head: Head,
    batch: Mapping[str, jax.Array],
    search: DecoderConfig,
    fusion: Fusion,
    top_k: int = 0,
) -> tuple[Found, jax.Array]:
    """Hypotheses of a batch, and the mask of the encoder's frames.

    `top_k` posteriors of each frame are added (0: none); only CTC has any.
    """
    scores, mask = head.predict(encode, params, batch)
    if top_k and not isinstance(head, CTC):
        raise UserError(
            f'top_k is {top_k}, but a transducer has no posteriors of frames; set it to 0'
        )

    # Each device decodes its own rows: it waits for no other before it goes on to a next frame.
    def decode_rows(rows: Mapping[str, jax.Array], shared: Any) -> Found:
        params, fusion = shared
        scores, mask = rows['scores'], rows['mask']
        widths: dict[str, Any] = {'beam': search.beam, 'expansions': search.expansions}
        widths['nbest'] = search.ranks
        if isinstance(head, CTC):
            posteriors = top_posteriors(scores, mask, top_k) if top_k else None
            if search.kind == 'greedy':
                return Found(greedy_ctc(scores, mask, head.blank_id), None, posteriors)
            nbest = beam_ctc(scores, mask, fusion, blank_id=head.blank_id, **widths)
            return _found(nbest, search)._replace(posteriors=posteriors)
        transducer = head.transducer(params, encode.dtype)
        if search.kind == 'greedy':
            return Found(greedy_transducer(scores, mask, transducer, search.max_symbols), None)
        widths['max_symbols'] = search.max_symbols
        return _found(beam_transducer(scores, mask, transducer, fusion, **widths), search)

    return per_row(decode_rows, {'scores': scores, 'mask': mask}, (params, fusion)), mask


def _found(nbest: NBest, search: DecoderConfig) -> Found:
    confidence = token_confidences(nbest, search.confidence)
    counts = nbest.token_counts[:, 0]
    real = jnp.arange(nbest.tokens.shape[2]) < counts[:, None]
    num_tokens = jnp.maximum(counts, 1)
    entropy = jnp.where(real, 1.0 - nbest.token_certainty[:, 0], 0.0)
    best = GreedyResult(
        tokens=nbest.tokens[:, 0],
        token_counts=counts,
        token_confidence=confidence,
        token_start_frames=nbest.token_start_frames[:, 0],
        token_end_frames=nbest.token_end_frames[:, 0],
        confidence=jnp.sum(confidence, axis=1) / num_tokens,
        score=nbest.scores[:, 0] / num_tokens,
        log_probability=nbest.log_probability[:, 0],
        entropy=jnp.sum(entropy, axis=1) / num_tokens,
    )
    return Found(best, nbest)
