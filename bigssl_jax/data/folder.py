"""Writing to a folder that may be killed, shared or full at any moment.

A file appears under its name complete or not at all: written under a temporary name, flushed to the
disk, renamed. A folder has one writer at a time, by a lock that the operating system drops when its
holder dies, so that no stale lock can ever stand in the way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
from collections.abc import Callable, Iterator

from bigssl_jax.data.errors import DataError

LOCK = '.lock'
TEMPORARY = '.tmp'
# How file systems without hard links refuse one.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Yields a temporary name to write to; at the end of the block it becomes `path`."""
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(os.path.dirname(path) or '.')
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def create_atomically(path: str, content: bytes) -> bool:
    """Writes a file that is there complete or not at all, and never over another one.

    Of several that create the same file, on any hosts, one wins; the others' content is dropped.

    Returns:
      Whether the file is this one.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
        _sync(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            # A mounted bucket: two that come here in the same instant are not told apart, and the
            # later one's file, just as complete, is the one that stays.
            if os.path.exists(path):
                return False
            os.replace(temporary, path)
        _sync(os.path.dirname(path) or '.')
        return True
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _temporary(path: str) -> str:
    """A name beside `path` that no other process chooses, on this host or another."""
    return f'{path}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}'


def write_atomically(path: str, content: bytes) -> None:
    """Writes a small file so that it is there complete or not at all."""
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        file.write(content)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(directory: str) -> None:
    """Removes what killed writers left behind; only the holder of the folder's lock may."""
    for name in os.listdir(directory):
        if name.endswith(TEMPORARY):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(directory, name))


@contextlib.contextmanager
def folder_lock(directory: str) -> Iterator[None]:
    """Makes `directory` if needed and holds it alone; DataError names the process that has it.

    A folder that holds other people's files is refused: nothing is ever written among them.
    """
    path = os.path.join(directory, LOCK)
    try:
        os.makedirs(directory, exist_ok=True)
        others = [name for name in os.listdir(directory) if name != LOCK]
        if others and not os.path.exists(path):
            raise DataError(
                f'{directory}: holds other files ({", ".join(sorted(others)[:3])}); '
                'choose a new or an empty folder'
            )
    except OSError as error:
        raise DataError(f'{directory}: cannot be written to: {error.strerror or error}') from None
    with file_lock(path):
        yield


def _give_up(holder: str) -> bool:
    return False


@contextlib.contextmanager
def file_lock(path: str, wait: Callable[[str], bool] = _give_up) -> Iterator[int]:
    """Holds the file `path` alone, made if needed; yields its handle.

    A process that inherits the handle keeps the lock as long as it lives.

    Args:
      path: the file; what it guards is the folder around it.
      wait: called with the name of the process that has it, as long as there is one: takes its
        time and says whether to try again.  The default does not wait.

    Raises:
      DataError: another process has it, or the file cannot be made.
    """
    directory = os.path.dirname(path)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(f'{directory}: cannot be written to: {error.strerror or error}') from None
    try:
        while not _locked(handle):
            holder = os.pread(handle, 200, 0).decode(errors='replace') or 'unknown'
            if not wait(holder):
                raise DataError(
                    f'{directory}: another process is at work on this folder ({holder}); '
                    'wait for it to end, or choose another folder'
                )
        os.ftruncate(handle, 0)
        os.pwrite(handle, f'process {os.getpid()} on {socket.gethostname()}'.encode(), 0)
        os.fsync(handle)
        yield handle
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
