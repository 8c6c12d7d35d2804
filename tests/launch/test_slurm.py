"""slurm.sh submits words, not text; the job requeues itself on 75 and only then."""

import subprocess

import pytest

RUN = ['run', '--name', 'gpus', '--nodes', '2', '--gpus-per-node', '4', '--time', '12:00:00']
AWKWARD = ['a b', "it's", '$(touch hacked)', '', 'two\nlines']


def state(world):
    return world.folder / 'state' / 'slurm' / 'gpus'


def submit(world, *command: str) -> list[str]:
    done = world.run('slurm.sh', *RUN, '--', *command)
    assert done.returncode == 0, done.stderr
    [call] = world.calls('sbatch')
    return call


def job(world, call: list[str], **more: str) -> subprocess.CompletedProcess:
    """The job as SLURM starts it: a copy of the script, with the words that sbatch was given."""
    first = next(i for i, word in enumerate(call) if word.endswith('slurm_job.sh'))
    spool = world.folder / 'slurm_script'
    spool.write_text((world.folder / 'launch' / 'slurm_job.sh').read_text())
    return subprocess.run(
        ['bash', str(spool), *call[first + 1 :]],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=world.environment(SLURM_JOB_ID='4711', **more),
    )


def test_the_processes_hear_the_words_that_were_given(world):
    call = submit(world, 'program', *AWKWARD)
    assert '--signal=TERM@600' in call and '--requeue' in call
    assert (state(world) / 'job').read_text() == '4711\0'
    world.install('srun')
    assert job(world, call).returncode == 0
    [started] = world.calls('srun')
    assert started[-len(AWKWARD) - 1 :] == ['program', *AWKWARD]
    assert world.calls('scontrol') == []


def test_75_requeues_until_nothing_new_is_saved(world):
    workdir = world.folder / 'work'
    (workdir / 'a' / 'checkpoints').mkdir(parents=True)
    call = submit(world, 'bigssl', 'run', '--config', 'c.py', '--workdir', str(workdir))
    srun = world.folder / 'bin' / 'srun'
    for attempt, new in enumerate((True, False, False, True, False, False, False)):
        made = f'mkdir {workdir}/a/checkpoints/{attempt}\n' if new else ''
        srun.write_text(f'#!/usr/bin/env bash\n{made}exit 75\n')
        srun.chmod(0o755)
        done = job(world, call)
        assert done.returncode == 0, done.stderr
        assert len(world.calls('scontrol', 'requeue', '4711')) == attempt + 1
    done = job(world, call)
    assert done.returncode == 75
    assert '4 attempts in a row saved nothing new' in done.stderr
    assert len(world.calls('scontrol')) == 7


@pytest.mark.parametrize('code', [0, 1, 2])
def test_other_codes_end_the_job(world, code):
    call = submit(world, 'program')
    world.install('srun')
    world.answer('srun', answers=[code or ''])
    assert job(world, call).returncode == code
    assert world.calls('scontrol') == []


def test_stop_saves_and_does_not_go_on(world):
    call = submit(world, 'program')
    assert world.run('slurm.sh', 'stop', '--name', 'gpus').returncode == 0
    assert world.calls('scancel') == [['scancel', '--signal=TERM', '--name=gpus', '4711']]
    world.install('srun')
    assert job(world, call).returncode == 75
    assert world.calls('srun') == []


def test_stop_of_a_waiting_job_cancels_it(world):
    submit(world, 'program')
    world.answer('squeue', answers=['PENDING'])
    assert world.run('slurm.sh', 'stop', '--name', 'gpus').returncode == 0
    assert world.calls('scancel') == [['scancel', '--name=gpus', '4711']]


def test_delete(world):
    assert 'not created by this script' in world.refused('slurm.sh', 'delete', '--name', 'gpus')
    submit(world, 'program')
    assert world.run('slurm.sh', 'delete', '--name', 'gpus').returncode == 0
    # Number and name: a number that SLURM has given anew to another job does not match.
    assert world.calls('scancel') == [['scancel', '--name=gpus', '4711']]
    assert not state(world).exists()


def test_a_refused_job_leaves_nothing(world):
    world.answer('sbatch', answers=[1])
    assert world.run('slurm.sh', *RUN, '--', 'program').returncode == 1
    assert not state(world).exists()


@pytest.mark.parametrize(
    'words, expected',
    [
        (['--time', 'tomorrow'], '--time tomorrow'),
        (['--nodes', '0'], '--nodes 0: a whole number, 1 or more'),
        (['--partition', 'a;b'], '--partition a\\;b'),
        (['--warn-seconds', '70000'], '65535 at most'),
    ],
)
def test_bad_input(world, words, expected):
    assert expected in world.refused('slurm.sh', *RUN, *words, '--', 'program')


def test_without_sbatch(world):
    (world.folder / 'bin' / 'sbatch').unlink()
    assert 'login node' in world.refused('slurm.sh', *RUN, '--', 'program')
