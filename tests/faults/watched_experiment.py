"""The tone recipe, with a note of every batch that reaches training.

bigssl run --config tests/faults/watched_experiment.py:MANIFEST,FOLDER --workdir DIR

Each process writes FOLDER/<process id>.jsonl: number of the batch, its rows, sources, utterances.
"""

import contextlib
import functools
import json
import os
import pathlib

import ml_collections

from bigssl_jax.config import load

RECIPE = pathlib.Path(__file__).parent.parent / 'stages' / 'tone_experiment.py'


def get_config(argument: str) -> ml_collections.ConfigDict:
    """The tiny experiment over the tone speech of a manifest; notes go to a folder."""
    manifest, folder = argument.split(',')
    note_batches(pathlib.Path(folder))
    return load(f'{RECIPE}:{manifest}')


def note_batches(folder: pathlib.Path) -> None:
    """Makes every endless stream of this process write down what it gives out."""
    from bigssl_jax.data.stream import Stream

    original = Stream.batches

    @contextlib.contextmanager
    def noted(self, start=0, **given):
        with original(self, start, **given) as batches:
            yield batches if self.num_batches is not None else _write(batches, start, folder)

    if not hasattr(original, '__wrapped__'):
        Stream.batches = functools.wraps(original)(noted)


def _write(batches, start: int, folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f'{os.getpid()}.jsonl').open('a') as file:
        for k, batch in enumerate(batches, start):
            rows = {n: batch[n].tolist() for n in ('rows', 'sources', 'utterances')}
            file.write(json.dumps({'batch': k, **rows}) + '\n')
            file.flush()
            yield batch
