"""The result table of a run: error rates with intervals, per test set and model.

rows = result_table(workdir)
print_result_table(workdir)      # for people, at the end of `bigssl run`
markdown_table(rows)             # for README and docs/results.md
"""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bigssl_jax.evaluation.score import p_text, percent, percent_interval
from bigssl_jax.evaluation.workdir import Run, read_json, read_run


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on one test set; `wer` and `cer` as in scores.json.

    `name` is the model, or stage/model where several stages of the run scored models.
    """

    stage: str
    set: str
    model: str
    name: str
    wer: Mapping[str, Any]
    cer: Mapping[str, Any]
    utterances: int
    best: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A paired test of two models on one set; `wer` and `cer` as PairedTest.to_json()."""

    stage: str
    set: str
    first: str
    second: str
    wer: Mapping[str, Any]
    cer: Mapping[str, Any]


def result_table(workdir: str | os.PathLike | Run) -> list[Row]:
    """All scores of a run: by evaluate stage, set and model, in the order of the config.

    Args:
      workdir: a run's folder, or the run as read already.

    Returns:
      Rows; `best` marks the lowest WER of each set. [] when nothing has been scored yet.

    Raises:
      WorkdirError: not a workdir, or a damaged scores.json.
    """
    run = workdir if isinstance(workdir, Run) else read_run(workdir)
    rows = []
    scored = {stage.name: read_json(stage.directory / 'scores.json') or {} for stage in run.stages}
    several = sum(map(bool, scored.values())) > 1
    for stage in run.stages:
        scores = scored[stage.name]
        sets = [*stage.fields.get('sets', ()), *sorted(scores)]
        for set_name in sorted(scores, key=sets.index):
            models = scores[set_name]
            rates = [s['wer']['value'] for s in models.values() if s['wer']['value'] is not None]
            order = [*stage.fields.get('models', ()), *models]
            for model in sorted(models, key=order.index):
                score = models[model]
                best = len(models) > 1 and score['wer']['value'] == min(rates, default=None)
                rows.append(
                    Row(stage.name, set_name, model,
                        f'{stage.name}/{model}' if several else model,
                        score['wer'], score['cer'], score['utterances'], best)
                )  # fmt: skip
    return rows


def comparisons(run: Run) -> list[Comparison]:
    """All paired tests that the run's evaluate stages have stored."""
    return [
        Comparison(stage.name, item['set'], item['first'], item['second'], item['wer'], item['cer'])
        for stage in run.stages
        for item in read_json(stage.directory / 'comparisons.json') or ()
    ]


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; the lowest WER of each set is bold."""
    lines = [
        '| test set | model | WER | 95 % interval | CER | 95 % interval | utterances | words |',
        '|---|---|---:|---:|---:|---:|---:|---:|',
    ]
    for row in rows:
        rate = percent(row.wer['value'])
        cells = (
            _cell(row.set), _cell(row.name), f'**{rate}**' if row.best else rate,
            percent_interval(row.wer), percent(row.cer['value']), percent_interval(row.cer),
            f'{row.utterances:,}', f'{row.wer["words"]:,}',
        )  # fmt: skip
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def _cell(text: str) -> str:
    return text.replace('\\', '\\\\').replace('|', '\\|').replace('\n', ' ')


def print_result_table(workdir: str | os.PathLike | Run) -> list[Row]:
    """Prints a run's scores, paired tests and label quality; returns the rows.

    Raises:
      WorkdirError: not a workdir, or a damaged file.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    run = workdir if isinstance(workdir, Run) else read_run(workdir)
    rows = result_table(run)
    console = Console(file=sys.stdout, highlight=False)
    for name, corpus in run.corpora.items():
        if 'synthe' in str(corpus.get('source', '')).lower():
            console.print(Text(f'corpus {name} is synthetic speech: {corpus["source"]}'))
    if not rows:
        console.print('no scores yet')
        return rows
    table = Table('test set', 'model', 'WER %', 'CER %', 'lines', box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(table.columns):
        column.no_wrap, column.overflow = number > 1, 'fold'
        column.justify = 'right' if number > 1 else 'left'
    for number, row in enumerate(rows):
        follows = number + 1 < len(rows) and rows[number + 1].set == row.set
        table.add_row(
            Text(row.set), Text(row.name), _rate_text(row.wer), _rate_text(row.cer),
            f'{row.utterances:,}', style='bold' if row.best else '', end_section=not follows,
        )  # fmt: skip
    console.print(table)
    for test in comparisons(run):
        console.print(Text(f'{test.set}: {comparison_text(test)}'))
    for stage, quality in label_qualities(run).items():
        console.print(Text(f'{stage}: {quality_text(quality)}'))
    return rows


def _rate_text(score: Mapping[str, Any]) -> str:
    """A rate in per cent with its interval, narrow enough for 80 columns."""
    rate = percent(score['value']).removesuffix(' %')
    if score['low'] is None or score['high'] is None:
        return rate
    return f'{rate} ({100 * score["low"]:.1f}–{100 * score["high"]:.1f})'


def comparison_text(test: Comparison) -> str:
    """A paired test in a line."""
    parts = []
    for name, result in (('WER', test.wer), ('CER', test.cer)):
        if result['difference'] is not None:
            parts.append(f'{name} {100 * result["difference"]:+.1f} points, {p_text(result["p"])}')
    return f'{test.second} against {test.first}: ' + '; '.join(parts or ['no reference words'])


def label_qualities(run: Run) -> dict[str, Mapping[str, Any]]:
    """quality.json of every pseudo-label stage that has one."""
    found = {stage.name: read_json(stage.directory / 'quality.json') for stage in run.stages}
    return {name: quality for name, quality in found.items() if quality is not None}


def quality_text(quality: Mapping[str, Any]) -> str:
    """A label_quality in a line."""
    kept = quality['kept_only']
    return (
        f'{quality["utterances"]:,} labels, WER {percent(quality["all"]["wer"]["value"])}, CER'
        f' {percent(quality["all"]["cer"]["value"])}; kept {percent(quality["kept_fraction"])}'
        + (
            f', of WER {percent(kept["wer"]["value"])}, CER {percent(kept["cer"]["value"])}'
            if kept
            else ''
        )
    )
