"""Batch k is a function of k alone: whoever reads it, from wherever, on however many hosts."""

import collections
import itertools
import pathlib
import shutil

import ml_collections
import numpy as np
import pytest

from bigssl_jax import data
from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.data.buckets import bucket_of
from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.label_sets import LabelWriter
from bigssl_jax.data.order import Order
from bigssl_jax.data.stream import one_pass
from bigssl_jax.data.text import normalise_text
from bigssl_jax.data.tokenizer import Tokenizer, train_tokenizer


def config_of(*directories, **fields):
    sources = {f's{i}': {'selection': {'corpus': d}} for i, d in enumerate(directories)}
    return {
        'sources': sources,
        'batch_seconds': 12.0,
        'num_buckets': 3,
        'segment_size': 256,
        **fields,
    }


@pytest.fixture(scope='module')
def config(make_corpus):
    """Two unlabelled sources of unequal size; the segments are short, so that many are crossed."""
    return config_of(make_corpus(100, 'tiny'), make_corpus(30, 'more', 2.0), multiple_of=4)


@pytest.fixture(scope='module')
def tokenizer(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp('tokenizer') / 'char.model'
    train_tokenizer(corpus.column('text').to_pylist(), path)
    return str(path)


def labelled(directory, tokenizer, labels='text', **fields):
    config = config_of(directory, tokenizer=tokenizer, **fields)
    config['sources']['s0']['labels'] = labels
    return config


def assert_equal_batches(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def walk(stream, seed, count):
    """The first batches found the slow way: position by position, a list for each bucket."""
    sizes = [len(s) for s in stream.sources]
    order = Order.create(sizes, sizes, seed, 256)
    bounds = np.array([s for _, s, _ in stream.shapes])
    waiting = collections.defaultdict(list)
    found = []
    for number in itertools.count():
        for source, row, epoch in zip(*order.segment(number), strict=True):
            length = stream.sources[source].corpus.sample_counts[row]
            bucket = int(bucket_of(length, bounds))
            waiting[bucket].append((int(source), int(row), int(epoch)))
            if len(waiting[bucket]) == stream.shapes[bucket][0]:
                found.append((bucket, waiting.pop(bucket)))
                if len(found) == count:
                    return found


def test_batches_equal_a_walk_through_the_stream(config):
    stream = data.stream(config, seed=3)
    expected = walk(stream, 3, 300)
    # Backwards and forwards: no batch may depend on what was asked before.
    for k in [299, 0, 150, *range(299, -1, -1)]:
        members = stream.plan.members(k)
        rows = zip(members.source, members.row, members.epoch, strict=True)
        assert (members.bucket, [tuple(map(int, r)) for r in rows]) == expected[k]


def test_far_batches_are_found_without_a_walk(config):
    # Cold, warm, and by neighbours: three ways to the same far batch.
    cold = data.stream(config, seed=3)
    far = cold.plan.members(200_000)
    warm = data.stream(config, seed=3)
    for k in (0, 199_000, 200_001, 199_999):
        warm.plan.members(k)
    assert np.array_equal(warm.plan.members(200_000).row, far.row)
    draws = cold.plan.draws(far.end)
    assert draws.sum() == far.end
    # Of everything drawn by then, only what waits in a bucket has not been emitted.
    emitted = sum(
        b * c for (b, _, _), c in zip(cold.shapes, bucket_counts(cold, 200_000), strict=True)
    )
    assert 0 <= far.end - emitted < sum(b for b, _, _ in cold.shapes)


def bucket_counts(stream, k):
    """Batches of each bucket up to and including k, from the counts before k's segment."""
    cursor = stream.cursor(k)
    counts = [c // b for c, (b, _, _) in zip(cursor['counts'], stream.shapes, strict=True)]
    for i in range(sum(counts), k + 1):
        counts[stream.plan.bucket(i)] += 1
    return counts


def test_nothing_is_lost_and_nothing_comes_twice_in_an_epoch(config):
    stream = data.stream(config, seed=1)
    seen = collections.defaultdict(list)
    for k in range(250):
        members = stream.plan.members(k)
        for source, row, epoch in zip(members.source, members.row, members.epoch, strict=True):
            seen[int(source), int(epoch)].append(int(row))
    last = max(e for _, e in seen) - 4  # later epochs may still wait in a bucket
    assert last >= 3
    for (source, epoch), rows in seen.items():
        assert len(rows) == len(set(rows))
        if epoch < last:
            assert len(rows) == len(stream.sources[source])


def test_hosts_together_read_the_global_batch(config):
    whole = data.stream(config, seed=5)
    for hosts in (2, 4):
        parts = [data.stream(config, 5, host=h, num_hosts=hosts) for h in range(hosts)]
        assert {p.fingerprint for p in parts} == {whole.fingerprint}
        for k in (0, 7, 60):
            expected = whole.batch(k)
            slices = [p.batch(k) for p in parts]
            joined = {key: np.concatenate([s[key] for s in slices]) for key in expected}
            assert_equal_batches(joined, expected)
            assert sum((p.ids(k) for p in parts), []) == whole.ids(k)


def test_hosts_that_do_not_divide_the_batches_are_refused(config):
    with pytest.raises(ConfigError, match='multiple of the 3 hosts'):
        data.stream(config, 0, host=0, num_hosts=3)
    with pytest.raises(ConfigError, match='host 2 of 2'):
        data.stream(config, 0, host=2, num_hosts=2)


def test_tf_data_reads_the_same_bytes_as_numpy(config):
    stream = data.stream(config, seed=2)
    with stream.batches() as batches:
        for k, batch in zip(range(40), batches, strict=False):
            assert_equal_batches(batch, stream.batch(k))


def test_audio_is_the_corpus_s_own(config, corpus):
    stream = data.stream(config, seed=2)
    batch = stream.batch(11)
    for place, count in enumerate(batch['sample_counts']):
        source = stream.sources[batch['sources'][place]]
        samples = source.corpus.read(int(batch['utterances'][place]))
        assert samples.size == count > 0
        np.testing.assert_array_equal(batch['audio'][place, :count], samples)
        assert not batch['audio'][place, count:].any()
        row = int(batch['utterances'][place])
        assert stream.ids(11)[place] == source.corpus.column('id')[row].as_py()
    assert batch['rows'].tolist() == list(range(len(batch['rows'])))


def test_reading_can_start_anywhere(config):
    with data.stream(config, seed=2).batches() as batches:
        unbroken = list(itertools.islice(batches, 12))
    with data.stream(config, seed=2).batches(start=7, prefetch=1, threads=1) as batches:
        for expected, batch in zip(unbroken[7:], batches, strict=False):
            assert_equal_batches(batch, expected)


def test_a_cursor_finds_its_batch_and_refuses_another_stream(config):
    stream = data.stream(config, seed=2)
    cursor = stream.cursor(5000)
    assert all(type(c) is int for c in cursor['counts'])
    resumed = data.stream(config, seed=2, cursor=cursor)
    assert_equal_batches(resumed.batch(5000), stream.batch(5000))
    assert_equal_batches(resumed.batch(5001), stream.batch(5001))
    heavier = {**config, 'rates': 'weights'}
    for other, seed in ((config, 3), (heavier, 2)):
        with pytest.raises(DataError, match='the stream has changed'):
            data.stream(other, seed, cursor=cursor)


def test_shapes_are_few_and_promised(config):
    stream = data.stream(config, seed=0)
    assert len(stream.shapes) == 3
    for k in range(30):
        batch = stream.batch(k)
        assert (*batch['audio'].shape, 0) == stream.shape_of(k)
        assert stream.shape_of(k) in stream.shapes
        assert batch['audio'].size / 16000 <= 12.0
        assert batch['audio'].shape[0] % 4 == 0


def test_padding_is_what_was_foretold(config):
    stream = data.stream(config, seed=0)
    real = padded = 0
    for k in range(2000):
        members = stream.plan.members(k)
        for source, row in zip(members.source, members.row, strict=True):
            real += stream.sources[source].corpus.sample_counts[row]
        padded += stream.shapes[members.bucket][1] * members.row.size
    assert 1 - real / padded == pytest.approx(stream.padding_fraction, abs=0.005)


def test_weights_and_epochs(config):
    proportional = data.stream(config, seed=0)
    epochs = proportional.epochs(3000)
    assert epochs['s0'] == pytest.approx(epochs['s1'], rel=0.02)
    assert proportional.epochs(0) == {'s0': 0.0, 's1': 0.0}
    sources = {**config['sources'], 's1': {**config['sources']['s1'], 'weight': 3.0}}
    even = data.stream({**config, 'sources': sources, 'rates': 'weights'}, seed=0).epochs(3000)
    assert even['s1'] * 30 / (even['s0'] * 100) == pytest.approx(3.0, rel=0.02)


def test_labels_are_the_normalised_text(corpus, tokenizer):
    stream = data.stream(labelled(corpus.directory, tokenizer), seed=0)
    light, texts = Tokenizer(tokenizer), corpus.column('text').to_pylist()
    with stream.batches() as batches:
        for k, batch in zip(range(12), batches, strict=False):
            assert_equal_batches(batch, stream.batch(k))
            assert batch['labels'].shape == (stream.shape_of(k)[0], stream.shape_of(k)[2])
            for place, row in enumerate(batch['utterances']):
                text = normalise_text(texts[stream.sources[0].corpus_rows(row)], 'english')
                count = batch['label_counts'][place]
                assert batch['labels'][place, :count].tolist() == light.encode(text)
                assert not batch['labels'][place, count:].any()


def test_what_cannot_be_trained_on_is_left_out_and_counted(make_corpus, tokenizer):
    texts = ('', '?!', 'room 7', 'ship ' * 20, 'moon ' * 9, 'rrrrrrrrrrrrrrrrrrrrrrrrr')
    directory = make_corpus(60, 'faulty', 1.0, texts)
    corpus = Corpus.open(directory)
    config = labelled(directory, tokenizer, max_labels=60, max_seconds=0.97)
    stream = data.stream(config, seed=0)
    too_long = int((corpus.sample_counts > 0.97 * 16000).sum())
    assert too_long and (corpus.sample_counts[:6] <= 0.97 * 16000).all()
    # 45 letters in at most 0.97 s (24 frames), and 25 equal letters, which need 49 frames.
    assert stream.excluded == {
        's0': {
            'empty_text': 2,
            'digits': 1,
            'too_many_labels': 1,
            'ctc_impossible': 2,
            'too_long': too_long,
        }
    }
    assert stream.num_utterances == 60 - 6 - too_long
    reasons = ['empty_text', 'empty_text', 'digits', 'too_many_labels', *['ctc_impossible'] * 2]
    listed = sorted(stream.left_out(), key=lambda line: line['id'])
    assert listed == [
        {'source': 's0', 'id': f'faulty-{i:04d}', 'reason': reason}
        for i, reason in enumerate(reasons)
    ]
    usable = 60 - too_long
    told = (
        rf"'s0': 6 of {usable} texts cannot be learned from .*2 empty_text, such as 'faulty-0000'"
    )
    data.stream({**config, 'max_left_out': 6 / usable}, seed=0)
    with pytest.raises(DataError, match=told):
        data.stream({**config, 'max_left_out': 5.5 / usable}, seed=0)
    assert not {f'faulty-{i:04d}' for i in range(6)} & {i for k in range(30) for i in stream.ids(k)}
    # A transducer may write several labels in a frame.
    other = data.stream({**config, 'for_ctc': False}, seed=0)
    assert 'ctc_impossible' not in other.excluded['s0']
    assert other.num_utterances == stream.num_utterances + 2


def test_nothing_usable_says_why(corpus, tokenizer):
    with pytest.raises(DataError, match="'s0' has no usable utterance left: 100 too_many_labels"):
        data.stream(labelled(corpus.directory, tokenizer, max_labels=1), seed=0)


def test_characters_outside_the_tokenizer_are_counted_up_to_a_limit(make_corpus, tokenizer):
    directory = make_corpus(40, 'foreign', 2.0, ('\u0448\u0438\u043f',))
    stream = data.stream(labelled(directory, tokenizer), seed=0)
    assert stream.unknown['s0']['rows'] == 1
    assert set(stream.unknown['s0']['characters']) == set('\u0448\u0438\u043f')
    with pytest.raises(DataError, match='1 of 40 texts hold characters .* does not know'):
        data.stream(labelled(directory, tokenizer, max_unknown=0.01), seed=0)


@pytest.fixture
def pseudo(corpus, tmp_path):
    """A label set for all but the last ten utterances; confidence rises with the row."""
    writer = LabelWriter(tmp_path / 'labels', {'teacher': 'a'}, 2)
    ids = corpus.column('id').to_pylist()[:90]
    for part in range(2):
        mine = ids[part * 45 : part * 45 + 45][::-1]  # not in row order: joined by id
        rows = [ids.index(i) for i in mine]
        writer.write(
            part,
            {
                'id': mine,
                'text': ['rain' if r % 2 else 'Moon!' for r in rows],
                'tokens': [[3]] * 45,
                'score': [0.0] * 45,
                'confidence': [r / 90 for r in rows],
                'seconds': (corpus.sample_counts[rows] / 16000).tolist(),
            },
        )
    return writer.finish().directory


def test_pseudo_labels_join_by_id_and_filter(corpus, tokenizer, pseudo):
    config = labelled(corpus.directory, tokenizer, pseudo)
    everything = data.stream(config, seed=0)
    assert everything.excluded == {'s0': {'unlabelled': 10}}
    config['sources']['s0']['filter'] = {'kind': 'confidence', 'percentile': 50}
    stream = data.stream(config, seed=0)
    assert stream.excluded == {'s0': {'unlabelled': 10, 'filtered': 45}}
    assert stream.fingerprint != everything.fingerprint
    batch, light = stream.batch(0), Tokenizer(tokenizer)
    for place, name in enumerate(stream.ids(0)):
        row = int(name.split('-')[1])
        assert 45 <= row < 90
        count = batch['label_counts'][place]
        text = light.decode(batch['labels'][place, :count])
        assert text == ('rain' if row % 2 else 'moon')


def test_transcripts_and_pseudo_labels_mix(corpus, tokenizer, pseudo, make_corpus):
    config = labelled(corpus.directory, tokenizer, pseudo, rates='weights')
    more = make_corpus(30, 'more', 2.0)
    config['sources']['own'] = {'selection': {'corpus': more}, 'labels': 'text', 'weight': 2.0}
    stream = data.stream(config, seed=0)
    assert [s.name for s in stream.sources] == ['own', 's0']
    sources = np.concatenate([stream.plan.members(k).source for k in range(200)])
    assert (sources == 0).mean() == pytest.approx(2 / 3, abs=0.02)


def test_a_pass_gives_every_utterance_once_longest_first(config):
    whole = one_pass(config)
    seen, lengths = [], []
    with whole.batches() as batches:
        for k, batch in enumerate(batches):
            assert_equal_batches(batch, whole.batch(k))
            real = batch['sources'] >= 0
            assert np.array_equal(real, batch['sample_counts'] > 0)
            assert np.array_equal(real, batch['utterances'] >= 0)
            assert not batch['audio'][~real].any()
            assert [bool(i) for i in whole.ids(k)] == real.tolist()
            seen += zip(
                batch['sources'][real].tolist(), batch['utterances'][real].tolist(), strict=True
            )
            lengths += batch['sample_counts'][real].tolist()
    assert k + 1 == len(whole) == whole.num_batches
    assert sorted(seen) == [(s, r) for s, n in ((0, 100), (1, 30)) for r in range(n)]
    assert lengths == sorted(lengths, reverse=True)
    with pytest.raises(IndexError):
        whole.batch(len(whole))


def test_a_pass_can_be_cut_into_parts_and_hosts(config):
    whole = one_pass(config)
    seen = []
    for index in range(3):
        part = one_pass(config, part=(index, 3))
        assert part.shapes == whole.shapes
        hosts = [one_pass(config, host=h, num_hosts=2, part=(index, 3)) for h in range(2)]
        for k in range(len(part)):
            batch = part.batch(k)
            joined = [h.batch(k) for h in hosts]
            assert_equal_batches(
                {key: np.concatenate([j[key] for j in joined]) for key in batch}, batch
            )
            real = batch['sources'] >= 0
            seen.append((index, batch['sources'][real], batch['utterances'][real]))
    pairs = sorted(
        (int(s), int(u), part)
        for part, source, rows in seen
        for s, u in zip(source, rows, strict=True)
    )
    assert [(s, u) for s, u, _ in pairs] == [
        (s, r) for s, n in ((0, 100), (1, 30)) for r in range(n)
    ]
    assert [p for s, u, p in pairs if s == 0] == sorted(p for s, u, p in pairs if s == 0)
    with pytest.raises(ConfigError, match='part is'):
        one_pass(config, part=(3, 3))


def test_a_pass_without_text_needs_no_tokenizer_and_drops_nothing(make_corpus):
    directory = make_corpus(
        60,
        'faulty',
        1.0,
        ('', '?!', 'room 7', 'ship ' * 20, 'moon ' * 9, 'rrrrrrrrrrrrrrrrrrrrrrrrr'),
    )
    stream = one_pass(config_of(directory))
    assert stream.num_utterances == 60
    assert 'labels' not in stream.batch(0)


def test_fingerprints_follow_everything_that_decides_the_batches(config, make_corpus):
    base = data.stream(config, 0).fingerprint
    assert data.stream(ml_collections.ConfigDict(config), 0).fingerprint == base
    backwards = {**config, 'sources': dict(reversed(config['sources'].items()))}
    assert data.stream(backwards, 0).fingerprint == base
    changed = [
        data.stream(config, 1),
        data.stream({**config, 'batch_seconds': 20.0}, 0),
        data.stream({**config, 'max_seconds': 2.5}, 0),
        data.stream({**config, 'rates': 'weights'}, 0),
        data.stream(config_of(make_corpus(100, 'tiny'), multiple_of=4), 0),
    ]
    assert len({base, *(s.fingerprint for s in changed)}) == 6


def test_explicit_buckets(config):
    stream = data.stream({**config, 'bucket_seconds': [1.0, 3.0]}, 0)
    assert [s for _, s, _ in stream.shapes] == [16000, 48000]
    with pytest.raises(ConfigError, match='bucket_seconds ends at 1 s, the longest utterance'):
        data.stream({**config, 'bucket_seconds': [1.0]}, 0)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'batch_secs': 3.0}, "batch_secs: did you mean 'batch_seconds'"),
        ({'batch_seconds': 'many'}, 'must be a float'),
        ({'batch_seconds': 0.0}, 'must be above 0'),
        ({'batch_seconds': 4.0}, 'does not hold 4 utterance'),
        ({'rates': 'fair'}, "allowed: 'proportional', 'weights'"),
        ({'normaliser': 'whisper'}, 'must be one of none, basic, english'),
        ({'sources': {}}, 'must name at least one source'),
        ({'sources': {'a': {}}}, 'selection is not set'),
        ({'sources': {'a': {'selection': {'corpus': 'nowhere'}}}}, 'nowhere: no prepared corpus'),
        ({'sources': {'a': {'selecton': {}}}}, "did you mean 'selection'"),
    ],
)
def test_mistakes_are_named(config, change, message):
    with pytest.raises(UserError, match=message):
        data.stream({**config, **change}, 0)


