"""Workers race, are killed and are stopped; the label set is that of one undisturbed worker."""

import collections
import errno
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import tempfile
import time

import numpy as np
import pytest

from bigssl_jax.data import folder, label_ledger
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.label_ledger import Ledger, item_of
from bigssl_jax.data.label_sets import LabelSet, LabelWriter
from bigssl_jax.data.label_work import complete

KEY = {'teacher': 'aa', 'decoder': 'bb', 'config': 'cc'}
PARTS = 24
FORK = multiprocessing.get_context('fork')


def rows(part: int, count: int = 5) -> dict[str, list]:
    """Made-up labels of one part; the same every time."""
    random = np.random.default_rng(part)
    return {
        'id': [f'u{part}-{i}' for i in range(count)],
        'text': [' '.join(random.choice(['a', 'ship', 'moon'], 4)) for _ in range(count)],
        'tokens': [random.integers(3, 30, 5).tolist() for _ in range(count)],
        'score': random.normal(-5, 1, count).tolist(),
        'confidence': random.uniform(0, 1, count).tolist(),
        'seconds': random.uniform(1, 3, count).tolist(),
    }


def work(directory, slow=0.0, lease=300.0, parts=PARTS, log=None, machine=None, stops=False):
    """One worker; `log` has a line of its own for every part that any worker made."""
    made = []
    writer = LabelWriter(directory, KEY, parts)
    ledger = Ledger(directory, lease)
    if machine is not None:
        ledger._worker['machine'] = machine

    def make(part: int):
        time.sleep(slow)
        if stops and not made:
            os.kill(os.getpid(), signal.SIGSTOP)  # until somebody lets it go on
        made.append(part)
        if log:
            with open(log, 'a') as file:
                file.write(f'{part}\n')
        return {'columns': rows(part)}

    return complete(writer, ledger, make, num_rows=5 * parts)


def start(*arguments, **named) -> multiprocessing.Process:
    process = FORK.Process(target=work, args=arguments, kwargs=named)
    process.start()
    return process


def hashes(directory) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in pathlib.Path(directory).iterdir()
        if p.is_file()
    }


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp('labels')
    work(directory)
    found = hashes(directory)
    assert len(found) == PARTS + 1
    return found


def test_racing_workers_make_every_part_exactly_once(tmp_path, undisturbed):
    log = tmp_path / 'log'
    racers = [start(tmp_path / 'labels', 0.01, log=log) for _ in range(6)]
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 6
    assert sorted(map(int, log.read_text().split())) == list(range(PARTS))
    assert hashes(tmp_path / 'labels') == undisturbed
    ledger = tmp_path / 'labels' / 'ledger'
    assert sorted(p.name for p in ledger.iterdir()) == [
        f'part-{part:05d}.json' for part in range(PARTS)
    ]
    records = [json.loads(p.read_text()) for p in ledger.iterdir()]
    assert len({record['worker']['pid'] for record in records}) > 1


def test_workers_killed_at_random_moments_lose_and_double_nothing(tmp_path, undisturbed):
    random = np.random.default_rng(0)
    log, kills = tmp_path / 'log', 0
    workers = []
    limit = time.monotonic() + 60
    while not (tmp_path / 'labels' / 'labels.json').exists() and time.monotonic() < limit:
        workers = [w for w in workers if w.is_alive()]
        workers += [start(tmp_path / 'labels', 0.03, log=log) for _ in range(3 - len(workers))]
        time.sleep(random.uniform(0.01, 0.1))
        victim = workers[random.integers(len(workers))]
        if kills < 25 and victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            kills += 1
    for worker in workers:
        worker.join(60)
    work(tmp_path / 'labels')
    assert kills >= 3
    assert hashes(tmp_path / 'labels') == undisturbed
    assert [p.name for p in tmp_path.rglob('*.tmp')] == []


