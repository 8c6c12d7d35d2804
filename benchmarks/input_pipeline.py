"""Hours of audio per core-second from disk to batches, and what a very large corpus costs at start.

    python benchmarks/input_pipeline.py [--utterances 4000] [--repeats 7] [--cores 1,2]
        [--rows 1000000,10000000,100000000] [--json FILE]

Made-up speech of the project's own synthesiser, as FLAC files and as a prepared corpus, is read
into padded batches of int16 waveforms by three processes that take turns, each bound to as many
cores as stated:

    ours     the project's stream, as training uses it: planned buckets, shards read at offsets
    tf.data  the same shards read in order: shuffle buffer, padded batches of equal size
    files    the FLAC files by soundfile in threads, batches of equal size, no plan

A core-second is a second of processor time of the whole process.  The first batches, with which
TensorFlow starts, do not count.

For `--rows` a corpus of so many utterances is simulated: its index is there, its audio is not.  A
fresh process opens a stream over it (all rows, and all that last 2 to 15 s, as a training stage
would) and asks for batch 0 and, without a cursor, for batch 1,000,000.  Private memory is what the
process holds beyond files that are mapped into it (RssAnon), its peak read every millisecond.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import turns

SIDES = ('ours', 'tf.data', 'files')
BATCH_SECONDS = 128.0
LATE = 1_000_000  # number of a batch in the middle of training


def main() -> None:
    """Measures and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--utterances', type=int, default=4000, help='0: no reading')
    parser.add_argument('--batches', type=int, default=40, help='of one turn')
    parser.add_argument('--repeats', type=int, default=7, help='turns of each')
    parser.add_argument('--cores', default='1,2')
    parser.add_argument('--rows', default='1000000,10000000,100000000', help="'': no simulation")
    parser.add_argument('--json', type=pathlib.Path, help='also write the figures here')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    found: dict[str, Any] = {'reading': [], 'starting': []}
    with tempfile.TemporaryDirectory() as folder:
        if options.utterances:
            corpus = make_corpus(pathlib.Path(folder), options.utterances)
            for cores in map(int, options.cores.split(',')):
                found['reading'] += compare(corpus, cores, options.batches, options.repeats)
        for rows in map(int, filter(None, options.rows.split(','))):
            found['starting'] += start_up(pathlib.Path(folder) / f'{rows}', rows)
    if options.json:
        options.json.write_text(json.dumps(found))


# ---------------------------------------------------------------------------------------------
# reading


def make_corpus(folder: pathlib.Path, utterances: int) -> pathlib.Path:
    """FLAC files and a corpus of them, `folder`/corpus; `folder`/files.json names the files."""
    from bigssl_jax.data.prepare import Options, prepare
    from bigssl_jax.data.synthetic_speech import entries

    made = list(entries(folder, utterances, jobs=len(os.sched_getaffinity(0))))
    info = prepare(made, folder / 'corpus', options=Options(shard_size=512), progress=False)
    (folder / 'files.json').write_text(json.dumps([entry.audio for entry in made]))
    print(
        f'{info["rows"]} utterances of synthetic speech, {info["seconds"] / 3600:.2f} h,'
        f' batches of at most {BATCH_SECONDS:.0f} padded seconds',
        flush=True,
    )
    return folder


