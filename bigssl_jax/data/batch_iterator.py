"""Reads batches ahead in threads and gives them out in order."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator

import numpy as np

Batch = dict[str, np.ndarray]


class BatchIterator(Iterator[Batch]):
    """Batches in order, read ahead in threads; a context manager. Made by `Stream.batches`."""

    def __init__(
        self,
        read: Callable[[int], Batch],
        start: int,
        end: int | None,
        prefetch: int,
        threads: int,
    ):
        self._read, self._next, self._end = read, int(start), end
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, 'bigssl-batches')
        self._ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        self._prefetch = max(1, prefetch)
        self._closed = False
        self._fill()

    def __next__(self) -> Batch:
        if self._closed or not self._ahead:
            self.close()
            raise StopIteration
        batch = self._ahead.popleft().result()
        self._fill()
        return batch

    def __enter__(self) -> 'BatchIterator':
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops reading ahead; no thread is left behind."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def _fill(self) -> None:
        while len(self._ahead) < self._prefetch and (self._end is None or self._next < self._end):
            self._ahead.append(self._pool.submit(self._read, self._next))
            self._next += 1
