"""Programs that XLA really compiles: for eight CPU devices, and by libtpu for TPUs of every kind.

Devices are chosen when a process starts, so each part is one process that prints JSON.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from bigssl_jax.parallel.topologies import CHIPS, GIB

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="libtpu is not installed (pip install 'bigssl-jax[plan]')",
)

# A stack of two products a layer, parameters split over fsdp, gathered for use; its gradient.
STACK = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from bigssl_jax.parallel import make_mesh
from bigssl_jax.parallel.collectives import bytes_by_axes, collectives, ideal_fsdp_bytes
from bigssl_jax.parallel.cost import count_flops, roofline
from bigssl_jax.parallel.hbm import hbm_bytes

BATCH = ('slice', 'data', 'fsdp')

def compiled(mesh, layers, width, rows, dtype):
    def split(*axes):
        return NamedSharding(mesh, P(*axes))

    def loss(ws, x):
        def body(x, w):
            h = jnp.maximum(x @ w[0].astype(dtype), 0)
            x = jax.lax.with_sharding_constraint(x + h @ w[1].astype(dtype), split(BATCH))
            return x, None
        return (jax.lax.scan(jax.checkpoint(body), x, ws)[0].astype(jnp.float32) ** 2).sum()

    def step(ws, x):
        return jax.tree.map(lambda w, g: w - g, ws, jax.grad(loss)(ws, x))

    wide = (layers, width, 4 * width)
    ws = (jax.ShapeDtypeStruct(wide, jnp.float32, sharding=split(None, 'fsdp')),
          jax.ShapeDtypeStruct((layers, wide[2], width), jnp.float32,
                               sharding=split(None, None, 'fsdp')))
    x = jax.ShapeDtypeStruct((rows, 128, width), dtype, sharding=split(BATCH))
    out = jax.tree.map(lambda w: w.sharding, ws)
    program = jax.jit(step, donate_argnums=0, out_shardings=out).lower(ws, x).compile()
    return program.as_text(), count_flops(step, ws, x).total

def summary(text, mesh):
    sums, counts = {}, {}
    for item in collectives(text, mesh):
        name = item.operation + ' ' + '+'.join(item.axes)
        sums[name] = sums.get(name, 0) + item.bytes_per_device
        counts[name] = counts.get(name, 0) + item.count
    return {'sums': sums, 'counts': counts}
"""

ON_CPU = (
    STACK
    + """
mesh = make_mesh({'data': 2, 'fsdp': 4})
text, _ = compiled(mesh, 7, 16, 16, jnp.float32)
stack = summary(text, mesh)

def mean(x):
    return jax.lax.with_sharding_constraint(x.mean(0), NamedSharding(mesh, P()))
x = jax.ShapeDtypeStruct((8, 1000), jnp.float32, sharding=NamedSharding(mesh, P(('data', 'fsdp'))))
one = summary(jax.jit(mean).lower(x).compile().as_text(), mesh)

def moved(layers):
    # One layer's parameters and activations, without the partitioner.
    def run(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]
    shapes = (jax.ShapeDtypeStruct((layers, 64, 64), jnp.float32),
              jax.ShapeDtypeStruct((32, 64), jnp.float32))
    return hbm_bytes(jax.jit(run).lower(*shapes).compile().as_text())

product = jax.jit(jnp.matmul).lower(*[jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2).compile()
print(json.dumps({
    'stack': stack, 'one': one, 'moved': [moved(n) for n in (4, 8, 16)],
    'product': [hbm_bytes(product.as_text()), product.cost_analysis()['bytes accessed']],
}))
"""
)


def run(script, **environment):
    done = subprocess.run(
        [sys.executable, '-c', script],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope='module')
def on_cpu():
    # The optimisation level is of code generation; what is measured comes before it.
    flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
    return run(ON_CPU, XLA_FLAGS=flags)[0]


def test_gathers_in_a_scan_on_eight_devices_have_the_bytes_of_the_parameters(on_cpu):
    layer = 2 * 16 * 64 * 4  # two float32 kernels
    sums, counts = on_cpu['stack']['sums'], on_cpu['stack']['counts']
    # Forward and backward, 7 layers; 3 of 4 parts come from elsewhere.
    assert sums['all-gather fsdp'] == 2 * 7 * layer * 3 / 4
    assert counts['all-gather fsdp'] == 2 * 7 * 2
    # XLA:CPU has no reduce-scatter here: whole gradients over fsdp, then each part over data.
    assert sums['all-reduce fsdp'] == 7 * layer * 2 * 3 / 4
    assert sums['all-reduce data'] == 7 * layer / 4 * 2 * 1 / 2
    assert len(sums) == 3


