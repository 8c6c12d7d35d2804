"""Transducer losses against a sum over all paths, torchaudio's, and what padding may hold."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.objectives.transducer import (
    fused_hat_loss,
    fused_rnnt_loss,
    hat_loss,
    rnnt_loss,
    transducer_valid,
)
from bigssl_jax.objectives.transducer_lattice import lattice_loss

FIXTURE = pathlib.Path(__file__).with_name('transducer_torchaudio.npz')
MOST_FRAMES, MOST_LABELS, VOCABULARY = 4, 3, 4
LOSSES = {'rnnt': rnnt_loss, 'hat': hat_loss}
FUSED = {'rnnt': fused_rnnt_loss, 'hat': fused_hat_loss}


def log_softmax(x):
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def log_probabilities(kind, logits, blank):
    """By the definitions of RNN-T and HAT, float64."""
    if kind == 'rnnt':
        return log_softmax(logits)
    out = np.empty_like(logits)
    others = [v for v in range(logits.shape[-1]) if v != blank]
    p_blank = 1.0 / (1.0 + np.exp(-logits[..., blank]))
    out[..., blank] = np.log(p_blank)
    out[..., others] = np.log(1.0 - p_blank)[..., None] + log_softmax(logits[..., others])
    return out


def paths(frames, labels):
    """All orders of `labels` labels and `frames` blanks that end with a blank, as nodes left."""
    steps = frames - 1 + labels
    for places in itertools.combinations(range(steps), labels):
        t = u = 0
        nodes = []
        for step in range(steps + 1):
            said = step in places
            nodes.append((t, u, said))
            t, u = (t, u + 1) if said else (t + 1, u)
        assert (t, u) == (frames, labels)
        yield nodes


def brute_force(kind, logits, labels, blank):
    """-log of the summed probability of all paths; logits float64 [..., T, U+1, V]."""
    log_p = log_probabilities(kind, logits, blank)
    total = 0.0
    for nodes in paths(logits.shape[-3], len(labels)):
        arcs = [log_p[..., t, u, labels[u] if said else blank] for t, u, said in nodes]
        total = total + np.exp(sum(arcs))
    return -np.log(total)


def brute_force_gradient(kind, logits, labels, blank):
    """By central differences in float64, all entries at once."""
    steps = np.eye(logits.size).reshape(-1, *logits.shape) * 1e-5
    up, down = (brute_force(kind, logits + s, labels, blank) for s in (steps, -steps))
    return ((up - down) / 2e-5).reshape(logits.shape)


def all_sizes(seed=0, blank=0):
    """Every T up to 4 with every U up to 3, NaN and nonsense in the padding."""
    sizes = list(itertools.product(range(1, MOST_FRAMES + 1), range(MOST_LABELS + 1)))
    random = np.random.default_rng(seed)
    shape = (len(sizes), MOST_FRAMES, MOST_LABELS + 1, VOCABULARY)
    logits = np.full(shape, np.nan, np.float32)
    labels = np.full((len(sizes), MOST_LABELS), -7, np.int32)
    alphabet = [v for v in range(VOCABULARY) if v != blank]
    for i, (frames, count) in enumerate(sizes):
        logits[i, :frames, : count + 1] = random.normal(size=(frames, count + 1, VOCABULARY)) * 2
        labels[i, :count] = random.choice(alphabet, count)
    frame_counts, label_counts = np.array(sizes, np.int32).T
    return logits, labels, frame_counts, label_counts


def value_and_gradient(function, *arguments, **fields):
    """Losses [B] and the gradients of their sum by the first argument(s)."""
    count = 4 if function in FUSED.values() else 1

    def total(*arguments):
        losses = function(*arguments, **fields)
        return jnp.sum(losses), losses

    gradient = jax.jit(jax.grad(total, argnums=tuple(range(count)), has_aux=True))
    gradients, losses = gradient(*arguments)
    return np.asarray(losses), [np.asarray(g) for g in gradients]


@pytest.mark.parametrize(('kind', 'blank'), [('rnnt', 0), ('hat', 2)])
def test_value_and_gradient_equal_the_sum_over_paths(kind, blank):
    logits, labels, frame_counts, label_counts = all_sizes(blank=blank)
    losses, (gradient,) = value_and_gradient(
        LOSSES[kind], logits, labels, frame_counts, label_counts, blank_id=blank
    )
    assert losses.dtype == np.float32 and losses.shape == (16,)
    for i, (frames, count) in enumerate(zip(frame_counts, label_counts, strict=True)):
        real = logits[i, :frames, : count + 1].astype(np.float64)
        wanted = labels[i, :count]
        np.testing.assert_allclose(losses[i], brute_force(kind, real, wanted, blank), rtol=2e-6)
        expected = brute_force_gradient(kind, real, wanted, blank)
        np.testing.assert_allclose(gradient[i, :frames, : count + 1], expected, atol=2e-6)
    padded = np.isnan(logits)
    assert padded.any() and not gradient[padded].any()


def test_the_classic_case():
    logits = np.array(
        [
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.2, 0.8, 0.1]],
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.1, 0.1], [0.7, 0.1, 0.2, 0.1, 0.1]],
        ],
        np.float32,
    )[None]
    counts = np.array([2], np.int32)
    losses = jax.jit(rnnt_loss)(logits, np.array([[1, 2]], np.int32), counts, counts)
    np.testing.assert_allclose(losses, [4.495666], atol=1e-6)


def test_torchaudio_agrees():
    stored = np.load(FIXTURE)
    names = ('logits', 'labels', 'frame_counts', 'label_counts')
    for case in ('first', 'long', 'extreme'):
        arguments = [stored[f'{case}/{name}'] for name in names]
        losses, (gradient,) = value_and_gradient(
            rnnt_loss, *arguments, blank_id=int(stored[f'{case}/blank'])
        )
        np.testing.assert_allclose(losses, stored[f'{case}/losses'], rtol=2e-6)
        # torchaudio takes exp(alpha + beta - total) of float32 sums: that is how far it is exact.
        np.testing.assert_allclose(gradient, stored[f'{case}/gradient'], atol=1e-4)


def joint_case(rows=5, frames=13, labels=6, joint=8, vocabulary=11, dtype=np.float32):
    """Ragged rows (all of it, no label, one frame, one of each, half) with NaN behind them."""
    random = np.random.default_rng(3)
    frame_counts = np.array([frames, frames - 2, 1, 1, frames // 2], np.int32)[:rows]
    label_counts = np.array([labels, 0, labels, 1, labels // 2], np.int32)[:rows]
    encoded = random.normal(size=(rows, frames, joint))
    predicted = random.normal(size=(rows, labels + 1, joint))
    kernel = random.normal(size=(joint, vocabulary))
    bias = random.normal(size=vocabulary)
    wanted = random.integers(1, vocabulary, (rows, labels)).astype(np.int32)
    for i in range(rows):
        encoded[i, frame_counts[i] :] = np.nan
        predicted[i, label_counts[i] + 1 :] = np.nan
        wanted[i, label_counts[i] :] = 10**6
    network = tuple(jnp.asarray(x, dtype) for x in (encoded, predicted, kernel, bias))
    return network, wanted, frame_counts, label_counts


def by_reference(kind):
    """The fused loss as the reference loss of all logits."""

    def loss(encoded, predicted, kernel, bias, *rest, **fields):
        hidden = jnp.tanh(encoded[:, :, None] + predicted[:, None])
        return LOSSES[kind](hidden @ kernel + bias, *rest, **fields)

    return loss


@pytest.mark.parametrize('kind', ['rnnt', 'hat'])
def test_fused_equals_reference(kind):
    network, *rest = joint_case()
    for x, count in zip(network[:2], (rest[1], rest[2] + 1), strict=True):
        assert np.isnan(x[-1, count[-1] :]).all()
    clean = tuple(jnp.nan_to_num(x) for x in network)
    fields = {'fastemit': 0.3, 'blank_id': 2}
    labels = np.where(rest[0] == 2, 3, rest[0])

    def total(*network):
        losses = by_reference(kind)(*network, labels, *rest[1:], **fields)
        return jnp.sum(losses), losses

    expected, losses = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*clean)
    for tile in (1, 5):
        fused = value_and_gradient(
            FUSED[kind], *network, labels, *rest[1:], tile_frames=tile, **fields
        )
        np.testing.assert_allclose(fused[0], losses, rtol=1e-5)
        for mine, reference in zip(fused[1], expected, strict=True):
            np.testing.assert_allclose(mine, reference, atol=1e-5)
        assert not fused[1][0][np.isnan(network[0])].any()
        assert not fused[1][1][np.isnan(network[1])].any()


def test_padding_and_batch_mates_change_nothing():
    network, *rest = joint_case()
    together, (encoded, predicted, *_) = value_and_gradient(fused_rnnt_loss, *network, *rest)
    row = 4
    frames, labels = int(rest[1][row]), int(rest[2][row])
    # Alone, without any padding.
    cut = (network[0][row : row + 1, :frames], network[1][row : row + 1, : labels + 1])
    alone, (encoded_alone, predicted_alone, *_) = value_and_gradient(
        fused_rnnt_loss,
        *cut,
        *network[2:],
        rest[0][row : row + 1, :labels],
        *(count[row : row + 1] for count in rest[1:]),
    )
    np.testing.assert_allclose(together[row], alone[0], rtol=1e-6)
    np.testing.assert_allclose(encoded[row, :frames], encoded_alone[0], atol=1e-6)
    np.testing.assert_allclose(predicted[row, : labels + 1], predicted_alone[0], atol=1e-6)


def test_bfloat16_products_with_a_float32_recursion():
    network, *rest = joint_case()
    # The same numbers, rounded: what differs is then the arithmetic alone.
    narrow = tuple(x.astype(jnp.bfloat16) for x in network)
    widened = tuple(x.astype(jnp.float32) for x in narrow)
    rounded, rounded_gradients = value_and_gradient(fused_rnnt_loss, *narrow, *rest)
    wide, wide_gradients = value_and_gradient(fused_rnnt_loss, *widened, *rest)
    assert rounded.dtype == np.float32
    assert all(g.dtype == jnp.bfloat16 for g in rounded_gradients)
    np.testing.assert_allclose(rounded, wide, rtol=5e-3)
    for mine, reference in zip(rounded_gradients, wide_gradients, strict=True):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(mine.astype(np.float32) / scale, reference / scale, atol=0.02)
    # Master weights stay float32 and get float32 gradients.
    mixed = jax.eval_shape(
        jax.grad(lambda *x: jnp.sum(fused_rnnt_loss(*x, *rest)), argnums=(0, 1, 2, 3)),
        *narrow[:2],
        *network[2:],
    )
    assert [g.dtype for g in mixed] == [jnp.bfloat16] * 2 + [jnp.float32] * 2


@pytest.mark.parametrize('kind', ['rnnt', 'hat'])
def test_extreme_logits(kind):
    random = np.random.default_rng(5)
    logits = random.choice([-100.0, 100.0], (6, 9, 5, 7)).astype(np.float32)
    logits[0], logits[1] = 100.0, -100.0
    labels = random.integers(1, 7, (6, 4)).astype(np.int32)
    counts = np.full(6, 9, np.int32), np.full(6, 4, np.int32)
    losses, (gradient,) = value_and_gradient(LOSSES[kind], logits, labels, *counts)
    assert np.isfinite(gradient).all()
    for i in range(6):
        # The sum over paths, in logarithms: the probabilities themselves are below 1e-308.
        log_p = log_probabilities_stable(kind, logits[i].astype(np.float64))
        arcs = [
            sum(log_p[t, u, labels[i, u] if said else 0] for t, u, said in nodes)
            for nodes in paths(9, 4)
        ]
        np.testing.assert_allclose(losses[i], -np.logaddexp.reduce(arcs), rtol=1e-5, atol=1e-5)


def log_probabilities_stable(kind, logits):
    if kind == 'rnnt':
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    others = logits[..., 1:] - np.logaddexp.reduce(logits[..., 1:], axis=-1, keepdims=True)
    blank = logits[..., :1]
    return np.concatenate([-np.logaddexp(0, -blank), others - np.logaddexp(0, blank)], axis=-1)


def test_a_masked_vocabulary_is_finite():
    logits, labels, *counts = all_sizes()
    logits[..., 3] = -np.inf
    labels[labels == 3] = 2
    losses, (gradient,) = value_and_gradient(rnnt_loss, logits, labels, *counts)
    assert np.isfinite(gradient).all() and not gradient[..., 3].any()
    for i, (frames, count) in enumerate(zip(*counts, strict=True)):
        real = logits[i, :frames, : count + 1, :3].astype(np.float64)
        wanted = labels[i, :count]
        np.testing.assert_allclose(losses[i], brute_force('rnnt', real, wanted, 0), rtol=2e-6)
        expected = brute_force_gradient('rnnt', real, wanted, 0)
        np.testing.assert_allclose(gradient[i, :frames, : count + 1, :3], expected, atol=2e-6)


def test_rows_without_frames_are_zero():
    network, labels, frame_counts, label_counts = joint_case()
    frame_counts[[0, 1]] = 0
    losses, gradients = value_and_gradient(
        fused_rnnt_loss, *network, labels, frame_counts, label_counts
    )
    assert not losses[:2].any() and losses[2:].all()
    assert not gradients[0][:2].any() and not gradients[1][:2].any()
    assert all(np.isfinite(g).all() for g in gradients)


def test_occupations_stay_exact_on_a_long_lattice():
    """Every diagonal is crossed once, and every label is said once."""
    random = np.random.default_rng(6)
    frames, labels = 600, 80
    logits = random.normal(size=(2, frames, labels + 1, 3)).astype(np.float32) * 3
    counts = np.array([frames, 411], np.int32), np.array([labels, 57], np.int32)

    def of_planes(blank, label):
        losses = lattice_loss(blank, label, *counts, 0.0)
        return jnp.sum(losses), losses

    log_p = log_softmax(logits.astype(np.float64)).astype(np.float32)
    occupied = jax.jit(jax.grad(of_planes, argnums=(0, 1), has_aux=True))
    (blank, label), losses = occupied(log_p[..., 0], log_p[..., 1])
    for i in range(2):
        by_frame = -np.asarray(blank[i], np.float64).sum(axis=1)
        np.testing.assert_allclose(by_frame[: counts[0][i]], 1.0, atol=1e-5)
        by_label = -np.asarray(label[i], np.float64).sum(axis=0)
        np.testing.assert_allclose(by_label[: counts[1][i]], 1.0, atol=1e-5)
        assert not by_frame[counts[0][i] :].any() and not by_label[counts[1][i] :].any()
        # The value, against the recursion in float64.
        expected = recursion(log_p[i].astype(np.float64), counts[0][i], counts[1][i])
        np.testing.assert_allclose(losses[i], expected, rtol=1e-6)


def recursion(log_p, frames, labels):
    """alpha node by node, blank 0, every label 1."""
    alpha = np.full((frames, labels + 1), -np.inf)
    alpha[0, 0] = 0.0
    for t, u in itertools.product(range(frames), range(labels + 1)):
        if t:
            alpha[t, u] = np.logaddexp(alpha[t, u], alpha[t - 1, u] + log_p[t - 1, u, 0])
        if u:
            alpha[t, u] = np.logaddexp(alpha[t, u], alpha[t, u - 1] + log_p[t, u - 1, 1])
    return -(alpha[-1, -1] + log_p[frames - 1, labels, 0])


def test_fastemit_scales_the_label_arcs_of_the_gradient_alone():
    logits, labels, *counts = all_sizes()
    rate = 0.25
    plain, (gradient,) = value_and_gradient(rnnt_loss, logits, labels, *counts)
    losses, (hurried,) = value_and_gradient(rnnt_loss, logits, labels, *counts, fastemit=rate)
    np.testing.assert_array_equal(losses, plain)
    for i, (frames, count) in enumerate(zip(*counts, strict=True)):
        real = logits[i, :frames, : count + 1].astype(np.float64)
        # dL/dlogit = sum over arcs of dL/d(arc) * d(arc)/dlogit, label arcs scaled.
        log_p = log_softmax(real)
        expected = np.zeros_like(real)
        for t, u in itertools.product(range(frames), range(count + 1)):
            arcs = [(0, 1.0)] + ([(labels[i, u], 1.0 + rate)] if u < count else [])
            for v, scale in arcs:
                d_arc = arc_derivative(log_p, labels[i, :count], t, u, v)
                expected[t, u] += scale * d_arc * (np.eye(VOCABULARY)[v] - np.exp(log_p[t, u]))
        np.testing.assert_allclose(hurried[i, :frames, : count + 1], expected, atol=1e-5)
    moved = np.abs(hurried - gradient).max(axis=(1, 2, 3))
    assert (moved[counts[1] > 0] > 0.01).all() and not moved[counts[1] == 0].any()


def arc_derivative(log_p, labels, t, u, v):
    """d loss / d log-probability of v at (t, u), by paths that take it."""
    taken = total = 0.0
    for nodes in paths(log_p.shape[0], len(labels)):
        arcs = [(a, b, labels[b] if said else 0) for a, b, said in nodes]
        probability = np.exp(sum(log_p[arc] for arc in arcs))
        total += probability
        taken += probability * ((t, u, v) in arcs)
    return -taken / total


def test_valid_rows():
    labels = np.array([[1, 2], [1, 0], [1, 7], [-1, 2], [9, 9], [1, 2], [1, 2]], np.int32)
    label_counts = np.array([2, 2, 2, 2, 0, 3, 2], np.int32)
    frame_counts = np.array([1, 9, 9, 9, 1, 9, 0], np.int32)
    valid = transducer_valid(labels, label_counts, frame_counts, 7, 0)
    np.testing.assert_array_equal(valid, [True, False, False, False, True, False, False])
    other_blank = transducer_valid(labels[:2], label_counts[:2], frame_counts[:2], 7, 1)
    np.testing.assert_array_equal(other_blank, [False, False])


def test_arguments_that_do_not_fit():
    logits, labels, *counts = all_sizes()
    with pytest.raises(ValueError, match=r'labels.*wanted: \(\(16, 3\)'):
        rnnt_loss(logits, labels[:, :2], *counts)
    with pytest.raises(ValueError, match='blank_id is 4; allowed: 0 to 3'):
        rnnt_loss(logits, labels, *counts, blank_id=4)
    with pytest.raises(ValueError, match='fastemit is -1.0'):
        hat_loss(logits, labels, *counts, fastemit=-1.0)
    network, *rest = joint_case()
    with pytest.raises(ValueError, match='predicted, kernel, bias'):
        fused_rnnt_loss(*network[:3], network[3][:-1], *rest)
    with pytest.raises(ValueError, match='tile_frames is 0'):
        fused_hat_loss(*network, *rest, tile_frames=0)


def test_memory_is_a_twentieth_of_the_logits():
    rows, frames, labels, vocabulary, joint = 16, 400, 100, 4096, 640

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    network = (
        of(rows, frames, joint),
        of(rows, labels + 1, joint),
        of(joint, vocabulary),
        of(vocabulary),
    )
    integers = tuple(of(*s, dtype=jnp.int32) for s in ((rows, labels), (rows,), (rows,)))
    for loss in FUSED.values():
        gradient = jax.grad(lambda *x, f=loss: jnp.sum(f(*x)), argnums=(0, 1, 2, 3))
        program = jax.jit(gradient).lower(*network, *integers).compile()
        used = program.memory_analysis().temp_size_in_bytes
        logits = 4 * rows * frames * (labels + 1) * vocabulary
        assert 4 * rows * (labels + 1) * vocabulary < used < 0.05 * logits


ON_EIGHT_DEVICES = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from bigssl_jax.objectives.transducer import fused_rnnt_loss
from bigssl_jax.parallel import BATCH_AXES, make_mesh, use_mesh
from bigssl_jax.parallel.collectives import collectives

random = np.random.default_rng(0)
B, T, U, V, J = 8, 12, 5, 16, 8
network = [random.normal(size=s).astype(np.float32) for s in ((B, T, J), (B, U + 1, J), (J, V), V)]
rest = [random.integers(a, b, s).astype(np.int32)
        for a, b, s in ((1, V, (B, U)), (1, T + 1, B), (0, U + 1, B))]

def run(axes, devices=None):
    mesh = make_mesh(axes, devices)
    rows = NamedSharding(mesh, P(BATCH_AXES))
    kernel, bias = (NamedSharding(mesh, P(*spec)) for spec in (('fsdp', 'tensor'), ('tensor',)))
    layout = (rows, rows, kernel, bias)
    def loss(*x):
        return jnp.sum(fused_rnnt_loss(*x, tile_frames=2))
    with use_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)),
                       in_shardings=(*layout, rows, rows, rows), out_shardings=(None, layout))
        program = step.lower(*network, *rest).compile()
    found = [[c.operation, '+'.join(c.axes), c.count] for c in collectives(program.as_text(), mesh)]
    return [np.asarray(x) for x in jax.tree.leaves(program(*network, *rest))], found

one, _ = run({}, jax.devices()[:1])
out = []
for axes in ({'data': 2, 'fsdp': 2, 'tensor': 2},):
    values, found = run(axes)
    out.append([max(float(np.abs(a - b).max()) for a, b in zip(values, one)), found])
print(json.dumps(out))
"""


def test_rows_on_many_devices_do_not_talk_in_the_loop():
    # The optimisation level is of code generation; the partitioner comes before it.
    flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
    done = subprocess.run(
        [sys.executable, '-c', ON_EIGHT_DEVICES],
        capture_output=True, text=True, timeout=250, check=False,
        env={**os.environ, 'XLA_FLAGS': flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for difference, found in json.loads(done.stdout.splitlines()[-1]):
        assert difference < 1e-5
        # Once, before and after the 6 tiles: the kernel is gathered, gradients are summed.
        across_rows = [(operation, count) for operation, axes, count in found if axes != 'tensor']
        assert {operation for operation, _ in across_rows} <= {'all-gather', 'all-reduce'}
        assert across_rows and all(count == 1 for _, count in across_rows)
        gathered = [axes for operation, axes, _ in found if operation == 'all-gather']
        assert gathered == ['fsdp']
