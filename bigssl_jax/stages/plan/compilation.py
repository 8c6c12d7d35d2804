"""Compiles a program for devices that are only described, and keeps what was measured of it.

    program  ->  lowered   its text is its name in the cache
             ->  compiled  memory, collectives, memory traffic;  or: it does not fit

Compiling an 8 B model takes minutes and the answer is a few hundred bytes, so the answer is kept in
a file named by the hash of the lowered text, the devices and the compiler's version: a plan made
again, or a search continued, compiles only what is new.  JAX's own compilation cache does not hold
programs of devices that are not there.
"""

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import importlib.metadata
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from bigssl_jax.compiler_crashes import CRASHED, noted
from bigssl_jax.parallel.collectives import collectives
from bigssl_jax.parallel.hbm import hbm_bytes
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.plan.step import Program

CACHE_VERSION = 2  # raised whenever what is kept of a program changes its meaning
# Optimisation levels of the compiler; the first is its own choice.  A draft takes a quarter of the
# time (BigSSL XL on v5e-256: 47 s of CPU time for 175 s), the program perhaps a little more memory
# (there: 2.8 %).
FULL, DRAFT = 'UNKNOWN', 'O1'
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_SIZE = r'\(?([\d.]+)([KMGT]?)i?B?\)?'


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory, as `compiled.memory_analysis()` has them.

    Attributes:
      arguments: state and batch as they arrive.
      outputs, aliased: results, and how much of them takes the place of donated arguments.
      temporaries: everything in between.
      code: the program itself.
      peak: the most that is in use at one time.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What was measured of one compilation.

    Attributes:
      fits: whether the compiler found room; if not, `memory` is None and nothing is known of
        collectives and traffic.
      memory: of one device.
      needed, available: bytes per device that it needs (0: not known) and that there are.
      complaint: the compiler's own words when it does not fit; `CRASHED` when it died.
      collectives: one mapping (fields of parallel.collectives.Collective) for each.
      hbm_bytes: that one device reads and writes in one step, an estimate.
      seconds: that compiling took.
      unread: why the compiled program could not be read, so that `collectives` and `hbm_bytes` are
        not known; '' when it could.
    """

    fits: bool
    memory: Memory | None
    needed: int
    available: int
    complaint: str
    collectives: tuple[Mapping[str, Any], ...]
    hbm_bytes: float
    seconds: float
    unread: str = ''


def cache_directory(config: Mapping[str, Any]) -> pathlib.Path:
    """Where measurements are kept: in `compute.compilation_cache`, else in the user's cache."""
    given = config['compute']['compilation_cache']
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return pathlib.Path(given or os.path.join(base, 'bigssl')) / 'plans'


def compile_program(
    program: Program, limit: int, cache: pathlib.Path, effort: str = FULL
) -> Compiled:
    """Compiles `program`, or reads what was measured when it was compiled before.

    Args:
      program: on the devices of a topology.
      limit: bytes of memory per device, for when the compiler does not name its own.
      cache: a folder; made when missing.
      effort: FULL, as in training, or DRAFT.

    Raises:
      UserError: the cache cannot be written.
    """
    lowered = program.lower()
    path = cache / f'{_name(lowered.as_text(), program, effort)}.json'
    found = artefacts.read_json(path)
    if found is None:
        with _effort(effort), noted(path, _crashed(limit)):
            found = _compile(lowered, program, limit)
        _give_back_memory()
        artefacts.write_json(path, found)
    memory = found.pop('memory')
    return Compiled(memory=Memory(**memory) if memory else None, **found)


def _give_back_memory() -> None:
    """What the compiler and the text of its program took goes back to the system.

    The allocator of glibc would keep gigabytes of it while the next compilation asks for more.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def _effort(effort: str) -> Iterator[None]:
    before = jax.config.jax_optimization_level
    jax.config.update('jax_optimization_level', effort)
    try:
        yield
    finally:
        jax.config.update('jax_optimization_level', before)


def _name(text: str, program: Program, effort: str) -> str:
    """The hash of all that the measurements follow from."""
    devices = [(device.device_kind, device.id) for device in program.mesh.devices.flat]
    versions = [_version(package) for package in ('jaxlib', 'libtpu')]
    mesh = program.mesh.shape
    content = repr((CACHE_VERSION, versions, mesh, devices, program.turns, effort, text))
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ''


def _crashed(limit: int) -> dict[str, Any]:
    """The answer for a program that crashes the compiler."""
    return dataclasses.asdict(
        Compiled(
            fits=False,
            memory=None,
            needed=0,
            available=limit,
            complaint=CRASHED,
            collectives=(),
            hbm_bytes=0.0,
            seconds=0.0,
        )
    )


def _compile(lowered: Any, program: Program, limit: int) -> dict[str, Any]:
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, available = out_of_memory(str(error))
        return dataclasses.asdict(
            Compiled(
                fits=False,
                memory=None,
                needed=needed,
                available=available or limit,
                complaint=str(error).splitlines()[0],
                collectives=(),
                hbm_bytes=0.0,
                seconds=time.monotonic() - started,
            )
        )
    seconds = time.monotonic() - started
    analysis = compiled.memory_analysis()
    text, unread = _text(compiled)
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        peak=analysis.peak_memory_in_bytes,
    )
    return dataclasses.asdict(
        Compiled(
            fits=True,
            memory=memory,
            needed=memory.peak,
            available=limit,
            complaint='',
            collectives=tuple(
                dataclasses.asdict(c) for c in collectives(text, program.mesh, program.turns)
            )
            if text
            else (),
            hbm_bytes=hbm_bytes(text, program.turns) if text else 0.0,
            seconds=seconds,
            unread=unread,
        )
    )


def _text(compiled: Any) -> tuple[str, str]:
    """(the text of a compiled program, '') or ('', why this jaxlib cannot read it).

    libtpu is newer than the jaxlib beside it may be: jaxlib 0.10 does not take the asynchronous
    instructions that libtpu 0.0.51 writes for TPU7x.
    """
    try:
        return compiled.as_text(), ''
    except jax.errors.JaxRuntimeError as error:
        return '', str(error).splitlines()[0]


def out_of_memory(message: str) -> tuple[int, int]:
    """(bytes needed, bytes available) of the compiler's complaint; available 0 if it names none.

    Raises:
      RuntimeError: the message is about something else.
    """
    if 'RESOURCE_EXHAUSTED' not in message:
        raise RuntimeError(message)
    found = re.search(rf'(?:required|Used|total)[^()\d]*{_SIZE}', message)
    room = re.search(rf'available[^()\d]*{_SIZE}|of {_SIZE}', message)
    return _bytes(found), _bytes(room)


def _bytes(match: re.Match[str] | None) -> int:
    groups = [group for group in match.groups() if group is not None] if match else []
    return int(float(groups[0]) * _UNITS[groups[1]]) if groups else 0
