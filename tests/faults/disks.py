"""A small file system that can really be full or read-only.

It is a tmpfs in a mount namespace of its own: nobody else sees it, and nothing of it is left
when the process that holds it has ended, however that came about:

    holder    unshare --mount: mount -t tmpfs -o size=... POINT, then sleeps
    command   nsenter --mount of the holder: sees the tmpfs at POINT
    the test  sees it through /proc/<holder>/root/POINT

Root needs no more than that; others need a kernel that lets them have a user namespace.
"""

import contextlib
import errno
import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


class Disk:
    """A mounted tmpfs.

    Attributes:
      path: where commands that run `inside` find it.
      seen: where this process does.
      inside: the words to put before a command.
    """

    def __init__(self, path: pathlib.Path, holder: subprocess.Popen, user: tuple[str, ...]):
        self.path, self.seen = path, pathlib.Path(f'/proc/{holder.pid}/root{path}')
        self.inside = ('nsenter', f'--target={holder.pid}', *user, '--mount', f'--wd={ROOT}')

    def remount(self, options: str) -> None:
        """`ro`, `rw` or `size=16m`."""
        self._do('mount', '-o', f'remount,{options}', str(self.path))

    def protect(self, folder: pathlib.Path) -> None:
        """Makes one folder read-only; its own files stay as they are."""
        self._do('mount', '--bind', str(folder), str(folder))
        self._do('mount', '-o', 'remount,bind,ro', str(folder))

    def unprotect(self, folder: pathlib.Path) -> None:
        """Makes it writable again."""
        self._do('umount', str(folder))

    def fill(self) -> None:
        """Leaves not a byte."""
        with (self.seen / 'ballast').open('ab', buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        with pytest.raises(OSError) as full:
            (self.seen / 'one-more').write_bytes(b'x')
        assert full.value.errno == errno.ENOSPC
        (self.seen / 'one-more').unlink(missing_ok=True)

    def empty(self) -> None:
        """Takes away what `fill` has written."""
        (self.seen / 'ballast').unlink()

    def _do(self, *command: str) -> None:
        subprocess.run([*self.inside, *command], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: str) -> Iterator[Disk]:
    """Mounts a tmpfs of `size` (as `mount` reads it) at `path`; skips the test where it cannot."""
    path.mkdir()
    user = () if os.getuid() == 0 else ('--user', '--preserve-credentials')
    map_root = () if os.getuid() == 0 else ('--map-root-user',)
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && echo mounted && exec sleep 86400'
    try:
        holder = subprocess.Popen(
            ['unshare', *map_root, '--mount', 'sh', '-c', script, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip('this machine has no unshare (util-linux)')
    try:
        assert holder.stdout is not None
        said = holder.stdout.readline().strip()
        if said != 'mounted':
            pytest.skip(f'this machine does not let us mount a file system: {said}')
        yield Disk(path, holder, user)
    finally:
        holder.kill()
        holder.wait()
