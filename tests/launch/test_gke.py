"""gke.sh: creates, never changes, and deletes only its own; through xpk too."""

import subprocess

import pytest

RUN = ['--name', 'pod', '--topology', 'v5e-16', '--image', 'registry/bigssl:1', '--bucket', 'bkt']
COMMAND = ['--', 'bigssl', 'run', '--config', 'experiments/X.py', '--workdir', '/mnt/bkt/x']
MARK = 'jsonpath={.metadata.labels.bigssl-launch}'


def start(world) -> str:
    done = world.run('gke.sh', 'run', *RUN, *COMMAND)
    assert done.returncode == 0, done.stderr
    mark = (world.folder / 'state' / 'gke' / 'pod' / 'mark').read_text().rstrip('\0')
    world.answer('kubectl', MARK, answers=[mark])
    return mark


def test_run_creates_in_the_cluster_of_the_moment_and_stays_there(world):
    mark = start(world)
    [created] = world.changes()
    assert created == ['kubectl', '--context=my-cluster', 'create', '--filename=-']
    manifest = (world.folder / 'state' / 'gke' / 'pod' / 'manifest.yaml').read_text()
    assert manifest.count(f'bigssl-launch: {mark}') == 2
    world.answer('kubectl', 'current-context', answers=['another-cluster'])
    assert world.run('gke.sh', 'delete', '--name', 'pod').returncode == 0
    assert world.changes()[-1] == ['kubectl', '--context=my-cluster', 'delete', 'jobset', 'pod']
    assert not (world.folder / 'state' / 'gke' / 'pod').exists()


def test_stop_and_resume_suspend_the_set(world):
    start(world)
    for verb, value in (('stop', 'true'), ('resume', 'false')):
        assert world.run('gke.sh', verb, '--name', 'pod').returncode == 0
        assert world.changes()[-1][-1] == f'--patch={{"spec":{{"suspend":{value}}}}}'


def test_logs_and_status(world):
    start(world)
    words = ['logs', '--name', 'pod', '--slice', '1', '--worker', '3']
    assert world.run('gke.sh', *words).returncode == 0
    assert 'job-index=1,batch.kubernetes.io/job-completion-index=3' in world.calls('logs')[0][-1]
    assert world.run('gke.sh', 'status', '--name', 'pod').returncode == 0


@pytest.mark.parametrize('verb', ['delete', 'stop', 'resume'])
def test_a_namesake_is_left_alone(world, verb):
    start(world)
    world.answer('kubectl', MARK, answers=['run-00000000'])
    done = world.run('gke.sh', verb, '--name', 'pod')
    assert done.returncode == 2
    assert 'left alone' in done.stderr
    assert len(world.changes()) == 1


def test_what_was_not_created_here(world):
    assert 'not created by this script' in world.refused('gke.sh', 'delete', '--name', 'pod')
    world.answer('kubectl', 'get jobset pod', answers=['jobset/pod'])
    assert 'not created here' in world.refused('gke.sh', 'run', *RUN, *COMMAND)


def test_a_creation_that_fails_leaves_nothing(world):
    world.answer('kubectl', 'create', answers=[1])
    assert world.run('gke.sh', 'run', *RUN, *COMMAND).returncode == 1
    assert not (world.folder / 'state' / 'gke' / 'pod').exists()


def test_xpk(world):
    words = [*RUN[:6], '--xpk', '--cluster', 'c', '--zone', 'us-west4-a']
    awkward = ["it's", '$(touch hacked)', '$HOME $$', '"', 'two\nlines $(A)', '']
    done = world.run('gke.sh', 'run', *words, '--', 'program', *awkward)
    assert done.returncode == 0, done.stderr
    [call] = world.calls('xpk')
    [text] = [word.removeprefix('--command=') for word in call if word.startswith('--command=')]
    assert '\n' not in text  # xpk writes it into one line of YAML
    # Kubernetes reads $$ as a dollar and would replace $(A); then a Bash reads the rest.
    assert '$(' not in text.replace('$$', '')
    heard = subprocess.run(
        ['bash', '-c', f'program() {{ printf \'%s\\0\' "$@"; }}; ({text.replace("$$", "$")})'],
        capture_output=True,
        text=True,
        check=True,
        cwd=world.folder,
    )
    assert heard.stdout.split('\0')[:-1] == awkward
    world.answer('kubectl', 'xpk', answers=['pod'])
    assert world.run('gke.sh', 'delete', '--name', 'pod').returncode == 0
    assert world.calls('xpk')[-1][1:3] == ['workload', 'delete']


REFUSALS = {
    'no image': ([*RUN[:4], *COMMAND], '--image is missing'),
    'no topology': ([*RUN[:2], *COMMAND], '--topology is missing'),
    'not on GKE': (['--name', 'pod', '--topology', 'v3-32', *COMMAND], 'use launch/tpu_vm.sh'),
    'no command': (RUN, "After '--' write the command"),
    'a bad variable': ([*RUN, '--env', 'A', *COMMAND], '--env A: write KEY=VALUE'),
    'xpk without cluster': (
        [*RUN[:6], '--xpk', '--zone', 'us-west4-a', *COMMAND[:-1], '/x'],
        '--cluster',
    ),
    'two tiers': ([*RUN, '--spot', '--reservation', 'r', *COMMAND], 'exclude each other'),
}


@pytest.mark.parametrize('case', REFUSALS)
def test_bad_input_is_one_line_before_anything_is_started(world, case):
    words, expected = REFUSALS[case]
    assert expected in world.refused('gke.sh', 'run', *words)


def test_missing_tools(world):
    (world.folder / 'bin' / 'xpk').unlink()
    words = [*RUN[:6], '--xpk', '--cluster', 'c', '--zone', 'us-west4-a', *COMMAND[:-1], '/x']
    assert 'pip install xpk' in world.refused('gke.sh', 'run', *words)
    world.answer('kubectl', 'customresourcedefinition', answers=[1])
    assert 'the cluster has no JobSet' in world.refused('gke.sh', 'run', *RUN, *COMMAND)
    world.answer('kubectl', 'current-context', answers=[1])
    assert 'get-credentials' in world.refused('gke.sh', 'run', *RUN, *COMMAND)
    (world.folder / 'bin' / 'kubectl').unlink()
    assert 'kubectl is not installed' in world.refused('gke.sh', 'run', *RUN, *COMMAND)
