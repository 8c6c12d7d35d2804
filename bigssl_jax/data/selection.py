"""Selections: a few plain fields that name a part of a corpus.

    {'corpus': 'corpora/queen', 'splits': ['train'], 'max_seconds': 16.0, 'hours': 0.5}

A selection is a set of rows in row order. `hours` takes utterances in the order of a hash of their
id until the hours are reached: the half-hour subset lies within the hour subset, and adding or
dropping other rows of the corpus changes little. `exclude` removes what other selections hold, so
that "everything except the labelled half hour" cannot drift apart from "the labelled half hour".
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError
from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.errors import DataError

DEFAULTS: dict[str, Any] = {
    'corpus': '',  # folder of a prepared corpus
    'splits': None,  # lists of accepted values; None accepts all
    'speakers': None,
    'languages': None,
    'domains': None,
    'groups': None,
    'min_seconds': 0.0,
    'max_seconds': None,
    'hours': None,  # a nested subset of about so many hours
    'exclude': None,  # selections (specs, or names) whose rows are left out
    'unseen': False,  # True drops lines whose text also stands in training
    'with_text': False,  # True keeps only rows that have a transcript
}
_COLUMNS = {
    'splits': 'split',
    'speakers': 'speaker',
    'languages': 'language',
    'domains': 'domain',
    'groups': 'group',
}
_BLOCK = 1 << 20


def resolve(spec: Any, named: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A selection with every field set, from a mapping or from a name in `named`.

    Raises:
      ConfigError: unknown name or field, or a field of the wrong type.
    """
    if isinstance(spec, str):
        if spec not in (named or {}):
            raise config_lib.unknown_field('selection', spec, named or {})
        return resolve((named or {})[spec], named)
    spec = config_lib.to_dict(spec)
    if not isinstance(spec, Mapping):
        raise ConfigError(f'selection is {spec!r}; it must be a group of fields or a name')
    spec = config_lib.merge('selection', DEFAULTS, spec)
    if not spec['corpus']:
        raise ConfigError('selection.corpus is not set; it must name a folder made by prepare')
    for field in _COLUMNS:
        if spec[field] is not None:
            spec[field] = _as_list(field, spec[field])
    for field in ('min_seconds', 'max_seconds', 'hours'):
        value = spec[field]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < np.inf):
            raise ConfigError(f'selection.{field} is {value!r}; it must be a number >= 0')
    if spec['exclude'] is not None:
        others = spec['exclude']
        others = [others] if isinstance(others, (str, Mapping)) else others
        spec['exclude'] = [resolve(other, named) for other in others]
    return spec


def is_whole(spec: Mapping[str, Any]) -> bool:
    """Whether a resolved selection is, by its fields alone, all of its corpus."""
    return all(spec[field] == default for field, default in DEFAULTS.items() if field != 'corpus')


def select(corpus: Corpus | None, spec: Any, named: Mapping[str, Any] | None = None) -> np.ndarray:
    """Rows of `corpus` that a selection holds: int64 [N], increasing.

    Args:
      corpus: an open corpus; None opens `spec.corpus`.
      spec: fields as in `DEFAULTS`, or a name in `named`.
      named: other selections by name, for `exclude` and for names.

    Raises:
      ConfigError: a bad field.
      DataError: nothing is left, a value does not occur in the corpus, or `hours` is more than
        there is.
    """
    spec = resolve(spec, named)
    corpus = Corpus.open(spec['corpus']) if corpus is None else corpus
    rows = _rows(corpus, spec)
    if rows.size == 0:
        raise DataError(
            f'{spec["corpus"]}: no utterance fits the selection: {_narrowed(corpus, spec)}'
        )
    return rows


def _rows(corpus: Corpus, spec: dict[str, Any]) -> np.ndarray:
    keep: np.ndarray = np.ones(corpus.num_rows, bool)
    for _, mask in _masks(corpus, spec):
        keep &= mask
    rows = np.flatnonzero(keep)
    return rows if spec['hours'] is None else _take_hours(corpus, rows, spec['hours'])


