"""Label sets are complete or invisible, survive kills, never mix teachers; filters tell why."""

import hashlib
import multiprocessing
import os
import pathlib
import signal
import time

import numpy as np
import pytest

from bigssl_jax.config import ConfigError
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.label_filters import (
    filter_labels,
    fit_scores,
    has_repeats,
    least_varied,
)
from bigssl_jax.data.label_sets import LabelSet, LabelWriter

KEY = {'teacher': 'aa', 'decoder': 'bb', 'config': 'cc'}


def rows(part, count=10):
    """Made-up labels of one part; the same every time."""
    random = np.random.default_rng(part)
    return {
        'id': [f'u{part}-{i}' for i in range(count)],
        'text': [' '.join(random.choice(['a', 'ship', 'moon'], 4)) for _ in range(count)],
        'tokens': [random.integers(3, 30, 5).tolist() for _ in range(count)],
        'score': random.normal(-5, 1, count).astype(np.float32),
        'confidence': random.uniform(0, 1, count).astype(np.float32),
        'seconds': random.uniform(1, 3, count).astype(np.float32),
        'token_confidence': [random.uniform(0, 1, 5).astype(np.float32) for _ in range(count)],
    }


def write_all(directory, key=KEY, parts=4, slow=0.0):
    writer = LabelWriter(directory, key, parts)
    for part in writer.missing():
        time.sleep(slow)
        writer.write(part, rows(part))
    return writer.finish({'hours_of_audio': 1})


def hashes(directory):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in pathlib.Path(directory).iterdir()
        if p.is_file() and not p.name.endswith('.tmp')
    }


def test_what_is_written_is_read_back_in_order(tmp_path):
    labels = write_all(tmp_path)
    assert labels.num_rows == 40
    assert labels.key == KEY
    table = labels.table()
    assert table['id'].to_pylist() == [i for part in range(4) for i in rows(part)['id']]
    assert table['tokens'].to_pylist() == [t for part in range(4) for t in rows(part)['tokens']]
    seconds = sum(rows(part)['seconds'].sum(dtype=np.float64) for part in range(4))
    assert labels.hours == pytest.approx(seconds / 3600, abs=1e-6)
    labels.verify()
    assert LabelSet.open(tmp_path).fingerprint == labels.fingerprint


def test_posteriors_of_frames_are_read_back(tmp_path):
    random = np.random.default_rng(0)
    writer = LabelWriter(tmp_path, {**KEY, 'top_k': '3'}, 2)
    written = []
    for part in range(2):
        frames = random.integers(0, 9, 10)
        ids = [random.integers(0, 40, (n, 3)).astype(np.int32) for n in frames]
        log_probs = [random.normal(-2, 1, (n, 3)).astype(np.float16) for n in frames]
        columns = {'frames': frames, 'top_k_mass': np.full(10, 0.9, np.float32)}
        columns['top_k_ids'] = [x.ravel() for x in ids]
        columns['top_k_log_probs'] = [x.ravel() for x in log_probs]
        writer.write(part, rows(part) | columns)
        written += list(zip(rows(part)['id'], ids, log_probs, strict=True))
    found = list(writer.finish().posteriors())
    assert [name for name, _, _ in found] == [name for name, _, _ in written]
    for (_, ids, log_probs), (name, *expected) in zip(found, written, strict=True):
        assert (ids.dtype, log_probs.dtype) == (np.int32, np.float16), name
        if ids.size:
            np.testing.assert_array_equal(ids, expected[0])
            np.testing.assert_array_equal(log_probs, expected[1])
        assert len(ids) == len(log_probs) == len(expected[0])
    with pytest.raises(DataError, match='made without posteriors; set top_k in its stage'):
        next(write_all(tmp_path / 'other').posteriors())


def test_nothing_is_visible_before_the_end(tmp_path):
    writer = LabelWriter(tmp_path, KEY, 2)
    writer.write(0, rows(0))
    with pytest.raises(DataError, match='labels are not complete'):
        LabelSet.open(tmp_path)
    with pytest.raises(DataError, match=r'parts \[1\] of 2 are missing'):
        writer.finish()


def test_finished_parts_are_skipped_and_left_alone(tmp_path):
    write_all(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob('part-*')}
    writer = LabelWriter(tmp_path, KEY, 4)
    assert writer.missing() == []
    writer.write(2, {**rows(2), 'text': ['other'] * 10})
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob('part-*')} == before


def test_labels_of_another_teacher_are_refused(tmp_path):
    write_all(tmp_path)
    with pytest.raises(DataError, match='made with another teacher: write these labels to another'):
        write_all(tmp_path, {**KEY, 'teacher': 'zz'})
    with pytest.raises(DataError, match='another number of parts'):
        LabelWriter(tmp_path, KEY, 5)


