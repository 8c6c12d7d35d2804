"""Utterances that cannot be read or decoded go without a label: counted, named, limited."""

import json
import pathlib
import types

import numpy as np
import pytest

from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.label_ledger import Ledger
from bigssl_jax.data.label_sets import LabelSet, LabelWriter
from bigssl_jax.data.label_work import complete
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.prepare import Options, prepare
from bigssl_jax.data.stream import one_pass
from bigssl_jax.stages.pseudo_label import _Worker
from bigssl_jax.stages.recognition import Hypothesis
from bigssl_jax.training.signals import Stopped, StopRequest

ROWS, PARTS = 60, 4
KEY = {'teacher': 'a'}


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Sixty utterances of noise in shards of ten."""
    random = np.random.default_rng(0)
    entries = [
        Entry(
            id=f'u{i:02d}',
            sample_rate=16000,
            audio=random.integers(-9000, 9000, int(random.uniform(8000, 16000))).astype(np.int16),
        )
        for i in range(ROWS)
    ]
    out = tmp_path / 'corpus'
    prepare(entries, out, jobs=1, options=Options(shard_size=10), progress=False)
    return Corpus.open(out)


class Heard:
    """Stands for a model: what it writes is the sum of the samples, so it must have heard them."""

    def __init__(self, undecodable: tuple[int, ...] = ()):
        self.undecodable = undecodable

    def recognise(self, batches):
        for batch in batches:
            for row in np.flatnonzero(batch['utterances'] >= 0):
                number = int(batch['utterances'][row])
                total = int(batch['audio'][row].astype(np.int64).sum())
                score = float('nan') if number in self.undecodable else -1.0
                yield Hypothesis(
                    0, number, str(total), np.array([3]), np.array([0.5]), np.array([0]),
                    np.array([1]), 0.5, score, score, 9, batch['sample_counts'][row] / 16000,
                )  # fmt: skip


def label(
    corpus: Corpus,
    directory: pathlib.Path,
    model: Heard,
    allowed: float = 0.2,
    stop: StopRequest | None = None,
) -> LabelSet:
    config = {
        'sources': {'all': {'selection': {'corpus': corpus.directory}}},
        'batch_seconds': 8.0,
        'num_buckets': 2,
    }
    fields = {'max_quarantine': allowed, 'top_k': 0}
    context = types.SimpleNamespace(name='labels', fields=fields, stop=stop or StopRequest())
    writer = LabelWriter(directory, KEY, PARTS)
    watchdog = types.SimpleNamespace(feed=lambda: None)
    worker = _Worker(context, model, one_pass(config), writer, watchdog)
    return complete(writer, Ledger(directory), worker.make, worker.look, num_rows=ROWS)


def cut(corpus: Corpus, shard: int, rows: int) -> list[str]:
    """Truncates a shard after some of its rows; returns the ids of the others."""
    lost = np.flatnonzero(corpus.shard_of == shard)[rows:]
    path = pathlib.Path(corpus.shard_paths[shard])
    path.write_bytes(path.read_bytes()[: corpus.offset_of[lost[0]]])
    return [corpus.column('id')[int(row)].as_py() for row in lost]


def quarantine(directory: pathlib.Path) -> dict[str, dict]:
    lines = (directory / 'quarantine.jsonl').read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert len({entry['id'] for entry in entries}) == len(entries)
    return {entry['id']: entry for entry in entries}


def test_every_utterance_has_a_label_in_the_order_of_the_selection(corpus, tmp_path):
    labels = label(corpus, tmp_path / 'labels', Heard(), allowed=0.0)
    table = labels.table(['id', 'text']).to_pydict()
    assert table['id'] == corpus.column('id').to_pylist()
    totals = [str(int(corpus.read(row).astype(np.int64).sum())) for row in range(ROWS)]
    assert table['text'] == totals
    assert labels.record['quarantined'] == {}
    assert not (tmp_path / 'labels' / 'quarantine.jsonl').exists()


def test_what_cannot_be_read_or_decoded_is_counted_and_named(corpus, tmp_path):
    before = label(corpus, tmp_path / 'before', Heard()).table().to_pydict()
    lost = cut(corpus, 2, rows=7)
    pathlib.Path(corpus.shard_paths[4]).write_bytes(b'\xff' * 40)
    spoilt = [corpus.column('id')[int(r)].as_py() for r in np.flatnonzero(corpus.shard_of == 4)]
    silent = corpus.column('id')[3].as_py()
    labels = label(corpus, tmp_path / 'labels', Heard(undecodable=(3,)), allowed=0.5)

    found = quarantine(tmp_path / 'labels')
    assert set(found) == {*lost, *spoilt, silent}
    assert labels.record['quarantined'] == {
        'truncated': 3 + 10, 'undecodable': 1,
    }  # fmt: skip
    assert found[lost[0]]['reason'] == 'truncated'
    assert 'audio-00002' in found[lost[0]]['detail'] and '/' not in found[lost[0]]['detail']
    assert labels.num_rows + len(found) == ROWS
    # The others have the labels that they have in a sound corpus.
    texts = dict(zip(before['id'], before['text'], strict=True))
    after = labels.table(['id', 'text']).to_pydict()
    assert after['text'] == [texts[name] for name in after['id']]


def test_a_shard_that_is_gone_stops_the_stage_with_one_line(corpus, tmp_path):
    pathlib.Path(corpus.shard_paths[1]).unlink()
    with pytest.raises(DataError) as stopped:
        label(corpus, tmp_path / 'labels', Heard(), allowed=0.1)
    said = str(stopped.value)
    assert '10 of 60 utterances have no label, more than max_quarantine allows (10.0%)' in said
    assert '(10.0%): 10 missing, such as u' in said and 'raise stages.labels.max_quarantine' in said
    assert len(quarantine(tmp_path / 'labels')) == 10
    assert not (tmp_path / 'labels' / 'labels.json').exists()
    labels = label(corpus, tmp_path / 'labels', Heard(), allowed=0.2)
    assert labels.record['quarantined'] == {'missing': 10}


def test_the_budget_counts_all_parts(corpus, tmp_path):
    model = Heard(undecodable=(0, 20, 40, 59))
    assert label(corpus, tmp_path / 'labels', model, allowed=4 / 60).num_rows == 56
    with pytest.raises(DataError, match='4 of 60 utterances have no label'):
        label(corpus, tmp_path / 'again', model, allowed=3.9 / 60)


def test_labels_that_are_too_few_are_no_set(tmp_path):
    writer = LabelWriter(tmp_path, KEY, 1)
    columns = {'id': ['a'], 'text': [''], 'tokens': [[]], 'score': [0.0]}
    columns |= {'confidence': [0.9], 'seconds': [1.0]}
    writer.write(0, columns, [{'id': 'b', 'reason': 'missing', 'detail': ''}])
    with pytest.raises(DataError, match='1 labels and 1 .* quarantine, but the selection has 3'):
        writer.finish(num_rows=3)
    assert writer.finish(num_rows=2).record['quarantined'] == {'missing': 1}


def test_a_stop_gives_the_part_back(corpus, tmp_path):
    stop = StopRequest()

    class Interrupted(Heard):
        def recognise(self, batches):
            for batch in batches:
                yield from super().recognise([batch])
                stop.requested = True

    with pytest.raises(Stopped, match='the same command continues'):
        label(corpus, tmp_path / 'labels', Interrupted(), stop=stop)
    assert not list((tmp_path / 'labels').glob('part-*'))
    assert label(corpus, tmp_path / 'labels', Heard()).num_rows == ROWS
