"""`bigssl plan`: the step it prices is the step that trains; outside figures agree with its own."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from plan_experiment import AXES, ONE, experiment, question, write_experiment

from bigssl_jax import cli
from bigssl_jax import config as config_lib
from bigssl_jax.compiler_crashes import NOTE
from bigssl_jax.parallel.cost import count_flops
from bigssl_jax.parallel.topologies import GIB
from bigssl_jax.stages import schema
from bigssl_jax.stages.plan import compilation, price, step

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def experiment_file(tmp_path) -> pathlib.Path:
    return write_experiment(tmp_path)


# ---------------------------------------------------------------------------------------------
# the very same step

SAME = """
import json, re, sys
sys.path.insert(0, {here!r})
import jax, numpy as np
from plan_experiment import experiment
from bigssl_jax.audio import AudioConfig
from bigssl_jax.decoding.fusion import make_fusion
from bigssl_jax.parallel import make_mesh, replicated, use_mesh
from bigssl_jax.stages import recognition, schema
from bigssl_jax.stages.plan import step
from bigssl_jax.stages.training_stage import make_trainer
from bigssl_jax.training.loop import to_devices

config = schema.resolve(experiment())
mesh = make_mesh({{'data': 2, 'fsdp': 2}})
rng = np.random.default_rng(0)
statistics = {{'feature_mean': np.zeros(20, np.float32), 'feature_std': np.ones(20, np.float32)}}
found = {{}}

def batch(labelled):
    made = {{
        'audio': rng.integers(-9, 9, (8, 16640), dtype=np.int16),
        'sample_counts': np.full(8, 16000, np.int32), 'rows': np.arange(8, dtype=np.int32),
        'utterances': np.arange(8, dtype=np.int32), 'sources': np.zeros(8, np.int32),
    }}
    if labelled:
        made |= {{'labels': np.ones((8, 8), np.int32), 'label_counts': np.full(8, 2, np.int32)}}
    return made

def instructions(compiled):
    # Without the places in our source that called for them: those differ, of course.
    lines = [line for line in compiled.as_text().splitlines() if ' = ' in line or line[:1] in '%}}']
    assert len(lines) > 1000
    return [re.sub(', metadata={{.*?}}', '', line) for line in lines]

def compare(stage, real):
    planned = step.stage_program(config, stage, mesh).lower()
    found[stage] = [planned.as_text() == real.as_text(), 'sharding' in real.as_text()]
    if stage in sys.argv[1:]:
        ours, theirs = planned.compile(), real.compile()
        found['compiled'] = [instructions(ours) == instructions(theirs),
                             str(ours.memory_analysis()) == str(theirs.memory_analysis())]

for stage, objective in (('pretrain', 'rq'), ('teacher', 'ctc')):
    trainer = make_trainer(config, stage, mesh, 12)
    state = trainer.make_state(statistics)
    on_devices = to_devices({{objective: batch(stage == 'teacher')}}, mesh)
    rates = {{'all': np.float32(1e-3)}}
    with use_mesh(mesh):
        real = trainer.train_step().lower(state, on_devices, rates, jax.random.key(3))
    compare(stage, real)

head = trainer.objectives['ctc']
params = {{'encoder': state.params['encoder'], 'head': state.params['heads']['ctc']}}
with use_mesh(mesh):
    real = recognition.decoder(trainer.encoder, trainer.audio, head, mesh).lower(
        params, state.constants['encoder'], jax.device_put(make_fusion(), replicated(mesh)),
        to_devices({{'': batch(False)}}, mesh)[''])
compare('labels', real)
print(json.dumps(found))
"""


def same(*compiled: str) -> dict[str, list[bool]]:
    """What the script found on four devices; the stages named in `compiled` are compiled, too."""
    flags = '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
    script = SAME.format(here=str(pathlib.Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, '-c', script, *compiled],
        capture_output=True, text=True, timeout=280, check=False,
        # A program that comes out of the cache has another text than one that went into it.
        env={**os.environ, 'XLA_FLAGS': flags, 'JAX_ENABLE_COMPILATION_CACHE': 'false'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_planned_step_is_the_step_that_trains_and_the_decoder_that_labels():
    """Text for text, as lowered."""
    assert same() == {name: [True] * 2 for name in ('pretrain', 'teacher', 'labels')}


@pytest.mark.slow
def test_the_planned_step_is_also_the_same_when_compiled_and_takes_the_same_memory():
    assert same('teacher')['compiled'] == [True, True]


# ---------------------------------------------------------------------------------------------
# figures


@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_flops_of_the_8_b_model_are_those_of_the_closed_form(tmp_path, stage):
    """6 N FLOPs a frame and 12 L T d for attention; full rematerialisation: a forward pass more."""
    config = schema.resolve(config_lib.load(f'{ROOT}/experiments/bigssl.py:size=g,decoder=ctc'))
    stream = f'stages.{stage}.streams.{next(iter(config["stages"][stage]["streams"]))}'
    config = step.changed(
        config,
        {
            'compute.mesh.fsdp': 1,
            f'{stream}.rows_multiple': 1,
            f'{stream}.batch_seconds': 60.0,
            'encoder.remat': 'full',
        },
    )
    asked = price.Question(config, stage, ONE, jax.devices()[:1], tmp_path, print)
    program = asked.program()
    model, hardware = price.step_flops(asked, program)
    batch = next(iter(program.batches.values()))
    layers, width = config['encoder']['num_layers'], config['encoder']['model_dim']
    frames = batch.samples // 160 // 4
    closed = (6 * program.parameters + 12 * layers * frames * width) * frames * batch.rows
    assert (frames, batch.rows) == (750, 2)
    assert 7.8e9 < program.parameters < 7.9e9
    assert model.total == pytest.approx(closed, rel=0.02)
    assert hardware.total == pytest.approx(4 / 3 * closed, rel=0.02)


def test_a_plan_has_the_memory_of_the_compiler_and_what_follows_from_it(tmp_path):
    asked = question(tmp_path, 'labels', **{'compute.pass_hours': {'labels': 500.0}})
    made = price.plan_question(asked)
    analysis = asked.program().lower().compile().memory_analysis()
    assert made.fits
    assert made.memory.arguments == analysis.argument_size_in_bytes
    assert made.memory.temporaries == analysis.temp_size_in_bytes
    assert made.memory.outputs == analysis.output_size_in_bytes
    assert made.memory.peak == analysis.peak_memory_in_bytes
    assert made.headroom == GIB - made.memory.peak
    # What lies between two steps is the arguments, up to what the compiler does not read.
    assert sum(made.held.values()) == pytest.approx(made.memory.arguments, rel=0.01)
    assert made.audio_hours == pytest.approx(8 * 1.04 / 3600)
    assert made.model_flops == made.hardware_flops
    assert 1 <= made.roofline.compute / (made.hardware_flops / 1e12) <= 6  # float32 takes passes
    assert made.mfu == pytest.approx(made.model_flops / 1e12 / made.roofline.seconds)
    assert made.pass_chip_hours == pytest.approx(
        500 * made.roofline.seconds / made.audio_hours / 3600
    )
    assert json.loads(json.dumps(made.to_json()))['mfu'] == made.mfu


def test_a_search_is_priced_by_its_longest_path(tmp_path):
    """A move is a step of the LSTM, its projection, and the joint network, for every row."""
    given = experiment()
    rnnt = {
        'objective': 'rnnt', 'stream': 's',
        'prediction_layers': 1, 'prediction_dim': 6, 'joint_dim': 5,
    }  # fmt: skip
    given['stages']['teacher']['objectives'] = {'rnnt': rnnt}
    config = schema.resolve(given)
    asked = price.Question(config, 'labels', ONE, jax.devices()[:1], tmp_path, lambda text: None)
    program = asked.program()
    moves = 26 + config['stages']['teacher']['streams']['s']['max_labels']
    made = price.plan_question(asked)
    assert program.turns == moves
    assert any(f'{moves} moves' in line for line in made.assumptions)
    once = count_flops(program.call, *program.arguments).total
    move = 2 * (6 * 24 + 6 * 24 + 6 * 5 + 5 * 12) * program.batches['labels'].rows
    assert made.hardware_flops - once == (moves - 1) * move
    assert made.hbm_bytes > 0


def test_a_measured_program_is_not_compiled_again(tmp_path, monkeypatch):
    asked = question(tmp_path, 'labels')
    first = price.plan_question(asked)
    assert len(list(tmp_path.glob('*.json'))) == 1
    monkeypatch.setattr(compilation, '_compile', lambda *_: pytest.fail('compiled again'))
    assert price.plan_question(asked) == first
    with pytest.raises(pytest.fail.Exception, match='compiled again'):
        price.plan_question(question(tmp_path, 'labels', **{'stages.labels.batch_seconds': 16.0}))


def test_what_crosses_slices_is_what_a_hierarchical_collective_sends(tmp_path):
    """All-reduce of b over 2 slices x 4: 2 (3/4) b inside, 2 (1/2) b / 4 between them."""
    program = dataclasses.replace(
        question(tmp_path, 'pretrain').program(),
        mesh=jax.sharding.AbstractMesh((2, 4, 1, 1), AXES),
    )
    b = 1e6
    item = {
        'axes': ['slice', 'data'], 'operation': 'all-reduce', 'group_size': 8,
        'bytes_per_device': 2 * 7 / 8 * b,
    }  # fmt: skip
    compiled = compilation.Compiled(True, None, 0, 0, '', (item,), 0.0, 0.0)
    rows = {
        row.axes: row
        for row in price.link_traffic(question(tmp_path, 'pretrain'), program, compiled)
    }
    assert rows['data',].bytes == pytest.approx(2 * 3 / 4 * b)
    assert rows['slice',].bytes == pytest.approx(2 * 1 / 2 * b / 4)
    size = program.parameters * 4
    assert rows['data',].ideal == pytest.approx(2 * 3 / 4 * size)
    assert rows['slice',].ideal == pytest.approx(2 * 1 / 2 * size / 4)


def test_a_program_that_cannot_be_read_is_priced_by_its_products_and_says_so(tmp_path, monkeypatch):
    def refuse(self):
        raise jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure: async-update')

    monkeypatch.setattr(jax.stages.Compiled, 'as_text', refuse)
    made = price.plan_question(question(tmp_path, 'labels'))
    assert made.fits and made.memory.peak > 0
    assert made.roofline.bound == 'compute' and made.traffic == ()
    assert 'cannot read the compiled program (INTERNAL: RET_CHECK' in made.assumptions[-1]


@pytest.mark.parametrize(
    'words, needed, available',
    [
        (
            'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total'
            ' memory required for HLO temporaries (368.88G) exceeds available HBM (15.75G). HLO'
            ' module: jit_decode.',
            368.88 * GIB,
            15.75 * GIB,
        ),
        (
            'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total'
            ' memory required for HLO temporaries (3.12T) exceeds available HBM (15.75G).',
            3.12 * 1024 * GIB,
            15.75 * GIB,
        ),
    ],
)
def test_the_compilers_complaint_is_read(words, needed, available):
    assert compilation.out_of_memory(words) == (int(needed), int(available))


def test_another_complaint_is_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match='Mosaic'):
        compilation.out_of_memory('INTERNAL: Mosaic failed to compile TPU kernel (15.75G)')


def test_a_language_model_that_is_not_counted_is_told(tmp_path):
    with_lm = {'kind': 'beam', 'ngram': 'some.arpa', 'ngram_weight': 0.3}
    config = schema.resolve(experiment())
    assert not any('language model' in text for text in price.assumptions(config, 'labels'))
    config['stages']['labels']['decoder'] |= with_lm
    assert any('language model' in text for text in price.assumptions(config, 'labels'))


# ---------------------------------------------------------------------------------------------
# the command


@pytest.mark.parametrize(
    'words, told',
    [
        (['--topology', 'v5e-250'], "unknown topology 'v5e-250': did you mean v5e-"),
        (['--topology', 'v5e-4,q9-16'], "unknown topology 'q9-16'"),
        (['--topology', ','], '--topology is empty'),
        (
            ['--topology', 'v5e-4', '--stage', 'pretrian'],
            "--stage is 'pretrian'; allowed: 'pretrain'",
        ),
        (['--topology', 'v5e-4', '--config.encoder.num_layer=3'], "did you mean 'num_layers'?"),
        (
            ['--topology', 'v5e-4', '--config.compute.pass_hours.techer=3'],
            "did you mean 'teacher'?",
        ),
        (
            ['--topology', 'v5e-16', '--config.compute.mesh.fsdp=3'],
            'v5e-16 (16 devices): mesh (slice=1, data=-1, fsdp=3, tensor=1): 16 devices do not',
        ),
        (
            ['--topology', 'v5e-16'],
            'stages.pretrain.streams.s: batch_seconds=9 does not hold 16 utterance(s) of 1.04 s',
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(
    experiment_file, words, told, capsys, monkeypatch
):
    monkeypatch.setattr(compilation, '_compile', lambda *_: pytest.fail('compiled'))
    monkeypatch.setenv(NOTE, os.devnull)  # in this process
    assert cli.main(['plan', '--config', str(experiment_file), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith('bigssl: ')
    assert told in lines[0]


def test_a_recipe_without_a_stage_to_plan_is_told_so():
    config = schema.resolve({**experiment(), 'recipe': ()})
    with pytest.raises(config_lib.ConfigError, match='no stage of it is of kind pretrain'):
        step.plannable_stages(config)
