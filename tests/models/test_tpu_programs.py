"""What the TPU compiler makes of the encoder; no TPU is needed, libtpu is (`pip install libtpu`).

One process compiles ahead of time for a v5e of four chips (eight for the front end), split over
batch, parameters and heads, and prints what was found in the compiled programs:

  step     the whole train step with splash attention, head dimension 128
  plain    the encoder and its gradients, plain attention: shows that the searches find something
  G        two layers of the 8B model (width 3072, head dimension 192), splash, and gradients
  front    log-mel, normalisation and subsampling on eight chips
  kernels  splash attention alone, for other head dimensions, chips and dtypes
"""

import json
import math
import os
import re
import subprocess
import sys

import pytest

from bigssl_jax.parallel.hlo import parse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
pytest.importorskip('libtpu')

SCRIPT = """
import json
from bigssl_jax.parallel.topologies import configure_ahead_of_time, topology, topology_devices
configure_ahead_of_time()
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from bigssl_jax.audio import AudioConfig, frame_mask, log_mel, normalise
from bigssl_jax.models import Encoder, attention_kernels, presets
from bigssl_jax.parallel import batch_sharding, logical_to_shardings, make_mesh, replicated
from bigssl_jax.parallel import use_mesh
from bigssl_jax.stages import schema
from bigssl_jax.stages.training_stage import make_trainer

def tpus(name, **axes):
    return make_mesh(axes, topology_devices(topology(name)))

def rows(mesh, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

def parameters(config, mesh):
    with use_mesh(mesh):
        boxed = jax.eval_shape(Encoder(config).init, jax.random.key(0),
                               jnp.zeros((1, 8, config.num_mels)), jnp.ones((1, 8), bool))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        nn.unbox(boxed), logical_to_shardings(boxed, mesh))

def compiled(mesh, function, *arrays):
    with use_mesh(mesh):
        program = jax.jit(function).lower(*arrays).compile()
    memory = program.memory_analysis()
    return {'text': program.as_text(), 'peak_bytes': memory.peak_memory_in_bytes,
            'temporary_bytes': memory.temp_size_in_bytes}

def gradients(config, mesh, batch, frames):
    def loss(params, e, mask):
        context = Encoder(config).apply(params, e, mask, method='context')
        return jnp.sum(jnp.sin(context))
    e = rows(mesh, (batch, frames, config.model_dim), jnp.bfloat16)
    mask = rows(mesh, (batch, frames), bool)
    return compiled(mesh, jax.grad(loss), parameters(config, mesh), e, mask)

SMALL = dict(num_layers=2, model_dim=512, num_heads=4)  # head dimension 128

def step(mesh):
    config = schema.resolve({
        'corpora': {'c': {'manifest': 'none'}},
        'selections': {'all': {'corpus': 'c'}}, 'statistics': {'selection': 'all'},
        'encoder': {'preset': 'XL', **SMALL, 'attention': 'splash'},
        'stages': {'pretrain': {
            'kind': 'pretrain',
            'objectives': {'best_rq': {'objective': 'best_rq', 'stream': 's'}},
            'streams': {'s': {'sources': {'all': {'selection': 'all'}}}}}}})
    trainer = make_trainer(config, 'pretrain', mesh, None)
    statistic = jax.ShapeDtypeStruct((80,), jnp.float32)
    state = trainer.abstract_state({'feature_mean': statistic, 'feature_std': statistic})
    batch = {'audio': rows(mesh, (4, 300 * 640), jnp.int16),
             'sample_counts': rows(mesh, (4,), jnp.int32), 'rows': rows(mesh, (4,), jnp.int32)}
    whole = replicated(mesh)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    with use_mesh(mesh):
        program = trainer.train_step().lower(state, {'best_rq': batch}, {'all': rate}, key)
        return {'text': program.compile().as_text()}

def front(mesh):
    config, audio = presets.conformer('XL', **SMALL), AudioConfig()
    def features(params, waveform, counts):
        mels, frames = log_mel(waveform, counts, audio)
        mask = frame_mask(frames, mels.shape[1])
        return normalise(mels, mask, np.full(80, 10.0), np.full(80, 3.0)), mask
    def front_end(params, waveform, counts):
        mels, mask = features(params, waveform, counts)
        return Encoder(config).apply(params, mels, mask, method='subsample')
    arrays = (parameters(config, mesh),
              rows(mesh, (16, 48000), jnp.int16), rows(mesh, (16,), jnp.int32))
    return {'features': compiled(mesh, features, *arrays)['text'],
            'front_end': compiled(mesh, front_end, *arrays)['text']}

def kernels(name, head_dim, dtype):
    mesh = tpus(name, data=-1)
    heads = rows(mesh, (mesh.size, 300, 4, head_dim), dtype)
    mask = rows(mesh, (mesh.size, 300), bool)
    def loss(heads, mask):
        attended = attention_kernels.fused_attend('splash', *heads, mask)
        return jnp.sum(attended.astype(jnp.float32))
    text = compiled(mesh, jax.grad(loss), (heads, heads, heads), mask)['text']
    return text.count('custom_call_target="tpu_custom_call"')

mesh = tpus('v5e-4', fsdp=2, tensor=2)
print(json.dumps({
    'step': step(mesh),
    'plain': gradients(presets.conformer('XL', **SMALL), mesh, 4, 300),
    'G': gradients(presets.conformer('G', num_layers=2, attention='splash'), mesh, 8, 800),
    'front': front(tpus('v5e-8', data=2, fsdp=4)),
    'kernels': {str(case): kernels(*case) for case in (
        ('v5e-4', 36, 'bfloat16'), ('v5e-4', 96, 'bfloat16'), ('v5e-4', 192, 'float32'),
        ('v4-8', 192, 'bfloat16'), ('v5p-8', 192, 'bfloat16'), ('v6e-4', 192, 'bfloat16'),
        ('tpu7x-8', 192, 'bfloat16'))},
}))
"""


