"""Transducer losses, forward and backward: ours, torchaudio's, and CTC for scale.

    python benchmarks/transducer_loss.py [--sizes 8,150,40,1024 ...] [--peer-python PYTHON]

For every size B, T, U, V (rows, frames, labels, vocabulary; joint network of 640), in float32, on
all cores, full lengths:

    from frames  the joint network tanh(encoded + predicted) @ kernel + bias and the loss, and the
                 gradients of all four: what a training step pays
        fused          ours, in tiles, the logits computed a second time in the backward pass
        reference      ours, with all logits at once
        torchaudio     the same joint network in PyTorch, and torchaudio's rnnt_loss
    from logits  the loss alone and its gradient by the logits
        reference      ours
        torchaudio     its rnnt_loss
        ctc (optax)    of logits [B, T, V], which are U + 1 times fewer

Milliseconds are medians of interleaved repeats; CPU milliseconds sum over threads and are the
steadier on a machine that others use as well.  MB are what the process grows by at most during a
call (inputs were there before), read in the same way on both sides; 'planned' is what XLA's
compiler has allotted to temporaries and results of ours, on all devices together.  Ours uses the
cores as in training: a host device per core, the rows split between them.

The two sides must agree in the loss, or the run fails.  The peer lives in an environment of its
own (made on demand in .venv-peer-transducer: about 3 GB); without one use `--no-peer`.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import turns

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The last torchaudio that has rnnt_loss, and the PyTorch beside which it imports.
PEER_PACKAGES = ('torch==2.11.*', 'torchaudio==2.11.*', 'numpy')
SIZES = ((8, 150, 40, 1024), (16, 100, 20, 256), (4, 100, 20, 4096), (2, 300, 80, 1024))
JOINT = 640
FROM_FRAMES, FROM_LOGITS = 'from frames', 'from logits'
MEGABYTE = 1e6


def make_arrays(size: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Inputs of every form, the same on both sides."""
    rows, frames, labels, vocabulary = size
    random = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return random.standard_normal(shape, np.float32) * np.float32(scale)

    return {
        'encoded': normal(rows, frames, JOINT),
        'predicted': normal(rows, labels + 1, JOINT),
        'kernel': normal(JOINT, vocabulary, scale=JOINT**-0.5),
        'bias': normal(vocabulary),
        'labels': random.integers(1, vocabulary, (rows, labels)).astype(np.int32),
        'frame_counts': np.full(rows, frames, np.int32),
        'label_counts': np.full(rows, labels, np.int32),
        'logits': normal(rows, frames, labels + 1, vocabulary),
        'frame_logits': normal(rows, frames, vocabulary),
    }


# ---------------------------------------------------------------------------------------------
# ours


def make_ours(size: tuple[int, ...]) -> dict[str, tuple[Callable[[], float], float]]:
    """For each form a call that returns the summed loss, and the megabytes planned for it."""
    from bigssl_jax.parallel.startup import configure_platform

    configure_platform()
    import jax
    import jax.numpy as jnp

    from bigssl_jax.objectives.ctc import ctc_loss
    from bigssl_jax.objectives.transducer import fused_rnnt_loss, rnnt_loss
    from bigssl_jax.parallel import batch_sharding, make_mesh, replicated, use_mesh

    mesh = make_mesh({'data': -1})
    layouts = {'kernel': replicated(mesh), 'bias': replicated(mesh)}
    arrays = {
        name: jax.device_put(x, layouts.get(name, batch_sharding(mesh)))
        for name, x in make_arrays(size).items()
    }
    targets = (arrays['labels'], arrays['frame_counts'], arrays['label_counts'])
    network = tuple(arrays[name] for name in ('encoded', 'predicted', 'kernel', 'bias'))

    def whole(encoded: Any, predicted: Any, kernel: Any, bias: Any, *targets: Any) -> Any:
        hidden = jnp.tanh(encoded[:, :, None] + predicted[:, None])
        return rnnt_loss(hidden @ kernel + bias, *targets)

    def ctc(logits: Any, labels: Any, frame_counts: Any, label_counts: Any) -> Any:
        mask = jnp.arange(logits.shape[1]) < frame_counts[:, None]
        return ctc_loss(logits, mask, labels, label_counts, frame_counts > 0)

    forms: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        f'{FROM_FRAMES}: fused': (fused_rnnt_loss, network),
        f'{FROM_FRAMES}: reference': (whole, network),
        f'{FROM_LOGITS}: reference': (rnnt_loss, (arrays['logits'],)),
        f'{FROM_LOGITS}: ctc (optax)': (ctc, (arrays['frame_logits'],)),
    }
    calls: dict[str, tuple[Callable[[], float], float]] = {}
    for name, (loss, inputs) in forms.items():

        def total(*x: Any, loss: Callable[..., Any] = loss) -> Any:
            return jnp.sum(loss(*x))

        step = jax.value_and_grad(total, argnums=tuple(range(len(inputs))))
        with use_mesh(mesh):
            program = jax.jit(step).lower(*inputs, *targets).compile()
        planned = program.memory_analysis()
        megabytes = (planned.temp_size_in_bytes + planned.output_size_in_bytes) / MEGABYTE

        def call(program: Any = program, inputs: tuple[Any, ...] = inputs) -> float:
            return float(jax.block_until_ready(program(*inputs, *targets))[0])

        calls[name] = call, megabytes * jax.device_count()
    return calls


