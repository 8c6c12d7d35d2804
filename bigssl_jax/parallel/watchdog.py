"""A watchdog over the steps of a stage: it says where a step hangs, and ends the process.

    no step ended for one period    the stacks of all threads, on standard error and in a file
    nor for a second one            exit code 77: the scheduler may start the run again

The watching thread needs Python to run.  Where native code hangs and keeps the interpreter's lock,
`faulthandler`, which does not need it, prints the stacks after three periods and exits with 1.
"""

import faulthandler
import os
import pathlib
import threading
import time
from types import TracebackType

from bigssl_jax.parallel.distributed import end_all

EXIT_HUNG = 77
_STDERR = 2


class Watchdog:
    """Watches between `with` and its end; `feed` it whenever a step has ended.

    Args:
      name: of the stage, for the message.
      minutes: the period; 0: no watching.
      stacks: file for the stacks; written only when a step hangs.
    """

    def __init__(self, name: str, minutes: float, stacks: pathlib.Path):
        self._name, self._period, self._stacks = name, 60.0 * minutes, stacks
        self._closed = threading.Event()
        self._fed = self._armed = 0.0

    def __enter__(self) -> 'Watchdog':
        if self._period:
            self.feed()
            threading.Thread(target=self._watch, name='bigssl-watchdog', daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        if self._period:
            faulthandler.cancel_dump_traceback_later()

    def feed(self) -> None:
        """A step has ended."""
        if not self._period:
            return
        self._fed = time.monotonic()
        if self._fed - self._armed > self._period / 100:  # arming starts a thread
            self._armed = self._fed
            faulthandler.dump_traceback_later(3 * self._period, exit=True, file=_STDERR)

    def _watch(self) -> None:
        while True:
            fed = self._fed
            if self._closed.wait(max(0.0, fed + self._period - time.monotonic())):
                return
            if self._fed != fed:
                continue
            self._dump()
            if self._closed.wait(self._period):
                return
            if self._fed == fed:
                self._end()

    def _dump(self) -> None:
        waited = f'{self._period / 60:g} minutes'
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with self._stacks.open('a') as file:
            file.write(f'{time.strftime("%F %T")} {self._name}: no step ended for {waited}\n')
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        os.write(_STDERR, f'{self._name}: no step ended for {waited}; stacks:\n'.encode())
        faulthandler.dump_traceback(_STDERR, all_threads=True)

    def _end(self) -> None:
        end_all(
            EXIT_HUNG,
            f'{self._name}: no step ended for {2 * self._period / 60:g} minutes'
            f' (compute.watchdog_minutes={self._period / 60:g}); {self._stacks} says where',
        )
