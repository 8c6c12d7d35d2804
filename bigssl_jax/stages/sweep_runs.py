"""From the points of a sweep to runs: configs that are checked, in folders of their own.

    point --overrides--> config --hash--> folder of the workdir

A run belongs to the folder that holds its config, found by hash, so a changed sweep file keeps what
is done; a folder of the name that a new run would get, but of another config, is an error.  What
decides only where things lie or how fast they go (`data_dir`, `compute`) is no part of the hash
unless the sweep varies it.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bigssl_jax import config as config_lib
from bigssl_jax import sweeps
from bigssl_jax.config import ConfigError, config_hash, to_dict
from bigssl_jax.overrides import apply_overrides
from bigssl_jax.stages import artefacts, schema

# Top-level fields that decide where and how fast, not what.
CIRCUMSTANCES = ('data_dir', 'compute')


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of a sweep as a run.

    Attributes:
      name: its folder's name.
      point: path -> value.
      experiment: `FILE[:ARG]`.
      overrides: (path, text) of all `--config.PATH=TEXT` words.
      config: resolved.
      hash: of what its results follow from; the name of its config.
    """

    name: str
    point: Mapping[str, Any]
    experiment: str
    overrides: tuple[tuple[str, str], ...]
    config: Mapping[str, Any]
    hash: str

    def command(self, directory: pathlib.Path) -> list[str]:
        """The words of `bigssl run`."""
        overrides = [f'--config.{path}={text}' for path, text in self.overrides]
        start = [sys.executable, '-m', 'bigssl_jax', 'run', '--config', self.experiment]
        return [*start, '--workdir', str(directory), *overrides]


# ---------------------------------------------------------------------------------------------
# from points to configs


def make_runs(
    experiment: str, points: Sequence[sweeps.Point], overrides: Sequence[tuple[str, str]] = ()
) -> list[Run]:
    """The runs of a sweep, every config resolved and checked.

    Points of equal configs make one run, the first of them; a line on the output says so.

    Args:
      experiment: `FILE[:ARG]`.
      points: of `sweeps.check_space`.
      overrides: (path, text) for all runs.

    Raises:
      ConfigError: names the run and the field.
    """
    path, colon, argument = experiment.partition(':')
    swept = {name for point in points for name in point}
    if colon and sweeps.ARGUMENT in swept:
        raise ConfigError(f'--config {experiment}: the sweep varies the argument; leave out :ARG')
    for name, text in overrides:
        if name in swept:
            raise ConfigError(f'--config.{name}={text}: the sweep varies this field')
    located = str(pathlib.Path(path).absolute()) if pathlib.Path(path).exists() else path
    runs: dict[str, Run] = {}
    for name, point in zip(sweeps.point_names(points), points, strict=True):
        given = str(point.get(sweeps.ARGUMENT, argument))
        try:
            run = _make_run(name, point, f'{located}:{given}' if given else located, overrides)
        except ConfigError as error:
            raise ConfigError(f'run {name}: {error}') from error
        run = dataclasses.replace(run, hash=config_hash(identity(run.config, swept)))
        if run.hash in runs:
            print(f'{name} has the config of {runs[run.hash].name}: run once')
        runs.setdefault(run.hash, run)
    return list(runs.values())


def _make_run(
    name: str,
    point: Mapping[str, Any],
    experiment: str,
    overrides: Sequence[tuple[str, str]],
) -> Run:
    config = config_lib.load(experiment)
    fields = schema.resolve(config)
    values = {path: value for path, value in point.items() if path != sweeps.ARGUMENT}
    texts = [(path, _texts(value)) for path, value in values.items()]
    given = [(path, forms[0]) for path, forms in texts]
    changed = apply_overrides(config, (*overrides, *given), fields)
    # A field without a type reads '5' as a number; then the text needs its quotes.
    given = [
        (path, forms[0] if _get(changed, path) == values[path] else forms[-1])
        for path, forms in texts
    ]
    changed = apply_overrides(config, (*overrides, *given), fields)
    for path, value in values.items():
        if _get(changed, path) != value:
            raise ConfigError(
                f'config field {path} cannot be {value!r} ({type(value).__name__}): it became'
                f' {_get(changed, path)!r}'
            )
    return Run(name, point, experiment, (*overrides, *given), schema.resolve(changed), '')