def test_one_reduction_on_eight_devices(on_cpu):
    assert on_cpu['one']['sums'] == {'all-reduce data+fsdp': 2 * 7 / 8 * 1000 * 4}


def test_hbm_of_a_scan_grows_with_its_layers_and_a_product_agrees_with_xla(on_cpu):
    four, eight, sixteen = on_cpu['moved']
    # Every layer reads its own kernel, not the whole stack: as much again for as many again.
    assert sixteen - eight == pytest.approx(2 * (eight - four))
    kernel, activation = 64 * 64 * 4, 32 * 64 * 4
    assert kernel + 2 * activation <= (eight - four) / 4 <= 3 * kernel + 8 * activation
    assert on_cpu['product'][0] == on_cpu['product'][1] == 3 * 64 * 64 * 4


AHEAD_OF_TIME = (
    STACK
    + """
import re
from bigssl_jax.parallel import use_mesh
from bigssl_jax.parallel.topologies import (
    CHIPS, configure_ahead_of_time, topology, topology_devices, topology_names)
configure_ahead_of_time()
found = {'devices': {}, 'wrong': [], 'hbm': {}, 'stacks': {}, 'meshes': {}}

names = topology_names() + ['2xv5e-256', '4xv5p-128', '2xtpu7x-128', 'v5p-12288', 'v5p:4x4x12']
for name in names:
    devices = topology_devices(topology(name))
    found['devices'][name] = len(devices)
    slices = {getattr(device, 'slice_index', None) or 0 for device in devices}
    # Chips lie where the shape says: coordinates from 0 to side - 1.
    sides = tuple(max(d.coords[i] for d in devices) + 1 for i in range(3))
    if sides[:len(topology(name).shape)] != topology(name).shape:
        found['wrong'].append(name)
    if len(slices) != topology(name).slices or len(devices) != topology(name).devices:
        found['wrong'].append(name)

for name in ('v5e-256', 'v6e-256', 'v5p-128', 'v4-512'):
    mesh = make_mesh({'data': -1, 'fsdp': 16}, topology_devices(topology(name)))
    found['meshes'][name] = [mesh.shape['fsdp'], len({d.id for d in mesh.devices.flat})]

for name in CHIPS:
    # A program too large for any: the compiler says how much it may use.
    devices = topology_devices(topology(f'{name}-8'))[:1]
    place = NamedSharding(make_mesh({}, devices), P())
    huge = jax.ShapeDtypeStruct((400, 2**28), jnp.float32, sharding=place)
    try:
        jax.jit(jnp.sin).lower(huge).compile()
    except Exception as error:
        found['hbm'][name] = float(re.search(r'available HBM \\(([\\d.]+)G\\)', str(error))[1])

for name, axes in (('v4-32', {'data': 2, 'fsdp': 8}), ('2xv5e-16', {'slice': 2, 'fsdp': 16})):
    mesh = make_mesh(axes, topology_devices(topology(name)))
    text, flops = compiled(mesh, 3, 256, 2 * mesh.size, jnp.bfloat16)
    bytes_ = 3 * 2 * 4 * 256**2 * 2
    parts = collectives(text, mesh)
    limits = roofline(topology(name), mesh, flops / mesh.size, hbm_bytes(text),
                      bytes_by_axes(parts))
    found['stacks'][name] = summary(text, mesh) | {
        'ideal': ideal_fsdp_bytes(bytes_, bytes_, mesh), 'hbm': hbm_bytes(text),
        'roofline': [limits.compute, limits.hbm, limits.ici, limits.dcn], 'bound': limits.bound}

from bigssl_jax.models import ConformerConfig, Encoder
config = ConformerConfig(2, 64, 4, dtype='bfloat16', remat='full', dropout=0.0)
encoder, mesh = Encoder(config), make_mesh({'fsdp': 4}, topology_devices(topology('v5e-4')))
features = jax.ShapeDtypeStruct((8, 64, 80), jnp.float32, sharding=NamedSharding(mesh, P('fsdp')))
mask = jax.ShapeDtypeStruct((8, 64), jnp.bool_, sharding=NamedSharding(mesh, P('fsdp')))
with use_mesh(mesh):
    params = jax.eval_shape(encoder.init, jax.random.key(0), features, mask)
    step = jax.grad(lambda p, f, m: encoder.apply(p, f, m)[0].sum())
    program = jax.jit(step).lower(params, features, mask).compile()
found['encoder'] = {
    'peak': program.memory_analysis().peak_memory_in_bytes,
    'collectives': len(collectives(program.as_text(), mesh)),
    'hbm': hbm_bytes(program.as_text()),
}
found['default'] = jax.devices()[0].platform
print(json.dumps(found))
"""
)


