"""Shows how a sweep goes: a table that redraws itself on a terminal, plain lines elsewhere."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bigssl_jax.stages import schema
from bigssl_jax.stages.sweep_processes import Board, Job, last_lines, why
from bigssl_jax.training.metrics import clock

PLAIN_SECONDS = 60.0
LIVE_SECONDS = 1.0
LIVE_ROWS = 20


def audio_hours(config: Mapping[str, Any]) -> float:
    """Hours of audio that the stages of a resolved config train on."""
    return sum(schema.training_audio_seconds(config, name) for name in config['recipe']) / 3600


def progress_of(directory: pathlib.Path, config: Mapping[str, Any]) -> tuple[str, float]:
    """(where a run is, as `teacher 40/100`, seconds of audio that it has trained on so far)."""
    place, seconds = '', 0.0
    for name in ('prepare', *config['recipe']):
        audio = schema.training_audio_seconds(config, name)
        steps = config['stages'].get(name, {}).get('steps', 0)
        if (directory / name / 'done.json').exists():
            seconds += audio
            continue
        step = _last_step(directory / name / 'metrics.jsonl') if audio else 0
        seconds += audio * min(1.0, step / steps) if steps else 0.0
        place = place or (f'{name} {step}/{steps}' if audio else name)
    return place, seconds


def _last_step(path: pathlib.Path) -> int:
    """The step of the last complete line of a log, read from its end."""
    if not path.exists():
        return 0
    with path.open('rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8192))
        lines = file.read().split(b'\n')[:-1]
    with contextlib.suppress(IndexError, ValueError, KeyError):
        return int(json.loads(lines[-1])['step'])
    return 0


class Estimate:
    """The time left, from the audio that all runs together have trained on since the start.

    Args:
      jobs: before any has started.
      progress: job -> (place, seconds of audio so far).
    """

    def __init__(self, jobs: Sequence[Job], progress: Callable[[Job], tuple[str, float]]):
        self.progress = progress
        self._began = time.monotonic()
        self._before = {
            job.name: job.audio_seconds if job.state == 'done' else progress(job)[1] for job in jobs
        }

    def left(self, jobs: Sequence[Job]) -> float | None:
        """Seconds left; None before anything has been measured."""
        worked = remaining = 0.0
        for job in jobs:
            if job.state not in ('waiting', 'running', 'done'):
                continue
            before = self._before[job.name]
            now = {'waiting': before, 'done': job.audio_seconds}.get(job.state)
            now = self.progress(job)[1] if now is None else now
            worked += now - before
            remaining += job.audio_seconds - now
        if not worked:
            return None
        return remaining * (time.monotonic() - self._began) / worked


def summary(jobs: Sequence[Job], left: float | None) -> str:
    """`3 of 6 done, 2 running, 1 waiting, left 0:12:00`."""
    counts = Counter(job.state for job in jobs)
    parts = [f'{counts.pop("done", 0)} of {len(jobs)} done']
    parts += [f'{count} {state}' for state, count in sorted(counts.items())]
    return ', '.join(parts) + (f', left {clock(left)}' if left is not None else '')


def outcome(job: Job) -> list[str]:
    """What to print when a job has started or ended."""
    if job.state == 'running':
        return [f'{job.name}: started, attempt {job.attempts}']
    if job.state in ('done', 'stopped'):
        return [f'{job.name}: {job.state} after {clock(job.seconds)}']
    lines = [f'    | {line}' for line in last_lines(job)]
    if job.state == 'submitted':
        return [f'{job.name}: submitted', *lines]
    return [f'{job.name}: failed ({why(job)}); {job.log} ends with', *lines]


class PlainBoard:
    """Lines for a log file: every start and end, and a summary now and then."""

    def __init__(self, estimate: Estimate):
        self._estimate, self._drawn = estimate, time.monotonic()
        self._left: float | None = None

    def changed(self, job: Job) -> None:
        """Prints what happened."""
        print('\n'.join(outcome(job)), flush=True)

    def draw(self, jobs: Sequence[Job]) -> None:
        """Prints the summary once a minute."""
        now = time.monotonic()
        if now - self._drawn < PLAIN_SECONDS:
            return
        self._drawn = now
        print(summary(jobs, self._estimate.left(jobs)), flush=True)


class LiveBoard:
    """A table under the lines, redrawn every second."""

    def __init__(self, estimate: Estimate, live: Any):
        self._estimate, self._live, self._drawn = estimate, live, 0.0

    def changed(self, job: Job) -> None:
        """Prints what happened above the table, and has the table drawn soon."""
        from rich.text import Text

        self._live.console.print(Text('\n'.join(outcome(job))))
        self._drawn = 0.0

    def draw(self, jobs: Sequence[Job]) -> None:
        """Redraws the table."""
        now = time.monotonic()
        if now - self._drawn >= LIVE_SECONDS:
            self._drawn = now
            self._live.update(self._table(jobs), refresh=True)

    def _table(self, jobs: Sequence[Job]) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        left = summary(jobs, self._estimate.left(jobs))
        table = Table('run', 'state', 'at', 'time', box=SIMPLE_HEAD, caption=Text(left))
        busy = [job for job in jobs if job.state in ('running', 'failed')]
        for job in (jobs if len(jobs) <= LIVE_ROWS else busy)[:LIVE_ROWS]:
            place = self._estimate.progress(job)[0] if job.state == 'running' else ''
            style = {'running': 'bold', 'failed': 'red', 'done': 'green'}.get(job.state, 'dim')
            seconds = clock(job.running_seconds) if job.attempts else ''
            table.add_row(Text(job.name), job.state, Text(place), seconds, style=style)
        return table


@contextlib.contextmanager
def open_board(
    jobs: Sequence[Job], progress: Callable[[Job], tuple[str, float]]
) -> Iterator[Board]:
    """The board that suits standard output."""
    estimate = Estimate(jobs, progress)
    if not sys.stdout.isatty():
        yield PlainBoard(estimate)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(highlight=False), auto_refresh=False, transient=True) as live:
        yield LiveBoard(estimate, live)
