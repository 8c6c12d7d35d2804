"""Corpora in a shared data_dir: used again when they are the same, refused by name when not."""

import json
import pathlib
import threading
import time

import numpy as np
import pytest
import soundfile

from bigssl_jax.config import ConfigError
from bigssl_jax.data import open_voices
from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.folder import file_lock
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.open_voices.splits import mark_seen
from bigssl_jax.data.prepare import prepare, prepare_command
from bigssl_jax.stages import prepare as prepare_stage
from bigssl_jax.stages import schema
from bigssl_jax.stages.context import Context
from bigssl_jax.training.signals import Stopped, StopRequest


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(prepare_stage, 'cpu_cores', lambda: 1)


def noise(seconds: float = 0.5) -> np.ndarray:
    return np.random.default_rng(0).integers(-9000, 9000, int(16000 * seconds)).astype(np.int16)


@pytest.fixture
def manifest(tmp_path) -> pathlib.Path:
    """Four utterances of two speakers, with texts."""
    lines = []
    for number in range(4):
        soundfile.write(tmp_path / f'{number}.wav', noise(), 16000, subtype='PCM_16')
        lines.append({'audio': f'{number}.wav', 'text': 'hello', 'speaker': f's{number % 2}'})
    path = tmp_path / 'speech.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


@pytest.fixture
def run(tmp_path):
    """Prepares `corpora` as an experiment of its own in the shared data_dir; returns the report."""

    def run(corpora: dict) -> dict:
        first = next(iter(corpora))
        config = {
            'data_dir': str(tmp_path / 'shared'),
            'corpora': corpora,
            'selections': {'all': {'corpus': first}},
            'statistics': {'selection': 'all'},
        }
        resolved = schema.resolve(config)
        return prepare_stage.prepare_corpora(
            Context(resolved, 'prepare', tmp_path / 'run', None, StopRequest())
        )

    return run


def stamps(folder: pathlib.Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}


def test_the_same_manifest_is_used_again_also_when_its_audio_is_gone(run, manifest, tmp_path):
    report = run({'speech': {'manifest': str(manifest)}})
    before = stamps(tmp_path / 'shared')
    (tmp_path / '0.wav').unlink()
    assert run({'speech': {'manifest': str(manifest)}}) == report
    moved = manifest.rename(tmp_path / 'moved.jsonl')
    assert run({'speech': {'manifest': str(moved)}}) == report
    assert stamps(tmp_path / 'shared') == before


def test_another_manifest_or_split_of_the_same_name_is_refused(run, manifest, tmp_path):
    run({'speech': {'manifest': str(manifest)}})
    before = stamps(tmp_path / 'shared')
    told = r'shared/speech holds another corpus than corpora.speech asks for \(%s\); rename'
    with pytest.raises(ConfigError, match=told % "split_by: '' -> 'speaker'"):
        run({'speech': {'manifest': str(manifest), 'split_by': 'speaker'}})
    with pytest.raises(ConfigError, match="kind: 'manifest' -> 'tfds'"):
        run({'speech': {'tfds': 'librispeech'}})
    manifest.write_text(manifest.read_text().replace('hello', 'goodbye', 1))
    with pytest.raises(ConfigError, match=told % "sha256: '[0-9a-f]{16}' -> '[0-9a-f]{16}'"):
        run({'speech': {'manifest': str(manifest)}})
    assert stamps(tmp_path / 'shared') == before
    assert run({'other': {'manifest': str(manifest)}})['other']['rows'] == 4


def test_a_corpus_prepared_by_hand_is_used_if_it_says_what_it_is(run, manifest, tmp_path, capsys):
    shared = tmp_path / 'shared'
    prepare_command(manifest=str(manifest), out=str(shared / 'speech'), jobs=1, progress=False)
    assert run({'speech': {'manifest': str(manifest)}})['speech']['rows'] == 4
    entries = [Entry(id='a', audio=noise(), sample_rate=16000)]
    prepare(entries, shared / 'unknown', jobs=1, progress=False)
    with pytest.raises(ConfigError, match='does not record what it was made from'):
        run({'unknown': {'manifest': str(manifest)}})


TRAINING = 'the line that comes back'


@pytest.fixture
def voices(monkeypatch) -> list:
    """Stands in for the recorded sets: three lines a set, one of them in another's training."""
    asked = []

    def entries(names, cache, deb_dir=None, jobs=1):
        asked.append(list(names))
        found = [
            Entry(
                id=f'{name}/{split}', audio=noise(), sample_rate=16000, text=text,
                speaker=f'{name}_joe', split=split,
            )
            for name in names
            for split, text in (
                ('train', TRAINING if name == 'queen' else 'one'), ('dev', 'two'),
                ('test', TRAINING if name == 'ast_en' else 'three'),
            )
        ]  # fmt: skip
        yield from mark_seen(found)

    monkeypatch.setattr(open_voices, 'entries', entries)
    return asked


HERO = {'open_voices': ('queen',)}
EXAM = {'open_voices': ('ast_en',)}


