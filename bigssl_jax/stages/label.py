"""`bigssl label`: one more worker at a pseudo_label stage.

It does what `bigssl run` does in that stage and touches nothing else: the stages before it have to
be finished, and whoever finds all parts done writes `done.json`, once.  Workers know of each other
by the ledger of the label set alone.
"""

import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from bigssl_jax.config import ConfigError
from bigssl_jax.parallel.distributed import local_mesh, say
from bigssl_jax.parallel.startup import enable_compilation_cache
from bigssl_jax.stages import artefacts, pseudo_label, recipe, schema
from bigssl_jax.stages.context import Context
from bigssl_jax.training.metrics import clock
from bigssl_jax.training.signals import stop_on_signals


def label_command(config: Any, workdir: str | os.PathLike, stage: str | None) -> dict[str, Any]:
    """Works on a pseudo_label stage until its set is complete.

    Args:
      config: the experiment, as for `run_recipe`.
      workdir: of the run; its teacher is finished.
      stage: name of the stage; None: the first in the recipe that is not finished.

    Returns:
      {'stage', 'outputs', 'results'}, as in done.json.

    Raises:
      UserError: no such stage, a teacher that is not finished, a workdir of another config.
      Stopped: a signal asked for a stop; the same command continues.
    """
    resolved = schema.resolve(config)
    workdir = pathlib.Path(workdir).absolute()
    name = _stage_name(resolved, workdir, stage)
    for folder in ('prepare', *schema.upstream_of(resolved['stages'][name]), name):
        recipe.check_folder(resolved, workdir, folder)
    done = artefacts.read_done(workdir / name)
    if done is None:
        started = time.monotonic()
        done = _work(resolved, workdir, name)
        say(f'{name}: done in {clock(time.monotonic() - started)}')
    else:
        say(f'{name} is done')
    return {'stage': name, 'outputs': done['outputs'], 'results': done['results']}


def _stage_name(config: Mapping[str, Any], workdir: pathlib.Path, stage: str | None) -> str:
    names = [n for n in config['recipe'] if config['stages'][n]['kind'] == 'pseudo_label']
    if not names:
        raise ConfigError(
            f'the recipe of {config["name"]!r} has no pseudo_label stage; its stages are'
            f' {", ".join(config["recipe"])}'
        )
    if stage is not None:
        if stage not in names:
            raise ConfigError(
                f'--stage {stage!r} is no pseudo_label stage of this recipe; there are'
                f' {", ".join(names)}'
            )
        return stage
    unfinished = [n for n in names if artefacts.read_done(workdir / n) is None]
    return (unfinished or names[-1:])[0]


def _work(config: Mapping[str, Any], workdir: pathlib.Path, name: str) -> dict[str, Any]:
    with stop_on_signals() as stop:
        cache = config['compute']['compilation_cache'] or str(workdir / 'compilation_cache')
        enable_compilation_cache(cache)
        context = Context(config, name, workdir, local_mesh(config['compute']['mesh']), stop)
        inputs = recipe.inputs_of(context)
        artefacts.claim(context.directory, context.identity)
        started = time.monotonic()
        outputs, results = pseudo_label.run(context)
        seconds = time.monotonic() - started
        if artefacts.read_done(context.directory) is None:
            recipe.write_done(context, 'pseudo_label', inputs, outputs, results, seconds)
    done = artefacts.read_done(context.directory)
    assert done is not None
    return done
