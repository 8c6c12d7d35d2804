"""CTC prefix beam search against sums over all alignments, optax and a plain Python search."""

import collections
import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from bigssl_jax.decoding.beam_ctc import beam_ctc
from bigssl_jax.decoding.ctc_alignment import align_ctc
from bigssl_jax.decoding.fusion import FusionConfig, make_fusion, sequence_scores
from bigssl_jax.decoding.nbest import NBest
from bigssl_jax.decoding.ngram import ngram_model
from bigssl_jax.decoding.witten_bell import estimate

STATIC = ('beam', 'expansions', 'nbest', 'blank_id', 'max_tokens')
decode = jax.jit(beam_ctc, static_argnames=STATIC)
NONE = make_fusion()


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - (logits.max(-1, keepdims=True))
    )


def spelled(path, blank):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def all_sequences(log_p, blank):
    """Every label sequence with its log-probability: the sum over all alignments."""
    total = collections.defaultdict(float)
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        total[spelled(path, blank)] += np.exp(sum(log_p[t, k] for t, k in enumerate(path)))
    return {sequence: np.log(p) for sequence, p in total.items()}


def plain_search(log_p, beam, expansions, blank, added=lambda prefix, label: 0.0):
    """Prefix beam search in plain Python: {prefix: (blank, label)}; returns prefix -> log p."""
    state = {(): (0.0, -np.inf)}

    def rank(prefix, sums):
        return np.logaddexp(*sums) + sum(added(prefix[:i], prefix[i]) for i in range(len(prefix)))

    for frame in log_p:
        order = [k for k in np.argsort(-frame, kind='stable') if k != blank][:expansions]
        new = collections.defaultdict(lambda: (-np.inf, -np.inf))
        for prefix, (b, n) in state.items():
            total = np.logaddexp(b, n)
            old_b, old_n = new[prefix]
            stay = n + frame[prefix[-1]] if prefix else -np.inf
            new[prefix] = (np.logaddexp(old_b, total + frame[blank]), np.logaddexp(old_n, stay))
            # A label outside of the frame's best continues only into prefixes of the beam.
            here = {k for k in range(len(frame)) if k != blank and (*prefix, k) in state}
            for label in {*order, *here}:
                source = b if prefix and label == prefix[-1] else total
                old_b, old_n = new[*prefix, label]
                new[*prefix, label] = (old_b, np.logaddexp(old_n, source + frame[label]))
        kept = sorted(new, key=lambda prefix: -rank(prefix, new[prefix]))[:beam]
        state = {prefix: new[prefix] for prefix in kept}
    return {prefix: np.logaddexp(*sums) for prefix, sums in state.items()}


def hypotheses(result, row):
    """[(tokens, score)] of a row, the ones that exist."""
    return [
        (tuple(result.tokens[row, k, : result.token_counts[row, k]].tolist()), score)
        for k, score in enumerate(result.scores[row])
        if np.isfinite(score)
    ]


def test_a_beam_of_all_prefixes_is_exact(blank=2):
    """Every sequence of at most 4 frames of 3 labels, with its probability, in order."""
    logits = np.random.default_rng(blank).normal(0, 1.5, (3, 4, 4)).astype(np.float32)
    mask = np.arange(4) < np.array([4, 3, 0])[:, None]
    padded = np.where(mask[..., None], logits, np.nan)
    options = dict(beam=150, expansions=3, nbest=150, blank_id=blank)
    result = jax.device_get(decode(padded, mask, NONE, **options))
    for row, count in enumerate((4, 3, 0)):
        exact = all_sequences(log_softmax(logits[row, :count]), blank)
        found = hypotheses(result, row)
        assert {tokens for tokens, _ in found} == set(exact) and len(found) == len(exact)
        np.testing.assert_allclose([s for _, s in found], [exact[t] for t, _ in found], atol=1e-5)
        assert np.all(np.diff(result.scores[row, : len(found)]) <= 0)
    np.testing.assert_array_equal(result.scores, result.log_probability)
    assert not result.lm_score.any()


