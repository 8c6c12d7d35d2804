"""RNN-T and HAT objectives against a sum over all alignments, written label by label; the joint
objective against its parts; rows that cannot be aligned.

The encoder of these tests hands on frames that stand in the batch: the contract shared by all
objectives (test_objective_contract.py) has a real one.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.objectives import CTC, HAT, RNNT

DIM = 4
SMALL = {'prediction_layers': 1, 'prediction_dim': 8, 'joint_dim': 8}
OBJECTIVES = {
    'rnnt': RNNT(6, **SMALL),
    'hat': HAT(6, **SMALL),
    'stateless': RNNT(6, prediction='stateless', **SMALL),
}
FAST_COMPILE = {'xla_backend_optimization_level': 0}


@dataclasses.dataclass(frozen=True)
class Frames:
    """In place of an EncoderCall: frames and mask come from the batch."""

    deterministic: bool = False
    dtype: str = 'float32'

    def features(self, batch):
        frames = batch['frames']
        return frames, jnp.arange(frames.shape[1]) < batch['frame_counts'][:, None]

    def augment(self, features, mask, keys):
        return features

    def encode(self, features, mask, key):
        return features, mask


def make_batch(frame_counts=(7, 5, 0, 6), label_counts=(3, 2, 0, 1), size=8):
    """Random frames, NaN behind the real ones; labels in 1..5; a filler where there is no frame."""
    rng = np.random.default_rng(0)
    rows = len(frame_counts)
    frames = rng.normal(size=(rows, size, DIM)).astype(np.float32)
    frames[np.arange(size) >= np.array(frame_counts)[:, None]] = np.nan
    return {
        'frames': frames,
        'frame_counts': np.array(frame_counts, np.int32),
        'sample_counts': np.array(frame_counts, np.int32) * 640,
        'labels': rng.integers(1, 6, (rows, 6)).astype(np.int32),
        'label_counts': np.array(label_counts, np.int32),
        'rows': np.arange(rows, dtype=np.int32),
    }


def init(objective):
    """Head parameters."""
    config = types.SimpleNamespace(model_dim=DIM)
    return nn.unbox(objective.init_params(jax.random.key(1), config))


@functools.cache
def compiled(objective):
    """The totals and their gradient, jitted."""

    def loss(params, frames, batch, key):
        batch = {**batch, 'frames': frames}
        totals = objective.totals(Frames(), params, {}, batch, key)
        return totals['loss'], totals

    function = jax.value_and_grad(loss, (0, 1), has_aux=True)
    return jax.jit(function, compiler_options=FAST_COMPILE)


def gradient(objective, params, batch, key=3):
    """(totals, gradient by parameters, gradient by frames), as numpy."""
    given = (params, batch['frames'], batch, jax.random.key(key))
    (_, totals), (of_params, of_frames) = compiled(objective)(*given)
    return jax.device_get((totals, of_params, of_frames))


def all_alignments(transducer, encoded, labels):
    """log P(labels | encoded [T, J]): the sum over paths, each a string of labels and blanks."""
    advance, log_probs = jax.jit(transducer.advance), jax.jit(transducer.log_probs)
    state, log_p = transducer.initial(1), []
    for label in [transducer.blank_id, *labels]:
        state, projected = advance(state, jnp.array([label]))
        log_p.append(np.asarray(log_probs(encoded, projected), np.float64))

    def rest(u, t):
        """Of everything from label u and frame t on."""
        if t == len(encoded):
            return 0.0 if u == len(labels) else -np.inf
        found = log_p[u][t, transducer.blank_id] + rest(u, t + 1)
        if u < len(labels):
            found = np.logaddexp(found, log_p[u][t, labels[u]] + rest(u + 1, t))
        return found

    return rest(0, 0)


@pytest.mark.parametrize('name', sorted(OBJECTIVES))
def test_loss_is_that_of_all_alignments(name):
    objective, batch = OBJECTIVES[name], make_batch()
    params = init(objective)
    encoded, mask = objective.predict(Frames(), params, batch)
    transducer = objective.transducer(params, jnp.float32)
    expected = 0.0
    for row in (0, 1, 3):
        labels = batch['labels'][row, : batch['label_counts'][row]].tolist()
        expected -= all_alignments(transducer, encoded[row, : int(mask[row].sum())], labels)
    totals, *gradients = gradient(objective, params, batch)
    assert totals['loss'] == pytest.approx(expected, rel=1e-5)
    assert (totals['weight'], totals['utterances'], totals['invalid']) == (6, 3, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def broken():
    """Rows: sound; a label too large; a negative one; the blank; more labels than frames; no
    frames; a filler."""
    batch = make_batch((7, 7, 7, 7, 2, 0, 0), (3, 3, 3, 3, 6, 3, 0))
    batch['labels'][:, :3] = 1, 2, 3
    batch['labels'][1, 1], batch['labels'][2, 1], batch['labels'][3, 1] = 6, -1, 0
    batch['sample_counts'][5] = 100
    return batch


@pytest.mark.parametrize('name', ['rnnt', 'hat'])
def test_rows_without_an_alignment_are_counted_and_weigh_nothing(name):
    objective, batch = OBJECTIVES[name], broken()
    params = init(objective)
    totals, of_params, of_frames = gradient(objective, params, batch)
    assert (totals['utterances'], totals['invalid'], totals['labels']) == (6, 4, 3 + 6)
    assert np.flatnonzero(of_frames.any(axis=(1, 2))).tolist() == [0, 4]
    sound = {key: value[[0, 4]] for key, value in batch.items()}
    alone, expected, _ = gradient(objective, params, sound)
    assert alone['loss'] == pytest.approx(totals['loss'], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), of_params, expected)
    advice = objective.health(objective.summarise(totals), 100)
    assert f'{name}.max_invalid=0.2' in advice and '67%' in advice
    assert objective.health(objective.summarise(alone), 100) is None


def test_the_joint_objective_is_the_weighted_sum_of_its_parts():
    joint, batch = RNNT(6, ctc_weight=0.3, **SMALL), broken()
    head = init(joint)
    totals, _, of_frames = gradient(joint, head, batch)
    ctc, _, of_ctc = gradient(CTC(6), head.pop('ctc'), batch)
    rnnt, _, of_rnnt = gradient(OBJECTIVES['rnnt'], head, batch)
    assert totals['loss'] == pytest.approx(rnnt['loss'] + 0.3 * ctc['loss'], rel=1e-5)
    np.testing.assert_allclose(of_frames, of_rnnt + 0.3 * of_ctc, atol=1e-5)
    summary = joint.summarise(totals)
    assert summary['transducer_loss'] == pytest.approx(rnnt['loss'] / rnnt['weight'], rel=1e-5)
    assert summary['ctc_loss'] == pytest.approx(ctc['loss'] / ctc['weight'], rel=1e-5)
    # Six labels do not fit two frames of CTC; they train the transducer alone.
    assert (summary['invalid'], summary['ctc_invalid']) == (4, 5)


def test_fastemit_and_tiles_reach_the_loss():
    """FastEmit leaves the value alone: the gradient of the blank's bias tells."""
    batch, params, found = make_batch(), init(OBJECTIVES['rnnt']), {}
    for name, fields in {
        'plain': {},
        'tiles': {'tile_frames': 2},
        'fast': {'fastemit': 0.5},
    }.items():
        objective = RNNT(6, **SMALL, **fields)
        found[name] = gradient(objective, params, batch)[1]['output']['bias']
    np.testing.assert_allclose(found['tiles'], found['plain'], atol=1e-5)
    assert np.abs(found['fast'] - found['plain']).max() > 1e-2


def test_dropout_is_drawn_by_key_and_absent_in_decoding():
    objective = RNNT(6, prediction_dropout=0.5, dropout=0.5, **SMALL)
    params, batch = init(objective), make_batch()
    losses = [float(gradient(objective, params, batch, key)[0]['loss']) for key in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    encoded, _ = objective.predict(Frames(), params, batch)
    plain, _ = OBJECTIVES['rnnt'].predict(Frames(), params, batch)
    np.testing.assert_array_equal(encoded, plain)


@pytest.mark.parametrize(
    'fields',
    [
        {'normalise': 'frame'}, {'blank_id': 6}, {'dropout': 1.0}, {'fastemit': -0.1},
        {'ctc_weight': -1.0}, {'tile_frames': -1}, {'prediction': 'gru'}, {'joint_dim': 0},
    ],
)  # fmt: skip
@pytest.mark.parametrize('objective', [RNNT, HAT])
def test_bad_fields_are_named(objective, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        objective(6, **fields)