def _texts(value: Any) -> tuple[str, ...]:
    """How a value may be written on a command line, the likeliest first."""
    return (value, repr(value)) if isinstance(value, str) else (repr(value),)


def _get(config: Any, path: str) -> Any:
    for name in path.split('.'):
        config = config[name]
    return to_dict({'value': config})['value']


def identity(config: Mapping[str, Any], swept: Collection[str]) -> dict[str, Any]:
    """A resolved config without the circumstances that the sweep does not vary."""
    varied = {path.split('.')[0] for path in swept}
    return {
        name: value for name, value in config.items() if name not in CIRCUMSTANCES or name in varied
    }


# ---------------------------------------------------------------------------------------------
# from configs to folders


def place_runs(
    runs: Sequence[Run], workdir: pathlib.Path, swept: Collection[str]
) -> tuple[list[Run], list[str]]:
    """Gives every run its folder's name and what the runs share.

    Returns:
      The runs, and the names of folders of other configs, which stay as they are.

    Raises:
      ConfigError: a new run's folder holds something else; or two runs would share a corpus's
        folder and not its config.
    """
    if (workdir / 'config.json').exists():
        raise ConfigError(f'--workdir {workdir} is the workdir of a single run; name another')
    folders: dict[str, str] = {}
    for folder in sorted(workdir.iterdir()) if workdir.is_dir() else ():
        there = _config_in(folder)
        if there is not None:
            folders.setdefault(config_hash(identity(there, swept)), folder.name)
    placed = []
    for run in runs:
        if run.hash in folders:
            placed.append(dataclasses.replace(run, name=folders.pop(run.hash)))
            continue
        _check_new(workdir / run.name, identity(run.config, swept), swept)
        placed.append(run)
    several = len({config_hash(run.config['corpora']) for run in runs}) > 1
    placed = [_with_shared_folders(run, workdir, several) for run in placed]
    _check_corpora(placed)
    return placed, sorted(folders.values())


def _config_in(folder: pathlib.Path) -> dict[str, Any] | None:
    """The config of the run in a folder: what has run there, or what was to run."""
    for name in ('config.json', 'point.json'):
        found = artefacts.read_json(folder / name)
        if isinstance(found, Mapping) and isinstance(found.get('config'), Mapping):
            return dict(found['config'])
    return None


def _check_new(folder: pathlib.Path, wanted: Mapping[str, Any], swept: Collection[str]) -> None:
    there = _config_in(folder)
    if there is not None:
        was = json.loads(json.dumps(identity(there, swept)))
        fields = artefacts.differences(was, json.loads(json.dumps(wanted)))
        shown = '; '.join(fields[:4]) + (f'; and {len(fields) - 4} more' if fields[4:] else '')
        raise ConfigError(
            f'{folder} was made by another config ({shown}); use another --workdir, or move'
            f' {folder} away'
        )
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f'{folder} holds other files; use another --workdir')


def _with_shared_folders(run: Run, workdir: pathlib.Path, several: bool) -> Run:
    """The run with corpora and compiled programs in the sweep's folder, where it sets no other."""
    config, given = dict(run.config), []
    if not config['data_dir']:
        corpora = workdir.absolute() / 'corpora'
        folder = corpora / config_hash(config['corpora'])[:8] if several else corpora
        given.append(('data_dir', str(folder)))
        config['data_dir'] = str(folder)
    if not config['compute']['compilation_cache']:
        cache = str(workdir.absolute() / 'compilation_cache')
        given.append(('compute.compilation_cache', cache))
        config['compute'] = {**config['compute'], 'compilation_cache': cache}
    # An override that says '' stands in the way of ours: a path may be given once.
    named = {path for path, _ in given}
    kept = [pair for pair in run.overrides if pair[0] not in named]
    return dataclasses.replace(run, overrides=(*kept, *given), config=config)


def _check_corpora(runs: Sequence[Run]) -> None:
    owners: dict[tuple[str, str], Run] = {}
    for run in runs:
        for name, fields in run.config['corpora'].items():
            owner = owners.setdefault((run.config['data_dir'], name), run)
            if owner.config['corpora'][name] != fields:
                raise ConfigError(
                    f'runs {owner.name} and {run.name} prepare different corpora.{name} in data_dir'
                    f" {run.config['data_dir']!r}; leave data_dir '' or vary it as well"
                )
