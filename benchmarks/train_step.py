"""Our train step against a PyTorch Conformer of the same size, side by side on one machine.

    python benchmarks/train_step.py [--objective best_rq|ctc|both] [--remat block] [--parts]

Ours is the step that `bigssl run` trains with: log-mel, normalisation, Conformer 'small' (8 x 144,
4 heads, kernel 15), the loss, its gradient, clipping, AdamW.  The peer is `Wav2Vec2BertModel` of
the transformers library with random weights and the same sizes, between a log-mel front end and a
head written here in the plainest PyTorch that is fast, with torch's own AdamW and CTC.  Both run
from int16 waveforms to updated parameters, 16 utterances of 4 s, dropout 0.1, float32, all cores.

What is not the same, and whom it favours:
- The peer stacks 4 frames and projects them, ours convolves (8, 16 channels): favours the peer.
- The peer predicts BEST-RQ codes at masked frames alone, which PyTorch can index: favours the peer.

The peer lives in an environment of its own (`--peer-python`, made on demand in .venv-peer: about
6 GB), because PyTorch is no dependency of this project.  Each side is one process that waits on
its standard input; the parent lets them take turns, a few steps each, so that whatever else the
machine does meets both.
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
PEER_PACKAGES = ('torch==2.13.0', 'transformers==5.23.*', 'numpy')

ROWS, SECONDS, SAMPLE_RATE = 16, 4, 16000
LAYERS, WIDTH, HEADS, KERNEL, DROPOUT = 8, 144, 4, 15, 0.1
MELS, STACK = 80, 4
CODES, CODE_DIM, MASK_START, MASK_SPAN = 8192, 16, 0.01, 40
VOCABULARY, LABELS = 64, 40
STEPS_A_TURN = 3


def make_batch() -> dict[str, np.ndarray]:
    """One labelled batch of noise, in the keys of a Batch."""
    random = np.random.default_rng(0)
    samples = SECONDS * SAMPLE_RATE
    return {
        'audio': random.normal(0, 2000, (ROWS, samples)).astype(np.int16),
        'sample_counts': np.full(ROWS, samples, np.int32),
        'labels': random.integers(3, VOCABULARY, (ROWS, LABELS)).astype(np.int32),
        'label_counts': np.full(ROWS, LABELS, np.int32),
        'rows': np.arange(ROWS, dtype=np.int32),
    }


# ---------------------------------------------------------------------------------------------
# ours


def make_ours(objective: str, remat: str, parts: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    """A function that takes one step and waits for it, and facts about what it trains."""
    from bigssl_jax.parallel.startup import configure_platform

    configure_platform()
    import jax

    from bigssl_jax.parallel import batch_sharding, make_mesh, use_mesh
    from bigssl_jax.stages import schema
    from bigssl_jax.stages.training_stage import make_trainer

    fields: dict[str, Any] = {'objective': objective, 'stream': 'noise'}
    source = {'selection': 'noise', 'labels': 'text' if objective == 'ctc' else ''}
    encoder = {'preset': 'small', 'dropout': DROPOUT} | ({'remat': remat} if remat else {})
    config = schema.resolve(
        {
            'corpora': {'noise': {}},
            'selections': {'noise': {'corpus': 'noise'}},
            'statistics': {'selection': 'noise'},
            'encoder': encoder,
            'stages': {
                'step': {
                    'kind': 'pretrain' if objective == 'best_rq' else 'finetune',
                    'objectives': {objective: fields},
                    'streams': {'noise': {'sources': {'noise': source}}},
                }
            },
        }
    )
    mesh = make_mesh(config['compute']['mesh'])
    trainer = make_trainer(config, 'step', mesh, VOCABULARY)
    zeros_and_ones = {
        'feature_mean': np.full(MELS, 12.0, np.float32),
        'feature_std': np.full(MELS, 3.0, np.float32),
    }
    step = trainer.train_step()
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    holder = [trainer.make_state(zeros_and_ones)]
    rates, key = {'all': np.float32(1e-4)}, jax.random.key(0)

    def take_step() -> None:
        with use_mesh(mesh):
            holder[0], report = step(holder[0], {objective: batch}, rates, key)
        jax.block_until_ready((holder[0], report))

    size = sum(leaf.size for leaf in jax.tree.leaves(holder[0].params))
    assert trainer.encoder is not None
    facts: dict[str, Any] = {
        'library': f'jax {jax.__version__}',
        'parameters': int(size),
        'threads': jax.device_count(),
        'remat': trainer.encoder.remat,
    }
    if parts:
        facts['parts'] = measure_parts(trainer, objective, holder[0], batch, mesh)
    return take_step, facts


def measure_parts(
    trainer: Any, objective: str, state: Any, batch: Any, mesh: Any
) -> dict[str, float]:
    """Median milliseconds of growing pieces of the step: each holds the one before."""
    import jax
    import jax.numpy as jnp

    from bigssl_jax.models import Encoder
    from bigssl_jax.objectives import EncoderCall
    from bigssl_jax.parallel import use_mesh

    def encoder_call(params: Any) -> EncoderCall:
        return EncoderCall(
            encoder=Encoder(trainer.encoder),
            params=params['encoder'],
            constants=state.constants['encoder'],
            audio=trainer.audio,
            spec_augment=None,
            deterministic=False,
        )

    key = jax.random.key(0)

    def features(params: Any, batch: Any) -> Any:
        return encoder_call(params).features(batch)

    def encoded(params: Any, batch: Any) -> Any:
        call = encoder_call(params)
        return call.encode(*call.features(batch), jax.random.split(key, ROWS)[0])

    def loss(params: Any, batch: Any) -> Any:
        head = trainer.objectives[objective]
        constants = state.constants['heads'][objective]
        totals = head.totals(
            encoder_call(params), params['heads'][objective], constants, batch, key
        )
        return totals['loss'] / jnp.maximum(totals['weight'], 1.0)

    found = {}
    pieces = {
        'front end': features,
        '+ encoder': encoded,
        '+ loss (forward)': loss,
        '+ gradient': jax.grad(loss),
    }
    for name, function in pieces.items():
        compiled = jax.jit(function)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            with use_mesh(mesh):
                jax.block_until_ready(compiled(state.params, batch))
            times.append(1000 * (time.perf_counter() - start))
        found[name] = round(statistics.median(times[2:]), 1)
    return found


# ---------------------------------------------------------------------------------------------
# the peer


def make_peer(objective: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """The same for PyTorch; runs in the peer's environment, where only torch and numpy exist."""
    import torch
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    torch.manual_seed(0)
    encoder = Wav2Vec2BertModel(
        Wav2Vec2BertConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            feature_projection_input_dim=STACK * MELS,
            conv_depthwise_kernel_size=KERNEL,
            position_embeddings_type=None,
            hidden_dropout=DROPOUT,
            activation_dropout=DROPOUT,
            feat_proj_dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
        )
    ).train()
    head = torch.nn.Linear(WIDTH, CODES if objective == 'best_rq' else VOCABULARY)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.98), eps=1e-9)
    batch = {name: torch.from_numpy(array) for name, array in make_batch().items()}
    log_mel = peer_log_mel(torch)
    losses = {'best_rq': peer_best_rq(torch), 'ctc': peer_ctc(torch)}

    def take_step() -> None:
        with torch.no_grad():
            features = (log_mel(batch['audio'].float()) - 12.0) / 3.0
        loss = losses[objective](features, encoder, head, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        if not torch.isfinite(loss):
            raise RuntimeError('the peer diverged')

    facts = {
        'library': f'torch {torch.__version__}',
        'parameters': sum(parameter.numel() for parameter in parameters),
        'threads': torch.get_num_threads(),
    }
    return take_step, facts


def peer_log_mel(torch: Any) -> Callable[[Any], Any]:
    """float32 [B, S] -> [B, T, MELS]; 25 ms Hann windows every 10 ms, an FFT of 512, HTK mels."""

    def mel(hertz: Any) -> Any:
        return 1127.0 * np.log1p(hertz / 700.0)

    edges = np.linspace(mel(20.0), mel(8000.0), MELS + 2)
    bins = mel(np.arange(257) * SAMPLE_RATE / 512)
    up = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    triangles = torch.from_numpy(np.maximum(0, np.minimum(up, down)).astype(np.float32))
    window = torch.hann_window(400, periodic=False)

    def log_mel(waveform: Any) -> Any:
        frames = waveform.unfold(1, 400, 160)
        frames = frames - frames.mean(-1, keepdim=True)
        power = torch.fft.rfft(frames * window, n=512).abs().square()
        return torch.log(torch.clamp(power @ triangles, min=1e-7))

    return log_mel


def stacked(features: Any) -> Any:
    """[B, T, F] -> [B, T // 4, 4 F]."""
    rows, frames, mels = features.shape
    kept = frames // STACK * STACK
    return features[:, :kept].reshape(rows, kept // STACK, STACK * mels)


def peer_best_rq(torch: Any) -> Callable[..., Any]:
    """Masked prediction of random-projection codes."""
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(STACK * MELS, CODE_DIM, generator=generator)
    codebook = torch.nn.functional.normalize(
        torch.randn(CODES, CODE_DIM, generator=generator), dim=-1
    )

    def loss(features: Any, encoder: Any, head: Any, batch: Any) -> Any:
        with torch.no_grad():
            clean = stacked(features)
            # Nearest unit vector = largest cosine.
            codes = (clean @ projection @ codebook.T).argmax(-1)
            starts = (torch.rand(features.shape[:2]) < MASK_START).float()
            spans = torch.nn.functional.pad(starts, (MASK_SPAN - 1, 0))[:, None]
            masked = torch.nn.functional.max_pool1d(spans, MASK_SPAN, 1)[:, 0] > 0
            noise = 0.1 * torch.randn_like(features)
            noisy = torch.where(masked[..., None], noise, features)
            hidden = stacked(masked[..., None]).any(-1)
        frames = encoder(stacked(noisy)).last_hidden_state
        return torch.nn.functional.cross_entropy(head(frames[hidden]), codes[hidden])

    return loss


def peer_ctc(torch: Any) -> Callable[..., Any]:
    """CTC per label."""

    def loss(features: Any, encoder: Any, head: Any, batch: Any) -> Any:
        frames = encoder(stacked(features)).last_hidden_state
        log_probabilities = head(frames).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((ROWS,), frames.shape[1], dtype=torch.int32)
        total = torch.nn.functional.ctc_loss(
            log_probabilities, batch['labels'], lengths, batch['label_counts'], reduction='sum'
        )
        return total / (ROWS * LABELS)

    return loss


# ---------------------------------------------------------------------------------------------
# the two processes and their parent


def work(options: argparse.Namespace) -> None:
    """A worker: says what it is, then answers each line on standard input with step times."""
    if options.worker == 'ours':
        take_step, facts = make_ours(options.objective, options.remat, options.parts)
    else:
        take_step, facts = make_peer(options.objective)
    for _ in range(3):
        take_step()
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        turn: dict[str, list[float]] = {'wall': [], 'cpu': []}
        for _ in range(STEPS_A_TURN):
            wall, cpu = time.perf_counter(), time.process_time()
            take_step()
            turn['wall'].append(1000 * (time.perf_counter() - wall))
            turn['cpu'].append(1000 * (time.process_time() - cpu))
        print(json.dumps(turn), flush=True)


def start_worker(python: str, side: str, objective: str, options: argparse.Namespace) -> Any:
    command = [python, __file__, '--worker', side, '--objective', objective]
    command += ['--remat', options.remat] + (['--parts'] if options.parts else [])
    return turns.start(command)


def compare(objective: str, pythons: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Runs both sides in turns and prints a table.

    Returns:
      {'objective', 'ratio_wall', 'ratio_cpu', 'ours': {...}, 'peer': {...}}; a ratio is the peer's
      median step time over ours: above 1, ours is faster.  CPU time sums over threads; it is the
      steadier of the two on a machine that others use as well.
    """
    workers: dict[str, Any] = {}
    result: dict[str, Any] = {'objective': objective}
    try:
        for side, python in pythons.items():
            workers[side] = start_worker(python, side, objective, options)
            result[side] = {**turns.ask(workers[side]), 'wall': [], 'cpu': []}
        for _ in range(options.turns):
            for side, worker in workers.items():
                turn = turns.ask(worker, 'go')
                result[side]['wall'] += turn['wall']
                result[side]['cpu'] += turn['cpu']
    finally:
        turns.finish(workers.values())
    for side in workers:
        for clock in ('wall', 'cpu'):
            result[side][f'median_{clock}'] = statistics.median(result[side][clock])
        result[side]['fastest'] = min(result[side]['wall'])
    for clock in ('wall', 'cpu'):
        medians = [result[side][f'median_{clock}'] for side in ('peer', 'ours')]
        result[f'ratio_{clock}'] = medians[0] / medians[1]
    show(result)
    return result


def show(result: dict[str, Any]) -> None:
    """The table of one comparison."""
    print(f'\n{result["objective"]}, one train step of {ROWS} x {SECONDS} s')
    header = ('', 'library', 'parameters', 'threads', 'median ms', 'fastest', 'CPU ms', 'audio s/s')
    print('{:5}{:>18}{:>11}{:>8}{:>10}{:>8}{:>8}{:>10}'.format(*header))
    for side in ('ours', 'peer'):
        facts = result[side]
        speed = ROWS * SECONDS / facts['median_wall'] * 1000
        print(
            f'{side:5}{facts["library"]:>18}{facts["parameters"]:>11,}{facts["threads"]:>8}'
            f'{facts["median_wall"]:>10.0f}{facts["fastest"]:>8.0f}{facts["median_cpu"]:>8.0f}'
            f'{speed:>10.0f}'
        )
    verdict = 'faster' if result['ratio_wall'] >= 1 else 'slower'
    print(
        f'ratio (peer / ours): wall {result["ratio_wall"]:.2f}, CPU {result["ratio_cpu"]:.2f};'
        f' ours is {verdict}'
    )
    for name, milliseconds in result['ours'].get('parts', {}).items():
        print(f'  {name:18}{milliseconds:>8.0f} ms')


def main() -> None:
    """Parses the command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--objective', choices=('best_rq', 'ctc', 'both'), default='both')
    parser.add_argument(
        '--remat', default='', help="our encoder's remat setting (default: the preset's)"
    )
    parser.add_argument('--turns', type=int, default=8, help=f'of {STEPS_A_TURN} steps a side')
    parser.add_argument('--parts', action='store_true', help='also time the parts of our step')
    parser.add_argument(
        '--peer-python',
        default=str(ROOT / '.venv-peer/bin/python'),
        help='interpreter with torch and transformers (default: made in .venv-peer)',
    )
    parser.add_argument('--json', metavar='FILE', help='also write the result as JSON')
    parser.add_argument('--worker', choices=('ours', 'peer'), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    objectives = ('best_rq', 'ctc') if options.objective == 'both' else (options.objective,)
    pythons = {
        'ours': sys.executable,
        'peer': turns.peer_python(options.peer_python, PEER_PACKAGES),
    }
    results = [compare(name, pythons, options) for name in objectives]
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
