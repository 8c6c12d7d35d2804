"""The order is a permutation, never changes between versions, and keeps its quotas exactly."""

import collections
import hashlib
import time

import numpy as np
import pytest

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.order import Order, derive_key, exact_quotas, permute, splitmix64

GOLDEN_TEN = [6, 9, 5, 3, 8, 1, 2, 4, 7, 0]
GOLDEN_HASH = 'fb766fa8957efddd'
GOLDEN_HUGE = [820176514839937, 333390590596455, 942351790949914]
GOLDEN_SEGMENT = '5a584ebbe5586be0'


def test_splitmix64_equals_the_published_sequence():
    # The first outputs for the seed 1234567, as in the reference implementation's documentation.
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(5)], np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 100, 1000, 4095, 4096, 65537])
@pytest.mark.parametrize('seed', [0, 1, 2**40])
def test_permute_is_a_permutation(size, seed):
    out = permute(np.arange(size), size, derive_key(seed))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permute_never_changes():
    assert permute(np.arange(10), 10, derive_key(0)).tolist() == GOLDEN_TEN
    out = permute(np.arange(100003), 100003, derive_key(7, 3, 11)).astype('<i8')
    assert hashlib.sha256(out.tobytes()).hexdigest()[:16] == GOLDEN_HASH
    huge = permute(np.array([0, 1, 10**15]), 10**15 + 1, derive_key(1))
    assert huge.tolist() == GOLDEN_HUGE


def test_order_never_changes():
    order = Order.create([1000, 37, 5], [0.7, 0.2, 0.1], seed=5, segment_size=4096)
    segment = order.segment(3)
    content = b''.join(a.astype('<i8').tobytes() for a in segment)
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN_SEGMENT


def test_permutations_of_different_keys_look_independent():
    size, keys = 1000, 200
    first = np.array([permute(np.arange(size), size, derive_key(k)) for k in range(keys)])
    # Fixed points of random permutations: mean 1, variance 1.
    fixed = (first == np.arange(size)).sum(1)
    assert abs(fixed.mean() - 1) < 5 / np.sqrt(keys)
    # Every element goes everywhere alike: chi-squared over 10 x 10 cells of (from, to).
    cells = np.zeros((10, 10))
    np.add.at(cells, (np.tile(np.arange(size) // 100, keys), first.ravel() // 100), 1)
    expected = size * keys / 100
    assert ((cells - expected) ** 2 / expected).sum() < 150  # 81 degrees of freedom, p < 1e-5
    # Neighbours are not kept together.
    gaps = np.abs(np.diff(first, axis=1))
    assert abs(gaps.mean() / (size / 3) - 1) < 0.02


def test_many_keys_at_once_equal_one_key_at_a_time():
    keys = derive_key(3, np.arange(6))
    index = np.tile(np.arange(50), 6)
    together = permute(index, 50, np.repeat(keys, 50)).reshape(6, 50)
    alone = np.stack([permute(np.arange(50), 50, derive_key(3, k)) for k in range(6)])
    assert np.array_equal(together, alone)


def test_quotas_sum_to_the_segment_and_follow_the_rates():
    rates = np.array([0.5, 0.3, 0.1999, 0.0001])
    quotas = exact_quotas(rates, 10000)
    assert quotas.sum() == 10000
    assert np.all(np.abs(quotas - rates * 10000) < 1)
    assert exact_quotas([1, 1, 1], 100).tolist() == [34, 33, 33]


@pytest.mark.parametrize('rates', [[], [0.0, 1.0], [-1.0, 2.0], [float('nan')], [1.0, 1e-9]])
def test_rates_that_cannot_be_kept_are_refused(rates):
    with pytest.raises(DataError):
        exact_quotas(rates, 4096)


def test_every_segment_holds_exactly_its_quota_of_each_source():
    order = Order.create([100, 1000, 7], [0.25, 0.7, 0.05], seed=1, segment_size=512)
    for number in (0, 1, 17):
        counts = np.bincount(order.segment(number).source, minlength=3)
        assert counts.tolist() == list(order.quotas)


def test_every_row_comes_once_per_epoch_of_its_source():
    order = Order.create([100, 333, 7], [0.25, 0.7, 0.05], seed=1, segment_size=512)
    seen = collections.defaultdict(list)
    last_epoch = {}
    for number in range(12):
        for source, row, epoch in zip(*order.segment(number), strict=True):
            seen[source, epoch].append(row)
            assert epoch >= last_epoch.get(source, 0), 'an epoch began before the last one ended'
            last_epoch[source] = epoch
    for (source, epoch), rows in seen.items():
        assert len(set(rows)) == len(rows)
        if epoch < last_epoch[source]:
            assert sorted(rows) == list(range(order.sizes[source]))
    assert min(last_epoch.values()) >= 3


def test_epochs_and_seeds_have_orders_of_their_own():
    order = Order.create([50], [1.0], seed=1, segment_size=200)
    rows = order.segment(0).row.reshape(4, 50)
    other = Order.create([50], [1.0], seed=2, segment_size=200).segment(0).row[:50]
    assert len({tuple(r) for r in [*rows, other]}) == 5


def test_one_position_can_be_located():
    order = Order.create([100, 40], [0.5, 0.5], seed=9, segment_size=64)
    for position in (0, 63, 64, 1000):
        segment = order.segment(position // 64)
        place = position % 64
        expected = (segment.source[place], segment.row[place], segment.epoch[place])
        assert order.locate(position) == tuple(map(int, expected))


def test_planning_needs_no_memory_for_rows_and_is_fast():
    import tracemalloc

    # A billion rows: holding their permutation would take 8 GB.
    order = Order.create([10**9, 10**6], [0.9, 0.1], seed=0)
    order.segment(5)
    tracemalloc.start()
    began = time.process_time()
    for number in range(8):
        order.segment(number * 1000)
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6
    assert 8 * order.segment_size / seconds > 0.5e6  # about 4e6 on an idle core


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match='no rows'):
        Order.create([10, 0], [0.5, 0.5], seed=0)
