"""Label sets: what a teacher wrote about a corpus, on disk, complete or not there at all.

    DIR/part-00000-of-00016.parquet   one file per part of the selection, rows in its order (zstd)
        ...
    DIR/ledger/                       who makes which part, see label_ledger.py
    DIR/quarantine.jsonl              utterances without a label, and why; none: no file
    DIR/labels.json                   counts and hashes of every part; written last

A part is written under a temporary name, synced, and given its name if no other has it, so a file
with its final name is whole, and is never written over. Then it is read back and entered into the
ledger with its rows and its hash. The key (hashes of teacher, decoder and config) lies in the
file's own metadata: a part with the same key is done and skipped, one with another key is an error,
since mixing two teachers' labels would go unnoticed for ever. Only `labels.json` makes the set
visible to readers; before it is written every part is read once more, and one that is damaged is
set aside (`.damaged`). Killing the job anywhere and starting it again gives the same files.
"""

import collections
import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigssl_jax.data.corpus import file_sha256
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.folder import create_atomically, write_atomically
from bigssl_jax.data.label_ledger import FOLDER, item_of, one_line, worker

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
        # [frames, k] row by row: the k most probable labels of each frame, by falling probability
        ('top_k_ids', pa.list_(pa.int32())),
        ('top_k_log_probs', pa.list_(pa.float16())),
        ('top_k_mass', pa.float32()),  # mean over frames of the probability they hold
    ]
)
_KEY = b'bigssl.key'
_QUARANTINE = b'bigssl.quarantine'  # utterances of the part without a label


class DamagedParts(DataError):
    """Parts that were done are damaged; they are set aside and have to be made again."""


