"""Mesh, sharding rules, `constrain` and start-up.  At the bottom: imports no other room."""

from bigssl_jax.parallel.mesh import MESH_AXES, make_mesh
from bigssl_jax.parallel.sharding import (
    batch_sharding,
    constrain,
    logical_to_shardings,
    replicated,
    use_mesh,
)

__all__ = [
    'MESH_AXES',
    'batch_sharding',
    'constrain',
    'logical_to_shardings',
    'make_mesh',
    'replicated',
    'use_mesh',
]
