"""`bigssl report`: one self-contained HTML page from a run's workdir.

    workdir  --read_run-->  Run  --sections-->  plain data and SVG  --report.html-->  one page

The page makes no request: styles, script, pictures and audio are inside it, and its content
security policy forbids the rest.  Texts of the run are escaped by the template engine; only our own
SVG is passed through.  Stages that are not finished are shown as such, and their sections stay out.
"""

import base64
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigssl_jax.evaluation import curves, utterances
from bigssl_jax.evaluation.figures import MAX_SERIES, Interval, Series, interval_chart, line_chart
from bigssl_jax.evaluation.results_table import Row, comparisons, label_qualities, result_table
from bigssl_jax.evaluation.score import p_text, percent, percent_interval
from bigssl_jax.evaluation.workdir import Run, Stage, WorkdirError, flatten, read_json, read_run


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the page may grow to.

    Attributes:
      utterances: alignments shown per test set.
      audio_bytes: audio files' bytes in the whole page, before base64.
    """

    utterances: int = 100
    audio_bytes: int = 12_000_000


def write_report(
    workdir: str | os.PathLike,
    output: str | os.PathLike | None = None,
    audio: Callable[[str, str], bytes | None] | None = None,
    limits: Limits | None = None,
) -> pathlib.Path:
    """Writes the report of a run, finished or not.

    Args:
      workdir: the run's folder.
      output: the page; default `<workdir>/report.html`.
      audio: (set, utterance id) -> an mp3, flac, ogg or wav file's bytes, or None; default: the
        clips that the evaluate stage has written (see clips.py).
      limits: caps on the page's size.

    Returns:
      The page's path.

    Raises:
      WorkdirError: not a workdir, a damaged file in it, or the page cannot be written.
    """
    run = read_run(workdir)
    page = render(run, audio, limits or Limits())
    path = pathlib.Path(output) if output is not None else run.path / 'report.html'
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        temporary.write_text(page, 'utf-8')
        os.replace(temporary, path)
    except OSError as error:
        raise WorkdirError(f'cannot write {path}: {error.strerror}') from error
    return path


def render(run: Run, audio: Callable[[str, str], bytes | None] | None, limits: Limits) -> str:
    """The page's HTML."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        'percent': percent,
        'percent_interval': percent_interval,
        'points': points,
        'p_value': lambda p: p_text(p).removeprefix('p ').removeprefix('= '),
        'clock': clock,
        'number': number,
        'svg': markupsafe.Markup,
        'data_uri': data_uri,
    }
    rows = result_table(run)
    return environment.get_template('report.html').render(
        run=run,
        name=run.config.get('name') or run.path.name,
        seconds=sum(s.done.get('seconds', 0) for s in run.stages if s.done),
        finished_at=max((s.done.get('finished_at', '') for s in run.stages if s.done), default=''),
        rows=rows,
        result_charts=result_charts(rows),
        comparisons=comparisons(run),
        data=data_tables(run),
        stages=[{'stage': stage, 'results': key_results(stage)} for stage in run.stages],
        curves=curves.training_curves(run),
        labels=[
            {'stage': name, 'quality': quality, 'charts': label_charts(quality)}
            for name, quality in label_qualities(run).items()
        ],
        probes=probe_tables(run),
        sets=utterances.aligned_sets(run, rows, audio, limits.utterances, limits.audio_bytes),
        stage_differences=stage_differences(run),
        default_differences=default_differences(run),
        config=flatten(run.config),
    )


def result_charts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per test set: WER and CER of every model with its interval; a model keeps its colour."""
    models = list(dict.fromkeys(row.name for row in rows))
    charts = []
    for name in dict.fromkeys(row.set for row in rows):
        chosen = [row for row in rows if row.set == name]
        pictures = {}
        for measure in ('wer', 'cer'):
            values = [
                Interval(row.name, score['value'], score['low'], score['high'],
                         models.index(row.name) % MAX_SERIES)
                for row in chosen
                if (score := getattr(row, measure))['value'] is not None
            ]  # fmt: skip
            if values:
                title = f'{measure.upper()} of every model on {name}'
                pictures[measure.upper()] = interval_chart(values, title)
        charts.append({'set': name, 'pictures': pictures})
    return charts


def data_tables(run: Run) -> dict[str, Any]:
    """Corpora (rows, hours, source, licences) and the selections that the prepare stage counted."""
    corpora = [
        {
            'name': name,
            'rows': corpus.get('rows'),
            'hours': corpus['seconds'] / 3600 if 'seconds' in corpus else None,
            'source': corpus.get('source', ''),
            'licences': ', '.join(corpus.get('licences', ())),
            'synthetic': 'synthe' in str(corpus.get('source', '')).lower(),
        }
        for name, corpus in run.corpora.items()
    ]
    prepare = next((s.done for s in run.stages if s.kind == 'prepare' and s.done), None)
    selections = (prepare or {}).get('results', {}).get('selections', {})
    return {'corpora': corpora, 'selections': selections}


def key_results(stage: Stage, limit: int = 12) -> list[tuple[str, str]]:
    """A finished stage's results as names and short texts; nested ones by their path."""
    if stage.done is None or stage.kind == 'evaluate':  # evaluate: see the result table
        return []
    flat = flatten(stage.done.get('results') or {})
    shown = [
        (name, number(value))
        for name, value in flat.items()
        if isinstance(value, int | float | str) and len(number(value)) <= 40
    ]
    if stage.kind == 'prepare':  # corpora and selections have tables of their own
        shown = [item for item in shown if not item[0].startswith(('corpora.', 'selections.'))]
    return shown[:limit]


