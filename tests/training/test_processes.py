"""The loop in two real processes: one log, one reason to stop, and the losses of a single process.

The toy problem of test_loop.py, each process with its half of every batch.
"""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

HERE = pathlib.Path(__file__).parent

SCRIPT = """
import importlib.util, itertools, pathlib, sys, time
from bigssl_jax.exits import exit_of
from bigssl_jax.parallel.distributed import batch_slice, finish, leave, start_distributed

start_distributed()
import jax
from bigssl_jax.parallel import make_mesh, replicated
from bigssl_jax.training.checkpoint import Checkpointer, Keep
from bigssl_jax.training.loop import LoopSettings, train
from bigssl_jax.training.signals import stop_on_signals

spec = importlib.util.spec_from_file_location('toy', sys.argv[1])
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
folder = pathlib.Path(sys.argv[2])
pause, minutes = map(float, sys.argv[3:])


class Slice(toy.Toy):
    def _batch(self, k):
        time.sleep(pause)
        host, hosts = batch_slice(mesh)
        whole = super()._batch(k)
        return {name: value[host * 32 // hosts : (host + 1) * 32 // hosts]
                for name, value in whole.items()}


try:
    mesh = make_mesh({'data': -1})
    checkpointer = Checkpointer(folder / 'checkpoints', Keep(3), {'config': 'toy'})
    make = jax.jit(toy.make_state, out_shardings=replicated(mesh))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        jax.eval_shape(toy.make_state),
    )
    with stop_on_signals() as stop:
        run = toy.make_run(folder, Slice(), mesh=mesh)
        settings = LoopSettings(steps=60, log_every=1, save_every=10, save_minutes=minutes,
                                watchdog_minutes=2)
        train(run, settings, make, abstract, checkpointer, stop, tensorboard=False)
    checkpointer.close()
    finish()
except BaseException as error:
    leave(error, *exit_of(error))
    sys.exit(exit_of(error)[0])
"""


@dataclasses.dataclass(frozen=True)
class Started:
    """The processes of one run, and the files with what they say."""

    processes: list[subprocess.Popen]
    said: list[pathlib.Path]

    def codes(self, seconds: float) -> list[int]:
        """The exit codes, once all have ended within that time."""
        limit = time.monotonic() + seconds
        return [p.wait(max(0.0, limit - time.monotonic())) for p in self.processes]

    def last_line(self, process: int) -> str:
        return self.said[process].read_text().strip().splitlines()[-1]


@pytest.fixture
def start(tmp_path):
    """Starts the toy in some processes, a pause before each step; ends what is left of them."""
    begun: list[Started] = []

    def start_all(
        folder: pathlib.Path, count: int, pause: float = 0.0, save_minutes: float = 10.0
    ) -> Started:
        folder.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            coordinator = f'127.0.0.1:{probe.getsockname()[1]}'
        said = [tmp_path / f'said-{len(begun)}-{i}' for i in range(count)]
        processes = []
        for i in range(count):
            several = {
                'BIGSSL_COORDINATOR': coordinator,
                'BIGSSL_NUM_PROCESSES': str(count),
                'BIGSSL_PROCESS_ID': str(i),
            }
            with said[i].open('w') as output:
                processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            '-c',
                            SCRIPT,
                            str(HERE / 'test_loop.py'),
                            str(folder),
                            str(pause),
                            str(save_minutes),
                        ],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={
                            **os.environ,
                            'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
                            **(several if count > 1 else {}),
                        },
                    )  # fmt: skip
                )
        begun.append(Started(processes, said))
        return begun[-1]

    yield start_all
    for run in begun:
        for process in run.processes:
            process.kill()
            process.wait()


def logged(folder: pathlib.Path) -> dict[int, float]:
    log = folder / 'metrics.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith('}')]
    assert len({line['step'] for line in whole}) == len(whole), 'a step was logged twice'
    return {line['step']: line['loss'] for line in whole}


def saved(folder: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / 'checkpoints').iterdir() if p.name.isdigit())


def wait_for(condition: Callable[[], bool], run: Started) -> None:
    limit = time.monotonic() + 250
    while not condition():
        assert all(p.poll() is None for p in run.processes), [s.read_text() for s in run.said]
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_stop_a_kill_and_another_number_of_processes_give_the_losses_of_one(start, tmp_path):
    alone, folder = tmp_path / 'alone', tmp_path / 'several'
    assert start(alone, 1).codes(250) == [0]

    # A signal to one of them: both finish the same step, save it, and say so.
    run = start(folder, 2, pause=0.1)
    wait_for(lambda: 2 in logged(folder), run)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.codes(150) == [75, 75], [s.read_text() for s in run.said]
    stopped = saved(folder)[-1]
    for process in (0, 1):
        assert f'toy stopped after step {stopped}; the same command' in run.last_line(process)

    # The first is killed, on which the others depend most: one clear reason, at once.
    run = start(folder, 2, pause=0.2, save_minutes=0.02)
    # Meanwhile the clock of process 0 is the one that says when to save: both save the same steps.
    wait_for(lambda: any(step > stopped and step % 10 for step in saved(folder)), run)
    run.processes[0].kill()
    started = time.monotonic()
    assert run.codes(150) == [-signal.SIGKILL, 76], run.said[1].read_text()
    assert time.monotonic() - started < 30
    assert 'process 0 of 2 stopped answering' in run.last_line(1)
    assert 'Traceback' not in run.said[1].read_text()

    # And one alone brings it to the end.
    run = start(folder, 1)
    assert run.codes(250) == [0], run.said[0].read_text()
    assert saved(folder)[-1] == 60
    assert list(logged(folder)) == list(logged(alone)) == list(range(1, 61))
    assert logged(folder) == pytest.approx(logged(alone), rel=1e-4)
