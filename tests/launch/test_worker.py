"""worker.sh for real, on this machine as the worker of a pod."""

import pathlib
import subprocess
import time

import pytest

PROGRAM = """trap 'echo saving; exit 75' TERM
echo "$0 $PWD $*"
touch ready
for _ in $(seq 100); do sleep 0.1; done
"""


@pytest.fixture
def worker(world):
    """Runs a verb on a worker whose ~/bigssl holds this project."""
    source = world.folder / 'home' / 'bigssl'
    source.mkdir()
    (source / 'launch').symlink_to(world.folder / 'launch')
    (source / '.venv' / 'bin').mkdir(parents=True)
    for name in ('seq', 'date'):
        (world.folder / 'tools' / name).symlink_to(f'/usr/bin/{name}')
    program = source / '.venv' / 'bin' / 'program'
    program.write_text('#!/usr/bin/env bash\n' + PROGRAM)
    program.chmod(0o755)

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ['bash', 'bigssl/launch/worker.sh', *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            cwd=world.folder / 'home',
            env=world.environment(),
        )

    run.source = source
    yield run
    run('stop', '5')


def test_a_run_from_start_to_stop(worker):
    assert worker('status').stdout == 'never started\n'
    assert worker('start', 'program', 'a b', '$(id)').returncode == 0
    assert worker('status').stdout == 'running\n'
    again = worker('start', 'program')
    assert again.returncode == 2 and 'going on' in again.stderr
    while not (worker.source / 'ready').exists():
        time.sleep(0.05)
    assert worker('stop', '20').stdout == 'ended 75\n'
    assert worker('status').stdout == 'ended 75\n'
    log = worker('logs').stdout
    assert f'program {worker.source} a b $(id)' in log  # its own bigssl, in its own folder
    assert 'saving' in log and 'ended with exit code 75' in log


def test_the_code_of_a_run_that_ends_by_itself(worker):
    worker('start', 'bash', '-c', 'exit 3')
    for _ in range(100):
        if worker('status').stdout == 'ended 3\n':
            break
        time.sleep(0.05)
    assert worker('status').stdout == 'ended 3\n'
    worker('start', 'program')  # a restart forgets the old code
    assert worker('status').stdout == 'running\n'


def test_a_machine_that_was_restarted(worker, world):
    """The number of its process may be another's now."""
    another = subprocess.Popen(['sleep', '30'])
    folder = world.folder / 'home' / 'bigssl-run'
    folder.mkdir()
    (folder / 'pid').write_text(f'{another.pid}\n')
    (folder / 'boot').write_text(pathlib.Path('/proc/sys/kernel/random/boot_id').read_text())
    assert worker('status').stdout == 'running\n'
    (folder / 'boot').write_text('another\n')
    assert worker('status').stdout == 'ended 137\n'
    assert worker('stop', '1').stdout == 'ended 137\n'
    assert another.poll() is None
    another.kill()
    another.wait()


def test_install_makes_an_environment_at_the_locked_versions(worker, world):
    calls = world.folder / 'calls.txt'
    python = world.folder / 'tools' / 'python3.12'
    python.write_text(
        '#!/usr/bin/env bash\n'
        f'echo "$*" >>{calls}\n'
        'case $* in\n'
        '  "-m venv --help") ;;\n'
        '  "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/bigssl" ;;\n'
        '  *minor*) echo 12 ;;\n'
        'esac\n'
    )
    python.chmod(0o755)
    (world.folder / 'tools' / 'cp').symlink_to('/usr/bin/cp')
    done = worker('install')
    assert done.returncode == 0, done.stderr
    text = calls.read_text()
    assert '/launch/../' not in text
    lock = 'requirements-lock-3.12.txt'
    assert f'install --quiet --disable-pip-version-check -r {worker.source}/{lock}' in text
    assert f'-c {worker.source}/{lock} -e {worker.source}[tpu]' in text
    assert text.splitlines()[-1] == '--version'


def test_usage(worker):
    assert worker('instal').returncode == 2
    assert worker('logs').returncode == 2
    assert worker('start').returncode == 2
