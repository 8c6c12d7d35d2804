"""Decoding: logits to tokens, batched on the accelerator; tokens to words, on the host."""

from bigssl_jax.decoding.greedy_ctc import GreedyResult, greedy_ctc
from bigssl_jax.decoding.words import Word, words, words_of

__all__ = ['GreedyResult', 'Word', 'greedy_ctc', 'words', 'words_of']
