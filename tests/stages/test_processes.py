"""The recipe in several real processes, killed and continued with other numbers of them.

What one process does with two devices, two and four processes with one device each must do alike:
the same streams, the same losses to a tolerance, every file written once.
"""

import json
import pathlib
import signal
import time

import pytest
from tone_processes import Processes, log, losses, streams

HERE = pathlib.Path(__file__).parent
CHANGES = ('--config.stages.pretrain.log_every=1', '--config.stages.pretrain.save_every=5')


@pytest.fixture
def start(recipe, tmp_path):
    """Starts the tone recipe in some processes; ends what is left of them."""
    begun: list[Processes] = []

    def start_all(workdir: pathlib.Path, count: int, *words: str, **given) -> Processes:
        folder = tmp_path / f'said-{len(begun)}'
        begun.append(Processes(recipe, folder, workdir, count, *words, **given))
        return begun[-1]

    yield start_all
    for run in begun:
        run.end()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_four_are_killed_two_continue_to_the_losses_of_one(start, recipe, tmp_path):
    alone, several = tmp_path / 'alone', tmp_path / 'several'
    stages = ('--stages', 'prepare,pretrain', *CHANGES)
    ended = recipe.run(alone, *stages)
    assert ended.returncode == 0, ended.stderr

    run = start(several, 4, *stages)
    run.wait_for(lambda: len(log(several, 'pretrain')) > 12)
    run.processes[2].kill()
    killed = time.monotonic()
    assert run.codes(100) == [76, 76, -signal.SIGKILL, 76], run.told()
    assert time.monotonic() - killed < 30
    for process in (0, 1, 3):
        line = run.last_lines()[process]
        assert line.startswith('bigssl: process 2 of 4 stopped answering'), run.told()
        assert 'the same command, on any number of processes' in line

    run = start(several, 2, *stages)
    assert run.codes() == [0, 0], run.told()
    assert 'step' not in run.said[1].read_text()  # the second one says nothing of its own
    assert losses(several, 'pretrain') == pytest.approx(losses(alone, 'pretrain'), rel=2e-3)
    assert len(losses(several, 'pretrain')) == 40
    assert streams(several, 'pretrain') == streams(alone, 'pretrain')
    for name in ('prepare', 'pretrain'):
        ours, theirs = (
            json.loads((folder / name / 'done.json').read_text()) for folder in (several, alone)
        )
        assert ours['identity'] == theirs['identity']
    assert [p.name for p in several.rglob('*.tmp')] == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_recipe_in_two_processes(start, finished, tmp_path):
    workdir = tmp_path / 'run'
    run = start(workdir, 2, '--json', str(tmp_path / 'result.json'))
    assert run.codes() == [0, 0], run.told()
    for stage in ('supervised', 'pretrain', 'teacher', 'student'):
        assert list(log(workdir, stage)) == list(log(finished.workdir, stage))
        first = losses(workdir, stage)[0], losses(finished.workdir, stage)[0]
        assert first[0] == pytest.approx(first[1], rel=1e-2)
        assert streams(workdir, stage).keys() == streams(finished.workdir, stage).keys()
    # Dev scores come from the hypotheses of both processes.
    dev = [line['dev_cer'] for line in log(workdir, 'student').values() if 'dev_cer' in line]
    assert len(dev) == 2 and dev[1] < 0.5  # half-way it may not have written anything yet

    ours = {name: json.loads((workdir / name / 'done.json').read_text()) for name in finished.done}
    rows = [done['labels']['outputs']['rows'] for done in (ours, finished.done)]
    assert rows[0] == rows[1]
    lines = [
        [json.loads(line) for line in (w / 'evaluate' / 'hypotheses-test.jsonl').open()]
        for w in (workdir, finished.workdir)
    ]
    assert [(x['model'], x['id'], x['reference']) for x in lines[0]] == [
        (x['model'], x['id'], x['reference']) for x in lines[1]
    ]
    scores = json.loads((workdir / 'evaluate' / 'scores.json').read_text())['test']
    assert all(model['cer']['value'] < 0.4 for model in scores.values())
    assert set(json.loads((tmp_path / 'result.json').read_text())['stages']) == set(ours)
    assert (workdir / 'report.html').exists()


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_what_stops_the_first_process_is_told_by_all(start, recipe, tmp_path):
    broken = tmp_path / 'broken.jsonl'
    broken.write_text('{"audio": 3\n')
    run = start(tmp_path / 'run', 2, config=f'{HERE / "tone_experiment.py"}:{broken}')
    assert run.codes() == [2, 2], run.told()
    for line in run.last_lines():
        assert line.startswith('bigssl: process 0 of 2: ') and 'broken.jsonl' in line
    assert 'Traceback' not in run.told()


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_processes_with_different_commands_do_not_begin(start, tmp_path):
    run = start(tmp_path / 'run', 2, last=('--config.seed=9',))
    assert run.codes() == [2, 2], run.told()
    for line in run.last_lines():
        assert 'was started with another config than process' in line
    assert not (tmp_path / 'run' / 'config.json').exists()
