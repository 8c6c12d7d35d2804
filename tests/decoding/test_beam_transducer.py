"""Beam search of a transducer against sums over all paths of small lattices and a plain search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.decoding.beam_transducer import beam_transducer, internal_lm_scores
from bigssl_jax.decoding.fusion import FusionConfig, make_fusion
from bigssl_jax.decoding.nbest import NBest
from bigssl_jax.decoding.ngram import ngram_model
from bigssl_jax.decoding.witten_bell import estimate
from bigssl_jax.models.transducer import Transducer

NONE = make_fusion()
JOINT = 5


class Tables:
    """A transducer of random tables whose state depends on the whole history, in numpy.

    A label makes the blank more probable for what follows: else random tables write without end.
    """

    def __init__(self, vocabulary, seed, blank=0):
        random = np.random.default_rng(seed)
        self.vocabulary, self.blank = vocabulary, blank
        self.recurrent = random.normal(0, 0.7, (JOINT, JOINT)).astype(np.float32)
        self.embedding = random.normal(0, 1, (vocabulary, JOINT)).astype(np.float32)
        self.output = random.normal(0, 1.5, (JOINT, vocabulary)).astype(np.float32)
        is_blank = np.arange(vocabulary) == blank
        self.embedding += 0.7 * np.sign(self.output[:, blank]) * ~is_blank[:, None]
        self.bias = (5.0 * is_blank).astype(np.float32)

    def advance(self, state, label):
        return np.tanh(state @ self.recurrent + self.embedding[label])

    def history(self, labels):
        state = self.advance(np.zeros(JOINT), self.blank)
        for label in labels:
            state = self.advance(state, label)
        return state

    def log_probs(self, encoded, labels):
        return softened(np.tanh(encoded + self.history(labels)) @ self.output + self.bias)

    def internal(self, labels):
        logits = np.tanh(self.history(labels)) @ self.output
        logits[self.blank] = -np.inf
        return softened(logits)

    def bound(self):
        """The same for the search."""

        def log_probs(encoded, projected):
            return jax.nn.log_softmax(jnp.tanh(encoded + projected) @ self.output + self.bias)

        def internal_lm(projected):
            logits = jnp.tanh(projected) @ self.output
            return jax.nn.log_softmax(logits.at[:, self.blank].set(-jnp.inf))

        def advance(state, labels):
            new = jnp.tanh(state @ self.recurrent + jnp.asarray(self.embedding)[labels])
            return new, new

        return Transducer(
            lambda n: jnp.zeros((n, JOINT)),
            advance,
            log_probs,
            internal_lm,
            self.blank,
            self.vocabulary,
        )


def softened(logits):
    peak = logits.max()
    return logits - peak - np.log(np.exp(logits - peak).sum())


def path_sum(tables, encoded, labels):
    """log P(labels | audio): the forward recursion over the lattice in plain Python."""
    frames, count = len(encoded), len(labels)
    log_p = [
        [tables.log_probs(encoded[t], labels[:u]) for u in range(count + 1)] for t in range(frames)
    ]
    alpha = np.full((frames, count + 1), -np.inf)
    for t in range(frames):
        for u in range(count + 1):
            terms = [0.0] if t == u == 0 else []
            if t:
                terms.append(alpha[t - 1, u] + log_p[t - 1][u][tables.blank])
            if u:
                terms.append(alpha[t, u - 1] + log_p[t][u - 1][labels[u - 1]])
            alpha[t, u] = functools.reduce(np.logaddexp, terms)
    return alpha[-1, -1] + log_p[-1][count][tables.blank]


def plain_search(
    tables, encoded, beam, expansions, added=None, ending=None, longest=99, symbols=99
):
    """Alignment-length synchronous search with dictionaries: {labels: (log p, fused, frames)}."""
    added = added or (lambda labels: np.zeros(tables.vocabulary))
    ending = ending or (lambda labels: 0.0)
    # labels -> acoustic, fused, frame, frames of the labels; those of the better of merged paths
    state = {(): (0.0, 0.0, 0, ())}
    while any(frame < len(encoded) for _, _, frame, _ in state.values()):
        new = {}

        def put(labels, acoustic, fused, frame, frames, new=new):
            if labels in new:
                other = new[labels]
                frames = frames if acoustic > other[0] else other[3]
                acoustic = np.logaddexp(acoustic, other[0])
            new[labels] = acoustic, fused, frame, frames

        for labels, (acoustic, fused, frame, frames) in state.items():
            if frame == len(encoded):
                put(labels, acoustic, fused, frame, frames)
                continue
            log_p = tables.log_probs(encoded[frame], labels)
            last = ending(labels) if frame + 1 == len(encoded) else 0.0
            put(labels, acoustic + log_p[tables.blank], fused + last, frame + 1, frames)
            scores = log_p + added(labels)
            scores[tables.blank] = -np.inf
            best = set(np.argsort(-scores)[:expansions])
            best |= {k for k in range(len(log_p)) if (*labels, k) in state} - {tables.blank}
            for label in best:
                if len(labels) < longest and frames[-symbols:].count(frame) < symbols:
                    more = added(labels)[label]
                    put(
                        (*labels, int(label)),
                        acoustic + log_p[label],
                        fused + more,
                        frame,
                        (*frames, frame),
                    )
        kept = sorted(new, key=lambda labels: -new[labels][0] - new[labels][1])[:beam]
        state = {labels: new[labels] for labels in kept}
    return {labels: (a, f, frames) for labels, (a, f, _, frames) in state.items()}


def decoder(tables, **options):
    transducer = tables.bound()
    return jax.jit(
        lambda encoded, mask, fusion: beam_transducer(encoded, mask, transducer, fusion, **options)
    )


def some_frames(rows, frames, seed, scale=1.5):
    return np.random.default_rng(seed).normal(0, scale, (rows, frames, JOINT)).astype(np.float32)


def hypotheses(result, row):
    return [
        tuple(result.tokens[row, k, : result.token_counts[row, k]].tolist())
        for k in range(result.scores.shape[1])
        if np.isfinite(result.scores[row, k])
    ]


def test_a_beam_of_everything_is_exact(blank=3):
    """All sequences of up to 3 of 3 labels, with the probability that the loss gives them."""
    tables = Tables(4, seed=blank, blank=blank)
    labels = [k for k in range(4) if k != blank]
    encoded = some_frames(3, 3, seed=1)
    mask = np.arange(3) < np.array([3, 2, 1])[:, None]
    padded = np.where(mask[..., None], encoded, np.nan)
    search = decoder(tables, beam=160, expansions=3, nbest=160, max_tokens=3)
    result = jax.device_get(search(padded, mask, NONE))
    sequences = [s for n in range(4) for s in itertools.product(labels, repeat=n)]
    for row, count in enumerate((3, 2, 1)):
        exact = {s: path_sum(tables, encoded[row, :count].astype(float), s) for s in sequences}
        found = hypotheses(result, row)
        assert set(found) == set(sequences) and len(found) == len(sequences)
        scores = result.scores[row, : len(found)]
        np.testing.assert_allclose(scores, [exact[s] for s in found], atol=2e-5)
        assert np.all(np.diff(scores) <= 0)


@pytest.mark.parametrize('beam', [1, 5])
def test_equals_the_plain_search(beam):
    tables = Tables(7, seed=beam)
    encoded = some_frames(4, 10, seed=beam)
    search = decoder(tables, beam=beam, expansions=3, nbest=beam, max_tokens=9, max_symbols=2)
    result = jax.device_get(search(encoded, np.ones((4, 10), bool), NONE))
    total = 0
    for row in range(4):
        plain = plain_search(tables, encoded[row].astype(float), beam, 3, longest=9, symbols=2)
        ranked = sorted(plain, key=lambda labels: -plain[labels][0])
        assert hypotheses(result, row) == ranked
        for k, labels in enumerate(ranked):
            acoustic, _, frames = plain[labels]
            assert result.scores[row, k] == pytest.approx(acoustic, abs=1e-4)
            assert result.token_start_frames[row, k, : len(labels)].tolist() == list(frames)
            ends = result.token_end_frames[row, k, : len(labels)]
            assert ends.tolist() == [frame + 1 for frame in frames]
            for u, frame in enumerate(frames):
                log_p = tables.log_probs(encoded[row, frame], labels[:u])
                entropy = -(np.exp(log_p) * log_p).sum() / np.log(7)
                confidence = result.token_confidence[row, k, u]
                assert confidence == pytest.approx(np.exp(log_p[labels[u]]), rel=1e-4)
                assert result.token_certainty[row, k, u] == pytest.approx(1 - entropy, abs=1e-4)
            total += len(labels)
    assert total > 4


def test_one_hypothesis_is_the_greedy_path():
    """A beam of one takes the most probable move at every point."""
    tables = Tables(6, seed=11)
    encoded = some_frames(5, 12, seed=11)
    search = decoder(tables, beam=1, expansions=1, max_symbols=12)
    result = jax.device_get(search(encoded, np.ones((5, 12), bool), NONE))
    lengths = set()
    for row in range(5):
        labels, frame, total = [], 0, 0.0
        while frame < 12:
            log_p = tables.log_probs(encoded[row, frame].astype(float), labels)
            if len(labels) == 12:
                log_p[1:] = -np.inf
            best, total = int(log_p.argmax()), total + log_p.max()
            if best:
                labels.append(best)
            else:
                frame += 1
        assert hypotheses(result, row) == [tuple(labels)]
        assert result.log_probability[row, 0] == pytest.approx(total, abs=1e-4)
        lengths.add(len(labels))
    assert len(lengths) > 2


def test_fusion_and_internal_language_model():
    """Ranks and scores with an n-gram model, the internal model subtracted and a length reward."""
    tables = Tables(8, seed=5)
    pieces = ['<pad>', '</s>', '<unk>', *'abcde']
    random = np.random.default_rng(0)
    text = [[pieces[3 + int(x) % 5] for x in random.geometric(0.4, 6)] for _ in range(30)]
    arpa = estimate(text, 3, pieces[3:])
    model, _ = ngram_model(arpa, pieces)
    config = FusionConfig(ngram_weight=0.6, internal_lm_weight=0.3, length_reward=0.2)
    fusion = make_fusion(config, ngram=model)

    def spelled(labels):
        return ['<s>', *(pieces[k] for k in labels)]

    def added(labels):
        outside = np.full(8, -np.inf)
        for k in range(2, 8):
            outside[k] = arpa.log10_probability(spelled(labels), pieces[k]) * np.log(10)
        return 0.6 * outside - 0.3 * np.where(np.arange(8) > 0, tables.internal(labels), 0) + 0.2

    def ending(labels):
        return 0.6 * arpa.log10_probability(spelled(labels), '</s>') * np.log(10)

    encoded = some_frames(3, 8, seed=6)
    mask = np.arange(8) < np.array([8, 6, 2])[:, None]
    search = decoder(tables, beam=5, expansions=4, nbest=5, max_tokens=8, max_symbols=8)
    result = jax.device_get(search(np.where(mask[..., None], encoded, np.nan), mask, fusion))
    for row, count in enumerate((8, 6, 2)):
        frames = encoded[row, :count].astype(float)
        plain = plain_search(tables, frames, 5, 4, added, ending, longest=8)
        found = hypotheses(result, row)
        assert set(found) == set(plain)
        for k, labels in enumerate(found):
            acoustic, fused, _ = plain[labels]
            assert result.log_probability[row, k] == pytest.approx(acoustic, abs=1e-4)
            assert result.lm_score[row, k] == pytest.approx(fused, abs=1e-4)
            outside = 0.6 * arpa.sentence([pieces[i] for i in labels])[0] + 0.2 * len(labels)
            inside = sum(tables.internal(labels[:u])[k] for u, k in enumerate(labels))
            assert fused == pytest.approx(outside - 0.3 * inside, abs=1e-6)
    first = result.token_counts[:, 0]
    inside = internal_lm_scores(tables.bound(), result.tokens[:, 0], first)
    for row in range(3):
        labels = hypotheses(result, row)[0]
        expected = sum(tables.internal(labels[:u])[k] for u, k in enumerate(labels))
        assert inside[row] == pytest.approx(expected, abs=1e-4)
    alone = plain_search(tables, encoded[0].astype(float), 5, 4, longest=8)
    assert hypotheses(result, 0)[0] != max(alone, key=lambda labels: alone[labels][0])


def test_padding_and_batch_mates_change_nothing():
    tables = Tables(6, seed=7)
    search = decoder(tables, beam=4, expansions=5, nbest=2, max_tokens=10)
    encoded = some_frames(4, 10, seed=7)
    mask = np.arange(10) < np.array([10, 6, 1, 0])[:, None]
    whole = jax.device_get(search(encoded, mask, NONE))
    # Two of the four, in another order, beside five more frames of NaN.
    chosen, padding = [2, 1], ((0, 0), (0, 5), (0, 0))
    wide = np.pad(np.where(mask[..., None], encoded, np.nan), padding, constant_values=np.nan)
    others = jax.device_get(search(wide[chosen], np.pad(mask, padding[:2])[chosen], NONE))
    for name in NBest._fields:
        expected, found = getattr(whole, name)[chosen], getattr(others, name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert whole.token_counts[3].tolist() == [0, 0]
    assert whole.scores[3].tolist() == [0.0, -np.inf]
