"""One process, killed; two, one of them killed; four, killed again; one: the batches of one.

    processes   1 ----x
                       2 ------x
                                4 ------x
                                         1 ------------> the end
    batch       0 1 2 3 4 5 6 7 8 9 ...

Every process notes the rows that its training was given (watched_experiment.py).
"""

import collections
import json
import pathlib
import signal

import pytest
from tone_processes import Processes, log, losses, streams

HERE = pathlib.Path(__file__).parent
STEPS = 40
STAGES = (
    '--stages', 'prepare,pretrain',
    '--config.stages.pretrain.log_every=1',
    '--config.stages.pretrain.save_every=5',
    '--config.stages.pretrain.streams.all.rows_multiple=4',
)  # fmt: skip

# row in the global batch -> (source, utterance)
Rows = dict[int, tuple[int, int]]


def noted(folder: pathlib.Path) -> dict[int, dict[int, Rows]]:
    """process -> batch -> rows, as far as lines are whole."""
    found: dict[int, dict[int, Rows]] = {}
    for path in folder.glob('*.jsonl'):
        batches = found.setdefault(int(path.stem), {})
        for text in path.read_text().splitlines():
            if text.endswith('}'):
                line = json.loads(text)
                pairs = zip(line['sources'], line['utterances'], strict=True)
                batches[line['batch']] = dict(zip(line['rows'], pairs, strict=True))
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_two_four_and_one_process_see_the_batches_of_one(recipe, tmp_path):
    workdir, alone = tmp_path / 'several', tmp_path / 'alone'

    def start(number: int, workdir: pathlib.Path, count: int) -> Processes:
        config = (
            f'{HERE / "watched_experiment.py"}:{recipe.manifest},{tmp_path / f"notes-{number}"}'
        )
        return Processes(
            recipe, tmp_path / f'said-{number}', workdir, count, *STAGES, config=config
        )

    run = start(0, alone, 1)
    assert run.codes() == [0], run.told()
    (whole,) = noted(tmp_path / 'notes-0').values()
    assert sorted(whole) == list(range(STEPS))

    for number, (count, until) in enumerate(((1, 7), (2, 16), (4, 27)), 1):
        run = start(number, workdir, count)
        try:
            run.wait_for(lambda until=until: max(log(workdir, 'pretrain'), default=0) >= until)
            run.processes[-1].kill()
            codes = run.codes(200)
        finally:
            run.end()
        assert codes == [*[76] * (count - 1), -signal.SIGKILL], run.told()
        assert max(log(workdir, 'pretrain')) < STEPS
    run = start(4, workdir, 1)
    assert run.codes() == [0], run.told()

    seen: collections.Counter = collections.Counter()
    for number, count in enumerate((1, 2, 4, 1), 1):
        processes = noted(tmp_path / f'notes-{number}')
        assert len(processes) == count
        together: dict[int, Rows] = collections.defaultdict(dict)
        for batches in processes.values():
            for k, rows in batches.items():
                assert not together[k].keys() & rows.keys(), 'two processes had the same row'
                together[k] |= rows
        # A killed process may lack the last batch that others had begun to read.
        for k in range(min(together), min(map(max, processes.values())) + 1):
            assert together[k] == whole[k], f'batch {k} with {count} processes'
            seen[k] += 1
    assert set(range(STEPS)) <= set(seen), 'a batch was left out'

    assert losses(workdir, 'pretrain') == pytest.approx(losses(alone, 'pretrain'), rel=2e-3)
    assert list(log(workdir, 'pretrain')) == list(range(1, STEPS + 1))
    assert streams(workdir, 'pretrain') == streams(alone, 'pretrain')
