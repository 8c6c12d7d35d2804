"""Groups get their own optimizer; directions times rates equal optax's own optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigssl_jax.config import ConfigError
from bigssl_jax.training.optimizers import GROUP_DEFAULTS, group_labels, make_optimizer


def make_params():
    key = jax.random.key(0)
    return {
        'encoder': {'ffn': {'kernel': jax.random.normal(key, (4, 6)), 'bias': jnp.ones(6)}},
        'heads': {'ctc': {'kernel': jax.random.normal(key, (6, 3)), 'bias': jnp.zeros(3)}},
    }


def group(**fields):
    return {**GROUP_DEFAULTS, **fields}


def apply(groups, rates, steps):
    params = make_params()
    optimizer, labels = make_optimizer(params, groups)
    state = optimizer.init(params)
    for step in range(steps):
        gradients = jax.tree.map(lambda p, s=step: jnp.sin(p + s), params)
        directions, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda p, d, g: p - rates[g] * d, params, directions, labels)
    return params


def test_adamw_with_decay_equals_optax_adamw():
    params = make_params()
    mask = jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key == 'kernel', params)
    reference = optax.adamw(0.01, b1=0.9, b2=0.98, eps=1e-9, weight_decay=0.1, mask=mask)
    state = reference.init(params)
    for step in range(5):
        gradients = jax.tree.map(lambda p, s=step: jnp.sin(p + s), params)
        updates, state = reference.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    ours = apply({'all': group(weight_decay=0.1)}, {'all': 0.01}, 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, params)


def test_groups_use_their_own_rate_and_frozen_leaves_keep_their_bits():
    groups = {
        'encoder': group(pattern='^encoder/', algorithm='frozen', weight_decay=0.5),
        'rest': group(),
    }
    before, after = make_params(), apply(groups, {'encoder': 1.0, 'rest': 0.1}, 30)
    jax.tree.map(np.testing.assert_array_equal, before['encoder'], after['encoder'])
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before['heads'], after['heads'])
    assert all(jax.tree.leaves(changed))


def test_adafactor_keeps_factored_second_moments_and_a_bfloat16_first_moment():
    params = {'kernel': jnp.ones((256, 512))}
    optimizer, _ = make_optimizer(params, {'all': group(algorithm='adafactor')})
    state = jax.eval_shape(optimizer.init, params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1)
    assert sizes == [256, 512, 256 * 512]
    assert [x.dtype for x in jax.tree.leaves(state) if x.size == 256 * 512] == [jnp.bfloat16]


def test_adafactor_of_a_rank_one_gradient_is_adam_without_first_moment():
    row, column = jnp.linspace(1, 2, 256), jnp.linspace(-3, -1, 128)
    params = {'kernel': jnp.zeros((256, 128))}
    gradients = {'kernel': row[:, None] * column[None]}
    optimizer, _ = make_optimizer(params, {'all': group(algorithm='adafactor', b1=0.0)})
    directions, _ = optimizer.update(gradients, optimizer.init(params), params)
    # Factoring is exact at rank one, so the first direction is the gradient's sign.
    np.testing.assert_allclose(directions['kernel'], -jnp.ones((256, 128)), rtol=1e-2)


def test_a_parameter_without_a_group_and_a_group_without_parameters_are_errors():
    with pytest.raises(ConfigError, match='heads/ctc/bias'):
        group_labels(make_params(), {'encoder': group(pattern='^encoder/')})
    with pytest.raises(ConfigError, match='matches no parameter'):
        group_labels(make_params(), {'all': group(), 'more': group(pattern='decoder')})
