"""The launchers as Bash, the table of names, and the real gcloud's opinion of the commands."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from bigssl_jax.parallel.topologies import topology, topology_names

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parent.parent / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))


def test_shellcheck_has_nothing_to_say():
    program = pathlib.Path(sys.executable).parent / 'shellcheck'
    done = subprocess.run(
        [program, *SCRIPTS], capture_output=True, text=True, check=False, cwd=LAUNCH
    )
    assert done.returncode == 0, done.stdout


def test_nothing_is_evaluated():
    for script in SCRIPTS:
        code = [
            line for line in script.read_text().splitlines() if not line.lstrip().startswith('#')
        ]
        assert not any('eval' in line.split() for line in code), script


@pytest.mark.parametrize('script', ['local.sh', 'tpu_vm.sh', 'gke.sh', 'slurm.sh'])
def test_help_names_every_option(world, script):
    done = world.run(script, '--help')
    assert done.returncode == 0
    source = (LAUNCH / script).read_text().split('source "')[1]
    patterns = [line.split(')')[0] for line in source.splitlines() if line.startswith('      --')]
    options = [word for pattern in patterns for word in pattern.split(' | ')]
    assert len(options) > 5
    assert [
        option for option in options if option != '--' and option.strip() not in done.stdout
    ] == []


def rows() -> list[list[str]]:
    lines = (LAUNCH / 'accelerators.tsv').read_text().splitlines()
    return [line.split('\t') for line in lines if not line.startswith('#')]


def test_a_slice_has_as_many_chips_as_its_hosts():
    """v3, v4, v5p and tpu7x are counted in cores, two a chip; v5e and v6e in chips."""
    for name, kind, runtime, selector, shape, chips_per_host, hosts in rows():
        generation, count = name.split('-')
        chips = 1
        for side in shape.split('x'):
            chips *= int(side)
        assert chips == int(chips_per_host) * int(hosts), name
        assert int(count) == chips * (1 if generation in ('v5e', 'v6e') else 2), name
        assert kind in ('-', name, name.replace('v5e', 'v5litepod')), name
        assert (kind == '-') == (runtime == '-'), name
        assert kind != '-' or selector != '-', name


# A shape that can be compiled for, and that the cloud does not rent out.
NOT_OFFERED = {'v3-16'}


def test_every_topology_of_the_package_has_its_names():
    known = {row[0]: row for row in rows()}
    assert set(topology_names()) - set(known) <= NOT_OFFERED
    for name, row in known.items():
        assert 'x'.join(map(str, topology(name).shape)) == row[4], name


@pytest.mark.slow  # gcloud loads its whole tree of commands
@pytest.mark.skipif(not shutil.which('gcloud'), reason='gcloud is not installed')
def test_gcloud_knows_every_command_and_option(tmp_path):
    """gcloud's own parser, without a connection, reads every gcloud command of the dry runs."""
    commands = {}
    for golden in HERE.glob('golden/tpu_vm*.txt'):
        for line in golden.read_text().splitlines():
            if line.startswith('gcloud '):
                words = [word for word in shlex.split(line) if not word.startswith('--command=')]
                key = (*words[:6], *(word.split('=')[0] for word in words[6:]))
                commands.setdefault(key, shlex.join(words))
    page = (LAUNCH.parent / 'docs' / 'launch.md').read_text()
    for line in page.splitlines():
        if line.startswith('gcloud '):
            commands[line] = line
    for verb in ('delete pod --force --quiet', 'describe pod --format=value(state)'):
        commands[verb] = f'gcloud compute tpus queued-resources {verb} --zone=z --project=p'
    commands['storage'] = 'gcloud storage ls gs://b/*/done.json gs://b/*/checkpoints/*'
    listing = tmp_path / 'commands.json'
    listing.write_text(json.dumps([{'command_string': c} for c in commands.values()]))
    done = subprocess.run(
        ['gcloud', 'meta', 'lint-gcloud-commands', f'--commands-file={listing}'],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, 'CLOUDSDK_CONFIG': str(tmp_path)},
    )
    verdicts = json.loads(done.stdout)
    assert len(verdicts) == len(commands) > 8
    assert [v['error_message'] for v in verdicts if not v['success']] == []
