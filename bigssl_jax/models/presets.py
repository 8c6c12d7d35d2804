"""Named encoder sizes.

L to G are BigSSL's family as commonly reported (layers, width, heads, kernel); the paper's text
vouches for "8 billion" only. The USM rows are from arXiv 2303.01037 (128 mels, relative
attention). Subsampler channels are ours: (128, 32) keeps the front end below 1 % of XL's work;
the wide form, two convolutions of model width, takes 10 % (XL: `subsampling_channels=(1024, 1024)`,
30 M parameters more). tiny and small are ours, for CPUs.

| name | layers | width | heads | kernel | relative attention | encoder parameters |
|---|---|---|---|---|---|---|
| tiny | 4 | 144 | 4 | 15 | no | 2.0 M |
| small | 8 | 144 | 4 | 15 | no | 3.9 M |
| L | 17 | 512 | 8 | 32 | yes | 0.11 B |
| XL | 24 | 1024 | 8 | 5 | no | 0.58 B |
| XXL | 42 | 1024 | 8 | 5 | no | 1.0 B |
| G | 36 | 3072 | 16 | 5 | no | 7.8 B |
| USM-600M | 24 | 1024 | 8 | 5 | yes | 0.61 B |
| USM-2B | 32 | 1536 | 16 | 5 | yes | 1.8 B |
"""

from typing import Any

from bigssl_jax.config import ConfigError
from bigssl_jax.models.config import ConformerConfig

_PRESETS: dict[str, dict[str, Any]] = {
    'tiny': dict(
        num_layers=4, model_dim=144, num_heads=4, kernel_size=15, subsampling_channels=(8, 16)
    ),
    'small': dict(
        num_layers=8, model_dim=144, num_heads=4, kernel_size=15, subsampling_channels=(8, 16)
    ),
    'L': dict(num_layers=17, model_dim=512, num_heads=8, kernel_size=32, relative_attention=True),
    'XL': dict(num_layers=24, model_dim=1024, num_heads=8),
    'XXL': dict(num_layers=42, model_dim=1024, num_heads=8),
    'G': dict(num_layers=36, model_dim=3072, num_heads=16),
    'USM-600M': dict(
        num_layers=24, model_dim=1024, num_heads=8, relative_attention=True, num_mels=128
    ),
    'USM-2B': dict(
        num_layers=32, model_dim=1536, num_heads=16, relative_attention=True, num_mels=128
    ),
}
for _name in ('L', 'XL', 'XXL', 'G', 'USM-600M', 'USM-2B'):
    _PRESETS[_name].update(dtype='bfloat16')
# Large models: the activations of every layer would not fit. On a CPU: products are fast (250
# GFLOP/s a core) and fresh memory is slow, so recomputing beats keeping: small, 8 x 4 s on one
# core, forward and backward 212 ms and 48 MB with 'full', 303 ms and 362 MB with 'none' (two
# thirds of the difference are page faults).
for _name in ('tiny', 'small', 'XL', 'XXL', 'G', 'USM-600M', 'USM-2B'):
    _PRESETS[_name].update(remat='full')

NAMES = tuple(_PRESETS)


def conformer(name: str, **overrides: Any) -> ConformerConfig:
    """The named size with some fields replaced: `conformer('XL', relative_attention=True)`.

    Raises:
        ConfigError: unknown name, unknown field or bad value.
    """
    if name not in _PRESETS:
        raise ConfigError(f'no Conformer preset {name!r}; allowed: {", ".join(NAMES)}')
    unknown = sorted(set(overrides) - set(ConformerConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(
            f'ConformerConfig has no field {unknown[0]!r}; allowed: '
            f'{", ".join(ConformerConfig.__dataclass_fields__)}'
        )
    return ConformerConfig(**{**_PRESETS[name], **overrides})
