"""BEST-RQ: the mask's statistics, the loss against numpy, what is scored, metrics and alarms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigssl_jax.audio import row_keys
from bigssl_jax.objectives import BestRQ
from bigssl_jax.objectives.best_rq import mask_features, masked_cross_entropy
from bigssl_jax.objectives.encoder_call import named_key, span_mask

SMALL = BestRQ(2, 64, 4, 0.08, 60.0, num_mels=16)


def keys_of(rows, seed=0):
    return row_keys(jax.random.key(seed), jnp.asarray(rows, jnp.int32))


def test_span_mask_equals_the_definition():
    real = np.arange(60) < np.array([60, 41, 0])[:, None]
    keys = keys_of([4, 9, 2])
    masked = np.asarray(span_mask(keys, jnp.asarray(real), 0.05, 7))
    for row, key in enumerate(keys):
        starts = np.asarray(jax.random.bernoulli(key, 0.05, (60,))) & real[row]
        expected = [bool(starts[max(0, t - 6) : t + 1].any() and real[row, t]) for t in range(60)]
        np.testing.assert_array_equal(masked[row], expected)
    assert masked[0].any() and not masked[2].any()


@pytest.mark.parametrize(('probability', 'span'), [(0.01, 40), (0.02, 30), (0.065, 10)])
def test_masked_fraction_is_that_of_the_formula(probability, span):
    masked = span_mask(keys_of(range(64)), jnp.ones((64, 2000), bool), probability, span)
    fraction = np.asarray(masked)[:, span:].mean()
    np.testing.assert_allclose(fraction, 1 - (1 - probability) ** span, rtol=0.05)


def test_mask_and_noise_do_not_depend_on_padding_or_batch_mates():
    features = np.random.default_rng(0).normal(size=(3, 50, 8)).astype(np.float32)
    real = jnp.arange(50) < jnp.array([50, 20, 33])[:, None]
    arguments = (0.05, 5, 0.1)
    noisy, masked = mask_features(jnp.asarray(features), real, keys_of([5, 6, 7]), *arguments)
    wide = jnp.pad(features, ((0, 0), (0, 37), (0, 0)), constant_values=9.0)
    wide_real = jnp.pad(real, ((0, 0), (0, 37)))
    wide_noisy, wide_masked = mask_features(wide, wide_real, keys_of([5, 6, 7]), *arguments)
    np.testing.assert_array_equal(wide_masked[:, :50], masked)
    assert not np.asarray(wide_masked[:, 50:]).any()
    np.testing.assert_array_equal(wide_noisy[:, :50], noisy)
    alone, _ = mask_features(jnp.asarray(features[1:2]), real[1:2], keys_of([6]), *arguments)
    np.testing.assert_array_equal(alone[0], noisy[1])


def test_masked_values_are_noise_and_the_rest_is_untouched():
    features = jnp.full((32, 400, 80), 5.0)
    real = jnp.arange(400) < 300
    noisy, masked = mask_features(
        features, jnp.broadcast_to(real, (32, 400)), keys_of(range(32)), 0.01, 40, 0.1
    )
    noisy, masked = np.asarray(noisy), np.asarray(masked)
    assert (noisy[~masked] == 5.0).all()
    assert abs(noisy[masked].mean()) < 0.001 and abs(noisy[masked].std() - 0.1) < 0.001
    assert not masked[:, 300:].any()
    own = masked[masked.any(1)]
    assert len(np.unique(own, axis=0)) == len(own) > 25  # every row its own mask


def softmax_twin(frames, kernel, bias, codes, scored):
    """float64: (mean over codebooks of summed cross-entropy, predictions)."""
    logits = np.einsum('btd,ndv->btnv', frames.astype(np.float64), kernel) + bias
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, codes[..., None], -1)[..., 0]
    return (nats * scored[..., None]).sum() / codes.shape[-1], logits.argmax(-1)


@pytest.mark.parametrize('codebooks', [1, 3])
def test_masked_cross_entropy_equals_numpy(codebooks):
    random = np.random.default_rng(0)
    frames = random.normal(size=(2, 9, 6)).astype(np.float32)
    kernel = random.normal(size=(codebooks, 6, 11)).astype(np.float32)
    bias = random.normal(size=(codebooks, 11)).astype(np.float32)
    codes = random.integers(0, 11, (2, 9, codebooks)).astype(np.int32)
    scored = random.random((2, 9)) < 0.5
    loss, predicted = jax.jit(masked_cross_entropy)(frames, kernel, bias, codes, scored)
    expected, best = softmax_twin(frames, kernel, bias, codes, scored)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(predicted)[scored], best[scored])


@pytest.mark.parametrize('codebooks', [1, 2])
def test_unscored_frames_may_hold_nan_and_other_targets(codebooks):
    random = np.random.default_rng(1)
    frames = random.normal(size=(2, 9, 6)).astype(np.float32)
    kernel = random.normal(size=(codebooks, 6, 11)).astype(np.float32)
    bias = np.zeros((codebooks, 11), np.float32)
    codes = random.integers(0, 11, (2, 9, codebooks)).astype(np.int32)
    scored = random.random((2, 9)) < 0.5
    function = jax.jit(
        jax.value_and_grad(lambda f, k, y: masked_cross_entropy(f, k, bias, y, scored)[0], (0, 1))
    )
    clean = function(frames, kernel, codes)
    frames[~scored] = np.nan
    codes[~scored] = (codes[~scored] + 5) % 11
    dirty = function(frames, kernel, codes)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)  # bit-identical
    assert not np.asarray(dirty[1][0])[~scored].any()


def test_totals_score_exactly_the_masked_whole_stacks(bench, batches):
    params, constants = bench.init(SMALL)
    batch = batches(counts=(8000, 5000))
    totals, _ = bench.gradient(SMALL, params, constants, batch)
    frames = [1 + (n - 400) // 160 for n in (8000, 5000)]
    assert totals['frames'] == sum(n // 4 for n in frames)
    real = jnp.arange(frames[0]) < jnp.array(frames)[:, None]
    keys = row_keys(named_key(jax.random.key(3), 'mask'), batch['rows'])
    masked = np.asarray(span_mask(keys, real, 0.08, 6))  # 60 ms are 6 frames of 10 ms
    expected = sum(
        masked[row, 4 * i : 4 * i + 4].any() for row in (0, 1) for i in range(frames[row] // 4)
    )
    assert totals['masked'] == totals['weight'] == expected > 0
    assert (totals['code_counts'].sum(-1) == expected).all()
    assert (totals['predicted_counts'].sum(-1) == expected).all()
    assert totals['loss'] / totals['weight'] < np.log(64) + 2


def test_targets_come_from_unmasked_audio(bench, batches):
    """Codes must not move with the mask: other keys, other masks, same code per frame."""
    objective = BestRQ(1, 64, 4, 0.9, 100.0, num_mels=16)  # masks practically everything
    params, constants = bench.init(objective)
    first, _ = bench.gradient(objective, params, constants, batches(counts=(8000,)), key=1)
    other, _ = bench.gradient(objective, params, constants, batches(counts=(8000,)), key=2)
    assert first['masked'] == other['masked'] == first['frames']
    np.testing.assert_array_equal(first['code_counts'], other['code_counts'])
    assert first['loss'] != other['loss']


def totals_of(code_counts, correct=0, masked=None):
    counts = np.atleast_2d(code_counts)
    masked = int(counts[0].sum()) if masked is None else masked
    return {
        'loss': np.float32(2.0 * masked),
        'weight': np.float32(masked),
        'correct': correct,
        'masked': masked,
        'frames': 4 * masked,
        'code_counts': counts,
        'predicted_counts': np.eye(len(counts), counts.shape[1], dtype=int) * masked,
    }


def test_summary_in_closed_form():
    objective = BestRQ(2, 4)
    summary = objective.summarise(totals_of([[50, 50, 50, 50], [100, 100, 0, 0]], correct=60))
    assert summary['loss'] == 2.0
    np.testing.assert_allclose(summary['masked_accuracy'], 60 / 400)
    np.testing.assert_allclose(summary['chance'], (0.25 + 0.5) / 2)
    np.testing.assert_allclose(summary['masked_fraction'], 0.25)
    np.testing.assert_allclose(summary['code_perplexity'], (4 + 2) / 2)
    np.testing.assert_allclose(summary['codes_used'], (1 + 0.5) / 2)
    np.testing.assert_allclose(summary['code_entropy_share'], np.log(2) / np.log(4))
    np.testing.assert_allclose(summary['predicted_perplexity'], 1.0)


def test_health_speaks_only_when_something_is_wrong():
    objective = BestRQ(1, 8)
    assert objective.health(objective.summarise(totals_of([40] * 8)), step=1) is None
    collapsed = objective.health(objective.summarise(totals_of([397, 1, 1, 1, 0, 0, 0, 0])), step=1)
    assert collapsed and 'collapsed' in collapsed and 'feature_mean' in collapsed
    # A few frames say nothing about a codebook.
    assert (
        objective.health(objective.summarise(totals_of([20, 0, 0, 0, 0, 0, 0, 0])), step=1) is None
    )
    nothing = objective.health(objective.summarise(totals_of([0] * 8)), step=1)
    assert nothing and 'mask_start_probability' in nothing


def test_alarm_catches_missing_normalisation(bench, batches):
    """The classic mistake, on the real path: raw log-mel goes to the quantizer."""
    objective = BestRQ(1, 512, 16, 0.5, 100.0, num_mels=16)
    params, constants = bench.init(objective)
    batch = batches(counts=(16000,) * 12, size=16000)

    @jax.jit
    def totals(mean, std):
        statistics = {'feature_mean': mean, 'feature_std': std}
        encode = dataclasses.replace(bench.encode(), constants=statistics)
        return objective.totals(encode, params['head'], constants, batch, jax.random.key(0))

    none = jnp.zeros(16), jnp.ones(16)
    raw = dataclasses.replace(
        bench.encode(), constants={'feature_mean': none[0], 'feature_std': none[1]}
    )
    features, mask = jax.jit(raw.features)(batch)
    rows = np.asarray(features)[np.asarray(mask)]
    good = objective.summarise(jax.device_get(totals(rows.mean(0), rows.std(0))))
    assert objective.health(good, step=1) is None
    bad = objective.summarise(jax.device_get(totals(*none)))
    assert 'collapsed' in objective.health(bad, step=1)


# Every 20 steps of `make quickstart`, two cores, seed 0: step, accuracy, chance, perplexity of the
# predictions; 4000 scored frames each.
HEALTHY = (
    (20, 0.0235, 0.1014, 12.94), (40, 0.0845, 0.0994, 2.65), (60, 0.0942, 0.0957, 1.49),
    (80, 0.0918, 0.0954, 1.53), (100, 0.0944, 0.0944, 1.71), (120, 0.0847, 0.0841, 2.16),
    (140, 0.0913, 0.0855, 2.83), (160, 0.1044, 0.0919, 3.44), (200, 0.1259, 0.0949, 4.45),
    (320, 0.1439, 0.0979, 8.94), (520, 0.1696, 0.0827, 13.72), (1020, 0.2120, 0.0930, 17.96),
)  # fmt: skip


def predicted(objective, accuracy, chance, perplexity, frames=4000):
    """A summary of healthy targets with these predictions."""
    targets = objective.summarise(totals_of([[frames // 64] * 64] * objective.num_codebooks))
    return targets | {
        'masked_accuracy': accuracy,
        'chance': chance,
        'predicted_perplexity': perplexity,
        'masked_frames': float(frames),
    }


def test_a_healthy_run_is_never_alarmed_once_the_warm_up_is_over():
    objective = BestRQ(4, 64, collapse_after_steps=140)
    for step, *figures in HEALTHY:
        assert objective.health(predicted(objective, *figures), step) is None
    # The same curve does look collapsed in its beginning, which is what the window is for.
    hasty = dataclasses.replace(objective, collapse_after_steps=0)
    alarms = [step for step, *f in HEALTHY if hasty.health(predicted(hasty, *f), step)]
    assert alarms == [20, 40, 60, 80, 100]


@pytest.mark.parametrize(
    ('accuracy', 'chance', 'perplexity'),
    [(0.09, 0.09, 1.0), (0.005, 0.09, 1.0), (0.1, 0.09, 1.2), (0.08, 0.09, 30.0)],
    ids=['the most frequent code', 'another code', 'nearly one code', 'codes at random'],
)
def test_collapsed_predictions_are_noticed_after_the_warm_up(accuracy, chance, perplexity):
    objective = BestRQ(1, 64, collapse_after_steps=1000)
    summary = predicted(objective, accuracy, chance, perplexity)
    assert objective.health(summary, 999) is None
    advice = objective.health(summary, 1000)
    assert advice and 'predictions have collapsed' in advice
    for word in ('min_predicted_perplexity=1.5', 'collapse_after_steps (1000)', 'learning rate'):
        assert word in advice
    # So few frames tell nothing of how frequent a code is.
    assert objective.health(predicted(objective, accuracy, chance, perplexity, 640), 1000) is None


def test_an_encoder_that_is_deaf_collapses_and_is_noticed(bench):
    """On the real path: a head that hears nothing learns the most frequent code, and no more."""
    objective = BestRQ(
        1, 64, 8, 0.04, 80.0, num_mels=16, collapse_after_steps=5, min_entropy_share=0.1
    )
    params, constants = bench.init(objective)
    batch = tone_batch(rows=16)
    totals, _ = bench.gradient(objective, params, constants, batch, augment=False)
    counts = totals['code_counts'][0]
    deaf = {
        'kernel': jnp.zeros_like(params['head']['kernel']),
        'bias': jnp.log(jnp.asarray(counts, jnp.float32) + 1e-3)[None],
    }
    params = {**params, 'head': deaf}
    total = None
    for key in range(16):
        totals, _ = bench.gradient(objective, params, constants, batch, key=key, augment=False)
        total = totals if total is None else jax.tree.map(np.add, total, totals)
    summary = objective.summarise(total)
    assert summary['masked_frames'] > 1000
    assert summary['masked_accuracy'] == pytest.approx(summary['chance'])
    assert objective.health(summary, step=4) is None
    assert 'predictions have collapsed' in objective.health(summary, step=5)


def tone_batch(rows=8, size=12000):
    """Tones of 80 ms in a cycle of five with random start: the masked ones can be inferred."""
    random = np.random.default_rng(0)
    time = np.arange(size) / 16000
    audio = np.zeros((rows, size))
    for row in range(rows):
        tone = (np.arange(size) // 1280 + random.integers(5)) % 5
        hertz = np.array([220.0, 500.0, 1100.0, 2300.0, 4500.0])[tone]
        audio[row] = 6000 * np.sin(2 * np.pi * hertz * time) + 300 * random.normal(size=size)
    counts = np.full(rows, size, np.int32)
    rows = np.arange(rows, dtype=np.int32)
    return {'audio': audio.astype(np.int16), 'sample_counts': counts, 'rows': rows}


def test_masked_tones_are_learnt(bench):
    objective = BestRQ(1, 64, 8, 0.04, 80.0, num_mels=16)
    params, constants = bench.init(objective)
    batch = tone_batch()
    optimizer = optax.adam(1e-2)
    slots = optimizer.init(params)
    update = jax.jit(optimizer.update)
    summaries = []
    for step in range(120):
        totals, gradient = bench.gradient(
            objective, params, constants, batch, key=step, augment=False
        )
        gradient = jax.tree.map(lambda g, n=totals['weight']: g / n, gradient)
        change, slots = update(gradient, slots)
        params = optax.apply_updates(params, change)
        summaries.append(objective.summarise(totals))
    first, last = summaries[0], {k: np.mean([s[k] for s in summaries[-10:]]) for k in summaries[0]}
    assert last['loss'] < 0.75 * min(first['loss'], np.log(64))
    assert last['masked_accuracy'] > 1.5 * last['chance']
    assert last['predicted_perplexity'] > 2


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'codebook_size': 0}, 'codebook_size'),
        ({'mask_start_probability': 1.5}, 'mask_start_probability'),
        ({'mask_span_ms': 0}, 'mask_span_ms'),
        ({'collapse_after_steps': -1}, 'collapse_after_steps'),
        ({'min_predicted_perplexity': 0.5}, 'min_predicted_perplexity'),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        BestRQ(**fields)
