"""SIGTERM and SIGINT finish the step, save, and stop; a second one stops at once."""

import contextlib
import os
import signal
from collections.abc import Iterator

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: run the same command again to continue


class Stopped(Exception):
    """Training was asked to stop; its state is on disk and the same command continues it."""


class StopRequest:
    """Whether a stop has been asked for."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True
        # Not print: the signal may have come in the middle of one, which cannot be entered again.
        os.write(1, b'\nstopping after this step (again: at once) ...\n')


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Installs the handlers for the duration of a stage (main thread only)."""
    request = StopRequest()
    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, request._handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
