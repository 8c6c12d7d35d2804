"""Calibration and kept-fraction curves against cases computed by hand."""

import json

import numpy as np
import pytest

from bigssl_jax.evaluation.confidence import (
    calibration,
    calibration_error,
    kept_curve,
    label_quality,
)


def test_calibration_by_hand():
    rows = calibration([0.05, 0.95, 0.92, 1.0], [2, 0, 1, 0], [2, 4, 4, 2], bins=10)
    assert [row['utterances'] for row in rows] == [1, 3]
    assert rows[0]['accuracy'] == 0 and rows[1]['accuracy'] == pytest.approx(0.9)
    assert rows[1]['confidence'] == pytest.approx(np.mean([0.95, 0.92, 1.0]))
    expected = (2 * 0.05 + 10 * abs(np.mean([0.95, 0.92, 1.0]) - 0.9)) / 12
    assert calibration_error(rows) == pytest.approx(expected)


def test_calibrated_confidence_has_a_small_error():
    generator = np.random.default_rng(0)
    confidence = generator.random(4000)
    words = np.full(4000, 20)
    rows = calibration(confidence, generator.binomial(words, 1 - confidence), words)
    assert calibration_error(rows) < 0.01


def test_kept_curve_by_hand():
    rows = kept_curve([0.1, 0.9, 0.5, 0.7], [4, 0, 2, 1], [4, 4, 4, 4], points=4)
    assert [row['fraction'] for row in rows] == [0.25, 0.5, 0.75, 1]
    assert [row['wer'] for row in rows] == [0, 1 / 8, 3 / 12, 7 / 16]
    assert [row['threshold'] for row in rows] == [0.9, 0.7, 0.5, 0.1]


def test_kept_curve_does_not_part_equal_confidences():
    rows = kept_curve([0.5, 0.5, 0.5, 0.1], [0, 1, 2, 3], [3, 3, 3, 3], points=4)
    assert [row['utterances'] for row in rows] == [3, 4]


def test_silence_only_gives_no_rates():
    rows = calibration([0.5], [1], [0])
    assert rows[0]['accuracy'] is None and calibration_error(rows) is None
    assert kept_curve([0.5], [1], [0])[-1]['wer'] is None


@pytest.mark.parametrize(
    'confidence, errors, words, message',
    [
        ([0.5], [1, 2], [1, 2], '1 confidences, 2 error counts'),
        ([1.5], [1], [1], 'outside'),
        ([float('nan')], [1], [1], 'not a number'),
        ([], [], [], 'no utterances'),
    ],
)
def test_bad_arrays_are_refused(confidence, errors, words, message):
    with pytest.raises(ValueError, match=message):
        calibration(confidence, errors, words)


def test_float32_ones_are_accepted():
    assert calibration(np.array([1.0000001], np.float32), [0], [1])[0]['utterances'] == 1


def test_label_quality_scores_all_and_kept():
    quality = label_quality(['a b', 'c d', 'e'], ['a b', 'x y', 'e'], [0.9, 0.2, 0.8],
                            [True, False, True], ['s', 't', 's'])  # fmt: skip
    assert quality['all']['wer']['value'] == 2 / 5
    assert quality['kept_only']['wer']['value'] == 0
    assert quality['kept_only']['utterances'] == quality['kept'] == 2
    assert json.loads(json.dumps(quality, allow_nan=False)) == quality


def test_label_quality_with_nothing_kept():
    quality = label_quality(['a'], ['b'], [0.1], [False])
    assert quality['kept_only'] is None and quality['kept_fraction'] == 0


def test_label_quality_needs_a_flag_for_each():
    with pytest.raises(ValueError, match='1 references but 2 kept flags'):
        label_quality(['a'], ['b'], [0.1], [False, True])
