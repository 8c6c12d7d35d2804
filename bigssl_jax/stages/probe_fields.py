"""The fields of a probe stage, and their checks."""

import pathlib
from collections.abc import Mapping
from typing import Any

from bigssl_jax.config import ConfigError, choose, merge
from bigssl_jax.evaluation.probe import REGULARISATION
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.shared_encoder import is_path

PROBE: dict[str, Any] = {
    'kind': '',
    # Finished pretrain or finetune stages, or model folders of other workdirs ('runs/x/pretrain').
    'models': (),
    # name -> what is told apart (a column of the corpus), and the three selections.
    'tasks': {},
    # C of the logistic regressions, ascending.
    'regularisation': REGULARISATION,
    'batch_seconds': 128.0,
    'num_buckets': 6,
}

TASK: dict[str, Any] = {'field': '', 'train': '', 'dev': '', 'test': ''}
# Columns of a corpus that hold a class.
LABELS = ('speaker', 'language', 'domain', 'group')
PARTS = ('train', 'dev', 'test')


def check_probe(field: str, stage: dict[str, Any]) -> None:
    """Fills in and checks the fields of a probe stage.

    Raises:
      ConfigError: no task, an unknown column, strengths that do not ascend.
    """
    if not stage['tasks']:
        raise ConfigError(f'config field {field}.tasks is empty; name at least one task')
    tasks = {}
    for name, given in stage['tasks'].items():
        if not isinstance(given, Mapping):
            raise ConfigError(f'config field {field}.tasks.{name} is {given!r}; it must be a group')
        tasks[name] = merge(f'{field}.tasks.{name}', TASK, given)
        choose(f'{field}.tasks.{name}.field', tasks[name]['field'], LABELS)
    stage['tasks'] = tasks
    strengths = stage['regularisation']
    if not strengths or sorted({0.0, *strengths}) != [0.0, *strengths]:
        raise ConfigError(
            f'config field {field}.regularisation is {strengths!r}; allowed: positive numbers,'
            ' ascending'
        )


def probed_models(stage: Mapping[str, Any]) -> tuple[str, ...]:
    """The models as a probe stage's identity holds them: folders by the hash of what is there.

    Raises:
      UserError: a folder without a model.
    """
    return tuple(
        f'model {artefacts.model_info(pathlib.Path(name))[1]["hash"]}' if is_path(name) else name
        for name in stage['models']
    )


def probe_selections(stage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field, selection) of every selection that the tasks name."""
    return [
        (f'tasks.{name}.{part}', task[part])
        for name, task in stage.get('tasks', {}).items()
        for part in PARTS
    ]