# ---------------------------------------------------------------------------------------------
# the peer


def make_peer(size: tuple[int, ...]) -> dict[str, tuple[Callable[[], float], None]]:
    """The same for PyTorch; runs in the peer's environment, where only torch and numpy exist."""
    import torch
    from torchaudio.functional import rnnt_loss

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arrays = {name: torch.from_numpy(x) for name, x in make_arrays(size).items()}
    targets = (arrays['labels'], arrays['frame_counts'], arrays['label_counts'])

    def of_network(encoded: Any, predicted: Any, kernel: Any, bias: Any) -> Any:
        hidden = torch.tanh(encoded[:, :, None] + predicted[:, None])
        return torch.nn.functional.linear(hidden, kernel.T, bias)

    def make(names: tuple[str, ...], logits: Callable[..., Any]) -> Callable[[], float]:
        leaves = [arrays[name].requires_grad_() for name in names]

        def call() -> float:
            for leaf in leaves:
                leaf.grad = None
            loss = rnnt_loss(logits(*leaves), *targets, blank=0, reduction='sum')
            loss.backward()
            return float(loss.detach())

        return call

    network = ('encoded', 'predicted', 'kernel', 'bias')
    return {
        f'{FROM_FRAMES}: torchaudio': (make(network, of_network), None),
        f'{FROM_LOGITS}: torchaudio': (make(('logits',), lambda x: x), None),
    }


# ---------------------------------------------------------------------------------------------
# the two processes and their parent


def work(side: str) -> None:
    """A worker: is given a size, then names of forms to call once, until the next size."""
    calls: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        answer: Any
        if 'size' in question:
            calls.clear()
            calls.update((make_ours if side == 'ours' else make_peer)(tuple(question['size'])))
            answer = {name: {'planned_mb': planned} for name, (_, planned) in calls.items()}
        else:
            answer = measure(calls[question['call']][0])
        print(json.dumps(answer), flush=True)


