"""Sources under registered names: what SeqIO reads and what streams read is the same."""

import numpy as np
import pytest
import seqio

from bigssl_jax import data
from bigssl_jax.config import ConfigError
from bigssl_jax.data import tasks
from bigssl_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope='module')
def tokenizer(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp('tokenizer') / 'char.model'
    train_tokenizer(corpus.column('text').to_pylist(), path)
    return str(path)


@pytest.fixture(scope='module')
def registered(corpus, make_corpus, tokenizer):
    tasks.register_task(
        'tiny_train',
        {'labels': 'text', 'selection': {'corpus': corpus.directory, 'splits': ['train']}},
        tokenizer=tokenizer,
    )
    tasks.register_task(
        'more',
        {'labels': 'text', 'selection': {'corpus': make_corpus(30, 'more', 2.0)}},
        tokenizer=tokenizer,
    )
    tasks.register_task('audio_only', {'selection': {'corpus': corpus.directory}})
    tasks.register_mixture('tiny_mix', {'tiny_train': 3, 'more': 1})


def read(task, **arguments):
    dataset = seqio.get_mixture_or_task(task).get_dataset(**arguments)
    return list(dataset.as_numpy_iterator())


def test_a_task_gives_an_epoch_of_the_selection(registered, corpus, tokenizer):
    elements = read('tiny_train', shuffle=False)
    ids = [e['id'].decode() for e in elements]
    assert ids == [
        i
        for i, s in zip(
            corpus.column('id').to_pylist(), corpus.column('split').to_pylist(), strict=True
        )
        if s == 'train'
    ]
    rows = {i: r for r, i in enumerate(corpus.column('id').to_pylist())}
    vocabulary = seqio.TaskRegistry.get('tiny_train').output_features['labels'].vocabulary
    for element in elements[::7]:
        row = rows[element['id'].decode()]
        assert element['audio'].dtype == np.int16
        np.testing.assert_array_equal(element['audio'], corpus.read(row))
        assert vocabulary.decode(element['labels'].tolist()) == corpus.column('text')[row].as_py()


def test_shuffling_is_a_function_of_the_seed(registered):
    orders = [[e['id'] for e in read('audio_only', shuffle=True, seed=s)] for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 100
    assert set(orders[0]) == set(orders[2])


def test_shards_together_are_the_whole(registered):
    whole = [e['id'] for e in read('audio_only', shuffle=True, seed=1)]
    shards = [
        [
            e['id']
            for e in read('audio_only', shuffle=True, seed=1, shard_info=seqio.ShardInfo(i, 3))
        ]
        for i in range(3)
    ]
    assert [whole[i::3] for i in range(3)] == shards


def test_a_stream_takes_a_task_by_its_name(registered, corpus, tokenizer):
    common = {'tokenizer': tokenizer, 'batch_seconds': 12.0}
    named = data.stream({'sources': {'s': 'tiny_train'}, **common}, 0)
    spelled = data.stream(
        {
            'sources': {
                's': {
                    'labels': 'text',
                    'selection': {'corpus': corpus.directory, 'splits': ['train']},
                }
            },
            **common,
        },
        0,
    )
    assert named.fingerprint == spelled.fingerprint
    assert named.ids(5) == spelled.ids(5)


def test_a_mixture_brings_its_rates(registered, tokenizer):
    config = {'sources': {'m': 'tiny_mix'}, 'tokenizer': tokenizer, 'batch_seconds': 12.0}
    stream = data.stream({**config, 'rates': 'weights'}, 0)
    assert [s.name for s in stream.sources] == ['m/more', 'm/tiny_train']
    assert np.array(stream.plan.order.quotas) / 65536 == pytest.approx([0.25, 0.75])
    with pytest.raises(ConfigError, match="needs rates='weights'"):
        data.stream(config, 0)


def test_mistakes_are_named(registered, corpus):
    with pytest.raises(ConfigError, match="did you mean 'tiny_train'"):
        data.stream({'sources': {'s': 'tiny_trian'}}, 0)
    with pytest.raises(ConfigError, match='both a task and a selection'):
        data.stream({'sources': {'s': {'task': 'more', 'selection': {'corpus': 'x'}}}}, 0)
    with pytest.raises(ConfigError, match='needs a tokenizer'):
        tasks.register_task(
            'untokenised', {'labels': 'text', 'selection': {'corpus': corpus.directory}}
        )


def test_registering_reads_nothing(tmp_path):
    task = tasks.register_task('later', {'selection': {'corpus': str(tmp_path / 'not_there_yet')}})
    assert task.source.num_input_examples('train') is None
