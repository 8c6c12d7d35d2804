"""Sources of a stream: the rows of a selection, with or without labels, checked before training.

Everything that could go wrong with an utterance's labels is settled here, once, when a stream is
opened: what cannot be trained on is left out and counted by reason, so that no step has to cope.

    too_short, too_long   outside the stream's min_seconds .. max_seconds
    unlabelled            no transcript in the corpus, or no line in the label set
    filtered              removed by the source's filter of its label set
    digits                text that does not say how it was spoken
    empty_text            nothing left after normalisation
    too_many_labels       more than max_labels
    ctc_impossible        more labels (plus repeats) than encoder frames of 40 ms, if `for_ctc`
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError
from bigssl_jax.data import label_filters, label_sets
from bigssl_jax.data.buckets import encoder_frames
from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.selection import is_whole, resolve, select
from bigssl_jax.data.text import is_spoken, normalise_text
from bigssl_jax.data.tokenizer import UNKNOWN, Tokenizer, encode_ragged

SOURCE_DEFAULTS: dict[str, Any] = {
    'selection': None,  # a selection spec, or the name of one in the stream's `selections`
    'task': None,  # instead of a selection: the name of a registered seqio task or mixture
    'labels': None,  # None, 'text' (the corpus's transcripts), or the folder of a label set
    'filter': None,  # steps for `label_filters.filter_labels`
    'weight': 1.0,
}
_BLOCK = 1 << 16


class AllBut:
    """The rows of a corpus without a few: memory for those that are left out alone.

    Before the kept row of number i stand i kept rows and k others, so it is row i + k. The j-th
    row left out, e_j, stands before it when e_j - j <= i: k is found by bisection.

        row    0 1 x 3 x x 6        e = 2 4 5    e_j - j = 2 3 3
        i      0 1   2     3        i = 2: one is <= 2, row 3;  i = 3: three are <= 3, row 6
    """

    def __init__(self, total: int, left_out: np.ndarray):
        self._size = total - left_out.size
        self._gaps = left_out - np.arange(left_out.size)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        return index + np.searchsorted(self._gaps, index, side='right')


class Lengths:
    """Sample counts by row of a selection, read from the memory-mapped index on demand."""

    def __init__(self, counts: np.ndarray, rows: np.ndarray | AllBut | None):
        self._counts, self._rows = counts, rows

    def __len__(self) -> int:
        return len(self._counts if self._rows is None else self._rows)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self._counts[index if self._rows is None else self._rows[index]]

    def blocks(self) -> Iterator[np.ndarray]:
        """All of them in order, some tens of thousands at a time."""
        for start in range(0, len(self), _BLOCK):
            yield np.asarray(self[np.arange(start, min(start + _BLOCK, len(self)))], np.int64)


@dataclasses.dataclass
class Source:
    """One opened source.

    Attributes:
      name, corpus, weight: as configured.
      rows: the rows of the corpus, by number within the source; None when they are all (a corpus
        of any size then needs no memory here).
      label_values, label_offsets: token ids of all rows, ragged; None without labels.
      excluded: how many utterances were left out, by reason.
      left_out: rows of the corpus whose text cannot be learned from, int64, by reason.
      unknown: {'rows': ..., 'tokens': ..., 'characters': ...} of text outside the tokenizer.
      identity: everything that decides the content, for the stream's fingerprint.
    """

    name: str
    corpus: Corpus
    rows: np.ndarray | AllBut | None
    weight: float
    label_values: np.ndarray | None
    label_offsets: np.ndarray | None
    excluded: dict[str, int]
    unknown: dict[str, Any]
    identity: dict[str, Any]
    left_out: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def lengths(self) -> Lengths:
        """Sample counts by row of the selection."""
        return Lengths(self.corpus.sample_counts, self.rows)

    @functools.cached_property
    def samples(self) -> int:
        """Samples of all utterances together."""
        return sum(int(block.sum()) for block in self.lengths.blocks())

    def __len__(self) -> int:
        return len(self.lengths)

    def corpus_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the corpus for rows of the selection."""
        return np.asarray(rows) if self.rows is None else self.rows[rows]

    def label_counts(self, rows: np.ndarray) -> np.ndarray:
        """Number of labels of rows of the selection: int64 [N]."""
        assert self.label_offsets is not None
        return self.label_offsets[np.asarray(rows) + 1] - self.label_offsets[rows]

    def labels(self, row: int) -> np.ndarray:
        """Token ids of one row of the selection."""
        assert self.label_values is not None and self.label_offsets is not None
        return self.label_values[self.label_offsets[row] : self.label_offsets[row + 1]]

    def column(self, name: str, rows: np.ndarray | None = None) -> list:
        """A metadata column of the corpus for rows of the selection; default: all, in order."""
        values = self.corpus.column(name)
        if rows is None and self.rows is None:
            return values.to_pylist()
        return values.take(
            self.corpus_rows(np.arange(len(self)) if rows is None else rows)
        ).to_pylist()


