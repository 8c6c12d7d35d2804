"""The fields of a pseudo_label stage: defaults and checks."""

from collections.abc import Mapping
from typing import Any

from bigssl_jax.config import ConfigError
from bigssl_jax.stages.decoder_fields import DECODER

PSEUDO_LABEL: dict[str, Any] = {
    'kind': '',
    'teacher': '',
    'selection': '',
    'filter': None,
    'decoder': DECODER,
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
    if not 0 <= stage['max_quarantine'] <= 1:
        raise ConfigError(
            f'config field {field}.max_quarantine is {stage["max_quarantine"]!r}; it must be a'
            ' share of the utterances: 0 to 1'
        )
