"""What the start-up table says of where parameters lie; accidents are refused."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh

from bigssl_jax.config import ConfigError
from bigssl_jax.models import Encoder, parameter_count
from bigssl_jax.models.presets import conformer
from bigssl_jax.parallel.layout import check_layout, landed, layout_lines, replicated_share
from bigssl_jax.parallel.mesh import MESH_AXES


def mesh_of(*sizes):
    return AbstractMesh(sizes, MESH_AXES)


def boxed(name, **overrides):
    config = conformer(name, **overrides)
    features = jax.ShapeDtypeStruct((1, 8, config.num_mels), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 8), bool)
    return jax.eval_shape(
        lambda f, m: Encoder(config).init(jax.random.key(0), f, m), features, mask
    )


def array(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize('name', ['XL', 'XXL', 'G', 'USM-2B'])
def test_large_encoders_lie_in_sixteen_parts(name):
    rows = landed(boxed(name), mesh_of(1, 16, 16, 1))
    assert sum(row.size for row in rows) == parameter_count(conformer(name))
    assert replicated_share(rows) < 1e-3
    per_device = sum(row.bytes_per_device for row in rows)
    assert per_device == pytest.approx(4 * parameter_count(conformer(name)) / 16, rel=0.02)
    check_layout(rows, mesh_of(1, 16, 16, 1), 0.02)


def test_rows_say_which_axis_splits_what():
    tree = {'a': array((6, 8), ('embed', 'mlp')), 'b': array((7,), ('embed',))}
    split, whole = landed(tree, mesh_of(1, 2, 2, 4))
    assert split.axes == ('embed:fsdp', 'mlp:tensor')
    assert (split.parts, split.bytes_per_device) == (8, 6 * 8 * 4 // 8)
    assert whole.axes == ('embed',)
    assert (whole.parts, whole.bytes_per_device) == (1, 28)
    assert replicated_share([split, whole]) == 7 / 55


def test_a_mesh_that_leaves_parameters_whole_is_refused_with_their_names():
    rows = landed({'good': array((64, 8), ('embed', 'mlp')), 'odd': array((7,), ('embed',))},
                  mesh_of(1, 1, 4, 1))  # fmt: skip
    check_layout(rows, mesh_of(1, 1, 4, 1), 0.02)
    with pytest.raises(ConfigError, match=r'1\.3% .*fsdp=4.*max_replicated=1\.0%.*odd \(7,\)'):
        check_layout(rows, mesh_of(1, 1, 4, 1), 0.01)


def test_a_mesh_that_splits_only_batches_leaves_everything_whole_on_purpose():
    rows = landed(boxed('tiny'), mesh_of(1, 8, 1, 1))
    assert replicated_share(rows) == 1.0
    check_layout(rows, mesh_of(1, 8, 1, 1), 0.02)
    assert len(layout_lines(rows, mesh_of(1, 8, 1, 1))) == 1


def test_the_table_adds_up():
    rows = landed(boxed('G'), mesh_of(1, 16, 16, 1))
    head, titles, *lines = layout_lines(rows, mesh_of(1, 16, 16, 1))
    assert '7,8' in head and 'data 16 x fsdp 16' in head
    assert 'dimensions' in titles
    assert sum(float(line.split()[0].replace(',', '')) for line in lines) == pytest.approx(
        parameter_count(conformer('G')) / 1e6, abs=0.2
    )
