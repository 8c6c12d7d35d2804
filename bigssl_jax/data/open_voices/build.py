"""From set names to entries: fetch the packages, decode to 16 kHz FLAC once, split, mark.

    fetch -> utterances -> <audio_dir>/<set>-<version>/<id>.flac -> Entry

Decoding is spread over processes and can be interrupted: a file that is there is complete and is
not made again. Nothing here imports TensorFlow; the TFDS builder stands on the same functions.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from bigssl_jax.data.errors import BadAudio
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.open_voices import decode as codecs
from bigssl_jax.data.open_voices import fetch, sets, splits
from bigssl_jax.data.open_voices.utterance import Utterance

CHUNK = 64  # utterances that travel to a process together
MANIFEST = 'manifest.jsonl'


def entries(
    names: str | Sequence[str],
    cache_dir: str | os.PathLike,
    deb_dir: str | os.PathLike | None = None,
    jobs: int = 1,
) -> Iterator[Entry]:
    """Yields the entries of one set, or of several (a name or names of `sets.SETS`).

    `audio` is the path of a 16 kHz mono FLAC file below `cache_dir`; `text` is None where it is not
    known. `seen` holds over all the sets asked for together: ask for the sets of one experiment in
    one call. Recordings that cannot be decoded are left out (none, in the packages that we know).

    Args:
      names: set names.
      cache_dir: where packages and decoded files are kept; created when missing.
      deb_dir: folder of `.deb` files, for systems without apt; None downloads.
      jobs: processes that decode.

    Raises:
      DataError: an unknown set, or a package that cannot be had or read.
    """
    names = [names] if isinstance(names, str) else list(names)
    cache = pathlib.Path(cache_dir)
    chosen = [sets.find(name) for name in names]
    made = [
        entry
        for speech_set in chosen
        for entry in _set_entries(speech_set, cache, cache / 'audio', deb_dir, jobs)
    ]
    yield from splits.mark_seen(made)


def write_manifest(
    names: Sequence[str],
    out_dir: str | os.PathLike,
    cache_dir: str | os.PathLike,
    jobs: int = 1,
    deb_dir: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Writes `<out_dir>/manifest.jsonl` and the audio beside it; returns the manifest's path.

    The manifest names audio relative to itself, so the folder can be moved. It appears last and
    whole. Raises as `entries` does.
    """
    out = pathlib.Path(out_dir)
    chosen = [sets.find(name) for name in names]
    made = [
        entry
        for speech_set in chosen
        for entry in _set_entries(speech_set, pathlib.Path(cache_dir), out / 'audio', deb_dir, jobs)
    ]
    return write_entries(splits.mark_seen(made), out)


def write_entries(entries: Iterable[Entry], out: pathlib.Path) -> pathlib.Path:
    """Writes entries whose `audio` is a path as `<out>/manifest.jsonl`, atomically."""
    unset = {field.name: field.default for field in dataclasses.fields(Entry)}
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f'.{MANIFEST}.{os.getpid()}'
    with open(unfinished, 'w', encoding='utf-8') as file:
        for entry in entries:
            record = {
                name: value
                for name, value in vars(entry).items()
                if name in ('id', 'audio', 'text', 'split', 'seen') or value != unset[name]
            }
            record['audio'] = os.path.relpath(entry.audio, out)
            file.write(json.dumps(record, ensure_ascii=False) + '\n')
        file.flush()
        os.fsync(file.fileno())
    return unfinished.replace(out / MANIFEST)


def split_for(speech_set: sets.SpeechSet, group: str) -> str:
    """The split of a group: by hash, but 'test' throughout for a set of the exam domain."""
    if speech_set.domain == sets.EXAM_DOMAIN:
        return 'test'
    return splits.split_of(speech_set.name, group)


def _set_entries(
    speech_set: sets.SpeechSet,
    cache: pathlib.Path,
    audio_dir: pathlib.Path,
    deb_dir: str | os.PathLike | None,
    jobs: int,
) -> Iterator[Entry]:
    roots = fetch.fetch(speech_set.packages, cache, deb_dir)
    folder = audio_dir / f'{speech_set.name}-{sets.VERSION}'
    folder.mkdir(parents=True, exist_ok=True)
    skipped: collections.Counter[str] = collections.Counter()
    for utterance, seconds in _decoded(speech_set.utterances(roots), folder, jobs):
        if isinstance(seconds, BadAudio):
            skipped[seconds.reason] += 1
            continue
        yield Entry(
            id=f'{speech_set.name}/{utterance.id}',
            audio=str(folder / f'{utterance.id}.flac'),
            text=utterance.text,
            speaker=utterance.speaker,
            language=utterance.language,
            domain=speech_set.domain,
            group=f'{speech_set.name}/{utterance.group}',
            split=split_for(speech_set, utterance.group),
            duration=seconds,
            licence=speech_set.licence,
        )
    if skipped:
        print(f'open_voices {speech_set.name}: left out {dict(skipped)}', flush=True)


def _decoded(
    utterances: Iterable[Utterance], folder: pathlib.Path, jobs: int
) -> Iterator[tuple[Utterance, float | BadAudio]]:
    """Yields each utterance (without its bytes) and its seconds, in order, once its file exists."""
    chunks = _chunks(utterances, CHUNK)
    if jobs <= 1:
        for chunk in chunks:
            yield from _decode_chunk(chunk, folder)
        return
    context = multiprocessing.get_context('spawn')  # forking a process that runs JAX can hang it
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(_decode_chunk, chunk, folder))
            if len(waiting) > 2 * jobs:  # bytes in flight stay few
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _chunks(items: Iterable[Utterance], size: int) -> Iterator[list[Utterance]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _decode_chunk(
    chunk: list[Utterance], folder: pathlib.Path
) -> list[tuple[Utterance, float | BadAudio]]:
    return [
        (dataclasses.replace(utterance, audio=b''), _decode_to_file(utterance, folder))
        for utterance in chunk
    ]


def _decode_to_file(utterance: Utterance, folder: pathlib.Path) -> float | BadAudio:
    """Writes `<folder>/<id>.flac` unless it is there; returns its seconds, or what is wrong."""
    import soundfile

    path = folder / f'{utterance.id}.flac'
    if path.exists():
        return soundfile.info(path).frames / codecs.SAMPLE_RATE
    try:
        samples = codecs.decode(utterance)
    except BadAudio as problem:
        return problem
    codecs.write_flac(path, samples)
    return len(samples) / codecs.SAMPLE_RATE
