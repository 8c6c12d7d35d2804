"""Every config of a sweep is checked before anything starts, and finds the folder that holds it."""

import json
import pathlib

import pytest

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError
from bigssl_jax.overrides import apply_overrides, collect_overrides
from bigssl_jax.stages import schema
from bigssl_jax.stages.sweep_runs import make_runs, place_runs
from bigssl_jax.sweeps import chain, product, sweep

HERE = pathlib.Path(__file__).parent
TONES = f'{HERE / "tone_experiment.py"}:manifest.jsonl'
PEAK = 'stages.teacher.optimizer.groups.all.peak'
SEEDS = sweep('seed', [1, 2])


def as_the_child_reads_it(run) -> dict:
    """The config that `bigssl run` makes of a run's command."""
    words = run.command(pathlib.Path('w'))
    experiment = words[words.index('--config') + 1]
    pairs = collect_overrides([word for word in words if word.startswith('--config.')], 'run')
    config = config_lib.load(experiment)
    return schema.resolve(apply_overrides(config, pairs, schema.resolve(config)))


@pytest.mark.parametrize(
    ('path', 'value'),
    [
        ('seed', 7),
        (PEAK, 2e-3),
        (PEAK, 1),
        ('encoder.preset', 'small'),
        ('compute.tensorboard', True),
        ('recipe', ('supervised',)),
        ('encoder.subsampling_channels', (2, 6)),
        ('name', '5'),
        ('name', 'it\'s "quoted", $HOME and spaced'),
        ('name', ''),
        ('stages.teacher.init_from', ''),
        ('stages.pretrain.spec_augment', {'freq_width': 20}),
        ('stages.pretrain.spec_augment', None),
        ('stages.student.streams.mix.sources.pseudo.filter', ({'kind': 'empty'},)),
        ('selections.labelled.hours', 0.02),
    ],
)
def test_a_value_arrives_as_it_was_written(path, value):
    (run,) = make_runs(TONES, sweep(path, [value]), [('stages.student.steps', '7')])
    config = as_the_child_reads_it(run)
    assert config == run.config
    assert config['stages']['student']['steps'] == 7
    for name in path.split('.'):
        config = config[name]
    if isinstance(value, dict):
        config = {name: config[name] for name in value}
    assert config == value


def test_a_mistake_in_one_point_names_the_run_and_the_field():
    points = product(sweep('seed', range(5)), sweep(PEAK, [1e-3]))
    points.append({'seed': 5, 'stages.teacher.optimizer.groups.all.peek': 1.0})
    with pytest.raises(ConfigError, match=r"run 005-\S+: .*all\.peek: did you mean 'peak'"):
        make_runs(TONES, points)


@pytest.mark.parametrize(
    ('point', 'told'),
    [
        ({'stages.teacher.steps': 2.5}, 'stages.teacher.steps'),
        ({'stages.teacher.steps': None}, 'stages.teacher.steps'),
        ({'name': None}, "name cannot be None (NoneType): it became 'None'"),
        ({'encoder.preset': 'huge'}, "preset is 'huge'; allowed"),
        ({'recipe': ('teacher',)}, "needs stage 'pretrain'"),
        ({'seed.x': 1}, 'single value'),
        ({PEAK: float('nan')}, 'cannot be nan'),
    ],
)
def test_a_value_that_the_schema_refuses_stops_the_sweep(point, told):
    with pytest.raises(ConfigError) as error:
        make_runs(TONES, [point])
    assert told in str(error.value)
    assert str(error.value).startswith('run 000')


def test_what_is_swept_is_not_overridden_as_well():
    with pytest.raises(ConfigError, match='--config.seed=3: the sweep varies this field'):
        make_runs(TONES, sweep('seed', [1, 2]), [('seed', '3')])
    with pytest.raises(ConfigError, match='varies the argument; leave out :ARG'):
        make_runs(TONES, sweep('argument', ['a.jsonl', 'b.jsonl']))


