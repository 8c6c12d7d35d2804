"""Unpacks a Debian package file with the standard library: no root, no dpkg.

A `.deb` is an `ar` archive of three members; the last holds the files to install, as a tar stream
compressed by xz (Debian), zstd (Ubuntu) or gzip (old packages):

    !<arch>\\n | header, debian-binary | header, control.tar.xz | header, data.tar.xz

(deb(5); ar(5).) Only regular files are written, below the target folder.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import lzma
import os
import pathlib
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Iterator
from typing import IO, cast

from bigssl_jax.data.errors import DataError

AR_MAGIC = b'!<arch>\n'
# name, modification time, owner, group, mode, size in bytes (decimal text), end mark
AR_HEADER = struct.Struct('16s 12s 6s 6s 8s 10s 2s')
AR_HEADER_END = b'`\n'


@dataclasses.dataclass(frozen=True)
class Member:
    """One file within an `ar` archive: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


def members(deb: pathlib.Path) -> Iterator[Member]:
    """Yields the members of the `ar` archive `deb`; raises DataError where it is none."""
    size_of_file = deb.stat().st_size
    with open(deb, 'rb') as file:
        if file.read(len(AR_MAGIC)) != AR_MAGIC:
            raise DataError(f'{deb}: not a Debian package (no ar archive)')
        while header := file.read(AR_HEADER.size):
            if len(header) < AR_HEADER.size or not header.endswith(AR_HEADER_END):
                raise DataError(f'{deb}: damaged package (bad member header); download it again')
            name, _, _, _, _, size, _ = AR_HEADER.unpack(header)
            member = Member(name.decode('ascii').strip().rstrip('/'), file.tell(), int(size))
            if member.offset + member.size > size_of_file:
                raise DataError(f'{deb}: truncated package; download it again')
            yield member
            file.seek(member.offset + member.size + member.size % 2)  # members start at even bytes


class _Slice(io.RawIOBase):
    """The bytes [offset, offset + size) of an open file as a file of their own."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self._file, self._left = file, size
        file.seek(offset)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _decompress(name: str, stream: IO[bytes]) -> IO[bytes]:
    """Opens the compressed stream of member `name` (data.tar.xz and so on)."""
    if name.endswith('.xz'):
        return cast(IO[bytes], lzma.open(stream))
    if name.endswith('.gz'):
        return cast(IO[bytes], gzip.open(stream))
    if name.endswith('.zst'):
        import pyarrow  # carries zstd, which the standard library has from Python 3.14 on

        return cast(IO[bytes], pyarrow.CompressedInputStream(stream, 'zstd'))
    return stream


def unpack(deb: pathlib.Path, target: pathlib.Path) -> None:
    """Unpacks the regular files of the package `deb` into the new folder `target`, atomically.

    Links, devices and names that would leave `target` are left out: none of them is speech.
    Raises DataError for a file that is no package or is damaged.
    """
    data = [member for member in members(deb) if member.name.startswith('data.tar')]
    if not data:
        raise DataError(f'{deb}: not a Debian package (no data.tar member)')
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix='.unpack-', dir=target.parent))
    unfinished.chmod(0o755)
    try:
        with open(deb, 'rb') as file:
            stream = io.BufferedReader(_Slice(file, data[0].offset, data[0].size))
            with tarfile.open(fileobj=_decompress(data[0].name, stream), mode='r|') as archive:
                for item in archive:
                    _write(archive, item, unfinished)
        os.rename(unfinished, target)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        if target.is_dir():  # another process was faster
            return
        raise DataError(f'{deb}: cannot be unpacked into {target}: {error}') from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(archive: tarfile.TarFile, item: tarfile.TarInfo, folder: pathlib.Path) -> None:
    parts = [part for part in pathlib.PurePosixPath(item.name).parts if part != '.']
    content = archive.extractfile(item) if item.isreg() else None
    if content is None or '..' in parts or item.name.startswith('/'):
        return
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:
        shutil.copyfileobj(content, file)
