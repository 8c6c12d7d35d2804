"""4x subsampling: two 3x3 convolutions of stride (2, 2) over (time, mel), then a projection.

    features [B, T, F] -> [B, T2, F2, c1] -> [B, T4, F4, c2] -> [B, T4, D]

Each convolution pads one zero on either side of both axes, so that output i is centred on
input 2i and n inputs give ceil(n / 2) outputs, whatever the padded length: an output is real
exactly when the input at its centre is. Output frame i of both reads input frames 4i - 3 ...
4i + 3. 10 c1 + (9 c1 + 1) c2 + F4 c2 D + D parameters.

Shape letters: B batch, T frames (T2, T4 after each convolution), F mels, C channels, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigssl_jax.models.config import ConformerConfig
from bigssl_jax.models.layers import RESIDUAL, Dense, glorot, named, zero_padding
from bigssl_jax.parallel import constrain

SUBSAMPLING = 4


def subsampled_count(frame_count: Any) -> Any:
    """ceil(ceil(n / 2) / 2) for ints, numpy or JAX integer arrays."""
    return ((frame_count + 1) // 2 + 1) // 2


def strided_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3, stride (2, 2), one zero of padding around: [B, T, F, C] -> [B, T2, F2, C']."""
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


class Subsampler(nn.Module):
    """features [B, T, F] float32, mask [B, T] -> frames [B, T4, D], mask [B, T4]."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        if features.shape[-1] != config.num_mels:
            raise ValueError(
                f'features have {features.shape[-1]} mels, model.num_mels is {config.num_mels}'
            )
        x = zero_padding(features, mask).astype(dtype)[..., None]
        axes = ((None, None, None, 'channel'), (None, None, 'channel', None))
        for i, channels in enumerate(config.subsampling_channels):
            shape = (3, 3, x.shape[-1], channels)
            kernel = self.param(f'kernel{i}', named(glorot((0, 1, 2), (3,)), *axes[i]), shape)
            bias = self.param(f'bias{i}', named(nn.initializers.zeros, axes[i][3]), (channels,))
            mask = mask[:, ::2]
            x = strided_convolution(x, kernel.astype(dtype)) + bias.astype(dtype)
            x = zero_padding(nn.relu(x), mask)
        project = Dense((config.model_dim,), ('mel', 'channel', 'embed'), dtype, name='project')
        return constrain(zero_padding(project(x), mask), RESIDUAL), mask
