"""Word and character error rates with their counts and bootstrap intervals.

    rate = (substitutions + deletions + insertions) / reference words

Counts are summed over utterances before dividing.  They come from jiwer's minimum edit distance.
An utterance whose reference is empty is kept: whatever is recognised there counts as insertions.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from bigssl_jax.evaluation import bootstrap

Unit = Literal['word', 'character']

REPLICATES = 2000
# Utterances aligned at once: jiwer keeps every alignment of a call.
_BATCH = 2048


@dataclasses.dataclass(frozen=True)
class ErrorCounts:
    """Edit counts per utterance, each int64 [N].

    Attributes:
      substitutions: words replaced.
      deletions: reference words missing from the hypothesis.
      insertions: hypothesis words that match nothing.
      reference_words: words of the reference (characters for a character error rate).
    """

    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray
    reference_words: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Substitutions + deletions + insertions, int64 [N]."""
        return self.substitutions + self.deletions + self.insertions


@dataclasses.dataclass(frozen=True)
class WerResult:
    """An error rate over a test set.

    Attributes:
      wer: errors / reference words; NaN when the references hold no word at all.
      substitutions: total over the set; likewise `deletions`, `insertions`.
      reference_words: words of all references (characters for `cer`).
      interval: bootstrap interval (low, high); NaN when there are fewer than two units to resample.
      utterances: number of utterances.
      resampled: what was resampled, 'speaker' or 'utterance'.
      units: number of such units.
    """

    wer: float
    substitutions: int
    deletions: int
    insertions: int
    reference_words: int
    interval: tuple[float, float]
    utterances: int
    resampled: str
    units: int

    def to_json(self) -> dict[str, Any]:
        """The entry that scores.json holds; rates that are not defined are null."""
        return {
            'value': finite_or_none(self.wer),
            'low': finite_or_none(self.interval[0]),
            'high': finite_or_none(self.interval[1]),
            's': self.substitutions,
            'd': self.deletions,
            'i': self.insertions,
            'words': self.reference_words,
            'resampled': self.resampled,
            'units': self.units,
        }


def wer(
    references: Sequence[str],
    hypotheses: Sequence[str],
    speakers: Sequence[str | None] | None = None,
    *,
    replicates: int = REPLICATES,
    level: float = 0.95,
    seed: int = 0,
) -> WerResult:
    """Word error rate of `hypotheses` against `references`, with a bootstrap interval.

    Args:
      references: N normalised texts; empty ones are allowed.
      hypotheses: N normalised texts.
      speakers: N speakers; the bootstrap resamples speakers when there are at least two, else
        utterances.
      replicates: bootstrap resamples.
      level: probability of the interval.
      seed: of the resampling; equal seeds give equal intervals.

    Returns:
      The rate, its counts and its interval.

    Raises:
      ValueError: no utterances, or lists of different lengths.
    """
    counts = count_errors(references, hypotheses, 'word')
    return summarise(counts, speakers, replicates=replicates, level=level, seed=seed)


def cer(
    references: Sequence[str],
    hypotheses: Sequence[str],
    speakers: Sequence[str | None] | None = None,
    *,
    replicates: int = REPLICATES,
    level: float = 0.95,
    seed: int = 0,
) -> WerResult:
    """Character error rate: as `wer`, over characters; a space counts as a character."""
    counts = count_errors(references, hypotheses, 'character')
    return summarise(counts, speakers, replicates=replicates, level=level, seed=seed)


def count_errors(
    references: Sequence[str], hypotheses: Sequence[str], unit: Unit = 'word'
) -> ErrorCounts:
    """Edit counts of each utterance.

    Raises:
      ValueError: no utterances, lists of different lengths, or a single text instead of a list.
    """
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise ValueError('references and hypotheses must be lists of texts, not one text')
    if len(references) != len(hypotheses):
        raise ValueError(
            f'{len(references)} references but {len(hypotheses)} hypotheses; give pairs'
        )
    if not references:
        raise ValueError('no utterances to score')
    import jiwer

    process = {'word': jiwer.process_words, 'character': jiwer.process_characters}[unit]
    rows: list[tuple[int, int, int, int]] = []
    for first in range(0, len(references), _BATCH):
        part = slice(first, first + _BATCH)
        output = process(list(references[part]), list(hypotheses[part]))
        for reference, chunks in zip(output.references, output.alignments, strict=True):
            rows.append((*_edits(chunks), len(reference)))
    return ErrorCounts(*np.array(rows, np.int64).T)


def _edits(chunks: Sequence[Any]) -> tuple[int, int, int]:
    """(substitutions, deletions, insertions) of one alignment."""
    edits = {'substitute': 0, 'delete': 0, 'insert': 0, 'equal': 0}
    for chunk in chunks:
        # A deletion spans no hypothesis words, an insertion no reference words.
        spans = chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
        edits[chunk.type] += max(spans)
    return edits['substitute'], edits['delete'], edits['insert']


def summarise(
    counts: ErrorCounts,
    speakers: Sequence[str | None] | None = None,
    *,
    replicates: int = REPLICATES,
    level: float = 0.95,
    seed: int = 0,
) -> WerResult:
    """The rate, totals and interval of per-utterance `counts`; arguments as for `wer`."""
    errors, words = counts.errors, counts.reference_words
    units, resampled = bootstrap.units_of(len(words), speakers)
    totals = bootstrap.unit_totals(np.stack([errors, words], 1), units)
    low = high = float('nan')
    if len(totals) > 1:
        sums = bootstrap.resampled_sums(totals, replicates, seed)
        low, high = bootstrap.interval(bootstrap.ratio(sums[:, 0], sums[:, 1]), level)
    return WerResult(
        wer=float(bootstrap.ratio(errors.sum(), words.sum())),
        substitutions=int(counts.substitutions.sum()),
        deletions=int(counts.deletions.sum()),
        insertions=int(counts.insertions.sum()),
        reference_words=int(words.sum()),
        interval=(low, high),
        utterances=len(words),
        resampled=resampled,
        units=len(totals),
    )


def finite_or_none(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return float(value) if math.isfinite(value) else None