def _narrowed(corpus: Corpus, spec: dict[str, Any]) -> str:
    """What each field leaves of the corpus, in turn: '20 in all, 17 with splits=['train'], 0 ...'.

    For people whose selection has become empty.
    """
    keep: np.ndarray = np.ones(corpus.num_rows, bool)
    steps = [f'{corpus.num_rows} in all']
    for field, mask in _masks(corpus, spec):
        keep &= mask
        value = 'the other selections' if field == 'exclude' else spec[field]
        steps.append(f'{int(keep.sum())} with {field}={value}')
    return ', '.join(steps)


def _masks(corpus: Corpus, spec: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(field, bool [rows]: what it keeps) for every field that is set, but `hours`."""
    for field in ('min_seconds', 'max_seconds'):
        if spec[field]:
            yield field, _length_mask(corpus.sample_counts, corpus.sample_rate, field, spec[field])
    for field, column in _COLUMNS.items():
        if spec[field] is not None:
            yield field, _member_mask(corpus, column, spec[field])
    if spec['unseen']:
        yield 'unseen', ~corpus.column('seen').to_numpy().astype(bool)
    if spec['with_text']:
        yield 'with_text', _has_text(corpus.column('text'))
    for other in spec['exclude'] or ():
        if os.path.realpath(other['corpus']) != os.path.realpath(spec['corpus']):
            raise ConfigError(
                f'selection.exclude names corpus {other["corpus"]!r}; rows of {spec["corpus"]!r}'
                ' can only be excluded by selections of the same corpus'
            )
        mask: np.ndarray = np.ones(corpus.num_rows, bool)
        mask[_rows(corpus, other)] = False
        yield 'exclude', mask


def _length_mask(sample_counts: np.ndarray, rate: int, field: str, seconds: float) -> np.ndarray:
    keep: np.ndarray = np.ones(len(sample_counts), bool)
    for start in range(0, len(sample_counts), _BLOCK):  # the index is memory-mapped
        block = np.asarray(sample_counts[start : start + _BLOCK])
        good = block >= seconds * rate if field == 'min_seconds' else block <= seconds * rate
        keep[start : start + _BLOCK] = good
    return keep


def _member_mask(corpus: Corpus, column: str, wanted: Sequence[str]) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    values = corpus.column(column)
    unknown = set(wanted) - set(pc.unique(values).to_pylist())
    if unknown:
        there = sorted(filter(None, pc.unique(values).to_pylist()))[:12]
        # Splits drawn by a hash may leave a small part empty; speakers and the like are given.
        cure = '; name `split` in the manifest, on some lines at least' if column == 'split' else ''
        raise DataError(
            f'{corpus.directory}: no utterance has {column} {sorted(unknown)[0]!r};'
            f' there are {", ".join(map(repr, there)) or "none"}{cure}'
        )
    mask = pc.is_in(values, value_set=pa.array(list(wanted), pa.string()))
    return mask.to_numpy(zero_copy_only=False).astype(bool)


def _has_text(text: Any) -> np.ndarray:
    import pyarrow.compute as pc

    has = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0)
    return pc.fill_null(has, False).to_numpy(zero_copy_only=False).astype(bool)


def _take_hours(corpus: Corpus, rows: np.ndarray, hours: float) -> np.ndarray:
    """The rows whose id hashes lowest, until their lengths add up to `hours`."""
    ids = corpus.column('id').take(rows).to_pylist()
    keys = np.fromiter((id_hash(i) for i in ids), np.uint64, len(ids))
    order = np.argsort(keys, kind='stable')
    seconds = np.cumsum(corpus.sample_counts[rows[order]]) / corpus.sample_rate
    # Accumulated rounding of an exact total must not refuse a request for all of it.
    if seconds.size and seconds[-1] < hours * 3600 * (1 - 1e-6):
        raise DataError(
            f'{corpus.directory}: selection.hours is {hours:.3g}, the other fields leave'
            f' {seconds[-1] / 3600:.3g} h: lower hours or loosen them'
        )
    count = int(np.searchsorted(seconds, hours * 3600 * (1 - 1e-6), side='left')) + 1
    return np.sort(rows[order[:count]])


def id_hash(utterance_id: str) -> int:
    """A fixed 64-bit hash of an utterance's id."""
    digest = hashlib.blake2b(utterance_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big')


def _as_list(field: str, value: Any) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not value or not all(map(_is_word, value)):
        raise ConfigError(f'selection.{field} is {value!r}; it must be a list of strings')
    return list(value)


def _is_word(value: Any) -> bool:
    return isinstance(value, str)
