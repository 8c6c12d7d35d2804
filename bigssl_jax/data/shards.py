"""One shard: the unit of preparation. Its entries in, two files out, the same bytes every time.

shards/audio-00007.tfrecord   the samples: one framed record an utterance
parts/audio-00007.parquet     a row an utterance, and in its schema the shard's totals: hashes,
                              counts, what was put aside. Written last: no part, no shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigssl_jax.config import in_short
from bigssl_jax.data.audio_files import check_audio, read_audio, to_int16
from bigssl_jax.data.corpus import frame_record
from bigssl_jax.data.errors import BadAudio, DataError
from bigssl_jax.data.folder import atomic_path
from bigssl_jax.data.manifest import Entry

LARGEST_SHARD = 1 << 20
TEXT_COLUMNS = ('id', 'text', 'speaker', 'language', 'domain', 'group', 'split', 'licence')
SCHEMA = pa.schema(
    [(name, pa.string()) for name in TEXT_COLUMNS]
    + [('seen', pa.bool_()), ('duration', pa.float64())]
)
UNSET = {
    field.name: field.default
    for field in dataclasses.fields(Entry)
    if field.default is not dataclasses.MISSING
}
PART_SCHEMA = SCHEMA.append(pa.field('samples', pa.int64())).append(pa.field('offset', pa.int64()))


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides a corpus besides its entries; stored in corpus.json as 'config'."""

    sample_rate: int = 16000
    shard_size: int = 512  # entries a shard
    min_seconds: float = 0.1
    max_seconds: float = 120.0
    max_clipped: float = 0.25  # fraction of samples at full scale

    def __post_init__(self) -> None:
        if not 1 <= self.shard_size <= LARGEST_SHARD or self.sample_rate < 1000:
            raise DataError(
                f'shard_size={in_short(self.shard_size)}, sample_rate={self.sample_rate}: a shard'
                f' holds 1 to {LARGEST_SHARD} entries, a sample rate is at least 1000 Hz'
            )
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise DataError(
                f'min_seconds={self.min_seconds:g} and max_seconds={self.max_seconds:g}: '
                'must be 0 <= min_seconds <= max_seconds'
            )


@dataclasses.dataclass(frozen=True)
class Shard:
    """One unit of work: `entries` to shard `number`; `digest` names entries and options."""

    number: int
    entries: tuple[Entry, ...]
    digest: str
    out: str
    root: str
    options: Options

    @property
    def file(self) -> str:
        return os.path.join(self.out, shard_file(self.number))

    @property
    def part(self) -> str:
        return os.path.join(self.out, part_file(self.number))


def shard_file(number: int) -> str:
    return f'shards/audio-{number:05d}.tfrecord'


def part_file(number: int) -> str:
    return f'parts/audio-{number:05d}.parquet'


def make_shard(
    number: int, entries: tuple[Entry, ...], out: str, root: str, options: Options
) -> Shard:
    """A shard with its digest; `root` is the folder against which audio paths are named."""
    known = [[identity(entry, root) for entry in entries], dataclasses.asdict(options)]
    return Shard(number, entries, text_sha256(json.dumps(known)), out, root, options)


def identity(entry: Entry, root: str) -> dict[str, Any]:
    """What makes two entries the same work: all fields that are set; of files name and size.

    Fields at their default are left out, so that a field added later changes no digest.
    """
    audio = entry.audio
    record = {
        key: value
        for key, value in vars(entry).items()
        if key != 'audio' and not (key in UNSET and value == UNSET[key])
    }
    if isinstance(audio, bytes | np.ndarray):
        data = audio if isinstance(audio, bytes) else np.ascontiguousarray(audio).tobytes()
        record['audio'] = hashlib.sha256(data).hexdigest()
    else:
        try:
            size = os.path.getsize(audio)
        except (OSError, ValueError):
            size = -1
        record['audio'] = [shown_audio(entry, root), size]
    return dict(sorted(record.items()))


