"""Filters of label sets: which of a teacher's labels a student may learn from.

    steps  --check_filter-->  every argument set     when the config is read
           --filter_labels-->  bool [rows], report    when a stream is opened

Filters never touch the files: they are cheap, are run anew for every stream, and say how many hours
they keep and why the rest goes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.label_sets import LabelSet


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
    'normalised_score': {'percentile': None, 'threshold': None, 'fit': None},
    'words_per_second': {'min': 0.0, 'max': np.inf},
    'characters_per_second': {'min': 0.0, 'max': np.inf},
    'empty': {},
    'repeats': {'words': 3, 'times': 3},
    'duplicates': {'times': 10},
    'balance': {'percentile': 10.0, 'rounds': 8},
    'keep_all': {},
}


def check_filter(field: str, steps: Any) -> list[dict[str, Any]]:
    """The steps of a filter (see `filter_labels`) with every argument set.

    Needs no label set: a mistake in a config is found before the labels are made.

    Args:
      field: where the steps stand, for messages.
      steps: one mapping or a list of them.

    Raises:
      ConfigError: no step, an unknown kind or argument (naming the nearest), one that is missing,
        of another type or outside its range.
    """
    steps = [steps] if isinstance(steps, Mapping) else steps
    if not isinstance(steps, (list, tuple)) or not steps:
        raise ConfigError(
            f'config field {field} is {steps!r}; it must be a list of steps, at least one, such as'
            " {'kind': 'keep_all'}"
        )
    return [_checked_step(f'{field}[{number}]', step) for number, step in enumerate(steps)]


def _checked_step(field: str, step: Any) -> dict[str, Any]:
    if not isinstance(step, Mapping):
        raise ConfigError(
            f"config field {field} is {step!r}; a step is a group such as {{'kind': 'empty'}}"
        )
    kind = config_lib.choose(f'{field}.kind', step.get('kind'), FILTERS)
    given = {name: value for name, value in step.items() if name != 'kind'}
    checked = config_lib.merge(field, FILTERS[kind], given)
    if kind == 'confidence':
        config_lib.choose(f'{field}.column', checked['column'], ('confidence', 'score'))
        _check_limit(field, checked)
    elif kind == 'normalised_score':
        _check_limit(field, checked)
        _check_fit(field, checked['fit'])
    elif kind == 'balance':
        _check_balance(field, checked)
    elif kind == 'duplicates' and checked['times'] < 1:
        raise ConfigError(
            f'config field {field}.times is {checked["times"]!r}; it must be at least 1'
        )
    elif 'min' in checked and not checked['min'] <= checked['max']:
        raise ConfigError(
            f'config field {field}.min is {checked["min"]!r}, above max, {checked["max"]!r}:'
            ' nothing would be kept'
        )
    elif kind == 'repeats' and (checked['words'] < 1 or checked['times'] < 2):
        raise ConfigError(
            f'config field {field} has words={checked["words"]!r}, times={checked["times"]!r};'
            ' words must be at least 1, times at least 2'
        )
    return {'kind': kind, **checked}


def _check_fit(field: str, fit: Any) -> None:
    if fit is None or (isinstance(fit, str) and fit):
        return
    numbers = isinstance(fit, (list, tuple)) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and np.isfinite(x) for x in fit
    )
    if not numbers or len(fit) != 3 or not fit[2] > 0:
        raise ConfigError(
            f'config field {field}.fit is {fit!r}; it must be (slope, intercept, deviation) with a'
            ' deviation above 0, as fit_scores gives them, a pseudo_label stage of the same'
            ' teacher, or None: fitted on the labels themselves'
        )


def _check_balance(field: str, step: Mapping[str, Any]) -> None:
    if not 0 <= step['percentile'] < 100:
        raise ConfigError(
            f'config field {field}.percentile is {step["percentile"]!r}; it must be 0 <= p < 100'
        )
    if not 1 <= step['rounds'] <= 1000:
        raise ConfigError(
            f'config field {field}.rounds is {step["rounds"]!r}; it must be from 1 to 1000'
        )


def _check_limit(field: str, step: Mapping[str, Any]) -> None:
    given = [name for name in ('percentile', 'threshold') if step[name] is not None]
    if len(given) != 1:
        raise ConfigError(
            f'config field {field} needs either percentile or threshold, it has'
            f' {" and ".join(given) or "neither"}'
        )
    value = step[given[0]]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or np.isnan(value):
        raise ConfigError(f'config field {field}.{given[0]} is {value!r}; it must be a number')
    if given[0] == 'percentile' and not 0 <= value < 100:
        raise ConfigError(f'config field {field}.percentile is {value!r}; it must be 0 <= p < 100')


def keep_mask(label_set: LabelSet, steps: Any = None) -> np.ndarray:
    """Which rows a filter keeps: bool [num_rows]; everything without steps."""
    if steps is None:
        return np.ones(label_set.num_rows, bool)
    return filter_labels(label_set, steps).keep


def filter_labels(label_set: LabelSet, steps: Any) -> FilterResult:
    """Applies filter steps in order; cheap, writes nothing.

    Steps, as one mapping or a list of them, each with `kind`:
      confidence: `threshold` keeps rows with at least this confidence; or `percentile` p drops the
        p % of rows (among those still kept) with the lowest. `column` 'confidence' or 'score'.
      normalised_score: likewise, by (score - slope n - intercept) / (deviation sqrt(n)), n tokens,
        which favours neither short nor long labels (Park et al. 2020, arXiv:2005.09629, section
        2.2 [recalled]); `fit` is (slope, intercept, deviation) of `fit_scores`, or the folder of
        another label set of the same teacher, such as of a dev set, as there; None takes the labels
        themselves [ours].  The report has the fit.
      words_per_second, characters_per_second: `min` <= rate <= `max`.
      empty: drops empty text.
      repeats: drops text in which a run of 1 to `words` words stands at least `times` times in a
        row.
      duplicates: keeps the `times` most confident rows of each text, so that what a teacher writes
        most does not crowd out the rest of the vocabulary.
      balance: drops the `percentile` p % of rows that add least to the variety of the tokens, see
        `least_varied`.
      keep_all: drops nothing.

    Raises:
      ConfigError: as `check_filter`.
    """
    seconds = label_set.table(['seconds'])['seconds'].to_numpy().astype(np.float64)
    keep: np.ndarray = np.ones(label_set.num_rows, bool)
    report: list[dict[str, Any]] = []
    for step in check_filter('filter', steps):
        kind = step['kind']
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
    values = label_set.table([step['column']])[step['column']].to_numpy().astype(np.float64)
    return _keep_highest(np.nan_to_num(values, nan=-np.inf), step, keep)


def _keep_highest(values: np.ndarray, step: dict, keep: np.ndarray):
    percentile, threshold = step['percentile'], step['threshold']
    if percentile is None:
        return values >= threshold, {'threshold': float(threshold)}
    # Exactly the lowest p % go, whatever ties there are: rank by (value, position in the set).
    candidates = np.flatnonzero(keep)
    ranked = candidates[np.argsort(values[candidates], kind='stable')]
    drop = int(len(ranked) * percentile / 100)
    good = keep.copy()
    good[ranked[:drop]] = False
    lowest = float(values[ranked[drop]]) if drop < len(ranked) else float('nan')
    return good, {'percentile': float(percentile), 'threshold': lowest}


def fit_scores(scores: np.ndarray, counts: np.ndarray) -> tuple[float, float, float]:
    """The line that log-probabilities follow as labels grow, and how far they lie from it.

    Args:
      scores: log-probabilities of whole labels, float [N].
      counts: their tokens, int [N]; labels without any do not count.

    Returns:
      (slope, intercept, deviation): least squares of scores = slope n + intercept; deviation is the
      root mean square of what is left over sqrt(n), 1 where nothing is.
    """
    scores, counts = np.asarray(scores, np.float64), np.asarray(counts, np.float64)
    used = (counts > 0) & np.isfinite(scores)
    scores, counts = scores[used], counts[used]
    columns = np.stack([counts, np.ones_like(counts)], axis=1)
    slope, intercept = np.linalg.lstsq(columns, scores, rcond=None)[0] if used.any() else (0.0, 0.0)
    left = (scores - slope * counts - intercept) / np.sqrt(counts)
    deviation = float(np.sqrt(np.mean(left**2))) if used.any() else 0.0
    return float(slope), float(intercept), deviation if deviation > 1e-9 else 1.0


def _keep_probable(label_set: LabelSet, step: dict, keep: np.ndarray, seconds: np.ndarray):
    scores, counts = _scores(label_set)
    fit = step['fit']
    if isinstance(fit, str):
        slope, intercept, deviation = fit_scores(*_scores(_same_teacher(label_set, fit)))
    else:
        slope, intercept, deviation = fit or fit_scores(scores[keep], counts[keep])
    expected = slope * counts + intercept
    values = (scores - expected) / (deviation * np.sqrt(np.maximum(counts, 1)))
    good, limits = _keep_highest(np.nan_to_num(values, nan=-np.inf), step, keep)
    fitted = {'slope': slope, 'intercept': intercept, 'deviation': deviation}
    return good, {**limits, **fitted}


def _scores(label_set: LabelSet) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers of tokens of all rows, float64."""
    table = label_set.table(['score', 'tokens'])
    scores = table['score'].to_numpy().astype(np.float64)
    return scores, pc.list_value_length(table['tokens']).to_numpy().astype(np.float64)


