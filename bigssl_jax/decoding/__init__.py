"""Decoding: logits to tokens, batched on the accelerator; tokens to words, on the host."""

from bigssl_jax.decoding.config import DecoderConfig
from bigssl_jax.decoding.greedy_ctc import GreedyResult, greedy_ctc
from bigssl_jax.decoding.transducer import Transducer, greedy_transducer
from bigssl_jax.decoding.words import Word, words, words_of

__all__ = [
    'DecoderConfig',
    'GreedyResult',
    'Transducer',
    'Word',
    'greedy_ctc',
    'greedy_transducer',
    'words',
    'words_of',
]
