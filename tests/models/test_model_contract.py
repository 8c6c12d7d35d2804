"""One contract for every layer and the whole model.

NaN in padding changes nothing and batch mates change nothing, in the result and in the gradients
of parameters and of real inputs; more padding changes nothing; each layer sees as far as it says.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.models import ConformerBlock, ConformerConfig, Encoder, subsampled_count
from bigssl_jax.models.attention import SelfAttention, distance_sinusoid
from bigssl_jax.models.convolution import Convolution
from bigssl_jax.models.layers import FeedForward
from bigssl_jax.models.subsampling import Subsampler

FRAMES = 22
COUNTS = np.array([22, 9, 0, 13])


def config(**overrides):
    fields = dict(
        num_layers=2,
        model_dim=16,
        num_heads=2,
        kernel_size=5,
        dropout=0.0,
        subsampling_channels=(3, 4),
        num_mels=8,
    )
    return ConformerConfig(**{**fields, **overrides})


def _distances(c, frames):
    return distance_sinusoid(frames, c.model_dim) if c.relative_attention else None


def _call_subsampler(c, m, x, mask):
    return m(x, mask)[0]


def _call_encoder(c, m, x, mask):
    return m(x, mask, True)[0]


# name -> (module, call(config, module, x, mask) -> y, stride, frames seen before and after)
LAYERS = {
    'feed_forward': (FeedForward, lambda c, m, x, k: m(x, k, True), 1, (0, 0)),
    'attention': (
        SelfAttention,
        lambda c, m, x, k: m(x, k, _distances(c, x.shape[1]), True),
        1,
        None,
    ),
    'convolution': (Convolution, lambda c, m, x, k: m(x, k, True), 1, (2, 2)),
    'block': (
        ConformerBlock,
        lambda c, m, x, k: m(x, k, _distances(c, x.shape[1]), True)[0],
        1,
        None,
    ),
    'subsampler': (Subsampler, _call_subsampler, 4, (3, 3)),
    'encoder': (Encoder, _call_encoder, 4, None),
}
CASES = [
    *((name, {}) for name in LAYERS),
    *((name, {'relative_attention': True}) for name in ('attention', 'block', 'encoder')),
    ('convolution', {'kernel_size': 4}),
    ('encoder', {'dtype': 'bfloat16', 'remat': 'full'}),
]


class Layer:
    """A layer with random parameters, its input, and jitted result and gradients."""

    def __init__(self, name, overrides):
        module, call, self.stride, self.reach = LAYERS[name]
        self.config = config(**overrides)
        self.module = module(self.config)
        features = 8 if self.stride == 4 else self.config.model_dim
        rng = np.random.default_rng(7)
        self.x = rng.normal(size=(len(COUNTS), FRAMES, features)).astype(np.float32)
        self.mask = np.arange(FRAMES) < COUNTS[:, None]
        self.out_counts = subsampled_count(COUNTS) if self.stride == 4 else COUNTS
        method = lambda m, x, mask: call(self.config, m, x, mask)  # noqa: E731
        shapes = jax.eval_shape(
            lambda x, mask: self.module.init(jax.random.key(0), x, mask, method=method),
            self.x,
            self.mask,
        )
        leaves, tree = jax.tree.flatten(nn.unbox(shapes))
        # Biases and norms start at 0 and 1, which would hide a leak: everything is random here.
        self.params = tree.unflatten(
            [rng.normal(size=leaf.shape).astype(np.float32) * 0.3 for leaf in leaves]
        )

        def apply(params, x, mask):
            return self.module.apply(params, x, mask, method=method)

        def loss(params, x, mask, weights):
            y = apply(params, x, mask).astype(jnp.float32)
            real = jnp.arange(y.shape[1]) < jnp.asarray(self.out_counts)[:, None]
            return jnp.sum(jnp.where(real[..., None], y, 0.0) * weights)

        self.apply = jax.jit(apply)
        self.gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))

    def padded_with(self, value):
        return np.where(self.mask[..., None], self.x, np.float32(value))

    def real(self, y):
        return [np.asarray(row[:n], np.float32) for row, n in zip(y, self.out_counts, strict=True)]


def _name(case):
    return '-'.join([case[0], *map(str, case[1].values())])


@pytest.fixture(scope='module', params=CASES, ids=_name)
def layer(request):
    return Layer(*request.param)


def test_nan_in_padding_changes_nothing_forward(layer):
    zeros = layer.real(layer.apply(layer.params, layer.padded_with(0.0), layer.mask))
    nans = layer.real(layer.apply(layer.params, layer.padded_with(np.nan), layer.mask))
    for a, b in zip(zeros, nans, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)
    assert sum(np.abs(a).sum() for a in zeros) > 0


def test_nan_in_padding_changes_nothing_backward(layer):
    shape = layer.apply(layer.params, layer.x, layer.mask).shape
    weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    results = [
        layer.gradients(layer.params, layer.padded_with(value), layer.mask, weights)
        for value in (0.0, np.nan)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)
    parameters, inputs = results[1]
    assert not np.asarray(inputs)[~layer.mask].any()
    for path, leaf in jax.tree.leaves_with_path(parameters):
        # The same number added to every score of a query changes no softmax.
        if 'key' in str(path) and 'bias' in str(path):
            continue
        assert np.abs(leaf).max() > 1e-4, f'no gradient reaches {path}'


def test_batch_mates_change_nothing(layer):
    first = layer.real(layer.apply(layer.params, layer.padded_with(0.0), layer.mask))
    other = layer.padded_with(0.0)
    other[[0, 2, 3]] = np.random.default_rng(9).normal(size=other[[0, 2, 3]].shape) * 5
    mask = layer.mask.copy()
    mask[[0, 2, 3]] = True
    again = layer.apply(layer.params, other, mask)
    np.testing.assert_array_equal(first[1], layer.real(again)[1])


def test_more_padding_changes_nothing(layer):
    short = layer.real(layer.apply(layer.params, layer.padded_with(0.0), layer.mask))
    for extra in (1, 6):
        x = np.pad(layer.padded_with(0.0), ((0, 0), (0, extra), (0, 0)))
        mask = np.pad(layer.mask, ((0, 0), (0, extra)))
        tolerance = 0.1 if layer.config.dtype == 'bfloat16' else 2e-5
        for a, b in zip(short, layer.real(layer.apply(layer.params, x, mask)), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def test_each_layer_sees_exactly_as_far_as_it_says(layer):
    """The Jacobian's non-zero pattern on a full row, against the stated reach."""
    x, mask = layer.x[:1], np.ones((1, FRAMES), bool)
    outputs = layer.apply(layer.params, x, mask).shape[1]
    seen = np.zeros((outputs, FRAMES), bool)
    base = np.asarray(layer.apply(layer.params, x, mask), np.float32)[0]
    for frame in range(FRAMES):
        moved = x.copy()
        moved[0, frame] += 1.5 * np.cos(np.arange(x.shape[2]))
        out = np.asarray(layer.apply(layer.params, moved, mask), np.float32)[0]
        seen[:, frame] = (out != base).any(axis=1)
    if layer.reach is None:
        assert seen.all()
        return
    before, after = layer.reach
    if isinstance(layer.module, Convolution):
        size = layer.config.kernel_size
        before, after = (size - 1) // 2, size // 2
    centre = layer.stride * np.arange(outputs)[:, None]
    frames = np.arange(FRAMES)[None]
    np.testing.assert_array_equal(seen, (frames >= centre - before) & (frames <= centre + after))
