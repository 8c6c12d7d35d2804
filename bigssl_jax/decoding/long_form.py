"""Recordings of any length: windows that overlap, and hypotheses joined where they do.

A model hears at most a window.  Windows overlap, so that whatever stands near the end of one, heard
with half of its context missing, stands well inside of the next.  Each window's tokens come with
absolute frames; two neighbours are joined at the middle of their overlap:

    window 0   |----------------------------|
    window 1                    |----------------------------|
    overlap                     |-----m-----|
    left         the cat sat    on  the  ma                        "ma": cut off by the window's end
    right                       an  the  mat   and  purred         "an": begun before its start
    matched                          |
    joined       the cat sat    on  the  mat   and  purred
                                   ^ cut

Cutting both at the time m is not enough: the two may place one token a frame before and a frame
behind m, and it would come twice, or never.  Joining the texts alone is not enough either: repeated
words match in wrong places, and where the two disagree there is nothing to join at.  So both are
used.  Tokens of the overlap are aligned by identity *and* time (equal tokens, at most `tolerance`
frames apart, as many as possible, in order; among equally many the pairs closest in time), and a
matched pair is one token: it lies before or behind m by its mean time, in both sequences alike.

    left   ..  a   b | c   x            pairs a-a, b-b, c-c; m behind b by the mean times
    right      a   b   c | y  ..        left gives all up to b, right all from c on:
                     ^ m                the cut never falls within a pair

Tokens without a partner go by their own time.  Where nothing matches, this is the cut at m; in
silence there is nothing to decide; and a window that hears nothing leaves the other's tokens up to
(or from) m.  The rule looks at one overlap at a time, so a recording of hours needs the memory of
its tokens, and no more.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

# Frames that two hearings of one token may lie apart: 0.4 s.  A full-context model moves a token by
# a frame or two when its context changes; words of one name are further apart.  [ours]
TOLERANCE = 10


class Piece(NamedTuple):
    """What was heard in a window or in a part of one, in absolute frames.

    Attributes:
      tokens: int [U].
      starts, ends: int [U], first frame and one past the last; starts never fall.
      confidences: float32 [U].
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    confidences: np.ndarray

    def part(self, first: int, last: int | None = None) -> 'Piece':
        """The tokens [first, last)."""
        return Piece(*(column[first:last] for column in self))


def check_windows(window: int, overlap: int) -> None:
    """Raises ValueError unless windows of `window` that overlap by `overlap` can be joined."""
    if not 0 < overlap <= window // 2:
        raise ValueError(
            f'windows of {window} overlap by {overlap}; the overlap must be above 0 and at most'
            ' half a window'
        )


def windows(
    blocks: Iterable[np.ndarray], window: int, overlap: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts a stream of samples into overlapping windows, holding one window and one block.

    Args:
      blocks: [n] arrays of one dtype, joined the whole recording.
      window, overlap: samples; windows start every `window - overlap`.

    Yields:
      (first sample, samples [S]).  All but the last have S = window; the last has the rest, which
      is more than the overlap unless it is the only one.  A recording of exactly one window gives
      one; one without samples gives none.
    """
    check_windows(window, overlap)
    start, held, parts = 0, 0, []
    for block in blocks:
        parts.append(block)
        held += len(block)
        # A window is cut when something follows it: the last one is known by its end.
        if held > window:
            joined = np.concatenate(parts)
            while len(joined) > window:
                yield start, joined[:window].copy()
                joined = joined[window - overlap :]
                start += window - overlap
            parts, held = [joined.copy()], len(joined)
    if held:
        yield start, np.concatenate(parts)


def join(
    left: Piece, right: Piece, start: int, end: int, tolerance: int = TOLERANCE
) -> tuple[Piece, Piece]:
    """Joins two neighbours in the frames [start, end) that both have heard.

    Args:
      left: of the earlier window, or what is left of it after the join before.
      right: of the later window.
      start, end: the overlap: where the later window begins and the earlier one ends.
      tolerance: frames that two hearings of one token may lie apart.

    Returns:
      (what stays of left, what stays of right); one after the other they are the joined hypothesis,
      with starts that never fall.
    """
    middle = (start + end) / 2
    first = int(np.searchsorted(left.starts, start - tolerance))
    last = int(np.searchsorted(right.starts, end + tolerance))
    near = left.part(first)
    pairs = matched(near, right.part(0, last), tolerance)
    times = [(near.starts[i] + right.starts[j]) / 2 for i, j in pairs]
    count = sum(time < middle for time in times)  # times rise: both sequences do
    low = (-1, -1) if count == 0 else pairs[count - 1]
    high = (len(near.tokens), len(right.tokens)) if count == len(pairs) else pairs[count]
    i = int(np.clip(np.searchsorted(near.starts, middle), low[0] + 1, high[0]))
    j = int(np.clip(np.searchsorted(right.starts, middle), low[1] + 1, high[1]))
    kept = left.part(0, first + i)
    return kept, _after(right.part(j), int(kept.ends[-1]) if len(kept.ends) else 0)


def _after(piece: Piece, frame: int) -> Piece:
    """The piece with no time before `frame`."""
    starts = np.maximum(piece.starts, frame)
    return piece._replace(starts=starts, ends=np.maximum(piece.ends, starts))


def matched(left: Piece, right: Piece, tolerance: int) -> list[tuple[int, int]]:
    """The longest common subsequence of two pieces, of tokens at most `tolerance` frames apart.

    Returns:
      [(index in left, index in right)], rising in both; of all longest ones the pairs whose times
      differ least in sum.
    """
    rows, columns = len(left.tokens), len(right.tokens)
    apart = np.abs(left.starts[:, None] - right.starts[None, :])
    allowed = (left.tokens[:, None] == right.tokens[None, :]) & (apart <= tolerance)
    # A pair is worth so much that no sum of differences can outweigh one more pair.
    worth = np.where(allowed, (tolerance + 1) * (min(rows, columns) + 1) - apart, 0)
    best: np.ndarray = np.zeros((rows + 1, columns + 1), np.int64)
    for i in range(rows):
        with_pair = best[i, :-1] + worth[i]
        # max over the row above and the pair, then the running maximum along the row.
        best[i + 1, 1:] = np.maximum.accumulate(np.maximum(best[i, 1:], with_pair))
    pairs = []
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


class Joiner:
    """Joins the windows of one recording as they come, in order.

    Args:
      tolerance: as in `join`.
    """

    def __init__(self, tolerance: int = TOLERANCE):
        self._tolerance = tolerance
        self._settled: list[Piece] = []
        self._tail: Piece | None = None
        self._end = 0

    def add(self, piece: Piece, start: int, end: int) -> None:
        """Adds the next window: its tokens, its first frame and one past its last."""
        if self._tail is not None:
            kept, piece = join(self._tail, piece, start, self._end, self._tolerance)
            self._settled.append(kept)
        self._tail, self._end = piece, end

    def joined(self) -> Piece:
        """The hypothesis of the whole recording."""
        pieces = [*self._settled, *([] if self._tail is None else [self._tail])]
        if not pieces:
            empty: np.ndarray = np.zeros(0, np.int32)
            return Piece(empty, empty, empty, np.zeros(0, np.float32))
        return Piece(*map(np.concatenate, zip(*pieces, strict=True)))
