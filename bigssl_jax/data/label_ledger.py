"""Who makes which part of a label set: any number of workers that know nothing of each other.

    DIR/ledger/part-00003.claim-0001   {"host", "pid", ...} of the first who took part 3
    DIR/ledger/part-00003.claim-0002   of who took it over; of several claims the highest counts
    DIR/ledger/part-00003.json         rows, bytes, hash: written, read back and found right

    free --take--> claimed --write--> done (the Parquet file) --read back--> verified (the .json)
      ^                |
      +-- lease over --+

A claim is a file that only one process can create.  While it works its file is touched; a worker
that was killed, stopped or cut off no longer touches it, and when the lease is over anyone may take
the part.  Taking over creates the claim of the *next* number instead of removing the old one, so
that of any number who try at once exactly one succeeds, however late they looked.

A late former owner does no harm: parts are created, never overwritten (`create_atomically`), so the
first complete file stays.  Ages are measured by the clock of the file system alone: hosts whose
clocks differ agree on them.  A worker that died on this machine is known at once, without waiting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from bigssl_jax.data.errors import DataError

FOLDER = 'ledger'
SET = 'set'  # the item whose owner completes the set
_RENEWALS = 6  # in one lease
_CLAIM = '.claim-'


def worker() -> dict[str, Any]:
    """This process, so that others can tell whether it is still there."""
    return {
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'machine': _machine(),
        'started': _start_time(os.getpid()),
        'time': round(time.time(), 3),
    }


def _machine() -> str:
    """Where process numbers mean the same: this boot of this kernel, this container."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as file:
            return f'{file.read().strip()} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return ''


def _start_time(pid: int) -> str | None:
    """When a process began, in ticks since boot; None when there is no such process, or zombie."""
    try:
        with open(f'/proc/{pid}/stat', 'rb') as file:
            fields = file.read().rpartition(b')')[2].split()
    except OSError:
        return None
    return None if fields[0] in (b'Z', b'X') else fields[19].decode()


@dataclasses.dataclass(frozen=True)
class Claim:
    """One item in this worker's hands; renewed as long as a `with` block over it lasts.

    Leaving the block by an exception gives the item back at once.

    Attributes:
      ledger: where it stands.
      item: its name.
      number: of the claim file.
    """

    ledger: Ledger
    item: str
    number: int
    _ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def path(self) -> str:
        return self.ledger.claim_path(self.item, self.number)

    def is_mine(self) -> bool:
        """Whether nobody has taken it over."""
        later = self.ledger.claim_path(self.item, self.number + 1)
        return os.path.exists(self.path) and not os.path.exists(later)

    def __enter__(self) -> Claim:
        threading.Thread(target=self._renew, name='bigssl-lease', daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._ended.set()
        if error is not None:
            with contextlib.suppress(OSError):
                os.utime(self.path, (0, 0))  # as old as can be: anyone may take it over

    def done(self) -> None:
        """Removes the claims of an item that needs none any more, oldest first."""
        for number in range(1, self.number + 1):
            with contextlib.suppress(OSError):
                os.remove(self.ledger.claim_path(self.item, number))

    def _renew(self) -> None:
        while not self._ended.wait(self.ledger.lease_seconds / _RENEWALS):
            # A failure may pass; one that lasts costs the lease, and then another does the work.
            with contextlib.suppress(OSError):
                os.utime(self.path)


class Ledger:
    """The claims on the parts of one label set.

    Args:
      directory: of the label set; `ledger/` is made in it.
      lease_seconds: a claim that was not renewed for so long may be taken over.

    Raises:
      DataError: the folder cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, lease_seconds: float = 300.0):
        self.directory = os.path.join(os.fspath(directory), FOLDER)
        self.lease_seconds = float(lease_seconds)
        self._worker = worker()
        with one_line(self.directory):
            os.makedirs(self.directory, exist_ok=True)

    @property
    def poll_seconds(self) -> float:
        """How long to wait before looking again for what others have in hand."""
        return min(2.0, self.lease_seconds / 10)

    def claim_path(self, item: str, number: int) -> str:
        """The file of the `number`-th claim on an item."""
        return os.path.join(self.directory, f'{item}{_CLAIM}{number:04d}')

    def take(self, items: Sequence[str]) -> Claim | None:
        """Claims the first of some items that is free or whose owner is gone; None: none is.

        DataError when the folder cannot be written.
        """
        with one_line(self.directory):
            newest = self._newest()
            now = None
            for item in items:
                number = newest.get(item, 0)
                if number and now is None:
                    now = self._now()
                if number and not self._is_gone(self.claim_path(item, number), now or 0.0):
                    continue
                if self._create(self.claim_path(item, number + 1)):
                    return Claim(self, item, number + 1)
        return None

    def owners(self) -> dict[str, dict[str, Any]]:
        """Who claims what: item -> what `worker` says of its newest claim's process."""
        found = {}
        for item, number in self._newest().items():
            with contextlib.suppress(OSError):
                found[item] = _read(self.claim_path(item, number))[0]
        return found

    def clear(self) -> None:
        """Removes claims and what killed workers left, once the set is complete."""
        for directory in (self.directory, os.path.dirname(self.directory)):
            for name in os.listdir(directory):
                if _CLAIM in name or name.endswith('.tmp') or name.startswith('.clock'):
                    with contextlib.suppress(OSError):
                        os.remove(os.path.join(directory, name))

    def _newest(self) -> dict[str, int]:
        newest: dict[str, int] = {}
        for name in os.listdir(self.directory):
            item, mark, number = name.partition(_CLAIM)
            if mark and number.isdigit():
                newest[item] = max(newest.get(item, 0), int(number))
        return newest

    def _create(self, path: str) -> bool:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, 'wb') as file:
                file.write(json.dumps(self._worker | {'time': round(time.time(), 3)}).encode())
        except OSError:  # a full disk: nobody would know whose claim it is
            with contextlib.suppress(OSError):
                os.utime(path, (0, 0))
            raise
        return True

    def _is_gone(self, path: str, now: float) -> bool:
        try:
            owner, renewed = _read(path)
        except FileNotFoundError:
            return False  # its work has just been done
        if now - renewed > self.lease_seconds:
            return True
        here = self._worker['machine'] and owner.get('machine') == self._worker['machine']
        return bool(here) and _start_time(owner['pid']) != owner['started']

    def _now(self) -> float:
        """The file system's clock, which also dates the claims."""
        path = os.path.join(self.directory, f'.clock-{secrets.token_hex(8)}')
        with open(path, 'wb') as file:
            now = os.fstat(file.fileno()).st_mtime
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        return now


def _read(path: str) -> tuple[dict[str, Any], float]:
    """Who made a claim ({} while it is being written), and when it was renewed."""
    with open(path, 'rb') as file:  # opened, not only looked at: NFS then asks the server
        renewed = os.fstat(file.fileno()).st_mtime
        try:
            owner = json.loads(file.read())
        except ValueError:
            owner = {}
    return owner, renewed


@contextlib.contextmanager
def one_line(directory: str) -> Iterator[None]:
    """What a disk or a permission forbids, as a DataError that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f'{directory}: cannot be written: {reason}') from None


def item_of(part: int) -> str:
    """The name of a part in the ledger."""
    return f'part-{part:05d}'
