"""N-gram models over the tokenizer's pieces, on the accelerator, as a `fusion.LanguageModel`.

A state is a context; the model is an automaton.  State 0 is the empty context, and every state but
that one points to its backoff state, the longest proper suffix that is a state too:

    state "a b"   arcs  c -> P(c | a b), next state "b c"      backoff weight w2, to state "b"
    state "b"     arcs  a, c -> ...                            backoff weight w1, to state ""
    state ""      every piece                                  (a dense row: unigrams)

    P(x | a b)  =  arc of "a b",  else  w2 * arc of "b",  else  w2 w1 * unigram(x)

The arcs of all states lie in three arrays, sorted by (state, token).  The distribution over the
whole vocabulary starts as the unigram row and is overwritten by the arcs of ever longer contexts:
order - 1 scatters whose widths are the largest fan-outs of contexts of that length, so that the
shapes are static.  The next state is found by binary search in the arcs, longest context first.
"""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigssl_jax.config import UserError
from bigssl_jax.decoding.arpa import END, LN10, START, UNKNOWN, UNKNOWN_LOG10, Arpa, read_arpa
from bigssl_jax.decoding.fusion import LanguageModel

# Largest share of an ARPA file's n-grams that may hold words which are no pieces.
MAX_SKIPPED = 0.1


class NgramParams(NamedTuple):
    """The automaton: S states, A arcs, V tokens; logarithms are natural.

    Attributes:
      unigram: float32 [V].
      unigram_next: int32 [V], state after that token alone.
      lengths: int32 [S], tokens of the context.
      backoff, backoff_weight: int32 [S], float32 [S].
      final: float32 [S], log P(</s>).
      first_arc: int32 [S + 1]; arcs of state s are first_arc[s] to first_arc[s + 1].
      arc_tokens, arc_next: int32 [A].
      arc_log_probs: float32 [A].
      start: int32 [], the state of "<s>".
    """

    unigram: jax.Array
    unigram_next: jax.Array
    lengths: jax.Array
    backoff: jax.Array
    backoff_weight: jax.Array
    final: jax.Array
    first_arc: jax.Array
    arc_tokens: jax.Array
    arc_next: jax.Array
    arc_log_probs: jax.Array
    start: jax.Array


class NgramSummary(NamedTuple):
    """What became of an ARPA file.

    Attributes:
      order, ngrams, states, arcs: sizes.
      skipped: n-grams that hold a word which is no piece.
      examples: some of those words.
      missing_pieces: pieces without a unigram; they score as <unk>.
    """

    order: int
    ngrams: int
    states: int
    arcs: int
    skipped: int
    examples: tuple[str, ...]
    missing_pieces: int


def load_ngram(
    path: str | os.PathLike,
    pieces: Sequence[str],
    blank_id: int = 0,
    silent: Sequence[int] = (0, 1),
    max_skipped: float = MAX_SKIPPED,
) -> tuple[LanguageModel, NgramSummary]:
    """Reads an ARPA file over pieces.

    Args:
      path: ARPA file, plain or .gz.
      pieces: id -> piece, the tokenizer's.
      blank_id: of the blank.
      silent: ids that no hypothesis holds (padding, end of sentence): -inf.
      max_skipped: largest share of n-grams with words that are no pieces.

    Raises:
      UserError: the file is damaged, or too many of its words are no pieces of this tokenizer.
    """
    return ngram_model(read_arpa(path), pieces, blank_id, silent, max_skipped)


def ngram_model(
    model: Arpa,
    pieces: Sequence[str],
    blank_id: int = 0,
    silent: Sequence[int] = (0, 1),
    max_skipped: float = MAX_SKIPPED,
) -> tuple[LanguageModel, NgramSummary]:
    """`load_ngram` of a model in memory."""
    hidden = {blank_id, *silent}
    ids = {piece: i for i, piece in enumerate(pieces) if i not in hidden}
    known, skipped, examples = _known_entries(model, ids)
    total = sum(map(len, model.entries))
    if skipped > max_skipped * total:
        shown = ', '.join(map(repr, examples))
        raise UserError(
            f'{model.name}: {skipped} of {total} n-grams hold words that are no pieces of the'
            f' tokenizer, for example {shown}; make the model from text cut into pieces by this'
            ' tokenizer (a model over words can rescore n-best lists instead)'
        )
    params, fan_outs = _automaton(model, known, ids, len(pieces), hidden)
    language_model = LanguageModel(
        params=params,
        initial=initial,
        advance=_advance_with(fan_outs),
        final=final,
    )
    summary = NgramSummary(
        order=model.order,
        ngrams=total - skipped,
        states=len(params.lengths),
        arcs=len(params.arc_tokens),
        skipped=skipped,
        examples=examples,
        missing_pieces=sum((piece,) not in known[0] for piece in ids),
    )
    return language_model, summary


