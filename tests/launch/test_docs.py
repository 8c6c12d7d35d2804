"""Every command of docs/launch.md works as it stands there."""

import pathlib
import re
import shlex

PAGE = pathlib.Path(__file__).parent.parent.parent / 'docs' / 'launch.md'


def commands() -> list[list[str]]:
    blocks = re.findall(r'```bash\n(.*?)```', PAGE.read_text(), re.DOTALL)
    lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
    return [shlex.split(line) for line in lines]


def test_every_launcher_and_verb_is_shown():
    shown = {tuple(words[:2]) for words in commands() if words[0].startswith('launch/')}
    for script, verbs in re.findall(r'\[`(\w+\.sh)`\].*\| `([\w ]+)` \|', PAGE.read_text()):
        for verb in verbs.split():
            # `up` is create, wait, install, run and watch.
            assert verb in ('create', 'wait', 'install') or (f'launch/{script}', verb) in shown


def test_every_command_runs_as_it_is_written(world):
    """In the order of the page, against a cloud that grants everything."""
    world.answer('gcloud', 'worker.sh status', answers=['ended 0'])
    world.answer('gcloud', 'accelerator-types', answers=['v5litepod-256\nv5litepod-64'])
    world.install('tail')
    (world.folder / 'bin' / 'tail').chmod(0o755)
    ran = 0
    for words in commands():
        if not words[0].startswith('launch/'):
            continue
        script = words[0].removeprefix('launch/')
        before = [''] if words[1] == 'up' else []
        world.answer('gcloud', 'queued-resources list', answers=[*before, 'ACTIVE'])
        done = world.run(script, *words[1:])
        assert done.returncode == 0, (words, done.stderr)
        ran += 1
        for made in world.folder.glob('state/gke/*/mark'):
            mark = made.read_text().rstrip('\0')
            world.answer('kubectl', 'labels.bigssl-launch', answers=[mark])
            world.answer('kubectl', 'xpk', answers=[made.parent.name])
    assert ran > 20
    assert not list(world.folder.glob('state/*/*'))  # the page deletes all that it creates
