"""local.sh for real: processes, signals, exit codes, output."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

# Says what it is, then does what its first argument asks; on a signal 'saves' and ends with 75.
# It writes with os.write: a handler that prints while the program prints would raise.
PROGRAM = """
import os, signal, sys, time
number = os.environ['BIGSSL_PROCESS_ID']
def say(*words): os.write(1, (' '.join(map(str, words)) + chr(10)).encode())
def stop(signum, frame):
    if os.environ.get('STOPPING'): say('asked twice'); os._exit(9)
    os.environ['STOPPING'] = 'yes'
    say('saving')
    time.sleep(0.2)
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
say(os.environ['BIGSSL_NUM_PROCESSES'], os.environ['BIGSSL_COORDINATOR'], sys.argv[2:])
time.sleep({wait})
{then}
"""


@pytest.fixture
def local(world):
    """Starts local.sh with 3 processes of PROGRAM; returns the launcher's process."""
    started = []

    def start(then: str, *words: str, wait: float = 0.0, options: tuple[str, ...] = ()):
        code = PROGRAM.format(wait=wait, then=then)
        launcher = subprocess.Popen(
            [str(world.folder / 'launch' / 'local.sh'), '--processes', '3', *options]
            + ['--', sys.executable, '-ISc', code, '-', *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=world.environment(),
            start_new_session=True,
            # Tests that run in the background may have inherited that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(launcher)
        return launcher

    yield start
    for launcher in started:
        if launcher.poll() is None:
            launcher.kill()


def finish(launcher) -> tuple[int, list[str], str]:
    out, err = launcher.communicate(timeout=30)
    return launcher.returncode, out.splitlines(), err


def wait_for_line(launcher, count: int = 3) -> None:
    for _ in range(count):
        assert launcher.stdout.readline()


def test_each_process_knows_who_it_is(local):
    words = ['a b', '$(id)', "it's"]
    code, lines, _ = finish(local('', *words))
    assert code == 0
    assert sorted(line.split()[0] for line in lines) == ['[0]', '[1]', '[2]']
    assert len({line[4:] for line in lines}) == 1  # one coordinator, the same words
    assert lines[0][4:].startswith('3 127.0.0.1:')
    assert lines[0].endswith(str(words))


def all_ready(folder: pathlib.Path) -> str:
    """Code that waits until all three processes have come to it."""
    return (
        f"open('{folder}/ready' + number, 'w').close()\n"
        f"while len([f for f in os.listdir('{folder}') if 'ready' in f]) < 3: time.sleep(0.05)\n"
    )


def test_one_failure_stops_the_others_and_its_code_is_ours(local, tmp_path):
    began = time.monotonic()
    then = all_ready(tmp_path) + "sys.exit(7) if number == '1' else time.sleep(25)"
    code, lines, err = finish(local(then))
    assert code == 7
    assert time.monotonic() - began < 20
    assert 'process 1 ended with exit code 7' in err
    assert sorted(line for line in lines if 'saving' in line) == ['[0] saving', '[2] saving']


def test_who_does_not_listen_is_killed(local, tmp_path):
    then = (
        'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
        + all_ready(tmp_path)
        + "sys.exit(7) if number == '1' else time.sleep(25)"
    )
    code, _, err = finish(local(then, options=('--grace', '1')))
    assert code == 7
    assert 'killed' in err


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_each_process_once(local, number):
    launcher = local('', wait=25)
    wait_for_line(launcher)
    # As a terminal does it: Ctrl-C goes to the whole group in front.
    os.killpg(launcher.pid, number) if number == signal.SIGINT else launcher.send_signal(number)
    code, rest, err = finish(launcher)
    lines = [line for line in rest if 'saving' in line or 'twice' in line]
    assert code == 75  # and no restart: it was this script that was asked
    assert sorted(lines) == ['[0] saving', '[1] saving', '[2] saving']
    assert 'starting again' not in err


def test_a_signal_while_processes_are_being_started_reaches_all(local):
    launcher = local('', wait=40, options=('--processes', '40', '--grace', '60'))
    wait_for_line(launcher, 1)
    launcher.terminate()
    code, _, err = finish(launcher)  # whoever is not told sleeps
    # Some end before they can listen: bash and Python know the signal from the first moment.
    assert code in {75, 128 + signal.SIGTERM}
    assert 'killed' not in err


def test_75_without_being_asked_starts_again_and_gives_up(local):
    code, lines, err = finish(local('sys.exit(75)', options=('--max-stalled', '1')))
    assert code == 75
    assert len(lines) == 2 * 3
    assert '2 attempts in a row saved nothing new' in err


def test_nothing_is_left_running(local, tmp_path):
    then = f"open('{tmp_path}/pid' + number, 'w').write(str(os.getpid()))\n" + all_ready(tmp_path)
    launcher = local(then + 'time.sleep(25)')
    while len(list(tmp_path.glob('ready?'))) < 3:
        time.sleep(0.05)
    launcher.terminate()
    finish(launcher)
    pids = [file.read_text() for file in tmp_path.glob('pid?')]
    assert len(pids) == 3
    assert [pid for pid in pids if pathlib.Path('/proc', pid).exists()] == []


# Each process gives its number plus one; the sum over all is known to each.
SUM = """
import os
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(
    os.environ['BIGSSL_COORDINATOR'],
    int(os.environ['BIGSSL_NUM_PROCESSES']),
    int(os.environ['BIGSSL_PROCESS_ID']),
)
mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
spec = jax.sharding.PartitionSpec('data')
mine = np.array([jax.process_index() + 1.0], np.float32)
array = jax.make_array_from_process_local_data(jax.sharding.NamedSharding(mesh, spec), mine)
add = jax.shard_map(
    lambda x: jax.lax.psum(x, 'data'),
    mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec(),
)
print(jax.process_index(), 'of', jax.process_count(), 'sum', float(jax.jit(add)(array)[0]))
"""


def test_jax_processes_find_each_other_and_add(world):
    variables = ('JAX_PLATFORMS', 'JAX_COMPILATION_CACHE_DIR')
    done = world.run(
        *['local.sh', '--processes', '2', '--', sys.executable, '-c', SUM],
        **{name: os.environ[name] for name in variables},
    )
    assert done.returncode == 0, done.stdout
    said = [line for line in done.stdout.splitlines() if 'sum' in line]
    assert sorted(said) == ['[0] 0 of 2 sum 3.0', '[1] 1 of 2 sum 3.0']


def test_bad_input(world):
    message = world.refused('local.sh', '--processes', 'two', '--', 'true')
    assert message.startswith('--processes two: a whole number')
    assert 'unknown option --prosesses' in world.refused(
        'local.sh', '--prosesses', '2', '--', 'true'
    )
    assert "After '--'" in world.refused('local.sh')
    world.answer('bigssl', '--check', answers=[2])
    words = ['--', 'bigssl', 'run', '--config', 'c.py', '--workdir', 'w', '--config.sed=1']
    assert 'nothing was started' in world.refused('local.sh', *words)


def test_the_config_is_checked_where_it_will_run(world):
    folder = world.folder / 'elsewhere'
    folder.mkdir()
    bigssl = world.folder / '.venv' / 'bin' / 'bigssl'  # where `make install` puts it
    bigssl.parent.mkdir(parents=True)
    (world.folder / 'bin' / 'bigssl').unlink()
    bigssl.write_text('#!/usr/bin/env bash\necho "$PWD ${*: -1}" >>"$HOME/heard"\n')
    bigssl.chmod(0o755)
    words = ['--processes', '1', '--', 'bigssl', 'run', '--config', 'c.py', '--workdir', 'w']
    done = world.run('local.sh', *words, folder=folder)
    assert done.returncode == 0, done.stderr
    heard = (world.folder / 'home' / 'heard').read_text()
    assert heard == f'{folder} --check\n{folder} w\n'


def test_a_port_in_use(world):
    import socket

    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert 'in use' in world.refused('local.sh', '--port', port, '--', 'true')
