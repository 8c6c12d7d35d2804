"""A mistake in an experiment stops it before any work, in a line that names field and cure."""

import importlib.util
import json
import pathlib

import ml_collections
import pytest

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError
from bigssl_jax.stages import schema
from bigssl_jax.stages.label_fields import with_folders

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / 'experiments').glob('*.py'))


def experiment() -> dict:
    """A config that resolves, with a stage of every kind."""
    stream = {'sources': {'a': {'selection': 'train', 'labels': 'text'}}}
    ctc = {'ctc': {'objective': 'ctc', 'stream': 's'}}
    return {
        'corpora': {'mine': {'manifest': 'speech.jsonl'}},
        'selections': {
            'train': {'corpus': 'mine'},
            'rest': {'corpus': 'mine', 'exclude': ('train',)},
        },
        'tokenizer': {'selection': 'train'},
        'statistics': {'selection': 'train'},
        'encoder': {'preset': 'tiny'},
        'stages': {
            'base': {
                'kind': 'pretrain',
                'objectives': {'rq': {'objective': 'best_rq', 'stream': 's'}},
                'streams': {'s': {'sources': {'a': {'selection': 'train'}}}},
            },
            'teacher': {
                'kind': 'finetune', 'objectives': ctc, 'streams': {'s': stream},
                'init_from': 'base', 'dev': 'rest',
            },
            'labels': {'kind': 'pseudo_label', 'teacher': 'teacher', 'selection': 'rest'},
            'student': {
                'kind': 'finetune', 'objectives': ctc,
                'streams': {'s': {'sources': {'b': {'selection': 'rest', 'labels': 'labels'}}}},
            },
            'score': {'kind': 'evaluate', 'models': ('student',), 'sets': ('rest',)},
        },
        'recipe': ('base', 'teacher', 'labels', 'student', 'score'),
    }  # fmt: skip


def changed(path: str, value) -> dict:
    """The experiment with one field set, named by its path with dots."""
    config = experiment()
    *groups, last = path.split('.')
    node = config
    for name in groups:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
    node[last] = value
    return config


def test_the_experiment_of_these_tests_resolves_and_resolving_again_changes_nothing():
    once = schema.resolve(experiment())
    assert schema.resolve(once) == once
    assert once['stages']['teacher']['optimizer']['groups']['all']['algorithm'] == 'adamw'
    assert once['encoder']['num_layers'] == 4


