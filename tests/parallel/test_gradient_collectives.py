"""On a mesh that splits parameters, their gradients are reduce-scattered, in the compute dtype.

The train step of a small model is compiled for eight v5e chips, 2 x 4; what the chips would send
each other is read from the compiled program.
"""

import json
import subprocess
import sys

import pytest

pytest.importorskip('libtpu', reason='compiling for a TPU needs libtpu')

LAYERS, WIDTH, FSDP = 2, 512, 4
# A narrower model's parts are thinner than a tile of the chip, which then reduces them whole.
SCRIPT = (
    f'LAYERS, WIDTH, FSDP = {LAYERS}, {WIDTH}, {FSDP}'
    + """
import dataclasses, json
from bigssl_jax.parallel.topologies import configure_ahead_of_time, topology, topology_devices
configure_ahead_of_time()
import jax, jax.numpy as jnp
from bigssl_jax.parallel import batch_sharding, make_mesh, use_mesh
from bigssl_jax.parallel.collectives import collectives
from bigssl_jax.stages import schema
from bigssl_jax.stages.training_stage import make_trainer

config = schema.resolve({
    'corpora': {'c': {'manifest': 'none'}},
    'selections': {'all': {'corpus': 'c'}},
    'statistics': {'selection': 'all'},
    'encoder': {'preset': 'tiny', 'num_layers': LAYERS, 'model_dim': WIDTH, 'dtype': 'bfloat16'},
    'stages': {'p': {
        'kind': 'pretrain',
        'objectives': {'best_rq': {'objective': 'best_rq', 'stream': 's', 'codebook_size': 256}},
        'streams': {'s': {'sources': {'all': {'selection': 'all'}}}},
        'optimizer': {'groups': {'all': {'algorithm': 'adafactor'}}},
    }},
})
mesh = make_mesh({'data': 2, 'fsdp': FSDP}, topology_devices(topology('v5e-8')))
trainer = make_trainer(config, 'p', mesh, None)
mean = jax.ShapeDtypeStruct((80,), jnp.float32)
state = trainer.abstract_state({'feature_mean': mean, 'feature_std': mean})
shapes = {'audio': ((16, 64000), jnp.int16), 'sample_counts': ((16,), jnp.int32),
          'rows': ((16,), jnp.int32)}
batch = {name: jax.ShapeDtypeStruct(*given, sharding=batch_sharding(mesh))
         for name, given in shapes.items()}
rate = jax.ShapeDtypeStruct((), jnp.float32)
with use_mesh(mesh):
    lowered = trainer.train_step().lower(
        state, {'best_rq': batch}, {'all': rate}, jax.eval_shape(lambda: jax.random.key(0)))
found = collectives(lowered.compile().as_text(), mesh)
print(json.dumps([dataclasses.asdict(item) for item in found]))
"""
)


@pytest.fixture(scope='module')
def found():
    """Collectives of the compiled step, as dicts."""
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def along_fsdp(found, operation):
    return [c for c in found if c['axes'] == ['fsdp'] and c['operation'] == operation]


def test_gradients_of_the_blocks_are_reduce_scattered_in_every_layer(found):
    # 16 D^2 in the feed-forward modules, 4 D^2 in attention, 3 D^2 in the convolution module.
    matrices = 23 * WIDTH**2 * LAYERS
    sent = matrices * 2 * (FSDP - 1) / FSDP  # bfloat16, in a ring
    in_scan = [c for c in along_fsdp(found, 'reduce-scatter') if c['count'] == LAYERS]
    assert sum(c['bytes_per_device'] for c in in_scan) == pytest.approx(sent, rel=0.03)
    assert {c['dtype'] for c in in_scan} == {'bf16'}


def test_what_is_all_reduced_along_fsdp_is_small_beside_it(found):
    total = {
        operation: sum(c['bytes_per_device'] for c in along_fsdp(found, operation))
        for operation in ('reduce-scatter', 'all-reduce')
    }
    assert total['all-reduce'] < 0.05 * total['reduce-scatter']


def test_gathered_matrices_travel_in_the_compute_dtype(found):
    gathered = [c for c in along_fsdp(found, 'all-gather') if 'blocks' in c['source']]
    wide = sum(c['bytes_per_device'] for c in gathered if c['dtype'] != 'bf16')
    assert wide < 0.05 * sum(c['bytes_per_device'] for c in gathered)
