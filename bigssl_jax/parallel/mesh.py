"""The device mesh: one function makes every mesh.

Axes, outermost first:
  slice   batch split over pod slices, which only the data-centre network joins; as `data`
  data    batch split, parameters replicated; gradients are all-reduced
  fsdp    batch split, parameters split; gathered for use, gradients reduce-scattered
  tensor  the inner dimension of a layer (heads, FFN) split
"""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from bigssl_jax.config import ConfigError

MESH_AXES = ('slice', 'data', 'fsdp', 'tensor')
# The axes that split a batch.
BATCH_AXES = ('slice', 'data', 'fsdp')


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

    Raises:
      ConfigError: the sizes do not match the devices, or `slice` not the slices they lie in.
    """
    devices = list(jax.devices()) if devices is None else devices
    shape = mesh_shape(axes, len(devices))
    slices = len({getattr(device, 'slice_index', 0) or 0 for device in devices})
    if slices > 1 and shape[0] != slices:
        raise ConfigError(
            f'mesh has slice={shape[0]}, but the {len(devices)} devices lie in {slices} slices;'
            f' set compute.mesh.slice to {slices}'
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    if slices == 1:
        try:
            return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # 4 x 8 x 8 chips are no 16 x 16 unless an axis is cut
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(np.asarray(grid), MESH_AXES, axis_types=types)
    grid = mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), (slices, 1, 1, 1), devices=devices, allow_split_physical_axes=True
    )
    return Mesh(np.asarray(grid), MESH_AXES, axis_types=types)


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the devices cut a batch: rows must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
