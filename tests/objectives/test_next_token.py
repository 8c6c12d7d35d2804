"""The language model's loss against its definition; what weighs nothing changes nothing."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.models.language_model import LanguageModel
from bigssl_jax.objectives.next_token import NextToken

OBJECTIVE = NextToken(7, num_layers=1, model_dim=8, num_heads=2, dropout=0.0)


@functools.cache
def parameters():
    shapes = jax.eval_shape(lambda: OBJECTIVE.init_params(jax.random.key(0), None))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * 0.5, nn.unbox(shapes)
    )


def batch_of(*sentences, words=None, width=5):
    labels = np.zeros((len(sentences), width), np.int32)
    for row, sentence in enumerate(sentences):
        labels[row, : len(sentence)] = sentence
    return {
        'labels': labels,
        'label_counts': np.array([len(s) for s in sentences], np.int32),
        'word_counts': np.array(words or [1] * len(sentences), np.int32),
        'rows': np.arange(len(sentences), dtype=np.int32),
    }


totals = jax.jit(lambda params, batch: OBJECTIVE.totals(None, params, {}, batch, jax.random.key(1)))


@jax.jit
def logits_of(tokens, counts):
    return LanguageModel(OBJECTIVE.config).apply({'params': parameters()}, tokens, counts)


def nats(sentence):
    """-log P(sentence </s>) by the chain rule, one distribution at a time."""
    tokens, total = batch_of(sentence)['labels'], 0.0
    logits = np.asarray(logits_of(tokens, np.array([len(sentence)])), np.float64)[0]
    for row, target in zip(logits, [*sentence, 1], strict=False):  # what follows is padding
        e = np.exp(row[1:] - row[1:].max())  # id 0 is no token of any text
        total -= np.log(e[target - 1] / e.sum())
    return total


def test_the_loss_is_the_sum_over_sentences_and_their_ends():
    sentences = [3, 4, 5], [6], [2, 2, 2, 3, 1]
    found = totals(parameters(), batch_of(*sentences, words=[2, 1, 3]))
    assert float(found['loss']) == pytest.approx(sum(map(nats, sentences)), rel=1e-4)
    assert (float(found['weight']), float(found['words'])) == (3 + 1 + 5 + 3, 2 + 1 + 3 + 3)
    summary = OBJECTIVE.summarise(found)
    assert summary['perplexity'] == pytest.approx(np.exp(float(found['loss']) / 12), rel=1e-4)
    assert summary['word_perplexity'] == pytest.approx(np.exp(float(found['loss']) / 9), rel=1e-4)


def test_fillers_unknown_tokens_and_padding_weigh_nothing():
    good_rows = batch_of([3, 4], [5], [], [], [], [])  # as many rows: one program
    good = totals(parameters(), good_rows)
    spoilt = batch_of([3, 4], [5], [], [3, 9], [0, 3], [-1])
    spoilt['labels'][0, 2:], spoilt['labels'][2] = 99, -7
    found = totals(parameters(), spoilt)
    for name in ('loss', 'weight', 'words', 'sentences'):
        assert float(found[name]) == pytest.approx(float(good[name]), rel=1e-5)
    assert (int(found['sentences']), int(found['invalid'])) == (2, 3)

    def loss(params, batch):
        return OBJECTIVE.totals(None, params, {}, batch, jax.random.key(1))['loss']

    gradient = jax.jit(jax.grad(loss))
    for a, b in zip(
        *(jax.tree.leaves(gradient(parameters(), x)) for x in (spoilt, good_rows)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_dropout_is_for_training_alone():
    objective = NextToken(7, num_layers=1, model_dim=8, num_heads=2, dropout=0.5)
    batch = batch_of([3, 4, 5])
    trained = jax.jit(lambda key: objective.totals(None, parameters(), {}, batch, key)['loss'])
    assert len({float(trained(jax.random.key(n))) for n in range(3)}) == 3
    scored = jax.jit(objective.score)(parameters(), batch)
    assert float(scored['loss']) == pytest.approx(nats([3, 4, 5]), rel=1e-4)


def test_health_and_bad_fields():
    assert OBJECTIVE.health({'loss': 3.0}, 1000) and not OBJECTIVE.health({'loss': 3.0}, 10)
    assert not OBJECTIVE.health({'loss': 1.0}, 1000)
    with pytest.raises(ValueError, match='next_token: .*lm-huge'):
        NextToken(7, preset='lm-huge')
    assert OBJECTIVE.summarise(
        {'loss': 0.0, 'weight': 0.0, 'words': 0.0, 'sentences': 0, 'invalid': 3}
    )['invalid'] == 3  # fmt: skip