@pytest.mark.parametrize('machine', ['', 'elsewhere'])
def test_a_killed_worker_of_another_machine_loses_its_claim_with_the_lease(
    tmp_path, machine, undisturbed
):
    killed = start(tmp_path, 30.0, lease=1.0, machine=machine)
    wait_for(lambda: list(tmp_path.glob('ledger/*.claim-0001')))
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    began = time.monotonic()
    work(tmp_path, lease=1.0)
    assert time.monotonic() - began > 0.5
    assert hashes(tmp_path) == undisturbed


def test_a_worker_stopped_for_longer_than_its_lease_does_no_harm(tmp_path, undisturbed):
    log = tmp_path / 'log'
    directory = tmp_path / 'labels'
    stopped = start(directory, lease=0.6, log=log, stops=True)
    wait_for(lambda: ') T ' in pathlib.Path(f'/proc/{stopped.pid}/stat').read_text())
    others = [start(directory, 0.01, lease=0.6, log=log) for _ in range(2)]
    for other in others:
        other.join(60)
    assert log.read_text().split().count('0') == 1  # the stopped one's part was taken over
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.join(60)
    assert [w.exitcode for w in (stopped, *others)] == [0, 0, 0]
    # The stopped one made its part, too, and found that it was another's.
    made = collections.Counter(log.read_text().split())
    assert made == collections.Counter(['0', *map(str, range(PARTS))])
    assert hashes(directory) == undisturbed


def test_work_that_outlasts_the_lease_keeps_its_claim(tmp_path):
    log = tmp_path / 'log'
    slow = start(tmp_path / 'labels', 1.5, lease=0.6, parts=1, log=log)
    wait_for(lambda: list(tmp_path.glob('labels/ledger/*.claim-0001')))
    work(tmp_path / 'labels', lease=0.6, parts=1, log=log)
    slow.join(60)
    assert slow.exitcode == 0
    assert log.read_text().split() == ['0']


def test_one_of_two_that_saw_the_same_stale_claim_wins(tmp_path, monkeypatch):
    ledgers = [Ledger(tmp_path) for _ in range(3)]
    first = ledgers[0].take(['part-00000'])
    assert first is not None and first.number == 1
    assert ledgers[1].take(['part-00000']) is None
    os.utime(first.path, (1, 1))
    seen = ledgers[1]._newest()
    for ledger in ledgers[1:]:
        monkeypatch.setattr(ledger, '_newest', lambda: seen)
    claims = [ledger.take(['part-00000']) for ledger in ledgers[1:]]
    assert [claim.number if claim else None for claim in claims] == [2, None]
    assert not first.is_mine() and claims[0].is_mine()


def test_what_fails_is_free_for_others_at_once(tmp_path):
    ledger = Ledger(tmp_path)
    with pytest.raises(RuntimeError), ledger.take(['a']):
        raise RuntimeError
    again = Ledger(tmp_path).take(['a'])
    assert again is not None and again.number == 2
    assert ledger.owners()['a']['pid'] == os.getpid()


def test_a_claim_that_is_being_written_is_no_ones_prey(tmp_path):
    ledger = Ledger(tmp_path)
    (tmp_path / 'ledger' / 'a.claim-0001').write_bytes(b'')
    assert ledger.take(['a']) is None
    os.utime(tmp_path / 'ledger' / 'a.claim-0001', (1, 1))
    assert ledger.take(['a']).number == 2


def test_a_reused_process_number_is_no_living_owner(tmp_path):
    ledger = Ledger(tmp_path)
    ledger._worker['started'] = '1'
    assert ledger.take(['a']).number == 1
    assert Ledger(tmp_path).take(['a']).number == 2


