"""Which utterances form batch k: held by hashes for ever, and true of configs drawn at random.

A checkpoint of today is continued by a version of tomorrow: if an order here changes, every run
that was begun before goes on with other batches.  Whoever must change it raises `ORDER_VERSION`, so
that such runs are refused, and writes new hashes.
"""

import collections
import hashlib

import numpy as np
import pytest

from bigssl_jax import data
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.order import Order, exact_quotas
from bigssl_jax.data.plan import StreamPlan
from bigssl_jax.data.prepare import Options, prepare
from bigssl_jax.data.stream import one_pass

HOSTS = (1, 2, 4, 8)

# (config, seed) -> hash of the ids of batches 0 to 99, of batch 100,000, of the shapes of batches.
GOLDEN = {
    ('one source', 0): ('8d07982495ceac3f', 'de8b9d2821cde15b', '6cff9b45150c6553'),
    ('one source', 7): ('cc8ad4d35420de3d', '3f10d65368a47e63', 'd7783663220db9fd'),
    ('two, proportional', 0): ('61522aa813fa2a4f', '4e4a889c7866ae3f', '9a25ca3e64771bcd'),
    ('two, by weights', 3): ('d7710ec52166c0d9', 'f9162dbb76f50a7b', '3911eeb25eb33e26'),
    ('a part and the rest', 5): ('e124e8e3daa92565', '8028325aacaf1a91', '183dfcf8972e8f0f'),
    ('buckets by hand', 1): ('7d05847d268581ae', 'cf31b032f4eaa19b', '4a984610746ee62c'),
}
GOLDEN_PASS = 'dae95fe6578a9852'


def made(count: int, name: str, step: int) -> list[Entry]:
    """Utterances whose lengths, sounds and splits are plain arithmetic, the same everywhere."""
    return [
        Entry(
            id=f'{name}-{i:03d}',
            audio=((np.arange(8000 + i * step % 40000) * (i + 7) % 4001) - 2000).astype(np.int16),
            split='dev' if i % 9 == 5 else 'train',
            sample_rate=16000,
        )
        for i in range(count)
    ]


@pytest.fixture(scope='module')
def corpora(tmp_path_factory) -> tuple[str, str]:
    """120 and 31 utterances of 0.5 to 3 s, in several shards."""
    folder = tmp_path_factory.mktemp('golden')
    for count, name, step in ((120, 'many', 7919), (31, 'few', 5087)):
        entries, options = made(count, name, step), Options(shard_size=50)
        prepare(entries, folder / name, jobs=1, options=options, progress=False)
    return str(folder / 'many'), str(folder / 'few')


def config_of(which: str, corpora: tuple[str, str]) -> dict:
    many, few = ({'corpus': corpus} for corpus in corpora)
    labelled = {**many, 'splits': ['train'], 'hours': 0.01}
    sources, fields = {
        'one source': ({'a': many}, {}),
        'two, proportional': ({'a': many, 'b': few}, {}),
        'two, by weights': ({'b': few, 'a': many}, {'rates': 'weights'}),
        'a part and the rest': (
            {'labelled': labelled, 'rest': {**many, 'exclude': [labelled]}},
            {'rates': 'weights', 'max_seconds': 2.5},
        ),
        'buckets by hand': ({'a': many, 'b': few}, {'bucket_seconds': [0.9, 1.7, 3.0]}),
    }[which]
    weights = dict(zip('ab', (1.0, 2.5), strict=True))
    return {
        'sources': {
            name: {'selection': selection, 'weight': weights.get(name, 1.0)}
            for name, selection in sources.items()
        },
        'batch_seconds': 26.0,
        'num_buckets': 3,
        'multiple_of': 8,
        'segment_size': 256,
        **fields,
    }


