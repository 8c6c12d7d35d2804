"""One device or eight, replicated or split: the same parameters at the start, the same losses.

The device count cannot change in a running process, so one process with eight devices does all the
comparisons, over meshes of 1, 2, 4 and 8 of them, and prints what it found as JSON.
"""

import json
import os
import subprocess
import sys

import pytest

# Five programs of all objectives: minutes of compiling.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

REFERENCE = '1x1x1'
MESHES = ('1x1x4', '8x1x1', '1x8x1', '2x2x2')  # data x fsdp x tensor
# What is compared is the partitioning; code generation may be quick.
FLAGS = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'

SCRIPT = """
import json, sys
import jax, numpy as np
from bigssl_jax.parallel import make_mesh, use_mesh
from bigssl_jax.parallel.fingerprint import fingerprint
from bigssl_jax.stages import schema
from bigssl_jax.stages.training_stage import make_trainer
from bigssl_jax.training.loop import to_devices

ROWS, SECONDS, VOCABULARY, STEPS = 8, 0.6, 12, 2
DECODER = {'prediction_layers': 1, 'prediction_dim': 16, 'joint_dim': 16}
OBJECTIVES = {
    'best_rq': {'objective': 'best_rq', 'stream': 's', 'codebook_size': 64},
    'wav2vec2': {'objective': 'wav2vec2', 'stream': 's', 'num_negatives': 10, 'target_dim': 16},
    'rnnt': {'objective': 'rnnt', 'stream': 's', 'ctc_weight': 0.5, 'prediction_dropout': 0.1,
             **DECODER},
    'hat': {'objective': 'hat', 'stream': 's', 'prediction': 'stateless', **DECODER},
}


def config(objectives, micro_batches, dropout):
    return schema.resolve({
        'seed': 1,
        'corpora': {'c': {'manifest': 'none'}},
        'selections': {'all': {'corpus': 'c'}},
        'statistics': {'selection': 'all'},
        'audio': {'num_mels': 40},
        'encoder': {'preset': 'tiny', 'num_layers': 2, 'model_dim': 32, 'num_heads': 4,
                    'kernel_size': 5, 'subsampling_channels': (4, 8), 'num_mels': 40,
                    'dropout': dropout},
        'stages': {'all': {
            'kind': 'pretrain',
            'objectives': {name: OBJECTIVES[name] for name in objectives},
            'streams': {'s': {'sources': {'all': {'selection': 'all', 'labels': 'text'}}}},
            'spec_augment': {'freq_width': 8},
            'optimizer': {'micro_batches': micro_batches, 'ema_decay': 0.9},
        }},
    })

def batch(step):
    rng = np.random.default_rng(step)
    samples = int(SECONDS * 16000)
    counts = rng.integers(samples // 2, samples + 1, ROWS).astype(np.int32)
    counts[-1] = 0  # a filler
    envelope = 1 + np.sin(np.arange(samples) * rng.uniform(1e-3, 3e-3, (ROWS, 1)))
    audio = 2000 * envelope * rng.standard_normal((ROWS, samples))
    audio[np.arange(samples) >= counts[:, None]] = 0
    labels = rng.integers(3, VOCABULARY, (ROWS, 6)).astype(np.int32)
    return {'audio': audio.astype(np.int16), 'sample_counts': counts,
            'rows': np.arange(ROWS, dtype=np.int32), 'labels': labels,
            'label_counts': np.where(counts > 0, 6, 0).astype(np.int32)}

STATISTICS = {'feature_mean': np.full(40, 10, np.float32),
              'feature_std': np.full(40, 3, np.float32)}

def run(mesh_name, objectives=tuple(OBJECTIVES), micro_batches=1, dropout=0.1):
    sizes = dict(zip(('data', 'fsdp', 'tensor'), map(int, mesh_name.split('x'))))
    mesh = make_mesh(sizes, jax.devices()[:np.prod(list(sizes.values()))])
    trainer = make_trainer(config(objectives, micro_batches, dropout), 'all', mesh, VOCABULARY)
    state = trainer.make_state(STATISTICS)
    split = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    found = {
        'params': fingerprint(state.params), 'constants': fingerprint(state.constants),
        'split': sum(x.size for x in split) / sum(x.size for x in jax.tree.leaves(state.params)),
        'losses': [], 'weights': [], 'norms': [],
    }
    layout = jax.tree.map(lambda x: x.sharding, state)
    step, rates = trainer.train_step(), {'all': np.float32(3e-3)}
    with use_mesh(mesh):
        for number in range(STEPS):
            whole = {name: batch(number) for name in trainer.objectives}
            state, report = step(state, to_devices(whole, mesh), rates, jax.random.key(7))
            totals = jax.device_get(report['totals'])
            found['losses'].append({n: float(t['loss'] / t['weight']) for n, t in totals.items()})
            found['weights'].append({n: float(t['weight']) for n, t in totals.items()})
            found['ctc'] = [float(t['ctc_loss']) for t in totals.values() if 'ctc_loss' in t]
            found['norms'].append(float(report['grad_norm']))
            found['finite'] = bool(report['finite'])
    found['stays'] = jax.tree.map(lambda x: x.sharding, state) == layout
    return found

found = {name: run(name) for name in sys.argv[1:]}
# Dropout takes one key per piece, so pieces compare without it.
few = ('best_rq', 'rnnt')
found['whole'], found['pieces'] = run('1x1x1', few, 1, 0.0), run('2x1x1', few, 2, 0.0)
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def found():
    """What every mesh gave: hashes of the initial state, losses and weights of two steps."""
    environment = {**os.environ, 'XLA_FLAGS': FLAGS}
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, REFERENCE, *MESHES],
        capture_output=True, text=True, env=environment, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('mesh', MESHES)
def test_initial_parameters_and_constants_have_the_same_bits_on_any_mesh(found, mesh):
    assert found[mesh]['params'] == found[REFERENCE]['params']
    assert found[mesh]['constants'] == found[REFERENCE]['constants']


def test_an_fsdp_mesh_splits_nearly_all_parameters_and_a_data_mesh_none(found):
    assert found['8x1x1']['split'] == 0.0
    assert found['1x8x1']['split'] > 0.9
    assert found['1x1x4']['split'] > 0.7


@pytest.mark.parametrize('mesh', MESHES)
def test_two_steps_give_the_losses_of_one_device(found, mesh):
    for ours, reference in zip(found[mesh]['losses'], found[REFERENCE]['losses'], strict=True):
        assert ours == pytest.approx(reference, rel=1e-4)
    assert found[mesh]['weights'] == found[REFERENCE]['weights']
    assert found[mesh]['ctc'] == pytest.approx(found[REFERENCE]['ctc'], rel=1e-4)
    # Adam would hide a gradient that is some factor too large.
    assert found[mesh]['norms'] == pytest.approx(found[REFERENCE]['norms'], rel=1e-3)
    assert found[mesh]['finite']


@pytest.mark.parametrize('mesh', MESHES)
def test_the_state_lies_after_a_step_as_before_so_nothing_compiles_twice(found, mesh):
    assert found[mesh]['stays']


def test_the_second_step_follows_from_an_update(found):
    first, second = found[REFERENCE]['losses']
    assert set(first) == {'best_rq', 'wav2vec2', 'rnnt', 'hat'}
    for name in ('rnnt', 'hat'):
        assert second[name] != pytest.approx(first[name], rel=1e-3)


def test_two_micro_batches_on_two_devices_give_the_losses_of_one_whole_batch(found):
    for ours, whole in zip(found['pieces']['losses'], found['whole']['losses'], strict=True):
        assert ours == pytest.approx(whole, rel=1e-4)
    assert found['pieces']['weights'] == found['whole']['weights']
