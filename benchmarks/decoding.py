"""Speed and error of the searches by beam size, CTC and RNN-T, batched.

    python benchmarks/decoding.py [--preset small] [--rows 16] [--seconds 8] [--json FILE]

Two things are measured apart and put together in one table:

- The encoder: a preset with random weights, from int16 waveforms to frames; its time does not
  depend on what the weights are.
- The searches: on made-up scores, because the work of a transducer's search depends on how many
  labels it writes, and random weights write far too many.  Label sequences are drawn from a
  Markov chain; a label scores as much as the blank in two frames, the blank alone in all others,
  and normal noise is added.  What a search makes of them is compared with what was planted.

RTFx is seconds of audio per second of work, compilation not counted; the median of several calls.
The made-up transducer takes from a frame's scores that of the label just written; its prediction
network costs what a table costs, not an LSTM of 640.  The n-gram model is estimated from other
sequences of the same chain.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

SAMPLE_RATE, FRAME_SECONDS = 16000, 0.04
VOCABULARY, RARE = 256, 3
LOUD = 8.0  # score of what is said, and of the blank
REPEATS = 5
BEAMS = (2, 4, 8, 16)


class Planted:
    """Label sequences of a Markov chain, and noisy scores that spell them."""

    def __init__(self, rows: int, frames: int, noise: float, seed: int = 0):
        random = np.random.default_rng(seed)
        chain = np.full((VOCABULARY, VOCABULARY), 0.02 / VOCABULARY)
        for following in chain:
            following[random.integers(RARE, VOCABULARY, 6)] += 0.98 * random.dirichlet(np.ones(6))
        chain[:, :RARE] = 0.0
        np.fill_diagonal(chain, 0.0)
        self.chain = chain / chain.sum(1, keepdims=True)
        self._random = random
        self.references = [self.sequence(frames // 4) for _ in range(rows)]
        scores = random.normal(0.0, noise, (rows, frames, VOCABULARY))
        scores[..., 0] += LOUD
        for row, reference in enumerate(self.references):
            places = np.sort(random.choice(frames // 2, len(reference), replace=False)) * 2
            for frame in (places, places + 1):
                scores[row, frame, reference] += LOUD
        self.scores = scores.astype(np.float32)
        self.mask = np.ones((rows, frames), bool)

    def sequence(self, length: int) -> list[int]:
        labels = [int(self._random.integers(RARE, VOCABULARY))]
        while len(labels) < length:
            labels.append(int(self._random.choice(VOCABULARY, p=self.chain[labels[-1]])))
        return labels

    def error_rate(self, tokens: np.ndarray, counts: np.ndarray) -> float:
        """Edits per planted label."""
        from bigssl_jax.evaluation.wer import count_errors

        found = [' '.join(map(str, t[:n])) for t, n in zip(tokens, counts, strict=True)]
        planted = [' '.join(map(str, reference)) for reference in self.references]
        counted = count_errors(planted, found)
        return float(counted.errors.sum()) / float(counted.reference_words.sum())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--preset', default='small', help='encoder (small)')
    parser.add_argument('--rows', type=int, default=16, help='utterances in a batch (16)')
    parser.add_argument('--seconds', type=float, default=8.0, help='of each utterance (8)')
    parser.add_argument('--noise', type=float, default=1.5, help='deviation of the scores (1.5)')
    parser.add_argument('--beams', type=int, nargs='+', default=BEAMS, help='beam sizes')
    parser.add_argument('--json', metavar='FILE', help='write the figures there')
    options = parser.parse_args()
    from bigssl_jax.parallel.startup import configure_platform

    configure_platform()
    import jax

    audio = options.rows * options.seconds
    frames = int(options.seconds / FRAME_SECONDS)
    encoder = measure_encoder(options.preset, options.rows, options.seconds)
    planted = Planted(options.rows, frames, options.noise)
    print(
        f'{jax.devices()[0].device_kind}, encoder {options.preset!r}: {1000 * encoder:.0f} ms for'
        f' {options.rows} x {options.seconds:g} s (RTFx {audio / encoder:.0f}); {frames} frames,'
        f' {VOCABULARY} labels'
    )
    header = ('head', 'search', 'ms', 'search RTFx', 'with encoder', 'label errors')
    print('{:<7} {:<16} {:>8} {:>12} {:>13} {:>13}'.format(*header))
    rows = []
    for head, name, search, fusion in searches(planted, options.beams):
        seconds, result = timed(search, fusion, planted.scores, planted.mask)
        error = planted.error_rate(*map(np.asarray, result))
        row = {
            'head': head,
            'search': name,
            'search_ms': round(1000 * seconds, 2),
            'search_rtfx': round(audio / seconds, 1),
            'rtfx': round(audio / (seconds + encoder), 1),
            'label_errors': round(error, 4),
        }
        rows.append(row)
        print(
            f'{head:<7} {name:<16} {row["search_ms"]:>8.1f} {row["search_rtfx"]:>12.0f}'
            f' {row["rtfx"]:>13.0f} {error:>12.1%}'
        )
    if options.json:
        with open(options.json, 'w') as file:
            json.dump({'encoder_ms': 1000 * encoder, 'rows': rows, **vars(options)}, file, indent=1)


def timed(function: Callable[..., Any], shared: Any, *batch: Any) -> tuple[float, Any]:
    """(median seconds of a call, its result), the first call aside; all devices share the batch."""
    import jax

    from bigssl_jax.parallel import batch_sharding, make_mesh, replicated, use_mesh

    mesh = make_mesh({'data': -1})
    shared = jax.device_put(shared, replicated(mesh))
    arrays = jax.device_put(batch, batch_sharding(mesh))
    jitted, times = jax.jit(function), []
    with use_mesh(mesh):
        result = jax.block_until_ready(jitted(shared, *arrays))
        for _ in range(REPEATS):
            started = time.perf_counter()
            jax.block_until_ready(jitted(shared, *arrays))
            times.append(time.perf_counter() - started)
    return statistics.median(times), result


def measure_encoder(preset: str, rows: int, seconds: float) -> float:
    """Seconds from waveforms to frames, random weights."""
    import dataclasses

    import jax
    from flax import linen as nn

    from bigssl_jax.audio import AudioConfig, log_mel
    from bigssl_jax.models import Encoder, attention_kernels
    from bigssl_jax.models.presets import conformer
    from bigssl_jax.parallel import make_mesh, use_mesh

    audio = AudioConfig()
    config = dataclasses.replace(conformer(preset), num_mels=audio.num_mels)
    encoder = Encoder(attention_kernels.portable(config, jax.devices()[0].platform))
    samples = int(seconds * SAMPLE_RATE)
    waveform = np.random.default_rng(0).normal(0, 2000, (rows, samples)).astype(np.int16)
    counts = np.full(rows, samples, np.int32)

    def encode(params: Any, waveform: Any, counts: Any) -> Any:
        features, frame_counts = log_mel(waveform, counts, audio)
        mask = jax.numpy.arange(features.shape[1]) < frame_counts[:, None]
        return encoder.apply(params, features, mask, deterministic=True)

    def parameters() -> Any:
        features, frame_counts = log_mel(waveform, counts, audio)
        mask = jax.numpy.arange(features.shape[1]) < frame_counts[:, None]
        return encoder.init(jax.random.key(0), features, mask, deterministic=True)

    with use_mesh(make_mesh({'data': -1})):
        shapes = nn.meta.unbox(jax.eval_shape(parameters))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: random.normal(0, 0.02, leaf.shape).astype(np.float32), shapes
    )
    return timed(encode, params, waveform, counts)[0]


def searches(planted: Planted, beams: Sequence[int]) -> Iterator[tuple[str, str, Any, Any]]:
    """(head, name, (fusion, scores, mask) -> (tokens, counts), fusion) of each line."""
    from bigssl_jax.decoding import greedy_ctc, greedy_transducer
    from bigssl_jax.decoding.beam_ctc import beam_ctc
    from bigssl_jax.decoding.beam_transducer import beam_transducer
    from bigssl_jax.decoding.fusion import FusionConfig, make_fusion
    from bigssl_jax.parallel import per_row

    transducer = made_up_transducer()
    none = make_fusion()
    ngram = make_fusion(
        FusionConfig(ngram_weight=0.5, length_reward=1.0), ngram=some_ngram(planted)
    )

    def by_row(search: Callable[..., tuple[Any, Any]]) -> Any:
        """As a stage runs it: every device for its own rows."""

        def run(fusion: Any, scores: Any, mask: Any) -> Any:
            rows = {'scores': scores, 'mask': mask}
            return per_row(lambda r, f: search(r['scores'], r['mask'], f), rows, fusion)

        return run

    def greedy(head: str) -> Any:
        def search(scores: Any, mask: Any, fusion: Any) -> tuple[Any, Any]:
            del fusion
            found = (
                greedy_ctc(scores, mask)
                if head == 'ctc'
                else greedy_transducer(scores, mask, transducer)
            )
            return found.tokens, found.token_counts

        return by_row(search)

    def wide(head: str, beam: int) -> Any:
        def search(scores: Any, mask: Any, fusion: Any) -> tuple[Any, Any]:
            found = (
                beam_ctc(scores, mask, fusion, beam=beam)
                if head == 'ctc'
                else beam_transducer(scores, mask, transducer, fusion, beam=beam)
            )
            return found.tokens[:, 0], found.token_counts[:, 0]

        return by_row(search)

    for head in ('ctc', 'rnnt'):
        yield head, 'greedy', greedy(head), none
        for beam in beams:
            yield head, f'beam {beam}', wide(head, beam), none
        yield head, f'beam {beams[-1]} + 3-gram', wide(head, beams[-1]), ngram


def made_up_transducer() -> Any:
    """A transducer whose joint takes from the frame's scores that of the label just written."""
    import jax
    import jax.numpy as jnp

    from bigssl_jax.models.transducer import Transducer

    table = -LOUD * np.eye(VOCABULARY, dtype=np.float32)
    table[0] = 0.0

    def advance(state: Any, labels: Any) -> Any:
        del state
        return labels, jnp.asarray(table)[labels]

    def log_probs(encoded: Any, projected: Any) -> Any:
        return jax.nn.log_softmax(encoded + projected)

    def internal_lm(projected: Any) -> Any:
        return jax.nn.log_softmax(projected.at[:, 0].set(-jnp.inf))

    def initial(count: int) -> Any:
        return jnp.zeros((count,), jnp.int32)

    return Transducer(initial, advance, log_probs, internal_lm, 0, VOCABULARY)


def some_ngram(planted: Planted) -> Any:
    """A 3-gram model of other sequences of the chain."""
    from bigssl_jax.decoding.ngram import ngram_model
    from bigssl_jax.decoding.witten_bell import estimate

    pieces = ['<pad>', '</s>', '<unk>', *map(str, range(RARE, VOCABULARY))]
    text = [[pieces[i] for i in planted.sequence(40)] for _ in range(400)]
    return ngram_model(estimate(text, 3, pieces[RARE:]), pieces)[0]


if __name__ == '__main__':
    main()
