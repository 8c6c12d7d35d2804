"""CTC prefix beam search, batched: the most probable label sequences, not the best alignments.

Many alignments spell one sequence ("a a -", "- a a", "a - -" all spell "a"); the search adds them
up.  A hypothesis l keeps two sums over the alignments so far, because a repeated label means two
things:

    blank   those that end in a blank:           a further "a" after "a -" is a new token
    label   those that end in its last label:    a further "a" after "a a" is the same token

    frame t, label c:   blank'(l)     = (blank + label)(l) p(blank)
                        label'(l)     = label(l) p(last of l)              repetition
                        label'(l + c) = (blank + label)(l) p(c)            c is not the last of l
                                      = blank(l) p(c)                      c is the last of l

If l + c is in the beam itself, the two shares of its `label'` are added up (`nbest`).  Per frame
every hypothesis tries the same few labels, those most probable in that frame.  With a beam of all
prefixes and all labels the result is exact; implements the method of arXiv 1408.2873, batched.

Times and confidences come from the Viterbi alignment of each hypothesis (`ctc_alignment`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigssl_jax.decoding import fusion as fusion_lib
from bigssl_jax.decoding.ctc_alignment import align_ctc
from bigssl_jax.decoding.fusion import Fusion, FusionState
from bigssl_jax.decoding.nbest import (
    EMPTY,
    NBest,
    advance_where,
    choose,
    flat,
    folded,
    last_tokens,
    parents,
    put,
    take,
)


class Beam(NamedTuple):
    """K hypotheses of B utterances.

    Attributes:
      tokens, counts: int32 [B, K, U], [B, K].
      blank, label: float32 [B, K], log-probabilities as drawn above; -inf: not alive.
      fused: float32 [B, K], what fusion added.
      language: arrays [B, K, ...].
    """

    tokens: jax.Array
    counts: jax.Array
    blank: jax.Array
    label: jax.Array
    fused: jax.Array
    language: FusionState


def beam_ctc(
    logits: jax.Array,
    mask: jax.Array,
    fusion: Fusion,
    *,
    beam: int = 8,
    expansions: int = 8,
    nbest: int = 1,
    blank_id: int = 0,
    max_tokens: int | None = None,
) -> NBest:
    """Decodes a batch; to be called inside `jax.jit` (all but arrays and `fusion` static).

    Args:
      logits: [B, T, V], any float dtype; padded frames may hold anything, NaN included.
      mask: bool [B, T], True = real frame, real frames first.
      fusion: language models and weights; `make_fusion()` for none.
      beam: K, hypotheses kept.
      expansions: labels tried per frame.
      nbest: hypotheses returned, at most `beam`.
      blank_id: of the blank.
      max_tokens: longest hypothesis; default T, which every hypothesis fits in.
    """
    rows, frames, vocabulary = logits.shape
    log_p = jax.nn.log_softmax(jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0), axis=-1)
    expansions = min(expansions, vocabulary - 1)
    width = frames if max_tokens is None else max_tokens

    def step(state: Beam, inputs: tuple[jax.Array, jax.Array]) -> tuple[Beam, None]:
        frame_log_p, inside = inputs
        # A batch whose rows have all ended, as in a long padding, has no more work.
        new = jax.lax.cond(
            jnp.any(inside),
            lambda: _frame(state, frame_log_p, fusion, expansions, blank_id),
            lambda: state,
        )
        return choose(inside, new, state), None

    state = _empty(fusion, rows, beam, width, blank_id)
    state, _ = jax.lax.scan(step, state, (jnp.swapaxes(log_p, 0, 1), mask.T))
    return _result(state, log_p, mask, fusion, nbest, blank_id)


def _empty(fusion: Fusion, rows: int, beam: int, width: int, blank_id: int) -> Beam:
    """The empty hypothesis; the other places are not alive."""
    shape = (rows, beam)
    dead = jnp.full(shape, -jnp.inf)
    return Beam(
        tokens=jnp.full((*shape, width), EMPTY, jnp.int32),
        counts=jnp.zeros(shape, jnp.int32),
        blank=dead.at[:, 0].set(0.0),
        label=dead,
        fused=jnp.zeros(shape),
        language=folded(fusion_lib.start(fusion, rows * beam, width, blank_id), rows),
    )


def _frame(state: Beam, log_p: jax.Array, fusion: Fusion, expansions: int, blank_id: int) -> Beam:
    """One frame of every row; log_p float32 [B, V]."""
    rows, beam = state.counts.shape
    total = jnp.logaddexp(state.blank, state.label)
    last = last_tokens(state.tokens, state.counts)
    last_log_p = jnp.take_along_axis(log_p, jnp.maximum(last, 0), axis=1)
    last_log_p = jnp.where(last == EMPTY, -jnp.inf, last_log_p)
    labels_only = log_p.at[:, blank_id].set(-jnp.inf)
    label_log_p, labels = jax.lax.top_k(labels_only, expansions)

    # The share of each hypothesis that comes from its parent, and extensions that it stands for.
    alive = total + state.fused > -jnp.inf
    is_parent = parents(state.tokens, state.counts, alive)  # [B, child, parent]
    repeats = last[:, :, None] == last[:, None]
    share = jnp.where(repeats, state.blank[:, None], total[:, None]) + last_log_p[..., None]
    share = jnp.max(jnp.where(is_parent, share, -jnp.inf), axis=2)
    is_label = last[:, :, None] == labels[:, None]  # [B, K, C]
    merged = jnp.any(is_parent[..., None] & is_label[:, :, None], axis=1)  # [B, parent, C]

    blank = total + log_p[:, blank_id, None]
    label = jnp.logaddexp(state.label + last_log_p, share)
    extended = jnp.where(is_label, state.blank[..., None], total[..., None]) + label_log_p[:, None]
    full = (state.counts >= state.tokens.shape[2])[..., None]
    extended = jnp.where(merged | full, -jnp.inf, extended)
    added = _label_scores(state, labels)

    scores = jnp.concatenate(
        [
            jnp.logaddexp(blank, label) + state.fused,
            (extended + added + state.fused[..., None]).reshape(rows, -1),
        ],
        axis=1,
    )
    scores, chosen = jax.lax.top_k(scores, beam)
    stays = chosen < beam
    source = jnp.where(stays, chosen, (chosen - beam) // expansions)
    place = jnp.where(stays, 0, chosen - beam)  # in [K C]
    token = jnp.take_along_axis(labels, place % expansions, axis=1)
    exists = scores > -jnp.inf
    kept = take(state._replace(blank=blank, label=label), source)

    def extension(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values.reshape(rows, -1), place, axis=1)

    def advance(language: FusionState, tokens: jax.Array) -> FusionState:
        return fusion_lib.advance(fusion, language.states, tokens)

    return Beam(
        tokens=put(kept.tokens, kept.counts, token, ~stays),
        counts=kept.counts + ~stays,
        blank=jnp.where(exists & stays, kept.blank, -jnp.inf),
        label=jnp.where(exists, jnp.where(stays, kept.label, extension(extended)), -jnp.inf),
        fused=kept.fused + jnp.where(exists & ~stays, extension(added), 0.0),
        language=advance_where(advance, kept.language, token, exists & ~stays),
    )


def _label_scores(state: Beam, labels: jax.Array) -> jax.Array:
    """What fusion adds for each of `labels` [B, C] after each hypothesis: float32 [B, K, C]."""
    rows, beam = state.counts.shape
    each = jnp.repeat(labels, beam, axis=0)
    found = fusion_lib.label_scores_of(flat(state.language), each)
    return found.reshape(rows, beam, -1)


def _result(
    state: Beam, log_p: jax.Array, mask: jax.Array, fusion: Fusion, nbest: int, blank_id: int
) -> NBest:
    acoustic = jnp.logaddexp(state.blank, state.label)
    ending = fusion_lib.final(fusion, flat(state.language)).reshape(acoustic.shape)
    fused = jnp.where(acoustic > -jnp.inf, state.fused + ending, 0.0)
    scores, best = jax.lax.top_k(acoustic + fused, min(nbest, acoustic.shape[1]))
    exists = scores > -jnp.inf
    counts = jnp.where(exists, take(state.counts, best), 0)
    real = jnp.arange(state.tokens.shape[2]) < counts[..., None]
    tokens = jnp.where(real, take(state.tokens, best), 0)

    def align(k: Any) -> Any:
        return align_ctc(log_p, mask, tokens[:, k], counts[:, k], blank_id)

    # One rank after the other: the alignment's memory grows with T^2.
    found = jax.lax.map(align, jnp.arange(scores.shape[1]))
    found = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)

    def clean(x: jax.Array) -> jax.Array:
        return jnp.where(real, x, jnp.zeros((), x.dtype))

    return NBest(
        tokens=tokens,
        token_counts=counts,
        scores=scores,
        log_probability=jnp.where(exists, take(acoustic, best), -jnp.inf),
        lm_score=jnp.where(exists, take(fused, best), 0.0),
        token_confidence=clean(found.confidence),
        token_certainty=clean(found.certainty),
        token_start_frames=clean(found.start_frames),
        token_end_frames=clean(found.end_frames),
    )
