"""Runs the launchers where no cloud can be reached: every outside command is a stand-in.

A stand-in writes the words it was called with as a line of JSON and answers by rules.  PATH holds
the stand-ins and the few system tools that the launchers use, nothing else: what is not put there
is missing, as it may be on a user's machine.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
TOOLS = (
    'bash basename cat chmod dirname env git grep ls mkdir mv rm rmdir sed setsid sh sleep'
    ' sort tail tar touch'
).split()
STAND_IN = """#!{python} -SEI
import json, os, sys

folder = {folder!r} + '/'
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(folder + 'calls.jsonl', 'a') as file:
    file.write(json.dumps(call) + chr(10))
for word in call:
    if word.startswith('--labels=bigssl-launch='):
        with open(folder + 'mark', 'w') as file:
            file.write(word.split('=')[-1])
with open(folder + 'rules.json') as file:
    rules = json.load(file)
for rule in rules:
    if rule['program'] == call[0] and all(word in ' '.join(call) for word in rule['words']):
        counter = folder + 'count-%d' % rule['number']
        asked = os.path.getsize(counter) if os.path.exists(counter) else 0
        with open(counter, 'a') as file:
            file.write('.')
        answer = rule['answers'][min(asked, len(rule['answers']) - 1)]
        if answer == 'MARK':
            with open(folder + 'mark') as file:
                answer = file.read()
        if isinstance(answer, int):
            print(call[0] + ': refused', file=sys.stderr)
            sys.exit(answer)
        sys.stdout.write(answer + chr(10) if answer else '')
        break
"""


@dataclasses.dataclass
class World:
    """A machine to launch from: stand-ins, state, and the way to run a launcher there."""

    folder: pathlib.Path
    rules: list = dataclasses.field(default_factory=list)

    def install(self, *programs: str) -> None:
        for program in programs:
            path = self.folder / 'bin' / program
            path.write_text(STAND_IN.format(python=sys.executable, folder=str(self.folder)))
            path.chmod(0o755)

    def answer(self, program: str, *words: str, answers) -> None:
        """Rules what `program` answers when all `words` occur in a call: texts in turn, the last
        for ever; a number is the exit code of a refusal.  Later rules go before earlier ones."""
        rule = {'program': program, 'words': words, 'answers': answers, 'number': len(self.rules)}
        self.rules.insert(0, rule)
        (self.folder / 'rules.json').write_text(json.dumps(self.rules))

    def calls(self, *words: str) -> list[list[str]]:
        """The calls so far in which all `words` occur."""
        path = self.folder / 'calls.jsonl'
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [call for call in found if all(word in ' '.join(call) for word in words)]

    def environment(self, **more: str) -> dict[str, str]:
        return {
            'PATH': f'{self.folder}/bin:{self.folder}/tools',
            'HOME': str(self.folder / 'home'),
            'LANG': 'C.UTF-8',
            'BIGSSL_LAUNCH_STATE': str(self.folder / 'state'),
            'BIGSSL_LAUNCH_POLL_SECONDS': '0',
            **more,
        }

    def run(
        self, script: str, *words: str, folder: pathlib.Path | None = None, **more: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.folder / 'launch' / script), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
            cwd=folder,
            env=self.environment(**more),
        )

    def refused(self, script: str, *words: str) -> str:
        """The one line with which a launcher refuses, before it has changed anything."""
        done = self.run(script, *words)
        assert done.returncode == 2, done.stderr
        lines = done.stderr.strip().splitlines()
        assert lines[-1].startswith(f'{script}: '), done.stderr
        assert not self.changes()
        assert not any(p.is_file() for p in (self.folder / 'state').glob('*/*/*'))
        return lines[-1].removeprefix(f'{script}: ')

    def changes(self) -> list[list[str]]:
        """The calls that changed something outside."""
        verbs = {'create', 'delete', 'ssh', 'scp', 'patch', 'apply', 'sbatch', 'scancel'}
        return [call for call in self.calls() if verbs & set(call)]

    def normalised(self, text: str) -> str:
        """A dry run's text without what differs from place to place."""
        text = re.sub(r'run-[0-9a-f]{8}', 'run-MARK', text)
        text = text.replace(str(self.folder / 'state'), 'STATE')
        return text.replace(str(self.folder), 'REPOSITORY')


@pytest.fixture(scope='session')
def commit(tmp_path_factory) -> pathlib.Path:
    """The .git folder of a repository with one commit."""
    folder = tmp_path_factory.mktemp('repository')
    names = [f'GIT_{who}_{what}' for who in ('AUTHOR', 'COMMITTER') for what in ('NAME', 'EMAIL')]
    for words in (['init', '-q', '--template='], ['commit', '-q', '--allow-empty', '-m', 'all']):
        subprocess.run(
            ['git', '-C', str(folder), *words],
            check=True,
            env={**os.environ, **dict.fromkeys(names, 'a')},
        )
    return folder / '.git'


@pytest.fixture
def world(tmp_path, commit) -> World:
    """A repository of one commit with the launchers in it, and a cloud that grants everything."""
    for name in ('bin', 'tools', 'home'):
        (tmp_path / name).mkdir()
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path, f'{tool} is not installed'
        (tmp_path / 'tools' / tool).symlink_to(path)
    shutil.copytree(commit, tmp_path / '.git')
    (tmp_path / '.gitignore').write_text('*\n')
    shutil.copytree(ROOT / 'launch', tmp_path / 'launch')
    world = World(tmp_path)
    world.install('gcloud', 'kubectl', 'xpk', 'sbatch', 'squeue', 'scancel', 'scontrol', 'bigssl')
    world.answer('gcloud', 'auth list', answers=['somebody@example.org'])
    world.answer('gcloud', 'config get-value project', answers=['my-project'])
    for kind in ('v5litepod-16', 'v5litepod-256', 'v4-512'):
        world.answer('gcloud', 'accelerator-types', kind, answers=[kind])
    world.answer('gcloud', 'describe', 'labels', answers=['MARK'])
    world.answer('kubectl', 'current-context', answers=['my-cluster'])
    world.answer('kubectl', 'customresourcedefinition', answers=['jobsets'])
    world.answer('sbatch', answers=['4711'])
    world.answer('squeue', answers=['RUNNING'])
    return world