def test_labels_without_tokenizer_or_for_some_sources_only_are_refused(config, tokenizer):
    sources = {**config['sources'], 's0': {**config['sources']['s0'], 'labels': 'text'}}
    with pytest.raises(ConfigError, match='needs a tokenizer'):
        data.stream({**config, 'sources': sources}, 0)
    with pytest.raises(ConfigError, match='s1 has no labels while others have'):
        data.stream({**config, 'sources': sources, 'tokenizer': tokenizer}, 0)


@pytest.mark.parametrize('harm', ['missing', 'truncated', 'flipped'])
def test_a_damaged_shard_is_named_by_both_readers(corpus, tmp_path, harm):
    directory = shutil.copytree(corpus.directory, tmp_path / 'corpus')
    stream = data.stream(config_of(str(directory)), 0)
    shard = pathlib.Path(Corpus.open(directory).shard_paths[-1])
    content = shard.read_bytes()
    if harm == 'missing':
        shard.unlink()
    elif harm == 'truncated':
        shard.write_bytes(content[:1000])
    else:
        middle = np.frombuffer(content, np.uint8).copy()
        middle[2000::997] ^= 0xFF
        shard.write_bytes(middle.tobytes())
    hit = next(
        k
        for k in range(200)
        if any(
            stream.sources[0].corpus.shard_of[r] == stream.sources[0].corpus.shard_of[-1]
            for r in stream.plan.members(k).row
        )
    )
    with pytest.raises(DataError, match=shard.name):
        stream.batch(hit)
    with stream.batches(start=hit) as batches, pytest.raises(DataError, match=shard.name):
        next(batches)