@pytest.mark.parametrize(
    ('path', 'told'),
    [
        ('sede', "sede: did you mean 'seed'?"),
        ('encoder.num_layer', "encoder.num_layer: did you mean 'num_layers'?"),
        ('audio.window_msec', "audio.window_msec: did you mean 'window_ms'?"),
        ('corpora.mine.manifst', "corpora.mine.manifst: did you mean 'manifest'?"),
        ('stages.base.step', "stages.base.step: did you mean 'steps'?"),
        ('stages.base.optimizer.clipnorm', "optimizer.clipnorm: did you mean 'clip_norm'?"),
        ('stages.base.optimizer.groups.all.peek', "groups.all.peek: did you mean 'peak'?"),
        ('stages.base.objectives.rq.codebok_size', "did you mean 'codebook_size'?"),
        ('stages.base.streams.s.batch_second', "did you mean 'batch_seconds'?"),
        ('stages.teacher.spec_augment.freq_masc', "did you mean 'freq_masks'?"),
        ('stages.labels.techer', "stages.labels.techer: did you mean 'teacher'?"),
        ('stages.base.zzz', 'allowed: decoder, dev, divergence, eval_every'),
    ],
)
def test_an_unknown_field_names_the_nearest(path, told):
    with pytest.raises(ConfigError) as error:
        schema.resolve(changed(path, 1))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ('path', 'value', 'told'),
    [
        ('seed', 'one', r"seed is 'one' \(str\); it must be a int"),
        ('seed', True, 'seed is True; it must be a number'),
        ('stages.base.steps', 2.5, r'stages.base.steps is 2.5 \(float\); it must be a int'),
        ('stages.base.optimizer', 3, 'optimizer is 3; it must be a group of fields'),
        ('corpora.mine', 'speech.jsonl', 'corpora.mine is .*; it must be a group'),
        ('corpora', {}, 'corpora is empty'),
        ('corpora.mine.split_by', 'sex', "split_by is 'sex'; allowed: '', 'group'"),
        ('encoder.preset', 'huge', "preset is 'huge'; allowed: 'tiny'"),
        ('encoder.dropout', 1.5, 'encoder.dropout is 1.5; allowed: 0 up to below 1'),
        ('audio.hop_ms', 0.0, 'audio.hop_ms=0.0 must be above 0'),
        ('stages.teacher.spec_augment', {'time_ratio': 2.0}, 'time_ratio is 2.0; allowed'),
        ('stages.teacher.optimizer.groups', {'all': {'schedule': 'cosin'}}, "is 'cosin'; allowed"),
        ('stages.teacher.optimizer.groups', {'all': {'algorithm': 'sgd'}}, "is 'sgd'; allowed"),
        ('encoder.num_heads', 5, 'not a multiple of'),
        ('stages.base.kind', 'train', "kind is 'train'; allowed: 'pretrain', 'finetune'"),
        ('stages.base.objectives', {}, 'objectives is empty'),
        ('stages.base.objectives.rq.objective', 'bert', "objective is 'bert'; allowed: 'best_rq'"),
        ('stages.base.objectives.rq.codebook_size', 0, 'codebook_size is 0; it must be >= 1'),
        ('stages.base.streams.s.sources', {}, 'sources is empty'),
        ('stages.score.sets', {'x': 'rest'}, 'stages.score.sets is .*; it must be a list'),
        ('recipe', 'base', 'recipe is .*; it must be a list'),
        ('stages.labels.decoder', {'kind': 'best'}, "labels.decoder.kind is 'best'; allowed: 'gr"),
        ('stages.teacher.decoder', {'max_symbols': 0}, 'teacher.decoder.max_symbols is 0; it must'),
        ('stages.teacher.objectives', {'t': {'objective': 'rnnt', 'stream': 's', 'joint_dim': 0}},
         'stages.teacher.objectives.t: joint_dim is 0; it must be >= 1'),
        ('stages.teacher.objectives', {'t': {'objective': 'hat', 'stream': 's', 'fastemit': -1.0}},
         'stages.teacher.objectives.t: hat.fastemit is -1.0; it must be at least 0'),
        ('stages.teacher.init_heads', ('rq',), "init_heads is 'rq'; allowed: 'ctc'"),
        ('stages.student.init_heads', ('ctc',), 'but init_from names no stage'),
    ],
)  # fmt: skip
def test_a_wrong_type_or_value_says_what_is_allowed(path, value, told):
    with pytest.raises(ConfigError, match=told):
        schema.resolve(changed(path, value))


@pytest.mark.parametrize(
    ('path', 'value', 'told'),
    [
        ('selections.train.corpus', 'mein', "corpora.mein: did you mean 'mine'?"),
        ('selections.rest.exclude', ('trian',), "selections.rest.exclude is 'trian'"),
        ('statistics.selection', 'dev', "statistics.selection is 'dev', which is not defined"),
        ('tokenizer.selection', 'dev', "tokenizer.selection is 'dev', which is not defined"),
        ('stages.base.objectives.rq.stream', 't', 'stages.base.streams.t'),
        ('stages.base.streams.s.sources.a.selection', 'no', r"sources.a is 'no', .*\['rest', 'tr"),
        ('stages.teacher.dev', 'dev', "stages.teacher.dev is 'dev', which is not defined"),
        ('stages.teacher.init_from', 'bass', "stages.teacher needs stage 'bass'"),
        ('stages.labels.teacher', 'student', "stages.labels needs stage 'student', .* not before"),
        ('stages.score.models', ('techer',), "stages.score needs stage 'techer'"),
        ('stages.score.models', ('base',), "stages.score.models is 'base', a pretrain stage"),
        ('stages.student.init_from', 'labels', 'must name a pretrain or finetune stage'),
        ('stages.teacher.streams.s.sources.a.labels', 'base', 'must name a pseudo_label stage'),
        ('stages.base.objectives.rq', {'objective': 'rnnt', 'stream': 's'}, "needs labels, and so"),
        ('stages.teacher.streams.s.sources.a.labels', '', "needs labels, and source 'a'"),
        ('tokenizer.selection', '', 'tokenizer.selection is not set, but stages.teacher learns'),
        ('stages.score.sets', ('rest', 'exam'), "stages.score.sets is 'exam'"),
        ('recipe', ('base', 'teach'), "recipe is 'teach', which is not defined"),
        ('recipe', ('teacher', 'base'), "stages.teacher needs stage 'base', .* not before"),
        ('stages.score.compare', (('student', 'teacher'),), "stages.score.compare is 'teacher'"),
        ('encoder.num_mels', 128, 'encoder.num_mels is 128.*audio.num_mels'),
    ],
)  # fmt: skip
def test_a_reference_to_nothing_says_what_there_is(path, value, told):
    with pytest.raises(ConfigError, match=told):
        schema.resolve(changed(path, value))


