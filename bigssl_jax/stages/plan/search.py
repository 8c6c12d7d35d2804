"""Which batch fits, what would make a plan fit, and the best of batch x remat x mesh.

A compilation that does not fit fails within seconds and says how much it wanted; one that fits
takes a minute or more for a large model.  So every search here asks for too much rather than too
little: it places the next attempt by a line through what the last two wanted, and stops when the
largest batch that fits and the smallest that does not are an eighth apart.

Nothing in this file compiles: it is given a function that does.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

FINENESS = 8  # parts of a batch to which its largest size is found
_MOST_ATTEMPTS = 24  # 2^24 rows a device: something else is wrong


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One compilation.

    Attributes:
      units: the batch, in multiples of the rows that the mesh needs.
      fits: whether the compiler found room.
      needed: bytes per device that it wanted.
      available: bytes per device that there are.
      result: what the caller made of it.
    """

    units: int
    fits: bool
    needed: int
    available: int
    result: Any = None


def bracket(
    attempt: Callable[[int], Attempt], start: int, fits: Attempt | None = None
) -> tuple[Attempt | None, Attempt | None]:
    """(the largest batch that fits, to an eighth of itself; the smallest that was seen not to).

    Args:
      attempt: compiles a batch of so many units.
      start: the first to try, such as the configured one.
      fits: what is known to fit instead; `start` is then not tried.
    """
    low: Attempt | None = fits
    high: Attempt | None = None
    units = _next(low, high, bisect=False) if low else max(1, start)
    for number in range(_MOST_ATTEMPTS):
        tried = attempt(units)
        low, high = (tried, high) if tried.fits else (low, tried)
        if high is not None and high.units - (low.units if low else 0) <= _step(low):
            break
        units = _next(low, high, bisect=number >= _MOST_ATTEMPTS // 2)
    return low, high


def _step(low: Attempt | None) -> int:
    return max(1, low.units // FINENESS) if low else 1


def _next(low: Attempt | None, high: Attempt | None, bisect: bool) -> int:
    """The next batch to try, between `low` and `high` where they are known."""
    if high is None:
        assert low is not None
        # Well beyond the limit: a failure is cheap, and gives the line its second point.  Much of
        # what a small batch needs are gathered parameters, so proportion would say too little.
        return 8 * low.units
    if low is None:
        # Proportion overstates what a smaller batch needs: part of it does not shrink.
        return min(max(1, high.units * high.available // max(high.needed, 1)), high.units - 1)
    if bisect or high.needed <= low.needed:
        return (low.units + high.units) // 2
    slope = (high.needed - low.needed) / (high.units - low.units)
    wanted = low.units + int((low.available - low.needed) / slope)
    return min(max(wanted, low.units + _step(low)), high.units - 1)


def first_that_fits(
    attempts: Iterable[tuple[Mapping[str, Any], Callable[[], Attempt]]],
) -> tuple[Mapping[str, Any], Attempt] | None:
    """The first of some changes (mildest first) with which the plan fits, or None."""
    for changes, attempt in attempts:
        tried = attempt()
        if tried.fits:
            return changes, tried
    return None


# ---------------------------------------------------------------------------------------------
# the best of batch x remat x mesh


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One combination to try.

    Attributes:
      axes: sizes of the mesh axes.
      remat: what the backward pass keeps.
      state_bytes: per device, before anything is computed.
      bound: the most hours of audio per chip-hour that it could reach, from its FLOPs alone.
    """

    axes: Mapping[str, int]
    remat: str
    state_bytes: int
    bound: float


def mesh_candidates(devices_per_slice: int, slices: int) -> Iterator[dict[str, int]]:
    """Mesh shapes to try: tensor 1, 2, 4; fsdp every divisor; the rest is data."""
    for tensor in (1, 2, 4):
        if devices_per_slice % tensor:
            continue
        parts = devices_per_slice // tensor
        for fsdp in (size for size in range(1, parts + 1) if parts % size == 0):
            yield {'slice': slices, 'data': parts // fsdp, 'fsdp': fsdp, 'tensor': tensor}


def in_order(candidates: Iterable[Candidate], available: int) -> list[Candidate]:
    """Candidates whose state fits, in the order in which to try them.

    The most usual mesh with every remat policy first, because a good result early spares the rest
    (`still_promising`): one without `tensor`, whose collectives are in every layer, and with
    parameters split over about 16 devices; fewer leave less memory, more cost larger gathers.
    """

    def rank(candidate: Candidate) -> tuple[float, ...]:
        fsdp = candidate.axes['fsdp']
        return (candidate.axes['tensor'], max(fsdp / 16, 16 / fsdp), fsdp, -candidate.bound)

    return sorted((c for c in candidates if c.state_bytes < available), key=rank)


def still_promising(candidate: Candidate, best: float) -> bool:
    """Whether it could be better than the best so far: its bound is an upper one."""
    return candidate.bound > best * (1 + 1e-3)
