"""The `bigssl` command: help, exit codes, one clear line for what the user can mend."""

import json
import os
import pathlib
import subprocess
import sys
import time

import ml_collections
import pytest

from bigssl_jax import cli, verbs
from bigssl_jax.config import ConfigError
from bigssl_jax.overrides import apply_overrides

VERBS = ('run', 'label', 'sweep', 'plan', 'prepare', 'inspect', 'transcribe', 'score', 'report')
FIELDS = {
    'seed': 0,
    'recipe': ('a', 'b'),
    'encoder': {'preset': 'tiny', 'num_layers': 4, 'dropout': 0.1},
    'stages': {'teacher': {'steps': 100, 'noise': None, 'weight': 1.0, 'filter': {}}},
}


def bigssl(*words: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-m', 'bigssl_jax', *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )


def one_line(done: subprocess.CompletedProcess) -> str:
    """The only line on standard error, of a command that ended as a user error."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith('bigssl: ')
    return lines[0]


@pytest.fixture
def experiment(tmp_path):
    """An experiment file that resolves, but whose corpus does not exist."""
    path = tmp_path / 'experiment.py'
    path.write_text(
        'import ml_collections\n'
        'def get_config(argument="x"):\n'
        '    return ml_collections.ConfigDict({\n'
        '        "name": argument,\n'
        '        "corpora": {"mine": {"manifest": "/nonexistent/speech.jsonl"}},\n'
        '        "selections": {"all": {"corpus": "mine"}},\n'
        '        "statistics": {"selection": "all"},\n'
        '    })\n'
    )
    return path


def test_help_answers_within_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = bigssl('--help')
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert min(seconds) < 1.0


@pytest.mark.parametrize('verb', VERBS)
def test_every_verb_shows_an_example_and_takes_json(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, '--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f'  bigssl {verb} ' in text.split('example:')[1]
    assert '--json FILE' in text


@pytest.mark.parametrize(
    'words, told',
    [
        ([], 'VERB'),
        (['fly'], "invalid choice: 'fly'"),
        (['run', '--workdir', 'x'], '--config'),
        (['run', '--config', 'x.py', '--workdir', 'y', '--stage=a'], "'--stage=a'"),
        (['run', '--config', 'x.py', '--workdir', 'y', '--config.seed'], '--config.seed=VALUE'),
        (['report', 'runs/x', '--config.seed=1'], "'--config.seed=1'"),
        (['prepare', '--manifest', 'a', '--tfds', 'b', '--out', 'c'], 'not allowed with'),
    ],
)
def test_usage_errors_exit_with_2(words, told, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    'path, text, expected',
    [
        ('seed', '7', 7),
        ('encoder.num_layers', '2', 2),
        ('encoder.dropout', '0', 0.0),
        ('recipe', "('b',)", ('b',)),
        ('stages.teacher.steps', '5', 5),
        ('stages.teacher.weight', '0.5', 0.5),
        ('stages.teacher.noise', '3', 3),
    ],
)
@pytest.mark.parametrize('mentioned', [True, False])
def test_overrides_take_the_type_of_their_field(path, text, expected, mentioned):
    given = FIELDS if mentioned else {'encoder': {'preset': 'tiny'}}
    config = apply_overrides(ml_collections.ConfigDict(given), [(path, text)], FIELDS)
    value = config
    for name in path.split('.'):
        value = value[name]
    assert value == expected
    assert type(value) is type(expected)


def test_an_override_leaves_fields_alone_that_follow_from_it():
    given = ml_collections.ConfigDict({'encoder': {'preset': 'tiny'}})
    config = apply_overrides(given, [('encoder.preset', 'small')], FIELDS)
    assert config.to_dict() == {'encoder': {'preset': 'small'}}
    assert given.encoder.preset == 'tiny'


@pytest.mark.parametrize(
    'path, text, told',
    [
        ('sede', '1', "sede: did you mean 'seed'?"),
        ('encoder.num_layer', '2', "encoder.num_layer: did you mean 'num_layers'?"),
        ('stages.student.steps', '2', 'stages.student'),
        ('seed.x', '2', 'single value'),
        ('encoder.num_layers', 'two', 'config.encoder.num_layers=two'),
    ],
)
def test_bad_overrides_name_the_field(path, text, told):
    with pytest.raises(ConfigError, match='.') as error:
        apply_overrides(ml_collections.ConfigDict(FIELDS), [(path, text)], FIELDS)
    assert told in str(error.value)


def test_run_names_a_missing_config(tmp_path):
    line = one_line(bigssl('run', '--config', 'nowhere.py', '--workdir', str(tmp_path / 'w')))
    assert 'nowhere.py' in line
    assert not (tmp_path / 'w').exists()


def test_run_names_the_nearest_field_before_any_work(tmp_path, experiment):
    done = bigssl(
        'run', '--config', str(experiment), '--workdir', str(tmp_path / 'w'), '--config.sede=3'
    )
    assert "did you mean 'seed'" in one_line(done)
    assert not (tmp_path / 'w').exists()


def test_run_refuses_a_workdir_that_cannot_be_written(tmp_path, experiment):
    (tmp_path / 'file').write_text('in the way')
    done = bigssl('run', '--config', str(experiment), '--workdir', str(tmp_path / 'file' / 'w'))
    assert 'cannot be written' in one_line(done)
    assert (tmp_path / 'file').read_text() == 'in the way'


def test_run_names_a_missing_manifest(tmp_path, experiment):
    done = bigssl('run', '--config', str(experiment), '--workdir', str(tmp_path / 'w'))
    assert '/nonexistent/speech.jsonl' in one_line(done)


def test_run_names_an_unknown_stage(tmp_path, experiment):
    done = bigssl(
        'run', '--config', str(experiment), '--workdir', str(tmp_path), '--stages', 'teach'
    )
    assert 'teach' in one_line(done)


@pytest.mark.parametrize(
    'words',
    [
        ('prepare', '--manifest', 'no/such.jsonl', '--out', 'OUT'),
        ('inspect', 'no/such/corpus'),
        ('transcribe', '--checkpoint', 'no/such/stage', 'no/such.wav'),
        ('score', '--references', 'no/such.jsonl', '--hypotheses', 'no/such.jsonl'),
        ('report', 'no/such/run'),
    ],
    ids=lambda words: words[0],
)
def test_a_missing_input_is_one_line(words, tmp_path):
    words = [str(tmp_path / 'out') if word == 'OUT' else word for word in words]
    assert 'no/such' in one_line(bigssl(*words))


def test_prepare_inspect_and_json(tmp_path):
    soundfile = pytest.importorskip('soundfile')
    numpy = pytest.importorskip('numpy')
    noise = numpy.random.default_rng(0).normal(0, 3000, 16000).astype('int16')
    soundfile.write(tmp_path / 'a.wav', noise, 16000)
    manifest = tmp_path / 'm.jsonl'
    manifest.write_text(json.dumps({'audio': 'a.wav', 'text': 'hello there'}) + '\n')
    corpus = tmp_path / 'corpus'
    done = bigssl(
        'prepare', '--manifest', str(manifest), '--out', str(corpus), '--jobs', '1',
        '--json', str(tmp_path / 'p.json'),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (corpus / 'corpus.json').exists()
    json.loads((tmp_path / 'p.json').read_text())
    done = bigssl('inspect', str(corpus), '--json', str(tmp_path / 'i.json'))
    assert done.returncode == 0, done.stderr
    assert 'hello there' in done.stdout
    json.loads((tmp_path / 'i.json').read_text())


def test_score_prints_a_table_and_writes_json(tmp_path):
    references, hypotheses = tmp_path / 'r.jsonl', tmp_path / 'h.jsonl'
    references.write_text('{"id": "u1", "text": "The cat sat."}\n{"id": "u2", "text": "yes"}\n')
    hypotheses.write_text('{"id": "u2", "text": "yes"}\n{"id": "u1", "text": "the hat sat"}\n')
    done = bigssl(
        'score', '--references', str(references), '--hypotheses', str(hypotheses),
        '--json', str(tmp_path / 's.json'),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '25' in done.stdout  # one of four words, in percent
    assert '0.25' in (tmp_path / 's.json').read_text()


def test_json_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verbs, '_report', lambda options: {})
    assert cli.main(['report', 'x', '--json', str(tmp_path / 'no' / 'x.json')]) == 2
    assert 'no/x.json' in capsys.readouterr().err


def run_with(monkeypatch, error: BaseException) -> int:
    def verb(options):
        raise error

    monkeypatch.setattr(verbs, '_report', verb)
    return cli.main(['report', 'x'])


def test_exit_codes(monkeypatch, capsys):
    monkeypatch.delenv('BIGSSL_TRACEBACK', raising=False)
    assert run_with(monkeypatch, ConfigError('two\nlines')) == 2
    assert capsys.readouterr().err == 'bigssl: two lines\n'
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert run_with(monkeypatch, OSError(28, 'No space left on device', '/x')) == 2
    assert 'No space left' in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        run_with(monkeypatch, ZeroDivisionError())


def test_sigterm_unwinds_and_exits_with_143():
    code = (
        'import os, signal, sys, time; from bigssl_jax import cli, verbs\n'
        'def verb(options):\n'
        '    try:\n'
        '        os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)\n'
        '    finally:\n'
        '        print("closed", flush=True)\n'
        'verbs._report = verb\n'
        'sys.exit(cli.main(["report", "x"]))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (143, 'closed\n')


def test_the_command_is_installed():
    script = pathlib.Path(sys.executable).parent / 'bigssl'
    done = subprocess.run([script, '--version'], capture_output=True, text=True, check=True)
    assert done.stdout.startswith('bigssl-jax ')


def test_check_resolves_and_touches_nothing(experiment, tmp_path, capsys):
    words = ['run', '--config', f'{experiment}:mine', '--workdir', str(tmp_path / 'w'), '--check']
    assert cli.main([*words, '--config.seed=3', '--json', str(tmp_path / 'check.json')]) == 0
    checked = json.loads((tmp_path / 'check.json').read_text())
    assert checked['name'] == 'mine' and checked['stages'] == ['prepare']
    assert checked['config_hash'] in capsys.readouterr().out
    assert not (tmp_path / 'w').exists()
    assert cli.main([*words, '--json', str(tmp_path / 'other.json')]) == 0
    other = json.loads((tmp_path / 'other.json').read_text())
    assert other['config_hash'] != checked['config_hash']  # the seed is part of it


@pytest.mark.parametrize('wrong', ['--config.sed=3', '--stages=teachr', '--workdir=gs://b/x'])
def test_check_refuses_what_a_run_would_refuse(experiment, tmp_path, capsys, wrong):
    words = ['run', '--config', str(experiment), '--workdir', str(tmp_path / 'w'), '--check']
    assert cli.main([*words, wrong]) == 2
    assert 'bigssl: ' in capsys.readouterr().err
    assert not (tmp_path / 'w').exists()