def test_killed_at_any_time_and_started_again_gives_the_same_files(tmp_path):
    write_all(tmp_path / 'unbroken', parts=12)
    directory = tmp_path / 'broken'
    context = multiprocessing.get_context('fork')
    random = np.random.default_rng(0)
    kills = 0
    for _ in range(30):
        process = context.Process(target=write_all, args=(directory, KEY, 12, 0.02))
        process.start()
        process.join(random.uniform(0.02, 0.15))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if (directory / 'labels.json').exists():
            break
    assert kills >= 2
    write_all(directory, parts=12)
    assert hashes(directory) == hashes(tmp_path / 'unbroken')


def test_damage_is_found(tmp_path):
    labels = write_all(tmp_path)
    path = tmp_path / 'part-00001-of-00004.parquet'
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(DataError, match='part-00001-of-00004.parquet has .* bytes'):
        LabelSet.open(tmp_path)
    path.write_bytes(content[:30] + b'\xff' + content[31:])
    with pytest.raises(DataError, match='has changed'):
        labels.verify()
    path.unlink()
    with pytest.raises(DataError, match='is missing'):
        LabelSet.open(tmp_path)


def test_columns_are_checked(tmp_path):
    writer = LabelWriter(tmp_path, KEY, 1)
    good = rows(0)
    with pytest.raises(DataError, match="lack the column 'score'"):
        writer.write(0, {k: v for k, v in good.items() if k != 'score'})
    with pytest.raises(DataError, match="no column 'logits'"):
        writer.write(0, {**good, 'logits': [1] * 10})
    with pytest.raises(DataError, match='differ in length'):
        writer.write(0, {**good, 'id': ['x']})
    assert [path.name for path in tmp_path.rglob('*')] == ['ledger']


@pytest.fixture
def labels(tmp_path):
    """Six utterances, each bad in a way of its own but the last."""
    writer = LabelWriter(tmp_path, KEY, 1)
    text = [
        '',
        'go go go go',
        'one two three one two three one two three',
        'unsure words',
        'slow',
        'all is well',
    ]
    writer.write(
        0,
        {
            'id': list('abcdef'),
            'text': text,
            'tokens': [[3]] * 6,
            'score': [-1.0] * 6,
            'confidence': [0.9, 0.8, 0.7, 0.1, 0.9, 0.95],
            'seconds': [1.0, 1.0, 3.0, 1.0, 30.0, 1.0],
        },
    )
    return writer.finish()


@pytest.mark.parametrize(
    'step, kept',
    [
        ({'kind': 'keep_all'}, 'abcdef'),
        ({'kind': 'empty'}, 'bcdef'),
        ({'kind': 'confidence', 'threshold': 0.7}, 'abef'),  # 0.7 in float32 is below 0.7
        ({'kind': 'confidence', 'threshold': 0.69}, 'abcef'),
        ({'kind': 'confidence', 'percentile': 50}, 'aef'),  # a and e tie; both are above the median
        ({'kind': 'confidence', 'percentile': 0}, 'abcdef'),
        ({'kind': 'words_per_second', 'min': 1.0}, 'bcdf'),
        ({'kind': 'words_per_second', 'max': 3.5}, 'acdef'),
        ({'kind': 'characters_per_second', 'min': 1.0, 'max': 11.5}, 'bf'),
        # scores -1 with one token each: the line fits all, so nothing is below it
        ({'kind': 'normalised_score', 'threshold': -1e-6}, 'abcdef'),
        ({'kind': 'normalised_score', 'threshold': 0.0, 'fit': (-2.0, 0.5, 1.0)}, 'abcdef'),
        ({'kind': 'normalised_score', 'threshold': 0.0, 'fit': (-2.0, 1.5, 1.0)}, ''),
        ({'kind': 'duplicates', 'times': 1}, 'abcdef'),
        ({'kind': 'repeats'}, 'adef'),
        ({'kind': 'repeats', 'words': 1, 'times': 3}, 'acdef'),
        ({'kind': 'repeats', 'words': 3, 'times': 5}, 'abcdef'),
    ],
)
def test_each_filter_keeps_what_it_says(labels, step, kept):
    result = filter_labels(labels, step)
    assert ''.join(result.ids) == kept
    assert result.keep.tolist() == [c in kept for c in 'abcdef']


def test_a_filter_reports_hours_and_reasons(labels):
    result = filter_labels(
        labels,
        [
            {'kind': 'empty'},
            {'kind': 'words_per_second', 'min': 1.0},
            {'kind': 'confidence', 'percentile': 25},
        ],
    )
    assert [r['kind'] for r in result.report] == ['empty', 'words_per_second', 'confidence']
    assert [r['removed_rows'] for r in result.report] == [1, 1, 1]
    assert result.report[1]['removed_hours'] == pytest.approx(30 / 3600)
    assert result.kept_hours == pytest.approx(5 / 3600)
    assert result.report[2]['limits']['threshold'] == pytest.approx(0.7)
    assert ''.join(result.ids) == 'bcf'