class LabelWriter:
    """Writes the parts of a label set; safe to kill and start again, and to run per part.

    Args:
      directory: the label set's folder; made if it does not exist.
      key: what decides the labels: {'teacher': hash, 'decoder': hash, 'config': hash, ...}.
      num_parts: how many parts the selection is cut into.
      tell: told of every part that is set aside.

    Raises:
      DataError: the folder holds parts of another key or number of parts, or cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        key: Mapping[str, str],
        num_parts: int,
        tell: Callable[[str], None] = logging.warning,
    ):
        self.directory, self.num_parts = os.fspath(directory), int(num_parts)
        self.key = {str(k): str(v) for k, v in sorted(key.items())}
        self._tell = tell
        self._records: dict[int, dict[str, Any]] = {}  # of verified parts
        if num_parts < 1:
            raise DataError(f'{self.directory}: a label set has at least 1 part, got {num_parts}')
        with one_line(self.directory):
            os.makedirs(self._ledger, exist_ok=True)
        for name in sorted(os.listdir(self.directory)):
            if name.startswith('part-') and name.endswith('.parquet'):
                if not name.endswith(f'-of-{self.num_parts:05d}.parquet'):
                    raise DataError(
                        f'{os.path.join(self.directory, name)}: left from a run with'
                        f' another number of parts (now {self.num_parts}): remove it'
                    )

    @property
    def _ledger(self) -> str:
        return os.path.join(self.directory, FOLDER)

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the ledger says of the parts that `unverified` last found verified."""
        return list(self._records.values())

    def path(self, part: int) -> str:
        """The file of one part."""
        return _part_path(self.directory, part, self.num_parts)

    def is_complete(self) -> bool:
        """Whether the set is there, whole.

        A set with a part that is gone or cut becomes invisible: it has to be completed again.
        DataError if it has another key.
        """
        path = os.path.join(self.directory, 'labels.json')
        if not os.path.exists(path):
            return False
        record = _read_record(self.directory)
        self._check_key(path, record['key'])
        faults = list(_faults(self.directory, record))
        for fault in faults:
            self._tell(f'{fault}: it is made again')
        if faults:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        return not faults

    def unverified(self) -> list[int]:
        """The parts that nobody has yet written, read back and found right, in order."""
        there = set(os.listdir(self._ledger))
        for part in range(self.num_parts):
            if _record_name(part) not in there:
                self._records.pop(part, None)
            elif part not in self._records:
                self._read_part_record(part)
        return [part for part in range(self.num_parts) if part not in self._records]

    def missing(self) -> list[int]:
        """The parts still to be written, in order; those that are there are verified."""
        return [part for part in self.unverified() if not self.settle(part)]

    def settle(self, part: int) -> bool:
        """Whether a part is there and right; reads it unless the ledger says so.

        A damaged part is set aside. DataError if the part has another key.
        """
        if part in self._records or self._read_part_record(part):
            return True
        return self._verify(part, None, {})

    def write(
        self,
        part: int,
        columns: Mapping[str, Sequence],
        quarantine: Sequence[Mapping[str, str]] = (),
        work_seconds: float = 0.0,
    ) -> None:
        """Writes one part atomically and reads it back; one that exists is left as it is.

        Args:
          part: 0 <= part < num_parts.
          columns: `REQUIRED` columns, all of the same length, and any of `OPTIONAL`.
          quarantine: {'id', 'reason', 'detail'} of each utterance that has no label.
          work_seconds: what making it took, for the ledger.
        """
        if not 0 <= part < self.num_parts:
            raise DataError(f'{self.directory}: part {part} of {self.num_parts}')
        if self.settle(part):
            return
        metadata = {_KEY: json.dumps(self.key).encode()}
        if quarantine:
            metadata[_QUARANTINE] = json.dumps([dict(q) for q in quarantine]).encode()
        sink = pa.BufferOutputStream()
        table = _table(columns).replace_schema_metadata(metadata)
        pq.write_table(table, sink, compression='zstd')
        content = sink.getvalue().to_pybytes()
        with one_line(self.path(part)):
            mine = create_atomically(self.path(part), content)
        expected = hashlib.sha256(content).hexdigest() if mine else None
        if not self._verify(part, expected, {'work_seconds': round(work_seconds, 3)}):
            raise DataError(
                f'{self.path(part)}: what was read back is not what was written: check the disk'
            )

    def finish(
        self, provenance: Mapping[str, Any] | None = None, num_rows: int | None = None
    ) -> 'LabelSet':
        """Reads and counts all parts and makes the set visible.

        Args:
          provenance: kept in labels.json.
          num_rows: utterances of the selection: labels and quarantine together must be as many.

        Raises:
          DataError: a part is missing, or utterances are.
          DamagedParts: a part has changed since it was verified.
        """
        missing = self.missing()
        if missing:
            raise DataError(
                f'{self.directory}: parts {missing[:8]} of {self.num_parts} are missing'
            )
        parts, ids, seconds, damaged = [], hashlib.sha256(), 0.0, []
        quarantine: list[dict[str, str]] = []
        for part in range(self.num_parts):
            read = self._read(part, self._records[part]['sha256'])
            if read is None:
                damaged.append(part)
                continue
            table, entry = read
            for name in table['id'].to_pylist():
                ids.update(name.encode() + b'\0')
            seconds += float(table['seconds'].to_numpy().sum(dtype=np.float64))
            quarantine += _quarantine_of(table.schema)
            parts.append({'file': os.path.basename(self.path(part)), **entry})
        if damaged:
            raise DamagedParts(f'{self.directory}: parts {damaged[:8]} were damaged')
        rows = sum(p['rows'] for p in parts)
        if num_rows is not None and rows + len(quarantine) != num_rows:
            raise DataError(
                f'{self.directory}: {rows} labels and {len(quarantine)} utterances in quarantine,'
                f' but the selection has {num_rows}: remove this folder and make it again'
            )
        record = {
            'format': FORMAT,
            'key': self.key,
            'rows': rows,
            'seconds': round(seconds, 3),
            'ids_sha256': ids.hexdigest(),
            'parts': parts,
            'quarantined': count_reasons(quarantine),
            'provenance': dict(provenance or {}),
        }
        with one_line(self.directory):
            self.write_quarantine(quarantine)
            content = json.dumps(record, indent=1, sort_keys=True)
            write_atomically(os.path.join(self.directory, 'labels.json'), content.encode())
        return LabelSet.open(self.directory)

    def quarantine(self) -> list[dict[str, str]]:
        """Utterances without a label of the parts that `unverified` last found verified."""
        found: list[dict[str, str]] = []
        for part, record in sorted(self._records.items()):
            if record['quarantined']:
                with contextlib.suppress(FileNotFoundError):  # being set aside
                    found += _quarantine_of(pq.read_schema(self.path(part)))
        return found

    def write_quarantine(self, entries: Sequence[Mapping[str, str]]) -> None:
        """Writes quarantine.jsonl, one line an utterance without a label; removes it for none."""
        path = os.path.join(self.directory, 'quarantine.jsonl')
        if entries:
            lines = ''.join(json.dumps(dict(e), ensure_ascii=False) + '\n' for e in entries)
            write_atomically(path, lines.encode())
        else:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def _read_part_record(self, part: int) -> bool:
        try:
            with open(os.path.join(self._ledger, _record_name(part)), 'rb') as file:
                record = json.loads(file.read())
            right = record['key'] == self.key
            right &= record['bytes'] == os.path.getsize(self.path(part))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        if right:
            self._records[part] = record
        return right

    def _verify(self, part: int, sha256: str | None, about: Mapping[str, Any]) -> bool:
        """Reads a part back, and says in the ledger what it holds, if it is there and right."""
        if not os.path.exists(self.path(part)):
            return False
        read = self._read(part, sha256)
        if read is None:
            return False
        table, entry = read
        self._records[part] = {
            'part': part,
            **entry,
            'quarantined': len(_quarantine_of(table.schema)),
            'seconds': float(table['seconds'].to_numpy().sum(dtype=np.float64)),
            'key': self.key,
            'work_seconds': 0.0,
            **about,
            'worker': {name: value for name, value in worker().items() if name in ('host', 'pid')},
        }
        with one_line(self._ledger):
            content = json.dumps(self._records[part], sort_keys=True).encode()
            write_atomically(os.path.join(self._ledger, _record_name(part)), content)
        return True

    def _read(self, part: int, sha256: str | None) -> tuple[pa.Table, dict[str, Any]] | None:
        """A part's table, and its rows, bytes and hash; None: damaged, and now set aside."""
        path = self.path(part)
        try:
            with open(path, 'rb') as file:
                content = file.read()
        except FileNotFoundError:
            self._forget(part)
            return None
        except OSError as error:
            raise DataError(f'{path}: cannot be read: {error.strerror or error}') from None
        try:
            found = hashlib.sha256(content).hexdigest()
            if sha256 is not None and found != sha256:
                raise ValueError('its hash is not that of what was written')
            table = pq.read_table(pa.BufferReader(content))
            key = json.loads((table.schema.metadata or {})[_KEY])
            _check_columns(table)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:  # OSError: of Arrow
            self._set_aside(part, str(error))
            return None
        self._check_key(path, key)
        return table, {'rows': table.num_rows, 'bytes': len(content), 'sha256': found}

    def _set_aside(self, part: int, reason: str) -> None:
        path = self.path(part)
        self._tell(f'{path} is damaged ({reason}): set aside as .damaged; it is made again')
        with one_line(self.directory), contextlib.suppress(FileNotFoundError):
            os.replace(path, f'{path}.damaged')
        self._forget(part)

    def _forget(self, part: int) -> None:
        """Takes a part out of the ledger, so that it is made again."""
        self._records.pop(part, None)
        with one_line(self._ledger), contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self._ledger, _record_name(part)))

    def _check_key(self, path: str, found: Mapping[str, str]) -> None:
        if found != self.key:
            changed = [k for k in {**found, **self.key} if found.get(k) != self.key.get(k)]
            raise DataError(
                f'{path} was made with another {" and ".join(sorted(changed))}: write'
                ' these labels to another folder, or remove this one'
            )


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
        record = _read_record(directory)
        for fault in _faults(directory, record):
            raise DataError(
                f'{fault}: remove done.json of the stage that made these labels and run it again;'
                ' whole parts are kept'
            )
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

    def posteriors(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(id, label ids int32 [T, k], log-probabilities float16 [T, k]) of each utterance.

        In the order of the selection, one part in memory at a time.  DataError without top_k.
        """
        if 'top_k' not in self.key:
            raise DataError(f'{self.directory}: made without posteriors; set top_k in its stage')
        columns = ['id', 'frames', 'top_k_ids', 'top_k_log_probs']
        for part in self.record['parts']:
            path = os.path.join(self.directory, part['file'])
            table = pq.ParquetFile(path).read(columns=columns)
            for batch in table.to_batches(max_chunksize=64):
                for row in range(batch.num_rows):
                    name, frames = batch['id'][row].as_py(), batch['frames'][row].as_py()
                    ids, log_probs = (batch[c][row].values.to_numpy() for c in columns[2:])
                    width = ids.size // max(frames, 1)
                    shape = frames, width
                    yield name, ids.reshape(shape), log_probs.reshape(shape)

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


def _record_name(part: int) -> str:
    return f'{item_of(part)}.json'


def _read_record(directory: str) -> dict[str, Any]:
    """The content of labels.json; DataError when it is not there or not one of ours."""
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
    return record


def _faults(directory: str, record: Mapping[str, Any]) -> Iterator[str]:
    """Parts that are gone or cut."""
    for part in record['parts']:
        name = os.path.join(directory, part['file'])
        size = os.path.getsize(name) if os.path.exists(name) else None
        if size != part['bytes']:
            found = 'is missing' if size is None else f'has {size} bytes, not {part["bytes"]}'
            yield f'{name} {found}'


def _check_columns(table: pa.Table) -> None:
    lacking = [name for name in REQUIRED.names if name not in table.column_names]
    if lacking:
        raise ValueError(f'it lacks the column {lacking[0]!r}')


def _quarantine_of(schema: pa.Schema) -> list[dict[str, str]]:
    return json.loads((schema.metadata or {}).get(_QUARANTINE, b'[]'))


def count_reasons(entries: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """Reason -> utterances, by name."""
    return dict(sorted(collections.Counter(e['reason'] for e in entries).items()))
