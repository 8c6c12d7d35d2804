"""Training curves of a run: which metrics to draw, one chart per metric, one line per stage."""

import re
from collections.abc import Sequence
from typing import Any

from bigssl_jax.evaluation.figures import MAX_SERIES, Series, line_chart
from bigssl_jax.evaluation.workdir import Run, Stage

# (last part of a metric's name, title, whether it is a fraction), in the order of the page.
CHARTS = (
    ('loss', 'Loss', False),
    ('masked_accuracy', 'Masked accuracy', True),
    ('code_perplexity', 'Code perplexity', False),
    ('codes_used', 'Codes used', True),
    ('masked_fraction', 'Masked fraction', True),
    ('wer', 'WER on the dev set', True),
    ('cer', 'CER on the dev set', True),
    ('audio_seconds_per_second', 'Audio seconds per second', False),
    ('grad_norm', 'Gradient norm', False),
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
            chart
            for part, title, percent in CHARTS
            for key in _keys(shown, part)
            if (chart := _chart(shown, key, title, percent)) is not None
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


def _chart(stages: Sequence[Stage], key: str, title: str, percent: bool) -> dict[str, Any] | None:
    """One metric over steps; None without a single number."""
    series = []
    for colour, stage in enumerate(stages):
        points = [
            (line['step'], line[key])
            for line in stage.metrics
            if isinstance(line.get(key), int | float) and isinstance(line.get('step'), int)
        ]
        if points:
            x, y = zip(*points, strict=True)
            series.append(Series(stage.name, x, y, colour))
    if not series:
        return None
    objective, _, _ = key.rpartition('/')
    named = f'{title} ({objective})' if objective not in ('', 'dev') else title
    legend = [
        {
            'name': one.name,
            'colour': one.colour + 1,
            'last': f'{100 * one.y[-1]:.1f} %' if percent else f'{one.y[-1]:.4g}',
        }
        for one in series
    ]
    svg = line_chart(series, f'{named} by training step', 'step', percent=percent)
    return {'title': named, 'legend': legend, 'svg': svg}
