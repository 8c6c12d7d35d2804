"""SpecAugment's fractions, widths and limits by counting; speed and noise against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax import audio
from bigssl_jax.config import ConfigError

ROWS = 4000


def keys(count, seed=0):
    return audio.row_keys(jax.random.key(seed), jnp.arange(count))


def masks(config, length, frames=None, mels=80, rows=ROWS):
    """bool [rows, frames] and [rows, mels]: what was hidden, from ones and a length."""
    frames = frames or length
    mask = jnp.broadcast_to(jnp.arange(frames) < length, (rows, frames))
    out = audio.spec_augment(jnp.ones((rows, frames, mels)), mask, keys(rows), config)
    hidden = np.asarray(out) == 0
    return hidden[:, :length].all(2), hidden[:, :length].all(1), hidden


def test_one_frequency_mask_is_uniform_in_width_and_inside():
    config = audio.SpecAugmentConfig(freq_masks=1, time_masks=0)
    _, mels, hidden = masks(config, 4)
    widths = mels.sum(1)
    assert (hidden == mels[:, None, :]).all()  # a band spans all frames
    assert set(widths) == set(range(28))  # U{0..27}, both ends
    counts = np.bincount(widths, minlength=28)
    assert abs(counts / ROWS - 1 / 28).max() < 5 * np.sqrt(1 / 28 / ROWS)
    edges = np.diff(mels.astype(int), axis=1, prepend=0, append=0)
    assert ((edges == 1).sum(1) == (widths > 0)).all()  # one run
    # A band of width w starts anywhere in 0..80-w: its centre's mean is the middle of the axis.
    centres = [np.flatnonzero(row).mean() for row in mels if row.any()]
    assert abs(np.mean(centres) - 39.5) < 5 * np.std(centres) / np.sqrt(len(centres))


@pytest.mark.parametrize('length', [100, 220, 399, 57])
def test_one_time_mask_is_at_most_the_ratio_of_the_utterance(length):
    config = audio.SpecAugmentConfig(freq_masks=0, time_masks=1, time_ratio=0.05)
    frames, _, _ = masks(config, length, frames=400, mels=2)
    widths = frames.sum(1)
    longest = length * 5 // 100
    assert widths.max() == longest and widths.min() == 0
    counts = np.bincount(widths, minlength=longest + 1)
    p = 1 / (longest + 1)
    assert abs(counts / ROWS - p).max() < 5 * np.sqrt(p * (1 - p) / ROWS)


def test_the_default_hides_the_expected_fractions():
    length, mels = 400, 80
    frames, bins, hidden = masks(audio.SpecAugmentConfig(), length, mels=mels, rows=1500)

    def coverage(size, widest):
        """P(position hidden) by one span: width U{0..widest}, start U{0..size - width}."""
        total = np.zeros(size)
        for width in range(1, widest + 1):
            for start in range(size - width + 1):
                total[start : start + width] += 1 / (widest + 1) / (size - width + 1)
        return total

    for seen, size, widest, count in ((frames, length, 20, 10), (bins, mels, 27, 2)):
        expected = 1 - (1 - coverage(size, widest)) ** count
        assert abs(seen.mean() - expected.mean()) < 0.01
        assert abs(seen.mean(0) - expected).max() < 5 * np.sqrt(0.25 / 1500)
    assert (hidden == (frames[:, :, None] | bins[:, None, :])).all()


def test_time_masks_stay_inside_short_utterances_and_padding_is_untouched():
    lengths = jnp.array([0, 1, 19, 20, 40, 400])
    mask = jnp.arange(400) < lengths[:, None]
    features = jnp.where(mask[..., None], 1.0, jnp.nan)
    out = np.asarray(
        audio.spec_augment(
            jnp.broadcast_to(features, (6, 400, 8)),
            mask,
            keys(6),
            audio.SpecAugmentConfig(freq_masks=0, time_masks=50),
        )
    )
    assert np.isnan(out[~np.asarray(mask)]).all()
    hidden = (out == 0).all(2).sum(1)
    assert (hidden[:3] == 0).all()  # 5 % of 19 frames is no frame
    assert 0 < hidden[3] and 0 < hidden[5] < 400


def test_what_happens_to_a_row_depends_on_its_key_alone():
    config = audio.SpecAugmentConfig()
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(6, 300, 80)), jnp.float32)
    mask = jnp.arange(300) < jnp.array([300, 40, 200, 0, 150, 299])[:, None]
    rows = jnp.array([7, 3, 11, 2, 9, 1000])
    whole = audio.spec_augment(features, mask, audio.row_keys(jax.random.key(5), rows), config)
    some = np.array([4, 0])
    part = audio.spec_augment(
        features[some], mask[some], audio.row_keys(jax.random.key(5), rows[some]), config
    )
    np.testing.assert_array_equal(part, whole[some])
    other = audio.spec_augment(features, mask, audio.row_keys(jax.random.key(6), rows), config)
    assert (np.asarray(other) != np.asarray(whole)).any(axis=(1, 2))[[0, 1, 2, 4, 5]].all()


def test_more_mels_than_exist_cannot_be_hidden():
    config = audio.SpecAugmentConfig(freq_masks=3, freq_width=27, time_masks=0)
    _, bins, _ = masks(config, 3, mels=10, rows=300)
    assert bins.sum(1).max() == 10


def test_speed_changes_pitch_and_length_as_stated():
    rate, size, count = 16000, 20000, 12000
    time = np.arange(size) / rate
    wave = np.where(np.arange(size) < count, 8000 * np.sin(2 * np.pi * 440 * time), np.nan)
    for percent in (90, 100, 110):
        out, counts = audio.speed_perturb(
            jnp.asarray(wave[None], jnp.float32),
            jnp.array([count]),
            keys(1),
            audio.SpeedConfig(percents=(percent,)),
        )
        new = int(counts[0])
        assert new == count * 100 // percent
        assert not np.asarray(out[0, new:]).any()
        assert out.shape[1] == -(-size * 100 // percent)
        later = np.arange(out.shape[1]) / rate
        expected = 8000 * np.sin(2 * np.pi * 440 * percent / 100 * later)
        # The ends see the silence around the utterance.
        np.testing.assert_allclose(out[0, 20 : new - 20], expected[20 : new - 20], atol=25)


def test_speed_100_returns_the_samples_and_long_buffers_stay_exact():
    size = 480_000  # 30 s; a float32 position would be off by 1/32 sample at the end
    wave = np.random.default_rng(1).integers(-9000, 9000, (1, size)).astype(np.int16)
    config = audio.SpeedConfig(percents=(100,))
    out, counts = audio.speed_perturb(wave, jnp.array([size]), keys(1), config)
    assert counts[0] == size
    np.testing.assert_allclose(out, wave, atol=0.01)


def test_speeding_up_does_not_alias():
    size = 16000
    wave = 8000 * np.sin(2 * np.pi * 7600 / 16000 * np.arange(size))  # 8360 Hz at 110 %
    out, counts = audio.speed_perturb(
        jnp.asarray(wave[None], jnp.float32),
        jnp.array([size]),
        keys(1),
        audio.SpeedConfig(percents=(110,), half_taps=48),
    )
    assert np.abs(out[0, 100 : int(counts[0]) - 100]).max() < 8000 * 0.35


def test_speeds_are_drawn_evenly_per_row_and_a_full_buffer_loses_nothing():
    wave = jnp.ones((900, 200), jnp.float32)
    out, counts = audio.speed_perturb(
        wave, jnp.full(900, 200), keys(900), audio.SpeedConfig(half_taps=2)
    )
    values, seen = np.unique(counts, return_counts=True)
    np.testing.assert_array_equal(values, [181, 200, 222])
    assert np.abs(seen / 900 - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 900)
    slow = np.asarray(out)[np.asarray(counts) == 222]
    assert slow[:, 2:220].min() > 0.8  # up to the last taps, which see the silence behind


def test_noise_has_the_stated_ratio_and_probability():
    rows, size = 400, 4000
    rng = np.random.default_rng(2)
    wave = (rng.normal(size=(rows, size)) * 1000).astype(np.int16)
    counts = np.full(rows, 3000)
    config = audio.NoiseConfig(probability=0.5, low_db=10.0, high_db=20.0)
    out = np.asarray(audio.add_noise(wave, counts, keys(rows), config))
    assert not out[:, 3000:].any()
    noise = (out - wave)[:, :3000]
    used = noise.any(axis=1)
    assert abs(used.mean() - 0.5) < 5 * np.sqrt(0.25 / rows)
    clean = (wave[used, :3000].astype(float) ** 2).mean(1)
    decibels = 10 * np.log10(clean / (noise[used] ** 2).mean(1))
    assert decibels.min() > 9.5 and decibels.max() < 20.5
    assert abs(decibels.mean() - 15) < 5 * np.sqrt(100 / 12 / used.sum())


def test_noise_on_silence_is_silence():
    out = audio.add_noise(
        np.zeros((3, 50), np.int16),
        np.array([50, 0, 9]),
        keys(3),
        audio.NoiseConfig(probability=1.0),
    )
    assert not np.asarray(out).any()


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: audio.SpecAugmentConfig(time_ratio=1.5), 'time_ratio is 1.5'),
        (lambda: audio.SpecAugmentConfig(freq_masks=-1), 'freq_masks is -1'),
        (lambda: audio.SpeedConfig(percents=(10,)), 'percents is'),
        (lambda: audio.SpeedConfig(percents=(99.5, 100)), 'percents is .*whole numbers'),
        (lambda: audio.SpeedConfig(percents=()), 'percents is'),
        (lambda: audio.SpeedConfig(half_taps=0), 'half_taps is 0'),
        (lambda: audio.NoiseConfig(probability=2.0), 'probability is 2.0'),
        (lambda: audio.NoiseConfig(low_db=9.0, high_db=1.0), 'low_db=9.0'),
    ],
)
def test_bad_augmentation_is_one_clear_line(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
