"""Reads a run's workdir for the result table and the report; a run may be anywhere in its recipe.

    config.json                       {config, hash, version, machine, defaults (optional)}
    <stage>/stage.json                the stage was begun
    <stage>/done.json                 {kind, results, seconds, finished_at, ...}: it is complete
    <stage>/metrics.jsonl             {step, loss, ...} per log line; training stages
    <stage>/quality.json              `confidence.label_quality`; pseudo-label stages, truth known
    <stage>/scores.json               {set: {model: {wer, cer, utterances}}}; evaluate stages
    <stage>/comparisons.json          [{set, first, second, wer, cer}]: the second against the first
    <stage>/hypotheses-<set>.jsonl    {id, model, reference, text, confidence, speaker, seconds}
    <stage>/audio/<set>/              see clips.py
    corpora/<name>/corpus.json        {rows, seconds, source, licence, ...}

Everything but config.json may be missing.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from bigssl_jax.config import UserError


class WorkdirError(UserError):
    """A folder is not the workdir of a run, or one of its files is damaged."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage has left so far.

    Attributes:
      name: its name in the recipe.
      kind: 'prepare', 'pretrain', 'finetune', 'pseudo_label', 'evaluate', ...; '' when unknown.
      directory: its folder, which may not exist yet.
      fields: its config fields.
      done: its done.json, or None.
      metrics: log lines, ascending by step.
      begun: whether it has been started.
    """

    name: str
    kind: str
    directory: pathlib.Path
    fields: Mapping[str, Any]
    done: Mapping[str, Any] | None
    metrics: list[dict[str, Any]]
    begun: bool

    @property
    def status(self) -> str:
        """'done', 'not started', or how far it is."""
        if self.done is not None:
            return 'done'
        if not self.begun:
            return 'not started'
        if self.metrics and self.fields.get('steps'):
            return f'not finished: step {self.metrics[-1]["step"]:,} of {self.fields["steps"]:,}'
        return 'not finished'


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's workdir.

    Attributes:
      path: the workdir.
      config: the resolved experiment config.
      info: config.json without the config: hash, version, machine.
      stages: in the order of the recipe.
      corpora: corpus name -> corpus.json.
    """

    path: pathlib.Path
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    stages: list[Stage]
    corpora: Mapping[str, Mapping[str, Any]]

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        return all(stage.done is not None for stage in self.stages)


def read_run(workdir: str | os.PathLike) -> Run:
    """Reads everything but the hypotheses.

    Raises:
      WorkdirError: no config.json, or a damaged file.
    """
    path = pathlib.Path(workdir)
    info = read_json(path / 'config.json')
    if info is None:
        raise WorkdirError(f'{path} is not the workdir of a run: it holds no config.json')
    if not isinstance(info, Mapping) or not isinstance(info.get('config'), Mapping):
        raise WorkdirError(f'{path / "config.json"} holds no field "config"; was it made by a run?')
    config = info['config']
    stages = [_read_stage(path, config, name) for name in ('prepare', *config.get('recipe', ()))]
    base = pathlib.Path(config.get('data_dir') or path / 'corpora')
    corpora = {name: read_json(base / name / 'corpus.json') for name in config.get('corpora', {})}
    return Run(
        path=path,
        config=config,
        info={name: value for name, value in info.items() if name != 'config'},
        stages=stages,
        corpora={name: corpus for name, corpus in corpora.items() if corpus is not None},
    )


def _read_stage(workdir: pathlib.Path, config: Mapping[str, Any], name: str) -> Stage:
    directory = workdir / name
    done = read_json(directory / 'done.json')
    fields = config.get('stages', {}).get(name, {})
    kind = 'prepare' if name == 'prepare' else (done or fields).get('kind', '')
    begun = done is not None or (directory / 'stage.json').exists()
    metrics = read_lines(directory / 'metrics.jsonl')
    return Stage(name, kind, directory, fields, done, metrics, begun or bool(metrics))


def read_json(path: pathlib.Path) -> Any:
    """A JSON file's content, or None when there is no such file.

    Raises:
      WorkdirError: the file is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise WorkdirError(f'{path} is damaged: {error}') from error


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, [] when there is no such file.

    A last line without a line end was cut short by a kill and is left out.

    Raises:
      WorkdirError: another line is not a JSON object.
    """
    if not path.is_file():
        return []
    objects = []
    *lines, _ = path.read_text('utf-8').split('\n')
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise WorkdirError(f'{path}:{number} is damaged: {error}') from error
        if not isinstance(value, dict):
            raise WorkdirError(f'{path}:{number} is damaged: {line[:40]!r} is no JSON object')
        objects.append(value)
    return objects


def flatten(value: Any, path: str = '') -> dict[str, Any]:
    """Nested mappings as {'a.b': leaf}; lists of numbers and texts count as leaves."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= flatten(item, f'{path}.{name}' if path else str(name))
    return flat
