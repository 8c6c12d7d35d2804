"""What else would fit: the largest batch, remedies for a plan that does not fit, the best of all.

Each of these is a change of the config that the user could have written, and compiled; nothing is
extrapolated into an answer.  The compiler only drafts them, but for the best of a search.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bigssl_jax.compiler_crashes import CRASHED
from bigssl_jax.config import UserError
from bigssl_jax.models.config import REMAT
from bigssl_jax.parallel import batch_parts
from bigssl_jax.stages.plan.compilation import DRAFT
from bigssl_jax.stages.plan.price import (
    Largest,
    Plan,
    Question,
    device_limit,
    plan_question,
    step_flops,
)
from bigssl_jax.stages.plan.search import (
    Attempt,
    Candidate,
    bracket,
    in_order,
    mesh_candidates,
    still_promising,
)
from bigssl_jax.stages.plan.step import is_training, largest_stream, row_changes

MOST_MICRO_BATCHES = 16


def find_largest(question: Question, made: Plan | None = None) -> tuple[Largest, Question] | None:
    """The largest batch that fits, to an eighth; None if the smallest does not fit.

    Args:
      question: its own batch is where the search starts.
      made: its plan, if there is one and it fits.
    """
    mesh = question.mesh()
    stream = largest_stream(question.config, question.stage, mesh)

    def attempt(units: int) -> Attempt:
        changes = row_changes(question.config, question.stage, mesh, units)
        rows = units * stream.multiple
        return question.attempt(changes, f'a batch of {rows:,} x {stream.seconds:g} s', units)

    known = Attempt(stream.units, True, made.needed, made.limit) if made else None
    low, high = bracket(attempt, stream.units, known)
    if low is None:
        return None
    rows = low.units * stream.multiple
    changes = row_changes(question.config, question.stage, mesh, low.units)
    largest = Largest(
        rows=rows,
        rows_per_device=rows / batch_parts(mesh),
        changes=changes,
        peak=low.needed,
        refused_rows=high.units * stream.multiple if high else None,
        crashed=bool(high and high.result and high.result[1].complaint == CRASHED),
    )
    return largest, question.change(changes)


# ---------------------------------------------------------------------------------------------
# remedies


def remedies(question: Question) -> tuple[dict[str, Any], ...]:
    """Changes of the config with which a plan that does not fit does, one of each kind at most.

    The mildest change of a kind that fits is taken; if no kind is enough by itself, all of them at
    their strongest are tried together with the largest batch that then fits.

    Returns:
      Mappings of field -> value, each a remedy by itself; empty: nothing that was tried fits.
    """
    kinds: list[Iterator[dict[str, Any]]] = [
        _less_kept(question),
        _more_pieces(question),
        _more_shards(question),
    ]
    found = []
    smaller = find_largest(question)
    if smaller is not None:
        found.append(dict(smaller[0].changes))
    strongest: dict[str, Any] = {}
    for kind in kinds:
        for changes in kind:
            if _fits(question, changes):
                found.append(changes)
                break
            strongest |= changes
    if found or not strongest:
        return tuple(found)
    together = _usable(question.change(strongest))
    smaller = find_largest(together) if together else None
    return ({**strongest, **smaller[0].changes},) if smaller else ()


def _fits(question: Question, changes: Mapping[str, Any]) -> bool:
    """Whether it fits; a change that the config does not allow does not."""
    try:
        return question.attempt(changes, describe(changes)).fits
    except UserError:
        return False


def _usable(question: Question) -> Question | None:
    try:
        question.program()
    except UserError:
        return None
    return question


def describe(changes: Mapping[str, Any]) -> str:
    """Changes in a few words: the last part of each field's name and its value."""
    return ', '.join(f'{path.rsplit(".", 1)[-1]}={value}' for path, value in changes.items())


def _less_kept(question: Question) -> Iterator[dict[str, Any]]:
    """Rematerialisation policies that keep less than the config's."""
    if is_training(question.config, question.stage):
        for remat in REMAT[REMAT.index(question.config['encoder']['remat']) + 1 :]:
            yield {'encoder.remat': remat}


