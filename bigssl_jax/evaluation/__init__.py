"""Scores: word and character error rates with intervals, paired tests, label quality, the report.

    references, hypotheses  --wer, cer-->  counts, rate, 95 % interval     (wer.py, bootstrap.py)
    two systems             --paired_test-->  difference, interval, p      (significance.py)
    JSON Lines files        --score_command-->  table, alignments          (score.py, alignment.py)
    label confidences       --label_quality-->  calibration, kept curves   (confidence.py)
    a workdir               --result_table-->  rows; --write_report-->  one HTML page

Texts arrive normalised: this room compares words as they are.  It imports neither JAX nor
TensorFlow.
"""

from bigssl_jax.evaluation.significance import PairedTest, paired_test
from bigssl_jax.evaluation.wer import ErrorCounts, WerResult, cer, count_errors, wer

__all__ = [
    'ErrorCounts',
    'PairedTest',
    'WerResult',
    'cer',
    'count_errors',
    'paired_test',
    'wer',
]
