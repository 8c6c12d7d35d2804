"""Made-up mistakes in an experiment: whatever a config says, a user never meets a traceback.

    an experiment with a stage of every kind  --a few random changes-->  resolve, and what the
    stages build of it before they read any data

Each outcome is a config that works or one line that names a field that was changed.
"""

import contextlib
import dataclasses
import io
import math
import pathlib
import pickle
import re
import signal

import ml_collections
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigssl_jax import cli
from bigssl_jax import config as config_lib
from bigssl_jax.audio import AudioConfig
from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.data.selection import resolve as resolve_selection
from bigssl_jax.data.stream import resolve as resolve_stream
from bigssl_jax.overrides import apply_overrides
from bigssl_jax.parallel.mesh import mesh_shape
from bigssl_jax.stages import schema
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.recipe import wanted_stages
from bigssl_jax.training.checkpoint import Keep
from bigssl_jax.training.guard import GuardSettings
from bigssl_jax.training.optimizers import make_schedules


class _Mesh:
    """A mesh of one device, as far as a stage's context asks."""

    shape = {'slice': 1, 'data': 1, 'fsdp': 1, 'tensor': 1}


def everything() -> dict:
    """A config that resolves, with a stage of every kind and every group of fields in use."""
    text = {'labels': 'text', 'selection': 'train'}
    heard = {'s': {'sources': {'a': text}}}
    beam = {
        'kind': 'beam', 'lm': 'lm', 'lm_weight': 0.3, 'ngram': 'trigrams', 'ngram_weight': 0.1,
        'nbest': 2,
    }  # fmt: skip
    steps = (
        {'kind': 'confidence', 'percentile': 10.0},
        {'kind': 'normalised_score', 'threshold': -1.0, 'fit': (-0.5, 0.0, 1.0)},
        {'kind': 'words_per_second', 'min': 0.5, 'max': 5.0},
        {'kind': 'repeats', 'words': 2},
        {'kind': 'duplicates', 'times': 4},
        {'kind': 'keep_all'},
    )
    return {
        'name': 'everything',
        'corpora': {'mine': {'manifest': 'speech.jsonl'}, 'other': {'tfds': 'yes_no'}},
        'selections': {
            'train': {'corpus': 'mine', 'splits': ('train',), 'max_seconds': 9.0},
            'rest': {'corpus': 'mine', 'exclude': ('train',), 'hours': 1.5, 'with_text': True},
        },
        'tokenizer': {'selection': 'train'},
        'statistics': {'selection': 'train'},
        'encoder': {'preset': 'tiny'},
        'stages': {
            'base': {
                'kind': 'pretrain',
                'objectives': {
                    'rq': {'objective': 'best_rq', 'stream': 's'},
                    'contrast': {'objective': 'wav2vec2', 'stream': 's', 'weight': 0.5},
                },
                'streams': {'s': {'sources': {'a': {'selection': 'train'}}}},
                'optimizer': {'groups': {'head': {'pattern': 'heads'}, 'rest': {'peak': 1e-4}}},
                'noise': {'probability': 0.1},
            },
            'teacher': {
                'kind': 'finetune', 'streams': heard, 'init_from': 'base', 'dev': 'rest',
                'objectives': {'ctc': {'objective': 'ctc', 'stream': 's'}},
                'spec_augment': {'freq_masks': 1}, 'speed_perturb': {'percents': (90, 100)},
                'eval_every': 100, 'keep_best': 1, 'export': 'best',
            },
            'transducer': {
                'kind': 'finetune', 'streams': heard, 'init_from': 'teacher',
                'objectives': {
                    'rnnt': {'objective': 'rnnt', 'stream': 's', 'ctc_weight': 0.3},
                    'hat': {'objective': 'hat', 'stream': 's', 'prediction': 'stateless'},
                },
            },
            'lm': {
                'kind': 'language_model',
                'objectives': {'next': {'objective': 'next_token', 'stream': 't'}},
                'streams': {
                    't': {
                        'sources': {'a': {'selection': 'train'}, 'b': {'texts': ('books.txt.gz',)}}
                    }
                },
            },
            'trigrams': {'kind': 'ngram', 'selection': 'train', 'order': 3},
            'labels': {
                'kind': 'pseudo_label', 'teacher': 'teacher', 'selection': 'rest', 'top_k': 2,
                'filter': steps,
            },
            'student': {
                'kind': 'finetune', 'init_from': 'base',
                'objectives': {'ctc': {'objective': 'ctc', 'stream': 's'}},
                'streams': {
                    's': {
                        'sources': {
                            'a': text,
                            'b': {
                                'selection': 'rest', 'labels': 'labels', 'weight': 2.0,
                                'filter': {'kind': 'confidence', 'threshold': 0.5},
                            },
                        }
                    }
                },
            },
            'probe': {
                'kind': 'probe', 'models': ('base',),
                'tasks': {
                    'who': {'field': 'speaker', 'train': 'train', 'dev': 'rest', 'test': 'rest'}
                },
            },
            'score': {
                'kind': 'evaluate', 'models': ('teacher', 'student'), 'sets': ('rest',),
                'compare': (('student', 'teacher'),), 'decoder': beam,
                'tune': {'selection': 'train', 'lm_weight': (0.1, 0.3)},
            },
        },
        'recipe': (
            'base', 'teacher', 'transducer', 'lm', 'trigrams', 'labels', 'student', 'probe',
            'score',
        ),
    }  # fmt: skip


