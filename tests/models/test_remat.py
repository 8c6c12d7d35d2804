"""What each remat policy keeps of a layer, and what it recomputes."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from bigssl_jax.models import ConformerConfig, Encoder, presets
from bigssl_jax.parallel.cost import count_flops

LAYERS, ROWS, FRAMES, WIDTH, HEADS, MULTIPLIER = 3, 2, 7, 16, 2, 5
TINY = ConformerConfig(
    num_layers=LAYERS,
    model_dim=WIDTH,
    num_heads=HEADS,
    ffn_multiplier=MULTIPLIER,
    dropout=0.0,
    subsampling_channels=(3, 4),
    num_mels=8,
)
FRAME = (ROWS, FRAMES, WIDTH)
HIDDEN = (ROWS, FRAMES, MULTIPLIER * WIDTH)
HEAD = (ROWS, FRAMES, HEADS, WIDTH // HEADS)
HALVES = (ROWS, FRAMES, 2, WIDTH)  # before the convolution module's gate
SCORES = (ROWS, HEADS, FRAMES, FRAMES)


def abstract(config, rows, frames):
    """Shapes of the parameters, and subsampled frames with their mask."""
    features = jax.ShapeDtypeStruct((1, 8, config.num_mels), jnp.float32)
    params = jax.eval_shape(
        lambda x: nn.unbox(Encoder(config).init(jax.random.key(0), x, x[..., 0] > 0)), features
    )
    return params, jnp.zeros((rows, frames, config.model_dim)), jnp.ones((rows, frames), bool)


def kept_per_layer(name):
    """shape -> how many arrays of it the backward pass gets from every layer."""
    from jax._src.ad_checkpoint import saved_residuals

    config = dataclasses.replace(TINY, remat=name)
    params, e, mask = abstract(config, ROWS, FRAMES)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)

    def loss(params, e):
        return jnp.sum(Encoder(config).apply(params, e, mask, method='context'))

    found = [aval.shape for aval, origin in saved_residuals(loss, params, e)
             if 'argument' not in origin]  # fmt: skip
    return collections.Counter(shape[1:] for shape in found if shape[:1] == (LAYERS,))


def test_full_keeps_only_the_input_of_a_layer():
    assert kept_per_layer('full') == {FRAME: 1}


def test_block_keeps_also_the_output_of_each_of_its_four_modules():
    assert kept_per_layer('block') == {FRAME: 1 + 4}


def test_dots_keeps_the_input_and_every_product_with_weights():
    # Out of each module; into both FFNs; query, key, value; into the convolution.
    assert kept_per_layer('dots') == {FRAME: 1 + 4, HIDDEN: 2, HEAD: 3, HALVES: 1}


def test_none_keeps_the_scores_too():
    kept = kept_per_layer('none')
    assert kept[SCORES] >= 1 and kept[HIDDEN] > 2 and kept[FRAME] > 5


def training_flops(name):
    """Of XL's stack and its gradients, 8 utterances of 32 s."""
    config = presets.conformer('XL', remat=name)
    params, e, mask = abstract(config, 8, 800)

    def loss(params, e):
        return jnp.sum(Encoder(config).apply(params, e, mask, method='context'))

    return count_flops(jax.grad(loss), params, e).total


def test_recomputation_costs_what_is_said_of_it():
    """Against the arithmetic of a layer's products, in units of 2 x frames x width^2."""
    frames, width = 800, 1024
    weights, scores = 23, 2 * frames / width
    modules_end = 4 + 1 + 1 + 4  # with 'block', what these products give is kept
    model = 3 * (weights + scores)  # the backward pass has two products for one of the forward
    flops = {name: training_flops(name) for name in ('none', 'dots', 'block', 'full')}
    found = {name: flops[name] / flops['none'] for name in ('dots', 'block', 'full')}
    expected = {
        'dots': 1 + scores / model,
        'block': 1 + (weights + scores - modules_end) / model,
        'full': 1 + 1 / 3,
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == pytest.approx({'dots': 1.02, 'block': 1.20, 'full': 1.33}, abs=0.01)