def compare(folder: pathlib.Path, cores: int, batches: int, repeats: int) -> list[dict[str, Any]]:
    """All sides in turn; prints and returns a row for each."""
    workers = {
        side: _start({'side': side, 'folder': str(folder), 'cores': cores}) for side in SIDES
    }
    for worker in workers.values():
        turns.ask(worker)  # ready
    answers: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, worker in workers.items():
            answers[side].append(turns.ask(worker, {'batches': batches}))
    turns.finish(workers.values())
    rows = []
    for side in SIDES:
        speeds = [a['hours'] / a['cpu_seconds'] for a in answers[side]]
        ratios = [
            ours['hours'] / ours['cpu_seconds'] / speed
            for ours, speed in zip(answers['ours'], speeds, strict=True)
        ]
        rows.append({
            'side': side, 'cores': cores, 'hours_per_core_second': statistics.median(speeds),
            'hours_per_second': statistics.median(a['hours'] / a['seconds'] for a in answers[side]),
            'padding': statistics.median(a['padding'] for a in answers[side]),
            'ours_over_this': statistics.median(ratios),
        })  # fmt: skip
    print(
        f'{"cores":>5} {"":8}{"h per core-second":>18}{"h per second":>14}{"padding":>9}'
        f'{"ours / this":>13}'
    )
    for row in rows:
        print(
            f'{cores:5} {row["side"]:8}{row["hours_per_core_second"]:18.2f}'
            f'{row["hours_per_second"]:14.2f}{row["padding"]:9.1%}{row["ours_over_this"]:13.2f}',
            flush=True,
        )
    return rows


def _start(given: dict[str, Any]) -> Any:
    return turns.start([sys.executable, __file__, '--worker', json.dumps(given)])


def work(given: dict[str, Any]) -> None:
    """A worker: says that it is ready, then answers each question with what it has read."""
    if 'rows' in given:
        print(json.dumps(_open_simulated(given['rows'], **given['limits'])), flush=True)
        return
    # Before TensorFlow starts: it counts the cores that it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given['cores']])
    make: dict[str, Callable[..., Iterator[tuple[Any, Any]]]] = {
        'ours': _ours, 'tf.data': _tf_data, 'files': _files,
    }  # fmt: skip
    batches = make[given['side']](pathlib.Path(given['folder']), given['cores'])
    for _ in range(8):
        next(batches)
    print('"ready"', flush=True)
    for line in sys.stdin:
        print(json.dumps(_read(batches, json.loads(line)['batches'])), flush=True)


def _read(batches: Iterator[tuple[Any, Any]], number: int) -> dict[str, float]:
    began, cpu_began = time.monotonic(), time.process_time()
    real = padded = 0
    for audio, counts in itertools.islice(batches, number):
        real += int(counts.sum())
        padded += audio.size
    return {
        'seconds': time.monotonic() - began,
        'cpu_seconds': time.process_time() - cpu_began,
        'hours': real / 16000 / 3600,
        'padding': 1 - real / padded,
    }


def _ours(folder: pathlib.Path, cores: int) -> Iterator[tuple[Any, Any]]:
    from bigssl_jax.data.stream import stream

    source = {'selection': {'corpus': str(folder / 'corpus')}}
    config = {'sources': {'all': source}, 'batch_seconds': BATCH_SECONDS}
    with stream(config, seed=0).batches(threads=cores) as batches:
        for batch in batches:
            yield batch['audio'], batch['sample_counts']


def _batch_size(folder: pathlib.Path) -> int:
    """Utterances of a batch whose longest may be the corpus's longest, as without a plan."""
    from bigssl_jax.data.corpus import Corpus

    return int(BATCH_SECONDS * 16000 // int(Corpus.open(folder / 'corpus').sample_counts.max()))


def _tf_data(folder: pathlib.Path, cores: int) -> Iterator[tuple[Any, Any]]:
    from bigssl_jax.data.tensorflow_start import tensorflow

    tf = tensorflow()
    shards = sorted(map(str, (folder / 'corpus' / 'shards').iterdir()))
    dataset = (
        tf.data.TFRecordDataset(shards, num_parallel_reads=cores).repeat().shuffle(512, seed=0)
    )
    dataset = dataset.map(lambda r: tf.io.decode_raw(r, tf.int16), num_parallel_calls=cores)
    dataset = dataset.map(lambda audio: (audio, tf.size(audio)))
    dataset = dataset.padded_batch(_batch_size(folder)).prefetch(4)
    yield from dataset.as_numpy_iterator()


def _files(folder: pathlib.Path, cores: int) -> Iterator[tuple[Any, Any]]:
    import concurrent.futures

    import numpy as np
    import soundfile

    files, size = json.loads((folder / 'files.json').read_text()), _batch_size(folder)
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]

    def read(path: str) -> Any:
        return soundfile.read(path, dtype='int16')[0]

    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        endless = itertools.cycle(files)
        while True:
            waves = list(pool.map(read, itertools.islice(endless, size)))
            counts = np.array([wave.size for wave in waves])
            audio: Any = np.zeros((size, counts.max()), np.int16)
            for row, wave in zip(audio, waves, strict=True):
                row[: wave.size] = wave
            yield audio, counts