def shown_audio(entry: Entry, root: str) -> str:
    """How an entry's audio is named in files: relative to the manifest, so folders can move."""
    if isinstance(entry.audio, bytes | np.ndarray):
        return f'<{len(entry.audio)} {"bytes" if isinstance(entry.audio, bytes) else "samples"}>'
    return os.fspath(entry.audio).removeprefix(root + os.sep if root else '')


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()


def build_shard(shard: Shard) -> dict[str, Any]:
    """Decodes the shard's entries, writes its two files, returns its totals.

    Finished work is found and left alone. Runs in a worker process.
    """
    totals = _finished(shard)
    if totals is not None:
        return totals
    _remove(shard.part)  # it must not vouch for the shard that is about to be replaced
    rows: list[dict[str, Any]] = []
    quarantine: list[dict[str, str]] = []
    size, digest = 0, hashlib.sha256()
    try:
        with atomic_path(shard.file) as temporary, open(temporary, 'wb') as file:
            for entry in shard.entries:
                try:
                    samples = _decode(entry, shard.options)
                except BadAudio as error:
                    quarantine.append(_put_aside(entry, shard.root, error))
                    continue
                record = frame_record(samples.astype('<i2', copy=False).tobytes())
                rows.append(_row(entry, samples, size, shard.options))
                file.write(record)
                digest.update(record)
                size += len(record)
        table = pa.Table.from_pylist(rows, PART_SCHEMA)
        totals = {
            'digest': shard.digest,
            'entries': len(shard.entries),
            'rows': len(rows),
            'samples': sum(row['samples'] for row in rows),
            'bytes': size,
            'sha256': digest.hexdigest(),
            'metadata_sha256': text_sha256(json.dumps(rows)),
            'quarantine': quarantine,
        }
        with atomic_path(shard.part) as temporary:
            pq.write_table(table.replace_schema_metadata({'totals': json.dumps(totals)}), temporary)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f'{shard.file}: cannot be written: {reason}; mend that and run again: finished work '
            'is kept'
        ) from None
    return totals


def _put_aside(entry: Entry, root: str, error: BadAudio) -> dict[str, str]:
    audio = shown_audio(entry, root)
    return {'id': entry.id, 'audio': audio, 'reason': error.reason, 'detail': error.detail}


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _decode(entry: Entry, options: Options) -> np.ndarray:
    if isinstance(entry.audio, np.ndarray):
        if entry.sample_rate is None or entry.audio.dtype != np.int16:
            raise DataError(f'{entry.id}: samples must be int16 and come with their sample_rate')
        samples = to_int16(
            entry.audio.astype(np.float32) / 32768, entry.sample_rate, options.sample_rate
        )
        if not samples.size:
            raise BadAudio('empty', 'no samples')
    else:
        samples = read_audio(
            entry.audio,
            entry.offset,
            entry.duration,
            options.sample_rate,
            true_rate=entry.sample_rate,
            max_seconds=options.max_seconds,
            kind=entry.encoding,
        )
    check_audio(
        samples, options.sample_rate, options.min_seconds, options.max_seconds, options.max_clipped
    )
    return samples


def _row(entry: Entry, samples: np.ndarray, offset: int, options: Options) -> dict[str, Any]:
    row = {name: getattr(entry, name) for name in (*TEXT_COLUMNS, 'seen')}
    duration = len(samples) / options.sample_rate
    return {**row, 'duration': duration, 'samples': len(samples), 'offset': offset}


def _finished(shard: Shard) -> dict[str, Any] | None:
    """The totals of a shard that an earlier run finished from the same entries, else None."""
    try:
        totals = part_totals(shard.part)
        size = os.path.getsize(shard.file)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    return totals if (totals['digest'], totals['bytes']) == (shard.digest, size) else None


def part_totals(path: str) -> dict[str, Any]:
    return json.loads(pq.read_schema(path).metadata[b'totals'])
