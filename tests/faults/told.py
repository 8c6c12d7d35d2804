"""What a command that ended says, and a label set as its workers left it."""

import hashlib
import json
import pathlib
import subprocess
import time
from collections.abc import Callable

# Six parts, and a lease that a test can outwait.
PARTS = ('--config.stages.labels.part_hours=0.004', '--config.stages.labels.lease_seconds=10')


def one_line(ended: subprocess.CompletedProcess) -> str:
    """The one line of a command that ended with a user error."""
    assert ended.returncode == 2, (ended.returncode, ended.stdout, ended.stderr)
    assert 'Traceback' not in ended.stderr, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith('bigssl: ')]
    assert len(lines) == 1 and ended.stderr.strip().endswith(lines[0]), ended.stderr
    return lines[0]


def last_line(ended: subprocess.CompletedProcess) -> str:
    """The same where TensorStore has told each write of a failed save with a traceback before."""
    assert ended.returncode == 2, (ended.returncode, ended.stdout, ended.stderr)
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith('bigssl: '), ended.stderr
    return line


def finish(process: subprocess.Popen, seconds: float = 400.0) -> subprocess.CompletedProcess:
    """Waits for a command to end."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen, seconds: float = 400.0
) -> None:
    """Blocks until the condition holds; fails when the process has ended before."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.002)


def label_files(workdir: pathlib.Path) -> dict[str, str]:
    """Name -> hash of the files of the label set; the ledger holds no claim any more."""
    folder = workdir / 'labels' / 'labels'
    assert not list(folder.rglob('*.claim-*')) and not list(folder.rglob('*.tmp'))
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != '.damaged'
    }


def outputs(workdir: pathlib.Path, stage: str) -> dict:
    """What done.json says of a stage's outputs."""
    return json.loads((workdir / stage / 'done.json').read_text())['outputs']


def steps_logged(stage: pathlib.Path) -> int:
    """The newest step in a stage's log."""
    log = stage / 'metrics.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)['step'] for line in lines if line.endswith('}')), default=0)