def test_scores_are_normalised_by_their_lengths(tmp_path):
    """Scores of known law: the fit finds it, and keeps labels of all lengths alike."""
    random = np.random.default_rng(0)
    counts = random.integers(1, 60, 4000)
    scores = -0.7 * counts - 3.0 + 0.4 * np.sqrt(counts) * random.standard_normal(4000)
    slope, intercept, deviation = fit_scores(scores, counts)
    line = np.polyfit(counts, scores, 1)
    assert (slope, intercept) == pytest.approx(tuple(line), rel=1e-9)
    assert (slope, intercept, deviation) == pytest.approx((-0.7, -3.0, 0.4), rel=0.05)

    writer = LabelWriter(tmp_path, KEY, 1)
    columns = {'id': [str(i) for i in range(4000)], 'text': ['x'] * 4000}
    columns |= {'tokens': [[3] * n for n in counts], 'score': scores, 'seconds': [1.0] * 4000}
    writer.write(0, columns | {'confidence': np.ones(4000)})
    result = filter_labels(writer.finish(), {'kind': 'normalised_score', 'percentile': 40})
    assert result.keep.sum() == 2400
    assert counts[result.keep].mean() == pytest.approx(counts.mean(), rel=0.05)
    assert result.report[0]['limits']['slope'] == pytest.approx(slope, rel=1e-5)
    by_score = np.sort(counts[np.argsort(-scores)[:2400]])
    assert by_score.mean() < 0.7 * counts.mean()  # what a plain score would have kept


def _labelled(folder, scores, counts, key=KEY):
    writer = LabelWriter(folder, key, 1)
    size = len(scores)
    columns = {'id': [f'u{i}' for i in range(size)], 'text': ['x'] * size}
    columns |= {'tokens': [[3] * int(n) for n in counts], 'score': scores}
    writer.write(0, columns | {'seconds': [1.0] * size, 'confidence': np.ones(size)})
    return writer.finish()


def test_scores_are_normalised_by_the_fit_of_a_dev_set(tmp_path):
    random = np.random.default_rng(1)
    counts = random.integers(1, 40, 500)
    dev = _labelled(
        tmp_path / 'dev', -0.5 * counts - 1.0 + 0.1 * random.standard_normal(500), counts
    )
    scores, lengths = np.array([-3.5, -3.0, -12.5, -10.0]), np.array([4, 4, 20, 20])
    labels = _labelled(tmp_path / 'labels', scores, lengths)
    step = {'kind': 'normalised_score', 'threshold': -1.0, 'fit': str(tmp_path / 'dev')}
    result = filter_labels(labels, step)
    table = dev.table(['score'])['score'].to_numpy()  # float32, as it was stored
    line = np.polyfit(counts, table.astype(np.float64), 1)
    left = (table - np.polyval(line, counts)) / np.sqrt(counts)
    limits = result.report[0]['limits']
    assert (limits['slope'], limits['intercept']) == pytest.approx(tuple(line), rel=1e-6)
    assert limits['deviation'] == pytest.approx(np.sqrt(np.mean(left**2)), rel=1e-6)
    # By the dev set's line -3 and -11 are usual for 4 and 20 tokens; of their own line all were.
    assert result.ids == ['u1', 'u3']
    other = {**KEY, 'teacher': 'another'}
    _labelled(tmp_path / 'other', scores, lengths, other)
    with pytest.raises(DataError, match='another teacher'):
        filter_labels(labels, {**step, 'fit': str(tmp_path / 'other')})


def test_the_row_that_adds_least_to_the_variety_goes_first():
    random = np.random.default_rng(2)
    for _ in range(50):
        # Rows of one length, so that what a row adds and what it adds per token order alike.
        rows = [random.zipf(1.5, 4).clip(max=30) for _ in range(12)]
        tokens, counts = np.concatenate(rows), np.full(12, 4)
        gone = least_varied(tokens, counts, 12, 12)
        left = list(range(12))
        for row in gone:
            present = np.bincount(np.concatenate([rows[i] for i in left]), minlength=31)
            adds = {i: round(sum(present[w] ** -0.5 for w in rows[i]), 9) for i in left}
            assert adds[row] == min(adds.values())
            left.remove(row)


