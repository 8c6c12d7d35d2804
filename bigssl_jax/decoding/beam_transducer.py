"""Beam search of a transducer (RNN-T or HAT), batched: alignment-length synchronous decoding.

    labels                                   One step of a hypothesis is one arrow: a blank goes to
      2   o-->o-->o-->                       the next frame, a label goes up and stays in the frame.
          ^   ^   ^                          After i steps a hypothesis of u labels stands in frame
      1   o-->o-->o-->    i = 3: (3, 0),     t = i - u: all hypotheses lie on one anti-diagonal,
          ^   ^   ^              (2, 1),     though in different frames.
      0   o-->o-->o-->           (1, 2) ...
        t=0   1   2

Why this and not frame by frame (arXiv 1211.3711, or mAES with its few expansions a frame):
- It costs T + U evaluations of the joint; frame by frame costs T times (expansions + 1).
- Every step has the same shape, with no loop of unknown length inside a frame.
- Two hypotheses with equal labels stand at the same point of the lattice, so that adding up their
  probabilities is exact: with a beam that holds everything, scores are those of the loss.

In a frame without a clear winner labels can go on beating the blank, one after the other, until all
of the beam stands still there: hence at most `max_symbols` labels a frame, as in greedy decoding.

A hypothesis that takes the blank of its last frame is finished; it keeps its place in the beam
until better ones push it out, and a row has ended when all that is left in its beam is finished.
Implements the method of Saon, Tueske and Audhkhasi (ICASSP 2020), batched.

As in `beam_ctc`, a hypothesis stays (blank) or is extended, and only parent and child can meet
(`nbest`).  A token's frame is the one in which the more probable of the merged paths wrote it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigssl_jax.decoding import fusion as fusion_lib
from bigssl_jax.decoding.fusion import Fusion, FusionState
from bigssl_jax.decoding.nbest import (
    EMPTY,
    NBest,
    advance_where,
    certainty,
    choose,
    flat,
    folded,
    last_tokens,
    parents,
    put,
    take,
)
from bigssl_jax.decoding.transducer import MAX_SYMBOLS
from bigssl_jax.models.transducer import Transducer


class Written(NamedTuple):
    """When and how surely each token was written; arrays [B, K, U]."""

    frames: jax.Array
    confidence: jax.Array
    certainty: jax.Array


class Beam(NamedTuple):
    """K hypotheses of B utterances.

    Attributes:
      tokens, counts: int32 [B, K, U], [B, K].
      frame: int32 [B, K], where it stands; the number of the row's frames: finished.
      in_frame: int32 [B, K], labels written there.
      acoustic: float32 [B, K], log-probability of its paths; -inf: not alive.
      fused: float32 [B, K], what fusion added.
      written: of its tokens.
      state: of the prediction network, arrays [B, K, ...].
      projected: float32 [B, K, J], the prediction network's part of the joint.
      language: arrays [B, K, ...].
    """

    tokens: jax.Array
    counts: jax.Array
    frame: jax.Array
    in_frame: jax.Array
    acoustic: jax.Array
    fused: jax.Array
    written: Written
    state: Any
    projected: jax.Array
    language: FusionState


def beam_transducer(
    encoded: jax.Array,
    mask: jax.Array,
    transducer: Transducer,
    fusion: Fusion,
    *,
    beam: int = 8,
    expansions: int = 8,
    nbest: int = 1,
    max_symbols: int = MAX_SYMBOLS,
    max_tokens: int | None = None,
) -> NBest:
    """Decodes a batch; to be called inside `jax.jit` (all but arrays and `fusion` static).

    Args:
      encoded: [B, T, J], the encoder's part of the joint; padding may hold anything, NaN included.
      mask: bool [B, T], True = real frame, real frames first.
      transducer: the head.
      fusion: language models and weights; `make_fusion()` for none.
      beam: K, hypotheses kept.
      expansions: labels tried per hypothesis and step.
      nbest: hypotheses returned, at most `beam`.
      max_symbols: labels in one frame, at most.
      max_tokens: longest hypothesis; default T.
    """
    rows, frames = mask.shape
    ends = jnp.sum(mask, axis=1, dtype=jnp.int32)
    encoded = jnp.where(mask[..., None], encoded, jnp.zeros((), encoded.dtype))
    expansions = min(expansions, transducer.vocabulary_size - 1)
    width = frames if max_tokens is None else max_tokens
    first = _empty(transducer, fusion, ends, beam, width)

    def move(state: Beam) -> Beam:
        open_ = _unfinished(state, ends)
        possible = open_ & (state.in_frame < max_symbols)
        moves = _moves(state, encoded, possible, transducer, fusion, expansions)
        merged = _merge(state, moves, open_, possible, transducer.blank_id)
        new = _select(state, moves, merged, open_, ends, transducer, fusion)
        return choose(jnp.any(open_, axis=1), new, state)

    last = jax.lax.while_loop(lambda state: jnp.any(_unfinished(state, ends)), move, first)
    return _result(last, nbest)


def _unfinished(state: Beam, ends: jax.Array) -> jax.Array:
    """bool [B, K]: alive and not at the end of the audio."""
    return (state.frame < ends[:, None]) & (state.acoustic + state.fused > -jnp.inf)


def _empty(transducer: Transducer, fusion: Fusion, ends: jax.Array, beam: int, width: int) -> Beam:
    """The empty hypothesis; the other places are not alive."""
    rows = ends.shape[0]
    blanks = jnp.full((rows * beam,), transducer.blank_id, jnp.int32)
    state, projected = transducer.advance(transducer.initial(rows * beam), blanks)
    language = fusion_lib.start(fusion, rows * beam, width, transducer.blank_id)
    state, projected, language = folded((state, projected, language), rows)
    zeros = jnp.zeros((rows, beam))
    buffer = jnp.zeros((rows, beam, width))
    # Without any frame there is no blank that could finish it: it is finished now.
    ending = fusion_lib.final(fusion, flat(language)).reshape(rows, beam)
    return Beam(
        tokens=jnp.full((rows, beam, width), EMPTY, jnp.int32),
        counts=zeros.astype(jnp.int32),
        frame=zeros.astype(jnp.int32),
        in_frame=zeros.astype(jnp.int32),
        acoustic=jnp.full((rows, beam), -jnp.inf).at[:, 0].set(0.0),
        fused=jnp.where(ends[:, None] == 0, ending, zeros),
        written=Written(buffer.astype(jnp.int32), buffer, buffer),
        state=state,
        projected=projected,
        language=language,
    )


class _Moves(NamedTuple):
    """What every hypothesis could do next, each for itself; C labels are tried.

    Attributes:
      log_p: float32 [B, K, V].
      certainty: float32 [B, K], of log_p.
      labels: int32 [B, K, C].
      extended: float32 [B, K, C], log-probability of its paths with each label; -inf: impossible.
      added: float32 [B, K, C], what fusion adds for it.
    """

    log_p: jax.Array
    certainty: jax.Array
    labels: jax.Array
    extended: jax.Array
    added: jax.Array


def _moves(
    state: Beam,
    encoded: jax.Array,
    possible: jax.Array,
    transducer: Transducer,
    fusion: Fusion,
    expansions: int,
) -> _Moves:
    rows = state.counts.shape[0]
    here = jnp.minimum(state.frame, encoded.shape[1] - 1)
    frames = jnp.take_along_axis(encoded, here[..., None], axis=1)
    projected = flat(state.projected)
    log_p = transducer.log_probs(flat(frames), projected)
    internal = fusion.internal_lm_weight * transducer.internal_lm(projected)
    added = flat(state.language).label_scores
    added = added - jnp.where(fusion.internal_lm_weight > 0, internal, 0.0)
    # The best labels of each hypothesis, with the language models' say in it.
    is_blank = jnp.arange(log_p.shape[1]) == transducer.blank_id
    _, labels = jax.lax.top_k(jnp.where(is_blank, -jnp.inf, log_p + added), expansions)
    label_log_p = jnp.take_along_axis(log_p, labels, axis=1)
    added = jnp.take_along_axis(added, labels, axis=1)
    log_p, labels, label_log_p, added = folded((log_p, labels, label_log_p, added), rows)
    possible &= state.counts < state.tokens.shape[2]
    extended = state.acoustic[..., None] + label_log_p
    extended = jnp.where(possible[..., None], extended, -jnp.inf)
    return _Moves(log_p, certainty(log_p), labels, extended, added)


class _Merged(NamedTuple):
    """The moves when equal hypotheses have become one.

    Attributes:
      stayed: float32 [B, K], log-probability after a blank, or of a finished hypothesis.
      extended: float32 [B, K, C], -inf where `stayed` of another hypothesis holds it.
      written, in_frame: of the hypotheses that stay.
    """

    stayed: jax.Array
    extended: jax.Array
    written: Written
    in_frame: jax.Array


def _merge(
    state: Beam, moves: _Moves, open_: jax.Array, possible: jax.Array, blank_id: int
) -> _Merged:
    last = last_tokens(state.tokens, state.counts)
    alive = state.acoustic + state.fused > -jnp.inf
    is_parent = parents(state.tokens, state.counts, alive) & possible[:, None]
    wanted = jnp.broadcast_to(jnp.maximum(last, 0)[:, None], is_parent.shape)  # [B, parent, child]
    written_log_p = jnp.swapaxes(jnp.take_along_axis(moves.log_p, wanted, axis=2), 1, 2)
    paths = jnp.where(is_parent, state.acoustic[:, None] + written_log_p, -jnp.inf)
    parent, share = jnp.argmax(paths, axis=2), jnp.max(paths, axis=2)  # it has one at most

    blank = state.acoustic + jnp.where(open_, moves.log_p[..., blank_id], 0.0)
    is_label = last[:, :, None, None] == moves.labels[:, None]  # [B, child, parent, C]
    doubled = jnp.any(is_parent[..., None] & is_label, axis=1)
    # The history is that of the more probable of the two paths.
    column, better = state.counts - 1, share > blank
    theirs = choose(better, take(state.written, parent), state.written)
    confidence = jnp.take_along_axis(jnp.exp(written_log_p), parent[..., None], axis=2)[..., 0]
    written = Written(
        put(theirs.frames, column, take(state.frame, parent), better),
        put(theirs.confidence, column, confidence, better),
        put(theirs.certainty, column, take(moves.certainty, parent), better),
    )
    extended = jnp.where(doubled, -jnp.inf, moves.extended)
    in_frame = jnp.where(better, take(state.in_frame, parent) + 1, 0)
    return _Merged(jnp.logaddexp(blank, share), extended, written, in_frame)


def _select(
    state: Beam,
    moves: _Moves,
    merged: _Merged,
    open_: jax.Array,
    ends: jax.Array,
    transducer: Transducer,
    fusion: Fusion,
) -> Beam:
    """The best K of all that may follow."""
    rows, beam, expansions = moves.labels.shape
    frame = state.frame + open_
    ending = fusion_lib.final(fusion, flat(state.language)).reshape(rows, beam)
    fused = state.fused + jnp.where(open_ & (frame == ends[:, None]), ending, 0.0)
    fused_extended = state.fused[..., None] + moves.added
    stay_scores = merged.stayed + fused
    extension_scores = (merged.extended + fused_extended).reshape(rows, -1)
    scores, chosen = jax.lax.top_k(jnp.concatenate([stay_scores, extension_scores], axis=1), beam)
    exists, stays = scores > -jnp.inf, chosen < beam
    source = jnp.where(stays, chosen, (chosen - beam) // expansions)
    place = jnp.where(stays, 0, chosen - beam)
    adds = exists & ~stays

    def extension(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values.reshape(rows, -1), place, axis=1)

    kept = take(state, source)
    stayed = state._replace(
        acoustic=merged.stayed,
        fused=fused,
        frame=frame,
        written=merged.written,
        in_frame=merged.in_frame,
    )
    new = choose(stays, take(stayed, source), kept)
    token = extension(moves.labels)
    probability = jnp.exp(extension(jnp.take_along_axis(moves.log_p, moves.labels, axis=2)))
    acoustic = jnp.where(stays, new.acoustic, extension(merged.extended))

    def advance(old: Any, tokens: jax.Array) -> Any:
        prediction, _, language = old
        language = fusion_lib.advance(fusion, language.states, tokens)
        return (*transducer.advance(prediction, tokens), language)

    networks = (kept.state, kept.projected, kept.language)
    networks = advance_where(advance, networks, token, adds)
    return Beam(
        tokens=put(kept.tokens, kept.counts, token, adds),
        counts=kept.counts + adds,
        frame=new.frame,
        in_frame=new.in_frame + adds,
        acoustic=jnp.where(exists, acoustic, -jnp.inf),
        fused=jnp.where(adds, extension(fused_extended), new.fused),
        written=Written(
            put(new.written.frames, kept.counts, kept.frame, adds),
            put(new.written.confidence, kept.counts, probability, adds),
            put(new.written.certainty, kept.counts, take(moves.certainty, source), adds),
        ),
        state=networks[0],
        projected=networks[1],
        language=networks[2],
    )


def _result(state: Beam, nbest: int) -> NBest:
    scores, best = jax.lax.top_k(state.acoustic + state.fused, min(nbest, state.counts.shape[1]))
    exists = scores > -jnp.inf
    counts = jnp.where(exists, take(state.counts, best), 0)
    real = jnp.arange(state.tokens.shape[2]) < counts[..., None]

    def clean(buffer: jax.Array) -> jax.Array:
        return jnp.where(real, take(buffer, best), jnp.zeros((), buffer.dtype))

    frames = clean(state.written.frames)
    return NBest(
        tokens=clean(state.tokens),
        token_counts=counts,
        scores=scores,
        log_probability=jnp.where(exists, take(state.acoustic, best), -jnp.inf),
        lm_score=jnp.where(exists, take(state.fused, best), 0.0),
        token_confidence=clean(state.written.confidence),
        token_certainty=clean(state.written.certainty),
        token_start_frames=frames,
        token_end_frames=jnp.where(real, frames + 1, 0),
    )


def internal_lm_scores(transducer: Transducer, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """log-probability of label sequences by the transducer's internal language model.

    Args:
      transducer: the head.
      tokens: int32 [N, U]; columns from `counts` on may hold anything.
      counts: int32 [N].

    Returns:
      float32 [N]; it knows of no end of a sentence.
    """
    blanks = jnp.full((tokens.shape[0],), transducer.blank_id, jnp.int32)

    def step(carry: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        state, projected = carry
        labels, inside = inputs
        labels = jnp.where(inside, labels, transducer.blank_id)
        log_p = transducer.internal_lm(projected)
        found = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
        return transducer.advance(state, labels), jnp.where(inside, found, 0.0)

    first = transducer.advance(transducer.initial(tokens.shape[0]), blanks)
    inside = jnp.arange(tokens.shape[1]) < counts[:, None]
    _, found = jax.lax.scan(step, first, (tokens.astype(jnp.int32).T, inside.T))
    return jnp.sum(found, axis=0)
