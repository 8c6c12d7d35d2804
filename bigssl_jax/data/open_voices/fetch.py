"""Gets Debian packages and unpacks them into a cache, without root and without installing them.

    <cache_dir>/debs/NAME_VERSION_ARCH.deb     as downloaded
    <cache_dir>/packages/NAME_VERSION_ARCH/    its files; exists only when complete

A package that is in the cache is not fetched again. On a system that has no apt, the user downloads
the package files elsewhere and names their folder (`deb_dir`); nothing is downloaded then.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.open_voices import deb

DOWNLOAD_SECONDS = 1800.0
# What apt-get prints on standard error, and what to tell the user to do about it.
APT_PROBLEMS = (
    ('unable to locate package', 'apt knows no such package: its lists are missing or old, or this'
     ' is another distribution. Run `apt-get update` (as root) and try again'),
    ('no candidate', 'apt knows no version of it: run `apt-get update` (as root) and try again'),
    ('unable to select versions', 'apt knows no such package: run `apt-get update` (as root)'),
    ('404', 'the package lists are older than the mirror: run `apt-get update` (as root)'),
    ('resolving', 'no network: the package mirror cannot be reached'),
    ('connect', 'no network: the package mirror cannot be reached'),
    ('no space left', 'the disk is full'),
)  # fmt: skip


class FetchError(DataError):
    """A package cannot be had; the message says what to do."""


def fetch(
    packages: Iterable[str], cache_dir: str | os.PathLike, deb_dir: str | os.PathLike | None = None
) -> dict[str, pathlib.Path]:
    """Returns package name -> folder with its files, fetching what the cache lacks.

    Args:
      packages: names of Debian packages.
      cache_dir: where to keep what was fetched; created when missing.
      deb_dir: a folder that holds the `.deb` files; without it, `apt-get download` gets them.

    Raises:
      FetchError: a package cannot be had (no apt, no network, not in `deb_dir`).
      DataError: a package file is damaged.
    """
    cache = pathlib.Path(cache_dir)
    return {package: _fetch_one(package, cache, deb_dir) for package in packages}


def _fetch_one(
    package: str, cache: pathlib.Path, deb_dir: str | os.PathLike | None
) -> pathlib.Path:
    unpacked = [path for path in (cache / 'packages').glob(f'{package}_*') if path.is_dir()]
    if unpacked:
        return max(unpacked)
    if deb_dir is not None:
        file = find_deb(package, pathlib.Path(deb_dir))
        if file is None:
            raise FetchError(
                f'{deb_dir}: holds no {package}_*.deb; download it on a Debian or Ubuntu machine'
                f' with `apt-get download {package}` and copy it there'
            )
    else:
        file = find_deb(package, cache / 'debs') or download(package, cache / 'debs')
    root = cache / 'packages' / file.stem
    deb.unpack(file, root)
    return root


def find_deb(package: str, folder: pathlib.Path) -> pathlib.Path | None:
    """The file of `package` in `folder` (the last by name when there are several), or None."""
    return max(folder.glob(f'{package}_*.deb'), default=None)


def download(package: str, folder: pathlib.Path) -> pathlib.Path:
    """Downloads `package` into `folder` by `apt-get download`, which checks its signed hash.

    Raises:
      FetchError: there is no apt here, it knows no such package, or there is no network.
    """
    if shutil.which('apt-get') is None:
        raise FetchError(
            f'package {package}: this system has no apt-get; download the .deb files on a Debian'
            ' or Ubuntu machine (`apt-get download NAME`) and name their folder as deb_dir'
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.download-', dir=folder) as unfinished:
        try:
            run = subprocess.run(
                ['apt-get', 'download', '-q', package],
                cwd=unfinished,
                env={**os.environ, 'LC_ALL': 'C'},
                capture_output=True,
                text=True,
                timeout=DOWNLOAD_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FetchError(
                f'package {package}: not downloaded within {DOWNLOAD_SECONDS:.0f} s; try again'
            ) from None
        file = find_deb(package, pathlib.Path(unfinished))
        if run.returncode or file is None:
            raise FetchError(f'package {package}: {explain(run.stderr)}')
        return file.replace(folder / file.name)


def explain(stderr: str) -> str:
    """What to tell the user about a failed `apt-get download`, from its standard error."""
    lower = stderr.lower()
    for sign, advice in APT_PROBLEMS:
        if sign in lower:
            return advice
    lines = [line for line in stderr.splitlines() if line.startswith('E:')] or ['no reason given']
    return f'apt-get download failed: {lines[-1]}'
