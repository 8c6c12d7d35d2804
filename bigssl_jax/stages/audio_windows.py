"""Audio files as batches of windows: read block by block, like lengths together, memory bounded.

    files --blocks--> --windows of at most `window` seconds--> one waiting list for each length
    a list that is full is a batch; so is the list whose oldest window has waited too long

The lists together never hold more than a batch of each length, however long a file or a folder is.
What follows from a window's number (its file, its place there) is kept until it has been decoded.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from bigssl_jax.config import UserError
from bigssl_jax.data.audio_blocks import read_blocks
from bigssl_jax.data.errors import BadAudio
from bigssl_jax.decoding.long_form import windows

RATE = 16000
BATCH_SECONDS = 120.0
# Lengths are rounded up to these, or to a whole window: few programs to compile.
LENGTHS = (2.0, 4.0, 8.0, 16.0)
# A window waits for its like until so many others have come.
PATIENCE = 256
SHORTEST_WINDOW = 1.0

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Windowing:
    """How files are cut.

    Attributes:
      window: samples of a window, at most.
      overlap: samples that neighbours share.
      frame: samples of an encoder frame; windows start on whole frames.
    """

    window: int
    overlap: int
    frame: int

    @classmethod
    def of_seconds(cls, window: float, overlap: float, frame: int) -> 'Windowing':
        """From seconds; the overlap grows by less than a frame, so that frames fall together.

        Raises:
          UserError: a window that is too short, or an overlap above half of it.
        """
        if not window >= SHORTEST_WINDOW:
            raise UserError(
                f'--window {window:g} is too short; give at least {SHORTEST_WINDOW:g} seconds'
            )
        samples = round(window * RATE)
        step = (samples - round(overlap * RATE)) // frame * frame
        if not (overlap > 0 and samples - step <= samples // 2):
            raise UserError(
                f'--overlap {overlap:g} does not fit --window {window:g}; give more than 0 and less'
                ' than half a window'
            )
        return cls(samples, samples - step, frame)


class Place(NamedTuple):
    """Where a window stands: which file, the how-manieth window there, its samples."""

    file: int
    turn: int
    start: int
    size: int


class AudioWindows:
    """The windows of files, in batches for a recogniser.

    Args:
      paths: the files.
      windowing: how they are cut.
      multiple: rows of a batch are a multiple of this.

    Attributes:
      places: window number (`utterances` of a batch) -> Place; the reader of results removes it.
      counts: file -> windows, known once the file has been read to its end.
      samples: file -> samples, likewise.
      errors: file -> why it could not be read (to its end).
    """

    def __init__(self, paths: Sequence[pathlib.Path], windowing: Windowing, multiple: int):
        self._paths, self._windowing = paths, windowing
        window = windowing.window
        lengths = [round(s * RATE) for s in LENGTHS if round(s * RATE) < window]
        rows = [int(BATCH_SECONDS * RATE / length) for length in (*lengths, window)]
        self._sizes = {
            length: max(1, count // multiple) * multiple
            for length, count in zip((*lengths, window), rows, strict=True)
        }
        self.places: dict[int, Place] = {}
        self.counts: dict[int, int] = {}
        self.samples: dict[int, int] = {}
        self.errors: dict[int, str] = {}

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches (see CONTRIBUTING.md) whose `utterances` are window numbers."""
        waiting: dict[int, collections.deque] = {n: collections.deque() for n in self._sizes}
        number = 0
        for number, (place, samples) in enumerate(self._windows()):
            self.places[number] = place
            length = next(n for n in self._sizes if len(samples) <= n)
            waiting[length].append((number, samples))
            for length, held in waiting.items():
                if len(held) == self._sizes[length] or (held and number - held[0][0] >= PATIENCE):
                    yield self._batch(length, held)
        for length, held in waiting.items():
            if held:
                yield self._batch(length, held)

    def _windows(self) -> Iterator[tuple[Place, np.ndarray]]:
        given = self._windowing
        for file, path in enumerate(self._paths):
            turn = end = 0
            try:
                cut = windows(read_blocks(path), given.window, given.overlap)
                for turn, (start, samples) in enumerate(cut, 1):
                    end = start + len(samples)
                    yield Place(file, turn - 1, start, len(samples)), samples
            except BadAudio as error:
                self.errors[file] = str(error)
                if error.reason == 'unreadable':
                    self.errors[file] += '; convert it to wav or flac'
            except OSError as error:
                self.errors[file] = f'{path}: {error.strerror or error}'
            self.samples[file], self.counts[file] = end, turn

    def _batch(self, length: int, held: collections.deque) -> dict[str, np.ndarray]:
        """Empties a waiting list into a batch; rows are filled up with silence."""
        size = self._sizes[length]
        audio = np.zeros((size, length), np.int16)
        counts, numbers = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        for row, (number, samples) in enumerate(held):
            audio[row, : len(samples)] = samples
            counts[row], numbers[row] = len(samples), number
        held.clear()
        return {
            'audio': audio,
            'sample_counts': counts,
            'rows': np.arange(size, dtype=np.int32),
            'utterances': numbers,
            'sources': np.minimum(numbers, 0),
        }


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is being used."""
    with ThreadPoolExecutor(1, 'bigssl-audio') as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item
