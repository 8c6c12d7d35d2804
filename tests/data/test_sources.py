"""Sources of a stream hold no more than they must: rows by what is missing, nothing for a whole."""

import numpy as np

from bigssl_jax import data
from bigssl_jax.data.sources import AllBut


def test_rows_without_a_few_are_those_that_remain():
    random = np.random.default_rng(0)
    for total in (1, 2, 7, 100):
        for share in (0.0, 0.1, 0.5, 1.0):
            gone = np.flatnonzero(random.uniform(size=total) < share)
            kept = np.setdiff1d(np.arange(total), gone)
            rows = AllBut(total, gone)
            assert len(rows) == kept.size
            assert rows[np.arange(kept.size)].tolist() == kept.tolist()
            assert all(rows[i] == kept[i] for i in range(kept.size))


def test_a_stream_of_all_but_a_few_rows_is_the_stream_of_the_others(corpus):
    few = {'min_seconds': 0.6, 'max_seconds': 2.9}
    config = {'sources': {'a': {'selection': {'corpus': corpus.directory}}}, **few}
    stream = data.stream(config, seed=0)
    # The same rows by a selection, which spells them out.
    config['sources']['a']['selection'] = {'corpus': corpus.directory, 'languages': ['en', 'nl']}
    other = data.stream(config, seed=0)
    assert isinstance(stream.sources[0].rows, AllBut)
    assert isinstance(other.sources[0].rows, np.ndarray)
    assert 50 < stream.num_utterances < 100 and stream.excluded == other.excluded
    assert stream.fingerprint == other.fingerprint
    assert stream.sources[0].column('id') == other.sources[0].column('id')
    for k in (0, 7, 40):
        mine, its = stream.batch(k), other.batch(k)
        assert mine.keys() == its.keys()
        assert all(np.array_equal(mine[key], its[key]) for key in mine)
        assert stream.ids(k) == other.ids(k)
