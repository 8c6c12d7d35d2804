"""Killed anywhere, stopped politely, started again: the bits of a run that nothing disturbed."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

MODELS = ('supervised', 'pretrain', 'teacher', 'student')
ONE_STAGE = ('--stages', 'prepare,supervised')


@pytest.fixture
def own_cache(recipe, finished, tmp_path):
    """The experiment with a compilation cache that a kill may damage."""
    shutil.copytree(recipe.cache, tmp_path / 'cache')
    return dataclasses.replace(recipe, cache=tmp_path / 'cache')


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], what: str) -> None:
    """Blocks until the condition holds; fails if the process ends before."""
    limit = time.monotonic() + 200
    while not condition():
        if process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f'ended with {process.returncode} before {what}\n{out}\n{err}')
        assert time.monotonic() < limit, f'not within 200 s: {what}'
        time.sleep(0.004)


def kill_when(recipe, workdir: pathlib.Path, what: str, condition: Callable[[], bool]) -> None:
    """Starts the recipe and kills it with SIGKILL once the condition holds."""
    process = recipe.start(workdir)
    wait_for(process, condition, what)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def logged_steps(stage: pathlib.Path) -> list[int]:
    log = stage / 'metrics.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)['step'] for line in lines if line.endswith('}')]


def saved_steps(stage: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (stage / 'checkpoints').glob('*') if p.name.isdigit())


def outputs(workdir: pathlib.Path, stages: tuple[str, ...]) -> dict:
    """What done.json says of each stage's outputs."""
    return {s: json.loads((workdir / s / 'done.json').read_text())['outputs'] for s in stages}


def part_hashes(workdir: pathlib.Path) -> list[str]:
    record = json.loads((workdir / 'labels' / 'labels' / 'labels.json').read_text())
    return [part['sha256'] for part in record['parts']]


def test_a_stop_then_a_kill_in_mid_training_change_no_bit(own_cache, finished, tmp_path):
    workdir, stage = tmp_path / 'run', tmp_path / 'run' / 'supervised'
    process = own_cache.start(workdir, *ONE_STAGE)
    wait_for(process, lambda: bool(logged_steps(stage)), 'the first log line')
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    assert err.strip().splitlines()[-1].endswith('the same command continues')
    assert 'Traceback' not in err
    stopped_at = saved_steps(stage)[-1]
    assert 20 <= stopped_at < 100
    assert not (stage / 'done.json').exists()

    # Killed 20 to 40 steps later, after at least one checkpoint of its own or none: either is fine.
    killed_at = stopped_at // 20 * 20 + 20
    process = own_cache.start(workdir, *ONE_STAGE)
    wait_for(process, lambda: killed_at in logged_steps(stage), f'step {killed_at}')
    process.kill()
    process.communicate()
    assert not (stage / 'done.json').exists()

    ended = own_cache.run(workdir, *ONE_STAGE)
    assert ended.returncode == 0, ended.stderr
    assert outputs(workdir, ('supervised',)) == outputs(finished.workdir, ('supervised',))
    assert logged_steps(stage) == logged_steps(finished.workdir / 'supervised')


@pytest.mark.slow
def test_kills_in_every_stage_change_no_bit(own_cache, finished, tmp_path):
    workdir = tmp_path / 'run'
    shards = workdir / 'corpora' / 'tones' / 'shards'
    supervised, student = workdir / 'supervised', workdir / 'student'

    def temporary(stage: pathlib.Path) -> bool:
        return any('tmp' in p.name for p in (stage / 'checkpoints').glob('*'))

    moments = {
        'shards in preparation': lambda: shards.is_dir() and any(shards.iterdir()),
        'statistics': lambda: (workdir / 'tokenizer' / 'tokenizer.model').exists(),
        'mid-training': lambda: 40 in logged_steps(supervised),
        'a checkpoint half saved': lambda: temporary(supervised) or temporary(workdir / 'pretrain'),
        'the first step of the teacher': lambda: (workdir / 'teacher' / 'stage.json').exists(),
        'a model folder half written': lambda: (workdir / 'teacher' / '.model.tmp').exists(),
        'labels': lambda: (workdir / 'labels' / 'labels').exists(),
        'late in training': lambda: 80 in logged_steps(student),
        'evaluate': lambda: (workdir / 'evaluate' / 'stage.json').exists(),
    }
    for what, condition in moments.items():
        kill_when(own_cache, workdir, what, condition)
    ended = own_cache.run(workdir)
    assert ended.returncode == 0, ended.stderr
    stages = ('prepare', *MODELS, 'labels', 'evaluate')
    assert outputs(workdir, stages) == outputs(finished.workdir, stages)
    assert part_hashes(workdir) == part_hashes(finished.workdir)
    for name in MODELS:
        assert logged_steps(workdir / name) == logged_steps(finished.workdir / name)
