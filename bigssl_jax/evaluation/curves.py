"""Training curves of a run: which metrics to draw, one chart per metric, one line per stage."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from bigssl_jax.evaluation.figures import MAX_SERIES, Series, line_chart
from bigssl_jax.evaluation.workdir import Run, Stage


class Chart(NamedTuple):
    """What to draw of a metric.

    Attributes:
      part: last part of the metric's name.
      title: of the chart.
      percent: whether it is a fraction.
      from_zero: whether the axis starts at 0.
      reference: last part of a metric drawn dashed beside it.
    """

    part: str
    title: str
    percent: bool = False
    from_zero: bool = False
    reference: str = ''


# In the order of the page.
CHARTS = (
    Chart('loss', 'Loss'),
    Chart('masked_accuracy', 'Masked accuracy', percent=True, reference='chance'),
    Chart('code_perplexity', 'Code perplexity', from_zero=True),
    Chart('codes_used', 'Codes used', percent=True),
    Chart('masked_fraction', 'Masked fraction', percent=True),
    Chart('wer', 'WER on the dev set', percent=True),
    Chart('cer', 'CER on the dev set', percent=True),
    Chart('word_perplexity', 'Perplexity per word'),
    Chart('tokens_per_second', 'Tokens per second', from_zero=True),
    Chart('audio_seconds_per_second', 'Audio seconds per second', from_zero=True),
    Chart('grad_norm', 'Gradient norm', from_zero=True),
)


def training_curves(run: Run) -> list[dict[str, Any]]:
    """Charts by kind of stage: [{'kind', 'stages', 'charts': [{'title', 'legend', 'svg'}]}].

    A stage keeps its colour over all charts of its kind; after MAX_SERIES stages the page says
    which ones are left out.
    """
    groups = []
    for kind in dict.fromkeys(stage.kind for stage in run.stages if stage.metrics):
        stages = [stage for stage in run.stages if stage.kind == kind and stage.metrics]
        shown = stages[:MAX_SERIES]
        charts = [
            drawn
            for chart in CHARTS
            for key in _keys(shown, chart.part)
            if (drawn := _draw(shown, key, chart)) is not None
        ]
        if charts:
            groups.append({'kind': kind, 'charts': charts, 'left_out': stages[MAX_SERIES:]})
    return groups


def _keys(stages: Sequence[Stage], part: str) -> list[str]:
    """Metric names that end in `part`, such as 'loss' and 'best_rq/loss'."""
    ending = re.compile(rf'(^|.*/|dev_){part}$')
    names = dict.fromkeys(name for s in stages for line in s.metrics for name in line)
    found = [name for name in names if ending.match(name)]
    # With a single objective its loss is the whole loss.
    same = part in found and all(
        line[name] == line.get(part)
        for s in stages
        for line in s.metrics
        for name in found
        if name in line
    )
    return [part] if same else found


def _draw(stages: Sequence[Stage], key: str, chart: Chart) -> dict[str, Any] | None:
    """One metric over steps, a line per stage; None without a single number."""
    prefix, slash, _ = key.rpartition('/')
    series = []
    for colour, stage in enumerate(stages):
        series += _series(stage, key, stage.name, colour, False)
        if chart.reference:
            name = f'{stage.name}, {chart.reference}'
            series += _series(stage, f'{prefix}{slash}{chart.reference}', name, colour, True)
    if not series:
        return None
    title = f'{chart.title} ({prefix})' if prefix not in ('', 'dev') else chart.title
    legend = [
        {
            'name': one.name,
            'colour': one.colour + 1,
            'dashed': one.dashed,
            'last': _number(one.y[-1], chart.percent),
        }
        for one in series
    ]
    svg = line_chart(
        series, f'{title} by training step', 'step', chart.percent, from_zero=chart.from_zero
    )
    return {'title': title, 'legend': legend, 'svg': svg}


def _number(value: float, percent: bool) -> str:
    if percent:
        return f'{100 * value:.1f} %'
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def _series(stage: Stage, key: str, name: str, colour: int, dashed: bool) -> list[Series]:
    """The metric as a line in a list, [] when the stage has none."""
    points = [
        (line['step'], line[key])
        for line in stage.metrics
        if isinstance(line.get(key), int | float) and isinstance(line.get('step'), int)
    ]
    if not points:
        return []
    x, y = zip(*points, strict=True)
    return [Series(name, x, y, colour, dashed)]
