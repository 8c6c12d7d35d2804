"""Bounds are the best there are, batches hold about equal seconds, and errors name the numbers."""

import itertools

import numpy as np
import pytest

from bigssl_jax.data import buckets
from bigssl_jax.data.errors import DataError


def brute_force(edges, counts, num_buckets):
    """The least padded length over every choice of bounds that covers the longest bin."""
    used = [e for e, c in zip(edges, counts, strict=True) if c]
    best = np.inf
    for size in range(1, num_buckets + 1):
        for chosen in itertools.combinations(used[:-1], min(size, len(used)) - 1):
            bounds = np.array([*chosen, used[-1]])
            padded = sum(
                c * bounds[bounds >= e].min() for e, c in zip(edges, counts, strict=True) if c
            )
            best = min(best, padded)
    return best


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('num_buckets', [1, 2, 3, 4])
def test_bounds_waste_as_little_as_the_best_of_all_choices(seed, num_buckets):
    random = np.random.default_rng(seed)
    edges = np.cumsum(random.integers(1, 5, 9))
    counts = random.integers(0, 6, 9) * random.integers(0, 2, 9)
    counts[4] += 1
    bounds = buckets.optimal_bounds(edges, counts, num_buckets)
    padded = (bounds[np.searchsorted(bounds, edges[counts > 0])] * counts[counts > 0]).sum()
    assert padded == brute_force(edges, counts, num_buckets)
    assert len(bounds) <= num_buckets
    assert bounds[-1] == edges[counts > 0].max()
    assert np.all(np.diff(bounds) > 0)


def test_more_buckets_than_lengths_pad_nothing():
    bounds = buckets.optimal_bounds(np.array([5, 9]), np.array([3, 1]), 6)
    assert bounds.tolist() == [5, 9]
    assert buckets.padding_waste(np.array([5, 9]), np.array([3, 1]), bounds) == 0.0


def test_optimal_bounds_waste_less_than_quantiles_on_speech_like_lengths():
    lengths = np.minimum(np.random.default_rng(0).gamma(2.0, 40000, 5000), 16 * 16000).astype(int)
    edges, counts = buckets.length_histogram(lengths)
    best = buckets.padding_waste(edges, counts, buckets.optimal_bounds(edges, counts, 4))
    quantiles = np.unique(edges[np.searchsorted(np.cumsum(counts), [1250, 2500, 3750, 5000])])
    assert best < buckets.padding_waste(edges, counts, quantiles)
    assert best < buckets.padding_waste(edges, counts, edges[-1:]) / 2


def test_histogram_counts_every_length_once_under_its_upper_edge():
    lengths = np.array([1, 1280, 1281, 2560, 5000])
    edges, counts = buckets.length_histogram(lengths)
    assert edges.tolist() == [1280, 2560, 3840, 5120]
    assert counts.tolist() == [2, 2, 0, 1]
    split = buckets.length_histogram([lengths[:2], lengths[2:]], longest=5000)
    assert np.array_equal(split[1], counts)


def test_histogram_of_hour_long_audio_stays_small():
    edges, _ = buckets.length_histogram(np.array([16000, 3600 * 16000]))
    assert len(edges) <= 512
    assert edges[-1] >= 3600 * 16000


def test_an_utterance_goes_to_the_smallest_bucket_that_holds_it():
    bounds = np.array([100, 200, 400])
    assert buckets.bucket_of(np.array([1, 100, 101, 200, 400]), bounds).tolist() == [0, 0, 1, 1, 2]


def test_batches_hold_about_equal_seconds_and_divide_by_the_devices():
    bounds = np.array([2, 4, 8, 16]) * 16000
    assert buckets.batch_sizes(bounds, 64.0) == [32, 16, 8, 4]
    assert buckets.batch_sizes(bounds, 70.0, multiple_of=4) == [32, 16, 8, 4]
    assert buckets.batch_sizes(bounds, 64.0, max_batch=10) == [10, 10, 8, 4]


def test_a_budget_too_small_for_the_longest_utterance_names_the_cure():
    with pytest.raises(DataError, match=r'64 does not hold 8 .* 16.00 s: .* to 128.00'):
        buckets.batch_sizes([16 * 16000], 64.0, multiple_of=8)


@pytest.mark.parametrize(
    'samples, frames',
    [(0, 0), (399, 0), (400, 1), (559, 1), (560, 1), (880, 1), (1040, 2), (16000, 25)],
)
def test_encoder_frames(samples, frames):
    # 98 windows of 25 ms in a second; 98 / 4 rounds up to 25.
    assert buckets.encoder_frames(np.array([samples])).tolist() == [frames]
