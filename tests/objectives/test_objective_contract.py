"""What every objective promises: padding and batch mates change nothing, totals add up, gradients
reach the encoder and the objective's own head, and nothing is said about an empty batch."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.objectives import CTC, RNNT, BestRQ, Wav2Vec2

OBJECTIVES = [
    BestRQ(1, 64, 4, 0.08, 60.0, num_mels=16),
    BestRQ(3, 32, 4, 0.08, 60.0, num_mels=16),
    Wav2Vec2(8, 5, mask_start_probability=0.3, mask_span_ms=80.0),
    CTC(6, dropout=0.2),
    RNNT(
        6, dropout=0.2, prediction_layers=1, prediction_dim=8, prediction_dropout=0.2, joint_dim=8,
        ctc_weight=0.5,
    ),
]  # fmt: skip


@pytest.fixture(params=OBJECTIVES, ids=lambda o: f'{o.name}{OBJECTIVES.index(o)}')
def objective(request):
    return request.param


def rows_of(batch, rows):
    return {name: value[list(rows)] for name, value in batch.items()}


def assert_close(a, b, tolerance=2e-5):
    """Integers equal, floats close relative to the largest value of each array."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if np.issubdtype(x.dtype, np.integer):
            np.testing.assert_array_equal(x, y)
        else:
            assert np.isfinite(x).all()
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * (1 + np.abs(y).max()))


def test_padding_changes_nothing(bench, batches, objective):
    params, constants = bench.init(objective)
    batch = batches()
    short = bench.gradient(objective, params, constants, batch)
    wide = dict(batch)
    wide['audio'] = np.full((len(batch['rows']), 11000), np.nan, np.float32)
    for i, count in enumerate(batch['sample_counts']):
        wide['audio'][i, :count] = batch['audio'][i, :count]
    wide['labels'] = np.full((len(batch['rows']), 9), 3, np.int32)
    for i, count in enumerate(batch['label_counts']):
        wide['labels'][i, :count] = batch['labels'][i, :count]
    long = bench.gradient(objective, params, constants, wide)
    assert short[0]['weight'] > 0
    assert_close(long, short)


def test_totals_and_gradients_add_over_any_split(bench, batches, objective):
    """Covers batch mates, micro-batches, reordering, and filler rows (row 2)."""
    params, constants = bench.init(objective)
    batch = batches()
    whole = bench.gradient(objective, params, constants, batch)
    for split in ([(0, 1), (2, 3)], [(3, 1), (0, 2)]):
        parts = [
            bench.gradient(objective, params, constants, rows_of(batch, rows)) for rows in split
        ]
        assert_close(jax.tree.map(lambda *x: np.sum(np.stack(x), axis=0), *parts), whole)


def test_gradients_reach_every_parameter_of_encoder_and_head(bench, batches, objective):
    params, constants = bench.init(objective)
    _, gradient = bench.gradient(objective, params, constants, batches())
    # A key bias moves all scores of a query alike: softmax cannot see it.
    untouched = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradient)
        if np.abs(g).max() < 1e-12 and 'key' not in jax.tree_util.keystr(path)
    ]
    assert not untouched


def test_batch_of_fillers_is_all_zero(bench, batches, objective):
    params, constants = bench.init(objective)
    totals, gradient = bench.gradient(objective, params, constants, batches(counts=(0, 0)))
    for leaf in jax.tree.leaves((totals, gradient)):
        assert not np.any(leaf)
    assert all(np.isfinite(v) for v in objective.summarise(totals).values())


def test_keys_decide_and_dropout_is_used(bench_with_dropout, batches, objective):
    bench = bench_with_dropout
    params, constants = bench.init(objective)
    first = bench.gradient(objective, params, constants, batches(), key=1)
    again = bench.gradient(objective, params, constants, batches(), key=1)
    other = bench.gradient(objective, params, constants, batches(), key=2)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first[0]['loss'] != other[0]['loss']


def test_head_parameters_carry_axis_names(bench, objective):
    head = objective.init_params(jax.random.key(0), bench.config)
    for box in jax.tree.leaves(head, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert len(box.names) == box.value.ndim
        assert box.value.dtype == np.float32


def test_totals_are_additive_types(bench, batches, objective):
    params, constants = bench.init(objective)
    totals, _ = bench.gradient(objective, params, constants, batches())
    assert totals['loss'].dtype == totals['weight'].dtype == np.float32
    assert totals['loss'].shape == totals['weight'].shape == ()
    summary = objective.summarise(totals)
    np.testing.assert_allclose(summary['loss'], totals['loss'] / totals['weight'], rtol=1e-6)
    assert all(isinstance(value, float) for value in summary.values())
