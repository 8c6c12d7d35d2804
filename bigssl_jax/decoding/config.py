"""DecoderConfig: how hypotheses are searched for, the `decoder` field of a stage."""

import dataclasses
from typing import Any

from bigssl_jax.config import ConfigError, choose
from bigssl_jax.decoding.confidence import MEASURES
from bigssl_jax.decoding.fusion import FusionConfig
from bigssl_jax.decoding.transducer import MAX_SYMBOLS

KINDS = ('greedy', 'beam')
WEIGHTS = tuple(field.name for field in dataclasses.fields(FusionConfig))


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A search.

    Attributes:
      kind: 'greedy' follows the most probable move, 'beam' keeps several hypotheses; all but
        `max_symbols` is of a beam search alone.
      max_symbols: labels that a transducer may write in one frame.
      beam: hypotheses kept [ours].
      expansions: labels tried per frame (CTC), or per hypothesis and step (transducer) [ours].
      nbest: hypotheses returned, at most `beam`.
      confidence: measure of a token's confidence, see `decoding/confidence.py`.
      lm: a stage of kind 'language_model' before this one, or the folder of its model; '': none.
      ngram: a stage of kind 'ngram' before this one, or an ARPA file over the tokenizer's pieces.
      lm_weight, ngram_weight, internal_lm_weight, length_reward: see `fusion.FusionConfig`; CTC
        has no internal language model, and its weight no effect there.
    """

    kind: str = 'greedy'
    max_symbols: int = MAX_SYMBOLS
    beam: int = 8
    expansions: int = 8
    nbest: int = 1
    confidence: str = 'max_probability'
    lm: str = ''
    ngram: str = ''
    lm_weight: float = 0.0
    ngram_weight: float = 0.0
    internal_lm_weight: float = 0.0
    length_reward: float = 0.0

    def __post_init__(self) -> None:
        choose('decoder.kind', self.kind, KINDS)
        choose('decoder.confidence', self.confidence, MEASURES)
        for name in ('max_symbols', 'beam', 'expansions', 'nbest'):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f'config field decoder.{name} is {getattr(self, name)}; it must be at least 1'
                )
        if self.nbest > self.beam:
            raise ConfigError(
                f'config field decoder.nbest is {self.nbest}, but decoder.beam keeps {self.beam}'
                ' hypotheses; set beam to that number or more'
            )
        FusionConfig(**self._weights())  # its own checks
        for name in ('lm', 'ngram'):
            if getattr(self, f'{name}_weight') and not getattr(self, name):
                raise ConfigError(
                    f'config field decoder.{name}_weight is {getattr(self, f"{name}_weight")}, but'
                    f' decoder.{name} names no model; set decoder.{name}, or the weight to 0'
                )
        self._check_greedy()

    def _check_greedy(self) -> None:
        if self.kind != 'greedy':
            return
        for field in dataclasses.fields(self):
            used = field.name in ('kind', 'max_symbols', 'beam', 'expansions')
            if not used and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f'config field decoder.{field.name} is {getattr(self, field.name)!r}, which a'
                    " greedy search does not use; set decoder.kind to 'beam'"
                )

    @property
    def fusion(self) -> FusionConfig:
        """The weights of language models."""
        return FusionConfig(**self._weights())

    def _weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in WEIGHTS}

    @property
    def ranks(self) -> int:
        """Hypotheses that the program computes; a posterior needs all that were kept."""
        return self.beam if self.confidence == 'posterior' else self.nbest

    @property
    def program(self) -> 'DecoderConfig':
        """What is compiled: models and weights are arguments of the program."""
        none: dict[str, Any] = {'lm': '', 'ngram': '', **dict.fromkeys(WEIGHTS, 0.0)}
        return dataclasses.replace(self, **none)

    def decisive(self, ctc: bool) -> dict[str, Any]:
        """The fields that decide what the best hypothesis is, but for those that add nothing.

        Args:
          ctc: of a CTC head, which has no internal language model; else of a transducer.
        """
        if self.kind == 'greedy':
            return {} if ctc else {'max_symbols': self.max_symbols}
        silent = {'kind', 'nbest', *(('max_symbols', 'internal_lm_weight') if ctc else ())}
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in ('beam', 'expansions', *(() if ctc else ('max_symbols',)))
            or (field.name not in silent and getattr(self, field.name) != field.default)
        }
