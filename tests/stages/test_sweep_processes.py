"""The state machine of a sweep's commands, with stubs in their place: small Python programs."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from bigssl_jax.config import UserError
from bigssl_jax.data.folder import file_lock
from bigssl_jax.stages.sweep_board import Estimate, PlainBoard, progress_of, summary
from bigssl_jax.stages.sweep_processes import (
    Job,
    Slot,
    last_lines,
    recall,
    run_jobs,
    share_machine,
    why,
)

FINISH = 'pathlib.Path("finished").touch()'
# Says that it listens, then stops as a run does: exit code 75 after its step.
LISTEN = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path('listens').touch()
time.sleep(60)
"""


class Recorder:
    """A board that keeps what it is shown."""

    def __init__(self):
        self.events: list[tuple[str, str]] = []
        self.most_running = 0

    def changed(self, job):
        self.events.append((job.name, job.state))

    def draw(self, jobs):
        self.most_running = max(self.most_running, sum(job.state == 'running' for job in jobs))


def stub(directory: pathlib.Path, code: str, name: str = 'a') -> Job:
    """A job that runs `code` in its folder."""
    folder = directory / name
    text = 'import os, pathlib, signal, sys, time\n' + f'os.chdir({str(folder)!r})\n'
    return Job(name, [sys.executable, '-S', '-c', text + textwrap.dedent(code)], folder)


def run(jobs: list[Job], directory: pathlib.Path, slots: int = 1, **given) -> Recorder:
    board = Recorder()
    with file_lock(str(directory / '.lock')) as lock:
        run_jobs(
            jobs, [Slot()] * slots, lambda job: (job.directory / 'finished').exists(), board, lock,
            **given,
        )  # fmt: skip
    return board


def status(job: Job) -> dict:
    return json.loads((job.directory / 'status.json').read_text())


def wait_for(condition, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def signals_when(condition, count: int = 1) -> threading.Thread:
    """Sends SIGTERM to this process, `count` times, once the condition holds."""

    def send() -> None:
        wait_for(condition)
        for _ in range(count):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ('code', 'state', 'exit_code'),
    [
        (FINISH, 'done', 0),
        ('pass', 'failed', 0),
        ('sys.exit(2)', 'failed', 2),
        ('1 / 0', 'failed', 1),
        ('sys.exit(75)', 'stopped', 75),
        ('sys.exit(143)', 'stopped', 143),
        ('os.kill(os.getpid(), signal.SIGTERM)', 'stopped', -15),
        ('os.kill(os.getpid(), signal.SIGKILL)', 'failed', -9),
    ],
)
def test_how_a_command_ends_decides_its_state(code, state, exit_code, tmp_path):
    job = stub(tmp_path, code)
    board = run([job], tmp_path)
    assert board.events == [('a', 'running'), ('a', state)]
    assert (job.exit_code, status(job)['exit_code'], status(job)['state']) == (
        exit_code, exit_code, state,
    )  # fmt: skip
    assert str(abs(exit_code)) in why(job) or exit_code <= 0
    again = recall(Job('a', [], job.directory), done=state == 'done', at_work=False)
    assert (again.state, again.attempts) == (state, 1)


def test_a_launcher_that_returns_has_submitted(tmp_path):
    job = stub(tmp_path, 'print("Submitted batch job 17")')
    run([job], tmp_path, without_end='submitted')
    assert job.state == 'submitted'
    assert last_lines(job) == ['Submitted batch job 17']


def test_all_run_in_order_and_never_more_at_a_time_than_there_are_slots(tmp_path):
    jobs = [stub(tmp_path, 'time.sleep(0.25)\n' + FINISH, f'{n}') for n in range(5)]
    board = run(jobs, tmp_path, slots=2)
    assert [job.state for job in jobs] == ['done'] * 5
    assert [name for name, state in board.events if state == 'running'] == list('01234')
    assert board.most_running == 2


