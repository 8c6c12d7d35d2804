"""Bytes that changed or went missing: found before they do harm, named, and mended by a rerun."""

import json
import pathlib
import shutil

import pytest
from told import PARTS, label_files, one_line, outputs, steps_logged
from tones import with_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]


def unfinished(finished, workdir: pathlib.Path, stage: str, *also: str) -> pathlib.Path:
    """A copy of the finished run in which one training stage lacks its last files."""
    with_teacher(finished, workdir)
    (workdir / stage / 'done.json').unlink()
    shutil.rmtree(workdir / stage / 'model')
    for name in also:
        shutil.rmtree(workdir / stage / name)
    return workdir


def test_a_checkpoint_with_a_flipped_byte_is_passed_over(recipe, finished, tmp_path):
    workdir = unfinished(finished, tmp_path / 'run', 'supervised')
    checkpoints = workdir / 'supervised' / 'checkpoints'
    newest = max(int(p.name) for p in checkpoints.iterdir())
    assert newest == 100
    arrays = [p for p in (checkpoints / str(newest) / 'state').rglob('d/*') if p.is_file()]
    largest = max(arrays, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    ended = recipe.run(workdir, '--stages', 'supervised')
    assert ended.returncode == 0, ended.stderr
    assert f'{checkpoints}/100 is damaged' in ended.stdout
    assert 'it is set aside as 100.damaged, and the one before it is used' in ended.stdout
    assert (checkpoints / '100.damaged').is_dir() and (checkpoints / '100').is_dir()
    assert outputs(workdir, 'supervised') == outputs(finished.workdir, 'supervised')


@pytest.mark.parametrize('harm', ['cut', 'gone'])
def test_training_does_not_begin_on_a_corpus_that_lacks_bytes(recipe, finished, tmp_path, harm):
    workdir = unfinished(finished, tmp_path / 'run', 'pretrain', 'checkpoints')
    (workdir / 'pretrain' / 'metrics.jsonl').unlink()
    shard = workdir / 'corpora' / 'tones' / 'shards' / 'audio-00000.tfrecord'
    content = shard.read_bytes()
    shard.unlink()
    if harm == 'cut':
        shard.write_bytes(content[:-7])
    line = one_line(recipe.run(workdir, '--stages', 'pretrain'))
    size = f'has {len(content) - 7} bytes, should have {len(content)}'
    assert f'shards/{shard.name} {"is missing" if harm == "gone" else size}' in line
    assert 'copy these files again' in line
    assert steps_logged(workdir / 'pretrain') == 0
    assert not (workdir / 'pretrain' / 'checkpoints').exists()

    shard.write_bytes(content)
    ended = recipe.run(workdir, '--stages', 'pretrain')
    assert ended.returncode == 0, ended.stderr
    assert outputs(workdir, 'pretrain') == outputs(finished.workdir, 'pretrain')


def test_a_cut_label_file_is_made_again_or_named(recipe, labelled, tmp_path):
    workdir = shutil.copytree(labelled, tmp_path / 'run')
    folder = workdir / 'labels' / 'labels'
    part = sorted(folder.glob('part-*.parquet'))[2]
    content = part.read_bytes()

    # Of a finished stage: whoever wants to train on it hears which file it is.
    part.write_bytes(content[:-9])
    line = one_line(recipe.run(workdir, '--stages', 'student', *PARTS))
    assert f'{part} has {len(content) - 9} bytes, not {len(content)}' in line
    assert 'remove done.json' in line
    assert not (workdir / 'student' / 'checkpoints').exists()

    # Of one that is being made: it is set aside, told, and made again.
    (workdir / 'labels' / 'done.json').unlink()
    ended = recipe.run(workdir, '--stages', 'labels', *PARTS)
    assert ended.returncode == 0, ended.stderr
    assert f'{part} is damaged' in ended.stderr
    assert part.with_name(f'{part.name}.damaged').read_bytes() == content[:-9]
    assert label_files(workdir) == label_files(labelled)
    assert outputs(workdir, 'labels') == outputs(labelled, 'labels')
    seen = [json.loads(p.read_text())['rows'] for p in folder.glob('ledger/part-*.json')]
    assert len(seen) == 6 and sum(seen) == outputs(labelled, 'labels')['rows']
