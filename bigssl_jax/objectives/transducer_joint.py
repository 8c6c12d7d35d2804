"""From logits to the two arcs of every node, and the joint network computed in tiles of frames.

A lattice needs two numbers of a node's V logits: log P(blank) and log P(next label).  How the
logits become these is a `Factorisation`: one softmax (RNN-T), or a sigmoid for the blank and a
softmax for the labels (HAT).  Each knows its derivative in closed form, which needs the logits
again, and the log-normaliser that the forward pass kept.

    encoded [B, T, J] --cut in tiles of frames-->
        tanh(encoded + predicted) [B, t, U+1, J] --kernel, bias--> logits [B, t, U+1, V] --> arcs

Only a tile of logits is ever alive: the forward pass keeps the planes [B, T, U+1], the backward
pass computes the tile again, and turns it in place into the derivative by the logits.

With rows on many devices the loop over tiles must not talk.  So the kernel is gathered before it,
and each device adds up the gradient of the kernel over its own rows: the sums have an axis of
groups of rows, one group per device, which is summed after the loop.  (Summed over all rows at
each tile, [J, V] would be sent T / t times.)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigssl_jax.parallel import constrain, device_platform, parts

__all__ = ['HAT', 'RNNT', 'Factorisation', 'arcs_of_joint', 'arcs_of_logits', 'default_tile']

# Logits of a tile on one device.  A CPU is fastest while they stay in its cache; an accelerator
# wants many rows for each reading and writing of the sum [J, V] of the kernel's gradient.
CPU_TILE_BYTES, TILE_BYTES = 2**22, 2**25
# A tile is at least this share of the frames, so that steps stay few and products large; two or
# three tensors of a tile are alive, so 1/100 keeps them below 5 % of the whole.
MOST_TILES = 100


class Factorisation(NamedTuple):
    """How logits become probabilities.

    Attributes:
      arcs: (logits float32 [..., V], labels int32 [...], blank_id) -> log P(blank),
        log P(label), log-normaliser, all float32 [...].
      gradient: (logits, labels, blank_id, log-normaliser, d_blank, d_label) -> the derivative by
        the logits, given those by the two log-probabilities.
    """

    arcs: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    gradient: Callable[..., jax.Array]


def _rnnt_arcs(
    logits: jax.Array, labels: jax.Array, blank_id: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return logits[..., blank_id] - normaliser, _pick(logits, labels) - normaliser, normaliser


def _rnnt_gradient(
    logits: jax.Array,
    labels: jax.Array,
    blank_id: int,
    normaliser: jax.Array,
    d_blank: jax.Array,
    d_label: jax.Array,
) -> jax.Array:
    v = jnp.arange(logits.shape[-1])
    probabilities = jnp.exp(logits - normaliser[..., None])
    chosen = jnp.where(v == labels[..., None], d_label[..., None], 0.0)
    chosen = chosen + jnp.where(v == blank_id, d_blank[..., None], 0.0)
    return chosen - probabilities * (d_blank + d_label)[..., None]


def _hat_arcs(
    logits: jax.Array, labels: jax.Array, blank_id: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    b = logits[..., blank_id]
    without = jnp.where(jnp.arange(logits.shape[-1]) == blank_id, -jnp.inf, logits)
    normaliser = jax.nn.logsumexp(without, axis=-1)
    # log P(blank) = -softplus(-b) and log(1 - P(blank)) = -softplus(b): neither overflows.
    label = _pick(logits, labels) - normaliser - jax.nn.softplus(b)
    return -jax.nn.softplus(-b), label, normaliser


def _hat_gradient(
    logits: jax.Array,
    labels: jax.Array,
    blank_id: int,
    normaliser: jax.Array,
    d_blank: jax.Array,
    d_label: jax.Array,
) -> jax.Array:
    v = jnp.arange(logits.shape[-1])
    blank_probability = jax.nn.sigmoid(logits[..., blank_id])
    d_b = d_blank - (d_blank + d_label) * blank_probability
    chosen = jnp.where(v == labels[..., None], d_label[..., None], 0.0)
    d_labels = chosen - jnp.exp(logits - normaliser[..., None]) * d_label[..., None]
    return jnp.where(v == blank_id, d_b[..., None], d_labels)


RNNT = Factorisation(_rnnt_arcs, _rnnt_gradient)
HAT = Factorisation(_hat_arcs, _hat_gradient)


def _pick(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """logits[..., labels]"""
    return jnp.take_along_axis(logits, labels[..., None], axis=-1, mode='clip')[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def arcs_of_logits(
    logits: jax.Array, labels: jax.Array, blank_id: int, factorisation: Factorisation
) -> tuple[jax.Array, jax.Array]:
    """Planes (blank, label) float32 [B, T, U+1] of logits [B, T, U+1, V], labels [B, U+1]."""
    return _logits_forward(logits, labels, blank_id, factorisation)[0]


def _logits_forward(
    logits: jax.Array, labels: jax.Array, blank_id: int, factorisation: Factorisation
) -> tuple[Any, tuple[jax.Array, ...]]:
    wide = jnp.broadcast_to(labels[:, None], logits.shape[:-1])
    *arcs, normaliser = factorisation.arcs(logits.astype(jnp.float32), wide, blank_id)
    return tuple(arcs), (logits, labels, normaliser)


def _logits_backward(
    blank_id: int, factorisation: Factorisation, kept: tuple[jax.Array, ...], cotangents: Any
) -> tuple[jax.Array, None]:
    logits, labels, normaliser = kept
    wide = jnp.broadcast_to(labels[:, None], logits.shape[:-1])
    d_logits = factorisation.gradient(
        logits.astype(jnp.float32), wide, blank_id, normaliser, *cotangents
    )
    return d_logits.astype(logits.dtype), None


arcs_of_logits.defvjp(_logits_forward, _logits_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def arcs_of_joint(
    encoded: jax.Array,
    predicted: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    blank_id: int,
    factorisation: Factorisation,
    tile: int,
) -> tuple[jax.Array, jax.Array]:
    """Planes (blank, label) float32 [B, T, U+1] of tanh(encoded + predicted) @ kernel + bias.

    Args:
      encoded: [B, T, J].  predicted: [B, U+1, J].  Their dtype is that of the products.
      kernel: [J, V].  bias: [V].
      labels: int32 [B, U+1], the label that would come next at each u.
      blank_id: of the blank.
      factorisation: of the probabilities.
      tile: frames computed at a time.
    """
    return _joint_forward(encoded, predicted, kernel, bias, labels, blank_id, factorisation, tile)[
        0
    ]


def _joint_forward(
    encoded: jax.Array,
    predicted: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    blank_id: int,
    factorisation: Factorisation,
    tile: int,
) -> tuple[Any, tuple[jax.Array, ...]]:
    whole = _gathered(kernel, encoded.dtype)

    def arcs(tile_encoded: jax.Array) -> tuple[jax.Array, ...]:
        logits = _logits(_hidden(tile_encoded, predicted), whole, bias)
        wide = jnp.broadcast_to(labels[:, None], logits.shape[:-1])
        return factorisation.arcs(logits, wide, blank_id)

    planes = jax.lax.map(arcs, _cut(encoded, tile))
    blank, label, normaliser = (_paste(plane, encoded.shape[1]) for plane in planes)
    return (blank, label), (encoded, predicted, kernel, bias, labels, normaliser)


def _joint_backward(
    blank_id: int,
    factorisation: Factorisation,
    tile: int,
    kept: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, ...]:
    encoded, predicted, kernel, bias, labels, normaliser = kept
    whole = _gathered(kernel, encoded.dtype)
    groups = parts('batch', encoded.shape[0])

    def step(sums: tuple[jax.Array, ...], now: tuple[jax.Array, ...]) -> tuple:
        tile_encoded, *planes = now
        hidden = _hidden(tile_encoded, predicted)
        logits = _logits(hidden, whole, bias)
        wide = jnp.broadcast_to(labels[:, None], logits.shape[:-1])
        d_logits = factorisation.gradient(logits, wide, blank_id, *planes)
        narrow = d_logits.astype(hidden.dtype)
        d_hidden = _product('btuv,jv->btuj', narrow, whole)
        d_sum = d_hidden * (1.0 - jnp.square(hidden.astype(jnp.float32)))
        new = (
            jnp.sum(d_sum, axis=1),
            _product('gnj,gnv->gjv', _grouped(hidden, groups), _grouped(narrow, groups)),
            jnp.sum(_grouped(d_logits, groups), axis=1),
        )
        sums = tuple(a + b for a, b in zip(sums, new, strict=True))
        return (sums[0], *_by_device(sums[1:])), jnp.sum(d_sum, axis=2)

    shapes = (predicted.shape, (groups, *kernel.shape), (groups, *bias.shape))
    first, *grouped = (jnp.zeros(shape, jnp.float32) for shape in shapes)
    tiles = tuple(_cut(x, tile) for x in (encoded, normaliser, *cotangents))
    sums, d_encoded = jax.lax.scan(step, (first, *_by_device(grouped)), tiles)
    gradients = (_paste(d_encoded, encoded.shape[1]), sums[0], sums[1].sum(0), sums[2].sum(0))
    primals = (encoded, predicted, kernel, bias)
    return *(g.astype(x.dtype) for g, x in zip(gradients, primals, strict=True)), None


arcs_of_joint.defvjp(_joint_forward, _joint_backward)


def default_tile(rows: int, frames: int, columns: int, vocabulary: int) -> int:
    """Frames of a tile: a hundredth of all, or more while the bytes above hold them."""
    on_device = rows // parts('batch', rows) * columns * vocabulary // parts('vocab', vocabulary)
    budget = CPU_TILE_BYTES if device_platform() == 'cpu' else TILE_BYTES
    fit = budget // max(4 * on_device, 1)
    return max(1, -(-frames // MOST_TILES), min(fit, frames))


def _hidden(encoded: jax.Array, predicted: jax.Array) -> jax.Array:
    """tanh of the sum [B, t, U+1, J], computed in float32, in the dtype of `encoded`."""
    both = encoded[:, :, None].astype(jnp.float32) + predicted[:, None].astype(jnp.float32)
    return jnp.tanh(both).astype(encoded.dtype)


def _logits(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """float32 [B, t, U+1, V] of hidden [B, t, U+1, J] and a kernel of the same dtype."""
    return bias.astype(jnp.float32) + _product('btuj,jv->btuv', hidden, kernel)


def _product(how: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(how, a, b, preferred_element_type=jnp.float32)


def _gathered(kernel: jax.Array, dtype: Any) -> jax.Array:
    """The kernel in the dtype of the products, whole on every device but for V."""
    kernel = kernel.astype(dtype)
    return kernel if parts('embed', kernel.shape[0]) == 1 else constrain(kernel, (None, 'vocab'))


def _grouped(x: jax.Array, groups: int) -> jax.Array:
    """[B, t, U+1, ...] -> [groups, B / groups * t * (U+1), ...]: rows of one device are a group."""
    return x.reshape(groups, -1, x.shape[-1])


def _by_device(sums: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Lays out [groups, ..., V] with every group on its device."""
    if sums[0].shape[0] == 1:
        return tuple(sums)
    return tuple(constrain(x, ('batch', *(None,) * (x.ndim - 2), 'vocab')) for x in sums)


def _cut(x: jax.Array, tile: int) -> jax.Array:
    """[B, T, ...] -> [tiles, B, tile, ...], zeros behind the last frame."""
    rows, frames = x.shape[:2]
    tiles = -(-frames // tile)
    x = jnp.pad(x, ((0, 0), (0, tiles * tile - frames)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, tiles, tile, *x.shape[2:]), 1, 0)


def _paste(tiles: jax.Array, frames: int) -> jax.Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(tiles, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :frames]
