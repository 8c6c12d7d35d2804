"""Real `bigssl label` workers, killed, stopped for longer than their lease, two on one part.

What they leave is, byte for byte, what one undisturbed worker writes.
"""

import json
import pathlib
import signal
import subprocess
import time

import pytest
from told import PARTS, finish, label_files, wait_until
from tones import with_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]


def claims(workdir: pathlib.Path, number: int) -> list[pathlib.Path]:
    """The claims of that number on any part."""
    return sorted(workdir.glob(f'labels/labels/ledger/part-*.claim-{number:04d}'))


def owner(claim: pathlib.Path) -> int:
    """The process that a claim is of; 0 while it is being written, or gone."""
    try:
        return json.loads(claim.read_text())['pid']
    except (FileNotFoundError, ValueError):
        return 0


def stopped_with_a_claim(recipe, workdir: pathlib.Path, *words: str) -> subprocess.Popen:
    """A worker that has claimed a part and no longer runs."""
    worker = recipe.start(workdir, *PARTS, *words, verb='label')
    wait_until(lambda: any(owner(c) == worker.pid for c in claims(workdir, 1)), worker)
    worker.send_signal(signal.SIGSTOP)
    return worker


def test_workers_and_a_run_make_one_set_though_one_of_them_is_killed(
    recipe, finished, labelled, tmp_path
):
    workdir = with_teacher(finished, tmp_path / 'many')
    killed = recipe.start(workdir, '--stage', 'labels', *PARTS, verb='label')
    wait_until(lambda: claims(workdir, 1), killed)
    killed.send_signal(signal.SIGKILL)
    workers = [
        recipe.start(workdir, *PARTS, verb='label'),
        recipe.start(workdir, *PARTS, verb='label'),
        recipe.start(workdir, *PARTS, '--stages', 'labels'),
    ]
    ended = [finish(worker) for worker in workers]
    assert [worker.returncode for worker in ended] == [0, 0, 0], ended
    killed.communicate()

    done = [json.loads((w / 'labels' / 'done.json').read_text()) for w in (labelled, workdir)]
    for field in ('outputs', 'inputs', 'identity'):
        assert done[0][field] == done[1][field]
    for result in ('utterances', 'hours', 'kept_hours', 'filter', 'label_wer'):
        assert done[0]['results'][result] == done[1]['results'][result]
    assert label_files(workdir) == label_files(labelled) and len(label_files(workdir)) == 7


def test_a_worker_stopped_for_longer_than_its_lease_finds_its_part_taken(
    recipe, finished, labelled, tmp_path
):
    workdir = with_teacher(finished, tmp_path / 'run')
    stopped = stopped_with_a_claim(recipe, workdir)
    (claim,) = claims(workdir, 1)
    part = claim.name.partition('.')[0]
    other = finish(recipe.start(workdir, *PARTS, verb='label'))
    assert other.returncode == 0, other.stderr
    # All is done, the part of the stopped one, too, and by another.
    before = label_files(workdir)
    assert before == label_files(labelled)
    record = json.loads((workdir / 'labels/labels/ledger' / f'{part}.json').read_text())
    assert record['worker']['pid'] != stopped.pid
    stopped.send_signal(signal.SIGCONT)
    late = finish(stopped)
    assert late.returncode == 0, late.stderr
    assert label_files(workdir) == before
    done = json.loads((workdir / 'labels' / 'done.json').read_text())
    assert done['outputs'] == json.loads((labelled / 'labels' / 'done.json').read_text())['outputs']


def test_two_workers_on_one_part_write_it_once(recipe, finished, labelled, tmp_path):
    """The first goes on at the moment when the second has taken its part over."""
    workdir = with_teacher(finished, tmp_path / 'run')
    first = stopped_with_a_claim(recipe, workdir)
    (claim,) = claims(workdir, 1)
    second = recipe.start(workdir, *PARTS, verb='label')
    # It makes the other parts; then it waits for the lease of the first.
    wait_until(lambda: any(owner(c) == second.pid for c in claims(workdir, 2)), second)
    assert [c.name.partition('.')[0] for c in claims(workdir, 2)] == [claim.name.partition('.')[0]]
    first.send_signal(signal.SIGCONT)
    began = time.monotonic()
    ended = [finish(worker) for worker in (first, second)]
    assert [worker.returncode for worker in ended] == [0, 0], ended
    assert time.monotonic() - began < 200
    assert label_files(workdir) == label_files(labelled)
