"""Killed anywhere, stopped politely, started again: the bits of a run that nothing disturbed.

A kill at a random moment hits mostly imports and compilation.  So most are aimed: the test watches
the workdir, kills as soon as what it waits for is there, and counts by what is left behind.

    a shard of the corpus    corpora/tones/shards/audio-00000.tfrecord.*.tmp
    a checkpoint             <stage>/checkpoints/20.*tmp*       saved while training goes on
    a step                   metrics.jsonl is ahead of the newest checkpoint
    a model                  <stage>/.model.tmp
    a claim on a part        labels/labels/ledger/part-*.claim-*
    a part of the labels     labels/labels/part-*.tmp
    the evaluation           evaluate/stage.json without done.json
    any moment               so many seconds, drawn at random, after the run began to work

Where each harm that the project promises to survive is done:

    kills over a whole recipe           here
    1, 2, 4, 1 processes                test_elastic.py; tests/training/test_processes.py,
                                        tests/stages/test_processes.py
    full and read-only disk             test_disks.py; tests/data/test_label_ledger.py
    damaged checkpoint, shard, labels   test_damage.py; tests/training/test_loop.py,
                                        tests/data/test_label_ledger.py, test_corpus.py
    workers stopped, killed, in a race  test_workers.py; tests/data/test_label_ledger.py
    utterances that cannot be used      tests/stages/test_bad_input.py, test_label_quarantine.py
    divergence, NaN                     tests/training/test_loop.py
    the order of batches                tests/data/test_golden_batches.py, test_order.py,
                                        test_stream.py
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

STAGES = ('prepare', 'supervised', 'pretrain', 'teacher', 'labels', 'student', 'evaluate')
MODELS = ('supervised', 'pretrain', 'teacher', 'student')
ONE_STAGE = ('--stages', 'prepare,supervised')
# Six parts of labels, and a checkpoint every ten steps: much to be killed in.
MUCH = (
    '--config.stages.labels.part_hours=0.004',
    *(f'--config.stages.{name}.save_every=10' for name in MODELS),
    *(f'--config.stages.{name}.log_every=5' for name in MODELS),
)

SHARD, CHECKPOINT, MODEL = 'a shard of the corpus', 'a checkpoint', 'a model'
CLAIM, PART = 'a claim on a part', 'a part of the labels'
STEP, EVALUATION, ANY = 'a step', 'the evaluation', 'any moment'
TRACES = {
    SHARD: 'corpora/tones/*/*.tmp',
    CHECKPOINT: '*/checkpoints/*tmp*',
    MODEL: '*/.model.tmp',
    PART: 'labels/labels/part-*.tmp',
    CLAIM: 'labels/labels/ledger/part-*.claim-*',
}
BEFORE_LABELS = (
    SHARD, SHARD, ANY, CHECKPOINT, STEP, ANY, CHECKPOINT, STEP, MODEL, ANY, CHECKPOINT, STEP, ANY,
)  # fmt: skip
LABELS = (CLAIM, PART, PART, PART)
AFTER_LABELS = (CHECKPOINT, STEP, ANY, CHECKPOINT, STEP, ANY, EVALUATION)


@pytest.fixture
def own_cache(recipe, finished, tmp_path):
    """The experiment with a compilation cache that a kill may damage."""
    shutil.copytree(recipe.cache, tmp_path / 'cache')
    return dataclasses.replace(recipe, cache=tmp_path / 'cache')


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], what: str) -> None:
    """Blocks until the condition holds; fails if the process ends before."""
    limit = time.monotonic() + 600
    while not condition():
        if process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f'ended with {process.returncode} before {what}\n{out}\n{err}')
        assert time.monotonic() < limit, f'not within ten minutes: {what}'
        time.sleep(0.0005)


def logged_steps(stage: pathlib.Path) -> list[int]:
    log = stage / 'metrics.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)['step'] for line in lines if line.endswith('}')]


def logged_losses(stage: pathlib.Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (stage / 'metrics.jsonl').read_text().splitlines())
    return [(line['step'], line['loss']) for line in lines if 'loss' in line]


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
    _, err = process.communicate(timeout=200)
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


@pytest.fixture(scope='module')
def unbroken(recipe, tmp_path_factory) -> pathlib.Path:
    """The workdir of the same run without a kill."""
    workdir = tmp_path_factory.mktemp('unbroken') / 'run'
    ended = recipe.run(workdir, *MUCH)
    assert ended.returncode == 0, ended.stderr
    return workdir


def traces(workdir: pathlib.Path, pattern: str) -> set[tuple]:
    """What matches, told apart from another of the same name."""
    found = set()
    for path in workdir.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_ino, path.stat().st_mtime_ns))
    return found


def unsaved(workdir: pathlib.Path) -> set[tuple]:
    """Stages that have logged a step of which no checkpoint knows yet."""
    found = set()
    for name in MODELS:
        stage = workdir / name
        if not (stage / 'done.json').exists():
            steps = logged_steps(stage)
            if steps and steps[-1] > max(saved_steps(stage), default=0):
                found.add((name, steps[-1], (stage / 'metrics.jsonl').stat().st_mtime_ns))
    return found


def evaluating(workdir: pathlib.Path) -> set[tuple]:
    folder = workdir / 'evaluate'
    return set() if (folder / 'done.json').exists() else traces(workdir, 'evaluate/stage.json')


def look(workdir: pathlib.Path, kind: str) -> set[tuple]:
    """The traces of one kind of moment."""
    if kind in TRACES:
        return traces(workdir, TRACES[kind])
    return {STEP: unsaved, EVALUATION: evaluating}[kind](workdir)


class Killer:
    """Starts the run, kills it in moments of a kind, and counts what the kills hit."""

    def __init__(self, recipe, workdir: pathlib.Path, seed: int, tell: Callable[[str], None]):
        self.recipe, self.workdir, self.tell = recipe, workdir, tell
        self.random = random.Random(seed)
        self.hits: collections.Counter = collections.Counter()

    def kill(self, aim: str, limit: str) -> None:
        """Kills until a kill has hit; `limit`: a file whose appearance ends an aimless wait."""
        for _ in range(6):
            began = time.monotonic()
            hit = self._once(aim, limit)
            self.hits.update([*hit, *([ANY] if aim == ANY else [])])
            self.hits['kills'] += 1
            self.tell(
                f'kill {self.hits["kills"]} after {time.monotonic() - began:.0f} s,'
                f' aimed at {aim}: hit {", ".join(hit) or "something else"}'
            )
            if aim == ANY or aim in hit:
                return
        pytest.fail(f'six kills aimed at {aim} have missed')

    def _once(self, aim: str, limit: str) -> list[str]:
        kinds = [*TRACES, STEP, EVALUATION]
        before = {kind: look(self.workdir, kind) for kind in kinds}
        begun = traces(self.workdir, 'config.json')
        process = self.recipe.start(self.workdir, *MUCH)
        if aim == ANY:
            wait_for(process, lambda: traces(self.workdir, 'config.json') != begun, 'its start')
            moment = time.monotonic() + self.random.uniform(0.0, 8.0)
            end = self.workdir / limit
            wait_for(process, lambda: time.monotonic() > moment or end.exists(), aim)
        else:
            wait_for(process, lambda: bool(look(self.workdir, aim) - before[aim]), aim)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        return [kind for kind in kinds if look(self.workdir, kind) - before[kind]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_over_a_whole_recipe_change_no_bit(recipe, unbroken, tmp_path, capsys):
    workdir = tmp_path / 'run'
    # A cache that a kill may damage, with all programs in it.
    own = dataclasses.replace(recipe, cache=shutil.copytree(recipe.cache, tmp_path / 'cache'))

    def tell(text: str) -> None:
        with capsys.disabled():
            print(f'\n{text}', end='', flush=True)

    killer = Killer(own, workdir, seed=20, tell=tell)
    for aims, limit in (
        (BEFORE_LABELS, 'labels/stage.json'),
        (LABELS, 'labels/done.json'),
        (AFTER_LABELS, 'evaluate/stage.json'),
    ):
        for aim in aims:
            killer.kill(aim, limit)
    ended = own.run(workdir, *MUCH)
    assert ended.returncode == 0, ended.stderr
    tell(f'{killer.hits["kills"]} kills: {dict(killer.hits)}\n')

    assert killer.hits['kills'] >= 20
    for kind, least in {SHARD: 2, CHECKPOINT: 5, STEP: 5, MODEL: 1, PART: 3, ANY: 6}.items():
        assert killer.hits[kind] >= least, kind
    assert outputs(workdir, STAGES) == outputs(unbroken, STAGES)
    assert part_hashes(workdir) == part_hashes(unbroken) and len(part_hashes(workdir)) == 6
    for name in MODELS:
        assert logged_losses(workdir / name) == logged_losses(unbroken / name)
    heard = 'evaluate/hypotheses-test.jsonl'
    assert (workdir / heard).read_bytes() == (unbroken / heard).read_bytes()
    assert {kind: traces(workdir, pattern) for kind, pattern in TRACES.items()} == dict.fromkeys(
        TRACES, set()
    )
