"""What a step must at least take: its products counted in the jaxpr, and a roofline.

The compiler's own count (`compiled.cost_analysis()['flops']`) reads the body of a loop once, so a
scanned stack of 36 layers costs what one layer does.  The jaxpr knows better: a scan carries its
length, and rematerialised, differentiated and called functions stand there as inner jaxprs.
`count_flops` walks it and counts the products, two FLOPs for each multiply-add; that is where a
matrix unit spends its time, and what the MFU of the literature counts.  Element-wise work is left
out: it is bound by memory, which the roofline looks at separately.

Model FLOPs and hardware FLOPs are the same count of two programs: the step without
rematerialisation, and the step as it runs.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from bigssl_jax.parallel.topologies import Topology

# Passes of bfloat16 products that a TPU makes of one product (jax.lax.Precision). A float32
# product of default precision is rounded to bfloat16: one pass, twice the memory traffic.
PASSES = {'float32_high': 3, 'float32_highest': 6}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of the products of a program, over all devices together.

    Attributes:
      by_kind: (primitive, dtype) -> FLOPs. The dtype is the operands'; `float32_high` and
        `float32_highest` are float32 of a higher than default precision.
      unknown_loops: `while` loops around products whose number of turns only the running program
        knows. Their bodies count as often as the caller of `count_flops` assumes: once, unless
        told otherwise, so the total is then a lower bound.
    """

    by_kind: Mapping[tuple[str, str], float]
    unknown_loops: int = 0

    @property
    def total(self) -> float:
        """All products, whatever their precision."""
        return float(sum(self.by_kind.values()))

    @property
    def matmul(self) -> float:
        """Matrix products without convolutions and kernels with an estimate of their own."""
        return float(sum(n for (kind, _), n in self.by_kind.items() if kind == 'dot_general'))

    @property
    def by_dtype(self) -> dict[str, float]:
        """FLOPs by operand dtype, largest first."""
        found: collections.Counter[str] = collections.Counter()
        for (_, dtype), flops in self.by_kind.items():
            found[dtype] += flops  # type: ignore[assignment]
        return {dtype: float(flops) for dtype, flops in found.most_common()}

    @property
    def bfloat16_passes(self) -> float:
        """FLOPs that the matrix unit of a TPU performs: precise float32 takes several passes."""
        return sum(flops * PASSES.get(dtype, 1) for dtype, flops in self.by_dtype.items())


def count_flops(function: Callable[..., Any], *arguments: Any, turns: int = 1) -> Flops:
    """The products of `function(*arguments)`, over all devices together.

    Scan bodies count as often as they run, of the branches of a `cond` the dearest one, the body
    of a `shard_map` once per device, a Pallas kernel by its own estimate or else its body once per
    step of its grid.  Products that no result needs are left out, as the compiler leaves them out;
    so are the multiplications of a convolution with padding and with the zeros between strides.

    Args:
      function: may be jitted and may contain derivatives.
      arguments: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
      turns: assumed of every loop whose number of turns only the running program knows.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(needed, turns)


def _count(jaxpr: Any, turns: int) -> Flops:
    """The products of a jaxpr, closed or not, with `turns` of each loop of unknown length."""
    total: collections.Counter[tuple[str, str]] = collections.Counter()
    loops = 0
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        name = equation.primitive.name
        if name == 'dot_general':
            total[name, _dtype(equation)] += _dot_flops(equation)
            continue
        if name == 'conv_general_dilated':
            total[name, _dtype(equation)] += _convolution_flops(equation)
            continue
        found, times = _inner(equation, turns)
        for kind, flops in found.by_kind.items():
            total[kind] += times * flops  # type: ignore[assignment]
        loops += found.unknown_loops
        if name == 'while' and found.by_kind:
            loops += 1
    return Flops(dict(total), loops)


def _inner(equation: Any, turns: int) -> tuple[Flops, int]:
    """What the functions inside of an equation cost, and how often they run."""
    name, params = equation.primitive.name, equation.params
    if name == 'cond':
        branches = (_count(branch, turns) for branch in params['branches'])
        return max(branches, key=lambda f: f.total), 1
    if name == 'scan':
        return _count(params['jaxpr'], turns), params['length']
    if name == 'shard_map':
        sizes = [params['mesh'].shape[axis] for axis in params['newly_manual_axes']]
        return _count(params['jaxpr'], turns), math.prod(sizes)
    if name == 'pallas_call':
        return _kernel(equation, turns)
    inner = [_count(value, turns) for value in _jaxprs(params)]
    merged: collections.Counter[tuple[str, str]] = collections.Counter()
    for found in inner:
        merged.update(found.by_kind)
    times = turns if name == 'while' else 1
    return Flops(dict(merged), sum(found.unknown_loops for found in inner)), times


def _kernel(equation: Any, turns: int) -> tuple[Flops, int]:
    """A Pallas kernel: its author's estimate, else its body for every step of the grid."""
    params = equation.params
    estimate = params.get('cost_estimate')
    if estimate is not None:
        dtype = str(equation.invars[-1].aval.dtype)
        return Flops({('pallas_call', dtype): float(estimate.flops)}), 1
    grid = params['grid_mapping'].grid
    known = all(isinstance(size, int) for size in grid)
    found = _count(params['jaxpr'], turns)
    if not known:
        return Flops(found.by_kind, found.unknown_loops + 1), 1
    return found, math.prod(grid)


