"""Preparation gives the same bytes however it is run or killed; bad input costs one line each."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import soundfile

from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.folder import folder_lock
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.prepare import Options, prepare, prepare_command

BAD = {'missing', 'unreadable', 'empty', 'truncated', 'silent', 'clipped', 'too_short', 'too_long',
       'bad_cut'}  # fmt: skip


def write_manifest(folder, count, seconds=0.4, rate=16000):
    """`count` good files in three formats and a manifest of them; -> the manifest's path."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(count):
        ending = ('wav', 'flac', 'ogg')[k % 3]
        audio = 0.1 * rng.standard_normal(int(rate * seconds) + 10 * k)
        soundfile.write(folder / f'{k:03d}.{ending}', audio, rate)
        lines.append({'audio': f'{k:03d}.{ending}', 'text': f'line {k}', 'speaker': f's{k % 2}'})
    path = folder / 'm.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


def add_bad_files(folder, manifest):
    """One utterance for each way of being unusable, appended to the manifest."""
    tone = 0.3 * np.sin(np.arange(16000) / 5)
    soundfile.write(folder / 'whole.wav', tone, 16000)
    content = (folder / 'whole.wav').read_bytes()
    (folder / 'truncated.wav').write_bytes(content[:9000])
    (folder / 'unreadable.wav').write_bytes(b'not audio at all ' * 100)
    (folder / 'empty.wav').write_bytes(b'')
    soundfile.write(folder / 'silent.wav', np.zeros(16000), 16000)
    soundfile.write(folder / 'clipped.wav', np.sign(tone), 16000)
    soundfile.write(folder / 'too_short.wav', tone[:500], 16000)
    soundfile.write(folder / 'too_long.wav', np.tile(tone, 8), 16000)
    with open(manifest, 'a') as file:
        for name in sorted(BAD - {'bad_cut'}):
            file.write(json.dumps({'audio': f'{name}.wav'}) + '\n')
        file.write('{"audio": "whole.wav", "id": "bad_cut", "offset": 3.5, "duration": 1}\n')


def hashes(directory):
    """{relative path: sha256} of everything but the lock."""
    root = pathlib.Path(directory)
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob('*'))
        if path.is_file() and path.name != '.lock'
    }


def quick(manifest, out, jobs=1, shard_size=4, **kwargs):
    options = Options(shard_size=shard_size, max_seconds=5.0)
    return prepare(manifest, out, jobs=jobs, options=options, progress=False, **kwargs)


@pytest.fixture(scope='module')
def speech(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp('speech'), 10)


def test_rows_come_in_manifest_order_and_nothing_temporary_remains(speech, tmp_path):
    info = quick(speech, tmp_path / 'c')
    corpus = Corpus.open(tmp_path / 'c')
    assert corpus.column('id').to_pylist() == [f'{k:03d}' for k in range(10)]
    assert corpus.column('text').to_pylist() == [f'line {k}' for k in range(10)]
    assert corpus.sample_counts.tolist() == [6400 + 10 * k for k in range(10)]
    assert info['entries'] == 10 and info['quarantined'] == 0 and info['source'] == 'm.jsonl'
    names = set(hashes(tmp_path / 'c'))
    described = {file['file'] for file in info['files'] + info['shards']}
    assert names == described | {'corpus.json'}


def test_one_and_two_workers_give_equal_bytes(speech, tmp_path):
    quick(speech, tmp_path / 'one', jobs=1)
    quick(speech, tmp_path / 'two', jobs=2)
    assert hashes(tmp_path / 'one') == hashes(tmp_path / 'two')


def test_moving_the_folder_of_a_manifest_changes_nothing(tmp_path):
    manifest = write_manifest(tmp_path / 'here', 5)
    quick(manifest, tmp_path / 'c')
    before = hashes(tmp_path / 'c')
    os.rename(tmp_path / 'here', tmp_path / 'there')
    quick(tmp_path / 'there' / 'm.jsonl', tmp_path / 'c')
    assert hashes(tmp_path / 'c') == before


