"""Label sets: what a teacher wrote about a corpus, on disk, complete or not there at all.

    DIR/part-00000-of-00016.parquet   one file per part of the selection, rows in its order (zstd)
        ...
    DIR/labels.json                   counts and hashes of every part; written last

A part is written under a temporary name, synced, and renamed, so a file with its final name is
whole. The key (hashes of teacher, decoder and config) lies in the file's own metadata: a part with
the same key is done and skipped, one with another key is an error, since mixing two teachers'
labels would go unnoticed for ever. Only `labels.json` makes the set visible to readers. Killing
the job anywhere and starting it again gives the same files.

Filters never touch the files: they are cheap, are run when a stream is opened, and say how many
hours they keep and why the rest goes.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError
from bigssl_jax.data.errors import DataError

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
        temporary = f'{self.path(part)}.{os.getpid()}.tmp'
        try:
            with open(temporary, 'wb') as file:
                pq.write_table(table, file, compression='zstd')
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path(part))
            _sync_directory(self.directory)
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
                    'sha256': _file_hash(self.path(part)),
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
        temporary = os.path.join(self.directory, f'labels.json.{os.getpid()}.tmp')
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(self.directory, 'labels.json'))
        _sync_directory(self.directory)
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
            if _file_hash(path) != part['sha256']:
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

    def keep_mask(self, steps: Any = None) -> np.ndarray:
        """Which rows a filter keeps: bool [num_rows]; everything without steps."""
        if steps is None:
            return np.ones(self.num_rows, bool)
        return filter_labels(self, steps).keep


@dataclasses.dataclass(frozen=True)
class FilterResult:
    """What a filter kept.

    Attributes:
      keep: bool [rows] in the label set's order.
      report: one entry per step: {'kind', 'limits', 'kept_rows', 'kept_hours', 'removed_rows',
        'removed_hours'}, counting what the step itself removed.
    """

    keep: np.ndarray
    ids: list[str]
    report: list[dict[str, Any]]

    @property
    def kept_hours(self) -> float:
        return self.report[-1]['kept_hours']


FILTERS: dict[str, dict[str, Any]] = {
    'confidence': {'percentile': None, 'threshold': None, 'column': 'confidence'},
    'words_per_second': {'min': 0.0, 'max': np.inf},
    'characters_per_second': {'min': 0.0, 'max': np.inf},
    'empty': {},
    'repeats': {'words': 3, 'times': 3},
    'keep_all': {},
}


def filter_labels(label_set: LabelSet, steps: Any) -> FilterResult:
    """Applies filter steps in order; cheap, writes nothing.

    Steps, as one mapping or a list of them, each with `kind`:
      confidence: `threshold` keeps rows with at least this confidence; or `percentile` p drops the
        p % of rows (among those still kept) with the lowest. `column` 'confidence' or 'score'.
      words_per_second, characters_per_second: `min` <= rate <= `max`.
      empty: drops empty text.
      repeats: drops text in which a run of 1 to `words` words stands at least `times` times in a
        row.
      keep_all: drops nothing.

    Raises:
      ConfigError: unknown kind or field.
    """
    steps = [steps] if isinstance(steps, Mapping) else list(steps)
    if not steps:
        raise ConfigError("a filter needs at least one step; use {'kind': 'keep_all'}")
    seconds = label_set.table(['seconds'])['seconds'].to_numpy().astype(np.float64)
    keep: np.ndarray = np.ones(label_set.num_rows, bool)
    report: list[dict[str, Any]] = []
    for number, step in enumerate(steps):
        step = dict(step)
        kind = config_lib.choose(f'filter[{number}].kind', step.pop('kind', None), FILTERS)
        step = config_lib.merge(f'filter[{number}]', FILTERS[kind], step)
        good, limits = _STEPS[kind](label_set, step, keep, seconds)
        removed = keep & ~good
        keep = keep & good
        report.append(
            {
                'kind': kind,
                'limits': limits,
                'kept_rows': int(keep.sum()),
                'kept_hours': float(seconds[keep].sum() / 3600),
                'removed_rows': int(removed.sum()),
                'removed_hours': float(seconds[removed].sum() / 3600),
            }
        )
    ids = label_set.table(['id'])['id'].filter(pa.array(keep)).to_pylist()
    return FilterResult(keep, ids, report)


def _keep_confident(label_set: LabelSet, step: dict, keep: np.ndarray, seconds: np.ndarray):
    percentile, threshold = step['percentile'], step['threshold']
    config_lib.choose('filter.column', step['column'], ('confidence', 'score'))
    if (percentile is None) == (threshold is None):
        raise ConfigError('filter kind confidence needs either percentile or threshold')
    values = label_set.table([step['column']])[step['column']].to_numpy().astype(np.float64)
    values = np.nan_to_num(values, nan=-np.inf)
    if percentile is None:
        return values >= threshold, {'threshold': float(threshold)}
    if not 0 <= percentile < 100:
        raise ConfigError(f'filter percentile is {percentile!r}; it must be 0 <= p < 100')
    # Exactly the lowest p % go, whatever ties there are: rank by (value, position in the set).
    candidates = np.flatnonzero(keep)
    ranked = candidates[np.argsort(values[candidates], kind='stable')]
    drop = int(len(ranked) * percentile / 100)
    good = keep.copy()
    good[ranked[:drop]] = False
    lowest = float(values[ranked[drop]]) if drop < len(ranked) else float('nan')
    return good, {'percentile': float(percentile), 'threshold': lowest}


def _keep_rate(label_set: LabelSet, step: dict, keep: np.ndarray, seconds: np.ndarray, words: bool):
    text = label_set.table(['text'])['text']
    if words:
        pieces = pc.split_pattern(pc.utf8_trim_whitespace(text), ' ')
        count = pc.if_else(pc.equal(text, ''), 0, pc.list_value_length(pieces))
    else:
        count = pc.utf8_length(text)
    rate = count.to_numpy().astype(np.float64) / np.maximum(seconds, 1e-3)
    limits = {'min': float(step['min']), 'max': float(step['max'])}
    return (rate >= limits['min']) & (rate <= limits['max']), limits


def _keep_filled(label_set: LabelSet, step: dict, keep: np.ndarray, seconds: np.ndarray):
    text = pc.utf8_trim_whitespace(label_set.table(['text'])['text'])
    return pc.greater(pc.utf8_length(text), 0).to_numpy().astype(bool), {}


def _keep_unrepeated(label_set: LabelSet, step: dict, keep: np.ndarray, seconds: np.ndarray):
    texts = label_set.table(['text'])['text'].to_pylist()
    good = np.array([not has_repeats(t, step['words'], step['times']) for t in texts], bool)
    return good, {'words': step['words'], 'times': step['times']}


def has_repeats(text: str, words: int, times: int) -> bool:
    """Whether a run of 1..`words` words stands `times` times or more in a row."""
    tokens = text.split()
    for length in range(1, words + 1):
        same = 0  # how many words in a row equal the word `length` places earlier
        for place in range(length, len(tokens)):
            same = same + 1 if tokens[place] == tokens[place - length] else 0
            if same >= length * (times - 1):
                return True
    return False


_STEPS: dict[str, Callable] = {
    'confidence': _keep_confident,
    'words_per_second': functools.partial(_keep_rate, words=True),
    'characters_per_second': functools.partial(_keep_rate, words=False),
    'empty': _keep_filled,
    'repeats': _keep_unrepeated,
    'keep_all': lambda label_set, step, keep, seconds: (np.ones(len(keep), bool), {}),
}


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


def _file_hash(path: str) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
