"""The fields of a pseudo_label stage: defaults and checks."""

import pathlib
from collections.abc import Mapping
from typing import Any

from bigssl_jax.config import ConfigError
from bigssl_jax.data.label_filters import check_filter
from bigssl_jax.objectives import TRANSCRIPT
from bigssl_jax.stages.decoder_fields import DECODER

PSEUDO_LABEL: dict[str, Any] = {
    'kind': '',
    'teacher': '',
    'selection': '',
    'filter': None,
    'decoder': DECODER,
    # Of each frame, the most probable labels with their log-probabilities; 0: none. CTC alone.
    'top_k': 0,
    'batch_seconds': 128.0,
    'num_buckets': 6,
    # Audio of a part: what is written at once, and lost when a worker is killed.
    'part_hours': 1.0,
    # A worker of which nothing was seen for so long loses its part to another.
    'lease_seconds': 300.0,
    # The largest share of the utterances that may go without a label since they cannot be read or
    # decoded; more of them stop the stage.
    'max_quarantine': 0.01,
}

# Fields on which no result depends, only whether there is one: runs and workers may differ in them.
FREE = ('lease_seconds', 'max_quarantine', 'max_left_out', 'max_unknown')


def check_labelling(field: str, stage: Mapping[str, Any]) -> None:
    """Checks the numbers of a pseudo_label stage.

    Raises:
      ConfigError: one is out of its range.
    """
    for name in ('part_hours', 'lease_seconds'):
        if not stage[name] > 0:
            raise ConfigError(f'config field {field}.{name} is {stage[name]!r}; it must be above 0')
    if stage['top_k'] < 0:
        raise ConfigError(f'config field {field}.top_k is {stage["top_k"]!r}; it must be 0 or more')
    if not 0 <= stage['max_quarantine'] <= 1:
        raise ConfigError(
            f'config field {field}.max_quarantine is {stage["max_quarantine"]!r}; it must be a'
            ' share of the utterances: 0 to 1'
        )


def check_steps(field: str, steps: Any, labels: str) -> None:
    """Refuses a bad filter now: a stream would meet it when the labels are made, hours later.

    Args:
      field: where the steps stand, for messages.
      steps: of the filter, or None.
      labels: the stage that writes the labels; '' and 'text' name none.

    Raises:
      ConfigError: the steps are wrong, or there are no labels to filter.
    """
    if steps is None:
        return
    check_filter(field, steps)
    if labels in ('', 'text'):
        raise ConfigError(
            f'config field {field} needs labels of a pseudo_label stage, but labels is {labels!r};'
            ' remove the filter, or name the stage in labels'
        )


def fitted_on(steps: Any) -> list[str]:
    """The pseudo_label stages whose labels the steps of a filter are fitted on."""
    steps = (steps,) if isinstance(steps, Mapping) else steps or ()
    return [step['fit'] for step in steps if isinstance(step.get('fit'), str)]


def with_folders(steps: Any, workdir: pathlib.Path) -> Any:
    """The steps of a filter with the folders of label sets in place of their stages' names."""
    if steps is None:
        return None
    steps = (steps,) if isinstance(steps, Mapping) else steps
    return tuple(
        {**step, 'fit': str(workdir / step['fit'] / 'labels')} if fitted_on(step) else dict(step)
        for step in steps
    )


def filters_of(stage: Mapping[str, Any], name: str) -> list[tuple[str, str, Any]]:
    """(field, stage that writes the labels, steps) of every filter of stage `name`."""
    found = [('filter', name, stage['filter'])] if stage.get('filter') is not None else []
    for stream_name, stream in stage.get('streams', {}).items():
        for source, fields in stream['sources'].items():
            if fields.get('filter') is not None:
                field = f'streams.{stream_name}.sources.{source}.filter'
                found.append((field, fields['labels'], fields['filter']))
    return found


def check_labels(name: str, stages: Mapping[str, Any]) -> None:
    """Checks what stage `name` asks of a teacher: frames, and filters fitted on its own labels.

    Raises:
      ConfigError: `top_k` of a transducer, which has no posteriors of frames, or a filter fitted on
        labels that another teacher or another search wrote.
    """
    _check_top_k(name, stages)
    for field, labels, steps in filters_of(stages[name], name):
        for other in fitted_on(steps):
            for same in ('teacher', 'decoder'):
                if stages[other][same] != stages[labels][same]:
                    raise ConfigError(
                        f'config field stages.{name}.{field} is fitted on stage {other!r}, whose'
                        f' {same} is not that of {labels!r}; scores of one say nothing of the other'
                    )


def _check_top_k(name: str, stages: Mapping[str, Any]) -> None:
    stage = stages[name]
    if not stage.get('top_k'):
        return
    for given in stages[stage['teacher']]['objectives'].values():
        if given['objective'] in TRANSCRIPT and given['objective'] != 'ctc':
            raise ConfigError(
                f'config field stages.{name}.top_k is {stage["top_k"]}, but the teacher'
                f' {stage["teacher"]!r} is a transducer ({given["objective"]}), which has no'
                ' distribution of its own for a frame; set it to 0, or name a CTC teacher'
            )
