"""A small encoder and small batches for the tests of objectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.audio import AudioConfig, SpecAugmentConfig
from bigssl_jax.models import ConformerConfig, Encoder
from bigssl_jax.objectives import EncoderCall

MELS = 16
FAST_COMPILE = {'xla_backend_optimization_level': 0}  # compiling is all that these tests cost
SPEC_AUGMENT = SpecAugmentConfig(freq_width=4, time_ratio=0.2)


class Bench:
    """An encoder with parameters, and `call(objective, ...)` to evaluate totals and gradients."""

    def __init__(self, dropout: float = 0.0):
        self.config = ConformerConfig(
            num_layers=1,
            model_dim=16,
            num_heads=2,
            kernel_size=3,
            dropout=dropout,
            subsampling_channels=(2, 3),
            num_mels=MELS,
        )
        self.audio = AudioConfig(num_mels=MELS)
        self.encoder = Encoder(self.config)
        features = jnp.zeros((1, 8, MELS))
        init = jax.jit(self.encoder.init, compiler_options=FAST_COMPILE)
        variables = init(jax.random.key(0), features, jnp.ones((1, 8), bool))
        self.encoder_params = nn.unbox(variables['params'])
        self.statistics = {
            'feature_mean': jnp.full((MELS,), 14.0),
            'feature_std': jnp.full((MELS,), 2.0),
        }

    def encode(self, params=None, deterministic=False, spec_augment=None) -> EncoderCall:
        return EncoderCall(
            self.encoder,
            self.encoder_params if params is None else params,
            self.statistics,
            self.audio,
            spec_augment,
            deterministic,
        )

    def init(self, objective):
        """({'encoder', 'head'} unboxed, constants)."""
        head = nn.unbox(objective.init_params(jax.random.key(1), self.config))
        params = {'encoder': self.encoder_params, 'head': head}
        return params, objective.init_constants(jax.random.key(2))

    def gradient(self, objective, params, constants, batch, key=3, augment=True):
        """(totals, gradient of the summed loss), as numpy."""
        function = self._compiled(objective, augment)
        (_, totals), gradient = function(params, constants, batch, jax.random.key(key))
        return jax.device_get((totals, gradient))

    @functools.cache  # noqa: B019  (one Bench lives as long as the session)
    def _compiled(self, objective, augment):
        def loss(params, constants, batch, key):
            encode = self.encode(params['encoder'], spec_augment=SPEC_AUGMENT if augment else None)
            totals = objective.totals(encode, params['head'], constants, batch, key)
            return totals['loss'], totals

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)


def make_batch(counts=(8000, 6000, 0, 7300), size=8000, max_labels=6, seed=0):
    """Coloured noise that changes its loudness, labels in 1..5, fillers where a count is 0."""
    random = np.random.default_rng(seed)
    rows = len(counts)
    audio = np.zeros((rows, size), np.int16)
    for i, count in enumerate(counts):
        loudness = np.repeat(random.uniform(1, 8, size // 400 + 1), 400)[:count]
        noise = np.cumsum(random.normal(size=count)) * 20 + random.normal(size=count) * 300
        audio[i, :count] = np.clip(noise * loudness, -30000, 30000)
    label_counts = np.where(np.asarray(counts) > 0, random.integers(1, 4, rows), 0)
    labels = random.integers(1, 6, (rows, max_labels))
    labels[np.arange(max_labels) >= label_counts[:, None]] = 0
    return {
        'audio': audio,
        'sample_counts': np.asarray(counts, np.int32),
        'labels': labels.astype(np.int32),
        'label_counts': label_counts.astype(np.int32),
        'rows': np.arange(rows, dtype=np.int32),
    }


@pytest.fixture(scope='session')
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope='session')
def bench_with_dropout() -> Bench:
    return Bench(dropout=0.3)


@pytest.fixture(scope='session')
def batches():
    """`batches(counts=..., size=...)` makes a Batch."""
    return make_batch