def open_source(
    name: str, spec: Mapping[str, Any], stream: Mapping[str, Any], tokenizer: Tokenizer | None
) -> Source:
    """Opens one source of a stream and settles which of its utterances can be used.

    Args:
      name: the source's name, for messages.
      spec: fields as in `SOURCE_DEFAULTS`.
      stream: the stream's resolved config (normaliser, min/max_seconds, max_labels, ...).
      tokenizer: required when the source has labels.

    Raises:
      ConfigError, DataError: a bad field; nothing left; too many unknown characters.
    """
    spec = config_lib.merge(f'sources.{name}', SOURCE_DEFAULTS, spec)
    if spec['selection'] is None:
        raise ConfigError(f'sources.{name}.selection is not set; name a corpus, or a task')
    _check_weight(name, spec['weight'])
    selection = resolve(spec['selection'], stream['selections'])
    corpus = Corpus.open(selection['corpus'])
    if corpus.sample_rate != 16000:
        raise DataError(f'{corpus.directory}: sampled at {corpus.sample_rate} Hz, must be 16000')
    excluded: collections.Counter = collections.Counter()
    selected = None if is_whole(selection) else select(corpus, selection)
    rows = _within_seconds(corpus, selected, stream, excluded)
    identity = {'corpus': corpus.fingerprint, 'labels': None}
    values = offsets = None
    left_out: dict[str, np.ndarray] = {}
    unknown: dict[str, Any] = {'rows': 0, 'tokens': 0, 'characters': ''}
    if spec['labels'] is not None:
        if tokenizer is None:
            raise ConfigError(f'sources.{name} has labels, so the stream needs a tokenizer')
        label_set = None
        if spec['labels'] != 'text':
            label_set = label_sets.LabelSet.open(spec['labels'])
            identity['labels'] = label_set.fingerprint
        chooser = _Labels(stream, tokenizer, excluded)
        every = np.arange(corpus.num_rows if rows is None else len(rows))
        wanted = every if rows is None else rows[every]
        rows, values, offsets = chooser.keep(corpus, wanted, label_set, spec['filter'])
        left_out = chooser.left_out(name, corpus)
        unknown = chooser.unknown(name)
        if rows.size == corpus.num_rows:
            rows = None
    elif spec['filter'] is not None:
        raise ConfigError(f'sources.{name}.filter needs labels from a label set')
    if rows is not None and len(rows) == 0:
        reasons = ', '.join(f'{count} {reason}' for reason, count in excluded.items())
        raise DataError(f'source {name!r} has no usable utterance left: {reasons}')
    identity['rows'] = 'all' if rows is None else _rows_sha256(rows)
    if values is not None:
        assert offsets is not None
        identity['tokens'] = hashlib.sha256(values.tobytes() + offsets.tobytes()).hexdigest()
    return Source(
        name,
        corpus,
        rows,
        spec['weight'],
        values,
        offsets,
        dict(excluded),
        unknown,
        identity,
        left_out,
    )


