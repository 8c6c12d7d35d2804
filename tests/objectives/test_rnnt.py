"""RNN-T and HAT objectives against a sum over all alignments, written label by label; the joint
objective against its parts; rows that cannot be aligned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.objectives import CTC, HAT, RNNT

SMALL = {'prediction_layers': 1, 'prediction_dim': 8, 'joint_dim': 8}
OBJECTIVES = {
    'rnnt': RNNT(6, **SMALL),
    'hat': HAT(6, **SMALL),
    'stateless': RNNT(6, prediction='stateless', **SMALL),
}


def all_alignments(transducer, encoded, labels):
    """log P(labels | encoded [T, J]): the sum over paths, each a string of labels and blanks."""
    state, projected = transducer.advance(transducer.initial(1), jnp.array([transducer.blank_id]))
    rows = [projected]
    for label in labels:
        state, projected = transducer.advance(state, jnp.array([label]))
        rows.append(projected)
    log_p = np.stack([transducer.log_probs(encoded, row) for row in rows]).astype(np.float64)
    blank = transducer.blank_id

    @functools.cache
    def rest(u, t):
        """Of everything from label u and frame t on."""
        if t == len(encoded):
            return 0.0 if u == len(labels) else -np.inf
        found = log_p[u, t, blank] + rest(u, t + 1)
        if u < len(labels):
            found = np.logaddexp(found, log_p[u, t, labels[u]] + rest(u + 1, t))
        return found

    return rest(0, 0)


def heard(bench, objective, params, batch):
    """(encoded, mask) of `predict`, and the transducer."""
    encode = bench.encode(params['encoder'])
    encoded, mask = objective.predict(encode, params['head'], batch)
    return encoded, mask, objective.transducer(params['head'], jnp.float32)


@pytest.mark.parametrize('name', sorted(OBJECTIVES))
def test_loss_is_that_of_all_alignments(bench, batches, name):
    objective, batch = OBJECTIVES[name], batches()
    params, constants = bench.init(objective)
    encoded, mask, transducer = heard(bench, objective, params, batch)
    expected = 0.0
    for row in range(4):
        if batch['sample_counts'][row]:
            labels = batch['labels'][row, : batch['label_counts'][row]].tolist()
            expected -= all_alignments(transducer, encoded[row, : int(mask[row].sum())], labels)
    totals, _ = bench.gradient(objective, params, constants, batch, augment=False)
    assert totals['loss'] == pytest.approx(expected, rel=1e-5)
    assert totals['weight'] == batch['label_counts'].sum()
    assert totals['utterances'] == 3 and totals['invalid'] == 0


def broken(batches):
    """Rows: sound; a label too large; a negative one; the blank; more labels than frames; no
    frames; a filler."""
    batch = batches(counts=(8000, 8000, 8000, 8000, 800, 100, 0))
    batch['labels'] = np.tile(np.array([1, 2, 3, 4, 5, 1], np.int32), (7, 1))
    batch['label_counts'] = np.array([3, 3, 3, 3, 6, 3, 0], np.int32)
    batch['labels'][1, 1], batch['labels'][2, 1], batch['labels'][3, 1] = 6, -1, 0
    return batch


@pytest.mark.parametrize('name', ['rnnt', 'hat'])
def test_rows_without_an_alignment_are_counted_and_weigh_nothing(bench, batches, name):
    objective, batch = OBJECTIVES[name], broken(batches)
    params, constants = bench.init(objective)
    totals, gradient = bench.gradient(objective, params, constants, batch)
    assert (totals['utterances'], totals['invalid'], totals['labels']) == (6, 4, 3 + 6)
    sound = {key: value[[0, 4]] for key, value in batch.items()}
    alone, expected = bench.gradient(objective, params, constants, sound)
    assert alone['loss'] == pytest.approx(totals['loss'], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, expected)
    advice = objective.health(objective.summarise(totals), 100)
    assert f'{name}.max_invalid=0.2' in advice and '67%' in advice
    assert objective.health(objective.summarise(alone), 100) is None


def test_the_joint_objective_is_the_weighted_sum_of_its_parts(bench, batches):
    joint, batch = RNNT(6, ctc_weight=0.3, **SMALL), broken(batches)
    params, constants = bench.init(joint)
    totals, gradient = bench.gradient(joint, params, constants, batch)
    head = dict(params['head'])
    parts = {'ctc': (CTC(6), head.pop('ctc')), 'rnnt': (OBJECTIVES['rnnt'], head)}
    alone = {
        name: bench.gradient(
            objective, {'encoder': params['encoder'], 'head': own}, constants, batch
        )
        for name, (objective, own) in parts.items()
    }
    (rnnt, of_rnnt), (ctc, of_ctc) = alone['rnnt'], alone['ctc']
    assert totals['loss'] == pytest.approx(rnnt['loss'] + 0.3 * ctc['loss'], rel=1e-5)
    jax.tree.map(
        lambda whole, a, b: np.testing.assert_allclose(whole, a + 0.3 * b, atol=1e-4),
        gradient['encoder'], of_rnnt['encoder'], of_ctc['encoder'],
    )  # fmt: skip
    summary = joint.summarise(totals)
    assert summary['transducer_loss'] == pytest.approx(rnnt['loss'] / rnnt['weight'], rel=1e-5)
    assert summary['ctc_loss'] == pytest.approx(ctc['loss'] / ctc['weight'], rel=1e-5)
    # Six labels do not fit two frames of CTC; they train the transducer alone.
    assert (summary['invalid'], summary['ctc_invalid']) == (4, 5)


def test_fastemit_and_tiles_reach_the_loss(bench, batches):
    """The value does not tell (1 + lambda) from other factors: the gradient of the blank does."""
    batch, found = batches(), {}
    for name, fields in {
        'plain': {},
        'tiles': {'tile_frames': 2},
        'early': {'fastemit': 0.5},
    }.items():
        objective = RNNT(6, **SMALL, **fields)
        params, constants = bench.init(objective)
        found[name] = bench.gradient(objective, params, constants, batch)[1]['head']['output']
    np.testing.assert_allclose(found['tiles']['bias'], found['plain']['bias'], atol=1e-4)
    assert np.abs(found['early']['bias'] - found['plain']['bias']).max() > 1e-2


def test_prediction_dropout_is_drawn_by_row_and_absent_in_decoding(bench, batches):
    objective = RNNT(6, prediction_dropout=0.5, **SMALL)
    params, constants = bench.init(objective)
    first, _ = bench.gradient(objective, params, constants, batches(), key=1, augment=False)
    other, _ = bench.gradient(objective, params, constants, batches(), key=2, augment=False)
    assert first['loss'] != other['loss']
    encoded, _, _ = heard(bench, objective, params, batches())
    plain, _, _ = heard(bench, OBJECTIVES['rnnt'], params, batches())
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
