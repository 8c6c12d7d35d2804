"""Dry runs print exactly the committed commands and manifests.

After a wanted change: BIGSSL_WRITE_GOLDEN=1 python -m pytest tests/launch/test_golden.py
"""

import os
import pathlib

import pytest

GOLDEN = pathlib.Path(__file__).parent / 'golden'
BIGSSL = ['--', 'bigssl', 'run', '--config', 'experiments/X.py', '--workdir']
AWKWARD = ['--config.name=it\'s "50%" $(date) `id` $HOME \\ *', '--config.note=two\nlines; & | #']
ON_TPU = [*BIGSSL, '/mnt/my-bucket/runs/x']
CASES = {
    'local': ['local.sh', '--processes', '3', '--port', '20123', *BIGSSL, 'runs/a b', *AWKWARD],
    'tpu_vm_up': (
        ['tpu_vm.sh', 'up', '--name', 'pod', '--zone', 'us-west4-a', '--topology', 'v5e-256']
        + ['--spot', '--bucket', 'my-bucket', *ON_TPU, *AWKWARD]
    ),
    'tpu_vm_slices': (
        ['tpu_vm.sh', 'up', '--name', 'two', '--zone', 'us-central2-b', '--topology', '2xv4-512']
        + ['--reserved', '--project', 'p', '--network', 'net', '--subnetwork', 'sub']
        + [
            '--service-account',
            'a@p.iam.gserviceaccount.com',
            '--runtime-version',
            'tpu-ubuntu2204-base',
        ]
        + [*BIGSSL, '/shared/x']
    ),
    'gke': (
        ['gke.sh', 'run', '--name', 'pod', '--topology', 'v5e-256', '--image', 'registry/bigssl:1']
        + ['--bucket', 'my-bucket', *ON_TPU, *AWKWARD]
    ),
    'gke_slices': (
        [
            'gke.sh',
            'run',
            '--name',
            'two',
            '--topology',
            '2xtpu7x-128',
            '--image',
            'registry/bigssl:1',
        ]
        + ['--namespace', 'speech', '--context', 'c', '--service-account', 'trainer', '--spot']
        + ['--env', 'A=$(B) "q"', '--env', 'EMPTY=', '--max-restarts', '7', '--grace-seconds', '60']
        + [*BIGSSL, '/shared/x']
    ),
    'gke_reservation': (
        ['gke.sh', 'run', '--name', 'pod', '--topology', 'v5p-128', '--image', 'registry/bigssl:1']
        + ['--reservation', 'mine', *BIGSSL, '/shared/x']
    ),
    'xpk': (
        [
            'gke.sh',
            'run',
            '--name',
            'pod',
            '--topology',
            '2xv5e-256',
            '--image',
            'registry/bigssl:1',
        ]
        + ['--xpk', '--cluster', 'c', '--zone', 'us-west4-a', '--env', 'A=b c']
        + [*BIGSSL, '/shared/x', *AWKWARD]
    ),
    'slurm': (
        ['slurm.sh', 'run', '--name', 'gpus', '--nodes', '4', '--gpus-per-node', '8', '--time']
        + [
            '2-00:00:00',
            '--partition',
            'a100',
            '--account',
            'speech',
            *BIGSSL,
            '/shared/x',
            *AWKWARD,
        ]
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_a_dry_run_prints_the_committed_text(world, name):
    script, *words = CASES[name]
    words.insert(words.index('--'), '--dry-run')
    done = world.run(script, *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    text = world.normalised(done.stdout)
    golden = GOLDEN / f'{name}.txt'
    if os.environ.get('BIGSSL_WRITE_GOLDEN'):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize('name', CASES)
def test_a_dry_run_changes_nothing(world, name):
    """It asks nobody but the local `bigssl`, and needs nothing else installed."""
    for program in ('gcloud', 'kubectl', 'xpk', 'sbatch', 'squeue', 'scancel', 'scontrol'):
        (world.folder / 'bin' / program).unlink()
    script, *words = CASES[name]
    words.insert(words.index('--'), '--dry-run')
    assert world.run(script, *words).returncode == 0
    assert [call[0] for call in world.calls()] == ['bigssl']
    assert world.calls()[0][-1] == '--check'
    assert not (world.folder / 'state').exists()
