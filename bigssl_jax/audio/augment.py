"""Augmentation: SpecAugment on features; speed perturbation and noise on waveforms.

Every function takes one random key per row (`row_keys`), made from a named key, the step and
the row's number in the global batch. What happens to an utterance therefore does not depend on
its batch mates, on the number of hosts, or on how rows lie on devices.

Shape letters: B batch, S samples, T frames, F mel bins, M masks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bigssl_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class SpecAugmentConfig:
    """SpecAugment (arXiv 1904.08779) with adaptive time masks (arXiv 1912.05533).

    freq_masks masks of U{0..freq_width} mel bins; time_masks masks of U{0..floor(time_ratio *
    frames of the utterance)} frames. No time warping.
    """

    freq_masks: int = 2
    freq_width: int = 27
    time_masks: int = 10
    time_ratio: float = 0.05

    def __post_init__(self) -> None:
        for name in ('freq_masks', 'freq_width', 'time_masks'):
            if getattr(self, name) < 0:
                raise ConfigError(f'spec_augment.{name} is {getattr(self, name)}; it must be >= 0')
        if not 0.0 <= self.time_ratio <= 1.0:
            raise ConfigError(f'spec_augment.time_ratio is {self.time_ratio}; allowed: 0 to 1')


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """Speeds in per cent of the original, one drawn uniformly per row; 110 is faster, shorter."""

    percents: tuple[int, ...] = (90, 100, 110)
    half_taps: int = 12

    def __post_init__(self) -> None:
        whole = all(type(p) is int and 50 <= p <= 200 for p in self.percents)
        if not self.percents or not whole:
            raise ConfigError(
                f'speed_perturb.percents is {self.percents}; give whole numbers in 50..200'
            )
        if self.half_taps < 1:
            raise ConfigError(f'speed_perturb.half_taps is {self.half_taps}; it must be >= 1')

    def room(self, samples: int) -> int:
        """Samples that a buffer needs so that the slowest version of `samples` fits."""
        return -(-samples * 100 // min(self.percents))


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """White noise with `probability`, at a signal-to-noise ratio uniform in [low_db, high_db]."""

    probability: float = 0.5
    low_db: float = 10.0
    high_db: float = 30.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ConfigError(f'noise.probability is {self.probability}; allowed: 0 to 1')
        if self.low_db > self.high_db:
            raise ConfigError(f'noise.low_db={self.low_db} is above noise.high_db={self.high_db}')


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """One key per row: fold_in(key, row), rows int32 [B] = row number in the global batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def spec_augment(
    features: jax.Array, mask: jax.Array, keys: jax.Array, config: SpecAugmentConfig
) -> jax.Array:
    """Zeroes random bands of mel bins and spans of frames, of [B, T, F] normalised features.

    0 is the training set's mean after `normalise`. Spans lie wholly inside the utterance, and
    padding is returned as it came.
    """
    num_frames, num_mels = features.shape[1:]
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)

    def hidden(key: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        freq_key, time_key = jax.random.split(key)
        mels = jnp.int32(num_mels)
        widest = jnp.minimum(jnp.int32(config.freq_width), mels)
        # A float product alone could fall just below a whole number (0.05 * 100).
        longest = jnp.floor(length * config.time_ratio + 1e-4).astype(jnp.int32)
        return (
            _hidden(freq_key, config.freq_masks, widest, mels, num_mels),
            _hidden(time_key, config.time_masks, longest, length, num_frames),
        )

    mels, frames = jax.vmap(hidden)(keys, lengths)
    drop = (mels[:, None, :] | frames[:, :, None]) & mask[..., None]
    return jnp.where(drop, jnp.zeros((), features.dtype), features)


def _hidden(
    key: jax.Array, count: int, widest: jax.Array, length: jax.Array, size: int
) -> jax.Array:
    """bool [size]: the union of `count` spans, width U{0..widest}, start U{0..length - width}."""
    width_key, start_key = jax.random.split(key)
    widths = jax.random.randint(width_key, (count, 1), 0, widest + 1)
    starts = jax.random.randint(start_key, (count, 1), 0, length - widths + 1)
    positions = jnp.arange(size)
    return jnp.any((positions >= starts) & (positions < starts + widths), axis=0)


def speed_perturb(
    waveform: jax.Array, sample_counts: jax.Array, keys: jax.Array, config: SpeedConfig
) -> tuple[jax.Array, jax.Array]:
    """Resamples every row by a random factor: new counts, in a buffer that holds the slowest.

    Args:
        waveform: [B, S] int16 or float32; samples after the count are ignored.
        sample_counts: int32 [B]. keys: [B].
    Returns:
        float32 [B, config.room(S)], zero after the new count; int32 [B] new counts,
        floor(count 100 / p). A buffer of S samples would cut the end off a slowed utterance that
        fills it, and the transcript would no longer be that of the audio.

    Sample i is read at position i p / 100, held exactly as whole part and remainder (a float32
    position would be off by 1/32 sample after 30 s), through a Hann-windowed sinc that also
    cuts what would alias when speeding up.
    """
    size, room = waveform.shape[1], config.room(waveform.shape[1])
    percents = jnp.asarray(config.percents, jnp.int32)
    choice = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(config.percents)))(keys)
    filters = jnp.asarray(_sinc_filters(config))
    real = jnp.arange(size) < sample_counts[:, None]
    source = jnp.where(real, waveform.astype(jnp.float32), 0.0)

    def resample(row: jax.Array, pick: jax.Array) -> jax.Array:
        padded = jnp.pad(row, config.half_taps)
        position = jnp.arange(room) * percents[pick]
        base, phase = position // 100, position % 100
        offsets = jnp.arange(1 - config.half_taps, config.half_taps + 1)
        taps = padded[base[:, None] + offsets + config.half_taps]
        return jnp.sum(taps * filters[pick, phase], axis=-1)

    counts = (sample_counts * 100 // percents[choice]).astype(jnp.int32)
    resampled = jax.vmap(resample)(source, choice)
    return jnp.where(jnp.arange(room) < counts[:, None], resampled, 0.0), counts


def _sinc_filters(config: SpeedConfig) -> np.ndarray:
    """float32 [speeds, 100 phases, 2 half_taps]; every filter sums to 1 (a constant stays)."""
    offsets = np.arange(1 - config.half_taps, config.half_taps + 1)
    distance = offsets - np.arange(100)[:, None] / 100.0
    window = np.cos(np.pi * distance / (2 * config.half_taps)) ** 2
    cutoff = np.minimum(1.0, 100.0 / np.asarray(config.percents))[:, None, None]
    filters = np.sinc(cutoff * distance) * window
    return (filters / filters.sum(axis=-1, keepdims=True)).astype(np.float32)


def add_noise(
    waveform: jax.Array, sample_counts: jax.Array, keys: jax.Array, config: NoiseConfig
) -> jax.Array:
    """Adds white Gaussian noise to some rows of [B, S]; float32 out, padding becomes 0.

    The noise power is set against the mean power of the row's real samples; a silent row
    stays silent.
    """
    size = waveform.shape[1]
    real = jnp.arange(size) < sample_counts[:, None]
    clean = jnp.where(real, waveform.astype(jnp.float32), 0.0)
    power = jnp.sum(clean**2, axis=1) / jnp.maximum(sample_counts, 1)

    def noise(key: jax.Array, power: jax.Array) -> jax.Array:
        use_key, level_key, noise_key = jax.random.split(key, 3)
        used = jax.random.bernoulli(use_key, config.probability)
        decibels = jax.random.uniform(level_key, (), minval=config.low_db, maxval=config.high_db)
        scale = jnp.sqrt(power * 10.0 ** (-decibels / 10.0))
        return jnp.where(used, scale, 0.0) * jax.random.normal(noise_key, (size,))

    return jnp.where(real, clean + jax.vmap(noise)(keys, power), 0.0)
