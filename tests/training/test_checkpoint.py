"""Checkpoints come back bit for bit on any mesh, the newest are kept, another run's are refused."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disks import small_disk

from bigssl_jax.parallel.fingerprint import fingerprint
from bigssl_jax.training.checkpoint import (
    TREE,
    Checkpointer,
    CheckpointError,
    Keep,
    tree_hash,
)
from bigssl_jax.training.state import TrainState

IDENTITY = {'config': 'c0ffee', 'stream of ctc': 'feed'}


def make_state(step: int) -> TrainState:
    key = jax.random.key(step)
    params = {
        'encoder': {'kernel': jax.random.normal(key, (3, 4)), 'bias': jnp.full(4, 1e-30)},
        'heads': {'ctc': {'kernel': jax.random.normal(key, (4, 2))}},
    }
    return TrainState(
        step=jnp.int32(step),
        skipped=jnp.int32(1),
        params=params,
        optimizer={'mu': jax.random.normal(key, (5,)).astype(jnp.bfloat16)},
        ema={},
        constants={'encoder': {'feature_mean': jnp.asarray([np.pi, np.inf, -0.0])}, 'heads': {}},
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture
def open_checkpointer(tmp_path):
    """Opens checkpointers of one folder, and closes them at the end."""
    opened = []

    def open_one(keep=2, identity=IDENTITY, accepted=()):
        opened.append(Checkpointer(tmp_path / 'checkpoints', Keep(keep), identity, accepted))
        return opened[-1]

    yield open_one
    for checkpointer in opened:
        checkpointer.close()


def test_a_state_comes_back_bit_for_bit(open_checkpointer):
    first = open_checkpointer()
    assert first.steps() == []
    state = make_state(7)
    first.save(7, state)
    first.wait()
    second = open_checkpointer()
    assert second.steps() == [7]
    restored, _ = second.restore(7, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert fingerprint(restored) == fingerprint(state)
    for ours, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert ours.dtype == saved.dtype
        assert np.asarray(ours).tobytes() == np.asarray(saved).tobytes()


def test_the_newest_are_kept_and_a_step_is_saved_once(open_checkpointer, tmp_path):
    checkpointer = open_checkpointer(keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, make_state(step))
    checkpointer.save(3, make_state(99))
    checkpointer.wait()
    assert checkpointer.steps()[0] == 3
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '3']
    restored, _ = checkpointer.restore(3, abstract(make_state(3)))
    assert fingerprint(restored) == fingerprint(make_state(3))


def test_every_second_and_the_best_stay_beside_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path, Keep(1, every=4, best=2), IDENTITY)
    scores = {1: 0.9, 2: 0.3, 3: 0.8, 5: 0.2, 6: 0.4}
    for step in range(1, 10):
        scored = {'dev_wer': scores[step], 'dev_cer': 0.0} if step in scores else None
        checkpointer.save(step, make_state(step), {'passed_over': step}, scored)
    checkpointer.wait()
    assert checkpointer.steps() == [9, 8, 5, 4, 2]
    assert checkpointer.best_step() == 5
    assert checkpointer.restore(5, abstract(make_state(5)))[1] == {'passed_over': 5}
    checkpointer.drop_after(4)
    assert checkpointer.steps() == [4, 2] and checkpointer.best_step() == 2
    checkpointer.close()


@pytest.mark.parametrize('name', IDENTITY)
def test_another_identity_is_refused_by_name_and_values(open_checkpointer, name):
    checkpointer = open_checkpointer()
    checkpointer.save(4, make_state(4))
    checkpointer.wait()
    other = open_checkpointer(identity={**IDENTITY, name: 'other'})
    with pytest.raises(CheckpointError) as refusal:
        other.restore(4, abstract(make_state(4)))
    for told in (f'another {name}', IDENTITY[name], 'other', 'use another workdir'):
        assert told in str(refusal.value)


def test_another_identity_can_be_accepted_but_no_other_arrays(open_checkpointer):
    shapes = {**IDENTITY, TREE: tree_hash(make_state(4))}
    checkpointer = open_checkpointer(identity=shapes)
    checkpointer.save(4, make_state(4))
    checkpointer.wait()
    grown = {**shapes, 'corpus': 'grown'}
    other = open_checkpointer(identity=grown)
    assert other.accept() == {4: shapes}
    assert other.accept() == {}
    assert fingerprint(other.restore(4, abstract(make_state(4)))[0]) == fingerprint(make_state(4))
    # It stays accepted where the caller has kept it.
    later = open_checkpointer(identity=grown, accepted=[shapes])
    assert later.restore_newest(abstract(make_state(4)))[0] == 4
    wide = open_checkpointer(identity={**grown, TREE: tree_hash({'wide': np.zeros(9)})})
    wide.accept()
    with pytest.raises(CheckpointError, match='another tree of arrays'):
        wide.restore(4, abstract(make_state(4)))


def test_an_unfinished_checkpoint_is_not_the_latest_and_does_not_stay(open_checkpointer, tmp_path):
    checkpointer = open_checkpointer()
    checkpointer.save(5, make_state(5))
    checkpointer.wait()
    # What Orbax leaves when it is killed while saving step 6.
    (tmp_path / 'checkpoints' / '6.orbax-checkpoint-tmp').mkdir()
    assert open_checkpointer().steps() == [5]
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['5']


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(CheckpointError, match='cannot write checkpoints'):
        Checkpointer(tmp_path / 'file' / 'checkpoints', Keep(1), IDENTITY)


@pytest.mark.slow
def test_a_full_and_a_read_only_disk_are_one_line_and_what_was_saved_stays(tmp_path, capfd):
    state = make_state(1)
    noise = np.random.default_rng(0).normal(size=(500, 400)).astype(np.float32)
    state = dataclasses.replace(state, params={'kernel': jnp.asarray(noise)})
    with small_disk(tmp_path / 'disk', '4m') as disk:
        folder = disk.seen / 'checkpoints'
        checkpointer = Checkpointer(folder, Keep(99), IDENTITY)
        with pytest.raises(CheckpointError) as refusal:
            for step in range(1, 20):
                checkpointer.save(step, state)
        full = f'cannot write checkpoints to {folder}: No space left on device; mend that'
        assert full in str(refusal.value)
        with contextlib.suppress(CheckpointError):
            checkpointer.close()
        assert 'Traceback' not in capfd.readouterr().err  # not of Orbax's threads, either

        disk.remount('size=16m')
        again = Checkpointer(folder, Keep(99), IDENTITY)
        newest = again.steps()[0]
        assert again.steps() == list(range(newest, 0, -1)) and newest < 6
        assert fingerprint(again.restore(newest, abstract(state))[0]) == fingerprint(state)
        again.save(newest + 1, state)
        again.close()
        disk.remount('ro')
        with pytest.raises(CheckpointError, match='checkpoints: it is read-only'):
            Checkpointer(folder, Keep(99), IDENTITY)


# Random bits in all that a stage may keep: two optimizers, averages, constants, counters.
COMMON = """
import json, os, pathlib, signal, sys, zlib
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from bigssl_jax.parallel import make_mesh
from bigssl_jax.parallel.fingerprint import fingerprint
from bigssl_jax.training.checkpoint import Checkpointer, Keep
from bigssl_jax.training.optimizers import GROUP_DEFAULTS, make_optimizer
from bigssl_jax.training.state import TrainState