def test_a_second_run_does_nothing_and_other_inputs_are_refused(speech, tmp_path, monkeypatch):
    out = tmp_path / 'c'
    first = quick(speech, out)
    monkeypatch.setattr('bigssl_jax.data.shards._decode', None)  # any decoding would raise
    times = {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    assert quick(speech, out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*')} == times
    with pytest.raises(DataError, match='shard_size is 4 there, 5 asked for'):
        quick(speech, out, shard_size=5)
    shorter = tmp_path / 'shorter.jsonl'
    lines = [json.loads(line) for line in speech.read_text().splitlines()[:-1]]
    shorter.write_text(
        ''.join(json.dumps({**x, 'audio': str(speech.parent / x['audio'])}) + '\n' for x in lines)
    )
    with pytest.raises(DataError, match=r'other inputs \(other entries\)'):
        quick(shorter, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*')} == times


def test_a_lost_shard_of_a_complete_corpus_is_not_passed_over(speech, tmp_path):
    quick(speech, tmp_path / 'c')
    os.remove(tmp_path / 'c' / 'shards' / 'audio-00002.tfrecord')
    with pytest.raises(DataError, match='audio-00002.tfrecord is missing'):
        quick(speech, tmp_path / 'c')


KILLED_AT_A_RENAME = """
    import os, signal, sys
    from bigssl_jax.data.prepare import Options, prepare
    left, replace = int(sys.argv[3]), os.replace

    def deadly(source, target):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = deadly
    options = Options(shard_size=4, max_seconds=5.0)
    prepare(sys.argv[1], sys.argv[2], jobs=1, options=options, progress=False,
            max_quarantine_fraction=None)
"""


def run_script(script, *arguments):
    code = textwrap.dedent(script)
    return subprocess.Popen([sys.executable, '-c', code, *map(str, arguments)])


def test_sigkill_before_any_rename_and_again_gives_equal_bytes(tmp_path):
    # Run r is killed before its (r + 1)-th rename, so that every stage of the work is cut at.
    manifest = write_manifest(tmp_path / 'speech', 3)
    add_bad_files(tmp_path / 'speech', manifest)
    quick(manifest, tmp_path / 'unbroken', max_quarantine_fraction=None)
    kills = 0
    for allowed in range(20):
        code = run_script(KILLED_AT_A_RENAME, manifest, tmp_path / 'c', allowed).wait(timeout=120)
        assert os.path.exists(tmp_path / 'c' / 'corpus.json') == (code == 0)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 4
    assert hashes(tmp_path / 'c') == hashes(tmp_path / 'unbroken')


TWO_WORKERS = """
    import sys
    from bigssl_jax.data.prepare import Options, prepare
    options = Options(shard_size=4, max_seconds=5.0)
    prepare(sys.argv[1], sys.argv[2], jobs=2, options=options, progress=False)
"""


def test_sigkill_of_the_parent_of_two_workers_leaves_no_orphan_and_no_damage(tmp_path):
    manifest = write_manifest(tmp_path / 'speech', 120, seconds=8.0, rate=22050)
    options = Options(shard_size=4, max_seconds=20.0)
    script = TWO_WORKERS.replace('5.0', '20.0')
    process = run_script(script, manifest, tmp_path / 'c')
    parts = tmp_path / 'c' / 'parts'
    deadline = time.monotonic() + 60
    while not (parts.is_dir() and len(list(parts.glob('*.parquet'))) >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    children = [
        int(child)
        for path in pathlib.Path(f'/proc/{process.pid}/task').glob('*/children')
        for child in path.read_text().split()
    ]
    process.kill()
    process.wait()
    assert not os.path.exists(tmp_path / 'c' / 'corpus.json'), 'killed too late to test anything'
    deadline = time.monotonic() + 20
    while any(os.path.exists(f'/proc/{child}') for child in children):
        assert time.monotonic() < deadline, 'workers outlive their parent'
        time.sleep(0.05)
    prepare(manifest, tmp_path / 'c', jobs=1, options=options, progress=False)
    prepare(manifest, tmp_path / 'unbroken', jobs=1, options=options, progress=False)
    assert hashes(tmp_path / 'c') == hashes(tmp_path / 'unbroken')


def test_an_interrupted_run_over_another_list_leaves_nothing_behind(speech, tmp_path):
    longer = write_manifest(tmp_path / 'longer', 17)
    assert run_script(KILLED_AT_A_RENAME, longer, tmp_path / 'c', 10).wait(timeout=120) < 0
    assert len(list((tmp_path / 'c' / 'shards').iterdir())) >= 5
    quick(speech, tmp_path / 'c')
    quick(speech, tmp_path / 'fresh')
    assert hashes(tmp_path / 'c') == hashes(tmp_path / 'fresh')


WITH_A_FULL_DISK = """
    import resource, sys
    from bigssl_jax.data.errors import DataError
    from bigssl_jax.data.prepare import Options, prepare
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    options = Options(shard_size=4, max_seconds=5.0)
    try:
        prepare(sys.argv[1], sys.argv[2], jobs=1, options=options, progress=False)
    except DataError as error:
        assert 'cannot be written: File too large' in str(error), error
        sys.exit(3)
"""


@pytest.mark.parametrize('limit', [2000, 20000])
def test_a_write_that_fails_is_one_line_and_the_work_continues(speech, tmp_path, limit):
    # A limit on the size of files stands for a full disk.
    assert run_script(WITH_A_FULL_DISK, speech, tmp_path / 'c', limit).wait(timeout=60) == 3
    assert not list((tmp_path / 'c').rglob('*.tmp'))
    quick(speech, tmp_path / 'c')
    quick(speech, tmp_path / 'fresh')
    assert hashes(tmp_path / 'c') == hashes(tmp_path / 'fresh')


def test_one_folder_has_one_preparer(speech, tmp_path):
    with folder_lock(str(tmp_path / 'c')):
        with pytest.raises(DataError, match=f'another process is at work.*process {os.getpid()}'):
            quick(speech, tmp_path / 'c')
    quick(speech, tmp_path / 'c')  # a released, or dead, holder does not stand in the way


def test_two_preparers_started_at_once_make_one_sound_corpus(speech, tmp_path):
    script = TWO_WORKERS.replace('jobs=2', 'jobs=1')
    both = [run_script(script, speech, tmp_path / 'c') for _ in range(2)]
    codes = [process.wait(timeout=120) for process in both]
    assert 0 in codes  # the other one found it complete, or said that the folder is in use
    quick(speech, tmp_path / 'fresh')
    assert hashes(tmp_path / 'c') == hashes(tmp_path / 'fresh')


def test_every_kind_of_bad_file_is_put_aside_with_its_reason(tmp_path):
    manifest = write_manifest(tmp_path / 's', 6)
    add_bad_files(tmp_path / 's', manifest)
    info = quick(manifest, tmp_path / 'c', max_quarantine_fraction=None)
    corpus = Corpus.open(tmp_path / 'c')
    assert corpus.column('id').to_pylist() == [f'{k:03d}' for k in range(6)]
    lines = (tmp_path / 'c' / 'quarantine.jsonl').read_text().splitlines()
    aside = [json.loads(line) for line in lines]
    assert {item['id']: item['reason'] for item in aside} == {name: name for name in BAD}
    assert all(set(item) == {'id', 'audio', 'reason', 'detail'} for item in aside)
    assert info['quarantined'] == 9 and info['quarantine_reasons'] == dict.fromkeys(sorted(BAD), 1)
    assert info['entries'] == 15
    for row in range(6):
        assert len(corpus.read(row)) == corpus.sample_counts[row]


def test_too_many_bad_files_stop_the_work_which_continues_when_they_are_mended(tmp_path):
    manifest = write_manifest(tmp_path / 's', 9)
    soundfile.write(tmp_path / 's' / '003.wav', np.zeros(8000), 16000)
    (tmp_path / 's' / '007.flac').unlink()
    with pytest.raises(DataError, match='more than 20.0% of 9 utterances.*1 missing, 1 silent'):
        quick(manifest, tmp_path / 'c', max_quarantine_fraction=0.2)
    assert not (tmp_path / 'c' / 'corpus.json').exists()
    assert '003' in (tmp_path / 'c' / 'quarantine.jsonl').read_text()
    soundfile.write(tmp_path / 's' / '007.flac', 0.1 * np.ones(8000), 16000)
    info = quick(manifest, tmp_path / 'c', max_quarantine_fraction=0.2)
    assert info['rows'] == 8 and info['quarantine_reasons'] == {'silent': 1}


def test_nothing_usable_empty_lists_and_doubled_ids(tmp_path):
    (tmp_path / 'm.jsonl').write_text('{"audio": "a.wav"}\n{"audio": "b.wav"}\n')
    with pytest.raises(DataError, match='none of 2 utterances can be used: 2 missing'):
        quick(tmp_path / 'm.jsonl', tmp_path / 'c', max_quarantine_fraction=None)
    with pytest.raises(DataError, match='empty'):
        quick([], tmp_path / 'd')
    tone = np.ones(3200, np.int16) * 99
    entry = Entry('a', tone, sample_rate=16000)
    with pytest.raises(DataError, match="id 'a' is used by more than one"):
        quick([entry, entry], tmp_path / 'e')
    (tmp_path / 'm.jsonl').write_text('{"audio": "a.wav"}\n{"audo": "b.wav"}\n')
    with pytest.raises(DataError, match=r'm.jsonl:2: field .audo. is not known.*.audio.'):
        quick(tmp_path / 'm.jsonl', tmp_path / 'f')
    assert not (tmp_path / 'd').exists() and not (tmp_path / 'f').exists()


def test_other_peoples_folders_and_files_are_left_alone(speech, tmp_path):
    home = tmp_path / 'home'
    (home / 'parts').mkdir(parents=True)
    (home / 'parts' / 'precious.txt').write_text('mine')
    with pytest.raises(DataError, match='holds other files'):
        quick(speech, home)
    assert [p.name for p in home.rglob('*')] == ['parts', 'precious.txt']
    with pytest.raises(DataError, match='cannot be written'):
        quick(speech, home / 'parts' / 'precious.txt')
    with pytest.raises(DataError, match='cannot be written'):
        quick(speech, '/proc/nowhere')


def test_bytes_and_samples_are_entries_too(speech, tmp_path):
    data = (speech.parent / '001.flac').read_bytes()
    samples, rate = soundfile.read(speech.parent / '001.flac', dtype='int16')
    quick([Entry('b', data), Entry('s', samples, sample_rate=rate)], tmp_path / 'c')
    corpus = Corpus.open(tmp_path / 'c')
    np.testing.assert_array_equal(corpus.read(0), corpus.read(1))
    np.testing.assert_array_equal(corpus.read(0), samples)


def test_a_killed_worker_is_reported_and_finished_work_is_kept(speech, tmp_path):
    doomed = Entry('x', Suicidal(), text='')
    good = [Entry(f'g{k}', np.full(3200, 99, np.int16), sample_rate=16000) for k in range(4)]
    with pytest.raises(DataError, match='a worker process was killed'):
        quick([*good, doomed], tmp_path / 'c', jobs=2)


class Suicidal(os.PathLike):
    """A file name that kills the worker that asks for it, but not the parent."""

    def __init__(self):
        self.parent = os.getpid()

    def __fspath__(self):
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return '/nowhere/x.wav'


def test_the_command_prints_a_table_and_returns_plain_figures(speech, tmp_path, capsys):
    out = str(tmp_path / 'c')
    first = prepare_command(manifest=str(speech), out=out, jobs=1, progress=False, shard_size=4)
    assert json.loads(json.dumps(first)) == first
    assert (first['rows'], first['shards'], first['already_complete']) == (10, 3, False)
    assert 'utterances' in capsys.readouterr().out
    second = prepare_command(manifest=str(speech), out=out, jobs=1, progress=True, shard_size=4)
    assert second['already_complete'] and second['fingerprint'] == first['fingerprint']
    with pytest.raises(DataError, match='either --manifest or --tfds'):
        prepare_command(out=out)
    with pytest.raises(DataError, match='shard_size=0'):
        prepare_command(manifest=str(speech), out=out, shard_size=0)
