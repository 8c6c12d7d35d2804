"""`bigssl score`: two or three JSON Lines files in, a table and plain data out.

    references.jsonl   {"id": "u1", "text": "hello there", "speaker": "anna"}   speaker optional
    hypotheses.jsonl   {"id": "u1", "text": "hello dear"}

Every reference needs exactly one hypothesis and the other way round: a missing line is an error,
not an empty text, because a recogniser that was cut short must not look like one that said nothing.

`score_texts` and `compare_texts` give the entries that the evaluate stage stores.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigssl_jax.config import UserError
from bigssl_jax.evaluation.alignment import Op, align, alignment_text
from bigssl_jax.evaluation.significance import compare
from bigssl_jax.evaluation.wer import ErrorCounts, count_errors, summarise


class ScoreError(UserError):
    """A file to be scored is not what scoring needs."""


@dataclasses.dataclass(frozen=True)
class TextLine:
    """One line of a references or hypotheses file."""

    id: str
    text: str
    speaker: str | None
    line: int


def score_texts(
    references: Sequence[str],
    texts: Sequence[str],
    speakers: Sequence[str | None] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """One model's scores on one set, as scores.json holds them.

    Returns:
      {'wer': WerResult.to_json(), 'cer': likewise, 'utterances': N}.
    """
    words, characters = _both_counts(references, texts)
    return {
        'wer': summarise(words, speakers, seed=seed).to_json(),
        'cer': summarise(characters, speakers, seed=seed).to_json(),
        'utterances': len(references),
    }


def compare_texts(
    references: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    speakers: Sequence[str | None] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """System b against system a: {'wer': PairedTest.to_json(), 'cer': likewise}."""
    first, second = _both_counts(references, a), _both_counts(references, b)
    return {
        name: compare(first[n], second[n], speakers, seed=seed).to_json()
        for n, name in enumerate(('wer', 'cer'))
    }


def _both_counts(
    references: Sequence[str], texts: Sequence[str]
) -> tuple[ErrorCounts, ErrorCounts]:
    return count_errors(references, texts, 'word'), count_errors(references, texts, 'character')


def score_command(
    references: str | os.PathLike,
    hypotheses: str | os.PathLike,
    second: str | os.PathLike | None = None,
    normalise: Callable[[str], str] = lambda text: text,
    worst: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores one or two systems, prints the tables and returns the same as plain data.

    Args:
      references: JSON Lines with `id`, `text` and, for intervals by speaker, `speaker`.
      hypotheses: JSON Lines with `id`, `text`.
      second: a second system, which is tested against `hypotheses` on the same utterances.
      normalise: applied to every text before it is compared.
      worst: how many utterances to print aligned, those with most errors first.
      seed: of the bootstrap and of the test.

    Returns:
      {'references': file, 'speakers': bool,
       'systems': [{'file', 'wer', 'cer', 'utterances'}, ...],      entries as in scores.json
       'paired': {'wer', 'cer'} of the second against the first, or None,
       'worst': [{'id', 'speaker', 'errors', 'alignment': [[kind, reference, hypothesis], ...]}]}

    Raises:
      ScoreError: an unreadable file or line, a duplicate, missing or extra id.
    """
    lines = read_texts(references)
    speakers = [line.speaker for line in lines.values()]
    truth = [normalise(line.text) for line in lines.values()]
    files = [os.fspath(path) for path in (hypotheses, second) if path is not None]
    systems = []
    for file in files:
        found = match_ids(lines, os.fspath(references), read_texts(file), file)
        systems.append([normalise(line.text) for line in found])
    result = {
        'references': os.fspath(references),
        'speakers': any(speakers),
        'systems': [
            {'file': file, **score_texts(truth, texts, speakers, seed)}
            for file, texts in zip(files, systems, strict=True)
        ],
        'paired': _compare(truth, systems, speakers, seed),
        'worst': _worst(list(lines.values()), truth, systems[0], worst),
    }
    print_scores(result)
    return result


def _compare(
    truth: Sequence[str], systems: Sequence[Sequence[str]],
    speakers: Sequence[str | None], seed: int,
) -> dict[str, Any] | None:  # fmt: skip
    """The second system against the first; None when there is only one."""
    if len(systems) < 2:
        return None
    return compare_texts(truth, systems[0], systems[1], speakers, seed)


def read_texts(path: str | os.PathLike) -> dict[str, TextLine]:
    """Reads JSON Lines with `id` and `text` into id -> line, in the order of the file.

    Raises:
      ScoreError: no such file, no lines, a line that is no such object, an id that occurs twice.
    """
    lines: dict[str, TextLine] = {}
    try:
        content = pathlib.Path(path).read_text('utf-8')
    except OSError as error:
        raise ScoreError(f'{path}: {error.strerror}; give a JSON Lines file') from error
    except UnicodeDecodeError as error:
        raise ScoreError(f'{path}: byte {error.start} is not UTF-8; is it a text file?') from error
    # Not splitlines: it also splits at separators that may stand inside a JSON string.
    for number, text in enumerate(content.split('\n'), 1):
        if not text.strip():
            continue
        line = _text_line(f'{path}:{number}', text, number)
        if line.id in lines:
            raise ScoreError(
                f'{path}:{number}: id {line.id!r} stands in line {lines[line.id].line} already;'
                ' each utterance needs one line'
            )
        lines[line.id] = line
    if not lines:
        raise ScoreError(f'{path}: no lines; each line is {{"id": "u1", "text": "hello there"}}')
    return lines