def test_of_two_that_write_one_part_the_first_stays(tmp_path):
    barrier = FORK.Barrier(4)

    def write(number: int) -> None:
        writer = LabelWriter(tmp_path, KEY, 1)
        barrier.wait()
        writer.write(0, rows(number))

    writers = [FORK.Process(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    labels = LabelWriter(tmp_path, KEY, 1).finish(num_rows=5)
    ids = labels.table(['id'])['id'].to_pylist()
    assert ids in [rows(number)['id'] for number in range(4)]
    before = hashes(tmp_path)
    LabelWriter(tmp_path, KEY, 1).write(0, rows(9))
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    'when, harm',
    [
        *(('verified', harm) for harm in ('truncated', 'flipped', 'gone', 'foreign')),
        # Without a hash in the ledger, a flipped bit of a value is not seen.
        *(('unverified', harm) for harm in ('truncated', 'gone', 'foreign')),
        # In a finished set it is found by LabelSet.verify.
        *(('complete', harm) for harm in ('truncated', 'gone', 'foreign')),
    ],
)
def test_a_damaged_part_is_set_aside_told_and_made_again(tmp_path, harm, when, undisturbed, caplog):
    if when == 'complete':
        work(tmp_path)
    else:
        writer = LabelWriter(tmp_path, KEY, PARTS)
        for part in range(PARTS):
            writer.write(part, rows(part))
    path = pathlib.Path(writer.path(3) if when != 'complete' else _path(tmp_path, 3))
    content = path.read_bytes()
    middle = len(content) // 3
    damaged = {
        'truncated': content[:-50],
        'flipped': content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :],
        'foreign': b'no Parquet',
    }
    if harm == 'gone':
        path.unlink()
    else:
        path.write_bytes(damaged[harm])
    if when == 'unverified':
        (tmp_path / 'ledger' / 'part-00003.json').unlink()
    work(tmp_path)
    found = hashes(tmp_path)
    aside = found.pop(f'{path.name}.damaged', None)
    assert found == undisturbed
    if harm != 'gone':
        assert aside == hashlib.sha256(damaged[harm]).hexdigest()
        assert f'{path} is damaged' in caplog.text


def _path(directory, part: int) -> str:
    return f'{directory}/part-{part:05d}-of-{PARTS:05d}.parquet'


def test_parts_of_a_version_without_a_ledger_are_read_and_kept(tmp_path, undisturbed):
    work(tmp_path)
    (tmp_path / 'labels.json').unlink()
    shutil.rmtree(tmp_path / 'ledger')
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob('part-*')}
    work(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob('part-*')} == before
    assert hashes(tmp_path) == undisturbed


def test_a_full_disk_leaves_no_damaged_part(tmp_path, undisturbed, monkeypatch):
    """Full at the k-th write of any kind, for every k, until a run gets through."""
    sync, left = folder._sync, [0]

    def full(path: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        sync(path)

    monkeypatch.setattr(folder, '_sync', full)
    failures = 0
    for k in range(1, 40):
        left[0] = k
        try:
            work(tmp_path)
            break
        except DataError as error:
            assert 'No space left on device' in str(error) and '\n' not in str(error)
            failures += 1
        if (tmp_path / 'labels.json').exists():  # only its folder's entry was not yet synced
            LabelSet.open(tmp_path).verify()
        assert [p.name for p in tmp_path.rglob('*.tmp')] == []
        assert list(tmp_path.glob('*.damaged')) == []
    assert failures > 5
    monkeypatch.undo()
    work(tmp_path)
    assert hashes(tmp_path) == undisturbed


def test_a_full_disk_at_a_claim_gives_one_line(tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    ledger = Ledger(tmp_path)
    monkeypatch.setattr(label_ledger.os, 'open', full)
    with pytest.raises(DataError, match='ledger: cannot be written: No space left on device'):
        ledger.take([item_of(0)])


def test_a_read_only_folder_gives_one_clear_line():
    """As another user, since root may write everywhere."""
    directory = tempfile.mkdtemp()
    os.chmod(directory, 0o555)

    def attempt(pipe) -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            work(os.path.join(directory, 'labels'))
            pipe.send('written')
        except DataError as error:
            pipe.send(str(error))

    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=attempt, args=(theirs,))
    process.start()
    said = ours.recv() if ours.poll(60) else 'nothing'
    process.join(60)
    os.rmdir(directory)
    assert said == f'{directory}/labels: cannot be written: Permission denied'


def wait_for(condition, seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)
