"""Checkpoints come back bit for bit, only the newest are kept, another run's are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.training.checkpoint import Checkpointer, CheckpointError, tree_hash
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

    def open_one(keep=2, identity=IDENTITY):
        opened.append(Checkpointer(tmp_path / 'checkpoints', keep, identity))
        return opened[-1]

    yield open_one
    for checkpointer in opened:
        checkpointer.close()


def test_a_state_comes_back_bit_for_bit(open_checkpointer):
    first = open_checkpointer()
    assert first.latest_step() is None
    state = make_state(7)
    first.save(7, state)
    first.wait()
    second = open_checkpointer()
    assert second.latest_step() == 7
    restored = second.restore(7, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert tree_hash(restored) == tree_hash(state)
    for ours, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert ours.dtype == saved.dtype
        assert np.asarray(ours).tobytes() == np.asarray(saved).tobytes()


def test_the_newest_are_kept_and_a_step_is_saved_once(open_checkpointer, tmp_path):
    checkpointer = open_checkpointer(keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, make_state(step))
    checkpointer.save(3, make_state(99))
    checkpointer.wait()
    assert checkpointer.latest_step() == 3
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '3']
    restored = checkpointer.restore(3, abstract(make_state(3)))
    assert tree_hash(restored) == tree_hash(make_state(3))


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


def test_an_unfinished_checkpoint_is_not_the_latest(open_checkpointer, tmp_path):
    checkpointer = open_checkpointer()
    checkpointer.save(5, make_state(5))
    checkpointer.wait()
    # What Orbax leaves when it is killed while saving step 6.
    (tmp_path / 'checkpoints' / '6.orbax-checkpoint-tmp').mkdir()
    assert open_checkpointer().latest_step() == 5


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(CheckpointError, match='cannot write checkpoints'):
        Checkpointer(tmp_path / 'file' / 'checkpoints', 1, IDENTITY)


def test_the_hash_sees_names_shapes_dtypes_and_bits():
    base = {'a': np.arange(6, dtype=np.float32)}
    assert tree_hash(base) == tree_hash({'a': jnp.arange(6, dtype=jnp.float32)})
    changed = [
        {'b': base['a']},
        {'a': base['a'].reshape(2, 3)},
        {'a': base['a'].astype(np.float64)},
        {'a': np.nextafter(base['a'], np.float32(9))},
        {'a': np.array([-0.0, 1, 2, 3, 4, 5], np.float32)},
    ]
    assert len({tree_hash(tree) for tree in [base, *changed]}) == 6
