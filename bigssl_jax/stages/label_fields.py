"""The fields of a pseudo_label stage: defaults and checks."""

from collections.abc import Mapping
from typing import Any

from bigssl_jax.config import ConfigError
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

# Fields of which the labels do not depend: workers may differ in them.
FREE = ('lease_seconds', 'max_quarantine')


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


def check_top_k(name: str, stages: Mapping[str, Any]) -> None:
    """Refuses `top_k` for a teacher whose head has no posteriors of frames.

    Raises:
      ConfigError: the teacher is a transducer.
    """
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
