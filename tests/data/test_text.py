"""Normalisers do what their table says, in any script, and doing it twice changes nothing."""

import random
import sys
import unicodedata

import pytest

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.text import NORMALISERS, is_spoken, normalise_text, scoring_normaliser

LINE = "  Don't  panic, Mr. O\u2019Neil \u2014 it's 7! "


@pytest.mark.parametrize(
    'name, expected',
    [
        ('none', "Don't panic, Mr. O\u2019Neil \u2014 it's 7!"),
        ('basic', 'dont panic mr oneil its 7'),
        ('english', "don't panic mr o'neil it's 7"),
    ],
)
def test_the_table_of_the_docstring(name, expected):
    assert normalise_text(LINE, name) == expected


@pytest.mark.parametrize(
    'text, expected',
    [
        ('\u0401\u043b\u043a\u0430, \u0434\u0430!', '\u0451\u043b\u043a\u0430 \u0434\u0430'),
        ('\ufb01n \uff21\uff22', 'fin ab'),  # ligature and full-width letters
        ('na\u00efve cafe\u0301', 'na\u00efve caf\u00e9'),  # a combining accent is composed
        ('\u0939\u093f\u0928\u094d\u0926\u0940?', '\u0939\u093f\u0928\u094d\u0926\u0940'),
        ('rock-and-roll/now', 'rock and roll now'),
        ('', ''),
        (' ...!? ', ''),
        ('\t a\u00a0b \n', 'a b'),
    ],
)
def test_basic_knows_scripts(text, expected):
    assert normalise_text(text, 'basic') == expected


@pytest.mark.parametrize(
    'text, expected',
    [
        ("'tis the dogs' \u2018quoted\u2019 word", 'tis the dogs quoted word'),
        ("rock 'n' roll", 'rock n roll'),
        ("don''t", 'don t'),
        ("'", ''),
    ],
)
def test_english_keeps_apostrophes_only_within_words(text, expected):
    assert normalise_text(text, 'english') == expected


@pytest.mark.parametrize('name', NORMALISERS)
def test_normalising_twice_changes_nothing(name):
    source = random.Random(0)
    alphabet = [
        chr(c)
        for c in [
            *range(32, 0x250),
            *range(0x370, 0x600),
            *range(0x2000, 0x2070),
            *range(0xFB00, 0xFB07),
            *range(0xFF00, 0xFF60),
        ]
    ]
    for _ in range(500):
        text = ''.join(source.choices(alphabet, k=12))
        once = normalise_text(text, name)
        assert normalise_text(once, name) == once, repr(text)
        if name != 'none':
            kinds = {unicodedata.category(c)[0] for c in once.replace(' ', '').replace("'", '')}
            assert kinds <= set('LMN'), repr(text)


def test_digits_are_not_guessed():
    assert normalise_text('In 1984!', 'english') == 'in 1984'
    assert not is_spoken('in 1984', 'english')
    assert is_spoken('in 1984', 'none')
    assert is_spoken('nineteen', 'english')


def test_an_unknown_normaliser_is_named():
    with pytest.raises(DataError, match="'whisper', must be one of none, basic, english"):
        normalise_text('a', 'whisper')


@pytest.mark.parametrize('name', NORMALISERS)
def test_scoring_knows_the_normalisers_of_training(name):
    assert scoring_normaliser(name)(LINE) == normalise_text(LINE, name)


@pytest.mark.parametrize(
    'a, b',
    [
        ("Mr. O'Neil's twenty-one!", 'mister o neil is 21'),
        ('The colour, um, of [noise] money', 'the color of money'),
        ("we'll pay 5 dollars and 20 cents", 'we will pay $5.20'),
    ],
)
def test_whisper_english_is_the_package(a, b):
    pytest.importorskip('whisper_normalizer')
    normalise = scoring_normaliser('whisper-english')
    assert normalise(a) == normalise(b)
    assert normalise('nineteen eighty four') == '1984'


def test_a_normaliser_that_is_missing_or_unknown_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'whisper_normalizer.english', None)
    with pytest.raises(DataError, match=r"pip install 'bigssl-jax\[whisper\]'"):
        scoring_normaliser('whisper-english')
    with pytest.raises(DataError, match="is 'klingon', must be one of none, .*whisper-english"):
        scoring_normaliser('klingon')
    # Nothing learns from a text that nobody speaks.
    with pytest.raises(DataError, match='must be one of none, basic, english$'):
        normalise_text('x', 'whisper-english')
