"""How parameters landed on the mesh: the table that a training stage shows when it starts.

A dimension that an axis does not divide stays whole, silently as far as the compiler is concerned.
On a mesh that splits parameters that is an accident waiting to fill the memory, so more than a
small share of it is refused.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from bigssl_jax.config import ConfigError
from bigssl_jax.parallel.sharding import resolve_axes

SPLITTING = ('fsdp', 'tensor')  # the mesh axes that split parameters


@dataclasses.dataclass(frozen=True)
class Landed:
    """One parameter on the mesh.

    Attributes:
      name: its path, e.g. 'encoder/blocks/ffn_in/expand/kernel'.
      shape, dtype: of the whole array.
      axes: per dimension its logical name and, after a colon, the mesh axes that split it:
        ('layer', 'embed:fsdp', 'mlp:tensor').
      parts: distinct pieces, 1 when every device holds the whole array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str, ...]
    parts: int

    @property
    def size(self) -> int:
        """Elements of the whole array."""
        return math.prod(self.shape)

    @property
    def bytes_per_device(self) -> int:
        """Bytes that one device holds."""
        return self.size * np.dtype(self.dtype).itemsize // self.parts


def landed(boxed: Any, mesh: Mesh) -> list[Landed]:
    """Where every parameter of a (possibly abstract) boxed tree lies."""
    rows = []
    leaves = jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    for path, leaf in leaves:
        value = leaf.value if isinstance(leaf, nn.LogicallyPartitioned) else leaf
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * value.ndim
        spec = resolve_axes(names, value.shape, mesh)
        axes, parts = [], 1
        for name, entry in zip(names, spec, strict=True):
            split = (entry,) if isinstance(entry, str) else entry or ()
            parts *= math.prod(mesh.shape[axis] for axis in split)
            axes.append(f'{name or "-"}' + (f':{"+".join(split)}' if split else ''))
        name = '/'.join(str(getattr(key, 'key', key)) for key in path)
        rows.append(Landed(name, tuple(value.shape), value.dtype, tuple(axes), parts))
    return rows


def replicated_share(rows: Sequence[Landed]) -> float:
    """The share of the parameters, by size, of which every device holds the whole."""
    whole = sum(row.size for row in rows if row.parts == 1)
    return whole / max(sum(row.size for row in rows), 1)


def check_layout(rows: Sequence[Landed], mesh: Mesh, limit: float) -> None:
    """Refuses a mesh that should split the parameters and leaves more than `limit` of them whole.

    Raises:
      ConfigError: names the largest parameters that stayed whole.
    """
    if all(mesh.shape[axis] == 1 for axis in SPLITTING) or replicated_share(rows) <= limit:
        return
    whole = sorted((row for row in rows if row.parts == 1), key=lambda row: -row.size)[:3]
    sizes = ', '.join(f'{axis}={mesh.shape[axis]}' for axis in SPLITTING)
    largest = '; '.join(f'{row.name} {row.shape} ({", ".join(row.axes)})' for row in whole)
    raise ConfigError(
        f'{replicated_share(rows):.1%} of the parameters lie whole on every device, though the mesh'
        f' splits parameters ({sizes}); allowed: compute.max_replicated={limit:.1%}. The largest:'
        f' {largest}. Choose axis sizes that divide these dimensions'
    )


def layout_lines(rows: Sequence[Landed], mesh: Mesh) -> list[str]:
    """The start-up table as lines of text: one row per kind of layout, largest first."""
    sizes = ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1)
    total = sum(row.size for row in rows)
    held = sum(row.bytes_per_device for row in rows)
    lines = [
        f'parameters: {total / 1e6:,.1f} M on {mesh.size} device{"s" * (mesh.size > 1)}'
        f' ({sizes or "no split"}); {held / 2**20:,.1f} MiB a device,'
        f' {replicated_share(rows):.1%} of them whole on each'
    ]
    if all(mesh.shape[axis] == 1 for axis in SPLITTING):
        return lines
    groups: dict[tuple[str, ...], list[Landed]] = {}
    for row in rows:
        groups.setdefault(row.axes, []).append(row)
    ordered = sorted(groups.items(), key=lambda item: -sum(row.size for row in item[1]))
    lines.append(f'  {"M":>9} {"MiB/device":>11} {"parts":>6}  dimensions (logical name:mesh axes)')
    for axes, group in ordered:
        size = sum(row.size for row in group) / 1e6
        mebibytes = sum(row.bytes_per_device for row in group) / 2**20
        names = ', '.join(axes) or 'scalar'
        lines.append(f'  {size:>9,.2f} {mebibytes:>11,.2f} {group[0].parts:>6}  {names}')
    return lines