def label_charts(quality: Mapping[str, Any]) -> list[dict[str, str]]:
    """Calibration and kept-fraction curves of a label_quality."""
    bins = [row for row in quality['calibration'] if row['accuracy'] is not None]
    kept = [row for row in quality['kept_curve'] if row['wer'] is not None]
    charts = []
    if bins:
        series = Series('', [r['confidence'] for r in bins], [r['accuracy'] for r in bins], 0)
        title = 'Share of words right against confidence'
        picture = line_chart(
            [series], title, 'mean confidence', percent=True, percent_x=True, diagonal=True,
            markers=True,
        )  # fmt: skip
        charts.append({'title': title, 'note': 'dashed: perfectly calibrated', 'svg': picture})
    if kept:
        series = Series('', [r['fraction'] for r in kept], [r['wer'] for r in kept], 1)
        title = 'WER of the labels kept, most confident first'
        picture = line_chart(
            [series], title, 'share of utterances kept', percent=True, percent_x=True, markers=True
        )
        charts.append({'title': title, 'note': '', 'svg': picture})
    return charts


def probe_tables(run: Run) -> list[dict[str, Any]]:
    """Per probe stage and task: the results of every model, and accuracy by layer on dev."""
    tables = []
    for stage in run.stages:
        probes = read_json(stage.directory / 'probes.json') if stage.kind == 'probe' else None
        order = ('log_mel', *stage.fields.get('models', ()))
        for task, found_by in (probes or {}).items():
            models = {name: found_by[name] for name in order}
            lines = [
                Series(name, range(len(found['layers'])), [x['dev'] for x in found['layers']],
                       number % MAX_SERIES, dashed=len(found['layers']) == 1)
                for number, (name, found) in enumerate(models.items())
            ]  # fmt: skip
            title = f'{task}: accuracy on dev by layer'
            chart = line_chart(lines, title, 'layer', percent=True, markers=True)
            tables.append(
                {'name': f'{stage.name} / {task}', 'models': models, 'lines': lines, 'title': title,
                 'field': stage.fields.get('tasks', {}).get(task, {}).get('field', task),
                 'svg': chart}
            )  # fmt: skip
    return tables


def stage_differences(run: Run) -> list[dict[str, Any]]:
    """For each kind with several stages: the config fields in which they differ."""
    tables = []
    for kind in dict.fromkeys(stage.kind for stage in run.stages):
        alike = [stage for stage in run.stages if stage.kind == kind and stage.fields]
        if len(alike) < 2:
            continue
        flat = [flatten(stage.fields) for stage in alike]
        fields = list(dict.fromkeys(name for one in flat for name in one))
        rows = [(name, [number(one.get(name, '–')) for one in flat]) for name in fields]
        rows = [(name, values) for name, values in rows if len(set(values)) > 1]
        if rows:
            tables.append({'kind': kind, 'stages': [s.name for s in alike], 'rows': rows})
    return tables


def default_differences(run: Run) -> list[tuple[str, str, str]] | None:
    """(field, default, value) where the config departs from config.json's `defaults`, if there."""
    if 'defaults' not in run.info:
        return None
    defaults, values = flatten(run.info['defaults']), flatten(run.config)
    return [
        (name, number(defaults.get(name, '–')), number(values.get(name, '–')))
        for name in sorted(defaults.keys() | values.keys())
        if defaults.get(name, '–') != values.get(name, '–')
    ]


def data_uri(audio: bytes) -> str:
    """An audio file as a data URI; the type is told by its first bytes."""
    heads = {b'fLaC': 'audio/flac', b'OggS': 'audio/ogg', b'RIFF': 'audio/wav'}
    kind = heads.get(audio[:4], 'audio/mpeg')
    return f'data:{kind};base64,{base64.b64encode(audio).decode()}'


def clock(seconds: float) -> str:
    """Seconds as `1 h 02 min`, `2 min 03 s` or `4.5 s`."""
    if seconds < 60:
        return f'{seconds:.1f} s'
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours} h {minute:02d} min' if hours else f'{minute} min {second:02d} s'


def points(difference: float | None) -> str:
    """A difference of rates in percentage points, with a true minus sign."""
    return '–' if difference is None else f'{100 * difference:+.1f}'.replace('-', '−')


def number(value: Any) -> str:
    """A config value or result as short text."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else 'none'
    if isinstance(value, float):
        return f'{value:.4g}' if abs(value) < 10_000 else f'{value:,.0f}'
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, list | tuple):
        return ', '.join(map(number, value)) or 'none'
    return str(value) if value not in ('', {}) else 'none'
