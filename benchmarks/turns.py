"""What the benchmarks with a peer share: an environment for it, and two processes taking turns.

A worker reads a line of JSON from its standard input and answers it with a line of JSON.  The
parent asks the workers in turn, so that whatever else the machine does meets all of them.  The
peer's interpreter imports this file too: nothing here is but the standard library.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any


def start(command: list[str]) -> Any:
    """A worker process."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: Any, question: Any = None) -> Any:
    """The worker's next line; before that it is sent the question, unless that is None."""
    if question is not None:
        worker.stdin.write(json.dumps(question) + '\n')
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f'a worker died with exit code {worker.wait()}; its error stands above')
    return json.loads(line)


def finish(workers: Any) -> None:
    """Closes the workers' standard input and waits for their end."""
    for worker in workers:
        worker.stdin.close()
        worker.wait()


def peer_python(path: str, packages: tuple[str, ...]) -> str:
    """The peer's interpreter; its environment is made, with `packages`, when it is missing."""
    python = pathlib.Path(path)
    if not python.exists():
        folder = python.parent.parent
        print(f'making {folder} with {", ".join(packages)} ...', flush=True)
        subprocess.run([sys.executable, '-m', 'venv', str(folder)], check=True)
        install = [str(python), '-m', 'pip', 'install', '--quiet', *packages]
        subprocess.run(install, check=True)
    return str(python)
