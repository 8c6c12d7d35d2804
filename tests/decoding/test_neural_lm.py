"""A trained language model as a search sees it: its steps give log P of whole sentences."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.decoding import fusion
from bigssl_jax.decoding.neural_lm import neural_lm
from bigssl_jax.objectives.next_token import NextToken

OBJECTIVE = NextToken(7, num_layers=2, model_dim=8, num_heads=2, dropout=0.0)


def parameters():
    shapes = jax.eval_shape(lambda: OBJECTIVE.init_params(jax.random.key(0), None))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * 0.5, nn.unbox(shapes)
    )


def test_sequence_scores_are_those_of_the_training_loss():
    params = parameters()
    tokens = np.random.default_rng(1).integers(2, 7, (4, 6)).astype(np.int32)
    counts = np.array([6, 3, 0, 1], np.int32)
    found = jax.jit(fusion.sequence_scores)(neural_lm(OBJECTIVE.config, params), tokens, counts)
    score = jax.jit(OBJECTIVE.score)
    for row, count in enumerate(counts):
        batch = {
            'labels': tokens[row : row + 1],
            'label_counts': counts[row : row + 1],
            'word_counts': np.ones(1, np.int32),
        }
        if count:
            expected = -float(score(params, batch)['loss'])
            assert float(found[row]) == pytest.approx(expected, rel=1e-4)
        assert np.isfinite(found[row])


def test_states_are_reordered_row_by_row_and_log_probs_are_a_distribution():
    model = neural_lm(OBJECTIVE.config, parameters())
    advance = jax.jit(model.advance)
    state = model.initial(model.params, 3, 8)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(state))
    for column in ([0, 0, 0], [2, 3, 4], [5, 5, 6]):
        state, log_probs = advance(model.params, state, np.array(column, np.int32))
    log_probs = np.asarray(log_probs)
    assert (log_probs[:, 0] == -np.inf).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(model.final(model.params, state), log_probs[:, 1])
    # A fork of row 2 and row 0, as a beam makes it, goes on as they would have.
    forked = jax.tree.map(lambda leaf: leaf[np.array([2, 2, 0])], state)
    _, after = advance(model.params, forked, np.array([3, 4, 3], np.int32))
    _, straight = advance(model.params, state, np.array([3, 3, 3], np.int32))
    np.testing.assert_allclose(after[0], straight[2], rtol=1e-5)
    np.testing.assert_allclose(after[2], straight[0], rtol=1e-5)
    assert np.abs(np.asarray(after[1])[1:] - np.asarray(after[0])[1:]).max() > 1e-3


def test_equal_models_are_one_program():
    a, b = (neural_lm(OBJECTIVE.config, parameters()) for _ in range(2))
    assert a.advance is b.advance and a.initial is b.initial
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_room_for_longer_hypotheses_changes_nothing():
    model = neural_lm(OBJECTIVE.config, parameters())
    states = [model.initial(model.params, 2, length) for length in (3, 40)]
    assert states[0]['cache']['keys'].shape[2] == 4
    for column in ([0, 0], [2, 3], [5, 6], [4, 2]):
        found = [model.advance(model.params, s, np.array(column, np.int32)) for s in states]
        states = [state for state, _ in found]
        np.testing.assert_allclose(found[0][1][:, 1:], found[1][1][:, 1:], rtol=1e-5)
