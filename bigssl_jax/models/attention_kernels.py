"""Fused attention: the same result as `attention.attend`, without the scores in memory.

Plain attention writes [B, H, T, T] scores and weights to memory and reads them again. A fused
kernel goes over the keys in blocks that stay on the chip, keeps a running maximum and a running
sum of the softmax (float32), and recomputes the scores in the backward pass.

    name     platform   takes
    splash   TPU (v4+)  any head dimension (G's 192 too), any mask
    cudnn    GPU        bfloat16, head dimension a multiple of 8 up to 128 (256 on Hopper and later)

Neither takes relative positions: their term is one number per query, key and head, which is the
[B, H, T, T] array that a fused kernel is there to avoid.

Padding. In splash, real and padded frames are two segments that do not see each other; in cuDNN
every row has a count of real frames, which come first (all masks here are made by
`audio.frame_mask`). A padded query therefore gets another, equally meaningless, result than in
plain attention; what it is never matters, because every reader zeroes padded frames.

The price of splash's blocks: T is padded to a multiple of 128, so the kernel does
(ceil(T / 128) 128 / T)^2 of the work. 30 s are 750 frames: 768, 5 % more; 32 s are 800: 896, 25 %
more. Choose the length limits of streams accordingly: multiples of 5.12 s waste nothing.

A kernel sees one device's part of the batch and of the heads (`parallel.per_shard`): the compiler
cannot split what it cannot look into, and would gather the batch on every device.

Shape letters: B batch, T frames, H heads, K head dimension.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from bigssl_jax.config import UserError
from bigssl_jax.models.config import ConformerConfig
from bigssl_jax.models.layers import HEADS, zero_padding
from bigssl_jax.parallel import device_platform, per_shard

PLATFORMS = {'splash': 'tpu', 'cudnn': 'gpu'}
# Vector registers of a TPU are 128 lanes wide; blocks are whole numbers of them.
LANES = 128
# Scores of one block pair are 1 MB at 512 x 512; a backward pass holds several at once.
LARGEST_BLOCK = 512

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar('interpreted', default=False)


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Splash runs in Pallas' interpreter, on any platform: exact and slow, for tests."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def runs_on(attention: str, platform: str) -> bool:
    """Whether that kind of attention exists on 'cpu', 'gpu' or 'tpu'."""
    return PLATFORMS.get(attention, platform) == platform


def check_platform(attention: str, platform: str) -> None:
    """Raises a UserError when `attention` does not exist on `platform`."""
    if not runs_on(attention, platform):
        raise UserError(
            f'encoder.attention is {attention!r}, which runs on {PLATFORMS[attention].upper()}'
            f" only, and this run's devices are {platform.upper()};"
            ' set --config.encoder.attention=plain'
        )


def portable(config: ConformerConfig, platform: str) -> ConformerConfig:
    """`config` for decoding on `platform`: plain attention where its own kernel does not exist.

    A model may be used on other machines than it was trained on, and all kinds of attention
    compute the same function.
    """
    if runs_on(config.attention, platform):
        return config
    return dataclasses.replace(config, attention='plain')


def fused_attend(
    attention: str, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """softmax(query . key over real keys) @ value by the kernel `attention`, on every shard.

    Args:
        attention: 'splash' or 'cudnn'.
        query: [B, T, H, K], already divided by sqrt(K). key, value: [B, T, H, K], finite.
        mask: bool [B, T], real frames; they come first.
    Returns:
        [B, T, H, K] in the dtype of `query`; padded frames hold something finite.
    Raises:
        UserError: the kernel does not exist on the platform of this program's devices.
    """
    interpret = attention == 'splash' and _interpreted.get()
    if not interpret:
        check_platform(attention, device_platform())
    kernel = functools.partial(splash, interpret=interpret) if attention == 'splash' else cudnn
    return per_shard(kernel, (query, key, value, mask), (HEADS, HEADS, HEADS, ('batch', 'time')))


def block_size(frames: int) -> int:
    """The largest multiple of 128 up to 512 that divides `frames`, a multiple of 128."""
    return max(b for b in range(LANES, LARGEST_BLOCK + 1, LANES) if frames % b == 0)


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, interpret: bool = False
) -> jax.Array:
    """`fused_attend` by JAX's TPU kernel, on one device's arrays."""
    # Imported here: Pallas takes a third of a second, and most runs never use it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, frames, heads, _ = query.shape
    extra = -frames % LANES
    block = block_size(frames + extra)
    everything = masks.FullMask((frames + extra, frames + extra))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([everything] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))).swapaxes(1, 2)

    segment = jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, extra)))
    segments = kernels.SegmentIds(q=segment, kv=segment)
    attended = jax.vmap(kernel)(by_head(query), by_head(key), by_head(value), segments)
    return attended.swapaxes(1, 2)[:, :frames]


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    implementation: str = 'cudnn',
) -> jax.Array:
    """`fused_attend` by cuDNN, on one device's arrays; `implementation='xla'` is JAX's twin of it.

    Raises:
        UserError: cuDNN is missing, too old, or does not do this shape on this GPU.
    """
    # What cuDNN leaves in padded frames, forward and backward, is not promised to be finite, and
    # a row without any frame would divide by zero.
    counts = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
    query, key, value = (zero_padding(x, mask) for x in (query, key, value))
    try:
        attended = jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=1.0,
            query_seq_lengths=counts,
            key_value_seq_lengths=counts,
            implementation=implementation,
        )
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"encoder.attention='cudnn': {error}; set --config.encoder.attention=plain"
        ) from error
    return zero_padding(attended, mask)
