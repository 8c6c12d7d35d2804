"""`bigssl sweep`: lists, starts, resumes and collects many runs of one experiment.

sweep file --get_sweep()--> points --sweep_runs--> runs, all checked before anything starts
    --sweep_processes--> finished workdirs --sweep_table--> sweep.json, sweep.csv, a table

<workdir>/corpora/              prepared once for all runs, unless the config sets data_dir
<workdir>/compilation_cache/    likewise
<workdir>/<run>/                the workdir of a run
<workdir>/<run>/point.json      its point and config; log.txt, status.json: sweep_processes.py
"""

import dataclasses
import pathlib
import shlex
import shutil
import string
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bigssl_jax import config as config_lib
from bigssl_jax import sweeps
from bigssl_jax.config import ConfigError, UserError, config_hash
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.folder import file_lock, write_atomically
from bigssl_jax.evaluation import sweep_table
from bigssl_jax.evaluation.workdir import Run as Workdir
from bigssl_jax.evaluation.workdir import read_run
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.sweep_board import audio_hours, open_board, outcome, progress_of
from bigssl_jax.stages.sweep_processes import Job, Slot, recall, run_jobs, share_machine
from bigssl_jax.stages.sweep_runs import Run, identity, make_runs, place_runs

LOCK = '.sweep.lock'


def make_job(run: Run, workdir: pathlib.Path, launcher: str, at_work: bool) -> Job:
    """The run as a job in the state that its folder says; `at_work`: a sweep is, in `workdir`."""
    directory = workdir / run.name
    values = {
        'name': run.name,
        'job': f'run-{run.name.split("-")[0]}-{run.hash[:8]}',
        'workdir': str(directory.absolute()),
        'log': str(directory.absolute() / 'job.txt'),
    }
    job = Job(
        name=run.name,
        words=launch_words(launcher, run.command(directory.absolute()), values),
        directory=directory,
        audio_seconds=3600 * audio_hours(run.config),
    )
    return recall(job, is_finished(directory), at_work)


def is_at_work(workdir: pathlib.Path) -> bool:
    """Whether another sweep runs in the folder, or commands of one that was killed."""
    if not (workdir / LOCK).exists():
        return False
    try:
        with file_lock(str(workdir / LOCK)):
            return False
    except DataError:
        return True


def is_finished(directory: pathlib.Path) -> bool:
    """Whether every stage of the run in a folder is done."""
    return (directory / 'config.json').exists() and read_run(directory).finished


