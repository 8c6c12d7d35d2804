"""Mesh, sharding rules, `constrain` and start-up.  At the bottom: imports no other room."""

from bigssl_jax.parallel.mesh import BATCH_AXES, MESH_AXES, batch_parts, make_mesh
from bigssl_jax.parallel.sharding import (
    batch_sharding,
    constrain,
    logical_to_shardings,
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
    'logical_to_shardings',
    'make_mesh',
    'replicated',
    'stored',
    'use_mesh',
]