def _same_teacher(label_set: LabelSet, folder: str) -> LabelSet:
    """The label set in `folder`, whose scores mean the same as those of `label_set`."""
    other = LabelSet.open(folder)
    for what in ('teacher', 'decoder'):
        if other.key.get(what) != label_set.key.get(what):
            raise DataError(
                f'{folder}: was written by another {what} than {label_set.directory}; fit the'
                ' filter on labels of the same one'
            )
    return other


def _keep_varied(label_set: LabelSet, step: dict, keep: np.ndarray, seconds: np.ndarray):
    tokens = label_set.table(['tokens'])['tokens'].combine_chunks()
    counts = pc.list_value_length(tokens).to_numpy().astype(np.int64)
    values = pc.list_flatten(tokens).to_numpy().astype(np.int64)
    candidates = np.flatnonzero(keep)
    used = np.repeat(keep, counts)
    drop = int(len(candidates) * step['percentile'] / 100)
    gone = least_varied(values[used], counts[candidates], drop, step['rounds'])
    good = keep.copy()
    good[candidates[gone]] = False
    return good, {'percentile': float(step['percentile'])}


def least_varied(tokens: np.ndarray, counts: np.ndarray, drop: int, rounds: int) -> np.ndarray:
    """Rows without which the variety of tokens falls least.

    The variety of a set of rows is sum_w sqrt(n_w), n_w the number of times that token w stands in
    it: a concave measure of coverage, so that frequent tokens add little.  A row adds, per token,
    about the mean of 1 / sqrt(n_w) over its own tokens.  In each round the rows that add least go,
    a share of `drop`, and the n_w are counted anew.  It stands for the sub-modular balancing of
    Park et al. 2020, arXiv:2005.09629 [recalled]; measure and rounds are ours.

    Args:
      tokens: int [sum of counts], token ids of all rows, one row after the other.
      counts: int [N], tokens of each row; rows without any go first.
      drop: how many rows to find, at most N.
      rounds: at least 1; more follow the measure more closely.

    Returns:
      int64 [drop], in the order in which they go; of equal rows the first.
    """
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    left = np.arange(counts.size)
    kept: np.ndarray = np.ones(counts.size, bool)
    gone: list[np.ndarray] = [left[:0]]
    for number in range(rounds):
        present = np.bincount(
            tokens[np.repeat(kept, counts)], minlength=int(tokens.max(initial=0)) + 1
        )
        worth = np.concatenate([1 / np.sqrt(np.maximum(present, 1))[tokens], [0.0]])
        sums = np.where(counts > 0, np.add.reduceat(worth, starts), 0.0)
        adds = sums / np.maximum(counts, 1)
        share = drop * (number + 1) // rounds - drop * number // rounds
        left = np.flatnonzero(kept)
        going = left[np.argsort(adds[left], kind='stable')[:share]]
        kept[going] = False
        gone.append(going)
    return np.concatenate(gone)


