"""Windows cover a recording, and hypotheses joined in their overlaps are those of its pieces.

The synthetic recogniser hears tokens that stand at known frames, and spoils what is near a window's
ends the way a model does: a token is missing, or another one, or moved.
"""

import itertools
import tracemalloc

import numpy as np
import pytest

from bigssl_jax.decoding.long_form import Joiner, Piece, join, matched, windows


def piece(*tokens_and_starts):
    """Piece of (token, start) pairs; each token lasts two frames."""
    tokens, starts = zip(*tokens_and_starts, strict=True) if tokens_and_starts else ((), ())
    starts = np.asarray(starts, np.int64)
    return Piece(np.asarray(tokens, np.int32), starts, starts + 2, np.ones(len(starts), np.float32))


def texts(*pieces):
    return [token for p in pieces for token in p.tokens.tolist()]


@pytest.mark.parametrize('total', [1, 99, 100, 101, 170, 171, 240, 1000])
@pytest.mark.parametrize('block', [1, 7, 64, 300])
def test_windows_cover_everything_once_and_overlap(total, block):
    samples = np.arange(total, dtype=np.int16)
    blocks = [samples[n : n + block] for n in range(0, total, block)]
    cut = list(windows(blocks, window=100, overlap=30))
    assert len(cut) == 1 + max(0, -(-(total - 100) // 70))
    for number, (start, part) in enumerate(cut):
        assert start == 70 * number
        np.testing.assert_array_equal(part, samples[start : start + 100])
    assert all(len(part) == 100 for _, part in cut[:-1])
    assert cut[-1][0] + len(cut[-1][1]) == total
    assert len(cut) == 1 or len(cut[-1][1]) > 30


def test_no_samples_give_no_window():
    assert list(windows([], 100, 30)) == []
    assert list(windows([np.zeros(0, np.int16)], 100, 30)) == []


@pytest.mark.parametrize('overlap', [0, -1, 51])
def test_an_overlap_that_cannot_be_joined_is_refused(overlap):
    with pytest.raises(ValueError, match='at most half a window'):
        list(windows([np.zeros(9)], 100, overlap))


def test_windows_hold_one_window_and_one_block():
    blocks = (np.zeros(10_000, np.int16) for _ in range(1000))
    tracemalloc.start()
    for _ in windows(blocks, 20_000, 5_000):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2 * 20_000  # of 20 MB in all


def test_a_token_on_the_middle_comes_once_whichever_side_each_window_puts_it():
    for left_at, right_at in itertools.product(range(46, 55), repeat=2):
        kept, rest = join(
            piece((1, 20), (2, left_at), (3, 70)), piece((2, right_at), (3, 71), (4, 95)), 40, 60
        )
        assert texts(kept, rest) == [1, 2, 3, 4]
        assert np.all(np.diff(np.concatenate([kept.starts, rest.starts])) >= 0)


def test_what_is_spoilt_near_the_ends_is_left_out():
    left = piece((1, 30), (2, 43), (3, 52), (9, 59))  # 9: the end of a word cut off
    right = piece((8, 40), (3, 53), (4, 58), (5, 70))  # 8: the beginning of one
    assert texts(*join(left, right, 40, 60)) == [1, 2, 3, 4, 5]


def test_equal_words_at_other_times_are_not_taken_for_one():
    left = piece((7, 42), (7, 47))
    right = piece((7, 47), (7, 56))
    assert texts(*join(left, right, 40, 60, tolerance=4)) == [7, 7, 7]


def test_without_any_match_the_middle_decides():
    left, right = piece((1, 41), (2, 49), (3, 55)), piece((4, 45), (5, 51), (6, 58))
    assert texts(*join(left, right, 40, 60)) == [1, 2, 5, 6]


def test_a_window_that_hears_nothing_leaves_the_others_half():
    assert texts(*join(piece((1, 20), (2, 45), (3, 57)), piece(), 40, 60)) == [1, 2]
    assert texts(*join(piece(), piece((1, 42), (2, 52), (3, 80)), 40, 60)) == [2, 3]
    assert texts(*join(piece(), piece(), 40, 60)) == []


def brute_force_matches(left, right, tolerance):
    """Every way to pair tokens in order; the largest, then the closest in time."""
    pairs = [
        (i, j)
        for i, j in itertools.product(range(len(left.tokens)), range(len(right.tokens)))
        if left.tokens[i] == right.tokens[j] and abs(left.starts[i] - right.starts[j]) <= tolerance
    ]
    best = (0, 0)
    for count in range(1, len(pairs) + 1):
        for chosen in itertools.combinations(pairs, count):
            if all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(chosen)):
                apart = sum(abs(int(left.starts[i] - right.starts[j])) for i, j in chosen)
                best = max(best, (count, -apart))
    return best


@pytest.mark.parametrize('seed', range(30))
def test_matches_equal_brute_force(seed):
    rng = np.random.default_rng(seed)

    def random():
        count = rng.integers(0, 6)
        return piece(*zip(rng.integers(1, 4, count), np.sort(rng.integers(0, 12, count)), strict=1))

    left, right = random(), random()
    pairs = matched(left, right, 5)
    apart = sum(abs(int(left.starts[i] - right.starts[j])) for i, j in pairs)
    assert (len(pairs), -apart) == brute_force_matches(left, right, 5)
    assert all(left.tokens[i] == right.tokens[j] for i, j in pairs)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(pairs))


def hear(tokens, starts, first, last, rng, edge):
    """What the synthetic recogniser hears in frames [first, last)."""
    heard = []
    for token, start in zip(tokens, starts, strict=True):
        if not first <= start < last:
            continue
        near_start = first > 0 and start < first + edge
        if near_start or start >= last - edge:
            fate = rng.integers(3)
            if fate == 0:
                continue
            token = int(token) if fate == 1 else int(rng.integers(100, 200))
        heard.append((token, int(np.clip(start + rng.integers(-2, 3), first, last - 1))))
    heard.sort(key=lambda pair: pair[1])
    return piece(*heard)


@pytest.mark.parametrize('seed', range(20))
def test_a_long_recording_is_heard_as_its_pieces_are(seed):
    """Utterances with silence between, windows that cut through them, ends that are spoilt."""
    rng = np.random.default_rng(seed)
    total, window, overlap, edge = 6000, 300, 80, 30
    starts = np.cumsum(rng.choice([6, 8, 12, 40, 120], 400, p=[0.3, 0.3, 0.3, 0.08, 0.02]))
    starts = starts[starts < total - edge]  # silence at the end, which is an end of a window
    tokens = rng.integers(1, 6, len(starts))  # few kinds, so that wrong matches are to be had
    joiner = Joiner(tolerance=5)
    first = 0
    while True:
        last = min(first + window, total)
        joiner.add(hear(tokens, starts, first, last, rng, edge), first, last)
        if last == total:
            break
        first += window - overlap
    result = joiner.joined()
    assert result.tokens.tolist() == tokens.tolist()
    assert np.abs(result.starts - starts).max() <= 6
    assert np.all(np.diff(result.starts) >= 0) and np.all(result.ends >= result.starts)


def test_nothing_heard_anywhere():
    joiner = Joiner()
    assert len(joiner.joined().tokens) == 0
    for number in range(3):
        joiner.add(piece(), 70 * number, 70 * number + 100)
    assert len(joiner.joined().tokens) == 0