def test_scores_of_a_wide_beam_are_those_of_the_ctc_loss():
    """A peaky model: what survives in the beam holds nearly all of each hypothesis' mass."""
    random = np.random.default_rng(1)
    path = random.integers(0, 9, (4, 15)) * (random.random((4, 15)) < 0.6)
    logits = (8.0 * np.eye(9)[path] + random.normal(0, 1, (4, 15, 9))).astype(np.float32)
    mask = np.arange(15) < np.array([15, 12, 7, 3])[:, None]
    result = jax.device_get(decode(logits, mask, NONE, beam=64, expansions=8, nbest=3))
    for k in range(3):
        real = np.arange(15) < result.token_counts[:, k, None]
        loss = jax.jit(optax.ctc_loss)(logits, 1.0 - mask, result.tokens[:, k], 1.0 - real)
        np.testing.assert_allclose(result.log_probability[:, k], -loss, atol=2e-3)
        assert np.all(result.log_probability[:, k] <= 1e-5 - loss)


@pytest.mark.parametrize('beam', [1, 5])
def test_equals_the_plain_search(beam):
    logits = np.random.default_rng(beam).normal(0, 2.5, (4, 12, 7)).astype(np.float32)
    result = jax.device_get(
        decode(logits, np.ones((4, 12), bool), NONE, beam=beam, expansions=3, nbest=beam)
    )
    for row in range(4):
        expected = plain_search(log_softmax(logits[row]), beam, 3, 0)
        ranked = sorted(expected.items(), key=lambda item: -item[1])
        found = hypotheses(result, row)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in ranked]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in ranked], atol=1e-4)


def some_ngram(vocabulary, seed=0):
    """A trigram model over ids 3.. of made-up text, and a function that scores with it."""
    pieces = ['<pad>', '</s>', '<unk>', *map(str, range(3, vocabulary))]
    random = np.random.default_rng(seed)
    text = [[pieces[3 + int(x) % 4] for x in random.geometric(0.4, 6)] for _ in range(30)]
    arpa = estimate(text, 3, pieces[3:])
    return ngram_model(arpa, pieces)[0], arpa, pieces


def test_fusion_ranks_by_the_sum_of_all_its_parts():
    """The search with an n-gram model and a length reward against the plain one, and its scores
    against the parts computed from outside."""
    model, arpa, pieces = some_ngram(8)
    fusion = make_fusion(FusionConfig(ngram_weight=0.7, length_reward=0.4), ngram=model)
    logits = np.random.default_rng(5).normal(0, 1.5, (3, 9, 8)).astype(np.float32)
    mask = np.arange(9) < np.array([9, 7, 4])[:, None]
    padded = np.where(mask[..., None], logits, np.nan)
    result = jax.device_get(decode(padded, mask, fusion, beam=6, expansions=7, nbest=6))
    ln10 = np.log(10)

    def added(prefix, label):
        if label < 3 and label != 2:
            return -np.inf
        context = ['<s>', *(pieces[i] for i in prefix)]
        return 0.7 * arpa.log10_probability(context, pieces[label]) * ln10 + 0.4

    for row, count in enumerate((9, 7, 4)):
        plain = plain_search(log_softmax(logits[row, :count]), 6, 7, 0, added)
        found = hypotheses(result, row)
        assert {tokens for tokens, _ in found} == set(plain)
        for k, (tokens, score) in enumerate(found):
            text = arpa.sentence([pieces[i] for i in tokens])[0]
            fused = 0.7 * text + 0.4 * len(tokens)
            assert result.lm_score[row, k] == pytest.approx(fused, abs=1e-4)
            assert result.log_probability[row, k] == pytest.approx(plain[tokens], abs=1e-4)
            assert score == pytest.approx(plain[tokens] + fused, abs=1e-4)
        assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    again = sequence_scores(model, result.tokens[:, 0], result.token_counts[:, 0])
    fused = 0.7 * again + 0.4 * result.token_counts[:, 0]
    np.testing.assert_allclose(result.lm_score[:, 0], fused, atol=1e-4)
    alone = plain_search(log_softmax(logits[0]), 6, 7, 0)
    assert hypotheses(result, 0)[0][0] != max(alone, key=alone.get)


