"""Text becomes token ids once, with every loss counted; its batches follow from the seed and k."""

import collections
import gzip

import numpy as np
import pytest

from bigssl_jax.config import ConfigError
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.text_corpus import TextCorpus, text_lines, write_text_corpus
from bigssl_jax.data.text_stream import TextStream
from bigssl_jax.data.tokenizer import Tokenizer, train_tokenizer

FIELDS = {'batch_tokens': 64, 'num_buckets': 2, 'rates': 'weights'}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp('t') / 't.model'
    train_tokenizer(['abc def ghi', 'fed cab'], path)
    return Tokenizer(path)


def corpus(folder, lines, tokenizer, max_tokens=40):
    return write_text_corpus(folder, lines, tokenizer, 'english', max_tokens, 'the text')


def sentences(count, seed):
    rng = np.random.default_rng(seed)
    return [
        ' '.join(rng.choice(['abc', 'de', 'f', 'gab'], rng.integers(1, 8))) for _ in range(count)
    ]


@pytest.fixture(scope='module')
def sources(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp('texts')
    return {
        'big': (corpus(path / 'big', sentences(50, 0), tokenizer), 3.0),
        'small': (corpus(path / 'small', sentences(20, 1), tokenizer), 1.0),
    }


def test_lines_become_ids_and_what_is_left_out_is_counted(tmp_path, tokenizer):
    lines = ['Abc, DEF!', '', 'born 1984', 'xyz abc', 'abc ' * 30, 'cab']
    made = corpus(tmp_path / 'c', lines, tokenizer)
    assert made.info['excluded'] == {
        'empty_text': 1, 'digits': 1, 'unknown_characters': 1, 'too_many_tokens': 1,
    }  # fmt: skip
    assert [tokenizer.decode(made.tokens(row)) for row in range(len(made))] == ['abc def', 'cab']
    assert made.words.tolist() == [2, 1] and made.info['words'] == 3
    assert made.lengths(np.array([0, 1])).tolist() == [7, 3]
    # Made once: what the lines have become later does not matter.
    again = corpus(tmp_path / 'c', ['fed'], tokenizer)
    assert again.info == made.info
    with pytest.raises(DataError, match=r'the text holds no sentence .*1 digits'):
        corpus(tmp_path / 'd', ['7'], tokenizer)
    (tmp_path / 'c' / 'tokens.bin').write_bytes(b'\0\0')
    with pytest.raises(DataError, match='damaged'):
        TextCorpus(tmp_path / 'c')
    with pytest.raises(DataError, match='no text corpus'):
        TextCorpus(tmp_path / 'nowhere')


def test_text_files_are_read_in_order_and_damage_is_named(tmp_path):
    (tmp_path / 'a.txt').write_text('één\ntwo\n')
    with gzip.open(tmp_path / 'b.txt.gz', 'wt') as file:
        file.write('three\n')
    paths = [tmp_path / 'a.txt', tmp_path / 'b.txt.gz']
    assert [line.strip() for line in text_lines(paths)] == ['één', 'two', 'three']
    (tmp_path / 'bad.txt').write_bytes(b'good\nb\xffd\n')
    with pytest.raises(DataError, match=r'bad\.txt:2 is not UTF-8'):
        list(text_lines([tmp_path / 'bad.txt']))
    (tmp_path / 'cut.gz').write_bytes((tmp_path / 'b.txt.gz').read_bytes()[:-9])
    for name in ('cut.gz', 'none.txt'):
        with pytest.raises(DataError, match=name):
            list(text_lines([tmp_path / name]))


def test_batches_follow_from_the_seed_and_k_for_any_number_of_hosts(sources):
    whole = TextStream(sources, FIELDS, 7, 4)
    halves = [TextStream(sources, FIELDS, 7, 4, host, 2) for host in range(2)]
    assert {whole.fingerprint} == {half.fingerprint for half in halves}
    assert TextStream(sources, FIELDS, 8, 4).fingerprint != whole.fingerprint
    for k in (5, 0, 31):
        batch = whole.batch(k)
        for name, value in batch.items():
            joined = np.concatenate([half.batch(k)[name] for half in halves])
            np.testing.assert_array_equal(joined, value)
            np.testing.assert_array_equal(whole.batch(k)[name], value)
        assert batch['labels'].shape[0] % 4 == 0
        assert (batch['labels'].shape[1] + 1) * batch['labels'].shape[0] <= 64 or batch[
            'labels'
        ].shape[0] == 4
    with whole.batches(5) as batches:
        np.testing.assert_array_equal(next(batches)['labels'], whole.batch(5)['labels'])
        np.testing.assert_array_equal(next(batches)['labels'], whole.batch(6)['labels'])
    with pytest.raises(ConfigError, match='must divide by the hosts'):
        TextStream(sources, FIELDS, 7, 3, 0, 2)


def test_rows_hold_their_sentences_and_sources_their_shares(sources):
    stream = TextStream(sources, FIELDS, 0)
    corpora = [sources[name][0] for name in sorted(sources)]
    drawn = collections.Counter()
    for k in range(60):
        batch = stream.batch(k)
        for row, (source, sentence) in enumerate(
            zip(batch['sources'], batch['utterances'], strict=True)
        ):
            tokens = corpora[source].tokens(sentence)
            count = batch['label_counts'][row]
            np.testing.assert_array_equal(batch['labels'][row, :count], tokens)
            assert count == len(tokens) and not batch['labels'][row, count:].any()
            assert batch['word_counts'][row] == corpora[source].words[sentence]
            drawn[int(source), int(sentence)] += 1
    assert sum(n for (s, _), n in drawn.items() if s == 0) / sum(drawn.values()) == pytest.approx(
        0.75, abs=0.05
    )
    small = [drawn[1, row] for row in range(20)]
    assert max(small) - min(small) <= 2  # whole epochs, but for what buckets hold back


def test_a_pass_has_every_sentence_once(sources):
    stream = TextStream({'big': sources['big']}, FIELDS, None, 4)
    with stream.batches() as batches:
        seen = np.concatenate([batch['utterances'] for batch in batches])
    assert sorted(seen[seen >= 0]) == list(range(50))
    last = stream.batch(stream.num_batches - 1)
    assert (last['label_counts'][last['utterances'] < 0] == 0).all()
