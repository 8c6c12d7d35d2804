"""From tokens to words with times and confidences, on the host.

    pieces      ▁th  e  ▁c  at          a piece may begin with the boundary mark "▁" (or a space)
    words       the     cat

A character model has the mark as a piece of its own; it ends the word before it and belongs to
none.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

BOUNDARIES = ('\u2581', ' ')
UNKNOWN_TEXT = '\u2047'  # what sentencepiece shows for an unknown piece


class Word(NamedTuple):
    """One word of a hypothesis.

    Attributes:
      text: without boundary marks.
      start, end: seconds.
      confidence: mean over its tokens.
    """

    text: str
    start: float
    end: float
    confidence: float


def words(
    tokens: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    confidences: Sequence[float],
    pieces: Sequence[str],
    frame_seconds: float = 0.04,
    skip: Iterable[int] = (0, 1),
    unknown: int | None = 2,
) -> list[Word]:
    """Groups the tokens of one hypothesis into words.

    Args:
      tokens: ids, without blanks; cut to `token_counts` by the caller.
      starts, ends: frames of each token, end exclusive.
      confidences: of each token.
      pieces: id -> piece.
      frame_seconds: duration of a frame.
      skip: ids without text (padding, end of sentence).
      unknown: id of the unknown piece, shown as a word of its own, or None.

    Returns:
      Words in order.  `' '.join(word.text for word in result)` is the hypothesis' text.

    Raises:
      ValueError: a token that `pieces` lacks, or sequences of unequal length.
    """
    if not len(tokens) == len(starts) == len(ends) == len(confidences):
        raise ValueError(
            f'words: {len(tokens)} tokens, {len(starts)} starts, {len(ends)} ends, '
            f'{len(confidences)} confidences; these must be equally many'
        )
    hidden = frozenset(skip)
    done: list[Word] = []
    parts: list[tuple[str, float, float, float]] = []

    def close() -> None:
        if parts:
            done.append(_join(parts))
            parts.clear()

    for token, start, end, confidence in zip(tokens, starts, ends, confidences, strict=True):
        token = int(token)
        if token in hidden:
            continue
        if not 0 <= token < len(pieces):
            raise ValueError(f'words: token {token} is outside the table of {len(pieces)} pieces')
        times = (int(start) * frame_seconds, int(end) * frame_seconds, float(confidence))
        if token == unknown:
            close()
            parts.append((UNKNOWN_TEXT, *times))
            close()
            continue
        # A piece may hold marks inside as well (a model trained across words).
        for i, text in enumerate(_split(pieces[token])):
            if i:
                close()
            if text:
                parts.append((text, *times))
    close()
    return done


def words_of(result: Any, row: int, pieces: Sequence[str], **options: Any) -> list[Word]:
    """`words` of one row of a `GreedyResult` that was brought to the host."""
    count = int(result.token_counts[row])
    return words(
        result.tokens[row][:count],
        result.token_start_frames[row][:count],
        result.token_end_frames[row][:count],
        result.token_confidence[row][:count],
        pieces,
        **options,
    )


def _join(parts: list[tuple[str, float, float, float]]) -> Word:
    """One word of its tokens' (text, start, end, confidence)."""
    confidence = sum(part[3] for part in parts) / len(parts)
    return Word(''.join(part[0] for part in parts), parts[0][1], parts[-1][2], confidence)


def _split(piece: str) -> list[str]:
    """The piece cut at boundary marks: '▁ab' -> ['', 'ab'], 'ab' -> ['ab'], '▁' -> ['', '']."""
    for mark in BOUNDARIES[1:]:
        piece = piece.replace(mark, BOUNDARIES[0])
    return piece.split(BOUNDARIES[0])
