"""tpu_vm.sh against a cloud that is played: what it asks for, survives, refuses and deletes."""

import json
import subprocess

import pytest

UP = ['--name', 'pod', '--zone', 'us-west4-a', '--topology', 'v5e-16', '--spot', '--bucket', 'bkt']
RUN = ['--', 'bigssl', 'run', '--config', 'experiments/X.py', '--workdir', '/mnt/bkt/x']
LIST, STATUS, START = 'queued-resources list', 'worker.sh status', 'worker.sh start'


def verbs(world) -> list[str]:
    """The changes of a run in short: what was done to the queued resource and on the workers."""
    short = []
    for call in world.changes():
        script = [word for word in call if 'worker.sh' in word]
        if 'queued-resources' in call:
            short.append(call[4])
        elif script:
            name = script[0].split('worker.sh ')[1].split()[0]
            short += [name] if name != 'status' else []
        elif 'scp' in call:
            short.append('copy')
    return short


def create(world, *more: str):
    world.answer('gcloud', LIST, answers=[''])
    done = world.run('tpu_vm.sh', 'create', *UP, *more)
    assert done.returncode == 0, done.stderr
    world.answer('gcloud', LIST, answers=['ACTIVE'])
    return done


def state(world):
    return world.folder / 'state' / 'tpu_vm' / 'pod'


