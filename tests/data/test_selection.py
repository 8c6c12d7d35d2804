"""Selections name rows; smaller ones lie within larger ones; mistakes are named."""

import numpy as np
import pytest

from bigssl_jax.config import ConfigError
from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.selection import select


def hours(corpus, rows):
    return corpus.sample_counts[rows].sum() / 16000 / 3600


def test_fields_select_what_the_metadata_say(corpus):
    rows = select(
        corpus,
        {
            'corpus': corpus.directory,
            'splits': 'train',
            'languages': ['en'],
            'speakers': ['s1', 's3'],
            'min_seconds': 1.0,
            'max_seconds': 2.0,
        },
    )
    columns = {n: corpus.column(n).to_pylist() for n in ('split', 'language', 'speaker')}
    expected = [
        i
        for i in range(corpus.num_rows)
        if columns['split'][i] == 'train'
        and columns['language'][i] == 'en'
        and columns['speaker'][i] in ('s1', 's3')
        and 16000 <= corpus.sample_counts[i] <= 32000
    ]
    assert rows.tolist() == expected
    assert 0 < len(expected) < corpus.num_rows


def test_without_fields_everything_is_selected_in_order(corpus):
    assert np.array_equal(select(None, {'corpus': corpus.directory}), np.arange(100))


def test_hours_are_reached_nested_and_independent_of_other_rows(corpus):
    base = {'corpus': corpus.directory}
    small, large = (select(corpus, {**base, 'hours': h}) for h in (0.005, 0.02))
    assert 0.005 <= hours(corpus, small) < 0.005 + 3 / 3600
    assert set(small) < set(large)
    assert np.all(np.diff(small) > 0)
    # Of the same utterances without the 'test' rows, those kept are the ones kept before.
    train = select(corpus, {**base, 'splits': ['train'], 'hours': 0.005})
    split = np.array(corpus.column('split').to_pylist())
    assert set(small[split[small] == 'train']) <= set(train)


def test_exclude_gives_the_complement(corpus):
    labelled = {'corpus': corpus.directory, 'splits': ['train'], 'hours': 0.01}
    rest = {'corpus': corpus.directory, 'splits': ['train'], 'exclude': ['labelled']}
    a = select(corpus, 'labelled', {'labelled': labelled})
    b = select(corpus, rest, {'labelled': labelled})
    inline = select(corpus, {**rest, 'exclude': [labelled]})
    assert np.array_equal(b, inline)
    assert not set(a) & set(b)
    both = np.sort(np.concatenate([a, b]))
    assert np.array_equal(both, select(corpus, {'corpus': corpus.directory, 'splits': ['train']}))


def test_seen_lines_and_lines_without_text_can_be_left_out(make_corpus):
    texts = ('', '  ', 'hello')
    directory = make_corpus(40, 'gaps', 1.0, texts)
    corpus = Corpus.open(directory)
    assert select(corpus, {'corpus': directory, 'with_text': True}).tolist() == list(range(2, 40))
    unseen = select(corpus, {'corpus': directory, 'splits': 'test', 'unseen': True})
    assert unseen.tolist() == [9, 29]


@pytest.mark.parametrize(
    'fields, error, message',
    [
        ({'speeker': ['s1']}, ConfigError, 'unknown config field selection.speeker: did you mean'),
        ({'speakers': ['s9']}, DataError, "no utterance has speaker 's9'; there are 's0', 's1'"),
        ({'hours': 5}, DataError, r'hours is 5, the other fields leave 0.0\d+ h'),
        ({'hours': -1.0}, ConfigError, 'hours is -1.0; it must be a number >= 0'),
        ({'min_seconds': 50.0}, DataError, 'selection: 100 in all, 0 with min_seconds=50.0$'),
        (
            {'splits': ['dev']},
            DataError,
            "has split 'dev'; there are 'test', 'train'; name `split`",
        ),
        (
            {'splits': ['test'], 'unseen': True, 'max_seconds': 0.1, 'hours': 1.0},
            DataError,
            r"100 in all, 0 with max_seconds=0.1, 0 with splits=\['test'\], 0 with unseen=True$",
        ),
        ({'exclude': ['other']}, ConfigError, 'other'),
        ({'splits': []}, ConfigError, 'must be a list of strings'),
    ],
)
def test_mistakes_are_named(corpus, fields, error, message):
    with pytest.raises(error, match=message):
        select(corpus, {'corpus': corpus.directory, **fields})


def test_a_selection_needs_a_corpus(tmp_path):
    with pytest.raises(ConfigError, match='selection.corpus is not set'):
        select(None, {})
    with pytest.raises(DataError, match='no prepared corpus'):
        select(None, {'corpus': str(tmp_path / 'none')})
