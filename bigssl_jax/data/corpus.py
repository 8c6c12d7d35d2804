"""A prepared corpus on disk, and its reader. No TensorFlow here; TensorFlow reads the same bytes.

    DIR/
      corpus.json               counts, hours, hashes of everything below; written last
      shards/audio-00000.tfrecord   16-bit PCM, one record an utterance
      index/sample_counts.npy   int64 [rows]   samples of each utterance
      index/shard_of.npy        int32 [rows]   shard that holds it
      index/offset_of.npy       int64 [rows]   first byte of its record in that shard
      metadata.parquet          id, text, speaker, language, domain, group, split, seen, ...
      quarantine.jsonl          what was left out, and why

A record is TFRecord's framing around little-endian int16 samples:

    | length u64 | crc(length) u32 | payload: length bytes | crc(payload) u32 |
    ^ offset_of[row]

so one utterance costs one read at a known offset, here and in `tf.raw_ops.TFRecordDatasetV2(
byte_offsets=...)`, which needs no Python in the pipeline. The index files are memory-mapped:
opening a corpus costs the same for a thousand utterances and for a hundred million.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigssl_jax.data.errors import BadAudio, DataError

FORMAT = 'bigssl-corpus-1'
HEADER_BYTES = 12  # length and its checksum
FOOTER_BYTES = 4  # checksum of the payload
INDICES = {'sample_counts': np.int64, 'shard_of': np.int32, 'offset_of': np.int64}


def masked_crc(data: bytes) -> int:
    """TFRecord's masked CRC-32C: rotated and shifted so that a CRC of CRCs is no trivial value."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame_record(payload: bytes) -> bytes:
    """One TFRecord around `payload`."""
    length = struct.pack('<Q', len(payload))
    header = length + struct.pack('<I', masked_crc(length))
    return header + payload + struct.pack('<I', masked_crc(payload))


def unframe_record(record: bytes) -> bytes:
    """The payload of one framed record; ValueError says what does not fit."""
    if len(record) < HEADER_BYTES + FOOTER_BYTES:
        raise ValueError(f'record of {len(record)} bytes is cut short')
    length, crc = struct.unpack_from('<QI', record)
    if crc != masked_crc(record[:8]):
        raise ValueError("checksum of the record's length is wrong")
    if length != len(record) - HEADER_BYTES - FOOTER_BYTES:
        raise ValueError(f'record says {length} bytes, {len(record) - 16} expected')
    payload = record[HEADER_BYTES : HEADER_BYTES + length]
    if struct.unpack_from('<I', record, HEADER_BYTES + length)[0] != masked_crc(payload):
        raise ValueError("checksum of the record's samples is wrong")
    return payload