def test_padding_and_batch_mates_change_nothing():
    model, _, _ = some_ngram(8)
    fusion = make_fusion(FusionConfig(ngram_weight=0.5, length_reward=0.1), ngram=model)
    run = functools.partial(decode, fusion=fusion, beam=4, expansions=5, nbest=2, max_tokens=12)
    logits = np.random.default_rng(2).normal(0, 2, (4, 12, 8)).astype(np.float32)
    mask = np.arange(12) < np.array([12, 7, 1, 0])[:, None]
    whole = jax.device_get(run(logits, mask))
    # Two of the four, in another order, beside five more frames of NaN.
    chosen, padding = [2, 1], ((0, 0), (0, 5), (0, 0))
    wide = np.pad(np.where(mask[..., None], logits, np.nan), padding, constant_values=np.nan)
    others = jax.device_get(run(wide[chosen], np.pad(mask, padding[:2])[chosen]))
    for name in NBest._fields:
        expected, found = getattr(whole, name)[chosen], getattr(others, name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert whole.token_counts[3].tolist() == [0, 0] and whole.scores[3, 1] == -np.inf


def test_alignment_is_the_best_of_all():
    """Times, confidences and score against a search through every alignment of the sequence."""
    random = np.random.default_rng(3)
    log_p = log_softmax(random.normal(0, 1, (5, 6, 4)))
    counts = np.array([2, 3, 0, 1, 2])
    tokens = np.array([[1, 2, 9], [3, 3, 1], [7, 7, 7], [2, 0, 0], [1, 1, 0]])
    frames = np.array([6, 6, 4, 1, 3])
    mask = np.arange(6) < frames[:, None]
    found = jax.device_get(jax.jit(align_ctc)(log_p.astype(np.float32), mask, tokens, counts))
    for row in range(5):
        wanted = tuple(tokens[row, : counts[row]].tolist())
        paths = itertools.product(range(4), repeat=frames[row])
        best = max(
            (path for path in paths if spelled(path, 0) == wanted),
            key=lambda path: sum(log_p[row, t, k] for t, k in enumerate(path)),
        )
        score = sum(log_p[row, t, k] for t, k in enumerate(best))
        assert found.log_probability[row] == pytest.approx(score, abs=1e-5)
        frame, column = 0, 0
        for label, run in itertools.groupby(best):
            length = len(list(run))
            if label:
                piece = log_p[row, frame : frame + length]
                peak = piece[piece[:, label].argmax()]
                entropy = -(np.exp(peak) * peak).sum() / np.log(4)
                assert found.start_frames[row, column] == frame
                assert found.end_frames[row, column] == frame + length
                assert found.confidence[row, column] == pytest.approx(np.exp(peak[label]), rel=1e-5)
                assert found.certainty[row, column] == pytest.approx(1 - entropy, rel=1e-4)
                column += 1
            frame += length
        assert column == counts[row]


def test_labels_that_do_not_fit_have_no_alignment():
    log_p = np.zeros((1, 2, 3), np.float32)
    found = jax.jit(align_ctc)(log_p, np.ones((1, 2), bool), np.array([[1, 1]]), np.array([2]))
    assert found.log_probability[0] == -np.inf


def test_a_bound_on_the_length_holds():
    logits = 5.0 * np.eye(5, dtype=np.float32)[[1, 2, 3, 4, 1, 2]][None]
    mask = np.ones((1, 6), bool)
    bound = jax.device_get(decode(logits, mask, NONE, beam=4, expansions=4, max_tokens=3))
    assert bound.tokens.shape == (1, 1, 3) and bound.token_counts.max() <= 3
