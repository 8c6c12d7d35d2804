"""Label sets: what a teacher wrote about a corpus, on disk, complete or not there at all.

    DIR/part-00000-of-00016.parquet   one file per part of the selection, rows in its order (zstd)
        ...
    DIR/labels.json                   counts and hashes of every part; written last

A part is written under a temporary name, synced, and renamed, so a file with its final name is
whole. The key (hashes of teacher, decoder and config) lies in the file's own metadata: a part with
the same key is done and skipped, one with another key is an error, since mixing two teachers'
labels would go unnoticed for ever. Only `labels.json` makes the set visible to readers. Killing
the job anywhere and starting it again gives the same files.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigssl_jax.data.corpus import file_sha256
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.folder import atomic_path, write_atomically

FORMAT = 'bigssl_labels_1'
REQUIRED = pa.schema(
    [
        ('id', pa.string()),
        ('text', pa.string()),
        ('tokens', pa.list_(pa.int32())),
        ('score', pa.float32()),  # log-probability of the whole hypothesis
        ('confidence', pa.float32()),  # in [0, 1]; the decoder documents what it means
        ('seconds', pa.float32()),  # length of the audio
    ]
)
OPTIONAL = pa.schema(
    [
        ('frames', pa.int32()),
        ('token_confidence', pa.list_(pa.float32())),
        ('token_start_frames', pa.list_(pa.int32())),
        ('token_end_frames', pa.list_(pa.int32())),
        ('word_confidence', pa.list_(pa.float32())),
    ]
)
_KEY = b'bigssl.key'


class LabelWriter:
    """Writes the parts of a label set; safe to kill and start again, and to run per part.

    Args:
      directory: the label set's folder; made if it does not exist.
      key: what decides the labels: {'teacher': hash, 'decoder': hash, 'config': hash, ...}.
      num_parts: how many parts the selection is cut into.

    Raises:
      DataError: the folder holds parts of another key or number of parts, or cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, key: Mapping[str, str], num_parts: int):
        self.directory, self.num_parts = os.fspath(directory), int(num_parts)
        self.key = {str(k): str(v) for k, v in sorted(key.items())}
        if num_parts < 1:
            raise DataError(f'{self.directory}: a label set has at least 1 part, got {num_parts}')
        try:
            os.makedirs(self.directory, exist_ok=True)
        except OSError as error:
            raise DataError(f'{self.directory}: cannot be written: {error.strerror}') from None
        for name in sorted(os.listdir(self.directory)):
            if name.startswith('part-') and name.endswith('.parquet'):
                if not name.endswith(f'-of-{self.num_parts:05d}.parquet'):
                    raise DataError(
                        f'{os.path.join(self.directory, name)}: left from a run with'
                        f' another number of parts (now {self.num_parts}): remove it'
                    )

    def path(self, part: int) -> str:
        """The file of one part."""
        return _part_path(self.directory, part, self.num_parts)

    def is_written(self, part: int) -> bool:
        """Whether a part exists, with this key. DataError if it has another key."""
        try:
            found = _read_key(self.path(part))
        except FileNotFoundError:
            return False
        if found != self.key:
            changed = [k for k in {**found, **self.key} if found.get(k) != self.key.get(k)]
            raise DataError(
                f'{self.path(part)} was made with another {" and ".join(sorted(changed))}: write'
                ' these labels to another folder, or remove this one'
            )
        return True

    def missing(self) -> list[int]:
        """The parts still to be written, in order."""
        return [part for part in range(self.num_parts) if not self.is_written(part)]

    def write(self, part: int, columns: Mapping[str, Sequence]) -> None:
        """Writes one part atomically; a part that exists with this key is left as it is.

        Args:
          part: 0 <= part < num_parts.
          columns: `REQUIRED` columns, all of the same length, and any of `OPTIONAL`.
        """
        if not 0 <= part < self.num_parts:
            raise DataError(f'{self.directory}: part {part} of {self.num_parts}')
        if self.is_written(part):
            return
        table = _table(columns).replace_schema_metadata({_KEY: json.dumps(self.key).encode()})
        try:
            with atomic_path(self.path(part)) as temporary:
                pq.write_table(table, temporary, compression='zstd')
        except OSError as error:
            raise DataError(f'{self.path(part)}: cannot be written: {error}') from None

    def finish(self, provenance: Mapping[str, Any] | None = None) -> 'LabelSet':
        """Counts and hashes all parts and makes the set visible. DataError if a part is missing."""
        missing = self.missing()
        if missing:
            raise DataError(
                f'{self.directory}: parts {missing[:8]} of {self.num_parts} are missing'
            )
        parts, ids, seconds = [], hashlib.sha256(), 0.0
        for part in range(self.num_parts):
            table = pq.read_table(self.path(part), columns=['id', 'seconds'])
            for name in table['id'].to_pylist():
                ids.update(name.encode() + b'\0')
            seconds += float(table['seconds'].to_numpy().sum(dtype=np.float64))
            parts.append(
                {
                    'file': os.path.basename(self.path(part)),
                    'rows': table.num_rows,
                    'bytes': os.path.getsize(self.path(part)),
                    'sha256': file_sha256(self.path(part)),
                }
            )
        record = {
            'format': FORMAT,
            'key': self.key,
            'rows': sum(p['rows'] for p in parts),
            'seconds': round(seconds, 3),
            'ids_sha256': ids.hexdigest(),
            'parts': parts,
            'provenance': dict(provenance or {}),
        }
        content = json.dumps(record, indent=1, sort_keys=True)
        write_atomically(os.path.join(self.directory, 'labels.json'), content.encode())
        for name in os.listdir(self.directory):  # left by killed runs; every part is done now
            if name.startswith('part-') and name.endswith('.tmp'):
                os.remove(os.path.join(self.directory, name))
        return LabelSet.open(self.directory)


