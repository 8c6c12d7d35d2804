"""The language model: causal, blind to padding, its steps equal the whole, its size as stated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.config import ConfigError
from bigssl_jax.models import language_model as lm

CONFIG = lm.LanguageModelConfig(11, num_layers=2, model_dim=16, num_heads=2, dropout=0.0)


@functools.cache
def parameters(config=CONFIG):
    """Random parameters, biases and norms included."""
    shapes = jax.eval_shape(
        lambda: lm.LanguageModel(config).init(
            jax.random.key(0), jnp.zeros((1, 3), jnp.int32), jnp.array([3])
        )
    )
    rng = np.random.default_rng(0)

    def value(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        scale = 'scale' in jax.tree_util.keystr(path)
        return 1 + 0.1 * noise if scale else noise * (0.1 if leaf.ndim < 3 else 0.3)

    return jax.tree_util.tree_map_with_path(value, nn.unbox(shapes['params']))


@functools.partial(jax.jit, static_argnums=0)
def whole(config, params, tokens, counts):
    return lm.LanguageModel(config).apply({'params': params}, tokens, counts)


def tokens_of(batch=3, size=7, seed=0):
    return np.random.default_rng(seed).integers(1, 11, (batch, size)).astype(np.int32)


def test_the_103m_preset_has_103_million_parameters():
    config = lm.language_model('lm-103m', 1024)
    count = lm.parameter_count(config)
    assert abs(count / 103e6 - 1) < 0.01
    layers, dim, size = config.num_layers, config.model_dim, 1024
    assert count == layers * (12 * dim**2 + 13 * dim) + 2 * size * dim + size + 2 * dim
    assert config.num_layers == 8


@pytest.mark.parametrize(
    'given, told',
    [
        ({'model_dim': 20, 'num_heads': 8}, 'model_dim is 20'),
        ({'dropout': 1.0}, 'dropout is 1.0'),
        ({'remat': 'some'}, "remat is 'some'"),
        ({'context': 0}, 'context is 0'),
    ],
)
def test_bad_fields_are_named(given, told):
    with pytest.raises(ConfigError, match=told):
        lm.language_model('lm-tiny', 64, **given)
    with pytest.raises(ConfigError, match='lm-huge'):
        lm.language_model('lm-huge', 64)


def test_what_stands_behind_and_in_padding_and_beside_changes_nothing():
    tokens, counts = tokens_of(), np.array([7, 4, 0], np.int32)
    reference = whole(CONFIG, parameters(), tokens, counts)
    spoilt = tokens.copy()
    spoilt[1, 4:], spoilt[2] = (-5, 10**6, 3), 2**31 - 1
    found = whole(CONFIG, parameters(), spoilt, counts)
    assert np.isfinite(found).all()
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(reference[row, : count + 1], found[row, : count + 1])
        alone = whole(CONFIG, parameters(), tokens[row : row + 1], counts[row : row + 1])
        np.testing.assert_allclose(
            alone[0, : count + 1], reference[row, : count + 1], rtol=2e-4, atol=2e-5
        )
    later = tokens.copy()
    later[0, 5] = later[0, 5] % 10 + 1
    changed = np.abs(whole(CONFIG, parameters(), later, counts)[0] - reference[0]).max(axis=1)
    assert not changed[:6].any() and changed[6] > 1e-3


@pytest.mark.parametrize('context, slots', [(512, 8), (512, 30), (3, 3)])
def test_steps_equal_the_whole_for_sequences_at_different_places(context, slots):
    config = lm.LanguageModelConfig(
        11, num_layers=2, model_dim=16, num_heads=2, dropout=0.0, context=context
    )
    tokens, counts = tokens_of(), np.array([7, 7, 7], np.int32)
    expected = np.asarray(whole(config, parameters(), tokens, counts))
    advance = jax.jit(functools.partial(lm.step, config))
    state = lm.initial_state(config, 3, slots)
    placed, found = np.zeros(3, int), np.zeros_like(expected)
    for number in range(16):
        # Row 1 moves at every second step only: what its other steps made is thrown away.
        moving = np.array([True, number % 2 == 0, True]) & (placed <= 7)
        fed = np.array([tokens[r, placed[r] - 1] if 0 < placed[r] <= 7 else 0 for r in range(3)])
        new, logits = advance(parameters(), state, fed.astype(np.int32))
        for row in np.flatnonzero(moving):
            found[row, placed[row]] = logits[row]
        placed += moving
        state = jax.tree.map(
            lambda a, b, m=moving: np.where(m.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, state
        )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_the_context_is_the_stated_one():
    """One layer that sees 3 tokens does not notice the fourth before."""
    config = lm.LanguageModelConfig(
        11, num_layers=1, model_dim=16, num_heads=2, dropout=0.0, context=3
    )
    tokens, counts = tokens_of(1), np.array([7])
    other = tokens.copy()
    other[0, 1] = other[0, 1] % 10 + 1
    logits = (whole(config, parameters(config), x, counts)[0] for x in (tokens, other))
    changed = np.abs(np.subtract(*logits)).max(axis=1)
    assert changed[2:5].min() > 1e-4 and not changed[5:].any() and not changed[:2].any()


def test_rotary_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 1, 1, 8)).astype(np.float32)

    def score(at, other):
        turned = lm.rotary(query, jnp.array([at])), lm.rotary(key, jnp.array([other]))
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)
    # By hand: a pair is a complex number, turned by e^(i place rate).
    pairs = query[..., :4] + 1j * query[..., 4:]
    turned = pairs * np.exp(7j * 10000.0 ** (-np.arange(4) / 4))
    found = np.asarray(lm.rotary(query, jnp.array([7])))
    np.testing.assert_allclose(found[..., :4] + 1j * found[..., 4:], turned, rtol=1e-4, atol=1e-5)


def test_log_probs_know_no_blank():
    found = np.asarray(lm.log_probs(np.zeros((2, 5), np.float32)))
    assert (found[:, 0] == -np.inf).all()
    np.testing.assert_allclose(found[:, 1:], -np.log(4), rtol=1e-6)
