"""What else would fit: the largest batch, remedies, the best of batch x remat x mesh."""

import dataclasses
import json
import random
import subprocess
import sys

import jax
import pytest
from plan_experiment import AXES, experiment, question, write_experiment

from bigssl_jax.parallel.topologies import GIB
from bigssl_jax.stages import schema
from bigssl_jax.stages.plan import compilation, options, price, step, table
from bigssl_jax.stages.plan.search import (
    FINENESS,
    Attempt,
    Candidate,
    bracket,
    in_order,
    mesh_candidates,
    still_promising,
)

# ---------------------------------------------------------------------------------------------
# search


@pytest.mark.parametrize('seed', range(60))
def test_the_bracket_finds_the_largest_batch_with_few_dear_attempts(seed):
    """Against a memory curve that is not a line; only attempts that fit are dear."""
    rng = random.Random(seed)
    room, base = 1000, rng.randrange(0, 1100)
    slope, bend = rng.uniform(0.3, 300), rng.choice([0.0, 0.001, 0.3])
    tried = []

    def attempt(units: int) -> Attempt:
        needed = int(base + slope * units + bend * units**2)
        tried.append(units)
        return Attempt(units, needed <= room, needed, room)

    low, high = bracket(attempt, rng.randrange(1, 200))
    fitting = [
        units for units in range(1, 4000) if base + slope * units + bend * units**2 < room + 1
    ]
    assert (low is None) == (not fitting)
    assert high is not None and not high.fits
    if low is None:
        assert high.units == 1
    else:
        assert low.fits and low.units <= fitting[-1] < high.units
        assert high.units - low.units <= max(1, low.units // FINENESS)
    assert len(tried) == len(set(tried)) <= 12
    assert sum(units in fitting for units in tried) <= 5


def test_mesh_candidates_use_every_device_once():
    found = list(mesh_candidates(16, 2))
    assert all(axes['data'] * axes['fsdp'] * axes['tensor'] == 16 for axes in found)
    assert {axes['fsdp'] for axes in found if axes['tensor'] == 1} == {1, 2, 4, 8, 16}
    assert {axes['tensor'] for axes in found} == {1, 2, 4}
    assert {axes['slice'] for axes in found} == {2}
    assert len({tuple(axes.values()) for axes in found}) == len(found)


def test_candidates_whose_state_does_not_fit_are_not_tried():
    def candidate(fsdp: int, tensor: int, state: int, bound: float) -> Candidate:
        return Candidate({'data': 1, 'fsdp': fsdp, 'tensor': tensor}, 'full', state, bound)

    few, usual, dear = candidate(2, 1, 50, 3.0), candidate(16, 1, 9, 3.0), candidate(16, 2, 5, 3.0)
    assert in_order([dear, few, usual], available=40) == [usual, dear]
    assert still_promising(usual, best=2.0)
    assert not still_promising(usual, best=3.0)


# ---------------------------------------------------------------------------------------------
# options


@pytest.fixture
def compiler(monkeypatch):
    """In the compiler's place: (bytes it would need of a program, given its rows) is put in.

    Gives back the (rows, effort) of every program that it is given.
    """
    asked = []

    def install(needed):
        def compiled(program, limit, cache, effort):
            rows = max(batch.rows for batch in program.batches.values())
            asked.append((rows, effort))
            wanted = needed(program, rows)
            fits = wanted <= limit
            memory = compilation.Memory(0, 0, 0, 0, 0, wanted) if fits else None
            return compilation.Compiled(fits, memory, wanted, limit, '', (), 1.0, 0.0)

        monkeypatch.setattr(price, 'compile_program', compiled)
        return asked

    return install


def test_the_largest_batch_is_named_by_the_fields_that_make_it(tmp_path, compiler):
    compiler(lambda program, rows: 10**8 + 2 * 10**7 * rows)
    largest, changed = options.find_largest(question(tmp_path, 'labels'))
    room = (GIB - 10**8) // (2 * 10**7)  # 48 rows
    assert room * 8 / 9 - 1 <= largest.rows <= room < largest.refused_rows
    assert price.plan_question(changed).batches['labels'].rows == largest.rows
    assert set(largest.changes) == {'stages.labels.batch_seconds'}


def test_remedies_are_the_mildest_changes_of_each_kind_that_fit(tmp_path, compiler, monkeypatch):
    """A compiler for which every policy keeps half of the last one, and pieces divide the rest."""
    kept, asked = {'none': 8, 'dots': 4, 'block': 2, 'full': 1}, question(tmp_path, 'teacher')
    asked = asked.change({'encoder.remat': 'none'})
    compile_real = price.Question.compile

    def compile_noted(self, program, what, effort):
        share = kept[self.config['encoder']['remat']]
        share /= self.config['stages']['teacher']['optimizer']['micro_batches']
        compiler(lambda program, rows: int(0.9 * GIB * share * rows / 8))
        return compile_real(self, program, what, effort)

    monkeypatch.setattr(price.Question, 'compile', compile_noted)
    assert not price.plan_question(asked).fits
    found = options.remedies(asked)
    assert {'encoder.remat': 'full'} in found
    assert {'stages.teacher.optimizer.micro_batches': 8} in found
    (batch,) = [changes for changes in found if 'stages.teacher.streams.s.batch_seconds' in changes]
    config = step.changed(asked.config, batch)
    assert step.stage_batches(config, 'teacher', asked.mesh())['s'].rows == 1
    assert len(found) == 3


def test_what_is_only_tried_is_drafted_and_what_is_known_to_fit_is_not_tried(tmp_path, compiler):
    asked = compiler(lambda program, rows: 10**8 + 2 * 10**7 * rows)
    made = price.plan_question(question(tmp_path, 'labels'))
    ((configured, effort),) = asked
    assert effort == compilation.FULL
    asked.clear()
    largest, _ = options.find_largest(question(tmp_path, 'labels'), made)
    assert {effort for _, effort in asked} == {compilation.DRAFT}
    assert configured not in [rows for rows, _ in asked]
    assert largest.rows > configured


def test_a_plan_that_nothing_helps_says_so(tmp_path, compiler):
    compiler(lambda program, rows: 2 * GIB)
    assert options.remedies(question(tmp_path, 'labels')) == ()


def test_the_search_returns_the_fastest_that_fits_first(tmp_path, compiler):
    asked = compiler(lambda program, rows: 10**8 + 2 * 10**7 * rows)
    told = []
    found = options.search(question(tmp_path, 'labels'), lambda *words: told.append(words))
    assert found[0].plan.fits
    assert found[0].speed == max(item.speed for item in found)
    assert found[0].plan.batches['labels'].rows > 40
    assert told[-1][:2] == (1, 1)
    assert asked[-1] == (found[0].plan.batches['labels'].rows, compilation.FULL)
    assert {effort for _, effort in asked[:-1]} == {compilation.DRAFT}


@pytest.mark.slow
def test_the_tpu_compiler_refuses_and_the_remedy_fits(tmp_path):
    """The real thing: a batch of months of audio on four v5e, and the largest that it takes."""
    cache, file = f'--config.compute.compilation_cache={tmp_path}', write_experiment(tmp_path)
    words = ['--topology', 'v5e-4', '--stage', 'labels', cache, '--json', str(tmp_path / 'plan')]
    words += ['--config.stages.labels.batch_seconds=4e8']
    done = subprocess.run(
        [sys.executable, '-m', 'bigssl_jax', 'plan', '--config', str(file), *words],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'DOES NOT FIT' in done.stdout and 'RESOURCE_EXHAUSTED' in done.stdout
    (made,) = json.loads((tmp_path / 'plan').read_text())['plans']
    assert made['limit'] == int(15.75 * GIB) < made['needed']
    (remedy,) = made['remedies']
    config = step.changed(schema.resolve(experiment()), remedy)
    rows = step.stage_batches(config, 'labels', jax.sharding.AbstractMesh((1, 4, 1, 1), AXES))
    assert rows['labels'].rows > 1000


def test_tables_fit_80_columns_and_every_figure_has_its_unit(
    tmp_path, compiler, capsys, monkeypatch
):
    monkeypatch.setenv('COLUMNS', '80')
    compiler(lambda program, rows: 10**8)
    mesh = {'slice': 2, 'data': 16, 'fsdp': 16, 'tensor': 1}
    sent = (
        price.Traffic(('fsdp',), {'all-gather': 3e10, 'reduce-scatter': 1e10}, 4e10, 3.9e10),
        price.Traffic(('data', 'fsdp'), {'all-reduce': 2e6}, 2e6, None),
    )
    made = dataclasses.replace(
        price.plan_question(question(tmp_path, 'teacher')),
        experiment='bigssl-g-ps', topology='2xv5e-256', chip='v5e', chips=512, devices=512,
        parameters=7_832_342_816, mesh=mesh, traffic=sent, limit=int(15.75 * GIB),
        pass_hours=900_000.0, model_flops=1.84e17, hardware_flops=2.45e17,
        largest=price.Largest(12_288, 24.0, {}, 15 * GIB, 13_312),
    )  # fmt: skip
    refused = dataclasses.replace(
        made, fits=False, memory=None, roofline=None, needed=99 * GIB, largest=None,
        complaint='RESOURCE_EXHAUSTED: ...', remedies=({'encoder.remat': 'full'},),
    )  # fmt: skip
    for each in (made, refused):
        table.print_plan(each)
    table.print_found(made, [options.Found({'encoder.remat': 'dots'}, made)])
    table.print_summary([made, refused])
    text = capsys.readouterr().out
    long = [line for line in text.splitlines() if len(line.rstrip()) > 80]
    assert not long
    for told in (
        'slice 2 x data 16 x fsdp 16', '7,832,342,816', '184 PFLOP a step', '+33.2%', 'at most',
        '12,288 rows (24 a device)', '1.03', 'DOES NOT FIT', '--config.encoder.remat=full',
        '99.00 GiB of 15.75 GiB',
    ):  # fmt: skip
        assert told in text
