"""Audio on the accelerator: waveform -> log-mel features, their normalisation, augmentation.

Pure JAX functions, made to run inside the jitted training step (waveforms travel, features do
not). Nothing here reads files or knows the model.
"""

from bigssl_jax.audio.augment import (
    NoiseConfig,
    SpecAugmentConfig,
    SpeedConfig,
    add_noise,
    row_keys,
    spec_augment,
    speed_perturb,
)
from bigssl_jax.audio.features import (
    AudioConfig,
    Statistics,
    feature_statistics,
    frame_count,
    frame_mask,
    log_mel,
    normalise,
)

__all__ = [
    'AudioConfig',
    'NoiseConfig',
    'SpecAugmentConfig',
    'SpeedConfig',
    'Statistics',
    'add_noise',
    'feature_statistics',
    'frame_count',
    'frame_mask',
    'log_mel',
    'normalise',
    'row_keys',
    'spec_augment',
    'speed_perturb',
]