def seen(tmp_path, name: str) -> dict:
    corpus = Corpus.open(tmp_path / 'shared' / name)
    return dict(
        zip(corpus.column('id').to_pylist(), corpus.column('seen').to_pylist(), strict=True)
    )


def test_what_is_seen_in_training_does_not_depend_on_where_a_call_broke_off(run, voices, tmp_path):
    run({'hero': HERO, 'exam': EXAM})
    assert seen(tmp_path, 'exam')['ast_en/test']
    # As if the first call had ended after the first corpus.
    (tmp_path / 'shared' / 'exam').rename(tmp_path / 'aside')
    run({'hero': HERO, 'exam': EXAM})
    assert voices[1] == voices[0] == ['queen', 'ast_en']
    assert seen(tmp_path, 'exam')['ast_en/test']


def test_other_sets_or_speakers_of_recorded_voices_are_refused(run, voices, tmp_path):
    run({'hero': HERO, 'exam': EXAM})
    with pytest.raises(ConfigError, match=r"shared/hero .*speakers: \[\] -> \['queen_joe'\]"):
        run({'hero': {**HERO, 'speakers': ('queen_joe',)}, 'exam': EXAM})
    # Alone, no line of the exam would have been marked: it is another corpus.
    with pytest.raises(ConfigError, match=r"shared/exam .*all_sets: \['ast_en', 'queen'\] -> "):
        run({'exam': EXAM})


def test_speech_synthesised_for_want_of_recorded_is_used_again_for_the_same_hours_only(
    run, monkeypatch, tmp_path
):
    from bigssl_jax.data import synthetic_speech
    from bigssl_jax.data.errors import DataError

    def none(*arguments, **named):
        raise DataError('no packages here')

    def spoken(cache, num_utterances, seed, jobs):
        return [
            Entry(id=f'{seed}-{n}', audio=noise(), sample_rate=16000, split='train')
            for n in range(num_utterances)
        ]

    monkeypatch.setattr(open_voices, 'entries', none)
    monkeypatch.setattr(synthetic_speech, 'entries', spoken)
    hours = {'fallback_synthetic_hours': 0.002}
    given = {'exam': {**EXAM, **hours}, 'hero': {**HERO, **hours}}
    report = run(given)
    ids = [Corpus.open(tmp_path / 'shared' / n).column('id')[0].as_py() for n in ('exam', 'hero')]
    assert ids == ['0-0', '1-0']
    assert run(given) == report
    # The second corpus alone is spoken as it was beside the first.
    (tmp_path / 'shared' / 'hero').rename(tmp_path / 'aside')
    run(given)
    assert Corpus.open(tmp_path / 'shared' / 'hero').column('id')[0].as_py() == '1-0'
    with pytest.raises(ConfigError, match=r'shared/exam .*hours: 0.002 -> 0.0\b'):
        run({'exam': EXAM, 'hero': HERO})


def test_a_corpus_has_one_kind_of_source(run, manifest):
    with pytest.raises(
        ConfigError, match='exactly one of manifest, tfds and open_voices, not none'
    ):
        run({'speech': {}})
    with pytest.raises(ConfigError, match='not manifest and tfds'):
        run({'speech': {'manifest': str(manifest), 'tfds': 'librispeech'}})


def test_a_run_waits_for_another_that_prepares_in_the_same_folder(run, manifest, tmp_path, capsys):
    (tmp_path / 'shared').mkdir()
    found = []
    corpora = {'speech': {'manifest': str(manifest)}}
    second = threading.Thread(target=lambda: found.append(run(corpora)))
    with file_lock(str(tmp_path / 'shared' / '.prepare.lock')):
        second.start()
        time.sleep(0.8)
        assert found == []
        assert not (tmp_path / 'shared' / 'speech').exists()
    second.join()
    assert found[0]['speech']['rows'] == 4
    assert capsys.readouterr().out.count('waiting for another run') == 1


def test_who_waited_refuses_another_corpus_made_meanwhile(run, manifest, monkeypatch):
    """Between looking and locking, another run prepares a corpus of the same name."""
    real = prepare_stage._alone

    def late(context):
        monkeypatch.setattr(prepare_stage, '_alone', real)
        run({'speech': {'manifest': str(manifest), 'split_by': 'speaker'}})
        return real(context)

    monkeypatch.setattr(prepare_stage, '_alone', late)
    with pytest.raises(ConfigError, match='speech holds another corpus'):
        run({'speech': {'manifest': str(manifest)}})


def test_who_waits_can_be_stopped(tmp_path, manifest):
    config = {
        'data_dir': str(tmp_path / 'shared'),
        'corpora': {'speech': {'manifest': str(manifest)}},
        'selections': {'all': {'corpus': 'speech'}},
        'statistics': {'selection': 'all'},
    }
    stop = StopRequest()
    stop.requested = True
    waiting = Context(schema.resolve(config), 'prepare', tmp_path / 'run', None, stop)
    (tmp_path / 'shared').mkdir()
    with (
        file_lock(str(tmp_path / 'shared' / '.prepare.lock')),
        pytest.raises(Stopped, match='the same command continues'),
    ):
        prepare_stage.prepare_corpora(waiting)