def hash_of(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


@pytest.mark.parametrize(('which', 'seed'), GOLDEN)
def test_batches_never_change(which, seed, corpora):
    stream = data.stream(config_of(which, corpora), seed)
    found = (
        hash_of([stream.ids(k) for k in range(100)]),
        hash_of(stream.ids(100_000)),
        hash_of([stream.shape_of(k) for k in range(100)]),
    )
    assert found == GOLDEN[which, seed]


def test_parts_of_a_pass_never_change(corpora):
    """What labels are cut into: a run that labels may be continued by another version, too."""
    config = config_of('two, proportional', corpora)
    parts = [one_pass(config, part=(i, 3)) for i in range(3)]
    assert hash_of([[p.ids(k) for k in range(len(p))] for p in parts]) == GOLDEN_PASS


def drawn_plan(random: np.random.Generator) -> tuple[StreamPlan, np.ndarray]:
    """A plan over made-up lengths, and the rates of its sources."""
    count = random.integers(1, 5)
    lengths = [random.integers(1, 1000, random.integers(1, 300)) for _ in range(count)]
    rates = random.uniform(0.1, 1.0, count)
    order = Order.create(
        [x.size for x in lengths], rates, int(random.integers(2**40)), int(random.integers(40, 700))
    )
    bounds = np.unique([*random.integers(1, 1000, random.integers(0, 4)), 1000])
    sizes = random.integers(1, 20, bounds.size)
    return StreamPlan(order, lengths, bounds, sizes), rates / rates.sum()


@pytest.mark.parametrize('draw', range(40))
def test_every_row_comes_once_per_epoch_and_source_and_quotas_are_kept(draw):
    random = np.random.default_rng(draw)
    plan, rates = drawn_plan(random)
    order, size = plan.order, plan.order.segment_size
    assert order.quotas == tuple(exact_quotas(rates, size)) and sum(order.quotas) == size
    assert np.all(np.abs(np.array(order.quotas) - rates * size) < 1)

    last = int(random.integers(20, 200))
    emitted: collections.Counter = collections.Counter()
    for k in random.permutation(last + 1):  # in any order: no batch depends on one asked before
        members = plan.members(int(k))
        assert members.row.size == plan.sizes[members.bucket]
        emitted.update(zip(*map(np.ndarray.tolist, members[1:4]), strict=True))
    assert set(emitted.values()) == {1}, 'a row came twice in an epoch of its source'

    # What the order puts up to the last batch, and what of it still waits for its batch to be full.
    end = plan.members(last).end
    drawn: set[tuple[int, int, int]] = set()
    for number in range(-(-end // size)):
        segment = order.segment(number)
        assert tuple(np.bincount(segment.source, minlength=len(rates))) == order.quotas
        stop = min(size, end - number * size)
        columns = (segment.source, segment.row, segment.epoch)
        drawn |= set(zip(*(c[:stop].tolist() for c in columns), strict=True))
    assert len(drawn) == end and set(emitted) <= drawn
    waiting = collections.Counter(
        int(np.searchsorted(plan.bounds, plan._lengths[s][r])) for s, r, _ in drawn - set(emitted)
    )
    assert all(count < plan.sizes[bucket] for bucket, count in waiting.items())
    # Whole epochs hold every row.
    for source, rows in enumerate(order.sizes):
        seen = collections.Counter(epoch for s, _, epoch in drawn if s == source)
        assert [seen[epoch] for epoch in range(max(seen, default=0))] == [rows] * max(
            seen, default=0
        )


@pytest.mark.parametrize('draw', range(12))
def test_the_global_batch_does_not_know_how_many_hosts_read_it(draw, corpora):
    random = np.random.default_rng(100 + draw)
    config = config_of(str(random.choice([which for which, _ in GOLDEN])), corpora) | {
        'batch_seconds': float(random.uniform(26, 60)),
        'num_buckets': int(random.integers(1, 5)),
        'segment_size': int(random.integers(100, 600)),
    }
    seed, batches = int(random.integers(2**40)), random.integers(0, 5000, 6)
    ids, fingerprints = set(), set()
    for hosts in HOSTS:
        slices = [data.stream(config, seed, host=h, num_hosts=hosts) for h in range(hosts)]
        ids.add(repr([sum((s.ids(int(k)) for s in slices), []) for k in batches]))
        fingerprints |= {s.fingerprint for s in slices}
    assert len(ids) == 1 and len(fingerprints) == 1


@pytest.mark.parametrize('draw', range(8))
def test_a_pass_gives_every_utterance_once_to_any_number_of_parts_and_hosts(draw, corpora):
    random = np.random.default_rng(200 + draw)
    config = config_of('two, proportional', corpora)
    parts, hosts = int(random.integers(1, 12)), int(random.choice(HOSTS))
    found: collections.Counter = collections.Counter()
    for part in range(parts):
        for host in range(hosts):
            stream = one_pass(config, host=host, num_hosts=hosts, part=(part, parts))
            for k in range(len(stream)):
                found.update(stream.ids(k))
    found.pop('', None)
    whole = one_pass(config)
    assert set(found.values()) == {1} and len(found) == whole.num_utterances == 151
