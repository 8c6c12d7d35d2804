"""DecoderConfig: how hypotheses are searched for, the `decoder` field of a stage."""

import dataclasses

from bigssl_jax.config import ConfigError, choose
from bigssl_jax.decoding.transducer import MAX_SYMBOLS

KINDS = ('greedy',)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A search.

    Attributes:
      kind: 'greedy' follows the most probable move.
      max_symbols: labels that a transducer may write in one frame.
    """

    kind: str = 'greedy'
    max_symbols: int = MAX_SYMBOLS

    def __post_init__(self) -> None:
        choose('decoder.kind', self.kind, KINDS)
        if self.max_symbols < 1:
            raise ConfigError(
                f'config field decoder.max_symbols is {self.max_symbols}; it must be at least 1'
            )
