"""Bad input: one clear line that names what is wrong and how to mend it, exit code 2, no traceback.

A whole process per case, the way a user meets it.
"""

import json
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent

# Two supervised steps on the utterances of some splits; the tokenizer knows the tone speech's text.
WRAPPER = """
from bigssl_jax.config import load

def get_config():
    config = load('{experiment}:{manifest}')
    config.selections['some'] = {{'corpus': 'tones', 'splits': {splits}}}
    stage = config.stages['supervised']
    stage['steps'] = 2
    stage['streams']['mix']['sources']['labelled']['selection'] = 'some'
    config.stages = {{'supervised': stage}}
    config.recipe = ('supervised',)
    return config
"""


def told(ended) -> str:
    """The one line of a command that ended with a user error."""
    assert ended.returncode == 2, (ended.returncode, ended.stderr)
    assert 'Traceback' not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith('bigssl: ')]
    assert len(lines) == 1, ended.stderr
    assert ended.stderr.strip().endswith(lines[0])
    return lines[0]


@pytest.fixture
def experiment(tmp_path):
    """Writes the two steps over a manifest and the splits to learn from; returns the file."""

    def write(manifest: pathlib.Path, *splits: str) -> str:
        path = tmp_path / 'experiment.py'
        path.write_text(
            WRAPPER.format(experiment=HERE / 'tone_experiment.py', manifest=manifest, splits=splits)
        )
        return str(path)

    return write


@pytest.fixture
def lines(recipe):
    """The tone corpus's manifest lines, with absolute paths."""
    found = [json.loads(line) for line in recipe.manifest.read_text().splitlines()]
    return [{**x, 'audio': str(recipe.manifest.parent / x['audio'])} for x in found]


def write_manifest(path: pathlib.Path, entries: list[dict]) -> pathlib.Path:
    path.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    return path


def test_a_missing_config_file(recipe, tmp_path):
    line = told(recipe.run(tmp_path / 'run', config=str(tmp_path / 'absent.py')))
    assert 'no file' in line and 'absent.py' in line
    assert not (tmp_path / 'run').exists()


def test_an_unknown_field(recipe, tmp_path):
    line = told(recipe.run(tmp_path / 'run', '--config.stages.teacher.step=3'))
    assert "stages.teacher.step: did you mean 'steps'?" in line
    assert not (tmp_path / 'run').exists()


def test_a_workdir_that_cannot_be_written(recipe, tmp_path):
    (tmp_path / 'run').write_text('a file, not a folder')
    line = told(recipe.run(tmp_path / 'run'))
    assert '--workdir' in line and 'another folder' in line
    assert (tmp_path / 'run').read_text() == 'a file, not a folder'


def test_a_workdir_of_another_config(recipe, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.workdir.rglob('*')}
    line = told(recipe.run(finished.workdir, '--config.seed=8'))
    assert 'made by another config (shared.seed: 3 -> 8)' in line and '--workdir' in line
    assert {p: p.stat().st_mtime_ns for p in finished.workdir.rglob('*')} == before


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (None, ('manifest.jsonl', 'no such manifest')),
        ('', ('empty',)),
        ('{"audio": "a.wav"}\n{"audio": 3\n', ('manifest.jsonl:2', 'JSON')),
    ],
    ids=['missing', 'empty', 'broken line'],
)
def test_a_manifest_that_cannot_be_used(recipe, experiment, tmp_path, content, words):
    manifest = tmp_path / 'manifest.jsonl'
    if content is not None:
        manifest.write_text(content)
    line = told(recipe.run(tmp_path / 'run', config=experiment(manifest, 'train')))
    assert all(word in line for word in words), line
    assert not (tmp_path / 'run' / 'prepare' / 'done.json').exists()


def test_single_bad_utterances_are_put_aside_and_counted(recipe, experiment, lines, tmp_path):
    (tmp_path / 'noise.wav').write_bytes(b'this is no audio')
    bad = {'id': 'bad', 'audio': str(tmp_path / 'noise.wav'), 'split': 'train', 'text': 'ae'}
    # 1.9 s make some 48 encoder frames; these are 80 letters.
    long = {**lines[0], 'id': 'long', 'split': 'long', 'text': 'aeiou' * 16}
    manifest = write_manifest(tmp_path / 'manifest.jsonl', [*lines, bad, long])
    ended = recipe.run(tmp_path / 'run', config=experiment(manifest, 'train', 'long'))
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / 'run'
    prepared = json.loads((run / 'prepare' / 'done.json').read_text())['results']
    assert prepared['corpora']['tones']['quarantined'] == 1
    assert prepared['corpora']['tones']['rows'] == len(lines) + 1
    aside = (run / 'corpora' / 'tones' / 'quarantine.jsonl').read_text().splitlines()
    assert [json.loads(line)['reason'] for line in aside] == ['unreadable']
    trained = json.loads((run / 'supervised' / 'done.json').read_text())['results']
    assert trained['excluded'] == {'ctc': {'labelled': {'ctc_impossible': 1}}}
    line = {'objective': 'ctc', 'source': 'labelled', 'id': 'long', 'reason': 'ctc_impossible'}
    assert json.loads((run / 'supervised' / 'left_out.jsonl').read_text()) == line
    tight = '--config.stages.supervised.streams.mix.max_left_out=0.001'
    config = experiment(manifest, 'train', 'long')
    assert "1 ctc_impossible, such as 'long'" in told(
        recipe.run(tmp_path / 'b', tight, config=config)
    )
    strict = '--config.corpora.tones.max_quarantine=0.0'
    assert "corpus's max_quarantine" in told(recipe.run(tmp_path / 'c', strict, config=config))


def test_text_that_the_tokenizer_does_not_know(recipe, experiment, lines, tmp_path):
    odd = [{**x, 'id': f'odd-{x["id"]}', 'split': 'odd', 'text': 'zzz ae'} for x in lines[:9]]
    manifest = write_manifest(tmp_path / 'manifest.jsonl', [*lines, *odd])
    line = told(recipe.run(tmp_path / 'run', config=experiment(manifest, 'odd')))
    assert '9 of 9 texts hold characters that the tokenizer does not know (z)' in line
    assert (tmp_path / 'run' / 'prepare' / 'done.json').exists()
    assert not (tmp_path / 'run' / 'supervised' / 'done.json').exists()


def test_a_mended_selection_goes_on_in_the_same_workdir(recipe, tmp_path):
    narrow = "--config.selections.dev.splits=('nowhere',)"
    line = told(recipe.run(tmp_path / 'run', '--stages', 'prepare', narrow))
    assert 'selections.dev' in line
    mended = recipe.run(tmp_path / 'run', '--stages', 'prepare')
    assert mended.returncode == 0, mended.stderr
    assert 'made by another config' in told(recipe.run(tmp_path / 'run', narrow))