class LabelSet:
    """A complete label set. Attributes: directory, key, num_rows, hours, fingerprint, record."""

    def __init__(self, directory: str, record: dict[str, Any]):
        self.directory, self.record = directory, record
        self.key: dict[str, str] = record['key']
        self.num_rows: int = record['rows']
        self.hours: float = record['seconds'] / 3600
        hashes = [self.key, [part['sha256'] for part in record['parts']]]
        self.fingerprint = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @classmethod
    def open(cls, directory: str | os.PathLike) -> 'LabelSet':
        """Opens a label set; DataError when it is not complete, or a part is gone or cut."""
        directory = os.fspath(directory)
        path = os.path.join(directory, 'labels.json')
        try:
            with open(path, encoding='utf-8') as file:
                record = json.load(file)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f'{path} is not there: the labels are not complete; run the stage that'
                ' makes them to its end'
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f'{path} cannot be read: {error}') from None
        if not isinstance(record, dict) or record.get('format') != FORMAT:
            raise DataError(f'{path}: is not of format {FORMAT!r}')
        for part in record['parts']:
            name = os.path.join(directory, part['file'])
            size = os.path.getsize(name) if os.path.exists(name) else None
            if size != part['bytes']:
                found = 'is missing' if size is None else f'has {size} bytes, not {part["bytes"]}'
                raise DataError(f'{name} {found}: make the labels again')
        return cls(directory, record)

    def verify(self) -> None:
        """Reads every part and compares its hash; DataError names the damaged file."""
        for part in self.record['parts']:
            path = os.path.join(self.directory, part['file'])
            if file_sha256(path) != part['sha256']:
                raise DataError(f'{path} has changed since it was made: make the labels again')

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All parts as one table, in the order of the selection; read once per set of columns."""
        return self._table(tuple(columns) if columns is not None else None)

    @functools.lru_cache(maxsize=8)  # noqa: B019 (few label sets live as long as their stream)
    def _table(self, columns: tuple[str, ...] | None) -> pa.Table:
        paths = [os.path.join(self.directory, part['file']) for part in self.record['parts']]
        try:
            return pa.concat_tables([pq.ParquetFile(p).read(columns=columns) for p in paths])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f'{self.directory}: a part cannot be read: {error}') from None


def _table(columns: Mapping[str, Sequence]) -> pa.Table:
    known = {field.name: field.type for field in [*REQUIRED, *OPTIONAL]}
    for name in REQUIRED.names:
        if name not in columns:
            raise DataError(f'labels lack the column {name!r}; required: {REQUIRED.names}')
    for name in columns:
        if name not in known:
            raise DataError(f'labels have no column {name!r}; known: {", ".join(known)}')
    names = [name for name in known if name in columns]
    lengths = {name: len(columns[name]) for name in names}
    if len(set(lengths.values())) != 1:
        raise DataError(f'columns of labels differ in length: {lengths}')
    return pa.table({name: pa.array(columns[name], known[name]) for name in names})


def _part_path(directory: str, part: int, num_parts: int) -> str:
    return os.path.join(directory, f'part-{part:05d}-of-{num_parts:05d}.parquet')


def _read_key(path: str) -> dict[str, str]:
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata[_KEY])
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(
            f'{path} is damaged or not a part of a label set ({error}): remove it'
        ) from None
