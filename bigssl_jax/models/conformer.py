"""The Conformer encoder: subsampling, positions, and a stack of identical blocks under one scan.

    block(x):  x += 1/2 FFN(x);  x += attention(x);  x += convolution(x);  x += 1/2 FFN(x)
               return LayerNorm(x)                       23 D^2 + (29 + k) D parameters (m = 4)

The stack is one block scanned over parameters with a leading 'layer' axis: compile time does not
grow with depth, and one name shards all layers alike. `remat` chooses what the scan keeps for
the backward pass.

Shape letters: B batch, T frames, T4 subsampled frames, F mels, D model, L layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from bigssl_jax.models.attention import SelfAttention, distance_sinusoid, sinusoid
from bigssl_jax.models.config import ConformerConfig
from bigssl_jax.models.convolution import Convolution
from bigssl_jax.models.layers import RESIDUAL, Dropout, FeedForward, LayerNorm, zero_padding
from bigssl_jax.models.subsampling import Subsampler
from bigssl_jax.parallel import constrain


class ConformerBlock(nn.Module):
    """One layer. x [B, T, D], mask [B, T] -> [B, T, D] in the compute dtype."""

    config: ConformerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, distances: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, None]:
        config = self.config

        def add(x: jax.Array, weight: float, change: jax.Array) -> jax.Array:
            # The name is what remat='block' keeps.
            return checkpoint_name(constrain(x + weight * change, RESIDUAL), 'module_output')

        x = zero_padding(x, mask)
        x = add(x, 0.5, FeedForward(config, name='ffn_in')(x, mask, deterministic))
        attention = SelfAttention(config, name='attention')
        x = add(x, 1.0, attention(x, mask, distances, deterministic))
        x = add(x, 1.0, Convolution(config, name='convolution')(x, mask, deterministic))
        x = add(x, 0.5, FeedForward(config, name='ffn_out')(x, mask, deterministic))
        x = LayerNorm(dtype=jnp.dtype(config.dtype), name='norm')(x)
        if self.is_mutable_collection('layers') and not self.is_initializing():
            self.sow('layers', 'mean', frame_mean(x, mask))
        # The second result is the scan's per-layer output; there is none.
        return x, None


def frame_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of x [B, T, D] over real frames: float32 [B, D], 0 where there are none."""
    total = jnp.sum(zero_padding(x, mask), axis=1, dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1.0)[:, None]


def _remat_policy(name: str) -> Any:
    if name == 'full':
        return jax.checkpoint_policies.nothing_saveable
    if name == 'block':
        return jax.checkpoint_policies.save_only_these_names('module_output')
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _stack(config: ConformerConfig) -> Any:
    """The scanned block class; parameters gain a leading axis named 'layer'."""
    block: Any = ConformerBlock
    if config.remat != 'none':
        # Argument 4 (self is 0) is `deterministic`. Inside a scan nothing merges the recomputed
        # forward pass with the first one, so the guards against that only cost.
        block = nn.remat(
            block, policy=_remat_policy(config.remat), prevent_cse=False, static_argnums=(4,)
        )
    return nn.scan(
        block,
        variable_axes={'params': 0, 'layers': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: 'layer'},
    )


class Encoder(nn.Module):
    """Features in, frames out.

    `__call__` is `subsample` followed by `context`; objectives that mask after subsampling call
    the two themselves. A random stream named 'dropout' is needed unless deterministic.
    """

    config: ConformerConfig

    def setup(self) -> None:
        self.subsampling = Subsampler(self.config)
        self.input_dropout = Dropout(self.config.dropout)
        self.blocks = _stack(self.config)(self.config)

    def __call__(
        self, features: jax.Array, mask: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """features [B, T, F], mask bool [B, T] -> frames float32 [B, T4, D], mask [B, T4]."""
        e, mask4 = self.subsample(features, mask)
        return self.context(e, mask4, deterministic), mask4

    def subsample(self, features: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """features [B, T, F], mask [B, T] -> e [B, T4, D] in the compute dtype, mask [B, T4]."""
        return self.subsampling(features, mask)

    def context(self, e: jax.Array, mask4: jax.Array, deterministic: bool = True) -> jax.Array:
        """e [B, T4, D], mask4 [B, T4] -> frames float32 [B, T4, D], zero where padded."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        frames = e.shape[1]
        x = self.input_dropout(zero_padding(e, mask4).astype(dtype), deterministic)
        distances = None
        if config.relative_attention:
            distances = distance_sinusoid(frames, config.model_dim).astype(dtype)
        else:
            x = x + sinusoid(jnp.arange(frames), config.model_dim).astype(dtype)
        x, _ = self.blocks(constrain(x, RESIDUAL), mask4, distances, deterministic)
        return zero_padding(x, mask4).astype(jnp.float32)

    def layer_means(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        """features [B, T, F], mask [B, T] -> float32 [B, L + 1, D], means over frames.

        Layer 0 is the subsampled input, layer i what block i gives.  Only where the collection
        'layers' is mutable, without dropout; training keeps nothing of it.
        """
        e, mask4 = self.subsample(features, mask)
        self.context(e, mask4)
        (means,) = self.blocks.variables['layers']['mean']
        return jnp.concatenate([frame_mean(e, mask4)[:, None], jnp.swapaxes(means, 0, 1)], axis=1)


def parameter_count(config: ConformerConfig) -> int:
    """Parameters of the encoder, from shapes alone: nothing is allocated."""
    features = jax.ShapeDtypeStruct((1, 8, config.num_mels), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 8), jnp.bool_)

    def init(features: jax.Array, mask: jax.Array) -> Any:
        return Encoder(config).init(jax.random.key(0), features, mask)

    shapes = jax.eval_shape(init, features, mask)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