RESOLVED = schema.resolve(everything())


def paths_of(node, path=()) -> list[tuple]:
    """The paths of all fields, groups and entries of lists."""
    found = [path] if path else []
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, tuple):
        items = list(enumerate(node))
    else:
        return found
    return found + [deeper for name, value in items for deeper in paths_of(value, (*path, name))]


PATHS = paths_of(RESOLVED)
NAMES = sorted({name for path in PATHS for name in path if isinstance(name, str)})

NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([10**6, -(10**6), 2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(-2.0, 3.0),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e-320, 1e300]),
)
WORDS = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(['', 'text', 'a/b', '../up', 'x.arpa', 'full', '(', '*', 'inf', 'None', '1']),
    st.text(max_size=6),
    st.sampled_from(['\n', 'two\nlines', '\0', '\ud800', 'é\u0301', '\u202e', 'a.b', 'a' * 300]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.binary(max_size=3))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(WORDS, st.integers(0, 2)), inner, max_size=3),
    ),
    max_leaves=5,
)


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a config: the field at `path` is set, removed, or goes by another name."""

    path: tuple
    kind: str
    value: object = None


CHANGES = st.one_of(
    st.builds(Change, st.sampled_from(PATHS), st.just('set'), VALUES),
    st.builds(Change, st.sampled_from(PATHS), st.just('set'), NUMBERS),
    st.builds(Change, st.sampled_from(PATHS), st.just('remove')),
    st.builds(Change, st.sampled_from(PATHS), st.just('rename'), WORDS),
)


def changed(node, change: Change, path=None):
    """A copy of a config with a change; the config itself where the path is gone."""
    path = change.path if path is None else path
    name, *deeper = path
    if isinstance(node, tuple):
        if not isinstance(name, int) or name >= len(node):
            return node
        items = list(node)
        if deeper:
            items[name] = changed(items[name], change, tuple(deeper))
        elif change.kind == 'set':
            items[name] = change.value
        elif change.kind == 'remove':
            del items[name]
        return tuple(items)
    if not isinstance(node, dict) or name not in node:
        return node
    copy = dict(node)
    if deeper:
        copy[name] = changed(copy[name], change, tuple(deeper))
    elif change.kind == 'set':
        copy[name] = change.value
    else:
        value = copy.pop(name)
        if change.kind == 'rename':
            copy[change.value] = value
    return copy


def build(config) -> None:
    """Everything that a run makes of a config before it reads data or starts a device."""
    resolved = schema.resolve(config)
    assert schema.resolve(resolved) == resolved or config_lib.to_json(
        schema.resolve(resolved)
    ) == config_lib.to_json(resolved)
    mesh_shape(resolved['compute']['mesh'], 8)
    for name in wanted_stages(resolved, None):
        config_lib.config_hash(schema.identity_of(resolved, name))
    for name, stage in resolved['stages'].items():
        context = Context(resolved, name, pathlib.Path('workdir'), _Mesh(), None)
        for selection in resolved['selections']:
            resolve_selection(context.selection(selection))
        if 'objectives' not in stage:
            continue
        for objective in stage['objectives'].values():
            schema.make_objective(objective, 64, AudioConfig(**resolved['audio']).num_mels)
        if stage['kind'] != 'language_model':
            for given_stream in stage['streams'].values():
                resolve_stream(context.stream_config(given_stream))
        for group, schedule in make_schedules(stage['optimizer']['groups'], stage['steps']).items():
            assert all(math.isfinite(schedule(step)) for step in (0, 1, 1000)), group
            re.compile(stage['optimizer']['groups'][group]['pattern'])
        GuardSettings(**stage['divergence'])
        Keep(stage['keep'], stage['keep_every'], stage['keep_best'], 'dev_wer')
        assert 10 % stage['log_every'] >= 0 and 10 % stage['save_every'] >= 0
        assert 10 % stage['optimizer']['micro_batches'] >= 0
        schema.training_audio_seconds(resolved, name)


def refused(config) -> str | None:
    """What the user is told, None when there is nothing to tell; anything else is a traceback."""
    try:
        build(config)
    except UserError as error:
        return str(error)
    return None


def removed(change: Change) -> list:
    """The words that a change takes away: a reference to them is what may be complained of."""
    node = RESOLVED
    for name in change.path:
        node = node[name]
    return list(node) if isinstance(node, dict | tuple) else [node]


def check_message(message: str, changes: list[Change]) -> None:
    assert '\n' not in message and len(message) < 1500, message
    names = {str(name) for change in changes for name in change.path[-2:]}
    names |= {str(change.value) for change in changes if change.kind == 'rename'}
    names |= {str(word) for change in changes for word in removed(change)}
    assert any(name in message for name in names), (message, changes)


def test_the_experiment_of_these_tests_is_in_order():
    assert refused(everything()) is None and refused(RESOLVED) is None


# The default suite sees the same few examples each time; the slow one many.
FEW = dict(derandomize=True, deadline=None, database=None)
MANY = dict(FEW, suppress_health_check=list(HealthCheck), max_examples=10000)


def check_changes(changes: list[Change]) -> None:
    config = RESOLVED
    for change in changes:
        config = changed(config, change)
    message = refused(config)
    if message is not None:
        check_message(message, changes)


@settings(max_examples=120, **FEW)
@given(CHANGES)
def test_a_changed_field_works_or_is_named(change):
    check_changes([change])


@settings(max_examples=40, **FEW)
@given(st.lists(CHANGES, min_size=2, max_size=4))
def test_several_changed_fields_work_or_one_is_named(changes):
    check_changes(changes)


@pytest.mark.slow
@settings(**MANY)
@given(st.lists(CHANGES, min_size=1, max_size=4))
def test_many_changes(changes):
    check_changes(changes)


TEXTS = st.one_of(VALUES.map(repr), WORDS)
FIELDS = st.one_of(
    st.sampled_from(PATHS).map(lambda path: '.'.join(map(str, path))),
    st.lists(WORDS, min_size=1, max_size=3).map('.'.join),
)


def check_overrides(pairs: list[tuple[str, str]]) -> None:
    given_config = ml_collections.ConfigDict(everything())
    try:
        config = apply_overrides(given_config, pairs, RESOLVED)
    except ConfigError as error:
        message = str(error)
    else:
        message = refused(config)
    if message is not None:
        assert '\n' not in message
        # An empty word in a path, as in 'a..b', is named as ''.
        words = {word or "''" for path, _ in pairs for word in path.split('.')}
        words |= {config_lib.shown(word) for word in words}
        assert any(word in message for word in words), (message, pairs)


@settings(max_examples=40, **FEW)
@given(st.lists(st.tuples(FIELDS, TEXTS), min_size=1, max_size=2))
def test_an_override_works_or_is_named(pairs):
    check_overrides(pairs)


@pytest.mark.slow
@settings(**MANY)
@given(st.lists(st.tuples(FIELDS, TEXTS), min_size=1, max_size=3))
def test_many_overrides(pairs):
    check_overrides(pairs)


@pytest.fixture(scope='module')
def command(tmp_path_factory):
    """Runs `bigssl run --check` on a config in this process; returns (exit code, error output)."""
    path = tmp_path_factory.mktemp('command') / 'experiment.py'
    before = signal.getsignal(signal.SIGTERM)

    def run(config, *words):
        content = pickle.dumps(config)
        path.write_text(f'import pickle\ndef get_config(): return pickle.loads({content!r})\n')
        words = [
            'run',
            '--check',
            '--workdir',
            str(path.parent / 'run'),
            '--config',
            str(path),
            *words,
        ]
        with (
            contextlib.redirect_stderr(io.StringIO()) as told,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                code = cli.main(words)
            except SystemExit as stopped:  # argparse: the words are no command
                code = stopped.code
        return code, told.getvalue()

    yield run
    signal.signal(signal.SIGTERM, before)


def check_command(run, change, pair) -> None:
    words = [] if pair is None else [f'--config.{pair[0]}={pair[1]}']
    code, told = run(changed(everything(), change), *words)
    assert code in (0, 2), told
    if code:
        assert 'Traceback' not in told
        assert (
            sum(line.startswith('bigssl: ') for line in told.splitlines()) == 1 or 'usage:' in told
        )


@settings(max_examples=15, **FEW)
@given(change=CHANGES, pair=st.one_of(st.none(), st.tuples(FIELDS, TEXTS)))
def test_the_command_ends_with_one_line(command, change, pair):
    check_command(command, change, pair)


@pytest.mark.slow
@settings(**MANY)
@given(change=CHANGES, pair=st.one_of(st.none(), st.tuples(FIELDS, TEXTS)))
def test_the_command_ends_with_one_line_many_times(command, change, pair):
    check_command(command, change, pair)
