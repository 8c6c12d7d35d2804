"""Cloud names give the slices that the cloud sells; other names lead to those."""

import math

import pytest

from bigssl_jax.config import UserError
from bigssl_jax.parallel.topologies import CHIPS, topology, topology_names


# From the tables of the Google Cloud documentation of each chip.
@pytest.mark.parametrize(
    ('name', 'shape', 'chips', 'devices'),
    [
        ('v5e-1', (1, 1), 1, 1),
        ('v5e-8', (2, 4), 8, 8),
        ('v5e-256', (16, 16), 256, 256),
        ('v6e-128', (8, 16), 128, 128),
        ('v4-8', (2, 2, 1), 4, 4),
        ('v4-512', (4, 8, 8), 256, 256),
        ('v5p-8', (2, 2, 1), 4, 4),
        ('v5p-16', (2, 2, 2), 8, 8),
        ('v5p-64', (2, 4, 4), 32, 32),
        ('v5p-128', (4, 4, 4), 64, 64),
        ('v5p-256', (4, 4, 8), 128, 128),
        ('v5p-1024', (8, 8, 8), 512, 512),
        ('v5p-2048', (8, 8, 16), 1024, 1024),
        ('v5p-4096', (8, 16, 16), 2048, 2048),
        ('v5p-8192', (16, 16, 16), 4096, 4096),
        ('v5p-12288', (16, 16, 24), 6144, 6144),
        ('v3-512', (16, 16), 256, 512),
        ('v3-2048', (32, 32), 1024, 2048),
        ('tpu7x-128', (4, 4, 4), 64, 128),
        ('2xv5e-256', (16, 16), 512, 512),
        ('4xv5p-128', (4, 4, 4), 256, 256),
        ('v5litepod-16', (4, 4), 16, 16),
        ('v5p:2x4x4', (2, 4, 4), 32, 32),
    ],
)
def test_cloud_names_give_the_documented_slices(name, shape, chips, devices):
    found = topology(name)
    assert (found.shape, found.chips, found.devices) == (shape, chips, devices)
    assert found.slices * math.prod(shape) == chips


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('v5e-200', 'v5e-128, v5e-256'),
        ('2xv6e-300', 'v6e-256'),
        ('v5p-7', 'v5p-8'),  # an odd number of cores
        ('v5-8', 'v5e-8'),
        ('v5e-512', 'v5e-256'),  # larger than a pod
        ('0xv5e-256', 'v5e-256'),
        ('v5p:4x4', 'has 3 sides and at most 6144 chips, such as v5p:4x4x4'),
        ('h100-8', 'one of v3, v4, v5e, v5p, v6e, tpu7x'),
        ('', 'one of v3, v4, v5e, v5p, v6e, tpu7x'),
    ],
)
def test_unknown_names_are_one_line_that_leads_to_known_ones(name, said):
    with pytest.raises(UserError) as raised:
        topology(name)
    assert said in str(raised.value)
    assert repr(name) in str(raised.value) and '\n' not in str(raised.value)


def test_every_listed_name_is_known():
    names = topology_names()
    assert all(topology(name).devices >= 1 for name in names)
    assert {topology(name).chip.name for name in names} == set(CHIPS)