def test_the_argument_of_the_experiment_is_swept():
    runs = make_runs(TONES.partition(':')[0], sweep('argument', ['x/a.jsonl', 'x/b.jsonl']))
    assert [run.name for run in runs] == ['000-argument_a.jsonl', '001-argument_b.jsonl']
    assert [run.config['corpora']['tones']['manifest'] for run in runs] == [
        'x/a.jsonl',
        'x/b.jsonl',
    ]
    assert as_the_child_reads_it(runs[1]) == runs[1].config


def test_equal_configs_make_one_run(capsys):
    star = chain(sweep('seed', [3, 4]), sweep(PEAK, [8e-3, 9e-3]))  # 3 and 8e-3 are the defaults
    runs = make_runs(TONES, star)
    assert [run.point for run in runs] == [{'seed': 3}, {'seed': 4}, {PEAK: 9e-3}]
    assert '002-peak_0.008 has the config of 000-seed_3' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# folders


def begin(workdir: pathlib.Path, run) -> None:
    """Leaves what a run leaves that has begun."""
    (workdir / run.name).mkdir(parents=True)
    text = json.dumps({'config': as_the_child_reads_it(run)})
    (workdir / run.name / 'config.json').write_text(text)


def placed(points, workdir, overrides=()):
    return place_runs(make_runs(TONES, points, overrides), workdir, {p for q in points for p in q})


def test_runs_share_corpora_and_compiled_programs(tmp_path):
    runs, _ = placed(sweep('seed', [1, 2]), tmp_path)
    assert {run.config['data_dir'] for run in runs} == {str(tmp_path / 'corpora')}
    for run in runs:
        assert as_the_child_reads_it(run) == run.config
    runs, _ = placed(sweep('seed', [1, 2]), tmp_path, [('data_dir', '/prepared')])
    assert {run.config['data_dir'] for run in runs} == {'/prepared'}


def test_runs_of_different_corpora_do_not_share_a_folder(tmp_path):
    points = sweep('corpora.tones.split_by', ['', 'speaker'])
    runs, _ = placed(points, tmp_path)
    folders = [pathlib.Path(run.config['data_dir']) for run in runs]
    assert folders[0] != folders[1]
    assert {folder.parent for folder in folders} == {tmp_path / 'corpora'}
    with pytest.raises(ConfigError, match=r"prepare different corpora.tones in data_dir '/prep'"):
        placed(points, tmp_path, [('data_dir', '/prep')])


def test_a_changed_sweep_finds_its_runs_by_their_config(tmp_path):
    for run in placed(sweep('seed', [1, 2]), tmp_path)[0]:
        begin(tmp_path, run)
    runs, others = placed(sweep('seed', [5, 2, 1]), tmp_path)
    assert [run.name for run in runs] == ['000-seed_5', '001-seed_2', '000-seed_1']
    assert others == []
    runs, others = placed(sweep('seed', [2, 7]), tmp_path)
    assert [run.name for run in runs] == ['001-seed_2', '001-seed_7']
    assert others == ['000-seed_1']


def test_where_things_lie_and_how_fast_they_go_makes_no_other_run(tmp_path):
    begin(tmp_path, placed(SEEDS, tmp_path)[0][0])
    overrides = [('data_dir', '/elsewhere'), ('compute.tensorboard', 'True')]
    assert placed(SEEDS, tmp_path, overrides)[0][0].name == '000-seed_1'
    both = product(SEEDS, sweep('compute.tensorboard', [False, True]))
    assert len({run.hash for run in placed(both, tmp_path / 'new')[0]}) == 4


def test_a_folder_of_another_config_is_named_with_the_fields(tmp_path):
    begin(tmp_path, placed(SEEDS, tmp_path)[0][0])
    with pytest.raises(ConfigError) as error:
        placed(SEEDS, tmp_path, [('stages.teacher.steps', '99')])
    assert str(tmp_path / '000-seed_1') in str(error.value)
    assert 'stages.teacher.steps: 100 -> 99' in str(error.value)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / '000-seed_1').mkdir()
    placed(SEEDS, tmp_path)
    (tmp_path / '000-seed_1' / 'letter.txt').write_text('dear')
    with pytest.raises(ConfigError, match='000-seed_1 holds other files'):
        placed(SEEDS, tmp_path)
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(ConfigError, match='workdir of a single run'):
        placed(SEEDS, tmp_path)