def _rows_sha256(rows: np.ndarray | AllBut) -> str:
    """Hex sha256 of the rows as int64, in order."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), _BLOCK):
        block = rows[np.arange(start, min(start + _BLOCK, len(rows)))]
        digest.update(np.asarray(block, np.int64).tobytes())
    return digest.hexdigest()


def _check_weight(name: str, weight: Any) -> None:
    if isinstance(weight, (bool, str)) or not 0 < weight < np.inf:
        raise ConfigError(f'sources.{name}.weight is {weight!r}; it must be a number above 0')


def _within_seconds(
    corpus: Corpus,
    rows: np.ndarray | None,
    stream: Mapping[str, Any],
    excluded: collections.Counter,
) -> np.ndarray | AllBut | None:
    """The rows (None: all of the corpus) whose lengths fit the stream; counts the others."""
    # A receptive field of one window is the least that makes a frame.
    shortest = max(400, stream['min_seconds'] * corpus.sample_rate)
    longest = (stream['max_seconds'] or np.inf) * corpus.sample_rate
    lengths, left_out = Lengths(corpus.sample_counts, rows), [np.zeros(0, np.int64)]
    first = 0
    for block in lengths.blocks():
        short, long = block < shortest, block > longest
        for reason, mask in (('too_short', short), ('too_long', long)):
            if mask.any():
                excluded[reason] += int(mask.sum())
        left_out.append(first + np.flatnonzero(short | long))
        first += block.size
    gone = np.concatenate(left_out)
    if rows is not None:
        return None if rows.size - gone.size == corpus.num_rows else np.delete(rows, gone)
    if 2 * gone.size <= corpus.num_rows:
        return AllBut(corpus.num_rows, gone) if gone.size else None
    return np.delete(np.arange(corpus.num_rows), gone)


class _Labels:
    """Token ids of the utterances that can be trained on; counts the others."""

    def __init__(
        self, stream: Mapping[str, Any], tokenizer: Tokenizer, excluded: collections.Counter
    ):
        self._normaliser = stream['normaliser']
        self._max_labels = stream['max_labels'] or np.inf
        self._for_ctc = stream['for_ctc']
        self._max_unknown, self._max_left_out = stream['max_unknown'], stream['max_left_out']
        self._seen_rows = 0
        self._faults: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        self._tokenizer, self._excluded = tokenizer, excluded
        self._kept_rows = self._unknown_rows = self._unknown_tokens = 0
        self._characters: collections.Counter = collections.Counter()

    def keep(
        self, corpus: Corpus, rows: np.ndarray, label_set: 'label_sets.LabelSet | None', steps: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows that are kept, token ids, offsets [N + 1]); in blocks, so memory stays small."""
        small = self._tokenizer.vocabulary_size <= 1 << 16
        kept: list[np.ndarray] = [rows[:0]]
        counts: list[np.ndarray] = [np.zeros(0, np.int64)]
        values: list[np.ndarray] = [np.zeros(0, np.uint16 if small else np.int32)]
        for block, texts in self._texts(corpus, rows, label_set, steps):
            block, tokens, number = self._usable(corpus, block, texts)
            kept.append(block)
            values.append(tokens.astype(values[0].dtype))
            counts.append(number)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
        return np.concatenate(kept), np.concatenate(values), offsets

    def _texts(
        self, corpus: Corpus, rows: np.ndarray, label_set: 'label_sets.LabelSet | None', steps: Any
    ) -> Iterator[tuple[np.ndarray, list[str | None]]]:
        if label_set is None:
            if steps is not None:
                raise ConfigError('a filter needs labels from a label set, not from text')
            column = corpus.column('text')
            for start in range(0, rows.size, _BLOCK):
                block = rows[start : start + _BLOCK]
                yield block, column.take(block).to_pylist()
            return
        import pyarrow.compute as pc

        kept = label_filters.keep_mask(label_set, steps)
        known, column = label_set.table(['id'])['id'].combine_chunks(), corpus.column('id')
        texts = label_set.table(['text'])['text']
        for start in range(0, rows.size, _BLOCK):
            block = rows[start : start + _BLOCK]
            found = pc.index_in(column.take(block), value_set=known)
            place = pc.fill_null(found, -1).to_numpy(zero_copy_only=False)
            self._count('unlabelled', place < 0)
            self._count('filtered', (place >= 0) & ~kept[place])
            usable = (place >= 0) & kept[place]
            yield block[usable], texts.take(place[usable]).to_pylist()

    def _usable(
        self, corpus: Corpus, rows: np.ndarray, texts: list[str | None]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        given = np.array([t is not None for t in texts], bool)
        lines = [normalise_text(t or '', self._normaliser) for t in texts]
        filled = np.array([bool(line) for line in lines], bool)
        spoken = np.array([is_spoken(line, self._normaliser) for line in lines], bool)
        tokens, offsets = encode_ragged(self._tokenizer, lines)
        number = np.diff(offsets)
        owner: np.ndarray = np.repeat(np.arange(len(lines)), number)
        repeats: np.ndarray = np.zeros(len(lines), np.int64)
        same = (tokens[1:] == tokens[:-1]) & (owner[1:] == owner[:-1])
        np.add.at(repeats, owner[1:][same], 1)
        few = number <= self._max_labels
        possible = number + repeats <= encoder_frames(corpus.sample_counts[rows])
        usable: np.ndarray = np.ones(len(lines), bool)
        for reason, good in (
            ('unlabelled', given),
            ('empty_text', filled),
            ('digits', spoken),
            ('too_many_labels', few),
            ('ctc_impossible', possible | (not self._for_ctc)),
        ):
            bad = usable & ~good
            self._count(reason, bad)
            if bad.any():
                self._faults[reason].append(rows[bad])
            usable &= good
        self._seen_rows += len(lines)
        self._note_unknown(lines, tokens == UNKNOWN, owner, usable)
        return rows[usable], tokens[usable[owner]], number[usable]

    def _count(self, reason: str, mask: np.ndarray) -> None:
        if mask.any():
            self._excluded[reason] += int(mask.sum())

    def _note_unknown(
        self, lines: list[str], unknown: np.ndarray, owner: np.ndarray, usable: np.ndarray
    ) -> None:
        self._kept_rows += int(usable.sum())
        unknown = unknown & usable[owner]
        affected = np.unique(owner[unknown])
        self._unknown_tokens += int(unknown.sum())
        self._unknown_rows += affected.size
        for line in affected[:1000]:  # enough to name them
            self._characters.update(self._tokenizer.unknown_characters(lines[line]))

    def left_out(self, name: str, corpus: Corpus) -> dict[str, np.ndarray]:
        """Rows whose text cannot be learned from, by reason; DataError when they are too many."""
        found = {reason: np.concatenate(blocks) for reason, blocks in self._faults.items()}
        total = sum(rows.size for rows in found.values())
        if total > self._max_left_out * self._seen_rows:
            ids = corpus.column('id')
            reasons = ', '.join(
                f'{rows.size} {reason}, such as {ids[int(rows[0])].as_py()!r}'
                for reason, rows in found.items()
            )
            raise DataError(
                f'source {name!r}: {total} of {self._seen_rows} texts cannot be learned from'
                f' ({reasons}): mend the texts or the limits of the stream, or raise max_left_out'
                f' (now {self._max_left_out:g})'
            )
        return found

    def unknown(self, name: str) -> dict[str, Any]:
        """The count of text outside the tokenizer; DataError when it is more than allowed."""
        characters = ''.join(c for c, _ in self._characters.most_common(40))
        if self._unknown_rows > self._max_unknown * self._kept_rows:
            raise DataError(
                f'source {name!r}: {self._unknown_rows} of {self._kept_rows} texts hold characters'
                f' that the tokenizer does not know ({characters}): train the tokenizer on this'
                f' text too, or raise max_unknown (now {self._max_unknown:g})'
            )
        return {
            'rows': self._unknown_rows,
            'tokens': self._unknown_tokens,
            'characters': characters,
        }
