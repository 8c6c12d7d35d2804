"""Prediction networks: steps equal the whole, an LSTM in numpy, causality, parameter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.models.prediction import Prediction, PredictionConfig, lstm

SMALL = {
    'lstm': PredictionConfig(7, num_layers=2, dim=6, blank_id=3),
    'stateless': PredictionConfig(7, kind='stateless', dim=6, context=3, blank_id=3),
}
LABELS = np.random.default_rng(0).integers(0, 7, (3, 5)).astype(np.int32)


@pytest.fixture(params=sorted(SMALL))
def network(request):
    """(module, variables, jitted whole form)."""
    module = Prediction(SMALL[request.param])
    variables = nn.unbox(module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    # Biases other than their first values, so that a gate that is mixed up shows.
    variables = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.shape[-1])), variables)
    return module, variables, jax.jit(module.apply)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_network(config, params, labels):
    """Outputs for one row of labels, one at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    history = [config.blank_id] * config.context
    hidden = np.zeros((config.num_layers, config.dim))
    cell = np.zeros((config.num_layers, config.dim))
    found = []
    for label in [config.blank_id, *labels]:
        history = [*history[1:], label]
        if config.kind == 'stateless':
            x = sum(
                w * params['embedding'][y]
                for w, y in zip(params['position_kernel'], history, strict=True)
            )
            found.append(x * sigmoid(x))
            continue
        x = params['embedding'][label]
        for n in range(config.num_layers):
            layer = params[f'lstm{n}']
            gates = x @ layer['input_kernel'] + hidden[n] @ layer['recurrent_kernel']
            i, f, g, o = np.split(gates + layer['bias'], 4)
            cell[n] = sigmoid(f) * cell[n] + sigmoid(i) * np.tanh(g)
            hidden[n] = x = sigmoid(o) * np.tanh(cell[n])
        found.append(x)
    return np.stack(found)


def test_the_whole_form_equals_numpy(network):
    module, variables, whole = network
    found = whole(variables, LABELS)
    assert found.shape == (3, 6, 6) and found.dtype == np.float32
    for row, labels in zip(found, LABELS, strict=True):
        expected = numpy_network(module.config, variables['params'], labels)
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_steps_equal_the_whole(network):
    module, variables, whole = network
    state = module.apply(variables, 3, method='initial_state')
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(state))
    step = jax.jit(lambda state, labels: module.apply(variables, state, labels, method='step'))
    found = []
    for labels in np.concatenate([np.full((3, 1), 3), LABELS], axis=1).T:
        state, output = step(state, labels)
        found.append(output)
    np.testing.assert_allclose(np.stack(found, axis=1), whole(variables, LABELS), atol=1e-6)


@pytest.mark.parametrize('garbage', [-5, 6, 99999])
def test_labels_influence_nothing_before_them(network, garbage):
    _, variables, whole = network
    changed = LABELS.copy()
    changed[1, 3:] = garbage
    before, after = (np.asarray(whole(variables, labels)) for labels in (LABELS, changed))
    assert np.isfinite(after).all()
    np.testing.assert_array_equal(after[1, :4], before[1, :4])  # <start>, y1, y2, y3
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


def test_a_stateless_network_forgets_what_lies_further_back(network):
    module, variables, whole = network
    changed = LABELS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 7
    same = (np.asarray(whole(variables, LABELS)) == whole(variables, changed)).all(axis=(0, 2))
    forgets = module.config.kind == 'stateless'
    assert same.tolist() == [True, False, False, False, forgets, forgets]


def test_the_derivative_of_the_recurrence_is_that_of_its_steps():
    rng = np.random.default_rng(1)
    gates, kernel = rng.normal(size=(5, 2, 12)), rng.normal(size=(3, 12)) * 0.7
    weights = rng.normal(size=(5, 2, 3))

    def plain(gates, kernel):
        hidden = cell = jnp.zeros((2, 3))
        total = 0.0
        for given, weight in zip(gates, weights, strict=True):
            i, f, g, o = jnp.split(given + hidden @ kernel, 4, axis=-1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            total += jnp.sum(weight * hidden)
        return total

    given = jnp.asarray(gates, jnp.float32), jnp.asarray(kernel, jnp.float32)
    ours = jax.jit(jax.grad(lambda *x: jnp.sum(weights * lstm(*x)), (0, 1)))(*given)
    expected = jax.jit(jax.grad(plain, (0, 1)))(*given)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_of_a_row_is_its_keys_alone():
    config = PredictionConfig(7, num_layers=1, dim=16, dropout=0.5)
    module = Prediction(config)
    variables = nn.unbox(module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    keys = jax.random.split(jax.random.key(1), 3)
    whole = module.apply(variables, LABELS, keys)
    alone = module.apply(variables, LABELS[1:2, :3], keys[1:2])
    np.testing.assert_allclose(alone[0], whole[1, :4], atol=1e-6)
    assert 0.2 < np.mean(np.asarray(whole) == 0) < 0.8
    assert not np.any(module.apply(variables, LABELS) == 0)


@pytest.mark.parametrize(('vocabulary', 'layers'), [(1024, 2), (4096, 2), (1024, 1)])
def test_parameter_count_is_the_closed_form(vocabulary, layers):
    module = Prediction(PredictionConfig(vocabulary, num_layers=layers))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == vocabulary * 640 + layers * (8 * 640**2 + 4 * 640)


@pytest.mark.parametrize(
    'fields', [{'kind': 'gru'}, {'num_layers': 0}, {'context': 0}, {'dropout': 1.0}]
)
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        PredictionConfig(7, **fields)