class Corpus:
    """Read access to a prepared corpus; open it with `Corpus.open(directory)`.

    Attributes (memory-mapped, read-only): `sample_counts` int64 [rows], `shard_of` int32 [rows],
    `offset_of` int64 [rows]; `shard_paths` list of str; `info` the content of corpus.json.
    """

    def __init__(self, directory: str, info: dict[str, Any]) -> None:
        self.directory = directory
        self.info = info
        self.num_rows: int = info['rows']
        self.sample_rate: int = info['sample_rate']
        self.hours: float = info['seconds'] / 3600
        self.fingerprint: str = info['fingerprint']
        self.shard_paths = [os.path.join(directory, shard['file']) for shard in info['shards']]
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._parquet_path = os.path.join(directory, 'metadata.parquet')
        self.sample_counts = self._index('sample_counts')
        self.shard_of = self._index('shard_of')
        self.offset_of = self._index('offset_of')

    @classmethod
    def open(cls, directory: str | os.PathLike) -> Corpus:
        """Opens a complete corpus; DataError when there is none, or a half-made one."""
        directory = os.fspath(directory)
        info = read_corpus_json(directory)
        if info is None:
            state = 'holds no corpus.json' if os.path.isdir(directory) else 'does not exist'
            raise DataError(
                f'{directory}: no prepared corpus: the folder {state}; '
                'make it, or finish it, with `bigssl prepare --out` this folder'
            )
        return cls(directory, info)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return f'Corpus({self.directory!r}, rows={self.num_rows}, hours={self.hours:.2f})'

    def _index(self, name: str) -> np.ndarray:
        path = os.path.join(self.directory, 'index', f'{name}.npy')
        try:
            index = np.load(path, mmap_mode='r', allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f'{path}: index cannot be read ({error}); prepare again') from None
        if index.shape != (self.num_rows,) or index.dtype != INDICES[name]:
            raise DataError(
                f'{path}: index is {index.dtype}{list(index.shape)}, corpus.json promises '
                f'{np.dtype(INDICES[name])}[{self.num_rows}]; prepare again'
            )
        return index

    @property
    def columns(self) -> list[str]:
        """Names that `column` accepts."""
        return list(pq.read_schema(self._parquet_path).names)

    def table(self, columns: Sequence[str]) -> pa.Table:
        """The named metadata columns for all rows, in row order."""
        unknown = [name for name in columns if name not in self.columns]
        if unknown:
            raise DataError(
                f'{self._parquet_path}: no column {unknown[0]!r}; there are '
                f'{", ".join(self.columns)}'
            )
        table = pq.read_table(self._parquet_path, columns=list(columns))
        if table.num_rows != self.num_rows:
            raise DataError(
                f'{self._parquet_path}: {table.num_rows} rows, corpus.json promises '
                f'{self.num_rows}; prepare again'
            )
        return table

    def column(self, name: str) -> pa.ChunkedArray:
        """One metadata column for all rows (pyarrow; `.to_pylist()` or `.to_numpy()` as wished).

        Strings: id, text (null where there is none), speaker, language, domain, group, split,
        licence ('' where unknown); booleans: seen; float64: duration in seconds.
        """
        if name not in self._columns:
            self._columns[name] = self.table([name]).column(0)
        return self._columns[name]

    def read(self, row: int) -> np.ndarray:
        """The samples of one utterance, int16 [S]; BadAudio names a damaged shard and row."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f'row {row} of a corpus with {self.num_rows} rows')
        size = HEADER_BYTES + 2 * int(self.sample_counts[row]) + FOOTER_BYTES
        path = self.shard_paths[self.shard_of[row]]
        try:
            with open(path, 'rb', buffering=0) as file:
                file.seek(int(self.offset_of[row]))
                payload = unframe_record(_read_exactly(file, size))
        except (OSError, ValueError) as error:
            reason = {FileNotFoundError: 'missing', ShardEnds: 'truncated'}.get(type(error))
            detail = getattr(error, 'strerror', None) or error
            detail = f'row {row} cannot be read: {detail}'
            raise BadAudio(reason or 'unreadable', detail, path) from None
        return np.frombuffer(payload, '<i2').astype(np.int16, copy=False)

    def verify(self, deep: bool = False) -> None:
        """Raises DataError naming every missing, truncated or (deep) changed file.

        The quick form looks at names and sizes only; `deep` reads everything and compares hashes.
        """
        faults = list(self._faults(deep))
        if faults:
            more = f' and {len(faults) - 5} more' if len(faults) > 5 else ''
            raise DataError(
                f'{self.directory}: damaged corpus: {"; ".join(faults[:5])}{more}; '
                'copy these files again, or prepare into a new folder'
            )

    def _faults(self, deep: bool) -> Iterator[str]:
        files = [*self.info['shards'], *self.info['files']]
        for file in files:
            path = os.path.join(self.directory, file['file'])
            try:
                size = os.path.getsize(path)
            except OSError:
                yield f'{file["file"]} is missing'
                continue
            if size != file['bytes']:
                yield f'{file["file"]} has {size} bytes, should have {file["bytes"]}'
            elif deep and file_sha256(path) != file['sha256']:
                yield f'{file["file"]} has changed (sha256)'


class ShardEnds(ValueError):
    """A shard is shorter than its index says."""


def read_corpus_json(directory: str) -> dict[str, Any] | None:
    """The content of corpus.json, None when it does not exist, DataError when it is damaged."""
    path = os.path.join(directory, 'corpus.json')
    try:
        with open(path, encoding='utf-8') as file:
            info = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f'{path}: cannot be read: {error}') from None
    if not isinstance(info, dict) or info.get('format') != FORMAT:
        found = info.get('format') if isinstance(info, dict) else type(info).__name__
        raise DataError(f'{path}: format is {found!r}, this version reads {FORMAT!r}')
    return info


def file_sha256(path: str) -> str:
    """Hex sha256 of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _read_exactly(file, size: int) -> bytes:
    parts = []
    while size:
        part = file.read(size)
        if not part:
            raise ShardEnds('the shard ends before the record does')
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b''.join(parts)