@pytest.mark.parametrize('path', ['stages.labels', 'stages.student.streams.s.sources.b'])
@pytest.mark.parametrize(
    ('steps', 'told'),
    [
        (({'kind': 'confidnce'},), r"filter\[0\].kind is 'confidnce'.*did you mean 'confidence'"),
        (({'kind': 'empty'}, {'kind': 'luck'}), r"filter\[1\].kind is 'luck'; allowed: 'confid"),
        ({'percentile': 10.0}, r'filter\[0\].kind is None; allowed'),
        ({'kind': 'confidence'}, 'needs either percentile or threshold, it has neither'),
        ({'kind': 'confidence', 'percentil': 10.0}, "percentil: did you mean 'percentile'"),
        ({'kind': 'confidence', 'threshold': 'high'}, "threshold is 'high'; it must be a number"),
        ({'kind': 'confidence', 'percentile': 100.0}, 'must be 0 <= p < 100'),
        ({'kind': 'words_per_second', 'max': '4'}, r"max is '4' \(str\); it must be a float"),
        ('empty', "filter is 'empty'; it must be a list of steps"),
        ((), 'must be a list of steps, at least one'),
        (('empty',), r"filter\[0\] is 'empty'; a step is a group"),
    ],
)
def test_a_bad_filter_is_found_before_the_labels_are_made(path, steps, told):
    with pytest.raises(ConfigError, match=rf'{path}\.{told}' if 'filter' in told else told):
        schema.resolve(changed(f'{path}.filter', steps))


def fitted(fit: str, **dev) -> dict:
    """The experiment with a filter of `labels` that is fitted on the labels of the stage `dev`."""
    step = {'kind': 'normalised_score', 'threshold': 0.0, 'fit': fit}
    config = changed('stages.labels.filter', step)
    config['stages']['student']['streams']['s']['sources']['b']['filter'] = (step,)
    given = {'kind': 'pseudo_label', 'teacher': 'teacher', 'selection': 'train', **dev}
    config['stages']['dev'] = given
    config['recipe'] = ('base', 'teacher', 'dev', 'labels', 'student', 'score')
    return config


def test_a_filter_is_fitted_on_labels_of_the_same_teacher():
    resolved = schema.resolve(fitted('dev'))
    assert schema.upstream_of(resolved['stages']['labels']) == ['teacher', 'dev']
    assert schema.upstream_of(resolved['stages']['student']) == ['dev', 'labels']
    folders = with_folders(resolved['stages']['labels']['filter'], pathlib.Path('/run'))
    assert [step['fit'] for step in folders] == ['/run/dev/labels']
    with pytest.raises(ConfigError, match="needs stage 'dve', which is not before it"):
        schema.resolve(fitted('dve'))
    with pytest.raises(ConfigError, match="labels.filter is 'teacher', a finetune stage"):
        schema.resolve(fitted('teacher'))
    with pytest.raises(ConfigError, match=r"labels.filter is fitted on stage 'dev', whose decoder"):
        schema.resolve(fitted('dev', decoder={'kind': 'beam'}))


def test_a_filter_needs_labels_that_a_teacher_wrote():
    config = changed('stages.student.streams.s.sources.b.filter', {'kind': 'empty'})
    schema.resolve(config)
    config['stages']['student']['streams']['s']['sources']['b']['labels'] = 'text'
    with pytest.raises(
        ConfigError, match=r"b\.filter needs labels of a pseudo_label stage.*'text'"
    ):
        schema.resolve(config)


