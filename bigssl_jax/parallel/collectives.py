"""What the devices of a compiled program send each other, read from its text.

The partitioner decides which arrays are gathered, reduced and exchanged, and the only account of
its decision is the compiled program.  For each collective the text gives the operands of one
device and the groups of devices that take part.  Bytes are those that one device sends when the
n of a group form a ring, the optimum for large arrays; b are the bytes of its operand:

    all-gather          (n - 1) b            its part travels around
    reduce-scatter      (n - 1) / n b
    all-reduce          2 (n - 1) / n b      a reduce-scatter, then an all-gather
    all-to-all          (n - 1) / n b
    collective-permute  b

The TPU compiler writes three things otherwise than they are meant:
  - a reduce-scatter is a fusion of an all-reduce and the slice of it that the device keeps;
  - a collective that runs beside other work stands in every fusion of that work, from its start
    to its end, each time with the same channel;
  - between slices data leave through `send` operations of the multi-slice runtime, which carry
    the kind of the collective as an attribute.

Devices are counted by their place in the mesh: device i of a group is `mesh.devices.flat[i]`.  A
collective has the mesh axes along which the members of its groups differ.  Groups are written in
several ways:

    {{0,1},{2,3}}                    as they are
    [2,4]<=[4,2]T(1,0)               0 ... 7 as [4, 2], transposed, cut into 2 groups of 4
    mesh['a'=4,'b'=2] {'b'}          0 ... 7 as [4, 2]; a group runs along 'b'
    mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}     numbered as in the second way first
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigssl_jax.parallel import hlo

# operation -> bytes sent for each byte of the operand, in a ring of n
_RING = {
    'all-gather': lambda n: n - 1.0,
    'reduce-scatter': lambda n: (n - 1.0) / n,
    'all-reduce': lambda n: 2.0 * (n - 1.0) / n,
    'all-to-all': lambda n: (n - 1.0) / n,
    'ragged-all-to-all': lambda n: (n - 1.0) / n,
    'collective-broadcast': lambda n: 1.0,
    'collective-permute': lambda n: 1.0,
}
OPERATIONS = tuple(_RING)
# Transfers between slices whose name is not that of the operation.
_BETWEEN_SLICES = {'ONE_TO_ONE': 'collective-permute'}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a compiled program.

    Attributes:
      operation: one of OPERATIONS.
      axes: mesh axes along which the members of a group differ.
      dtype: of the elements that travel; of the largest operand if there are several.
      bytes_per_device: sent by one device in one run of the program (see the ring above).
      count: how often it runs in one run of the program.
      group_size: devices that take part together.
      name: of the instruction in the text.
      source: where in the model it comes from, as JAX has named it; '' when the text has it not.
    """

    operation: str
    axes: tuple[str, ...]
    dtype: str
    bytes_per_device: float
    count: int
    group_size: int
    name: str
    source: str


def collectives(compiled_text: str, mesh: Any, assumed_turns: int = 1) -> list[Collective]:
    """The collectives of `compiled.as_text()`, dearest first.

    Those of one device alone move nothing and are left out.

    Args:
      compiled_text: of a program compiled for the devices of `mesh`.
      mesh: a Mesh or AbstractMesh; gives the axes their names.
      assumed_turns: of loops whose number of turns the text does not tell.

    Raises:
      ValueError: replica groups of a form that is not known.
    """
    program = hlo.parse(compiled_text)
    counts = hlo.execution_counts(program, assumed_turns)
    fusions = hlo.fusions(program)
    found: dict[tuple[str, str], Collective] = {}
    for name, computation in program.computations.items():
        for instruction in computation.values():
            channel = re.search(r'channel_id=(\d+)', instruction.attributes)
            where, outer = fusions.get(name, (name, instruction))
            scattered = (
                instruction.operation == 'all-reduce'
                and name in fusions
                and _is_scattered(instruction, computation)
            )
            # Parts of one asynchronous collective: same channel, fused into the same computation.
            # A fused reduce-scatter is whole, and combined ones may share a channel.
            key = (instruction.name, where)
            if channel and name in fusions and not scattered:
                key = (channel[1], where)
            if key in found or not counts.get(name):
                continue
            operation = instruction.operation.removesuffix('-start')
            if operation in _RING:
                groups = device_groups(instruction.attributes, _num_devices(mesh))
                if scattered:
                    operation = 'reduce-scatter'
                axes, size = _axes(groups, mesh), groups.shape[1] if len(groups) else 1
            elif transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', _sent(instruction)):
                operation = _BETWEEN_SLICES.get(transfer[1], transfer[1].lower().replace('_', '-'))
                axes, size = ('slice',), mesh.shape['slice']
            else:
                continue
            found[key] = _collective(
                operation, instruction, computation, counts[name], axes, size, outer
            )
    sent = [item for item in found.values() if item.bytes_per_device]
    return sorted(sent, key=lambda item: -item.bytes_per_device)


def _num_devices(mesh: Any) -> int:
    return math.prod(mesh.shape.values())


def _sent(instruction: hlo.Instruction) -> str:
    """The attributes of a `send`; nothing of any other operation."""
    return instruction.attributes if instruction.operation == 'send' else ''


def _is_scattered(reduction: hlo.Instruction, computation: Mapping[str, hlo.Instruction]) -> bool:
    """Whether only slices of the reduction are used, inside of the same fusion."""
    results = {reduction.name}
    slices, others = 0, 0
    for instruction in computation.values():  # operands come before their users
        if not results.intersection(instruction.operands):
            continue
        if instruction.operation in ('get-tuple-element', 'bitcast'):
            results.add(instruction.name)
        elif instruction.operation == 'dynamic-slice':
            slices += 1
        else:
            others += 1
    return slices > 0 and others == 0