def test_a_failure_does_not_stop_the_others_and_shows_its_last_lines(tmp_path, capsys):
    noise = (
        'for n in range(30): print("line", n)\nprint("step 1\\rstep 2")\nsys.exit("bigssl: bad")'
    )
    jobs = [stub(tmp_path, noise, 'bad'), stub(tmp_path, FINISH, 'good')]
    run(jobs, tmp_path)
    assert [job.state for job in jobs] == ['failed', 'done']
    assert last_lines(jobs[0], 3) == ['line 29', 'step 2', 'bigssl: bad']
    PlainBoard(Estimate(jobs, lambda job: ('', 0.0))).changed(jobs[0])
    shown = capsys.readouterr().out
    assert 'bad: failed (exit code 1)' in shown
    assert '    | bigssl: bad' in shown


def test_attempts_and_their_logs_add_up(tmp_path):
    job = stub(tmp_path, 'print("first")\nsys.exit(75)')
    run([job], tmp_path)
    again = recall(stub(tmp_path, 'print("second")\n' + FINISH), done=False, at_work=False)
    assert again.state == 'stopped'
    again.state = 'waiting'
    run([again], tmp_path)
    assert (again.state, again.attempts) == ('done', 2)
    assert again.log.read_text().count('attempt') == 2
    assert last_lines(again) == ['second']
    assert status(again)['seconds'] >= status(job)['seconds']


def test_a_signal_is_passed_on_once_and_nothing_more_starts(tmp_path):
    jobs = [stub(tmp_path, LISTEN, name) for name in 'abc']
    thread = signals_when(lambda: all((tmp_path / n / 'listens').exists() for n in 'ab'))
    run(jobs, tmp_path, slots=2)
    thread.join()
    assert [job.state for job in jobs] == ['stopped', 'stopped', 'waiting']
    assert [job.exit_code for job in jobs] == [75, 75, None]
    assert not (tmp_path / 'c').exists()


def test_the_third_signal_kills_what_does_not_listen(tmp_path):
    deaf = 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n' + LISTEN.split('\n', 2)[2]
    job = stub(tmp_path, deaf)
    thread = signals_when(lambda: (tmp_path / 'a' / 'listens').exists(), count=3)
    started = time.monotonic()
    run([job], tmp_path)
    thread.join()
    assert time.monotonic() - started < 30
    assert (job.state, job.exit_code) == ('stopped', -9)


def test_the_handlers_of_signals_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run([stub(tmp_path, FINISH)], tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_ours_leaves_no_command_behind(tmp_path):
    jobs = [stub(tmp_path, LISTEN, 'a'), Job('b', ['/no/such/program'], tmp_path / 'b')]
    with pytest.raises(UserError, match="cannot start '/no/such/program'"):
        run(jobs, tmp_path, slots=2)
    assert jobs[0].process is not None
    assert jobs[0].process.returncode is not None


def test_commands_of_a_killed_sweep_keep_its_lock(tmp_path):
    code = f"""
import pathlib, sys
from bigssl_jax.data.folder import file_lock
from bigssl_jax.stages.sweep_processes import Job, Slot, run_jobs
class Silent:
    changed = draw = lambda *_: None
words = [sys.executable, '-c', 'import time; time.sleep(60)']
with file_lock({str(tmp_path / '.lock')!r}) as lock:
    run_jobs([Job('a', words, pathlib.Path({str(tmp_path)!r}))], [Slot()], bool, Silent(), lock)
"""
    sweep = subprocess.Popen([sys.executable, '-c', code])
    wait_for(lambda: (tmp_path / 'status.json').exists(), 60)
    sweep.kill()
    sweep.wait()
    job = Job('a', [], tmp_path)
    assert recall(job, done=False, at_work=True).state == 'running'
    assert recall(job, done=False, at_work=False).state == 'stopped'
    with (tmp_path / '.lock').open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    held = [p for p in pathlib.Path('/proc').glob('[0-9]*') if holds(p, tmp_path / '.lock')]
    assert len(held) == 1
    os.kill(int(held[0].name), signal.SIGKILL)

    def free() -> bool:
        with (tmp_path / '.lock').open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    wait_for(free)


def holds(process: pathlib.Path, file: pathlib.Path) -> bool:
    """Whether a process of ours has the file open."""
    try:
        return str(file) in [os.readlink(fd) for fd in (process / 'fd').iterdir()]
    except OSError:
        return False


def test_the_machine_is_shared_out(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1, 2, 3, 4})
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    assert share_machine(1) == [Slot()]
    assert [slot.cores for slot in share_machine(2)] == [(0, 2, 4), (1, 3)]
    assert [slot.cores for slot in share_machine(7)][4:] == [(4,), (0,), (1,)]
    monkeypatch.delenv('JAX_PLATFORMS')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5,6')
    given = [slot.environment['CUDA_VISIBLE_DEVICES'] for slot in share_machine(2)]
    assert given == ['3,6', '5']
    with pytest.raises(UserError, match='--jobs 4: there are 3 GPUs'):
        share_machine(4)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert [dict(slot.environment) for slot in share_machine(2)] == [{}, {}]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason='one core')
