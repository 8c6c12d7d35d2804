"""Starting an encoder from that of an earlier stage, with a report of what was taken.

Precedence of initialisation, highest first:
  1. the run's own newest checkpoint: an interrupted run continues (`loop.py`);
  2. `init_from`: the encoder of an earlier stage, or of a model folder of another workdir, the
     feature statistics that it was trained with, and the heads that `init_heads` names (here);
  3. fresh random parameters.

Nothing is taken silently: every parameter is matched, new or dropped, by name.  What is matched is
read straight into the layout of the new state, and what is fresh is never made for it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import traverse_util

from bigssl_jax.config import UserError
from bigssl_jax.training.optimizers import path_name


@dataclasses.dataclass(frozen=True)
class Matching:
    """Names of parameters, by what became of them.

    Attributes:
      matched: taken from the earlier stage.
      new: not taken from there; they start fresh.
      dropped: in the earlier stage and not needed here.
    """

    matched: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        return f'{len(self.matched)} matched, {len(self.new)} new, {len(self.dropped)} dropped'


def match_parameters(wanted: Any, earlier: Any, heads: Sequence[str] = ()) -> Matching:
    """Which parameters a stage takes from an earlier one, by name: the encoder's, and some heads'.

    Args:
      wanted: {'encoder', 'heads'} of this stage, abstract arrays.
      earlier: {'encoder', 'heads'} of the earlier stage, abstract arrays.
      heads: names of objectives whose heads are taken too, whole.

    Raises:
      UserError: a parameter that is to be taken has another shape there, the encoders have nothing
        in common, or a head is not there.
    """
    here, there = _shapes(wanted), _shapes(earlier)
    parts = ('encoder/', *(f'heads/{head}/' for head in heads))
    for head in heads:
        missing = [n for n in here if n.startswith(f'heads/{head}/') and n not in there]
        if missing:
            raise UserError(
                f'init_heads names {head!r}, but the earlier stage has no parameter {missing[0]};'
                ' take it off init_heads, or name a stage with the same objective'
            )
    matched = tuple(name for name in here if name.startswith(parts) and name in there)
    for name in matched:
        if here[name] != there[name]:
            raise UserError(
                f'parameter {name} has shape {there[name]} in the earlier stage and'
                f' {here[name]} here; both stages need the same {name.partition("/")[0]}'
            )
    if not any(name.startswith('encoder/') for name in matched):
        raise UserError('no parameter of the earlier stage matches one of this stage')
    new = tuple(name for name in here if name not in matched)
    return Matching(matched, new, tuple(name for name in there if name not in matched))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def only(tree: Any, names: tuple[str, ...]) -> Any:
    """Nested dicts with the named leaves ('encoder/norm/scale') of `tree` alone."""
    leaves = traverse_util.flatten_dict(tree, sep='/')
    return traverse_util.unflatten_dict({name: leaves[name] for name in names}, sep='/')
