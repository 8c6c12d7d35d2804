"""Starting parameters from those of an earlier stage, with a report of what was taken.

Precedence of initialisation, highest first: the run's own newest checkpoint; parameters of an
earlier stage (here); fresh random ones.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from bigssl_jax.config import UserError
from bigssl_jax.training.optimizers import path_name


@dataclasses.dataclass(frozen=True)
class Matching:
    """Names of parameters, by what became of them.

    Attributes:
      matched: taken from the earlier stage.
      new: not in the earlier stage; stay fresh.
      dropped: in the earlier stage and not needed here.
    """

    matched: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        return f'{len(self.matched)} matched, {len(self.new)} new, {len(self.dropped)} dropped'


def take_matching(fresh: Any, earlier: Any) -> tuple[Any, Matching]:
    """`fresh` with every parameter of the same name and shape replaced by that of `earlier`.

    Args:
      fresh: parameters as the stage would start them, arrays on devices.
      earlier: parameters of another stage, numpy arrays.

    Returns:
      The mixed tree (laid out on devices as `fresh` is) and what was matched.

    Raises:
      UserError: a name occurs in both with different shapes, or nothing matches.
    """
    source = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(earlier)}
    matched: list[str] = []
    new: list[str] = []

    def pick(path: tuple, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        if name not in source:
            new.append(name)
            return leaf
        if source[name].shape != leaf.shape:
            raise UserError(
                f'parameter {name} has shape {source[name].shape} in the earlier stage and'
                f' {leaf.shape} here; both stages need the same encoder'
            )
        matched.append(name)
        return jax.device_put(np.asarray(source[name], leaf.dtype), leaf.sharding)

    mixed = jax.tree_util.tree_map_with_path(pick, fresh)
    if not matched:
        raise UserError('no parameter of the earlier stage matches one of this stage')
    dropped = tuple(name for name in source if name not in set(matched))
    return mixed, Matching(tuple(matched), tuple(new), dropped)
