"""A small estimator of n-gram models, for piece-level models of transcripts (Witten & Bell 1991).

Every context h reserves mass for what it has not been followed by, in proportion to the number
T(h) of different tokens that it has been followed by; the shorter context h' shares it out:

    P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h))
    P(w)     = (c(w) + T / V) / (N + T)              V: vocabulary, `</s>` and `<unk>` included

For a w that never followed h the first is T(h) / (c(h) + T(h)) P(w | h'): exactly a backoff weight,
so that the interpolated model is an ARPA model without approximation.  It holds all n-grams in
memory: fit for millions of tokens; larger texts are KenLM's business, whose files `ngram` reads.
"""

import collections
import math
from collections.abc import Iterable, Sequence

from bigssl_jax.config import UserError
from bigssl_jax.decoding.arpa import END, START, UNKNOWN, Arpa, Ngram

START_LOG10 = -99.0  # <s> is a context, never predicted


def estimate(sentences: Iterable[Sequence[str]], order: int, vocabulary: Sequence[str]) -> Arpa:
    """A Witten-Bell model of token sequences.

    Args:
      sentences: tokens of each, without sentence marks.
      order: length of the longest n-grams, at least 1.
      vocabulary: tokens that get a probability though they may not occur.

    Raises:
      UserError: no sentences, or an order below 1.
    """
    if order < 1:
        raise UserError(f'order of an n-gram model is {order}; it must be 1 or more')
    counts: list[collections.Counter[Ngram]] = [collections.Counter() for _ in range(order)]
    for sentence in sentences:
        tokens = (START, *sentence, END)
        for length in range(1, order + 1):
            counts[length - 1].update(
                tokens[i : i + length] for i in range(len(tokens) - length + 1)
            )
    counts[0].pop((START,), None)
    if not counts[0]:
        raise UserError('an n-gram model needs at least one sentence')
    probabilities = [_unigrams(counts[0], vocabulary)]
    backoffs: list[dict[Ngram, float]] = []
    for level in counts[1:]:
        found, backoff = _smooth(level, probabilities[-1])
        probabilities.append(found)
        backoffs.append(backoff)
    backoffs.append({})
    probabilities[0][(START,)] = 10.0**START_LOG10
    return Arpa(
        tuple(
            {
                ngram: (
                    math.log10(value),
                    math.log10(backoff[ngram]) if ngram in backoff else None,
                )
                for ngram, value in level.items()
            }
            for level, backoff in zip(probabilities, backoffs, strict=True)
        )
    )


def _unigrams(counts: collections.Counter[Ngram], vocabulary: Sequence[str]) -> dict[Ngram, float]:
    words = {(word,) for word in (*vocabulary, END, UNKNOWN) if word != START} | set(counts)
    different = len(counts)
    total = sum(counts.values()) + different
    return {word: (counts[word] + different / len(words)) / total for word in words}


def _smooth(
    counts: collections.Counter[Ngram], shorter: dict[Ngram, float]
) -> tuple[dict[Ngram, float], dict[Ngram, float]]:
    """(probabilities of the n-grams, backoff weights of their contexts)."""
    total: collections.Counter[Ngram] = collections.Counter()
    different: collections.Counter[Ngram] = collections.Counter()
    for ngram, count in counts.items():
        total[ngram[:-1]] += count
        different[ngram[:-1]] += 1
    backoff = {h: different[h] / (total[h] + different[h]) for h in total}
    found = {
        ngram: count / (total[ngram[:-1]] + different[ngram[:-1]])
        + backoff[ngram[:-1]] * shorter[ngram[1:]]
        for ngram, count in counts.items()
    }
    return found, backoff
