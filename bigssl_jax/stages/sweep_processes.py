"""Runs commands side by side, each with a log and a status on disk; stops and reports like one.

    waiting -> running -> done        its recipe says so
                       -> failed      any other end; kept until it is asked for again
                       -> stopped     a signal ended it; the same command continues it
                       -> submitted   a launcher took it and returned; it runs elsewhere

The first signal to the sweep starts no further command and is passed on, once, to every running
one; so is the second, which makes them stop at once; the third kills.  Commands have a session of
their own: Ctrl-C on the terminal reaches them through the sweep alone.

    <directory>/log.txt       all output, attempt after attempt
    <directory>/status.json   {state, attempts, exit_code, seconds, started_at}
"""

import contextlib
import dataclasses
import datetime
import glob
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from bigssl_jax.config import UserError
from bigssl_jax.stages import artefacts
from bigssl_jax.training.signals import STOPPED_EXIT_CODE

# How a command ends that was asked to stop: saved; while not in training; before it could listen.
STOP_CODES = (STOPPED_EXIT_CODE, 130, 143, -signal.SIGINT, -signal.SIGTERM)

POLL_SECONDS = 0.1
LOG_LINES = 8


@dataclasses.dataclass
class Job:
    """One command of a sweep and what has become of it.

    Attributes:
      name: for people.
      words: the command.
      directory: its folder, made when it starts.
      audio_seconds: audio that it trains on; its weight in the time left.
      state: see the head of this file.
      attempts: how often it has been started, earlier sweeps included.
      seconds: time it has taken, earlier sweeps included.
      exit_code: of the last attempt; negative: the signal that killed it.
    """

    name: str
    words: Sequence[str]
    directory: pathlib.Path
    audio_seconds: float = 0.0
    state: str = 'waiting'
    attempts: int = 0
    seconds: float = 0.0
    exit_code: int | None = None
    process: subprocess.Popen | None = None
    slot: int = 0
    started: float = 0.0
    log_start: int = 0

    @property
    def log(self) -> pathlib.Path:
        """All output."""
        return self.directory / 'log.txt'

    @property
    def running_seconds(self) -> float:
        """Time taken so far."""
        return self.seconds + (time.monotonic() - self.started if self.process else 0.0)


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one of the commands that run at a time may use.

    Attributes:
      cores: CPU cores; () is all.
      environment: variables beside those of this process.
    """

    cores: tuple[int, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Board(Protocol):
    """Shows how a sweep goes."""

    def changed(self, job: Job) -> None:
        """A job has started or ended."""

    def draw(self, jobs: Sequence[Job]) -> None:
        """Time has passed; called often."""


def share_machine(count: int) -> list[Slot]:
    """This machine's cores and GPUs dealt out to `count` commands at a time.

    Raises:
      UserError: fewer GPUs than commands: JAX takes a GPU's memory for one process.
    """
    if count == 1:
        return [Slot()]
    cores = sorted(os.sched_getaffinity(0))
    gpus = _gpus()
    if gpus and len(gpus) < count:
        raise UserError(
            f'--jobs {count}: there are {len(gpus)} GPUs, and a run takes one for itself; give'
            f' --jobs {len(gpus)} (JAX_PLATFORMS=cpu: no GPU is used)'
        )
    slots = []
    for number in range(count):
        mine = tuple(cores[number::count]) or (cores[number % len(cores)],)
        given = {'CUDA_VISIBLE_DEVICES': ','.join(gpus[number::count])} if gpus else {}
        slots.append(Slot(mine, given))
    return slots


def _gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get('JAX_PLATFORMS', '') == 'cpu':
        return []
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        return [name for name in visible.split(',') if name not in ('', '-1')]
    return sorted(path.removeprefix('/dev/nvidia') for path in glob.glob('/dev/nvidia[0-9]*'))


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    is_done: Callable[[Job], bool],
    board: Board,
    lock: int,
    without_end: str = 'failed',
) -> None:
    """Runs all jobs that are waiting, as many at a time as there are slots; sets their states.

    Args:
      jobs: in the order in which to start them.
      slots: see `share_machine`.
      is_done: whether a job's folder is complete; asked when its command ends well.
      board: shows it.
      lock: handle of a lock that every command inherits: as long as one lives, even beyond this
        process, the lock is held.
      without_end: state of a job whose command ended well and whose folder is not complete.
    """
    free = list(range(len(slots)))[::-1]
    running: list[Job] = []
    passed_on = 0
    with _count_signals() as received:
        try:
            while True:
                for job in [
                    job for job in running if job.process and job.process.poll() is not None
                ]:
                    running.remove(job)
                    free.append(job.slot)
                    _end(job, is_done, without_end, bool(received))
                    board.changed(job)
                while passed_on < len(received):
                    passed_on += 1
                    again = ('again: at once', 'again: killed', 'killed')[min(passed_on, 3) - 1]
                    print(f'\nstopping {len(running)} runs ({again}) ...', flush=True)
                    _pass_on(running, passed_on)
                waiting = [job for job in jobs if job.state == 'waiting'] if not received else []
                for job in waiting[: len(free)]:
                    job.slot = free.pop()
                    _start(job, slots[job.slot], lock)
                    running.append(job)
                    board.changed(job)
                if not running:
                    return
                board.draw(jobs)
                time.sleep(POLL_SECONDS)
        finally:  # an error of ours leaves no command behind
            _pass_on(running, 1)
            for job in running:
                if job.process:
                    job.process.wait()


@contextlib.contextmanager
def _count_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of ending this process."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)

    previous = {n: signal.signal(n, receive) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _pass_on(running: Sequence[Job], times: int) -> None:
    for job in running:
        with contextlib.suppress(ProcessLookupError):
            if job.process and times > 2:
                os.killpg(job.process.pid, signal.SIGKILL)
            elif job.process:
                job.process.send_signal(signal.SIGTERM)


def _start(job: Job, slot: Slot, lock: int) -> None:
    job.directory.mkdir(parents=True, exist_ok=True)
    job.attempts += 1
    job.state, job.exit_code, job.started = 'running', None, time.monotonic()
    with job.log.open('ab') as log:
        log.write(f'--- {_now()} attempt {job.attempts}\n'.encode())
        log.flush()
        job.log_start = log.tell()
        try:
            job.process = subprocess.Popen(
                list(job.words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, 'PYTHONUNBUFFERED': '1', **slot.environment},
                start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            raise UserError(f'cannot start {job.words[0]!r}: {error.strerror}') from error
    if slot.cores:
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            os.sched_setaffinity(job.process.pid, slot.cores)
    _write_status(job)


def _end(job: Job, is_done: Callable[[Job], bool], without_end: str, stopping: bool) -> None:
    assert job.process is not None
    job.exit_code = job.process.returncode
    job.seconds, job.process = job.running_seconds, None
    if job.exit_code == 0:
        job.state = 'done' if is_done(job) else without_end
    elif job.exit_code in STOP_CODES or (stopping and job.exit_code == -signal.SIGKILL):
        job.state = 'stopped'
    else:
        job.state = 'failed'
    _write_status(job)


def _write_status(job: Job) -> None:
    artefacts.write_json(
        job.directory / 'status.json',
        {
            'state': job.state,
            'attempts': job.attempts,
            'exit_code': job.exit_code,
            'seconds': round(job.seconds, 1),
            'written_at': _now(),
        },
    )


def recall(job: Job, done: bool, at_work: bool) -> Job:
    """Sets a job's state to what its folder says of earlier sweeps.

    Args:
      job: a new one; it is changed.
      done: whether its folder is complete.
      at_work: whether a sweep may be running it; without one, 'running' means that a sweep was
        killed, and nobody has seen the end of the command.
    """
    status: dict[str, Any] = artefacts.read_json(job.directory / 'status.json') or {}
    job.attempts, job.seconds = status.get('attempts', 0), status.get('seconds', 0.0)
    job.exit_code = status.get('exit_code')
    state = status.get('state', 'waiting')
    if state == 'done' or (state == 'running' and not at_work):
        state = 'stopped'
    job.state = 'done' if done else state
    return job


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def why(job: Job) -> str:
    """How the last attempt ended, in some words."""
    if job.exit_code is None:
        return 'its end was not seen'
    if job.exit_code == -signal.SIGKILL:
        return 'killed by SIGKILL, most likely for want of memory'
    if job.exit_code < 0:
        return f'killed by {signal.Signals(-job.exit_code).name}'
    if job.exit_code == 0:
        return 'ended without finishing its recipe'
    return f'exit code {job.exit_code}'


def last_lines(job: Job, count: int = LOG_LINES) -> list[str]:
    """The last lines that the last attempt wrote, at most `count`."""
    if not job.log.exists():
        return []
    with job.log.open('rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 16384))
        text = file.read().decode(errors='replace')
    lines = [line.split('\r')[-1].rstrip() for line in text.split('\n')]
    headings = [number for number, line in enumerate(lines) if line.startswith('--- ')]
    lines = lines[headings[-1] + 1 :] if headings else lines
    return [line for line in lines if line][-count:]
