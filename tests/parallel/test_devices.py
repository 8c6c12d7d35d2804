"""One device or eight, replicated or split: the same parameters at the start, the same losses.

The device count cannot change in a running process, so one process with eight devices does all the
comparisons, over meshes of 1, 2, 4 and 8 of them, and prints what it found as JSON.
"""

import functools
import json
import os
import subprocess
import sys

import pytest

# Runs whose numbers must agree: (data x fsdp x tensor, micro-batches).  Compiling is what this
# costs, so each mesh sees few objectives, and the default suite one group.  Encoder dropout takes
# one key per piece, so pieces go without.
GROUPS = {
    'rnnt': {'objectives': ('rnnt',), 'dropout': 0.1, 'runs': (('1x1x1', 1), ('2x2x2', 1))},
    'pieces': {'objectives': ('hat',), 'dropout': 0.0, 'runs': (('1x1x4', 1), ('2x1x1', 2))},
    'text': {'objectives': ('next_token',), 'dropout': 0.1, 'runs': (('1x1x1', 1), ('2x2x2', 1))},
    'split': {'objectives': ('ctc',), 'dropout': 0.1, 'runs': (('8x1x1', 1), ('1x8x1', 1))},
    'all': {
        'objectives': ('best_rq', 'wav2vec2', 'ctc', 'rnnt', 'hat'),
        'dropout': 0.1,
        'runs': (('1x1x1', 1), ('2x2x2', 1)),
    },
}
SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]
EVERY = ['rnnt', *(pytest.param(name, marks=SLOW) for name in ('pieces', 'split', 'text', 'all'))]
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

ROWS, SECONDS, VOCABULARY, STEPS = 16, 1.0, 12, 2
DECODER = {'prediction_layers': 1, 'prediction_dim': 16, 'joint_dim': 16}
OBJECTIVES = {
    'best_rq': {'objective': 'best_rq', 'stream': 's', 'codebook_size': 64},
    'wav2vec2': {'objective': 'wav2vec2', 'stream': 's', 'num_negatives': 10, 'target_dim': 16},
    'rnnt': {'objective': 'rnnt', 'stream': 's', 'ctc_weight': 0.5, 'prediction_dropout': 0.1,
             **DECODER},
    'ctc': {'objective': 'ctc', 'stream': 's'},
    'hat': {'objective': 'hat', 'stream': 's', 'prediction': 'stateless', **DECODER},
    'next_token': {'objective': 'next_token', 'stream': 's', 'model_dim': 32},
}


def config(objectives, micro_batches, dropout):
    kind, source = 'pretrain', {'selection': 'all', 'labels': 'text'}
    if objectives == ['next_token']:
        kind, source = 'language_model', {'selection': 'all'}
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
            'kind': kind,
            'objectives': {name: OBJECTIVES[name] for name in objectives},
            'streams': {'s': {'sources': {'all': source}}},
            **({'spec_augment': {'freq_width': 8}} if kind == 'pretrain' else {}),
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
            'label_counts': np.where(counts > 0, 6, 0).astype(np.int32),
            'word_counts': np.where(counts > 0, 2, 0).astype(np.int32)}

STATISTICS = {'feature_mean': np.full(40, 10, np.float32),
              'feature_std': np.full(40, 3, np.float32)}

def run(mesh_name, objectives, micro_batches, dropout):
    sizes = dict(zip(('data', 'fsdp', 'tensor'), map(int, mesh_name.split('x'))))
    mesh = make_mesh(sizes, jax.devices()[:np.prod(list(sizes.values()))])
    trainer = make_trainer(config(objectives, micro_batches, dropout), 'all', mesh, VOCABULARY)
    state = trainer.make_state(STATISTICS if trainer.encoder else {})
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

group = json.loads(sys.argv[1])
found = [run(mesh, group['objectives'], pieces, group['dropout'])
         for mesh, pieces in group['runs']]
print(json.dumps(found))
"""


@functools.cache
def found(group):
    """What the runs of a group gave: hashes of the first state, losses and norms of two steps."""
    environment = {**os.environ, 'XLA_FLAGS': FLAGS}
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, json.dumps(GROUPS[group])],
        capture_output=True, text=True, env=environment, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('group', EVERY)
def test_initial_parameters_and_constants_have_the_same_bits_on_any_mesh(group):
    one, other = found(group)
    assert one['params'] == other['params']
    assert one['constants'] == other['constants']


@pytest.mark.parametrize('group', EVERY)
def test_two_steps_give_the_same_losses(group):
    """On every mesh, and in two pieces as well as whole."""
    one, other = found(group)
    for ours, theirs in zip(one['losses'], other['losses'], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert one['weights'] == other['weights']
    assert one['ctc'] == pytest.approx(other['ctc'], rel=1e-4)
    # Adam would hide a gradient that is some factor too large.
    assert one['norms'] == pytest.approx(other['norms'], rel=1e-3)
    assert one['finite'] and other['finite']


@pytest.mark.parametrize('group', EVERY)
def test_the_state_lies_after_a_step_as_before_so_nothing_compiles_twice(group):
    assert all(run['stays'] for run in found(group))


@pytest.mark.parametrize('group', EVERY)
def test_the_second_step_follows_from_an_update(group):
    first, second = found(group)[0]['losses']
    assert set(first) == set(GROUPS[group]['objectives'])
    for name in set(first) & {'ctc', 'rnnt', 'hat', 'next_token'}:
        assert second[name] != pytest.approx(first[name], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_fsdp_mesh_splits_nearly_all_parameters_and_a_data_mesh_none():
    by_data, by_fsdp = found('split')
    assert by_data['split'] == 0.0
    assert by_fsdp['split'] > 0.9
    assert found('pieces')[0]['split'] > 0.7  # by tensor