@pytest.fixture(scope='module')
def found():
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT], env=dict(os.environ),
        capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def scores(text, *lengths):
    """Arrays of any rank whose last two dimensions are both frames."""
    return [s for n in lengths for s in re.findall(rf'\w+\[[\d,]*\b{n},{n}\]', text)]


def test_the_train_step_has_the_kernels_forward_and_backward_and_no_scores(found):
    text = found['step']['text']
    for kernel in ('fwd', 'dkv', 'dq'):
        assert f'splash_mha_{kernel}_segmented' in text
    assert not scores(text, 300, 384)  # 384: padded to blocks


def test_plain_attention_has_scores_and_no_kernel(found):
    text = found['plain']['text']
    assert 'splash' not in text and scores(text, 300)


def test_two_layers_of_the_8b_model_fit_one_small_tpu(found):
    text, peak = found['G']['text'], found['G']['peak_bytes']
    print(f"G, 2 layers, 8 x 32 s on v5e-4: peak {peak / 2**30:.2f} GiB a chip,"
          f" temporaries {found['G']['temporary_bytes'] / 2**30:.2f} GiB")  # fmt: skip
    assert 'splash_mha_dkv_segmented' in text and not scores(text, 800, 896)
    # A quarter of 0.45 B float32 parameters and as much of gradients, and activations.
    assert 0.8 * 2**30 < peak < 4 * 2**30


def test_bfloat16_blocks_have_no_float32_product(found):
    """Dense products are `convolution` or `dot` in TPU programs."""
    text = found['plain']['text']
    operands = [
        [computation[name].arrays[0].dtype for name in instruction.operands]
        for computation in parse(text).computations.values()
        for instruction in computation.values()
        if instruction.operation in ('dot', 'convolution')
    ]
    assert len(operands) > 30
    assert {tuple(dtypes) for dtypes in operands} == {('bf16', 'bf16')}


def test_the_front_end_gathers_nothing_but_parameters(found):
    assert 's16[2,48000]' in found['front']['features']  # it is split
    assert 'all-gather' not in found['front']['features']
    gathered = {
        math.prod(instruction.arrays[-1].shape)
        for computation in parse(found['front']['front_end']).computations.values()
        for instruction in computation.values()
        if instruction.operation.startswith('all-gather')
    }
    assert gathered <= {20 * 32 * 512, 512}  # the projection and its bias, of 4.2 M features


def test_splash_compiles_for_all_head_dimensions_and_chips(found):
    """Three kernels each: forward, and backward for the query and for key and value."""
    assert len(found['kernels']) == 7 and set(found['kernels'].values()) == {3}
