"""The Conformer encoder: features in, frames out. Knows nothing of losses or files."""

from bigssl_jax.models import presets
from bigssl_jax.models.config import ConformerConfig
from bigssl_jax.models.conformer import ConformerBlock, Encoder, parameter_count
from bigssl_jax.models.subsampling import SUBSAMPLING, subsampled_count

__all__ = [
    'SUBSAMPLING',
    'ConformerBlock',
    'ConformerConfig',
    'Encoder',
    'parameter_count',
    'presets',
    'subsampled_count',
]