def _jaxprs(params: Mapping[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    values = [
        item
        for value in params.values()
        for item in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    return [value for value in values if hasattr(getattr(value, 'jaxpr', value), 'eqns')]


def _dtype(equation: Any) -> str:
    """The operands' dtype; of float32 with its precision where that is not the default."""
    left, right = (variable.aval.dtype for variable in equation.invars[:2])
    name = str(jnp.promote_types(left, right))
    precision = equation.params.get('precision')
    if precision is None or name != 'float32':
        return name
    named = precision if isinstance(precision, tuple) else (precision,)
    levels = {str(getattr(level, 'name', level)).lower() for level in named}
    highest = next((level for level in ('highest', 'high') if level in levels), None)
    return f'{name}_{highest}' if highest else name


def _dot_flops(equation: Any) -> int:
    """2 x batch x rows x columns x contracted."""
    (contracted, _), _ = equation.params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution_flops(equation: Any) -> int:
    """2 x pairs of an input and a kernel element that meet in some output element."""
    params = equation.params
    numbers = params['dimension_numbers']
    left, kernel = (variable.aval.shape for variable in equation.invars)
    result = equation.outvars[0].aval.shape
    pairs = 1
    for i, (low, _) in enumerate(params['padding']):
        pairs *= _window_pairs(
            left[numbers.lhs_spec[2 + i]],
            kernel[numbers.rhs_spec[2 + i]],
            result[numbers.out_spec[2 + i]],
            params['window_strides'][i],
            low,
            params['lhs_dilation'][i],
            params['rhs_dilation'][i],
        )
    channels = kernel[numbers.rhs_spec[1]]
    return 2 * result[numbers.out_spec[0]] * result[numbers.out_spec[1]] * channels * pairs


def _window_pairs(
    size: int, window: int, outputs: int, stride: int, low: int, holes: int, spread: int
) -> int:
    """Pairs (output, window element) that fall on a real input along one dimension.

    Output o and window element w meet at o * stride + w * spread - low of the input with `holes`
    - 1 zeros after every element.
    """
    places = np.arange(outputs)[:, None] * stride + np.arange(window) * spread - low
    real = (places >= 0) & (places <= (size - 1) * holes) & (places % holes == 0)
    return int(real.sum())


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource of one device is busy in one step, at its full rate.

    `compute` and `dcn` are least times.  `hbm` is as good as its bytes, an estimate; `ici` is the
    least time if the collectives are rings and those of different axes do not overlap.

    Attributes:
      compute: products in the matrix unit.
      hbm: traffic of the main memory.
      ici: collectives over the links between chips, one after the other.
      dcn: collectives between slices, over the data-centre network.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The busiest resource: what the step takes if everything overlaps."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """Name of the busiest resource."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(
    wanted: Topology,
    mesh: jax.sharding.Mesh,
    flops: float,
    hbm_bytes: float,
    sent: Mapping[tuple[str, ...], float],
) -> Roofline:
    """How long each resource is busy.

    Collectives are taken for rings: along every dimension of the torus in which their devices
    lie, over two links of a chip where the dimension closes to a ring, over one where it does
    not.  Those of several axes follow each other; other groups on the same links do not disturb.

    Args:
      wanted: what the mesh is made of.
      mesh: over the devices of `wanted` (`topology_devices`).
      flops: of one device: `Flops.bfloat16_passes` / devices.
      hbm_bytes: of one device (`hbm.hbm_bytes`).
      sent: bytes that one device sends, by mesh axes (`collectives.bytes_by_axes`).
    """
    chip = wanted.chip
    share = 1 / chip.devices_per_chip
    seconds = {'ici': 0.0, 'dcn': 0.0}
    for axes, size in sent.items():
        if 'slice' in axes:
            seconds['dcn'] += size / (chip.dcn_bandwidth * share)
        else:
            links = _links(wanted, mesh, axes)
            seconds['ici'] += size / (chip.ici_bandwidth * share * links / chip.ici_links)
    return Roofline(
        compute=flops / (chip.flops_per_second * share),
        hbm=hbm_bytes / (chip.hbm_bandwidth * share),
        ici=seconds['ici'],
        dcn=seconds['dcn'],
    )


def _links(wanted: Topology, mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> int:
    """Links of a chip over which a collective along `axes` can send at the same time."""
    along = [mesh.axis_names.index(axis) for axis in axes]
    places = np.array([device.coords for device in mesh.devices.flat])
    grid = np.moveaxis(places.reshape(*mesh.devices.shape, -1), along, range(len(along)))
    members = grid.reshape(math.prod(mesh.shape[axis] for axis in axes), -1, places.shape[-1])[:, 0]
    links = 0
    for side, ring, values in zip(wanted.shape, wanted.rings, members.T, strict=False):
        distinct = len(np.unique(values))
        if distinct > 1:
            links += 2 if ring and distinct == side else 1
    # Two devices of one chip exchange inside of it, faster than over all of its links.
    return links or wanted.chip.ici_links