def test_a_misspelt_field_of_a_selection_is_found_before_any_work():
    with pytest.raises(ConfigError, match="selections.train.split: did you mean 'splits'"):
        schema.resolve(changed('selections.train.split', ('train',)))


@pytest.mark.parametrize('value', ['train', ['train'], None])
def test_what_a_selection_excludes_is_a_list(value):
    config = changed('selections.rest.exclude', value)
    if isinstance(value, str):
        with pytest.raises(ConfigError, match='it must be a list'):
            schema.resolve(config)
    else:
        schema.resolve(config)


def test_integers_are_taken_as_floats_and_lists_as_tuples():
    config = changed('stages.base.optimizer.clip_norm', 1)
    config['recipe'] = list(config['recipe'])
    resolved = schema.resolve(config)
    assert resolved['stages']['base']['optimizer']['clip_norm'] == 1.0
    assert isinstance(resolved['stages']['base']['optimizer']['clip_norm'], float)
    assert resolved['recipe'] == tuple(config['recipe'])


def test_the_hash_follows_from_the_content_alone():
    config = experiment()
    turned = {name: config[name] for name in reversed(config)}
    plain = config_lib.config_hash(config)
    assert plain == config_lib.config_hash(turned)
    assert plain == config_lib.config_hash(ml_collections.ConfigDict(config))
    assert plain != config_lib.config_hash(changed('stages.base.steps', 1001))


def test_a_stage_is_identified_by_itself_and_by_all_before_it_but_not_after():
    base = schema.resolve(experiment())
    other = schema.resolve(changed('stages.base.steps', 7))
    for stage, same in (('base', False), ('teacher', False), ('labels', False), ('prepare', True)):
        equal = schema.identity_of(base, stage) == schema.identity_of(other, stage)
        assert equal is same, stage
    later = schema.resolve(changed('stages.score.report_clips', 0))
    for stage in ('base', 'teacher', 'labels', 'student'):
        assert schema.identity_of(base, stage) == schema.identity_of(later, stage)


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        (None, 'no file'),
        ('x = 1\n', r'defines no get_config\(arg\)'),
        ('def get_config(:\n', 'experiment.py:1'),
        ('import nonsense_module_name\n', 'nonsense_module_name'),
    ],
)
def test_a_file_that_cannot_be_loaded_is_a_config_error(tmp_path, text, told):
    path = tmp_path / 'experiment.py'
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        config_lib.load(str(path))


def test_a_failing_get_config_names_the_line_of_the_file(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text('import json\n\ndef get_config():\n    return json.loads("{")\n')
    with pytest.raises(ConfigError, match=r'a\.py:4: JSONDecodeError'):
        config_lib.load(str(path))
    with pytest.raises(ConfigError, match=r'a\.py: TypeError: get_config\(\) takes 0'):
        config_lib.load(f'{path}:x')


def test_a_file_that_is_not_python_and_one_with_an_argument(tmp_path):
    (tmp_path / 'a.txt').write_text('hello')
    with pytest.raises(ConfigError, match='not a Python file'):
        config_lib.load(str(tmp_path / 'a.txt'))
    path = tmp_path / 'a.py'
    path.write_text('def get_config(argument="none"):\n    return {"name": argument}\n')
    assert config_lib.load(f'{path}:x=1,y=2') == {'name': 'x=1,y=2'}
    assert config_lib.load(str(path)) == {'name': 'none'}


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: path.stem)
def test_the_resolved_text_of_every_experiment_is_the_committed_one(path):
    golden = ROOT / 'tests' / 'golden'
    spec = importlib.util.spec_from_file_location('regenerate', golden / 'regenerate.py')
    regenerate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(regenerate)
    committed = golden / f'{path.stem}.json'
    assert committed.exists(), 'run: python tests/golden/regenerate.py'
    now, then = json.loads(regenerate.resolved(path)), json.loads(committed.read_text())
    assert now == then, 'meant? then run: python tests/golden/regenerate.py, and commit the diff'


def test_resolving_one_experiment_leaves_the_defaults_of_the_next_alone():
    defaults = {'optimizer': {'groups': {}}}
    merged = config_lib.merge('', defaults, {})
    merged['optimizer']['groups']['all'] = {}
    assert defaults == {'optimizer': {'groups': {}}}
