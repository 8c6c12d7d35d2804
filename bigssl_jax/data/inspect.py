"""What a corpus holds: `inspect(directory)` for programs, `inspect_command` for people.

Reads corpus.json, the index and the metadata, and the audio of nothing but the shown examples.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigssl_jax.data.buckets import length_histogram, optimal_bounds, padding_waste
from bigssl_jax.data.corpus import Corpus

GROUPED = ('split', 'language', 'domain', 'speaker')
HISTOGRAM_BARS = 12
ROUND_STEPS = (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)  # s
USUAL = 0.995  # quantile of lengths up to which plans are made; the rest is usually left out
BUCKET_PLANS = (1, 2, 4, 6, 8)
MOST_SHOWN = 12  # values of a column that are listed; the rest is summed up


def inspect(directory: str | os.PathLike, examples: int = 5) -> dict[str, Any]:
    """The facts about a prepared corpus as plain numbers, lists and dicts (JSON-able).

    Keys: directory, fingerprint, rows, hours, labelled_rows, labelled_hours, words, splits,
    languages, domains, speakers (each {value: {rows, hours}}, largest first), seconds (shortest,
    mean, median, longest), histogram [{from, to, rows}], padding {buckets: {bounds_seconds,
    waste}}, examples, quarantined, quarantine_reasons, quarantine_examples, licences, source,
    attribution.

    Raises DataError for a folder that is no complete corpus, or has lost a file.
    """
    corpus = Corpus.open(directory)
    corpus.verify()
    table = corpus.table([*GROUPED, 'text', 'duration'])
    labelled = table.filter(pc.is_valid(table['text']))
    words = pc.sum(pc.list_value_length(pc.utf8_split_whitespace(labelled['text']))).as_py()
    return {
        'directory': os.fspath(directory),
        'fingerprint': corpus.fingerprint,
        'rows': corpus.num_rows,
        'hours': corpus.hours,
        'labelled_rows': labelled.num_rows,
        'labelled_hours': (pc.sum(labelled['duration']).as_py() or 0.0) / 3600,
        'words': words or 0,
        **{f'{name}s': _by_value(table, name) for name in GROUPED},
        'seconds': _lengths(corpus),
        'histogram': _histogram(corpus),
        'padding': _padding(corpus),
        'examples': _examples(corpus, examples),
        'quarantined': corpus.info['quarantined'],
        'quarantine_reasons': corpus.info['quarantine_reasons'],
        'quarantine_examples': _quarantine(corpus, examples),
        'licences': corpus.info['licences'],
        'source': corpus.info['source'],
        'attribution': corpus.info['attribution'],
    }


def _by_value(table: pa.Table, name: str) -> dict[str, dict[str, float]]:
    grouped = table.group_by(name).aggregate([('duration', 'sum'), ('duration', 'count')])
    rows = sorted(
        grouped.to_pylist(), key=lambda row: (-row['duration_sum'], row[name])
    )  # the largest first, ties by name: the same report every time
    return {
        row[name] or '(none)': {
            'rows': row['duration_count'],
            'hours': row['duration_sum'] / 3600,
        }
        for row in rows
    }


def _lengths(corpus: Corpus) -> dict[str, float]:
    seconds: np.ndarray = np.asarray(corpus.sample_counts) / corpus.sample_rate
    return {
        'shortest': float(seconds.min()),
        'mean': float(seconds.mean()),
        'median': float(np.median(seconds)),
        'longest': float(seconds.max()),
    }


def _histogram(corpus: Corpus) -> list[dict[str, float]]:
    """About a dozen equal bars up to the usual lengths, and one bar for all that is longer."""
    seconds: np.ndarray = np.asarray(corpus.sample_counts) / corpus.sample_rate
    usual, longest = float(np.quantile(seconds, USUAL)), float(seconds.max())
    step = next((s for s in ROUND_STEPS if usual / s <= HISTOGRAM_BARS), usual / HISTOGRAM_BARS)
    edges: np.ndarray = step * np.arange(math.ceil(usual / step) + 1)
    if longest > edges[-1]:
        edges = np.append(edges, longest)
    counts, _ = np.histogram(seconds, edges)
    return [
        {'from': float(low), 'to': float(high), 'rows': int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _padding(corpus: Corpus) -> dict[str, dict[str, Any]]:
    """For each number of buckets: the best bounds and the fraction of padding they leave.

    Over the usual lengths: a single recording of minutes would otherwise rule the whole plan.
    """
    lengths = np.asarray(corpus.sample_counts)
    edges, counts = length_histogram(lengths[lengths <= np.quantile(lengths, USUAL)])
    plans = {}
    for number in BUCKET_PLANS:
        bounds = optimal_bounds(edges, counts, number)
        plans[str(number)] = {
            'bounds_seconds': [float(bound) / corpus.sample_rate for bound in bounds],
            'waste': padding_waste(edges, counts, bounds),
        }
    return plans


def _examples(corpus: Corpus, number: int) -> list[dict[str, Any]]:
    """Rows spread evenly over the corpus, with the level of their audio (dB of full scale)."""
    rows = np.unique(np.linspace(0, corpus.num_rows - 1, number).astype(int))
    table = corpus.table(['id', 'speaker', 'split', 'text'])
    examples = []
    for row in map(int, rows):
        samples = corpus.read(row).astype(np.float64) / 32768
        level = 10 * np.log10(max(1e-12, float(np.mean(samples**2))))
        seconds = len(samples) / corpus.sample_rate
        facts = table.slice(row, 1).to_pylist()[0]
        examples.append({'row': row, 'seconds': seconds, 'level_db': round(level, 1), **facts})
    return examples


def _quarantine(corpus: Corpus, number: int) -> list[dict[str, str]]:
    path = os.path.join(corpus.directory, 'quarantine.jsonl')
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line, _ in zip(file, range(number), strict=False)]


# ---------------------------------------------------------------- for people


def inspect_command(directory: str, examples: int = 5) -> dict[str, Any]:
    """`bigssl inspect DIR`: prints the facts as tables and returns them."""
    from rich.console import Console

    facts = inspect(directory, examples)
    console = Console()
    for table in (
        _summary_table(facts),
        *(_value_table(name, facts[f'{name}s']) for name in GROUPED),
        _histogram_table(facts['histogram']),
        _padding_table(facts['padding']),
        _example_table(facts['examples']),
    ):
        console.print(table)
    for item in facts['quarantine_examples']:
        console.print(
            f'left out: {item["audio"]}: {item["reason"]}: {item["detail"]}', markup=False
        )
    return facts


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify='left', box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify='right' if name in right else 'left')
    return table


def _summary_table(facts: dict[str, Any]) -> Any:
    table = _table(facts['directory'], '', 'value')
    reasons = ', '.join(f'{n} {name}' for name, n in facts['quarantine_reasons'].items())
    lengths = facts['seconds']
    for name, value in {
        'utterances': f'{facts["rows"]:,}',
        'hours': f'{facts["hours"]:,.2f}',
        'with text': f'{facts["labelled_rows"]:,} ({facts["labelled_hours"]:,.2f} h, '
        f'{facts["words"]:,} words)',
        'length in seconds': f'{lengths["shortest"]:.2f} to {lengths["longest"]:.2f}, mean '
        f'{lengths["mean"]:.2f}, median {lengths["median"]:.2f}',
        'left out': f'{facts["quarantined"]:,} {reasons}',
        'licences': '\n'.join(f'{n:,} {k or "not stated"}' for k, n in facts['licences'].items()),
        'source': facts['source'],
        'fingerprint': facts['fingerprint'][:16],
    }.items():
        table.add_row(name, _literal(value))
    return table


def _value_table(name: str, values: dict[str, dict[str, float]]) -> Any:
    table = _table(
        f'{name}s ({len(values)})', name, 'utterances', 'hours', right=('utterances', 'hours')
    )
    shown = list(values.items())
    rest = shown[MOST_SHOWN:]
    for value, count in shown[:MOST_SHOWN]:
        table.add_row(_literal(value), f'{count["rows"]:,}', f'{count["hours"]:,.2f}')
    if rest:
        rows, hours = (sum(count[key] for _, count in rest) for key in ('rows', 'hours'))
        table.add_row(f'{len(rest)} more', f'{rows:,}', f'{hours:,.2f}')
    return table


def _histogram_table(histogram: list[dict[str, float]]) -> Any:
    table = _table('lengths', 'seconds', 'utterances', '', right=('seconds', 'utterances'))
    most = max(bar['rows'] for bar in histogram)
    for bar in histogram:
        span = f'{bar["from"]:.4g} - {bar["to"]:.4g}'
        table.add_row(span, f'{bar["rows"]:,}', _bar(bar['rows'] / most, 40))
    return table


def _bar(fraction: float, width: int) -> str:
    """A bar of block characters, to an eighth of a character; something, however small, shows."""
    eighths = max(round(fraction * width * 8), 1 if fraction > 0 else 0)
    return '█' * (eighths // 8) + ' ▏▎▍▌▋▊▉'[eighths % 8].strip()


def _padding_table(padding: dict[str, dict[str, Any]]) -> Any:
    title = f'padding, over the {USUAL:.1%} of utterances that are shortest'
    table = _table(title, 'buckets', 'waste', 'bounds in seconds', right=('buckets', 'waste'))
    for number, plan in padding.items():
        bounds = ' '.join(f'{bound:.2f}' for bound in plan['bounds_seconds'])
        table.add_row(number, f'{plan["waste"]:.1%}', bounds)
    return table


def _example_table(examples: list[dict[str, Any]]) -> Any:
    table = _table(
        'examples', 'id', 'split', 'speaker', 'seconds', 'dB', 'text', right=('seconds',)
    )
    for row in examples:
        text = '(no text)' if row['text'] is None else row['text']
        numbers = f'{row["seconds"]:.2f}', f'{row["level_db"]:.0f}'
        cells = map(_literal, (row['id'], row['split'], row['speaker']))
        table.add_row(*cells, *numbers, _literal(text))
    return table


def _literal(text: str) -> Any:
    """Text of the user's as it is: rich would read [brackets] as markup."""
    from rich.text import Text

    return Text(text)
