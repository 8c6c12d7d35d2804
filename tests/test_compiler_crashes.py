"""A compiler that takes its process along: its program is answered for, and the rest goes on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from bigssl_jax.compiler_crashes import CRASHED, NOTE, noted, run_surviving

# 'Compiles' three programs; the second kills the process by the signal that is its first argument.
PLAN = """
import os, pathlib, sys
from bigssl_jax.compiler_crashes import noted
cache = pathlib.Path(sys.argv[2])
for name in ('first', 'second', 'third'):
    answer = cache / f'{name}.json'
    if not answer.exists():
        with noted(answer, {'complaint': 'crashed'}):
            print('compiling', name, flush=True)
            if name == 'second': os.kill(os.getpid(), int(sys.argv[1]))
        answer.write_text('{"complaint": ""}')
if len(sys.argv) > 3: os.kill(os.getpid(), int(sys.argv[3]))
sys.exit(5)
"""


def command(tmp_path, *words) -> list[str]:
    return [sys.executable, '-c', PLAN, str(int(words[0])), str(tmp_path), *map(str, words[1:])]


@pytest.mark.parametrize('number', [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_is_the_answer_and_the_rest_is_compiled_once(tmp_path, number, capfd):
    assert run_surviving(command(tmp_path, number)) == 5
    answers = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob('*.json')}
    assert {name: answer['complaint'] for name, answer in answers.items()} == {
        'first': '', 'second': 'crashed', 'third': '',
    }  # fmt: skip
    out, err = capfd.readouterr()
    assert out.split() == ['compiling', 'first', 'compiling', 'second', 'compiling', 'third']
    assert f'{CRASHED} (signal {int(number)}' in err
    assert list(tmp_path.glob('*.tmp')) == []


def test_a_kill_is_no_crash_and_starts_nothing_again(tmp_path, capfd):
    assert run_surviving(command(tmp_path, signal.SIGKILL)) == 128 + signal.SIGKILL
    assert [path.stem for path in tmp_path.glob('*.json')] == ['first']
    assert capfd.readouterr().out.count('compiling') == 2


def test_a_crash_outside_of_a_compilation_is_not_tried_again(tmp_path, capfd):
    (tmp_path / 'second.json').write_text('{}')
    ended = run_surviving(command(tmp_path, signal.SIGSEGV, int(signal.SIGSEGV)))
    assert ended == 128 + signal.SIGSEGV
    assert capfd.readouterr().out.count('compiling') == 2


def test_sigterm_reaches_the_child(tmp_path):
    child = "import time; print('up', flush=True); time.sleep(60)"
    program = (
        'import sys; from bigssl_jax.compiler_crashes import run_surviving;'
        f'sys.exit(run_surviving([sys.executable, "-c", {child!r}]))'
    )
    parent = subprocess.Popen(
        [sys.executable, '-c', program], stdout=subprocess.PIPE, text=True,
        cwd=pathlib.Path(__file__).parent.parent,
    )  # fmt: skip
    assert parent.stdout.readline() == 'up\n'
    started = time.monotonic()
    parent.terminate()
    assert parent.wait(20) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 20


def test_without_a_parent_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.delenv(NOTE, raising=False)
    with noted(tmp_path / 'answer', {}):
        pass
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv(NOTE, str(tmp_path / 'note'))
    with pytest.raises(RuntimeError), noted(tmp_path / 'answer', {'fits': False}):
        assert json.loads((tmp_path / 'note').read_text())['answer'] == {'fits': False}
        raise RuntimeError
    assert (tmp_path / 'note').read_text() == ''
