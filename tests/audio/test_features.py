"""log_mel against Kaldi's stored filter banks; frames, padding, statistics, normalisation."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax import audio
from bigssl_jax.config import ConfigError

FIXTURE = np.load(pathlib.Path(__file__).with_name('fbank_fixture.npz'))
PARAMETERS = json.loads(str(FIXTURE['parameters']))


@pytest.mark.parametrize('case', range(len(PARAMETERS)))
@pytest.mark.parametrize('dtype', [np.int16, np.float32])
def test_log_mel_equals_kaldi(case, dtype):
    config = audio.AudioConfig(**PARAMETERS[case])
    expected = FIXTURE[f'features{case}']
    wave = jnp.asarray(FIXTURE['wave'].astype(dtype))[None]
    features, counts = audio.log_mel(wave, jnp.array([wave.shape[1]]), config)
    assert features.dtype == jnp.float32 and counts.dtype == jnp.int32
    assert counts[0] == len(expected) == audio.frame_count(wave.shape[1], config)
    np.testing.assert_allclose(features[0], expected, atol=5e-3, rtol=0)


def test_a_large_offset_does_not_cost_precision():
    config = audio.AudioConfig()
    wave = FIXTURE['wave'].astype(np.float32)
    plain, _ = audio.log_mel(wave[None], jnp.array([6000]), config)
    shifted, _ = audio.log_mel(wave[None] + 8000, jnp.array([6000]), config)
    np.testing.assert_allclose(shifted, plain, atol=5e-3, rtol=0)


def test_padding_and_batch_mates_change_nothing():
    config = audio.AudioConfig()
    wave = FIXTURE['wave'].astype(np.float32)
    counts = np.array([6000, 3333, 399, 0], np.int32)
    batch = np.full((4, 7000), np.nan, np.float32)
    for row, count in zip(batch, counts, strict=True):
        row[:count] = wave[:count]
    features, frames = audio.log_mel(batch, counts, config)
    np.testing.assert_array_equal(frames, [36, 19, 0, 0])
    for row, count, real in zip(features, counts, frames, strict=True):
        assert not np.asarray(row[real:]).any()
        if real:
            alone, _ = audio.log_mel(wave[None, :count], np.array([count]), config)
            assert alone.shape[1] == real
            np.testing.assert_allclose(row[:real], alone[0], atol=2e-4)


def test_frame_count_of_ints_numpy_and_jax_agree_with_windows_that_fit():
    config = audio.AudioConfig()
    samples = np.array([0, 399, 400, 559, 560, 16000])
    expected = [sum(1 for t in range(200) if t * 160 + 400 <= s) for s in samples]
    assert [audio.frame_count(int(s), config) for s in samples] == expected
    np.testing.assert_array_equal(audio.frame_count(samples, config), expected)
    np.testing.assert_array_equal(audio.frame_count(jnp.asarray(samples), config), expected)


def test_an_utterance_shorter_than_a_window_has_no_frames():
    features, counts = audio.log_mel(
        np.zeros((2, 100), np.int16), np.array([100, 0]), audio.AudioConfig()
    )
    assert features.shape == (2, 0, 80) and not np.asarray(counts).any()


def test_silence_is_the_floor():
    features, _ = audio.log_mel(np.zeros((1, 800), np.int16), [800], audio.AudioConfig())
    np.testing.assert_allclose(features, np.log(np.finfo(np.float32).eps), rtol=1e-6)


def test_the_mel_products_are_float32_at_highest_precision():
    text = (
        jax.jit(lambda w, n: audio.log_mel(w, n, audio.AudioConfig()))
        .lower(jnp.zeros((2, 800), jnp.int16), jnp.zeros(2, jnp.int32))
        .as_text()
    )
    products = [line for line in text.splitlines() if 'stablehlo.dot_general' in line]
    assert len(products) == 2
    assert all('HIGHEST' in line and 'bf16' not in line for line in products)


def test_totals_add_up_over_batches_and_normalise_to_mean_0_std_1():
    rng = np.random.default_rng(3)
    features = (rng.normal(size=(5, 40, 7)) * [1, 2, 3, 4, 5, 6, 0] + 9).astype(np.float32)
    counts = np.array([40, 11, 0, 25, 3])
    mask = np.arange(40) < counts[:, None]
    padded = np.where(mask[..., None], features, np.nan)
    parts = [audio.feature_statistics(padded[i : i + 2], mask[i : i + 2]) for i in range(0, 5, 2)]
    totals = [sum(np.asarray(p[k], np.float64) for p in parts) for k in range(3)]
    real = features[mask].astype(np.float64)
    assert totals[2] == counts.sum()
    statistics = audio.Statistics.from_totals(*totals)
    np.testing.assert_allclose(statistics.mean, real.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.std[:6], real.std(0)[:6], rtol=1e-4)
    assert statistics.std[6] == 1.0  # a constant dimension is shifted, not blown up
    scaled = np.asarray(audio.normalise(padded, mask, statistics.mean, statistics.std))
    assert not scaled[~mask].any()
    np.testing.assert_allclose(scaled[mask].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled[mask].std(0)[:6], 1, atol=1e-4)


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match='no real frame'):
        audio.Statistics.from_totals(np.zeros(3), np.zeros(3), 0)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'window': 'hamming'}, "window is 'hamming'"),
        ({'high_hz': 9000.0}, 'high_hz=9000'),
        ({'hop_ms': 30.0}, 'hop_ms=30'),
        ({'num_mels': 0}, 'num_mels is 0'),
    ],
)
def test_a_bad_front_end_is_one_clear_line(fields, message):
    with pytest.raises(ConfigError, match=message):
        audio.AudioConfig(**fields)