def test_balancing_keeps_more_variety_than_chance_and_drops_empty_rows_first():
    random = np.random.default_rng(3)
    rows = [random.zipf(1.4, random.integers(1, 9)).clip(max=200) for _ in range(300)] + [[]]
    tokens, counts = np.concatenate(rows).astype(np.int64), np.array([len(r) for r in rows])
    for rounds in (1, 8):
        gone = least_varied(tokens, counts, 150, rounds)
        assert len(set(gone.tolist())) == 150 and gone[0] == 300
        kept = [rows[i] for i in set(range(301)) - set(gone.tolist())]
        entropy = _entropy(kept)
        for _ in range(20):
            chance = [rows[i] for i in random.permutation(301)[:151]]
            assert entropy > _entropy(chance) + 0.05
    assert least_varied(tokens, counts, 0, 8).size == 0


def _entropy(rows) -> float:
    counts = np.unique(np.concatenate(rows), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def test_balance_counts_only_what_earlier_steps_kept(tmp_path):
    writer = LabelWriter(tmp_path, KEY, 1)
    # 3 is frequent only among the rows that the first step drops.
    tokens = [[3], [3], [3], [4], [4], [3]]
    columns = {'id': list('abcdef'), 'text': list('xxxyyx'), 'tokens': tokens, 'score': [-1.0] * 6}
    confidence = [0.1, 0.1, 0.1, 0.9, 0.9, 0.9]
    writer.write(0, columns | {'confidence': confidence, 'seconds': [1.0] * 6})
    labels = writer.finish()
    balance = {'kind': 'balance', 'percentile': 34.0, 'rounds': 1}
    assert ''.join(filter_labels(labels, balance).ids) == 'cdef'
    result = filter_labels(labels, [{'kind': 'confidence', 'threshold': 0.5}, balance])
    assert ''.join(result.ids) == 'ef'
    assert [step['removed_rows'] for step in result.report] == [3, 1]


def test_the_most_confident_of_equal_texts_are_kept(tmp_path):
    writer = LabelWriter(tmp_path, KEY, 1)
    texts = ['yes', 'no', 'yes', 'yes', 'no', 'well']
    confidence = [0.5, 0.9, 0.7, 0.7, 0.1, 0.2]
    columns = {'id': list('abcdef'), 'text': texts, 'tokens': [[3]] * 6, 'score': [-1.0] * 6}
    writer.write(0, columns | {'confidence': confidence, 'seconds': [1.0] * 6})
    labels = writer.finish()
    kept = [''.join(filter_labels(labels, {'kind': 'duplicates', 'times': n}).ids) for n in (1, 2)]
    assert kept == ['bcf', 'bcdef']
    steps = [{'kind': 'confidence', 'threshold': 0.6}, {'kind': 'duplicates', 'times': 1}]
    result = filter_labels(labels, steps)
    assert ''.join(result.ids) == 'bc'
    assert [step['removed_rows'] for step in result.report] == [3, 1]


@pytest.mark.parametrize(
    'step, message',
    [
        ({'kind': 'luck'}, r'filter\[0\].kind'),
        ({'kind': 'confidence'}, 'either percentile or threshold'),
        (
            {'kind': 'confidence', 'percentile': 10, 'threshold': 0.1},
            'either percentile or threshold',
        ),
        ({'kind': 'confidence', 'percentile': 100}, 'must be 0 <= p < 100'),
        ({'kind': 'empty', 'words': 3}, 'words'),
        ({'kind': 'words_per_second', 'min': 4.0, 'max': 1.0}, 'above max'),
        ({'kind': 'repeats', 'times': 1}, 'times at least 2'),
        ({'kind': 'duplicates', 'times': 0}, 'times is 0; it must be at least 1'),
        ({'kind': 'balance', 'percentile': 100.0}, 'percentile is 100.0; it must be 0 <= p < 100'),
        ({'kind': 'balance', 'rounds': 0}, 'rounds is 0; it must be from 1'),
        ({'kind': 'normalised_score'}, 'either percentile or threshold'),
        ({'kind': 'normalised_score', 'threshold': 0, 'fit': (1.0, 2.0)}, 'slope, intercept, dev'),
        ({'kind': 'normalised_score', 'threshold': 0, 'fit': (1, 2, 0)}, 'a deviation above 0'),
        ([], 'at least one'),
    ],
)
def test_bad_filters_are_named(labels, step, message):
    with pytest.raises(ConfigError, match=message):
        filter_labels(labels, step)


@pytest.mark.parametrize(
    'text, words, times, expected',
    [
        ('a a a', 1, 3, True),
        ('a a b a', 1, 3, False),
        ('a b a b a b', 2, 3, True),
        ('a b a b a', 2, 3, False),
        ('a b a b a b', 1, 2, False),
        ('x a b c a b c', 3, 2, True),
        ('', 3, 2, False),
    ],
)
def test_repeats(text, words, times, expected):
    assert has_repeats(text, words, times) is expected