# ---------------------------------------------------------------------------------------------
# starting


def start_up(folder: pathlib.Path, rows: int) -> list[dict[str, Any]]:
    """Opens streams over a simulated corpus in fresh processes; prints and returns the figures."""
    simulate(folder, rows)
    found = []
    for what, limits in (
        ('all rows', {}),
        ('2 to 15 s', {'min_seconds': 2.0, 'max_seconds': 15.0}),
    ):
        worker = _start({'rows': str(folder), 'limits': limits})
        figures = {'rows': rows, 'what': what, **turns.ask(worker)}
        turns.finish([worker])
        found.append(figures)
        print(
            f'{rows:>12,} utterances, {what:10}: core-seconds: open {figures["open_seconds"]:.2f},'
            f' batch 0 {figures["first_seconds"]:.2f}, batch {LATE:,}'
            f' {figures["late_seconds"]:.2f}; private memory: {figures["kept_mb"]:.1f} MB,'
            f' peak {figures["peak_mb"]:.1f} MB',
            flush=True,
        )
    for path in (folder / 'index').iterdir():
        path.unlink()
    return found


def simulate(folder: pathlib.Path, rows: int) -> None:
    """Index and corpus.json of a corpus whose audio is not there; lengths are log-normal."""
    import numpy as np

    from bigssl_jax.data.corpus import FORMAT, INDICES

    (folder / 'index').mkdir(parents=True)
    index = {
        name: np.lib.format.open_memmap(folder / 'index' / f'{name}.npy', 'w+', dtype, (rows,))
        for name, dtype in INDICES.items()  # places are left 0: nothing here reads audio
    }
    random, total = np.random.default_rng(0), 0
    for start in range(0, rows, 1 << 20):
        seconds = random.lognormal(1.9, 0.6, min(1 << 20, rows - start)).clip(0.5, 35.0)
        block = (seconds * 16000).astype(np.int64)
        index['sample_counts'][start : start + block.size] = block
        total += int(block.sum())
    shards = [{'file': f'shards/audio-{k:05d}.tfrecord'} for k in range(-(-rows // 8192))]
    info = {
        'format': FORMAT, 'rows': rows, 'sample_rate': 16000, 'seconds': total / 16000,
        'fingerprint': f'simulated {rows}', 'shards': shards, 'files': [],
    }  # fmt: skip
    (folder / 'corpus.json').write_text(json.dumps(info))


def private_megabytes() -> float:
    """Memory of this process that is no mapped file."""
    status = pathlib.Path('/proc/self/status').read_text()
    return int(status.split('RssAnon:')[1].split()[0]) / 1e3


def _open_simulated(folder: str, **limits: float) -> dict[str, float]:
    from bigssl_jax.data.stream import stream

    config = {
        'sources': {'all': {'selection': {'corpus': folder}}},
        'batch_seconds': 512.0,
        **limits,
    }
    before, peak, ended = private_megabytes(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], private_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    times = [time.thread_time()]
    opened = stream(config, seed=0)
    times.append(time.thread_time())
    for k in (0, LATE):
        opened.plan.members(k)
        times.append(time.thread_time())
    ended.set()
    watcher.join()
    return {
        'open_seconds': times[1] - times[0],
        'first_seconds': times[2] - times[1],
        'late_seconds': times[3] - times[2],
        'peak_mb': peak[0] - before,
        'kept_mb': private_megabytes() - before,
    }


if __name__ == '__main__':
    main()
