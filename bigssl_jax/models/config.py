"""The encoder's configuration: one frozen dataclass, from 1.7 M to 8 B parameters."""

import dataclasses

from bigssl_jax.config import ConfigError

DTYPES = ('float32', 'bfloat16')
REMAT = ('none', 'dots', 'block', 'full')
ATTENTION = ('plain', 'splash', 'cudnn')


@dataclasses.dataclass(frozen=True)
class ConformerConfig:
    """Conformer encoder (arXiv 2005.08100) as BigSSL scales it (arXiv 2109.13226).

    Fields:
        num_layers, model_dim, num_heads: head dimension = model_dim / num_heads.
        ffn_multiplier: hidden width of a feed-forward module over model_dim.
        kernel_size: frames that the depthwise convolution sees, (k-1)//2 before, k//2 after.
        dropout: after every module and inside the feed-forward modules; 0 is none.
        subsampling_channels: of the two strided 2-D convolutions.
        relative_attention: Transformer-XL relative positions in every layer; when False an
            absolute sinusoid is added once before the first layer.
        num_mels: features per input frame.
        dtype: 'float32' or 'bfloat16' for products and activations. Parameters, norms, softmax
            and the encoder's output are float32 always.
        remat: what the backward pass keeps of each layer. 'none' all; 'dots' the results of
            products with weights; 'block' each module's output; 'full' only the layer's input.
            A training step then has 1, 1.02, 1.20 and 1.33 times the FLOPs (XL, 32 s).
        attention: 'plain' on every platform; 'splash' on TPU and 'cudnn' on GPU compute the same
            without ever holding the scores (see attention_kernels.py for what each takes).
        depthwise_norm: norm after the depthwise convolution; 'layer' (over channels) only,
            because batch statistics would let batch mates and padding leak in.
    """

    num_layers: int
    model_dim: int
    num_heads: int
    ffn_multiplier: int = 4
    kernel_size: int = 5
    dropout: float = 0.1
    subsampling_channels: tuple[int, int] = (128, 32)
    relative_attention: bool = False
    num_mels: int = 80
    dtype: str = 'float32'
    remat: str = 'none'
    attention: str = 'plain'
    depthwise_norm: str = 'layer'

    def __post_init__(self) -> None:
        # A config file writes lists; the module needs a hashable value.
        object.__setattr__(self, 'subsampling_channels', tuple(self.subsampling_channels))
        for name in ('num_layers', 'model_dim', 'num_heads', 'ffn_multiplier', 'kernel_size'):
            if getattr(self, name) < 1:
                raise ConfigError(f'model.{name} is {getattr(self, name)}; it must be at least 1')
        if self.model_dim % self.num_heads:
            raise ConfigError(
                f'model.model_dim={self.model_dim} is not a multiple of '
                f'model.num_heads={self.num_heads}'
            )
        if self.model_dim % 2:
            raise ConfigError(f'model.model_dim={self.model_dim} must be even (sinusoids)')
        if len(self.subsampling_channels) != 2 or min(self.subsampling_channels) < 1:
            raise ConfigError(
                f'model.subsampling_channels is {self.subsampling_channels}; '
                'give two numbers of channels, such as (128, 32)'
            )
        if self.num_mels < 4:
            raise ConfigError(f'model.num_mels is {self.num_mels}; it must be at least 4')
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f'model.dropout is {self.dropout}; allowed: 0 up to below 1')
        for name, allowed in (
            ('dtype', DTYPES),
            ('remat', REMAT),
            ('attention', ATTENTION),
            ('depthwise_norm', ('layer',)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f'model.{name} is {getattr(self, name)!r}; allowed: {", ".join(allowed)}'
                )
        self._check_attention()

    def _check_attention(self) -> None:
        if self.attention == 'plain':
            return
        if self.relative_attention:
            raise ConfigError(
                f"model.attention is {self.attention!r}, which cannot add relative positions' term"
                " to the scores it never holds; set model.attention='plain' or"
                ' model.relative_attention=False'
            )
        if self.attention == 'cudnn' and self.dtype != 'bfloat16':
            raise ConfigError(
                f"model.attention is 'cudnn', which computes in 16 bits, and model.dtype is"
                f" {self.dtype!r}; set model.dtype='bfloat16' or model.attention='plain'"
            )
        if self.attention == 'cudnn' and (self.head_dim % 8 or self.head_dim > 256):
            raise ConfigError(
                f"model.attention is 'cudnn' with head dimension {self.head_dim}"
                f' (model.model_dim={self.model_dim} / model.num_heads={self.num_heads}); it takes'
                ' multiples of 8 up to 128, on Hopper GPUs and later up to 256'
            )

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        return self.model_dim * self.ffn_multiplier
