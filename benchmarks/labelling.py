"""Host memory and speed of labelling many utterances: flat, whatever their number.

    python benchmarks/labelling.py [--utterances 200000] [--part-utterances 2000] [--json FILE]

The very stage of a recipe (`pseudo_label`) labels that many utterances of noise with a tiny CTC
model of random parameters.  Its process's memory is read from the system between parts and told
at shares of the way.  The index of the corpus and its ids are in it; the audio passes through.
Compiling and TensorFlow's start fall into the first parts.
"""

import argparse
import json
import os
import pathlib
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)
SECONDS = (0.2, 0.4)  # shortest and longest utterance


def main() -> None:
    """Makes the corpus and the model, labels, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--utterances', type=int, default=200_000)
    parser.add_argument('--part-utterances', type=int, default=2000, help='of a part, about')
    parser.add_argument('--json', type=pathlib.Path, help='also write the figures here')
    options = parser.parse_args()
    from bigssl_jax.parallel.startup import configure_platform

    configure_platform()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(pathlib.Path(folder), options.utterances, options.part_utterances)
    print(f'{"labelled":>10}{"memory, MB":>12}{"above 5 %":>12}')
    first = found['memory'][0]['megabytes']
    for row in found['memory']:
        grown = row['megabytes'] - first
        print(f'{row["share"]:10.0%}{row["megabytes"]:12.0f}{grown:12.0f}')
    print(
        f'{found["utterances"]} utterances, {found["hours"]:.1f} h in {found["seconds"]:.0f} s'
        f' ({found["utterances"] / found["seconds"]:.0f} a second); {found["parts"]} parts'
    )
    if options.json:
        options.json.write_text(json.dumps(found))


def measure(folder: pathlib.Path, utterances: int, part_utterances: int) -> dict[str, Any]:
    """Labels in this process; {'utterances', 'hours', 'parts', 'seconds', 'memory': [rows]}."""
    from bigssl_jax.data.prepare import Options, prepare
    from bigssl_jax.parallel import make_mesh
    from bigssl_jax.stages import pseudo_label, schema
    from bigssl_jax.stages.context import Context
    from bigssl_jax.training.signals import StopRequest

    prepare(_entries(utterances), folder / 'noise', jobs=1, options=Options(shard_size=4096))
    _write_teacher(folder / 'run')
    hours = utterances * sum(SECONDS) / 2 / 3600
    config = schema.resolve(_experiment(folder, hours / utterances * part_utterances))
    context = Context(config, 'labels', folder / 'run', make_mesh({'data': -1}), StopRequest())
    samples: list[tuple[int, float]] = []
    ended = threading.Event()
    ledger = context.directory / 'labels' / 'ledger'
    watcher = threading.Thread(target=_watch, args=(ledger, samples, ended))
    watcher.start()
    began = time.monotonic()
    try:
        outputs, results = pseudo_label.run(context)
    finally:
        ended.set()
        watcher.join()
    seconds = time.monotonic() - began
    assert outputs['rows'] == utterances, outputs
    parts = len(list(ledger.glob('part-*.json')))
    memory = []
    for share in SHARES:
        done, megabytes = next(
            s for s in [*samples, (parts, samples[-1][1])] if s[0] >= share * parts
        )
        memory.append({'share': done / parts, 'megabytes': megabytes})
    return {
        'utterances': utterances, 'hours': results['hours'], 'parts': parts, 'seconds': seconds,
        'memory': memory,
    }  # fmt: skip


def _watch(ledger: pathlib.Path, samples: list, ended: threading.Event) -> None:
    """Notes (parts done, resident megabytes) whenever a part is done."""
    while not ended.wait(0.05):
        done = len(list(ledger.glob('part-*.json'))) if ledger.is_dir() else 0
        if done and (not samples or done > samples[-1][0]):
            samples.append((done, resident_megabytes()))


def resident_megabytes() -> float:
    """Memory that this process holds now."""
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


def _entries(utterances: int) -> Iterator[Any]:
    import numpy as np

    from bigssl_jax.data.manifest import Entry

    random = np.random.default_rng(0)
    noise = random.integers(-9000, 9000, 1 << 20).astype(np.int16)
    for i in range(utterances):
        length = int(random.uniform(*SECONDS) * 16000)
        start = int(random.integers(noise.size - length))
        audio = noise[start : start + length]
        yield Entry(id=f'noise-{i:07d}', sample_rate=16000, audio=audio)


def _experiment(folder: pathlib.Path, part_hours: float) -> dict[str, Any]:
    source = {'selection': 'all', 'labels': 'text'}
    return {
        'name': 'labelling',
        'data_dir': str(folder),
        'corpora': {'noise': {'manifest': 'made here'}},
        'selections': {'all': {'corpus': 'noise'}},
        'statistics': {'selection': 'all'},
        'tokenizer': {'selection': 'all'},
        'stages': {
            'teacher': {
                'kind': 'finetune',
                'objectives': {'ctc': {'objective': 'ctc', 'stream': 's'}},
                'streams': {'s': {'sources': {'a': source}}},
            },
            'labels': {
                'kind': 'pseudo_label', 'teacher': 'teacher', 'selection': 'all',
                'part_hours': part_hours, 'num_buckets': 2,
            },
        },
        'recipe': ('teacher', 'labels'),
    }  # fmt: skip


def _write_teacher(workdir: pathlib.Path) -> None:
    """A model folder of random parameters."""
    import jax
    import numpy as np

    from bigssl_jax.audio import AudioConfig
    from bigssl_jax.data.tokenizer import Tokenizer, train_tokenizer
    from bigssl_jax.models.presets import conformer
    from bigssl_jax.objectives import CTC
    from bigssl_jax.parallel import make_mesh
    from bigssl_jax.stages.model import save_model
    from bigssl_jax.training.trainer import parameter_layout

    tokenizer = workdir / 'tokenizer' / 'tokenizer.model'
    train_tokenizer(['abcdef ghi'], tokenizer)
    size = Tokenizer(tokenizer).vocabulary_size
    encoder = conformer(
        'tiny', num_layers=1, model_dim=16, num_heads=2, kernel_size=3,
        subsampling_channels=(2, 4), num_mels=16,
    )  # fmt: skip
    mesh = make_mesh({'data': 1}, jax.devices()[:1])
    layout = parameter_layout(encoder, {'ctc': CTC(size)}, mesh)

    def value(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape)
        noise *= 4.0 if 'heads' in name else leaf.shape[-1] ** -0.5
        return (1 + 0.1 * noise if 'scale' in name else noise).astype(np.float32)

    statistics = {
        'feature_mean': np.full(16, 10, np.float32),
        'feature_std': 3 * np.ones(16, np.float32),
    }
    (workdir / 'teacher').mkdir()
    save_model(
        workdir / 'teacher' / 'model', encoder, AudioConfig(num_mels=16),
        {'ctc': {'objective': 'ctc'}}, jax.tree_util.tree_map_with_path(value, layout),
        {'encoder': statistics, 'heads': {'ctc': {}}}, tokenizer, 1,
    )  # fmt: skip


if __name__ == '__main__':
    main()
