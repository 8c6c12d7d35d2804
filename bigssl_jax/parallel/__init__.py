"""Mesh, sharding rules, `constrain` and start-up.  At the bottom: imports no other room."""

from bigssl_jax.parallel.mesh import BATCH_AXES, MESH_AXES, batch_parts, make_mesh
from bigssl_jax.parallel.sharding import (
    batch_sharding,
    constrain,
    device_platform,
    logical_to_shardings,
    parts,
    per_row,
    per_shard,
    replicated,
    stored,
    use_mesh,
)

__all__ = [
    'BATCH_AXES',
    'MESH_AXES',
    'batch_parts',
    'batch_sharding',
    'constrain',
    'device_platform',
    'logical_to_shardings',
    'make_mesh',
    'parts',
    'per_row',
    'per_shard',
    'replicated',
    'stored',
    'use_mesh',
]