def _more_pieces(question: Question) -> Iterator[dict[str, Any]]:
    """The same batch in more pieces, one after the other."""
    if not is_training(question.config, question.stage):
        return
    path = f'stages.{question.stage}.optimizer.micro_batches'
    given = question.config['stages'][question.stage]['optimizer']['micro_batches']
    units = largest_stream(question.config, question.stage, question.mesh()).rows
    pieces = 2 * given
    while pieces <= min(MOST_MICRO_BATCHES, units // batch_parts(question.mesh())):
        yield {path: pieces}
        pieces *= 2


def _more_shards(question: Question) -> Iterator[dict[str, Any]]:
    """Parameters split over more devices, at the cost of larger gathers."""
    shape = question.mesh().shape
    fsdp, rest = shape['fsdp'], shape['data']
    while rest % 2 == 0:
        fsdp, rest = 2 * fsdp, rest // 2
        yield {'compute.mesh.fsdp': fsdp, 'compute.mesh.data': -1}


# ---------------------------------------------------------------------------------------------
# search


@dataclasses.dataclass(frozen=True)
class Found:
    """One combination of the search that fits, with the largest batch that does.

    Attributes:
      changes: config fields that make it.
      plan: what it costs.
    """

    changes: Mapping[str, Any]
    plan: Plan

    @property
    def speed(self) -> float:
        """Hours of audio per chip-hour, a bound."""
        return self.plan.audio_hours_per_chip_hour or 0.0


def search(question: Question, progress: Callable[[int, int, str], None]) -> list[Found]:
    """The combinations of batch, remat and mesh that fit, the best first.

    Combinations that cannot beat the best so far, by their FLOPs alone, are not compiled: the list
    is complete at its head only.

    Args:
      question: the config that is varied.
      progress: is told (done, of, what is tried next).
    """
    candidates = in_order(_candidates(question), device_limit(question.where))
    found: list[Found] = []
    for number, candidate in enumerate(candidates):
        best = max((item.speed for item in found), default=0.0)
        text = mesh_text(candidate.axes) + f', remat {candidate.remat}'
        progress(number, len(candidates), text)
        if not still_promising(candidate, best):
            continue
        changes = _changes_of(candidate, question)
        largest = find_largest(question.change(changes))
        if largest is not None:
            made = plan_question(largest[1], DRAFT)
            found.append(Found({**changes, **largest[0].changes}, made))
    found.sort(key=lambda item: -item.speed)
    while found:
        progress(len(candidates), len(candidates), 'the best')
        made = plan_question(question.change(found[0].changes))
        if made.fits:
            found[0] = Found(found[0].changes, made)
            break
        found.pop(0)  # a draft that was too hopeful
    progress(len(candidates), len(candidates), 'done')
    return found


def mesh_text(axes: Mapping[str, int]) -> str:
    """'data 16 x fsdp 16': the axes of more than one device."""
    return ' x '.join(f'{axis} {size}' for axis, size in axes.items() if size > 1) or 'one device'


def _changes_of(candidate: Candidate, question: Question) -> dict[str, Any]:
    changes: dict[str, Any] = {
        f'compute.mesh.{axis}': size for axis, size in candidate.axes.items() if axis != 'slice'
    }
    if is_training(question.config, question.stage):
        changes['encoder.remat'] = candidate.remat
    return changes


def _candidates(question: Question) -> Iterator[Candidate]:
    """Every mesh that the config allows, with every remat policy."""
    where = question.where
    policies = (
        REMAT
        if is_training(question.config, question.stage)
        else (question.config['encoder']['remat'],)
    )
    bounds: dict[str, float] = {}
    for axes in mesh_candidates(where.devices // where.slices, where.slices):
        for remat in policies:
            candidate = Candidate(axes, remat, 0, 0.0)
            changed = question.change(_changes_of(candidate, question))
            try:
                smallest = row_changes(changed.config, question.stage, changed.mesh(), 1)
                program = changed.change(smallest).program()
            except UserError:
                continue  # a mesh that does not divide the parameters, or the rows
            if remat not in bounds:
                _, hardware = step_flops(changed.change(smallest), program)
                peak = where.chips * where.chip.flops_per_second
                hours = program.audio_seconds / 3600
                seconds = hardware.bfloat16_passes / peak
                bounds[remat] = hours * 3600 / seconds / where.chips
            yield Candidate(axes, remat, sum(program.parts.values()), bounds[remat])
