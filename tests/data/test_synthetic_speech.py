"""Synthetic speech: sentences, voices, entries."""

import pathlib
import re

import numpy as np
import pytest
import soundfile

from bigssl_jax.data import synthetic_sentences, synthetic_speech
from bigssl_jax.data.errors import DataError

pytest.importorskip('espeakng_loader')
RATE = 16000


def test_sentences_differ_and_are_only_letters():
    made = list(synthetic_sentences.sentences(0, 4000))
    texts = [text for _, text in made]
    assert len(set(texts)) == 4000
    assert all(re.fullmatch(r"[A-Z][A-Za-z' ,]+[.?]", text) for text in texts)
    assert len({word for text in texts for word in re.findall(r"[a-z']+", text.lower())}) > 500
    assert [scene for scene, _ in made] == [i // 8 for i in range(4000)]


def test_sentences_are_the_same_for_any_count_and_differ_between_seeds():
    long = list(synthetic_sentences.sentences(3, 200))
    assert list(synthetic_sentences.sentences(3, 50)) == long[:50]
    assert list(synthetic_sentences.sentences(4, 50)) != long[:50]


def test_no_slot_is_without_a_list():
    slots = {
        slot
        for choices in synthetic_sentences.GRAMMAR.values()
        for choice in choices
        for slot in synthetic_sentences.SLOT.findall(choice)
    }
    assert slots <= set(synthetic_sentences.GRAMMAR)


def test_speakers_are_distinct_and_counted():
    everyone = synthetic_speech.speakers(264)
    assert len({(s.accent, s.variant) for s in everyone}) == 264
    assert synthetic_speech.speakers(3) == everyone[:3]
    for count in (0, 265):
        with pytest.raises(DataError, match='between 1 and 264'):
            synthetic_speech.speakers(count)


def test_speech_depends_on_text_and_speaker_alone():
    first, second = synthetic_speech.speakers(2)
    text = 'Hello there, my old friend.'
    once = synthetic_speech.synthesise(text, first)
    other = synthetic_speech.synthesise('Something else, by someone else.', second)
    again = synthetic_speech.synthesise(text, first)
    assert once.dtype == np.int16 and 0.8 * RATE < len(once) < 4 * RATE
    assert np.array_equal(once, again)
    assert len(synthetic_speech.synthesise(text, second)) != len(once) != len(other)
    assert np.abs(once.astype(int)).max() == pytest.approx(0.5 * 32767, abs=2)


def test_every_voice_speaks():
    for speaker in synthetic_speech.speakers(264)[::11]:
        samples = synthetic_speech.synthesise('Good morning.', speaker)
        assert 0.3 * RATE < len(samples) < 3 * RATE, speaker
        assert samples.std() > 300, speaker


def test_unknown_voice_is_named():
    with pytest.raises(DataError, match='no voice.*en-XX'):
        synthetic_speech.synthesise('Hi.', synthetic_speech.Speaker('en-XX', 'f1', 50, 160))


def test_entries(tmp_path):
    made = list(synthetic_speech.entries(tmp_path, num_utterances=240, num_speakers=8))
    assert len({e.id for e in made}) == 240
    assert {e.domain for e in made} == {'synthetic'} and len({e.speaker for e in made}) == 8
    splits = {}
    for entry in made:
        assert splits.setdefault(entry.group, entry.split) == entry.split
    training = {e.text for e in made if e.split == 'train'}
    assert training and any(e.split == 'test' for e in made)
    assert not any(e.text in training for e in made if e.split != 'train' and not e.seen)
    info = soundfile.info(made[5].audio)
    assert info.samplerate == RATE and info.frames / RATE == pytest.approx(made[5].duration)
    letters = [len(e.text) for e in made]
    assert np.corrcoef(letters, [e.duration for e in made])[0, 1] > 0.7


def test_entries_continue_where_they_stopped(tmp_path):
    first = list(synthetic_speech.entries(tmp_path, num_utterances=16, num_speakers=4))
    lost = pathlib.Path(first[3].audio)
    content = lost.read_bytes()
    lost.unlink()
    more = list(synthetic_speech.entries(tmp_path, num_utterances=24, num_speakers=4, jobs=2))
    assert more[:16] == first and len(more) == 24
    assert lost.read_bytes() == content


def test_count_is_checked(tmp_path):
    with pytest.raises(DataError, match='num_utterances is 0'):
        list(synthetic_speech.entries(tmp_path, num_utterances=0))
