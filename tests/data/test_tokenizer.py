"""Tokenizers come out the same every time, say what they came from, and agree with SeqIO."""

import json
import pickle

import pytest

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.tokenizer import Tokenizer, encode_ragged, load_tokenizer, train_tokenizer

TEXTS = [
    "Don't panic, Mr. O'Neil!",
    'The quick brown fox',
    'jumps over a lazy dog',
    'Hello world',
    'In 1984',
    '...',
] * 20


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp('tokenizer') / 'char.model'
    train_tokenizer(TEXTS, path, source='tests')
    return Tokenizer(path)


@pytest.mark.parametrize('model_type, size', [('char', None), ('unigram', 34), ('bpe', 60)])
def test_training_is_reproducible_wherever_it_is_written(tmp_path, model_type, size):
    records = [
        train_tokenizer(TEXTS, tmp_path / name, model_type=model_type, vocabulary_size=size)
        for name in ('a.model', 'elsewhere.model')
    ]
    assert (tmp_path / 'a.model').read_bytes() == (tmp_path / 'elsewhere.model').read_bytes()
    assert records[0] == records[1]
    other = train_tokenizer(
        [*TEXTS, 'one line more'], tmp_path / 'b.model', model_type=model_type, vocabulary_size=size
    )
    assert other['text_sha256'] != records[0]['text_sha256']


@pytest.mark.parametrize('model_type, size', [('char', None), ('unigram', 34), ('bpe', 60)])
def test_text_survives_encoding(tmp_path, model_type, size):
    train_tokenizer(TEXTS, tmp_path / 'x.model', model_type=model_type, vocabulary_size=size)
    tokenizer = Tokenizer(tmp_path / 'x.model')
    for text in ("don't panic mr o'neil", 'a lazy fox', 'world'):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([0, *ids, 1, 0]) == text
        assert not {0, 1, 2} & set(ids)
        if model_type == 'char':
            assert len(ids) == len(text)


def test_the_record_says_what_the_model_came_from(tokenizer):
    record = tokenizer.provenance()
    assert record['sha256'] == tokenizer.hash
    assert record['vocabulary_size'] == tokenizer.vocabulary_size
    # pad, eos, unknown, and the characters of the normalised text, space among them
    characters = set("don't panic mr o'neil the quick brown fox jumps over a lazy dog hello world")
    assert tokenizer.vocabulary_size == 3 + len(characters)
    assert record['left_out'] == {'empty': 20, 'digits': 20}
    assert record['lines'] == 80
    assert record['normaliser'] == 'english'
    with open(tokenizer.path + '.json', encoding='utf-8') as file:
        assert json.load(file)['source'] == 'tests'


def test_unknown_characters_are_counted_and_named(tokenizer):
    assert tokenizer.unknown_count('dog') == 0
    assert tokenizer.unknown_count('d\u00f6g \u044f') == 2
    assert tokenizer.unknown_characters('d\u00f6g \u044f') == {'\u00f6', '\u044f'}


def test_ragged_encoding_equals_line_by_line(tokenizer):
    texts = ['dog', '', 'lazy world', 'd\u00f6g'] * 5
    values, offsets = encode_ragged(tokenizer, texts, block=3)
    for index, text in enumerate(texts):
        assert values[offsets[index] : offsets[index + 1]].tolist() == tokenizer.encode(text)
    assert encode_ragged(tokenizer, [])[1].tolist() == [0]


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).hash == tokenizer.hash


def test_seqio_reads_the_same_model(tokenizer):
    vocabulary = load_tokenizer(tokenizer.path)
    assert vocabulary.encode('lazy dog') == tokenizer.encode('lazy dog')
    assert vocabulary.vocab_size == tokenizer.vocabulary_size
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)


def test_bad_input_gets_one_clear_line(tmp_path, tokenizer):
    with pytest.raises(DataError, match='no text to train'):
        train_tokenizer(['12', ' ', ''], tmp_path / 'x.model')
    with pytest.raises(DataError, match='unigram model of 5000 ids from 80 lines: Vocabulary size'):
        train_tokenizer(TEXTS, tmp_path / 'x.model', model_type='unigram', vocabulary_size=5000)
    with pytest.raises(DataError, match="'words', must be one of char"):
        train_tokenizer(TEXTS, tmp_path / 'x.model', model_type='words')
    with pytest.raises(DataError, match='needs a vocabulary_size'):
        train_tokenizer(TEXTS, tmp_path / 'x.model', model_type='bpe')
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match='No such file'):
        Tokenizer(tmp_path / 'none.model')
    (tmp_path / 'broken.model').write_bytes(b'not a model')
    with pytest.raises(DataError, match='not a sentencepiece model'):
        Tokenizer(tmp_path / 'broken.model')
