"""Sharding is declared once: logical axis names on arrays, and this table of rules.

Parameters carry logical names from `nn.with_logical_partitioning`; activations get theirs from
`constrain`.  A rule maps a logical name to mesh axes; a mesh axis serves at most one dimension of
an array, first come first served, and only where the dimension divides.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigssl_jax.parallel.mesh import BATCH_AXES

# logical name -> mesh axes
RULES: dict[str, tuple[str, ...]] = {
    # activations
    'batch': BATCH_AXES,
    'time': (),
    'activation': (),
    # parameters
    'embed': ('fsdp',),
    'mlp': ('tensor',),
    'heads': ('tensor',),
    'head_dim': (),
    'kernel': (),
    'channel': ('tensor',),
    'mel': (),
    'vocab': ('tensor',),
    'code': (),
    'layer': (),
}

_active_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar('mesh', default=None)
# True inside of `per_row`, where every array is a device's own and there is nothing to lay out.
_alone: contextvars.ContextVar[bool] = contextvars.ContextVar('alone', default=False)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `constrain` resolve names on `mesh` while a program is traced."""
    token = _active_mesh.set(mesh)
    try:
        yield mesh
    finally:
        _active_mesh.reset(token)


def resolve_axes(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array of `shape` whose dimensions carry logical `names`.

    Raises:
      ValueError: an unknown name, or another number of names than of dimensions.
    """
    if len(names) != len(shape):
        raise ValueError(f'{len(names)} logical axes {tuple(names)} for an array of {tuple(shape)}')
    used: set[str] = set()
    spec: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f'unknown logical axis {name!r}; known: {", ".join(sorted(RULES))}')
        wanted = RULES[name] if name is not None else ()
        axes = [a for a in wanted if mesh.shape[a] > 1 and a not in used]
        while axes and size % _product(mesh, axes):
            axes.pop()
        used.update(axes)
        spec.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def _product(mesh: Mesh, axes: Sequence[str]) -> int:
    product = 1
    for axis in axes:
        product *= mesh.shape[axis]
    return product


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Asks the compiler to lay `x` out by its logical axis names; the values do not change.

    Outside `use_mesh` this is the identity when there is a single device.

    Raises:
      RuntimeError: several devices and no mesh: the constraint would silently vanish.
    """
    mesh = _mesh_of_trace(f'constrain({tuple(names)})')
    if mesh is None:
        return x
    spec = resolve_axes(names, x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def stored(parameter: jax.Array, names: Sequence[str | None], dtype: Any) -> jax.Array:
    """A parameter in the compute dtype, still laid out as it is stored.

    The cast comes before the gather, so that bfloat16 travels and not float32.  Transposed, the
    constraint lays the gradient out like the parameter where it arises, inside the scan over
    layers: the sum over the batch becomes a reduce-scatter.  Without it the compiler may all-reduce
    and cut afterwards, which moves twice as much.

    Args:
      parameter: as the layer owns it.
      names: its logical axes.
      dtype: of the products.
    """
    mesh, cast = _active_mesh.get(), parameter.astype(dtype)
    if mesh is None or _alone.get() or not any(resolve_axes(names, parameter.shape, mesh)):
        return cast
    return constrain(cast, names)


def parts(name: str, size: int) -> int:
    """Into how many parts the mesh of `use_mesh` cuts a dimension of `size` with this name."""
    mesh = _active_mesh.get()
    if mesh is None or _alone.get():
        return 1
    axes = resolve_axes((name,), (size,), mesh)[0]
    return _product(mesh, axes if isinstance(axes, tuple) else (axes,) if axes else ())


def _mesh_of_trace(what: str) -> Mesh | None:
    """The mesh of `use_mesh`; None where there is a single device, or each works alone."""
    if _alone.get():
        return None
    mesh = _active_mesh.get()
    if mesh is None and jax.device_count() > 1:
        raise RuntimeError(
            f'{what} with {jax.device_count()} devices and no mesh:'
            ' trace the program inside parallel.use_mesh(mesh)'
        )
    return mesh


def device_platform() -> str:
    """'cpu', 'gpu' or 'tpu': where the program that is being traced will run.

    The mesh decides, if there is one: a program for TPUs can be compiled on a machine without.
    """
    mesh = _active_mesh.get()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def per_shard(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    names: Sequence[Sequence[str | None]],
) -> jax.Array:
    """`function(*arrays)`, every device computing on its own parts alone.

    For kernels that the compiler cannot split by itself.

    Args:
      function: its result for a part of the batch is that part of the result, and it has the shape
        of its first argument.
      arrays: arguments.
      names: the logical axes of each.

    Returns:
      An array of the shape and layout of `arrays[0]`.
    """
    mesh = _mesh_of_trace('per_shard')
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    # The gradient is summed over axes that a spec leaves out; over those of one device for nothing.
    single = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] == 1)

    def spec(names: Sequence[str | None], x: jax.Array) -> PartitionSpec:
        first, *rest = resolve_axes(names, x.shape, mesh)
        axes = first if isinstance(first, tuple) else (first,) if first else ()
        return PartitionSpec((*axes, *single), *rest)

    specs = tuple(spec(n, x) for n, x in zip(names, arrays, strict=True))
    # A kernel does not say along which axes its result varies: nothing there to check.
    split = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return split(*arrays)


def per_row(function: Callable[[Any, Any], Any], rows: Any, shared: Any) -> Any:
    """`function(rows, shared)`, every device computing on its own rows with all of `shared`.

    For loops over steps: left to the compiler, what every step takes from split parameters would
    travel in every step, and so would what it adds to their gradients.

    Args:
      function: its results for some of the rows are those rows of the results.
      rows: a tree of arrays with leading axis B.
      shared: a tree of arrays; each device is given the whole, and the gradient is summed once.

    Returns:
      A tree of arrays with leading axis B.
    """
    mesh = _mesh_of_trace('per_row')
    if mesh is None or mesh.size == 1:
        return function(rows, shared)
    first = resolve_axes(('batch',), jax.tree.leaves(rows)[0].shape[:1], mesh)

    def alone(rows: Any, shared: Any) -> Any:
        token = _alone.set(True)
        try:
            return function(rows, shared)
        finally:
            _alone.reset(token)

    split = jax.shard_map(
        alone,
        mesh=mesh,
        in_specs=(first, PartitionSpec()),
        out_specs=first,
        check_vma=False,
    )
    return split(rows, shared)


def logical_to_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of (possibly abstract) boxed parameters.

    Args:
      boxed: a tree whose leaves are `nn.LogicallyPartitioned` boxes or plain arrays (replicated).
      mesh: the device mesh.

    Returns:
      The same tree without boxes, a `NamedSharding` in place of each array.
    """

    def one(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, resolve_axes(leaf.names, leaf.value.shape, mesh))
        return replicated(mesh)

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the axes that split a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
