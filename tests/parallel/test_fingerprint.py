"""A fingerprint sees every bit and its place, and nothing of where or how the array lies."""

import itertools
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bigssl_jax.parallel import fingerprint as fingerprint_lib
from bigssl_jax.parallel.fingerprint import fingerprint, fingerprints

DTYPES = (
    'float32', 'float64', 'int32', 'int64', 'uint32', 'uint8', 'int8', 'int16', 'float16',
    ml_dtypes.bfloat16, 'bool',
)  # fmt: skip


def some(dtype, shape=(3, 5), seed=0) -> np.ndarray:
    """An array of random bits (bool: random truth)."""
    rng = np.random.default_rng(seed)
    if dtype == 'bool':
        return rng.integers(0, 2, shape).astype(bool)
    dtype = np.dtype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def scramble(x: int) -> int:
    """MurmurHash3's finaliser on Python integers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize('dtype', ['float32', 'uint8', 'float64'])
def test_the_sums_are_those_of_the_definition(dtype):
    array = some(dtype, (4, 3, 2))
    words = array.reshape(-1).view({'uint8': np.uint8}.get(dtype, np.uint32)).tolist()
    expected = ''
    for offset in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344):
        mixed = (scramble(w ^ scramble((i + offset) % 2**32)) for i, w in enumerate(words))
        expected += f'{sum(mixed) % 2**32:08x}'
    assert fingerprints({'x': array})['x'] == f'{dtype}[4,3,2]:{expected}'


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_every_single_bit_counts(dtype):
    array = some(dtype, (3, 2))
    seen = {fingerprint(array)}
    if array.dtype == bool:
        changed = [array ^ (np.arange(6) == i).reshape(3, 2) for i in range(6)]
    else:
        bits = np.eye(array.nbytes * 8, dtype=bool)
        flips = np.packbits(bits, axis=1) ^ np.frombuffer(array.tobytes(), np.uint8)
        changed = [np.frombuffer(row.tobytes(), array.dtype).reshape(3, 2) for row in flips]
    changed = changed[:: max(1, len(changed) // 24)]
    seen |= {fingerprint(other) for other in changed}
    assert len(seen) == 1 + len(changed)


@pytest.mark.parametrize(
    'dtype', ['float32', 'int32', 'uint8', ml_dtypes.bfloat16, 'bool'], ids=str
)
def test_a_jax_array_and_a_numpy_array_of_equal_bits_agree(dtype):
    array = some(dtype)
    assert fingerprint({'x': jnp.asarray(array)}) == fingerprint({'x': array})


def test_every_order_of_small_numbers_differs():
    orders = set(itertools.permutations((0, 0, 1, 1, 2, 3)))
    assert len({fingerprint(np.array(order, np.int8)) for order in orders}) == len(orders)


def test_names_shapes_dtypes_and_the_place_of_leaves_count():
    a, b = some('float32', (2, 3), 1), some('float32', (2, 3), 2)
    trees = [
        {'x': a, 'y': b},
        {'x': b, 'y': a},
        {'x': a, 'z': b},
        {'x': a, 'y': b.reshape(3, 2)},
        {'x': a, 'y': b.view(np.int32)},
        {'x': a, 'y': b.T.reshape(2, 3)},
        {'x': a, 'y': {'y': b}},
        {'x': a},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint(trees[0]) == fingerprint({'y': b.copy(), 'x': a.copy()})
    assert fingerprint(np.float32(0.0)) != fingerprint(np.float32(-0.0))


def test_what_has_no_words_is_refused_by_name(monkeypatch):
    with pytest.raises(TypeError, match='spectrum: no fingerprint of complex64'):
        fingerprint({'spectrum': np.zeros(2, np.complex64)})
    with pytest.raises(TypeError, match='codes: no fingerprint of int4'):
        fingerprint({'codes': np.zeros(2, ml_dtypes.int4)})
    monkeypatch.setattr(fingerprint_lib, 'MAX_WORDS', 8)
    with pytest.raises(ValueError, match='big has 9 elements of float32'):
        fingerprint({'big': np.zeros(9, np.float32)})


SCRIPT = """
import json, ml_dtypes
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from bigssl_jax.parallel import make_mesh
from bigssl_jax.parallel.fingerprint import _sums_in_pieces, fingerprint

rng = np.random.default_rng(5)
def bits(dtype, *shape):
    raw = rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.frombuffer(raw, dtype).reshape(shape)
tree = {
    'float32': bits(np.float32, 16, 24), 'bfloat16': bits(ml_dtypes.bfloat16, 8, 4, 8),
    'int32': bits(np.int32, 32), 'uint8': bits(np.uint8, 8, 8), 'int8': bits(np.int8, 8),
    'bool': rng.integers(0, 2, (16, 8)).astype(bool), 'scalar': np.float32(2.5),
}
specs = {'float32': P('fsdp', 'tensor'), 'bfloat16': P('tensor', None, ('data', 'fsdp')),
         'int32': P(('data', 'fsdp')), 'uint8': P(None, 'fsdp'), 'int8': P('data'),
         'bool': P('data', 'tensor'), 'scalar': P()}
found = {'numpy': fingerprint(tree)}
for sizes in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)):
    mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor'), sizes)), jax.devices()[:np.prod(sizes)])
    there = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in tree.items()}
    found[str(sizes)] = fingerprint(there)
    text = _sums_in_pieces(mesh, specs['float32']).lower(there['float32']).compile().as_text()
    found['collectives'] = found.get('collectives', 0) + sum(
        text.count(name) for name in ('all-', 'reduce-scatter', 'collective', 'send'))
    found['multiplies'] = found.get('multiplies', 0) + text.count('multiply')
print(json.dumps(found))
"""


def test_every_mesh_gives_the_same_and_no_device_asks_another():
    environment = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop('collectives') == 0
    assert found.pop('multiplies') > 0
    assert len(found) == 5
    assert len(set(found.values())) == 1, found