def measure(call: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds, peak growth of the process in MB (None where Linux does not tell), loss."""
    try:
        pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
        before: float | None = resident('VmRSS')
    except OSError:
        before = None
    wall, cpu = time.perf_counter(), time.process_time()
    loss = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        'ms': 1000 * wall,
        'cpu_ms': 1000 * cpu,
        'mb': None if before is None else resident('VmHWM') - before,
        'loss': loss,
    }


def resident(field: str) -> float:
    """A field of /proc/self/status, in MB."""
    status = pathlib.Path('/proc/self/status').read_text()
    line = next(line for line in status.splitlines() if line.startswith(field + ':'))
    return int(line.split()[1]) * 1024 / MEGABYTE


def compare(size: tuple[int, ...], workers: dict[str, Any], repeats: int) -> dict[str, Any]:
    """All forms of one size in turns: {form: {'ms', 'cpu_ms', 'mb', 'planned_mb', 'loss'}}."""
    forms = {
        name: (worker, facts)
        for worker in workers.values()
        for name, facts in turns.ask(worker, {'size': size}).items()
    }
    for name, (worker, _) in forms.items():  # warm
        turns.ask(worker, {'call': name})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, (worker, _) in forms.items():
            found[name].append(turns.ask(worker, {'call': name}))
    result = {}
    for name, answers in found.items():
        result[name] = dict(forms[name][1])
        for key in ('ms', 'cpu_ms', 'loss'):
            result[name][key] = statistics.median(answer[key] for answer in answers)
        peaks = [answer['mb'] for answer in answers if answer['mb'] is not None]
        result[name]['mb'] = max(peaks, default=None)
    check_losses(size, result)
    return result


def check_losses(size: tuple[int, ...], result: dict[str, Any]) -> None:
    """Stops the run when two ways to the same loss differ."""
    for given in (FROM_FRAMES, FROM_LOGITS):
        losses = {
            name: facts['loss']
            for name, facts in result.items()
            if name.startswith(given) and 'ctc' not in name
        }
        if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
            raise SystemExit(f'the losses of {size} differ: {losses}')


def show(size: tuple[int, ...], result: dict[str, Any]) -> None:
    """The table of one size; ratios are to torchaudio's time on the same input."""
    rows, frames, labels, vocabulary = size
    whole = 4 * rows * frames * (labels + 1) * vocabulary / MEGABYTE
    print(f'\nB {rows}, T {frames}, U {labels}, V {vocabulary}: logits {whole:,.0f} MB')
    print(f'{"":58}torchaudio / this')
    header = ('ms', 'CPU ms', 'MB', 'planned MB', 'ms', 'CPU ms')
    print('{:26}{:>9}{:>9}{:>9}{:>12}{:>9}{:>9}'.format('', *header))
    for name, facts in sorted(result.items()):
        peer = result.get(f'{name.split(":")[0]}: torchaudio')
        ratios = ['', '']
        if peer and 'ctc' not in name:
            ratios = [f'{peer[clock] / facts[clock]:.2f}' for clock in ('ms', 'cpu_ms')]
        megabytes = ['' if facts[k] is None else f'{facts[k]:,.0f}' for k in ('mb', 'planned_mb')]
        print(
            f'{name:26}{facts["ms"]:>9,.0f}{facts["cpu_ms"]:>9,.0f}{megabytes[0]:>9}'
            f'{megabytes[1]:>12}{ratios[0]:>9}{ratios[1]:>9}',
            flush=True,
        )


def parse_size(text: str) -> tuple[int, ...]:
    """'8,150,40,1024' -> (8, 150, 40, 1024)."""
    size = tuple(int(word) for word in text.split(','))
    if len(size) != 4 or min(size) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not B,T,U,V')
    return size


def main() -> None:
    """Parses the command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument(
        '--sizes', nargs='+', type=parse_size, default=SIZES, metavar='B,T,U,V', help='see above'
    )
    parser.add_argument('--repeats', type=int, default=3, help='of each form, after one to warm up')
    parser.add_argument(
        '--peer-python',
        default=str(ROOT / '.venv-peer-transducer/bin/python'),
        help='interpreter with torch and torchaudio (default: made in .venv-peer-transducer)',
    )
    parser.add_argument('--no-peer', action='store_true', help='ours alone')
    parser.add_argument('--json', metavar='FILE', help='also write the result as JSON')
    parser.add_argument('--worker', choices=('ours', 'peer'), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    pythons = {'ours': sys.executable}
    if not options.no_peer:
        pythons['peer'] = turns.peer_python(options.peer_python, PEER_PACKAGES)
    workers = {
        side: turns.start([python, __file__, '--worker', side]) for side, python in pythons.items()
    }
    results = []
    try:
        for size in options.sizes:
            forms = compare(size, workers, options.repeats)
            results.append({'size': size, 'forms': forms})
            show(size, forms)
    finally:
        turns.finish(workers.values())
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