def test_a_command_sees_the_cores_and_variables_of_its_slot(tmp_path):
    core = max(os.sched_getaffinity(0))
    job = stub(
        tmp_path,
        'time.sleep(0.2)\nprint(os.sched_getaffinity(0), os.environ["X"], sys.stdin.read() == "")',
    )
    with file_lock(str(tmp_path / '.lock')) as lock:
        run_jobs([job], [Slot((core,), {'X': 'y'})], lambda _: True, Recorder(), lock)
    assert last_lines(job) == [f'{{{core}}} y True']


def test_time_left_follows_from_the_audio_of_all_runs(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, 'monotonic', lambda: now)
    jobs = [Job(name, [], tmp_path, audio_seconds=100.0) for name in 'abcd']
    jobs[3].state = 'done'
    at = {'a': 20.0, 'b': 0.0, 'c': 0.0, 'd': 100.0}  # `a` was begun by an earlier sweep
    estimate = Estimate(jobs, lambda job: ('', at[job.name]))
    assert estimate.left(jobs) is None
    now = 110.0
    jobs[0].state, jobs[1].state, at['b'] = 'done', 'running', 20.0
    # 80 + 20 seconds of audio in 10 seconds; 80 + 100 are to do.
    assert estimate.left(jobs) == pytest.approx(18.0)
    assert summary(jobs, 18.0) == '2 of 4 done, 1 running, 1 waiting, left 0:18'


def test_progress_is_read_from_the_ends_of_the_logs(tmp_path):
    stage = {'kind': 'finetune', 'steps': 100, 'objectives': {'ctc': {'stream': 's'}},
             'streams': {'s': {'batch_seconds': 2.0}}}  # fmt: skip
    config = {'recipe': ('first', 'second', 'test'),
              'stages': {'first': stage, 'second': stage, 'test': {}}}  # fmt: skip
    assert progress_of(tmp_path, config) == ('prepare', 0.0)
    for name in ('prepare', 'first', 'second'):
        (tmp_path / name).mkdir()
    for name in ('prepare', 'first'):
        (tmp_path / name / 'done.json').write_text('{}')
    assert progress_of(tmp_path, config) == ('second 0/100', 200.0)
    lines = ''.join(f'{{"step": {step}, "x": "{"y" * 900}"}}\n' for step in (10, 20, 30))
    (tmp_path / 'second' / 'metrics.jsonl').write_text(lines + '{"step": 40, "lo')
    assert progress_of(tmp_path, config) == ('second 30/100', 260.0)
    (tmp_path / 'second' / 'done.json').write_text('{}')
    assert progress_of(tmp_path, config) == ('test', 400.0)
