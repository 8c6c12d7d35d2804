"""`bigssl plan` outlives a compiler that crashes: it takes its whole process along.

    parent                             child: the plan itself
      starts the child                   before each compilation: a note of it, and what to answer
      waits                              if that crashes; afterwards the note is emptied
      a crash: puts the answer into
      the cache, starts another child    finds it there, and all that was compiled before

libtpu 0.0.42, for one, overflows its stack in its cost model for some batches of a Conformer whose
neighbours it compiles.  Such a program is one that does not fit: nobody could train with it.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NOTE = 'BIGSSL_PLAN_NOTE'  # environment: the file where a child leaves its notes
CRASHED = 'the compiler crashed'
_SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


@contextlib.contextmanager
def noted(path: pathlib.Path, answer: Mapping[str, Any]) -> Iterator[None]:
    """Leaves a note while something is compiled: `answer` belongs into `path` if that crashes."""
    note = os.environ.get(NOTE)
    if note:
        pathlib.Path(note).write_text(json.dumps({'path': str(path), 'answer': dict(answer)}))
    try:
        yield
    finally:
        if note:
            pathlib.Path(note).write_text('')


def run_surviving(command: Sequence[str]) -> int:
    """Runs a command that plans, again after every crash of a compilation; returns its exit code.

    Ctrl-C and SIGTERM are the child's: it shares the terminal, and SIGTERM is passed on.
    """
    with tempfile.TemporaryDirectory() as folder:
        note = pathlib.Path(folder) / 'note'
        while True:
            note.write_text('')
            code = _run(command, {**os.environ, NOTE: str(note)})
            if -code not in _SIGNALS:
                return code if code >= 0 else 128 - code
            left = note.read_text()
            if not left:
                return 128 - code
            crashed = json.loads(left)
            answer = pathlib.Path(crashed['path'])
            temporary = answer.with_suffix('.tmp')
            temporary.write_text(json.dumps(crashed['answer']))
            os.replace(temporary, answer)
            print(
                f'{CRASHED} (signal {-code}, its words are above): this program is noted as one'
                ' that does not compile, and the plan starts again with all others kept',
                file=sys.stderr,
                flush=True,
            )


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    child = subprocess.Popen(command, env=dict(environment))
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: child.terminate()),
    }
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
