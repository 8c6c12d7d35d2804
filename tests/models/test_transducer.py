"""The transducer's head: what a search gets, the two factorisations, sizes of the paper's heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.models.prediction import PredictionConfig
from bigssl_jax.models.transducer import (
    TransducerConfig,
    bind,
    factorised,
    init_transducer,
    project_encoder,
)
from bigssl_jax.parallel.layout import landed, replicated_share

BLANK = 2
SMALL = {
    name: TransducerConfig(PredictionConfig(5, num_layers=1, dim=6, blank_id=BLANK), 4, name)
    for name in ('softmax', 'hat')
}


def head(config):
    """(parameters, Transducer), with output biases that are not all alike."""
    params = nn.unbox(init_transducer(jax.random.key(0), config, 3))
    params['output']['bias'] = jnp.linspace(-2.0, 2.0, 5)
    return params, bind(config, params, jnp.float32)


@pytest.mark.parametrize('name', sorted(SMALL))
def test_log_probs_are_those_of_the_joint_network_in_numpy(name):
    params, transducer = head(SMALL[name])
    frames = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    encoded = project_encoder(params, frames, jnp.float32)
    state = transducer.initial(2)
    state, projected = transducer.advance(state, jnp.full(2, transducer.blank_id))
    state, projected = transducer.advance(state, jnp.array([1, 4]))
    found = np.exp(transducer.log_probs(encoded, projected))
    p = jax.tree.map(np.asarray, params)
    hidden = frames @ p['encoder_projection']['kernel'] + p['encoder_projection']['bias']
    logits = np.tanh(hidden + projected) @ p['output']['kernel'] + p['output']['bias']
    if name == 'softmax':
        expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    else:
        blank = 1 / (1 + np.exp(-logits[:, BLANK]))
        labels = np.exp(logits)
        labels[:, BLANK] = 0
        expected = (1 - blank)[:, None] * labels / labels.sum(axis=1, keepdims=True)
        expected[:, BLANK] = blank
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('name', sorted(SMALL))
def test_the_internal_language_model_is_of_labels_alone_and_deaf(name):
    params, transducer = head(SMALL[name])
    _, projected = transducer.advance(transducer.initial(2), jnp.array([BLANK, BLANK]))
    found = transducer.internal_lm(projected)
    assert np.all(found[:, BLANK] == -np.inf)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
    # Where the encoder's part is zero, labels compare as they do in the joint network.
    joint = transducer.log_probs(jnp.zeros_like(projected), projected)
    labels = [0, 1, 3, 4]
    np.testing.assert_allclose(
        found[:, labels] - found[:, :1], joint[:, labels] - joint[:, :1], atol=1e-5
    )


@pytest.mark.parametrize('name', ['softmax', 'hat'])
def test_extreme_logits_stay_finite_and_sum_to_one(name):
    logits = jnp.array([[100.0, -100.0, 100.0], [-100.0, 0.0, 100.0], [100.0, 100.0, -100.0]])
    found = factorised(logits, name, BLANK)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ('dim', 'vocabulary', 'layers', 'millions'),
    [(512, 1024, 1, 5.3), (1024, 1024, 2, 8.9), (3072, 4096, 2, 14.2)],
)
def test_heads_have_the_sizes_of_the_table(dim, vocabulary, layers, millions):
    """METHODS 1.2: the decoders of L, XL and G; and hardly anything of them stays whole."""
    config = TransducerConfig(PredictionConfig(vocabulary, num_layers=layers))
    boxed = jax.eval_shape(lambda key: init_transducer(key, config, dim), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(boxed))
    prediction = vocabulary * 640 + layers * (8 * 640**2 + 4 * 640)
    joint = (640 * dim + 640) + 640**2 + (640 * vocabulary + vocabulary)
    assert count == prediction + joint
    assert round(count / 1e6, 1) == millions
    mesh = jax.sharding.AbstractMesh((1, 1, 16, 4), ('slice', 'data', 'fsdp', 'tensor'))
    assert replicated_share(landed(boxed, mesh)) < 0.001


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match='joint_dim'):
        TransducerConfig(PredictionConfig(5), 0)
    with pytest.raises(ValueError, match='factorisation'):
        TransducerConfig(PredictionConfig(5), factorisation='sigmoid')
