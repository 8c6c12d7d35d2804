"""Results of many runs in one table: what differs between their configs, sorted by a metric.

    <set>.<model>.wer, .cer     scores of evaluate stages, with their intervals
    <stage>.<name>              a number of a stage's results, or of the last line of its log

An evaluate stage's scores carry its name in front when two stages score the same model on the same
set.  Only finished stages count: half a training run is no result.
"""

import csv
import dataclasses
import difflib
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bigssl_jax.config import UserError
from bigssl_jax.evaluation.results_table import result_table
from bigssl_jax.evaluation.score import percent
from bigssl_jax.evaluation.workdir import Run, flatten


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
      name: its folder.
      state: 'done', 'failed', ...
      values: label of a swept field -> its value, for those that vary.
      differs: path -> value of every field in which the configs of the runs differ.
      metrics: name -> number.
      intervals: name of a metric -> (low, high), 95 %.
      seconds: the time it took.
    """

    name: str
    state: str
    values: Mapping[str, Any]
    differs: Mapping[str, Any]
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric to sort by, lowest first unless `highest`."""

    name: str
    highest: bool = False


def parse_metric(text: str) -> Metric:
    """`NAME`, `NAME:min` or `NAME:max`.

    Raises:
      UserError: another word after the colon.
    """
    name, _, order = text.rpartition(':') if ':' in text else (text, '', 'min')
    if order not in ('min', 'max'):
        raise UserError(f'--metric {text!r}: after the colon comes min or max')
    return Metric(name, order == 'max')


def metrics_of(run: Run) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """All numbers that the finished stages of a run have left, and the intervals of some."""
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    done = {stage.name for stage in run.stages if stage.done is not None}
    rows = [row for row in result_table(run) if row.stage in done]
    times = Counter((row.set, row.model) for row in rows)
    for row in rows:
        stem = f'{row.set}.{row.model}'
        stem = stem if times[row.set, row.model] == 1 else f'{row.stage}.{stem}'
        for kind, score in (('wer', row.wer), ('cer', row.cer)):
            if score['value'] is not None:
                metrics[f'{stem}.{kind}'] = score['value']
            if score['low'] is not None and score['high'] is not None:
                intervals[f'{stem}.{kind}'] = (score['low'], score['high'])
    for stage in run.stages:
        if stage.done is None or stage.kind in ('prepare', 'evaluate'):
            continue
        logged = {k: v for k, v in (stage.metrics or [{}])[-1].items() if k != 'step'}
        for name, value in (flatten(logged) | flatten(stage.done['results'])).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                metrics[f'{stage.name}.{name}'] = value
    return metrics, intervals


def default_metric(run: Run) -> str:
    """The WER of the last model on the largest test set; without one, the last loss; or ''."""
    rows = result_table(run)
    if rows:
        model = [row.model for row in rows if row.set == rows[0].set][-1]
        return f'{rows[0].set}.{model}.wer'
    trained = [stage.name for stage in run.stages if stage.metrics]
    return f'{trained[-1]}.loss' if trained else ''


def differing_fields(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every config the fields, as path -> value, in which not all configs agree."""
    flat = [flatten(config) for config in configs]
    paths = sorted({path for one in flat for path in one})
    varying = [p for p in paths if len({json.dumps(one.get(p), default=str) for one in flat}) > 1]
    return [{path: one.get(path) for path in varying} for one in flat]


def check_metrics(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Raises a UserError if rows have metrics, and none has one of these."""
    known = sorted({name for row in rows for name in row.metrics})
    for name in names:
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f'did you mean {near[0]!r}?' if near else f'there are: {", ".join(known)}'
            raise UserError(f'--metric {name!r}: no finished stage has it; {hint}')


def sort_rows(rows: Sequence[Row], metric: Metric) -> list[Row]:
    """The rows in order of the metric, those without it last, in their old order."""
    sign = -1 if metric.highest else 1
    return sorted(rows, key=lambda row: sign * _number(row, metric.name, sign * math.inf))


def _number(row: Row, metric: str, missing: float) -> float:
    value = row.metrics.get(metric, missing)
    return missing if math.isnan(value) else value


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with all their metrics; of intervals the columns NAME.low and NAME.high."""
    fields = list(dict.fromkeys(path for row in rows for path in row.differs))
    names = sorted({name for row in rows for name in row.metrics})
    header = ['run', 'state', 'seconds', *fields]
    with_interval = {name for row in rows for name in row.intervals}
    for name in names:
        header += [name, f'{name}.low', f'{name}.high'] if name in with_interval else [name]
    out = io.StringIO()
    writer = csv.DictWriter(out, header, restval='', lineterminator='\n')
    writer.writeheader()
    for row in rows:
        cells: dict[str, Any] = {'run': row.name, 'state': row.state, 'seconds': row.seconds}
        cells |= {path: '' if value is None else value for path, value in row.differs.items()}
        cells |= row.metrics
        for name, (low, high) in row.intervals.items():
            cells |= {f'{name}.low': low, f'{name}.high': high}
        writer.writerow(cells)
    return out.getvalue()


def print_sweep_table(rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Prints rows in the order given: number, what varies, state, the metrics named."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    numbers = [row.name.split('-')[0] for row in rows]
    labels = list(dict.fromkeys(label for row in rows for label in row.values))
    unfinished = any(row.state != 'done' for row in rows)
    table = Table(box=SIMPLE_HEAD)
    table.add_column('run', no_wrap=True)
    for label in labels:
        table.add_column(Text(label), justify='right', overflow='fold')
    if unfinished:
        table.add_column('state')
    for name in metrics:
        table.add_column(Text(name), justify='right', overflow='fold')
    for row, number in zip(rows, numbers, strict=True):
        run = number if numbers.count(number) == 1 else row.name
        values = [shown(row.values[label]) if label in row.values else '' for label in labels]
        results = [metric_text(row, name) for name in metrics]
        state = [row.state] if unfinished else []
        table.add_row(*map(Text, (run, *values, *state, *results)))
    # What is not a terminal is read by a program or an editor: lines are not folded for it.
    width = None if sys.stdout.isatty() else 200
    Console(file=sys.stdout, highlight=False, width=width).print(table)


def shown(value: Any) -> str:
    """A config value in a table."""
    return f'{value:.6g}' if isinstance(value, float) else str(value)


def metric_text(row: Row, name: str) -> str:
    """A rate as percentage with its interval, any other number plainly."""
    value = row.metrics.get(name)
    if value is None:
        return '–'
    if name.rsplit('.', 1)[-1] not in ('wer', 'cer', 'dev_wer', 'dev_cer', 'label_wer'):
        return f'{value:.6g}'
    if name not in row.intervals:
        return percent(value)
    low, high = row.intervals[name]
    return f'{percent(value)} ({100 * low:.1f}–{100 * high:.1f})'