IDENTITY = {'config': 'c0ffee'}
GROUPS = {
    'heads': {**GROUP_DEFAULTS, 'pattern': '^heads/', 'algorithm': 'adamw', 'weight_decay': 0.1},
    'encoder': {**GROUP_DEFAULTS, 'pattern': '^encoder/', 'algorithm': 'adafactor'},
}
SHAPES = {'encoder': {'blocks': {'kernel': (2, 128, 256), 'bias': (2, 256)}},
          'heads': {'ctc': {'kernel': (128, 16), 'bias': (16,)}}}

def make():
    params = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    constants = {'encoder': {'feature_mean': jnp.zeros(40)},
                 'heads': {'ctc': {}, 'best_rq': {'codebook': jnp.zeros((4, 64, 16))}}}
    optimizer, _ = make_optimizer(params, GROUPS)
    return TrainState(step=jnp.int32(0), skipped=jnp.int32(0), params=params,
                      optimizer=optimizer.init(params), ema=params, constants=constants)

def abstract(*sizes):
    axes = dict(zip(('data', 'fsdp', 'tensor'), sizes))
    mesh = make_mesh(axes, jax.devices()[:np.prod(sizes)])
    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        spec = {3: P(None, 'fsdp', 'tensor'), 2: P('fsdp', 'tensor')}.get(leaf.ndim, P())
        if leaf.size < 16:  # adafactor leaves a single zero where it keeps nothing
            spec = P()
        elif 'bias' in name or leaf.shape[:1] == (2,) and leaf.ndim == 2 or 'codebook' in name:
            spec = P(*[None] * (leaf.ndim - 1), 'tensor')
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(make))

def fill(abstract_state, seed):
    def one(path, leaf):
        rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        raw = rng.bytes(leaf.size * leaf.dtype.itemsize)
        value = np.frombuffer(raw, leaf.dtype).reshape(leaf.shape)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: value[at])
    return jax.tree_util.tree_map_with_path(one, abstract_state)
