"""A disk that fills up, and one that cannot be written: one line, nothing lost, nothing twice.

Real ones: a tmpfs of a few megabytes (disks.py).
"""

import dataclasses
import shutil

import pytest
from disks import small_disk
from told import PARTS, finish, label_files, last_line, one_line, outputs, steps_logged, wait_until
from tones import with_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]
FULL = 'No space left on device'


def test_a_disk_that_fills_up_while_preparing_and_while_training(recipe, finished, tmp_path):
    with small_disk(tmp_path / 'disk', '2m') as disk:
        inside = dataclasses.replace(recipe, inside=disk.inside)
        workdir, seen = disk.path / 'run', disk.seen / 'run'
        line = one_line(inside.run(workdir, '--stages', 'prepare'))
        assert FULL in line and str(workdir) in line
        assert not (seen / 'corpora' / 'tones' / 'corpus.json').exists()
        assert not (seen / 'prepare' / 'done.json').exists()

        disk.remount('size=64m')
        stages = '--stages', 'prepare,supervised'
        process = inside.start(workdir, *stages)
        wait_until(lambda: steps_logged(seen / 'supervised') >= 40, process)
        disk.fill()
        line = last_line(finish(process))
        assert FULL in line and str(workdir / 'supervised') in line
        assert outputs(seen, 'prepare') == outputs(finished.workdir, 'prepare')

        disk.empty()
        ended = inside.run(workdir, *stages)
        assert ended.returncode == 0, ended.stderr
        assert 'damaged' not in ended.stdout
        assert outputs(seen, 'supervised') == outputs(finished.workdir, 'supervised')


def test_a_disk_that_fills_up_while_labelling(recipe, finished, labelled, tmp_path):
    with small_disk(tmp_path / 'disk', '64m') as disk:
        inside = dataclasses.replace(recipe, inside=disk.inside)
        workdir, seen = disk.path / 'run', disk.seen / 'run'
        with_teacher(finished, seen)
        ledger = seen / 'labels' / 'labels' / 'ledger'
        for verb in ('run', 'label'):
            words = ('--stages', 'labels') if verb == 'run' else ()
            verified = len(list(ledger.glob('part-*.json')))
            process = inside.start(workdir, *words, *PARTS, verb=verb)
            wait_until(lambda v=verified: len(list(ledger.glob('part-*.json'))) > v, process)
            disk.fill()
            line = one_line(finish(process))
            assert FULL in line and 'labels' in line
            assert not (seen / 'labels' / 'done.json').exists()
            disk.empty()
        ended = inside.run(workdir, *PARTS, verb='label')
        assert ended.returncode == 0, ended.stderr
        assert label_files(seen) == label_files(labelled)
        assert outputs(seen, 'labels') == outputs(labelled, 'labels')


def test_a_disk_that_cannot_be_written(recipe, finished, labelled, tmp_path):
    with small_disk(tmp_path / 'disk', '64m') as disk:
        inside = dataclasses.replace(recipe, inside=disk.inside)
        workdir, seen = disk.path / 'run', disk.seen / 'run'
        with_teacher(finished, seen)
        shutil.rmtree(seen / 'supervised')
        (seen / 'supervised' / 'checkpoints').mkdir(parents=True)
        before = {p: p.stat().st_mtime_ns for p in seen.rglob('*')}
        disk.remount('ro')
        for verb, words in (('run', ('--stages', 'labels')), ('label', ())):
            line = one_line(inside.run(workdir, *words, *PARTS, verb=verb))
            assert 'read-only' in line.lower() and str(workdir) in line
        assert {p: p.stat().st_mtime_ns for p in seen.rglob('*')} == before
        disk.remount('rw')

        # One folder alone: of checkpoints, and of labels.
        checkpoints = workdir / 'supervised' / 'checkpoints'
        disk.protect(checkpoints)
        line = one_line(inside.run(workdir, '--stages', 'supervised'))
        assert 'read-only' in line.lower() and str(checkpoints) in line
        disk.unprotect(checkpoints)
        ended = inside.run(workdir, '--stages', 'supervised')
        assert ended.returncode == 0, ended.stderr
        assert outputs(seen, 'supervised') == outputs(finished.workdir, 'supervised')

        labels = workdir / 'labels' / 'labels'
        (seen / 'labels' / 'labels').mkdir(parents=True)
        disk.protect(labels)
        line = one_line(inside.run(workdir, *PARTS, verb='label'))
        assert 'read-only' in line.lower() and str(labels) in line
        disk.unprotect(labels)
        ended = inside.run(workdir, *PARTS, verb='label')
        assert ended.returncode == 0, ended.stderr
        assert label_files(seen) == label_files(labelled)
