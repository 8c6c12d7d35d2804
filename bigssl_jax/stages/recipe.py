"""Runs a recipe: the prepare stage, then the config's stages in order.

Each stage is a module with `run(context) -> (outputs, results)`.  The recipe checks the whole
config and every existing folder before any work, skips what is done, and writes `done.json` when a
stage returns.

Several processes run the same stages together.  What is read to decide and what is written once is
process 0's business: the others wait for it, and when it fails, they end with its reason.
"""

import contextlib
import datetime
import importlib
import json
import os
import pathlib
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import bigssl_jax
from bigssl_jax.config import ConfigError, UserError, config_hash, unknown_field
from bigssl_jax.parallel import make_mesh
from bigssl_jax.parallel.distributed import (
    WORK_SECONDS,
    ProcessesDisagree,
    barrier,
    from_primary,
    gather,
    is_primary,
    process_count,
    process_index,
    say,
)
from bigssl_jax.parallel.startup import cpu_cores, enable_compilation_cache
from bigssl_jax.stages import artefacts, schema
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.shared_encoder import check_shared_encoder
from bigssl_jax.training.metrics import clock
from bigssl_jax.training.signals import stop_on_signals

SEEN_SECONDS = 60.0  # a network file system may show another machine's file that late


def run_recipe(
    config: Any,
    workdir: str | os.PathLike,
    stages: Sequence[str] | None = None,
    accept: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs an experiment's stages, or those named, and returns a summary.

    Args:
      config: the experiment, a ConfigDict or a mapping.
      workdir: its folder; made when missing.
      stages: only these (their inputs must be done); default: the whole recipe.
      accept: stages whose training goes on though their config, corpora or tokenizer are not those
        it began with.

    Returns:
      {'name', 'workdir', 'config_hash', 'stages': {stage: results}, 'ran': stages that had work};
      `stages` in process 0 alone.

    Raises:
      UserError: a bad config, a workdir of another config, unusable data.
      Stopped: a signal asked for a stop; the same command continues.
    """
    resolved = schema.resolve(config)
    workdir = pathlib.Path(workdir).absolute()
    wanted = wanted_stages(resolved, stages)
    _check_same({'config': config_hash(resolved), '--stages': wanted, '--workdir': str(workdir)})
    _check_same({'--accept': list(accept)})
    for name in accept:
        _check_acceptable(resolved, workdir, wanted, name)
    contexts = {name: check_folder(resolved, workdir, name, accept) for name in wanted}
    if is_primary():
        artefacts.write_json(
            workdir / 'config.json',
            {
                'config': resolved,
                'hash': config_hash(resolved),
                'version': bigssl_jax.__version__,
                'machine': machine_class(),
            },
        )
    pending = from_primary(
        'pending', [name for name in wanted if artefacts.read_done(workdir / name) is None]
    )
    _check_shared(workdir, resolved)
    if pending:
        cache = resolved['compute']['compilation_cache'] or str(workdir / 'compilation_cache')
        enable_compilation_cache(cache)
        _announce(resolved, pending, wanted)
        mesh = make_mesh(resolved['compute']['mesh'])
        with stop_on_signals() as stop:
            for name in wanted:
                if name in pending:
                    later = sum(
                        schema.training_audio_seconds(resolved, n)
                        for n in pending[pending.index(name) + 1 :]
                    )
                    _run_stage(contexts[name] | {'mesh': mesh, 'stop': stop, 'later': later})
                # In order, so that nothing is built on a stage that is out of date.
                _check_current(workdir, name)
    else:
        for name in wanted:
            _check_current(workdir, name)
        say(f'all {len(wanted)} stages of {resolved["name"]!r} are done: {", ".join(wanted)}')
    results = {}
    for name in wanted if is_primary() else ():
        done = artefacts.read_done(workdir / name)
        results[name] = done['results'] if done else None
    return {
        'name': resolved['name'],
        'workdir': str(workdir),
        'config_hash': config_hash(resolved),
        'stages': results,
        'ran': pending,
    }


def wanted_stages(config: Mapping[str, Any], stages: Sequence[str] | None) -> list[str]:
    """The stages to run, in the order of the recipe, of a resolved config.

    Raises:
      ConfigError: a name in `stages` that the recipe does not have.
    """
    recipe = ['prepare', *config['recipe']]
    for name in stages or ():
        if name not in recipe:
            raise unknown_field('recipe', name, recipe)
    return [name for name in recipe if not stages or name in stages]


def _check_acceptable(
    config: Mapping[str, Any], workdir: pathlib.Path, wanted: Sequence[str], name: str
) -> None:
    """Refuses `--accept` of what is no unfinished training."""
    trains = [
        stage for stage in wanted if stage != 'prepare' and 'steps' in config['stages'][stage]
    ]
    if name not in trains:
        raise ConfigError(
            f'--accept {name}: allowed are the stages of this command that train:'
            f' {", ".join(trains) or "none"}'
        )
    if artefacts.read_done(workdir / name):
        raise ConfigError(
            f'--accept {name}: {workdir / name} is finished; delete it to make it again'
        )


def check_folder(
    config: Mapping[str, Any], workdir: pathlib.Path, name: str, accept: Sequence[str] = ()
) -> dict[str, Any]:
    """Refuses a folder of another config, and a shared encoder that does not fit."""
    check_shared_encoder(config, name)
    if name not in accept:
        artefacts.check(workdir / name, schema.identity_of(config, name))
    if workdir.exists() and not os.access(workdir, os.W_OK):
        raise UserError(f'--workdir {workdir} is read-only; name a folder that can be written')
    return {'config': config, 'workdir': workdir, 'name': name, 'accept': name in accept}


def _check_same(given: Mapping[str, Any]) -> None:
    """Refuses processes that were not started with the same command."""
    for what, values in given.items():
        for process, value in enumerate(gather(f'same {what}', values)):
            if value != json.loads(json.dumps(values)):
                raise ProcessesDisagree(
                    f'process {process} was started with another {what} than process'
                    f' {process_index()}; give all processes the same command'
                )


def _check_shared(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuses a workdir in which a process does not see what process 0 has written."""
    limit = time.monotonic() + SEEN_SECONDS
    while not is_primary():
        seen = artefacts.read_json(workdir / 'config.json')
        if seen and seen['hash'] == config_hash(config):
            return
        if time.monotonic() > limit:
            raise ProcessesDisagree(
                f'--workdir {workdir} on process {process_index()} does not show what process 0'
                ' has written there; name a folder on a file system that all processes share'
            )
        time.sleep(0.2)


def _check_current(workdir: pathlib.Path, name: str) -> None:
    """Refuses a finished stage whose inputs have been made again, differently, since."""
    if not is_primary():
        return
    done = artefacts.read_done(workdir / name)
    assert done is not None
    for upstream, recorded in done['inputs'].items():
        now = artefacts.read_done(workdir / upstream)
        if now is None or artefacts.output_hash(now) != recorded:
            raise ConfigError(
                f'{workdir / name} was made from another {upstream!r} than the one that is there'
                f' now; delete {workdir / name} to make it again'
            )


def _announce(config: Mapping[str, Any], pending: Sequence[str], wanted: Sequence[str]) -> None:
    audio = sum(schema.training_audio_seconds(config, name) for name in pending)
    speed = config['compute']['expected_speed'] * cpu_cores()
    device = jax.devices()[0].platform
    about = f', about {clock(audio / speed)} of training' if device == 'cpu' and audio else ''
    together = f' of {process_count()} processes' if process_count() > 1 else ''
    say(
        f'{config["name"]}: {len(pending)} of {len(wanted)} stages to do'
        f' ({", ".join(pending)}){about} on {jax.device_count()} {device} devices{together}'
    )


def _run_stage(given: Mapping[str, Any]) -> None:
    name, config, workdir = given['name'], given['config'], given['workdir']
    context = Context(
        config, name, workdir, given['mesh'], given['stop'], given['later'], given['accept']
    )
    inputs = {}
    if is_primary():
        inputs = {} if name == 'prepare' else inputs_of(context)
        take = artefacts.accept if context.accept else artefacts.claim
        take(context.directory, context.identity)
    barrier(f'{name} begins')
    kind = 'prepare' if name == 'prepare' else context.fields['kind']
    before = (artefacts.read_json(context.directory / 'elapsed.json') or {'seconds': 0.0})[
        'seconds'
    ]
    started = time.monotonic()
    try:
        outputs, results = importlib.import_module(f'bigssl_jax.stages.{kind}').run(context)
    finally:
        seconds = before + time.monotonic() - started
        if is_primary():
            with contextlib.suppress(UserError):  # a full disk: whoever needed it has said so
                artefacts.write_json(
                    context.directory / 'elapsed.json', {'seconds': round(seconds, 1)}
                )
    if is_primary():
        write_done(context, kind, inputs, outputs, results, seconds)
    barrier(f'{name} ends', WORK_SECONDS)
    say(f'{name}: done in {clock(seconds)}')


def write_done(
    context: Context,
    kind: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, Any],
    results: Mapping[str, Any],
    seconds: float,
) -> None:
    """Marks a stage as finished."""
    artefacts.write_json(
        context.directory / 'done.json',
        {
            'stage': context.name,
            'kind': kind,
            'identity': context.identity_hash(),
            'config_hash': config_hash(context.config),
            'inputs': inputs,
            'outputs': outputs,
            'results': results,
            'seconds': round(seconds, 1),
            'finished_at': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        },
    )


def inputs_of(context: Context) -> dict[str, str]:
    """Hashes of what a stage is made from; ConfigError when some of it is not finished."""
    try:
        return context.input_hashes()
    except RuntimeError as error:
        raise ConfigError(f'{context.name}: {error}; run it first (--stages)') from error


def machine_class() -> str:
    """A description of the machine that names no host: architecture, cores, accelerator."""
    device = jax.devices()[0]
    kind = '' if device.platform == 'cpu' else f', {jax.device_count()} x {device.device_kind}'
    return f'{platform.machine()}, {cpu_cores()} CPU cores{kind}'