"""

MESHES = (
    COMMON
    + """
folder = pathlib.Path(sys.argv[1])
found = []
for number, (start, end) in enumerate([
    ((1, 1, 1), (1, 8, 1)), ((1, 8, 1), (2, 2, 2)), ((2, 2, 2), (1, 1, 1)),
]):
    state, wanted = fill(abstract(*start), number), abstract(*end)
    checkpointer = Checkpointer(folder / str(number), Keep(1), IDENTITY)
    checkpointer.save(5, state)
    checkpointer.wait()
    restored, _ = checkpointer.restore(5, wanted)
    checkpointer.close()
    pairs = list(zip(*(jax.tree.leaves(t) for t in (restored, state, wanted)), strict=True))
    found.append({
        'equal': fingerprint(restored) == fingerprint(state),
        'bytes': all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b, _ in pairs),
        'laid out': all(a.sharding == c.sharding and a.dtype == c.dtype for a, _, c in pairs),
        'split': sum(not a.sharding.is_fully_replicated for a, _, _ in pairs),
    })
leaves = jax.tree_util.tree_leaves_with_path(state)
paths = [jax.tree_util.keystr(path) + str(leaf.dtype) for path, leaf in leaves]
found.append([any(word in path for path in paths)
              for word in ('.mu', '.nu', '.v_row', '.ema', 'codebook', 'bfloat16', 'int32')])
# The last of all: killed in the middle of a save.
checkpointer = Checkpointer(folder / 'killed', Keep(2), IDENTITY)
checkpointer.save(1, fill(abstract(1, 8, 1), 1))
checkpointer.wait()
print(json.dumps(found), flush=True)
checkpointer.save(2, fill(abstract(1, 8, 1), 2))
os.kill(os.getpid(), signal.SIGKILL)
"""
)

AFTER_KILL = (
    COMMON
    + """
checkpointer = Checkpointer(pathlib.Path(sys.argv[1]) / 'killed', Keep(2), IDENTITY)
step = checkpointer.steps()[0]
restored, _ = checkpointer.restore(step, abstract(1, 1, 1))
checkpointer.close()
print(json.dumps([step, fingerprint(restored) == fingerprint(fill(abstract(1, 1, 1), step))]))
"""
)

PAIR = (
    COMMON
    + """
folder, process, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize('127.0.0.1:' + port, num_processes=2, process_id=process)
state = fill(abstract(1, 2, 2), 3)
checkpointer = Checkpointer(folder, Keep(1), IDENTITY)
checkpointer.save(7, state)
checkpointer.wait()
checkpointer.close()
print(json.dumps([jax.process_count(), fingerprint(state)]))
"""
)

ALONE = (
    COMMON
    + """
checkpointer = Checkpointer(pathlib.Path(sys.argv[1]), Keep(1), IDENTITY)
meshes = ((1, 1, 1), (2, 2, 2))
found = [fingerprint(checkpointer.restore(7, abstract(*sizes))[0]) for sizes in meshes]
checkpointer.close()
print(json.dumps([*found, fingerprint(fill(abstract(1, 1, 1), 3))]))
"""
)


def start(script: str, *words: object, devices: int) -> subprocess.Popen:
    """Starts a script on some fake devices."""
    flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    return subprocess.Popen(
        [sys.executable, '-c', script, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'XLA_FLAGS': flags},
    )  # fmt: skip


def ended(process: subprocess.Popen, code: int = 0):
    """What the script printed last, as JSON."""
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == code, err
    return json.loads(out.splitlines()[-1])


def test_every_mesh_restores_what_another_saved_and_a_kill_leaves_the_last_whole_one(tmp_path):
    *found, kinds = ended(start(MESHES, tmp_path, devices=8), -signal.SIGKILL)
    assert len(found) == 3
    for case in found:
        assert case['equal'] and case['bytes'] and case['laid out'], found
    assert [case['split'] > 5 for case in found] == [True, True, False]
    assert all(kinds), 'the state lacks something that a stage may keep'
    step, whole = ended(start(AFTER_KILL, tmp_path, devices=1))
    assert step == 1
    assert whole


@pytest.mark.slow
def test_one_process_restores_what_two_saved(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    pair = [start(PAIR, tmp_path / 'c', process, port, devices=2) for process in range(2)]
    first, second = [ended(process) for process in pair]
    assert first == second
    assert first[0] == 2
    alone = ended(start(ALONE, tmp_path / 'c', devices=8))
    assert set(alone) == {first[1]}
