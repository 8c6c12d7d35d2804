"""Fingerprints of arrays: equal bits, equal text, wherever and in however many pieces they lie.

An array is a row of words w_0, w_1, ...: the bits of its elements as uint32, in row-major order.
For each of four offsets

    sum over i of scramble(w_i ^ scramble(i + offset))    modulo 2^32

is computed where the array lies.  Integer sums do not depend on their order, so every device adds
up what it holds (copies count once), the host adds up its devices, and the processes exchange
sixteen bytes an array: nothing is gathered, and every mesh and process count gives the same 128
bits.  The inner scramble makes the place of a word count, the outer keeps changes from cancelling.
`scramble` is a bijection, so a single changed word always changes the sums; several go unnoticed
with a probability of about 2^-128.  This guards against damage and mix-ups, not against a forger.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The first words of the fractional part of pi: numbers without a pattern.
OFFSETS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
MAX_WORDS = 2**32  # places are counted in uint32


def fingerprint(tree: Any) -> str:
    """One text for a tree of arrays: its names, shapes, dtypes and bits (see `fingerprints`)."""
    return combine(fingerprints(tree))


def fingerprints(tree: Any) -> dict[str, str]:
    """A text for every array of a tree, under its name, e.g. 'encoder/norm/scale'.

    Args:
      tree: jax arrays, laid out in any way, or numpy arrays.  Where an array lies in several
        processes, all of them call this together, and get the same result.

    Returns:
      {name: 'float32[144,64]:' and 32 hex digits}.

    Raises:
      TypeError: a dtype without a fixed number of bytes per element (int4, complex, random keys).
      ValueError: an array of more than 2^32 words.
    """
    names: list[tuple[str, str]] = []
    partial: list[Any] = []
    shared: list[bool] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if array.size * max(array.dtype.itemsize // 4, 1) > MAX_WORDS:
            raise ValueError(f'{name} has {array.size} elements of {array.dtype}; at most 2^32')
        names.append((name, f'{array.dtype}[{",".join(map(str, array.shape))}]'))
        started = _start(name, array)
        # Of numpy arrays, one copy at a time is on a device; the others lie there already.
        partial.append(_fetch(started) if isinstance(array, np.ndarray) else started)
        shared.append(not getattr(array, 'is_fully_addressable', True))
    sums = np.asarray([_fetch(x) for x in partial], np.uint32).reshape(-1, len(OFFSETS))
    if any(shared):
        of_all = multihost_utils.process_allgather(sums[shared])
        sums[shared] = of_all.sum(axis=0, dtype=np.uint32)
    return {
        name: f'{kind}:' + ''.join(f'{word:08x}' for word in words)
        for (name, kind), words in zip(names, sums.tolist(), strict=True)
    }


def combine(texts: Mapping[str, str]) -> str:
    """One text, 32 hex digits, for what `fingerprints` returned or a part of it."""
    lines = ''.join(f'{name} {text}\n' for name, text in sorted(texts.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def _start(name: str, array: Any) -> jax.Array:
    """Starts the sums of one array: uint32 [devices, 4] in pieces, or [4]."""
    if array.dtype.kind in 'cO' or array.dtype.name in ('int4', 'uint4', 'int2', 'uint2'):
        raise TypeError(f'{name}: no fingerprint of {array.dtype}')
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(f'{name}: random keys have no fingerprint; take jax.random.key_data of it')
    if isinstance(array, np.ndarray) and array.dtype.itemsize == 8:
        # JAX would round 64-bit numpy arrays to 32 bits on their way in.
        array = np.ascontiguousarray(array).view(np.uint32).reshape(*array.shape, 2)
    sharding = getattr(array, 'sharding', None)
    if isinstance(sharding, NamedSharding):
        return _sums_in_pieces(sharding.mesh, sharding.spec)(array)
    return _sums_whole(array)


def _fetch(partial: jax.Array | np.ndarray) -> np.ndarray:
    """What this process's devices have added up: uint32 [4]."""
    if isinstance(partial, np.ndarray):
        return partial
    pieces = [np.asarray(shard.data).reshape(-1, 4) for shard in partial.addressable_shards]
    return np.concatenate(pieces).sum(axis=0, dtype=np.uint32)


@jax.jit
def _sums_whole(array: jax.Array) -> jax.Array:
    return _sums(array, [0] * array.ndim, array.shape)


@functools.lru_cache(maxsize=256)
def _sums_in_pieces(mesh: Mesh, spec: PartitionSpec) -> Callable[[jax.Array], jax.Array]:
    """The jitted sums of every device's piece of an array that lies on `mesh` as `spec` says."""
    axes = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    copies = [axis for axis in mesh.axis_names if not any(axis in entry for entry in axes)]

    def sums(piece: jax.Array) -> jax.Array:
        split = axes + [()] * (piece.ndim - len(axes))
        shape = [
            size * math.prod(mesh.shape[axis] for axis in entry)
            for size, entry in zip(piece.shape, split, strict=True)
        ]
        starts = [
            size * jax.lax.axis_index(entry) if entry else 0
            for size, entry in zip(piece.shape, split, strict=True)
        ]
        first = math.prod(jax.lax.axis_index(axis) == 0 for axis in copies)
        return jnp.where(first, _sums(piece, starts, shape), jnp.uint32(0))[None]

    everywhere = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=spec, out_specs=everywhere))


def _sums(piece: jax.Array, starts: Sequence[Any], shape: Sequence[int]) -> jax.Array:
    """uint32 [4] of a piece that begins at `starts` in an array of `shape`."""
    words = _words(piece)
    per_element = 1 if words.ndim == piece.ndim else 2
    place = jnp.zeros(words.shape, jnp.uint32)
    for dimension in range(words.ndim):
        start = starts[dimension] if dimension < piece.ndim else 0
        stride = math.prod(shape[dimension + 1 :]) * (per_element if dimension < piece.ndim else 1)
        steps = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
        place += jnp.uint32(stride % MAX_WORDS) * (steps + jnp.uint32(start))

    def lane(offset: jax.Array) -> jax.Array:
        return jnp.sum(_scramble(words ^ _scramble(place + offset)), dtype=jnp.uint32)

    return jax.vmap(lane)(jnp.asarray(OFFSETS, jnp.uint32))


def _words(array: jax.Array) -> jax.Array:
    """The bits of an array as uint32, a word per element (two, at the end, for 8 bytes)."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = 8 * min(array.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f'uint{bits}')).astype(jnp.uint32)


def _scramble(x: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser: a bijection in which every bit depends on every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
