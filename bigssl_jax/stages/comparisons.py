"""The field `compare` of an evaluate stage: pairs of systems for paired tests.

'teacher'           a model that this stage scores
'greedy/teacher'    what the stage `greedy` before it heard with that model, on the same sets
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from bigssl_jax.config import ConfigError, in_short


def other_stages(stage: Mapping[str, Any]) -> list[str]:
    """The stages before this one whose hypotheses its comparisons use."""
    names = [name for pair in stage.get('compare', ()) for name in pair]
    return [name.rpartition('/')[0] for name in names if '/' in name]


def check_pairs(field: str, pairs: Any) -> None:
    """Checks that comparisons are pairs of names.

    Raises:
      ConfigError: one is not.
    """
    for pair in pairs:
        words = isinstance(pair, tuple) and all(isinstance(name, str) for name in pair)
        if not words or len(pair) != 2:
            raise ConfigError(
                f'config field {field} has {in_short(pair)}; each entry is a pair of models'
            )


def check_compare(name: str, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks the comparisons of evaluate stage `name`; the stages they name are known to exist.

    Raises:
      ConfigError: a model is not scored, or not on all sets.
    """
    field, stage = f'config field stages.{name}.compare', stages[name]
    for pair in stage['compare']:
        for system in pair:
            other, slash, model = system.rpartition('/')
            scored = stages[other] if slash else stage
            if model not in scored['models']:
                raise ConfigError(
                    f'{field} is {system!r}, which is not defined; defined:'
                    f' {sorted(scored["models"])}'
                )
            missing = sorted(set(stage['sets']) - set(scored['sets']))
            if missing:
                raise ConfigError(
                    f'{field} is {system!r}, but stages.{other}.sets lacks {missing[0]!r}; add it'
                )


def read_hypotheses(workdir: pathlib.Path, system: str, set_name: str) -> list[dict[str, Any]]:
    """The lines of 'stage/model' on a set, in the selection's order."""
    stage, _, model = system.rpartition('/')
    path = workdir / stage / f'hypotheses-{set_name}.jsonl'
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if line['model'] == model]