@pytest.fixture(scope='module')
def ahead_of_time():
    return run(AHEAD_OF_TIME)


@needs_libtpu
def test_libtpu_accepts_every_name_and_shows_the_devices_of_the_table(ahead_of_time):
    found, _ = ahead_of_time
    assert found['wrong'] == []
    assert found['devices']['v5e-256'] == 256
    assert found['devices']['v5p-128'] == 64
    assert found['devices']['tpu7x-128'] == 128
    assert found['devices']['2xv5e-256'] == 512


@needs_libtpu
def test_sixteen_shards_fit_every_pod_shape_that_is_planned(ahead_of_time):
    """Also 4 x 8 x 8 chips, of which no sides make up 16 x 16."""
    assert ahead_of_time[0]['meshes'] == {
        'v5e-256': [16, 256],
        'v6e-256': [16, 256],
        'v5p-128': [16, 64],
        'v4-512': [16, 256],
    }


@needs_libtpu
def test_the_table_has_the_memory_that_the_compiler_allows(ahead_of_time):
    found, _ = ahead_of_time
    for name, chip in CHIPS.items():
        per_device = chip.hbm_bytes / chip.devices_per_chip / GIB
        assert found['hbm'][name] == pytest.approx(per_device, abs=0.02), name


@needs_libtpu
def test_a_torus_of_v4_moves_exactly_the_ideal_bytes(ahead_of_time):
    stack = ahead_of_time[0]['stacks']['v4-32']
    ideal = stack['ideal']
    assert stack['sums'] == {
        'all-gather fsdp': ideal['all-gather'],
        'reduce-scatter fsdp': ideal['reduce-scatter'],
        'all-reduce data': ideal['all-reduce'],
    }


@needs_libtpu
def test_two_slices_exchange_gradient_parts_over_the_data_centre_network(ahead_of_time):
    stack = ahead_of_time[0]['stacks']['2xv5e-16']
    assert stack['sums']['all-gather fsdp'] == stack['ideal']['all-gather']
    assert stack['sums']['all-reduce slice'] == stack['ideal']['all-reduce']
    compute, hbm, ici, dcn = stack['roofline']
    assert dcn == pytest.approx(stack['ideal']['all-reduce'] / 3.125e9)
    # 4x4 chips of v5e do not close to rings: two lines, one of 4 links each.
    sent = sum(n for name, n in stack['sums'].items() if name.endswith('fsdp'))
    assert ici == pytest.approx(sent / (2 * 45e9))
    assert hbm == pytest.approx(stack['hbm'] / 819e9)
    assert stack['bound'] == 'ici' and compute < dcn < ici


@needs_libtpu
def test_the_encoder_compiles_for_a_tpu_while_the_cpu_stays_the_default(ahead_of_time):
    found, errors = ahead_of_time
    assert found['default'] == 'cpu'
    assert 0 < found['encoder']['peak'] < 15.75 * GIB
    assert found['encoder']['collectives'] > 0 and found['encoder']['hbm'] > 0
    assert 'TPU_' not in errors


def test_a_machine_without_accelerator_is_a_cpu_and_libtpu_stays_silent():
    from bigssl_jax.parallel.startup import has_accelerator

    if has_accelerator():
        pytest.skip('this machine has an accelerator')
    script = (
        'from bigssl_jax.parallel.startup import configure_platform; configure_platform(1);'
        ' import jax, json; print(json.dumps([d.platform for d in jax.devices()]))'
    )
    found, errors = run(script, JAX_PLATFORMS='', XLA_FLAGS='')
    assert (found, errors) == (['cpu'], '')