def _keep_few_of_each(label_set: LabelSet, step: dict, keep: np.ndarray, seconds: np.ndarray):
    table = label_set.table(['text', 'confidence'])
    texts = table['text'].combine_chunks().dictionary_encode().indices.to_numpy()
    confidence = np.nan_to_num(table['confidence'].to_numpy().astype(np.float64), nan=-np.inf)
    candidates = np.flatnonzero(keep)
    # By text, most confident first; then each row's place among those of its text.
    ranked = candidates[np.lexsort((-confidence[candidates], texts[candidates]))]
    starts = np.flatnonzero(np.diff(texts[ranked], prepend=-1))
    lengths = np.diff(starts, append=ranked.size)
    place = np.arange(ranked.size) - np.repeat(starts, lengths)
    good = keep.copy()
    good[ranked[place >= step['times']]] = False
    return good, {'times': step['times']}


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
    'normalised_score': _keep_probable,
    'duplicates': _keep_few_of_each,
    'balance': _keep_varied,
    'words_per_second': functools.partial(_keep_rate, words=True),
    'characters_per_second': functools.partial(_keep_rate, words=False),
    'empty': _keep_filled,
    'repeats': _keep_unrepeated,
    'keep_all': lambda label_set, step, keep, seconds: (np.ones(len(keep), bool), {}),
}
