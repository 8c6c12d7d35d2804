"""Mesh shapes come with numbers and a cure; names resolve to axes; constraints never vanish."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from bigssl_jax.config import ConfigError
from bigssl_jax.parallel import batch_parts, constrain, make_mesh, use_mesh
from bigssl_jax.parallel.mesh import MESH_AXES, mesh_shape
from bigssl_jax.parallel.sharding import resolve_axes


def test_minus_one_takes_what_there_is():
    assert mesh_shape({'data': -1, 'fsdp': 4, 'tensor': 2}, 32) == (1, 4, 4, 2)
    assert mesh_shape({'slice': 2, 'data': -1, 'fsdp': 4}, 32) == (2, 4, 4, 1)
    assert mesh_shape({'data': -1}, 3) == (1, 3, 1, 1)


@pytest.mark.parametrize(
    ('axes', 'devices', 'message'),
    [
        ({'data': 1, 'fsdp': 8, 'tensor': 4}, 16, 'needs 32 devices, found 16'),
        ({'data': -1, 'fsdp': 3}, 8, '8 devices do not divide by 3'),
        ({'data': -1, 'fsdp': -1}, 8, 'at most one'),
        ({'data': 0}, 8, 'positive'),
    ],
)
def test_a_mesh_that_does_not_match_says_so(axes, devices, message):
    with pytest.raises(ConfigError, match=message):
        mesh_shape(axes, devices)


def test_names_resolve_first_come_first_served_and_only_where_they_divide():
    mesh = AbstractMesh((1, 2, 4, 2), MESH_AXES)
    assert resolve_axes(('embed', 'mlp'), (64, 256), mesh) == PartitionSpec('fsdp', 'tensor')
    assert resolve_axes(('batch', 'time', 'embed'), (16, 5, 64), mesh) == PartitionSpec(
        ('data', 'fsdp'), None, None
    )
    assert resolve_axes(('batch', None), (2, 5), mesh) == PartitionSpec('data', None)
    slices = AbstractMesh((2, 2, 4, 2), MESH_AXES)
    assert batch_parts(slices) == 16
    assert resolve_axes(('batch',), (32,), slices) == PartitionSpec(('slice', 'data', 'fsdp'))
    assert resolve_axes(('mlp',), (7,), mesh) == PartitionSpec(None)


def test_unknown_names_and_wrong_ranks_are_errors():
    mesh = AbstractMesh((1, 1, 1, 1), MESH_AXES)
    with pytest.raises(ValueError, match='embd'):
        resolve_axes(('embd',), (4,), mesh)
    with pytest.raises(ValueError, match='2 logical axes'):
        resolve_axes(('batch', 'embed'), (4,), mesh)


def test_constrain_checks_names_inside_a_mesh():
    with use_mesh(make_mesh({'data': -1}, jax.devices()[:1])):
        assert constrain(jnp.ones((2, 3)), ('batch', 'embed')).shape == (2, 3)
        with pytest.raises(ValueError, match='unknown logical axis'):
            constrain(jnp.ones(2), ('bach',))


class Chip:
    """A device as the mesh sees it: it lies in a slice."""

    def __init__(self, slice_index):
        self.slice_index = slice_index


def test_devices_of_several_slices_need_the_slice_axis():
    with pytest.raises(ConfigError, match='lie in 2 slices; set compute.mesh.slice to 2'):
        make_mesh({'data': -1}, [Chip(number // 2) for number in range(4)])
