"""The front end and fused attention on eight devices: each computes its own rows.

A batch-sharded FFT, for one, would be gathered whole on every device. The device count cannot
change in a running process, so one process with eight devices compiles everything.
"""

import json
import os
import subprocess
import sys

import pytest

from bigssl_jax.parallel.hlo import parse

SCRIPT = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from bigssl_jax.audio import AudioConfig, frame_mask, log_mel, normalise
from bigssl_jax.models import ConformerConfig, Encoder, attention_kernels
from bigssl_jax.models.attention import attend
from bigssl_jax.parallel import batch_sharding, logical_to_shardings, make_mesh, use_mesh

ROWS, SECONDS = 16, 1.5
AUDIO = AudioConfig()
CONFIG = ConformerConfig(num_layers=1, model_dim=32, num_heads=4, subsampling_channels=(8, 16))

def features(waveform, counts):
    mels, frames = log_mel(waveform, counts, AUDIO)
    mask = frame_mask(frames, mels.shape[1])
    return normalise(mels, mask, np.full(80, 10.0), np.full(80, 3.0)), mask

def front_end(params, waveform, counts):
    return Encoder(CONFIG).apply(params, *features(waveform, counts), method='subsample')

def compiled(mesh, function, *arrays):
    with use_mesh(mesh):
        return jax.jit(function).lower(*arrays).compile().as_text()

def programs(mesh):
    rows = batch_sharding(mesh)
    waveform = jax.ShapeDtypeStruct((ROWS, int(SECONDS * 16000)), jnp.int16, sharding=rows)
    counts = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=rows)
    with use_mesh(mesh):
        boxed = jax.eval_shape(
            Encoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8, 80)), jnp.ones((1, 8), bool))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.unbox(boxed), logical_to_shardings(boxed, mesh))
    return {'features': compiled(mesh, features, waveform, counts),
            'front_end': compiled(mesh, front_end, params, waveform, counts)}

def heads(rng, *shape):
    return rng.normal(size=(4, *shape)).astype(np.float32)

def attention(mesh):
    query, key, value, weights = heads(np.random.default_rng(0), 8, 40, 2, 8)
    mask = np.arange(40) < np.array([40, 17, 0, 5, 40, 39, 1, 22])[:, None]
    weights[~mask] = 0
    def splash(arrays):
        return jnp.sum(attention_kernels.fused_attend('splash', *arrays, mask) * weights)
    def plain(arrays):
        return jnp.sum(attend(*arrays, mask) * weights)
    with use_mesh(mesh), attention_kernels.interpreted_kernels():
        program = jax.jit(jax.grad(splash)).lower((query, key, value)).compile()
    ours, expected = program((query, key, value)), jax.jit(jax.grad(plain))((query, key, value))
    return {'difference': difference(ours, expected), 'text': program.as_text(),
            'part': ours[0].sharding.shard_shape(ours[0].shape)}

def difference(ours, expected):
    # The largest, relative to the array's size; arrays of rounding errors alone count as larger.
    ours, expected = (jax.tree.leaves(jax.device_get(x)) for x in (ours, expected))
    sizes = [float(np.abs(x).max()) for x in expected]
    return max(float(np.abs(a - b).max()) / max(size, 1e-3 * max(sizes))
               for a, b, size in zip(ours, expected, sizes, strict=True))

def encoder(mesh):
    mask = np.arange(90) < np.array([90, 41, 0, 77])[:, None]
    features = np.random.default_rng(1).normal(size=(4, 90, 80)).astype(np.float32)
    def init(key):
        return nn.unbox(Encoder(CONFIG).init(key, features[:1], mask[:1]))
    def loss_and_gradients(config, padding):
        def loss(params, features):
            frames, mask4 = Encoder(config).apply(params, features, mask)
            return jnp.mean(jnp.sin(frames) * mask4[..., None])
        padded = np.where(mask[..., None], features, np.float32(padding))
        return jax.jit(jax.value_and_grad(loss))(params, padded)
    with use_mesh(make_mesh({}, jax.devices()[:1])):
        params = jax.jit(init)(jax.random.key(0))
        plain = loss_and_gradients(CONFIG, 0.0)
    splash = dataclasses.replace(CONFIG, attention='splash', remat='full')
    with use_mesh(mesh), attention_kernels.interpreted_kernels():
        return difference(loss_and_gradients(splash, np.nan), plain)

found = {}
for name in sys.argv[1:]:
    sizes = dict(zip(('data', 'fsdp', 'tensor'), map(int, name.split('x'))))
    found[name] = programs(make_mesh(sizes))
split = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
found['attention'], found['encoder'] = attention(split), encoder(split)
print(json.dumps(found))
"""
MESHES = ('8x1x1', '2x4x1', '2x2x2')  # data x fsdp x tensor
PARTS = {'8x1x1': 8, '2x4x1': 8, '2x2x2': 4}  # of the batch
COLLECTIVES = ('all-gather', 'all-to-all', 'all-reduce', 'reduce-scatter', 'collective')


@pytest.fixture(scope='module')
def found():
    environment = {
        **os.environ,
        'XLA_FLAGS': '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0',
    }
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, *MESHES],
        capture_output=True, text=True, env=environment, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def collectives(text):
    """(operation, shape of its result) of everything that devices say to each other."""
    return {
        (instruction.operation.removesuffix('-start'), instruction.arrays[-1].shape)
        for computation in parse(text).computations.values()
        for instruction in computation.values()
        if instruction.operation.startswith(COLLECTIVES)
    }


@pytest.mark.parametrize('mesh', MESHES)
def test_features_need_no_word_between_devices(found, mesh):
    text = found[mesh]['features']
    assert f's16[{16 // PARTS[mesh]},24000]' in text  # it is split
    assert not collectives(text)


def test_the_front_end_of_replicated_parameters_needs_none_either(found):
    assert not collectives(found['8x1x1']['front_end'])


@pytest.mark.parametrize('mesh', ['2x4x1', '2x2x2'])
def test_the_front_end_of_split_parameters_gathers_parameters_alone(found, mesh):
    said = collectives(found[mesh]['front_end'])
    gathered = {shape for operation, shape in said if operation == 'all-gather'}
    assert gathered and not [shape for operation, shape in said if operation == 'all-to-all']
    # The projection, or the half of it that a tensor-split device works with, and its bias.
    assert gathered <= {(32, 20, 16), (32, 20, 8), (32,)}


def test_fused_attention_split_over_batch_and_heads_equals_plain_attention(found):
    assert found['attention']['difference'] < 1e-5
    assert found['attention']['part'] == [2, 40, 1, 8]


def test_fused_attention_says_nothing(found):
    assert not collectives(found['attention']['text'])


def test_a_split_encoder_with_fused_attention_equals_a_plain_one_on_one_device(found):
    """Loss and gradients, rematerialised, with NaN in the padding and a row that is all padding."""
    assert found['encoder'] < 1e-4
