"""CTC against a sum over all paths, the impossible pairs, and what padding may hold."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.objectives import CTC
from bigssl_jax.objectives.ctc import ctc_loss, ctc_valid


def collapse(path, blank):
    return tuple(k for k, _ in itertools.groupby(path) if k != blank)


def brute_force(logits, labels, blank):
    """-log of the summed probability of all paths [T] that collapse to `labels`; inf if none."""
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    frames, vocabulary = logits.shape
    total = sum(
        np.exp(sum(log_p[t, k] for t, k in enumerate(path)))
        for path in itertools.product(range(vocabulary), repeat=frames)
        if collapse(path, blank) == tuple(labels)
    )
    return -np.log(total) if total else np.inf


def all_cases(vocabulary, blank, most_frames=4, most_labels=3):
    alphabet = [k for k in range(vocabulary) if k != blank]
    return [
        (frames, labels)
        for frames in range(most_frames + 1)
        for count in range(most_labels + 1)
        for labels in itertools.product(alphabet, repeat=count)
    ]


@pytest.mark.parametrize('blank', [0, 2])
def test_loss_and_validity_equal_the_sum_over_paths(blank):
    cases = all_cases(3, blank)
    random = np.random.default_rng(0)
    logits = random.normal(size=(len(cases), 4, 3)).astype(np.float32) * 2
    labels = random.integers(0, 3, (len(cases), 5)).astype(np.int32)  # padding holds anything
    mask = np.zeros((len(cases), 4), bool)
    counts = np.zeros(len(cases), np.int32)
    expected = np.zeros(len(cases))
    for i, (frames, wanted) in enumerate(cases):
        mask[i, :frames] = True
        counts[i] = len(wanted)
        labels[i, : len(wanted)] = wanted
        expected[i] = brute_force(logits[i, :frames].astype(np.float64), wanted, blank)
    valid = np.asarray(ctc_valid(labels, counts, mask, 3, blank))
    np.testing.assert_array_equal(valid, np.isfinite(expected))
    assert valid.any() and not valid.all()
    logits[~mask] = np.nan
    logits[~valid] = np.nan

    def total(logits):
        losses = ctc_loss(logits, mask, labels, counts, valid, blank)
        return jnp.sum(losses), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(logits)
    np.testing.assert_allclose(losses, np.where(valid, expected, 0.0), rtol=1e-4, atol=1e-5)
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all()
    assert not gradient[~valid].any() and not gradient[~mask].any()
    # Softmax leaves the gradient without a mean over the vocabulary.
    np.testing.assert_allclose(gradient.sum(-1), 0.0, atol=1e-5)


def test_gradient_equals_finite_differences():
    random = np.random.default_rng(1)
    logits = random.normal(size=(1, 4, 3))
    mask, labels = np.ones((1, 4), bool), np.array([[1, 1]], np.int32)
    counts, valid = np.array([2], np.int32), np.array([True])
    gradient = jax.grad(lambda x: jnp.sum(ctc_loss(x, mask, labels, counts, valid)))(
        jnp.asarray(logits, jnp.float32)
    )
    for t, v in itertools.product(range(4), range(3)):
        step = np.zeros_like(logits)
        step[0, t, v] = 1e-5
        up, down = (brute_force((logits + s)[0], (1, 1), 0) for s in (step, -step))
        np.testing.assert_allclose(gradient[0, t, v], (up - down) / 2e-5, atol=1e-4)


def test_labels_outside_the_vocabulary_are_invalid():
    mask = np.ones((4, 9), bool)
    labels = np.array([[1, 2], [1, 0], [1, 7], [-1, 2]], np.int32)
    valid = ctc_valid(labels, np.full(4, 2, np.int32), mask, 7, 0)
    np.testing.assert_array_equal(valid, [True, False, False, False])


def test_totals_count_what_is_valid(bench, batches):
    objective = CTC(6)
    params, constants = bench.init(objective)
    batch = batches(counts=(8000, 700, 8000, 0, 8000, 5000))
    batch['label_counts'][:] = [3, 3, 0, 0, 2, 2]  # row 1 has one frame for three labels
    batch['labels'][:] = [1, 2, 2, 0, 0, 0]
    batch['labels'][5, 0] = 6  # not in the vocabulary
    totals, gradient = bench.gradient(objective, params, constants, batch, augment=False)
    assert totals['utterances'] == 5 and totals['invalid'] == 2
    assert totals['labels'] == 5 and totals['frames'] == 3 * 12
    assert totals['weight'] == 5
    other = CTC(6, normalise='utterance')
    per_utterance = jax.jit(
        lambda p: other.totals(bench.encode(), p, {}, batch, jax.random.key(3))
    )(params['head'])
    assert per_utterance['weight'] == 3
    np.testing.assert_allclose(per_utterance['loss'], totals['loss'], rtol=1e-5)
    # Invalid rows leave no trace: the same batch without them.
    kept = {name: value[[0, 2, 4]] for name, value in batch.items()}
    same, same_gradient = bench.gradient(objective, params, constants, kept, augment=False)
    np.testing.assert_allclose(totals['loss'], same['loss'], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(b).max()))
    summary = objective.summarise(totals)
    np.testing.assert_allclose(summary['invalid_fraction'], 0.4)
    np.testing.assert_allclose(summary['loss_per_utterance'], totals['loss'] / 3, rtol=1e-6)
    assert '40%' in objective.health(summary, step=1)
    assert objective.health(objective.summarise(same), step=1) is None


def test_loss_is_that_of_the_predicted_logits(bench, batches):
    objective = CTC(6)
    params, constants = bench.init(objective)
    batch = batches(counts=(3000, 2500))
    totals, _ = bench.gradient(objective, params, constants, batch, augment=False)
    predict = jax.jit(lambda p, b: objective.predict(bench.encode(), p, b))
    logits, mask = predict(params['head'], batch)
    assert logits.dtype == np.float32 and logits.shape[-1] == 6
    expected = sum(
        brute_force(
            np.asarray(logits, np.float64)[i][np.asarray(mask)[i]],
            batch['labels'][i, : batch['label_counts'][i]],
            0,
        )
        for i in range(2)
    )
    np.testing.assert_allclose(totals['loss'], expected, rtol=1e-4)


def test_prediction_is_deterministic_in_spite_of_dropout(bench_with_dropout, batches):
    bench, objective = bench_with_dropout, CTC(6, dropout=0.5)
    params, _ = bench.init(objective)
    predict = jax.jit(lambda p, b: objective.predict(bench.encode(), p, b)[0])
    batch = batches(counts=(3000,), size=3000)
    np.testing.assert_array_equal(predict(params['head'], batch), predict(params['head'], batch))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'normalise': 'token'}, 'normalise'),
        ({'blank_id': 5}, 'blank_id'),
        ({'dropout': 1.0}, 'dropout'),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CTC(5, **fields)
