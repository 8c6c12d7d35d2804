"""The device mesh: one function makes every mesh.

Axes, outermost first:
  data    batch split, parameters replicated; gradients are all-reduced
  fsdp    batch split, parameters split; gathered for use, gradients reduce-scattered
  tensor  the inner dimension of a layer (heads, FFN) split
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from bigssl_jax.config import ConfigError

MESH_AXES = ('data', 'fsdp', 'tensor')


def mesh_shape(axes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """Axis sizes with at most one `-1` filled in from the device count.

    Raises:
      ConfigError: the sizes do not multiply to `num_devices`.
    """
    sizes = [int(axes.get(name, 1)) for name in MESH_AXES]
    text = ', '.join(f'{name}={size}' for name, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ConfigError(f'mesh ({text}): sizes must be positive, at most one of them -1')
    known = int(np.prod([size for size in sizes if size > 0]))
    if -1 in sizes:
        if num_devices % known:
            raise ConfigError(
                f'mesh ({text}): {num_devices} devices do not divide by {known};'
                ' choose axis sizes that divide the device count'
            )
        sizes[sizes.index(-1)] = num_devices // known
    elif known != num_devices:
        raise ConfigError(
            f'mesh ({text}) needs {known} devices, found {num_devices};'
            ' set one axis to -1 to take what there is'
        )
    return tuple(sizes)


def make_mesh(axes: Mapping[str, int], devices: list | None = None) -> Mesh:
    """A mesh over `devices` (default: all), with axes named MESH_AXES.

    Explicit axis types make Flax's logical constraints raise, so every axis is Auto.
    """
    devices = list(jax.devices()) if devices is None else devices
    shape = mesh_shape(axes, len(devices))
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )
