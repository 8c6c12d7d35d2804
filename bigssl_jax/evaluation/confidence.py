"""Do the teacher's confidences tell good labels from bad?  Label error against confidence.

Two views of the same utterances, both against true transcripts:

- calibration: utterances in bins of equal confidence range; the mean confidence of a bin against
  the share of its reference words that are right (1 - WER, at least 0), which it should equal.
- kept fraction: keep the most confident share of the utterances; the WER of what is kept.  A useful
  confidence makes this rise from left to right.

Only possible where the truth is known: on the dev set, or where labelled data play unlabelled.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bigssl_jax.evaluation.score import score_texts
from bigssl_jax.evaluation.wer import count_errors


def calibration(
    confidence: np.ndarray, errors: np.ndarray, words: np.ndarray, bins: int = 10
) -> list[dict[str, Any]]:
    """Confidence against accuracy, by bins of equal range over [0, 1]; empty bins are left out.

    Args:
      confidence: utterance confidences in [0, 1], float [N].
      errors: word errors, int [N].
      words: reference words, int [N].
      bins: number of bins.

    Returns:
      Rows {low, high, confidence (mean), accuracy (None without reference words), utterances,
      words}, ascending.

    Raises:
      ValueError: lengths differ, or a confidence outside [0, 1] or not a number.
    """
    confidence, errors, words = _checked(confidence, errors, words)
    # A float32 mean of ones may exceed 1 by a rounding error.
    outside = (confidence < 0) | (confidence > 1 + 1e-6)
    if outside.any():
        raise ValueError(f'confidence {confidence[outside][0]} is outside [0, 1]')
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = []
    for n in np.unique(place):
        chosen = place == n
        total = int(words[chosen].sum())
        rows.append(
            {
                'low': n / bins,
                'high': (n + 1) / bins,
                'confidence': float(confidence[chosen].mean()),
                'accuracy': max(0.0, 1 - float(errors[chosen].sum() / total)) if total else None,
                'utterances': int(chosen.sum()),
                'words': total,
            }
        )
    return rows


def calibration_error(rows: Sequence[dict[str, Any]]) -> float | None:
    """Expected calibration error: mean |confidence - accuracy| of `calibration` rows, by words."""
    known = [row for row in rows if row['accuracy'] is not None]
    total = sum(row['words'] for row in known)
    gaps = sum(row['words'] * abs(row['confidence'] - row['accuracy']) for row in known)
    return gaps / total if total else None


def kept_curve(
    confidence: np.ndarray, errors: np.ndarray, words: np.ndarray, points: int = 20
) -> list[dict[str, Any]]:
    """WER of the most confident utterances, for `points` shares of them.

    Args:
      confidence: any score that grows with certainty, float [N]; ties are kept together.
      errors: word errors, int [N].
      words: reference words, int [N].
      points: shares 1/points, 2/points, ... 1.

    Returns:
      Rows {fraction, threshold (the least confidence kept), utterances, words, wer (None without
      reference words)}, by growing fraction.

    Raises:
      ValueError: lengths differ, no utterances, or a confidence that is not a number.
    """
    confidence, errors, words = _checked(confidence, errors, words)
    order = np.argsort(-confidence, kind='stable')
    ranked = confidence[order]
    errors_so_far, words_so_far = np.cumsum(errors[order]), np.cumsum(words[order])
    # A threshold cannot part equal confidences, so a share grows to the end of its ties.
    wanted = np.ceil(np.arange(1, points + 1) / points * len(order)).astype(int)
    ends = np.searchsorted(-ranked, -ranked[wanted - 1], side='right')
    return [
        {
            'fraction': float(end / len(order)),
            'threshold': float(ranked[end - 1]),
            'utterances': int(end),
            'words': int(words_so_far[end - 1]),
            'wer': float(errors_so_far[end - 1] / words_so_far[end - 1])
            if words_so_far[end - 1]
            else None,
        }
        for end in np.unique(ends)
    ]


def _checked(
    confidence: np.ndarray, errors: np.ndarray, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    confidence = np.asarray(confidence, np.float64)
    errors, words = np.asarray(errors, np.int64), np.asarray(words, np.int64)
    if not len(confidence) == len(errors) == len(words):
        raise ValueError(
            f'{len(confidence)} confidences, {len(errors)} error counts and {len(words)} word'
            ' counts; give one of each for every utterance'
        )
    if not len(confidence):
        raise ValueError('no utterances')
    if np.isnan(confidence).any():
        raise ValueError('a confidence is not a number')
    return confidence, errors, words


def label_quality(
    references: Sequence[str],
    labels: Sequence[str],
    confidence: Sequence[float],
    kept: Sequence[bool],
    speakers: Sequence[str | None] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What a pseudo-label stage stores as quality.json when the truth is known.

    Args:
      references: N true texts, normalised.
      labels: N texts of the teacher, normalised.
      confidence: N utterance confidences in [0, 1].
      kept: N flags: whether the filter kept the label.
      speakers: N speakers, for the intervals.
      seed: of the intervals.

    Returns:
      {'utterances': N, 'kept': n, 'kept_fraction': n / N,
       'all': {'wer', 'cer', 'utterances'},              as in scores.json
       'kept_only': likewise, or None when none were kept,
       'calibration': rows of `calibration`, 'calibration_error': float or None,
       'kept_curve': rows of `kept_curve`}.

    Raises:
      ValueError: lengths differ or there are no utterances.
    """
    chosen = np.flatnonzero(np.asarray(kept, bool)).tolist()
    if len(kept) != len(references):
        raise ValueError(f'{len(references)} references but {len(kept)} kept flags')
    counts = count_errors(references, labels)
    arrays = np.asarray(confidence, np.float64), counts.errors, counts.reference_words
    rows = calibration(*arrays)
    return {
        'utterances': len(references),
        'kept': len(chosen),
        'kept_fraction': len(chosen) / len(references),
        'all': score_texts(references, labels, speakers, seed),
        'kept_only': score_texts(
            [references[n] for n in chosen],
            [labels[n] for n in chosen],
            [speakers[n] for n in chosen] if speakers is not None else None,
            seed,
        )
        if len(chosen)
        else None,
        'calibration': rows,
        'calibration_error': calibration_error(rows),
        'kept_curve': kept_curve(*arrays),
    }