def launch_words(launcher: str, command: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """A command, or the words of `--launcher` around it; no shell reads them.

    Args:
      launcher: `{command}` as a word of its own becomes the words of the command; within a word, as
        in `--wrap={command}`, one text that a shell would read as those words.  '' is the command.
      command: its words.
      values: what other placeholders stand for: `{name}`, `{job}` (lower-case letters, digits and
        '-' only), `{workdir}`, `{log}`.

    Raises:
      UserError: unbalanced quotes, no or an unknown placeholder.
    """
    if not launcher:
        return list(command)
    values = {**values, 'command': shlex.join(command)}
    words: list[str] = []
    try:
        for word in shlex.split(launcher):
            words += command if word == '{command}' else [_fill(word, values)]
        used = [f[1] for word in shlex.split(launcher) for f in string.Formatter().parse(word)]
    except ValueError as error:
        raise UserError(f'--launcher {launcher!r}: {error}') from error
    if 'command' not in used:
        raise UserError(f'--launcher {launcher!r} runs nothing: it needs {"{command}"}')
    return words


def _fill(word: str, values: Mapping[str, str]) -> str:
    for _, field, form, conversion in string.Formatter().parse(word):
        if field is not None and (field not in values or form or conversion):
            allowed = ', '.join(f'{{{name}}}' for name in values)
            raise ValueError(f'unknown placeholder {{{field}}}; there are {allowed}')
    return word.format(**values)


# ---------------------------------------------------------------------------------------------
# results


def collect(runs: Sequence[Run], jobs: Sequence[Job], metric: str) -> dict[str, Any]:
    """Reads all results; writes nothing.

    Args:
      runs: the sweep.
      jobs: their states.
      metric: see `sweep_table.parse_metric`; '' chooses one, once a run is done.

    Returns:
      {'metric', 'highest_first', 'runs': Row.to_json() + 'point' and 'hash', in order of it}.
    """
    points = [run.point for run in runs]
    paths = sweeps.varied_paths(points)
    labels = sweeps.short_names(paths)
    swept = {path for point in points for path in point}
    differs = sweep_table.differing_fields([identity(run.config, swept) for run in runs])
    rows = []
    finished: list[Workdir] = []
    for run, job, fields in zip(runs, jobs, differs, strict=True):
        read = _read(run, job.directory, swept)
        metrics, intervals = sweep_table.metrics_of(read) if read else ({}, {})
        finished += [read] if read and job.state == 'done' else []
        values = {labels[path]: run.point[path] for path in paths if path in run.point}
        argument = {k: v for k, v in run.point.items() if k == sweeps.ARGUMENT and k in paths}
        rows.append(
            sweep_table.Row(
                run.name, job.state, values, argument | fields, metrics, intervals,
                round(job.running_seconds, 1),
            )
        )  # fmt: skip
    if not metric and finished:
        metric = sweep_table.default_metric(finished[0])
    order = sweep_table.parse_metric(metric)
    rows = sweep_table.sort_rows(rows, order)
    by_name = {run.name: {'point': dict(run.point), 'hash': run.hash} for run in runs}
    return {
        'metric': order.name,
        'highest_first': order.highest,
        'runs': [row.to_json() | by_name[row.name] for row in rows],
    }


def _read(run: Run, directory: pathlib.Path, swept: Collection[str]) -> Workdir | None:
    """What a run has left; None before it has begun."""
    if not (directory / 'config.json').exists():
        return None
    found = read_run(directory)
    if config_hash(identity(found.config, swept)) != run.hash:
        raise ConfigError(
            f'{directory} was made by another config than that of the sweep; has the experiment'
            ' changed meanwhile? Use another --workdir'
        )
    return found


def write_results(workdir: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes sweep.json and sweep.csv atomically."""
    artefacts.write_json(workdir / 'sweep.json', result)
    text = sweep_table.to_csv(_rows(result))
    write_atomically(str(workdir / 'sweep.csv'), text.encode())


def _rows(result: Mapping[str, Any]) -> list[sweep_table.Row]:
    names = [field.name for field in dataclasses.fields(sweep_table.Row)]
    return [sweep_table.Row(**{name: row[name] for name in names}) for row in result['runs']]


# ---------------------------------------------------------------------------------------------
# the command


def sweep_command(
    experiment: str,
    sweep_file: str,
    overrides: Sequence[tuple[str, str]],
    workdir: str | None,
    *,
    action: str = 'run',
    jobs: int = 1,
    launcher: str = '',
    retry: bool = False,
    metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """`bigssl sweep`: prints what it does, returns it as plain data.

    Args:
      experiment: `FILE[:ARG]`.
      sweep_file: `FILE[:ARG]` with `get_sweep`.
      overrides: (path, text) for all runs.
      workdir: the sweep's folder; needed for all but 'list'.
      action: 'run', 'list' or 'collect'.
      jobs: runs at a time.
      launcher: see `launch_words`; '' runs on this machine.
      retry: start failed runs, and submitted ones that are not done, again.
      metrics: to show; the first sorts.

    Returns:
      For 'list' {'runs': [{'name', 'point', 'hash', 'state', 'audio_hours'}]}, else that of
      `collect`, with 'workdir' and 'states' (counts).

    Raises:
      UserError: a bad sweep file or config, a folder of another config, a sweep at work there.
    """
    points = sweeps.check_space(config_lib.call_file('--sweep', sweep_file, 'get_sweep'))
    runs = make_runs(experiment, points, overrides)
    others: list[str] = []
    directory = pathlib.Path(workdir or '')
    if workdir:
        runs, others = place_runs(runs, directory, {path for point in points for path in point})
    elif action != 'list':
        raise UserError(f'bigssl sweep needs --workdir DIR to {action}; --list does without')
    at_work = action != 'run' and is_at_work(directory)
    # Without a folder nothing is known of any run.
    planned = [make_job(run, directory, launcher, at_work) for run in runs] if workdir else []
    if others:
        print(f'left alone, of other configs: {", ".join(others)}')
    if action == 'list':
        return print_list(runs, [job.state for job in planned])
    if action == 'collect' and not directory.is_dir():
        raise UserError(f'--workdir {directory}: there is no such folder; nothing has run')
    shown = [sweep_table.parse_metric(text).name for text in metrics]
    if action == 'run':
        run_sweep(runs, planned, directory, jobs, launcher, retry)
    result = collect(runs, planned, metrics[0] if metrics else '')
    result |= {'workdir': str(directory), 'states': dict(Counter(job.state for job in planned))}
    write_results(directory, result)  # first: a misspelt metric loses nothing
    sweep_table.check_metrics(_rows(result), shown)
    print_results(result, shown)
    return result


def print_results(result: Mapping[str, Any], shown: Sequence[str]) -> None:
    """Prints the table, with the metrics named (default: the one that sorts), and the best run."""
    rows, metric = _rows(result), result['metric']
    sweep_table.print_sweep_table(rows, shown or [metric] * bool(metric))
    if metric in rows[0].metrics:
        folder = pathlib.Path(result['workdir']) / rows[0].name
        print(f'best: {folder}, {metric} {sweep_table.metric_text(rows[0], metric)}')


def print_list(runs: Sequence[Run], states: Sequence[str]) -> dict[str, Any]:
    """Prints names, states (when known) and hours of training audio of all runs."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    hours = [audio_hours(run.config) for run in runs]
    table = Table('run', *(['state'] if states else []), box=SIMPLE_HEAD)
    table.add_column('hours of training audio', justify='right')
    for number, run in enumerate(runs):
        table.add_row(run.name, *states[number : number + 1], f'{hours[number]:,.1f}')
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)
    print(f'{len(runs)} runs, {sum(hours):,.1f} hours of training audio')
    known = states or ['waiting'] * len(runs)
    return {
        'runs': [
            {'name': run.name, 'point': dict(run.point), 'hash': run.hash, 'state': state,
             'audio_hours': round(spent, 3)}
            for run, state, spent in zip(runs, known, hours, strict=True)
        ]
    }  # fmt: skip


def run_sweep(
    runs: Sequence[Run],
    jobs: Sequence[Job],
    workdir: pathlib.Path,
    at_a_time: int,
    launcher: str,
    retry: bool,
) -> None:
    """Runs what is not done and sets the states of the jobs."""
    if at_a_time < 1:
        raise UserError(f'--jobs {at_a_time}: at least 1')
    again = ('waiting', 'stopped', 'running', *(('failed', 'submitted') if retry else ()))
    todo = [job for job in jobs if job.state in again]
    for job in jobs:
        if job.state in ('failed', 'submitted') and not retry:
            print('\n'.join([*outcome(job), '    --retry starts it again']))
    if not todo:
        done = sum(job.state == 'done' for job in jobs)
        print(f'{done} of {len(jobs)} runs are done, nothing to do')
        return
    if launcher and not shutil.which(todo[0].words[0]):
        raise UserError(f'--launcher: there is no command {todo[0].words[0]!r}')
    at_a_time = min(at_a_time, len(todo))
    slots = [Slot()] * at_a_time if launcher else share_machine(at_a_time)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--workdir {workdir} cannot be made ({error.strerror})') from error
    by_name = {run.name: run for run in runs}
    with file_lock(str(workdir / LOCK)) as lock:
        for job in todo:
            run, job.state = by_name[job.name], 'waiting'
            command = run.command(job.directory.absolute())
            point = {'point': run.point, 'hash': run.hash, 'config': run.config}
            artefacts.write_json(job.directory / 'point.json', point | {'command': command})
        print(f'{len(todo)} of {len(jobs)} runs to do, {at_a_time} at a time', flush=True)

        def progress(job: Job) -> tuple[str, float]:
            return progress_of(job.directory, by_name[job.name].config)

        with open_board(jobs, progress) as board:
            run_jobs(
                jobs,
                slots,
                lambda job: is_finished(job.directory),
                board,
                lock,
                without_end='submitted' if launcher else 'failed',
            )