def _axes(groups: np.ndarray, mesh: Any) -> tuple[str, ...]:
    """Mesh axes along which the members of some group differ."""
    sizes = tuple(mesh.shape[axis] for axis in mesh.axis_names)
    places = np.stack(np.unravel_index(groups, sizes), axis=-1)  # [groups, members, axes]
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(np.asarray(mesh.axis_names)[differ].tolist())


def _collective(
    operation: str,
    instruction: hlo.Instruction,
    computation: Mapping[str, hlo.Instruction],
    count: int,
    axes: tuple[str, ...],
    size: int,
    outer: hlo.Instruction,
) -> Collective:
    arrays = [
        array
        for operand in instruction.operands
        if operand in computation
        for array in computation[operand].arrays
    ]
    each = sum(array.size for array in arrays) * (_RING[operation](size) if size > 1 else 0.0)
    named = (re.search(r'op_name="([^"]*)"', i.attributes) for i in (instruction, outer))
    source = next((name for name in named if name), None)
    return Collective(
        operation=operation,
        axes=axes,
        dtype=max(arrays, key=lambda array: array.size).dtype if arrays else '',
        bytes_per_device=count * each,
        count=count,
        group_size=size,
        name=instruction.name,
        source=source[1] if source else '',
    )


def device_groups(attributes: str, num_devices: int) -> np.ndarray:
    """int [groups, members]: which devices take part together; pairs (from, to) for a permute.

    Raises:
      ValueError: the attributes hold no groups of a known form.
    """
    if pairs := re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', attributes):
        listed = _listed(pairs[1]).astype(int).reshape(-1, 2)  # there may be none
        return listed[listed[:, 0] != listed[:, 1]]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{((?:'[^}]*)?)\}", attributes):
        return _mesh_groups(mesh[1], mesh[2], mesh[3], num_devices)
    iota = r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
    if numbered := re.search(iota, attributes):
        return _numbered(numbered[2], numbered[3]).reshape(_integers(numbered[1]))
    if listed_groups := re.search(r'replica_groups=\{(\{.*?\})\}', attributes):
        return _listed(listed_groups[1])
    if re.search(r'replica_groups=\{\}', attributes):
        return np.arange(num_devices)[None]
    raise ValueError(f'no replica groups of a known form in {attributes[:200]!r}')


def _listed(text: str) -> np.ndarray:
    """`{0,1},{2,3}` -> [[0, 1], [2, 3]]."""
    return np.array([_integers(group) for group in re.findall(r'\{([\d,]*)\}', text)])


def _numbered(sides: str, order: str | None) -> np.ndarray:
    """0, 1, ... of shape `sides`, transposed by `order`, flat."""
    shape = _integers(sides)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose(_integers(order)) if order else numbers).ravel()


def _mesh_groups(sizes: str, numbering: str, along: str, num_devices: int) -> np.ndarray:
    """Groups along some axes of a mesh that the compiler made up for itself."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    names = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    # 'a':(2)4 is the part of axis a of size 4 that lies inside of its outermost 2.
    shape: list[int] = []
    chosen: list[int] = []
    for axis, size in axes.items():
        parts = sorted((int(before), int(part)) for n, before, part in names if n == axis and part)
        whole = any(n == axis and not part for n, _, part in names)
        done = 1
        for before, part in parts:
            shape += [before // done, part]
            chosen.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
        if whole:
            chosen.append(len(shape) - 1)
    given = re.search(r'device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)', numbering)
    devices = _numbered(given[1], given[2]) if given else np.arange(num_devices)
    others = [i for i in range(len(shape)) if i not in chosen]
    members = math.prod(shape[i] for i in chosen)
    return devices.reshape(shape).transpose(others + chosen).reshape(-1, members)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(',') if number]


def bytes_by_axes(found: list[Collective]) -> dict[tuple[str, ...], float]:
    """Bytes that one device sends along each set of mesh axes, in one run of the program."""
    totals: dict[tuple[str, ...], float] = {}
    for item in found:
        totals[item.axes] = totals.get(item.axes, 0.0) + item.bytes_per_device
    return totals


def ideal_fsdp_bytes(
    parameter_bytes: float, gradient_bytes: float, mesh: Any, gathers: int = 2
) -> dict[str, float]:
    """The least that one device sends for parameters and gradients in one step.

    Every parameter is gathered over `fsdp` (the (n-1)/n that a device lacks is what each also
    sends) and its gradient reduce-scattered; then each device's part of the gradient is
    all-reduced over the other axes that split the batch.  The parts of `tensor` go separately.

    Args:
      parameter_bytes: of all parameters, in the dtype in which they travel.
      gradient_bytes: of all gradients, in the dtype in which they travel.
      mesh: with axes named as in `parallel.mesh`.
      gathers: per step and parameter: for the forward and for the backward pass, unless the
        gathered parameters are kept between them.  Micro-batches multiply it.

    Returns:
      operation -> bytes per device and step.
    """
    shards = mesh.shape['fsdp']
    copies = math.prod(mesh.shape[a] for a in ('slice', 'data') if a in mesh.shape)
    parts = mesh.shape.get('tensor', 1)
    around = (shards - 1) / shards
    return {
        'all-gather': gathers * around * parameter_bytes / parts,
        'reduce-scatter': around * gradient_bytes / parts,
        'all-reduce': 2 * (copies - 1) / copies * gradient_bytes / parts / shards,
    }