@functools.lru_cache(maxsize=64)
def _advance_with(fan_outs: tuple[int, ...]) -> Any:
    """One function for equal models: it is part of the key of compiled programs."""
    return functools.partial(advance, fan_outs=fan_outs)


def initial(params: NgramParams, count: int, length: int) -> tuple[jax.Array, jax.Array]:
    """`count` states "<s>": (state, whether the sentence has begun), [count] each."""
    del length
    return jnp.full((count,), params.start), jnp.zeros((count,), bool)


def final(params: NgramParams, state: tuple[jax.Array, jax.Array]) -> jax.Array:
    """log P(</s> | state), float32 [n]."""
    return params.final[state[0]]


def advance(
    params: NgramParams,
    state: tuple[jax.Array, jax.Array],
    tokens: jax.Array,
    *,
    fan_outs: tuple[int, ...],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Appends tokens [n]; the first call only begins the sentence and ignores them.

    Args:
      params: the automaton.
      state: of `initial` or of this function.
      tokens: int32 [n].
      fan_outs: most arcs of any context of length 1, 2, ..., order - 1.

    Returns:
      the state and the distribution of the token after it, float32 [n, V].
    """
    context, begun = state
    chain = _chain(params, context, len(fan_outs))
    context = jnp.where(begun, _next_state(params, chain, tokens, fan_outs), context)
    chain = _chain(params, context, len(fan_outs))
    scores = _distribution(params, chain, fan_outs, tokens.shape[0])
    return (context, jnp.ones_like(begun)), scores


def _chain(params: NgramParams, context: jax.Array, depth: int) -> list[jax.Array]:
    """The suffixes of `context` by length: entry l - 1 is the one of length l, or state 0."""
    found = []
    for length in range(depth, 0, -1):
        here = params.lengths[context] == length
        found.append(jnp.where(here, context, 0))
        context = jnp.where(here, params.backoff[context], context)
    return found[::-1]


def _next_state(
    params: NgramParams, chain: list[jax.Array], tokens: jax.Array, fan_outs: tuple[int, ...]
) -> jax.Array:
    """The state of the longest known context that ends in `tokens`."""
    result = params.unigram_next[tokens]
    for context, fan_out in zip(chain, fan_outs, strict=True):  # longer ones overwrite
        low, end = params.first_arc[context], params.first_arc[context + 1]
        high = end
        for _ in range(max(fan_out, 1).bit_length()):
            middle = (low + high) // 2
            right = (middle < high) & (params.arc_tokens[middle] < tokens)
            low, high = jnp.where(right, middle + 1, low), jnp.where(right, high, middle)
        found = (low < end) & (params.arc_tokens[low] == tokens) & (context > 0)
        result = jnp.where(found, params.arc_next[low], result)
    return result


def _distribution(
    params: NgramParams, chain: list[jax.Array], fan_outs: tuple[int, ...], count: int
) -> jax.Array:
    """log P(token | longest context of the chain), float32 [count, V]."""
    weights = [params.backoff_weight[context] for context in chain]  # state 0: weight 0
    outer = functools.reduce(jnp.add, weights, jnp.zeros((count,)))
    rows = jnp.arange(count)[:, None]
    scores = params.unigram + outer[:, None]
    for context, weight, fan_out in zip(chain, weights, fan_outs, strict=True):
        outer = outer - weight  # backoff weights of the longer contexts alone
        if not fan_out:
            continue
        first = params.first_arc[context][:, None]
        arcs = first + jnp.arange(fan_out)
        inside = (arcs < params.first_arc[context + 1][:, None]) & (context > 0)[:, None]
        arcs = jnp.where(inside, arcs, 0)
        columns = jnp.where(inside, params.arc_tokens[arcs], scores.shape[1])
        values = params.arc_log_probs[arcs] + outer[:, None]
        scores = scores.at[rows, columns].set(values, mode='drop')
    return scores


# ---------------------------------------------------------------------------------------------
# from an ARPA file to the automaton, on the host


def _known_entries(
    model: Arpa, ids: dict[str, int]
) -> tuple[list[dict[tuple[str, ...], tuple[float, float | None]]], int, tuple[str, ...]]:
    """Entries of pieces and sentence marks alone, how many others there are, words of those."""
    words = {*ids, START, END, UNKNOWN}
    known = [
        {ngram: value for ngram, value in entries.items() if words.issuperset(ngram)}
        for entries in model.entries
    ]
    skipped = sum(map(len, model.entries)) - sum(map(len, known))
    strangers = [word for (word,) in model.entries[0] if word not in words]
    return known, skipped, tuple(strangers[:5])


def _automaton(
    model: Arpa, known: list, ids: dict[str, int], vocabulary_size: int, hidden: set[int]
) -> tuple[NgramParams, tuple[int, ...]]:
    """The arrays, and the largest fan-out of contexts of each length."""
    # A context matters if longer n-grams begin with it, or if its backoff weight is not 1.
    begins = {ngram[:-1] for entries in known[1:] for ngram in entries}
    contexts: dict[tuple[str, ...], int] = {(): 0}
    for entries in known[:-1]:
        for ngram, (_, backoff) in entries.items():
            if (backoff or ngram in begins) and ngram[-1] != END:
                contexts[ngram] = len(contexts)
    size = len(contexts)

    def longest(ngram: tuple[str, ...]) -> int:
        """The state of the longest suffix that is one."""
        while ngram not in contexts:
            ngram = ngram[1:]
        return contexts[ngram]

    # Pieces without a unigram share the arcs of <unk>.
    tokens_of = {piece: [i] for piece, i in ids.items() if (piece,) in known[0]}
    strangers = [i for piece, i in ids.items() if (piece,) not in known[0]]
    tokens_of[UNKNOWN] = tokens_of.get(UNKNOWN, []) + strangers
    arcs: list[tuple[int, int, int, float]] = []
    weights = np.zeros(size, np.float64)
    for entries in known[1:]:
        for ngram, (log10, _) in entries.items():
            for token in tokens_of.get(ngram[-1], ()):
                arcs.append((contexts[ngram[:-1]], token, longest(ngram), log10 * LN10))
    for context, state in contexts.items():
        if context:
            weights[state] = (known[len(context) - 1][context][1] or 0.0) * LN10
    arcs.sort()
    lengths = np.array([len(context) for context in contexts], np.int32)
    counts = np.bincount([arc[0] for arc in arcs], minlength=size)
    fan_outs = tuple(
        int(max(counts[lengths == length], default=0)) for length in range(1, model.order)
    )
    columns = list(zip(*arcs, strict=True)) or [(0,), (0,), (0,), (-math.inf,)]
    unigram, unigram_next = _unigrams(known[0], ids, vocabulary_size, hidden, contexts)
    final_scores = [model.log10_probability(context, END) * LN10 for context in contexts]
    params = NgramParams(
        unigram=unigram,
        unigram_next=unigram_next,
        lengths=lengths,
        backoff=np.array([longest(c[1:]) if c else 0 for c in contexts], np.int32),
        backoff_weight=weights.astype(np.float32),
        final=np.array(final_scores, np.float32),
        first_arc=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        arc_tokens=np.array(columns[1], np.int32),
        arc_next=np.array(columns[2], np.int32),
        arc_log_probs=np.array(columns[3], np.float32),
        start=np.int32(contexts.get((START,), 0)),
    )
    return jax.tree.map(np.asarray, params), fan_outs


def _unigrams(
    entries: Any, ids: dict[str, int], vocabulary_size: int, hidden: set[int], contexts: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Dense row of log-probabilities, and the state after each token."""
    unknown = entries.get((UNKNOWN,), (UNKNOWN_LOG10, None))[0]
    row = np.full(vocabulary_size, unknown * LN10, np.float32)
    following = np.full(vocabulary_size, contexts.get((UNKNOWN,), 0), np.int32)
    for piece, i in ids.items():
        if (piece,) in entries:
            row[i] = entries[(piece,)][0] * LN10
            following[i] = contexts.get((piece,), 0)
    row[sorted(hidden)] = -np.inf
    return row, following