def _text_line(place: str, text: str, number: int) -> TextLine:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ScoreError(f'{place}: not JSON ({error})') from error
    if not isinstance(value, Mapping):
        raise ScoreError(f'{place}: {text.strip()[:40]!r} is no JSON object with id and text')
    if 'error' in value and 'text' not in value:
        raise ScoreError(
            f'{place}: {value.get("id")!r} was not transcribed ({value["error"]}); transcribe it'
            ' again, or take it out of both files'
        )
    for field in ('id', 'text'):
        if field not in value:
            raise ScoreError(f'{place}: no field {field!r}; fields: {sorted(value)}')
    identity, words, speaker = value['id'], value['text'], value.get('speaker')
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise ScoreError(f'{place}: id is {identity!r}; it must be a string')
    if not isinstance(words, str):
        raise ScoreError(f'{place}: text is {words!r}; it must be a string ("" for silence)')
    return TextLine(str(identity), words, None if speaker in (None, '') else str(speaker), number)


def match_ids(
    references: Mapping[str, TextLine], references_file: str,
    hypotheses: Mapping[str, TextLine], hypotheses_file: str,
) -> list[TextLine]:  # fmt: skip
    """The hypotheses in the order of the references.

    Raises:
      ScoreError: an id that only one of the files has.
    """
    missing = [name for name in references if name not in hypotheses]
    extra = [name for name in hypotheses if name not in references]
    if missing:
        raise ScoreError(
            f'{hypotheses_file}: {len(missing)} of {len(references)} ids of {references_file} have'
            f' no hypothesis ({_some(missing)}); give an empty text where nothing was recognised'
        )
    if extra:
        raise ScoreError(
            f'{hypotheses_file}:{hypotheses[extra[0]].line}: {len(extra)} ids are not in'
            f' {references_file} ({_some(extra)}); score against the references they belong to'
        )
    return [hypotheses[name] for name in references]


def _some(names: Sequence[str], count: int = 3) -> str:
    return ', '.join(map(repr, names[:count])) + (', ...' if len(names) > count else '')


def _worst(
    lines: Sequence[TextLine], truth: Sequence[str], texts: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """The `count` utterances with most errors, aligned; ties in the order of the file."""
    errors = count_errors(truth, texts).errors
    order = sorted(range(len(lines)), key=lambda n: -errors[n])[:count]
    return [
        {
            'id': lines[n].id,
            'speaker': lines[n].speaker,
            'errors': int(errors[n]),
            'alignment': [
                [op.kind, op.reference, op.hypothesis] for op in align(truth[n], texts[n])
            ],
        }
        for n in order
        if errors[n]
    ]


def print_scores(result: Mapping[str, Any]) -> None:
    """Prints the tables and alignments of `score_command`'s result."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    heads = 'system', 'measure', 'rate', '95 % interval', 'S', 'D', 'I', 'reference'
    table = Table(*heads, box=SIMPLE_HEAD)
    for column in table.columns[2:]:
        column.justify, column.no_wrap = 'right', True
    for system in result['systems']:
        for measure in ('wer', 'cer'):
            score = system[measure]
            counts = (f'{score[key]:,}' for key in ('s', 'd', 'i', 'words'))
            table.add_row(
                Text(pathlib.Path(system['file']).name), measure.upper(),
                percent(score['value']), percent_interval(score), *counts,
            )  # fmt: skip
    console.print(table)
    score = result['systems'][0]['wer']
    console.print(
        f'{result["systems"][0]["utterances"]:,} utterances; intervals by bootstrap over'
        f' {score["units"]:,} {score["resampled"]}s'
    )
    for measure, test in (result['paired'] or {}).items():
        console.print(f'{measure.upper()} of the second against the first: {paired_text(test)}')
    for item in result['worst']:
        speaker = f', {item["speaker"]}' if item['speaker'] else ''
        head = f'\n{item["id"]}{speaker}: {item["errors"]} errors'
        ops = [Op(*op) for op in item['alignment']]
        console.print(Text(f'{head}\n{alignment_text(ops, console.width)}'), soft_wrap=True)


def percent(rate: float | None, decimals: int = 1) -> str:
    """A rate as `12.3 %`, or an en dash where it is not defined."""
    return '–' if rate is None else f'{100 * rate:.{decimals}f} %'


def percent_interval(score: Mapping[str, Any]) -> str:
    """The interval of a scores.json entry as `11.0 – 13.5 %`."""
    if score.get('low') is None or score.get('high') is None:
        return '–'
    return f'{100 * score["low"]:.1f} – {100 * score["high"]:.1f} %'


def paired_text(test: Mapping[str, Any]) -> str:
    """One sentence on a PairedTest.to_json()."""
    if test['difference'] is None:
        return 'no reference words, nothing to compare'
    limits = 'interval unknown'
    if test['low'] is not None:
        limits = f'95 % interval {100 * test["low"]:+.1f} to {100 * test["high"]:+.1f}'
    return (
        f'{100 * test["difference"]:+.1f} points ({limits}; {p_text(test["p"])};'
        f' {test["fewer_errors"]:,} utterances better, {test["more_errors"]:,} worse)'
    )


def p_text(p: float) -> str:
    """A p value as `p = 0.012` or `p < 0.001`."""
    return 'p < 0.001' if p < 0.001 else f'p = {p:.3f}'