def test_up_waits_installs_runs_and_says_that_the_tpu_still_costs(world):
    world.answer('gcloud', LIST, answers=['', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'])
    world.answer('gcloud', STATUS, answers=['running', 'running\nended 0', 'ended 0\nended 0'])
    done = world.run('tpu_vm.sh', 'up', *UP, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(world) == ['create', 'copy', 'install', 'start']
    assert 'WAITING_FOR_RESOURCES' in done.stderr
    assert "'tpu_vm.sh delete --name pod'" in done.stderr.splitlines()[-1]
    [created] = world.calls('queued-resources create')
    assert '--spot' in created and '--accelerator-type=v5litepod-16' in created


def test_after_a_preemption_everything_is_made_again(world):
    before = ['', 'ACTIVE', 'ACTIVE']
    world.answer(
        'gcloud', LIST, answers=[*before, 'SUSPENDING', 'SUSPENDING', 'SUSPENDED', 'ACTIVE']
    )
    world.answer('gcloud', STATUS, answers=['running', 1, 'running', 'ended 0'])
    done = world.run('tpu_vm.sh', 'up', *UP, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(world) == ['create', 'copy', 'install', 'start', 'delete'] + (
        ['create', 'copy', 'install', 'start']
    )
    first, second = world.calls('queued-resources create')
    assert first == second
    starts = world.calls(START)
    assert starts[0] == starts[1]


def test_a_second_preemption_on_the_way_back(world):
    """Once while it waits in the queue, once in the middle of installing."""
    world.answer(
        'gcloud',
        LIST,
        answers=['', 'ACTIVE']
        + ['SUSPENDED', 'SUSPENDED', 'PROVISIONING', 'SUSPENDED']
        + ['SUSPENDED', 'SUSPENDED', 'ACTIVE', 'SUSPENDED']
        + ['SUSPENDED', 'SUSPENDED', 'ACTIVE'],
    )
    world.answer('gcloud', STATUS, answers=[1, 1, 1, 'ended 0'])
    world.answer('gcloud', 'worker.sh install', answers=['', 1, ''])
    done = world.run('tpu_vm.sh', 'up', *UP, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(world) == ['create', 'copy', 'install', 'start'] + (
        ['delete', 'create']
        + ['delete', 'create', 'copy', 'install']
        + ['delete', 'create', 'copy', 'install', 'start']
    )


def test_a_run_that_cannot_be_installed_is_not_started(world):
    world.answer('gcloud', LIST, answers=['', 'ACTIVE'])
    world.answer('gcloud', 'worker.sh install', answers=[1])
    assert world.run('tpu_vm.sh', 'up', *UP, *RUN).returncode == 1
    assert verbs(world) == ['create', 'copy', 'install']


def test_a_lost_connection_is_not_a_preemption(world):
    world.answer('gcloud', LIST, answers=['', 'ACTIVE', 7, 7, 'ACTIVE'])
    world.answer('gcloud', STATUS, answers=[1, 1, 'running', 'ended 0'])
    done = world.run('tpu_vm.sh', 'up', *UP, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(world).count('create') == 1


def test_a_request_that_somebody_else_deleted_is_not_made_again(world):
    world.answer('gcloud', LIST, answers=['', 'ACTIVE', ''])
    world.answer('gcloud', STATUS, answers=[1])
    done = world.run('tpu_vm.sh', 'up', *UP, *RUN)
    assert done.returncode == 2
    assert verbs(world).count('create') == 1


def test_exit_75_starts_again_and_gives_up_when_nothing_new_is_saved(world):
    world.answer('gcloud', LIST, answers=['', 'ACTIVE'])
    world.answer('gcloud', STATUS, answers=['ended 75\nended 75'])
    # The first restart follows a new checkpoint; after it nothing changes any more.
    world.answer('gcloud', 'storage ls', answers=['x/a/checkpoints/1', 'x/a/checkpoints/2'])
    done = world.run('tpu_vm.sh', 'up', *UP, '--max-stalled', '2', *RUN)
    assert done.returncode == 1
    assert verbs(world).count('start') == 1 + 1 + 2
    assert 'saved nothing new' in done.stderr
    [listed, *_] = world.calls('storage ls')
    assert 'gs://bkt/x/*/checkpoints/*' in listed


def test_something_to_mend_is_not_tried_again(world):
    world.answer('gcloud', LIST, answers=['', 'ACTIVE'])
    world.answer('gcloud', STATUS, answers=['running\nended 2'])
    done = world.run('tpu_vm.sh', 'up', *UP, *RUN)
    assert done.returncode == 2
    assert verbs(world).count('start') == 1


def test_after_stop_the_run_stays_stopped(world):
    create(world)
    assert world.run('tpu_vm.sh', 'run', '--name', 'pod', *RUN).returncode == 0
    assert world.run('tpu_vm.sh', 'stop', '--name', 'pod').returncode == 0
    world.answer('gcloud', STATUS, answers=['ended 75'])
    done = world.run('tpu_vm.sh', 'watch', '--name', 'pod')
    assert done.returncode == 75, done.stderr
    assert verbs(world).count('start') == 1


def test_a_request_that_fails_leaves_nothing(world):
    world.answer('gcloud', LIST, answers=[''])
    world.answer('gcloud', 'queued-resources create', answers=[1])
    done = world.run('tpu_vm.sh', 'up', *UP, *RUN)
    assert done.returncode == 1
    assert verbs(world) == ['create']
    assert not state(world).exists()


def test_a_request_that_fails_half_way_is_cleared_away(world):
    world.answer('gcloud', LIST, answers=['', 'FAILED'])
    world.answer('gcloud', 'queued-resources create', answers=[1])
    assert world.run('tpu_vm.sh', 'create', *UP).returncode == 1
    assert verbs(world) == ['create', 'delete']
    assert not state(world).exists()


def test_delete_removes_what_was_created(world):
    create(world)
    done = world.run('tpu_vm.sh', 'delete', '--name', 'pod')
    assert done.returncode == 0, done.stderr
    [deleted] = world.calls('queued-resources delete')
    assert deleted[5:] == ['pod', '--zone=us-west4-a', '--project=my-project', '--force', '--quiet']
    assert not state(world).exists()


def test_delete_refuses_what_it_did_not_create(world):
    message = world.refused('tpu_vm.sh', 'delete', '--name', 'pod')
    assert 'not created by this script' in message


@pytest.mark.parametrize('mark', ['', 'run-00000000'])
def test_delete_refuses_a_namesake(world, mark):
    """Deleted by hand, and made again under the same name by somebody else."""
    create(world)
    world.answer('gcloud', 'describe', 'labels', answers=[mark])
    done = world.run('tpu_vm.sh', 'delete', '--name', 'pod')
    assert done.returncode == 2
    assert 'left alone' in done.stderr
    assert verbs(world) == ['create']


def test_an_existing_resource_is_not_taken_over(world):
    world.answer('gcloud', LIST, answers=['ACTIVE'])
    assert 'exists in us-west4-a' in world.refused('tpu_vm.sh', 'create', *UP)


def test_the_run_is_the_same_words_on_the_worker(world):
    """The remote text, read by a real Bash, gives the words that were typed here."""
    awkward = [
        'a b',
        "it's",
        '"',
        '$(touch hacked)',
        '`id`',
        '\\',
        '*',
        '',
        'two\nlines',
        '-x',
        'ü~',
    ]
    create(world)
    done = world.run('tpu_vm.sh', 'run', '--name', 'pod', '--', 'program', *awkward)
    assert done.returncode == 0, done.stderr
    [call] = world.calls(START)
    [text] = [word.removeprefix('--command=') for word in call if word.startswith('--command=')]
    worker = world.folder / 'home' / 'bigssl' / 'launch' / 'worker.sh'
    worker.parent.mkdir(parents=True)
    worker.write_text('printf \'%s\\0\' "$@"\n')
    heard = subprocess.run(
        ['bash', '-c', text], capture_output=True, text=True, check=True, cwd=world.folder / 'home'
    )
    assert heard.stdout.split('\0')[:-1] == ['start', 'program', *awkward]
    assert not (world.folder / 'home' / 'hacked').exists()


def test_all_slices_get_the_same(world):
    words = [word if word != 'v5e-16' else '2xv5e-16' for word in UP]
    world.answer('gcloud', LIST, answers=['', 'ACTIVE'])
    world.answer('gcloud', STATUS, answers=['ended 0'])
    done = world.run('tpu_vm.sh', 'up', *words, *RUN)
    assert done.returncode == 0, done.stderr
    first, second = sorted(world.calls(START))
    assert (first[5], second[5]) == ('pod-0', 'pod-1')
    assert first[6:] == second[6:]
    assert world.run('tpu_vm.sh', 'logs', '--name', 'pod', '--slice', '1').returncode == 0
    assert world.calls('worker.sh logs')[0][5] == 'pod-1'


REFUSALS = {
    'no name': (UP[2:], '--name is missing'),
    'a bad name': (['--name', 'My Pod', *UP[2:]], '--name My\\ Pod'),
    'no zone': ([*UP[:2], *UP[4:]], '--zone is missing'),
    'a region for a zone': ([*UP[:3], 'us-west4', *UP[4:]], '--zone us-west4 is not a zone'),
    'no topology': (UP[:4], '--topology is missing'),
    'an unknown size': ([*UP[:5], 'v5e-300'], 'known: v5e-1 v5e-4 v5e-8 v5e-16 v5e-32'),
    'an unknown chip': ([*UP[:5], 'h100-8'], 'known: v3-N v4-N'),
    'offered elsewhere': ([*UP[:5], 'tpu7x-128'], 'use launch/gke.sh'),
    'not in this zone': ([*UP[:5], 'v6e-16'], '--zone us-west4-a does not offer v6e-16'),
    'two tiers': ([*UP, '--reserved'], 'exclude each other'),
    'a bad bucket': ([*UP[:6], '--bucket', 'gs://b'], 'without gs://'),
    'an unknown option': ([*UP, '--sopt'], 'unknown option --sopt'),
    'an option without value': (['--name'], '--name needs a value'),
    'a count': ([*UP, '--wait-minutes', 'ten'], '--wait-minutes ten: a whole number'),
}


@pytest.mark.parametrize('case', REFUSALS)
def test_bad_input_is_one_line_before_anything_is_started(world, case):
    words, expected = REFUSALS[case]
    assert expected in world.refused('tpu_vm.sh', 'create', *words)


def test_without_gcloud(world):
    (world.folder / 'bin' / 'gcloud').unlink()
    assert 'gcloud is not installed; see https://' in world.refused('tpu_vm.sh', 'up', *UP, *RUN)


def test_without_login_or_project(world):
    world.answer('gcloud', 'config get-value project', answers=[''])
    assert 'no project' in world.refused('tpu_vm.sh', 'create', *UP)
    world.answer('gcloud', 'auth list', answers=[''])
    assert 'gcloud auth login' in world.refused('tpu_vm.sh', 'create', *UP)


def test_a_config_typo(world):
    world.answer('bigssl', '--check', answers=[2])
    message = world.refused('tpu_vm.sh', 'up', *UP, *RUN)
    assert message.endswith('nothing was started: bigssl: refused')
    [call] = world.calls('--check')
    assert call == [*RUN[1:], '--check']
    assert world.calls('gcloud') == []


@pytest.mark.parametrize('workdir', ['runs/x', '/mnt/other/x', 'gs://bkt/x'])
def test_a_workdir_that_the_workers_do_not_share(world, workdir):
    assert '--workdir' in world.refused('tpu_vm.sh', 'up', *UP, *RUN[:-1], workdir)


def test_changes_that_are_in_no_commit(world):
    (world.folder / '.gitignore').write_text('')
    assert 'commit first' in world.refused('tpu_vm.sh', 'up', *UP, *RUN)


def test_the_name_is_taken(world):
    create(world)
    done = world.run('tpu_vm.sh', 'create', *UP)
    assert done.returncode == 2
    assert 'pod exists already' in done.stderr
    assert verbs(world) == ['create']
    assert json.dumps(world.calls()).count('--labels') == 1
