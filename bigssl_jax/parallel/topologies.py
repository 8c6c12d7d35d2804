"""TPU chips and cloud slice names: what a plan is made for, without a TPU at hand.

libtpu compiles for a slice that is described by name (`v5e:16x16`), so one CPU machine can lower
and compile the step of a pod.  The names of the cloud are others, and count differently:

    v5e-256, v6e-256            chips
    v3-512, v4-512, v5p-128     TensorCores, two to a chip: v5p-128 is 64 chips, 4x4x4
    tpu7x-128                   the two halves of each chip: 64 chips, 4x4x4
    2xv5e-256                   two slices of 256 chips, joined by the data-centre network
    v5p:4x4x8                   the shape itself, in chips

JAX shows one device per chip, but two on v3 and TPU7x, whose halves have memory of their own.

The figures are those of makers' documents, per chip.  ICI bandwidth is what one chip can send in
one direction over all of its links together: links x bytes/s of one link one way.  The documents
of Google Cloud quote the sum of both directions, so half of theirs; per link the book "How to
scale your model" gives a tenth less than the nominal rate, which is what is used here.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

from bigssl_jax.config import UserError
from bigssl_jax.parallel.startup import use_cpu

GIB = 2**30
_BOOK = "'How to scale your model', table of TPU specs (jax-ml.github.io/scaling-book/tpus)"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip; a device is a chip divided by `devices_per_chip`.

    Attributes:
      name: as in the cloud's names.
      flops_per_second: dense bfloat16 multiply-adds with float32 sums, two FLOPs each.
      hbm_bytes: memory that a compiled program may use; less than what the chip has.
      hbm_bandwidth: bytes/s.
      ici_links: links to neighbouring chips, two per dimension of the torus.
      ici_bandwidth: bytes/s sent in one direction, summed over `ici_links`.
      ring_length: a dimension of a slice closes to a ring when its chips are a multiple of this;
        of a 3-D slice only if all three are. Otherwise it is a line.
      dcn_bandwidth: bytes/s sent over the data-centre network, the chip's share of its host's.
      devices_per_chip: as JAX shows them.
      source: where the figures are from, and which of them are doubtful.
    """

    name: str
    flops_per_second: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_links: int
    ici_bandwidth: float
    ring_length: int
    dcn_bandwidth: float
    devices_per_chip: int
    source: str


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of chips.

    Attributes:
      name: as the user gave it.
      chip: what it is made of.
      shape: chips along each dimension of one slice's torus.
      slices: joined by the data-centre network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Chips in all slices together."""
        return self.slices * math.prod(self.shape)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which dimensions of a slice close to a ring."""
        closed = tuple(side % self.chip.ring_length == 0 for side in self.shape)
        return (all(closed),) * 3 if len(self.shape) == 3 else closed

    @property
    def devices(self) -> int:
        """Devices in all slices together, as JAX shows them."""
        return self.chips * self.chip.devices_per_chip


@dataclasses.dataclass(frozen=True)
class _Family:
    """How libtpu and the cloud name the slices of one chip.

    `counted` is what one chip adds to the number in a cloud name; `smallest` and `largest` are in
    chips.
    """

    compiler_name: str
    chip_config: str
    counted: int
    dimensions: int
    smallest: int
    largest: int


def _source(page: str, link: str, dcn: str) -> str:
    """Where a chip's figures are from: its page, one ICI link, and the data-centre network."""
    return (
        f'Google Cloud TPU documentation, page {page}: FLOP/s, HBM bandwidth. HBM bytes: what'
        f' libtpu 0.0.51 lets a program use. One ICI link: {link}. DCN: {dcn}.'
    )


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name='v3',
            flops_per_second=123e12,
            hbm_bytes=int(2 * 15.48 * GIB),
            hbm_bandwidth=900e9,
            ici_links=4,
            ici_bandwidth=4 * 82e9,
            ring_length=32,
            dcn_bandwidth=6.25e9,
            devices_per_chip=2,
            source=_source(
                'TPU v3',
                '656 Gbit/s (Norrie et al., IEEE Micro 2021), uncertain: the book has 100 GB/s',
                f'uncertain: the typical 6.25 GB/s of {_BOOK}',
            ),
        ),
        Chip(
            name='v4',
            flops_per_second=275e12,
            hbm_bytes=int(30.75 * GIB),
            hbm_bandwidth=1200e9,
            ici_links=6,
            ici_bandwidth=6 * 45e9,
            ring_length=4,
            dcn_bandwidth=6.25e9,
            devices_per_chip=1,
            source=_source('TPU v4', _BOOK, _BOOK),
        ),
        Chip(
            name='v5e',
            flops_per_second=197e12,
            hbm_bytes=int(15.75 * GIB),
            hbm_bandwidth=819e9,
            ici_links=4,
            ici_bandwidth=4 * 45e9,
            ring_length=16,
            dcn_bandwidth=3.125e9,
            devices_per_chip=1,
            source=_source('TPU v5e', _BOOK, '6.4 Tbit/s a pod of 256'),
        ),
        Chip(
            name='v5p',
            flops_per_second=459e12,
            hbm_bytes=int(95.73 * GIB),
            hbm_bandwidth=2765e9,
            ici_links=6,
            ici_bandwidth=6 * 90e9,
            ring_length=4,
            dcn_bandwidth=6.25e9,
            devices_per_chip=1,
            source=_source('TPU v5p', _BOOK, '50 Gbit/s a chip'),
        ),
        Chip(
            name='v6e',
            flops_per_second=918e12,
            hbm_bytes=int(31.24 * GIB),
            hbm_bandwidth=1638e9,
            ici_links=4,
            ici_bandwidth=4 * 90e9,
            ring_length=16,
            dcn_bandwidth=12.5e9,
            devices_per_chip=1,
            source=_source('TPU v6e', _BOOK, '100 Gbit/s a chip'),
        ),
        Chip(
            name='tpu7x',
            flops_per_second=2307e12,
            hbm_bytes=int(2 * 94.74 * GIB),
            hbm_bandwidth=7380e9,
            ici_links=6,
            ici_bandwidth=6 * 90e9,
            ring_length=4,
            dcn_bandwidth=12.5e9,
            devices_per_chip=2,
            source=_source('TPU7x (Ironwood)', _BOOK, '100 Gbit/s a chip'),
        ),
    )
}

_FAMILIES = {
    'v3': _Family('v3', '', counted=2, dimensions=2, smallest=4, largest=1024),
    'v4': _Family('v4', 'megacore', counted=2, dimensions=3, smallest=4, largest=4096),
    'v5e': _Family('v5e', '', counted=1, dimensions=2, smallest=1, largest=256),
    'v5p': _Family('v5p', '', counted=2, dimensions=3, smallest=4, largest=6144),
    'v6e': _Family('v6e', '', counted=1, dimensions=2, smallest=1, largest=256),
    'tpu7x': _Family('TPU7x', '', counted=2, dimensions=3, smallest=4, largest=9216),
}
_ALIASES = {'v5litepod': 'v5e', 'v5lite': 'v5e', 'trillium': 'v6e', 'ironwood': 'tpu7x'}

# Below one cube of 4x4x4 the slices that the cloud offers.
_SMALL_3D = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
_CUBE = 4


def _shape_3d(chips: int) -> tuple[int, ...] | None:
    """Whole cubes of 4x4x4, as near to a cube as the number allows: 1024 chips are 8x8x16."""
    if chips in _SMALL_3D:
        return _SMALL_3D[chips]
    cubes, rest = divmod(chips, _CUBE**3)
    if rest or not cubes:
        return None
    shapes = [
        (a, b, cubes // a // b)
        for a in range(1, math.isqrt(cubes) + 1)
        if cubes % a == 0
        for b in range(a, cubes + 1)
        if (cubes // a) % b == 0 and b <= cubes // a // b
    ]
    best = min(shapes, key=lambda shape: shape[2] - shape[0])
    return tuple(_CUBE * side for side in best)


def _shape_2d(chips: int) -> tuple[int, ...] | None:
    """A square or two squares side by side, of a power of two of chips (two chips: none)."""
    exponent = chips.bit_length() - 1
    if chips != 2**exponent or chips == 2:
        return None
    return 2 ** (exponent // 2), 2 ** (exponent - exponent // 2)


def _shape(family: _Family, chips: int) -> tuple[int, ...] | None:
    """The usual shape of a slice of so many chips, or None where there is none."""
    if not family.smallest <= chips <= family.largest:
        return None
    return _shape_2d(chips) if family.dimensions == 2 else _shape_3d(chips)


def topology_names() -> list[str]:
    """Usual single-slice names, smallest first, chip by chip; others of the pattern are known too.

    Powers of two up to 2048 chips; 3-D slices of any number of 4x4x4 cubes have names as well.
    """
    return [
        f'{name}-{chips * family.counted}'
        for name, family in _FAMILIES.items()
        for chips in (2**exponent for exponent in range(12))
        if _shape(family, chips) is not None
    ]


def topology(name: str) -> Topology:
    """The slice, or slices, that `name` stands for.

    Args:
      name: `v5e-256`, `2xv5e-256` (two slices), or a shape in chips: `v5p:4x4x8`.

    Raises:
      UserError: no such name; the error gives the nearest ones.
    """
    match = re.fullmatch(r'(?:(\d+)x)?([a-z][a-z0-9]*)([-:])([\dx]+)', name.strip().lower())
    if match:
        chip_name = _ALIASES.get(match[2], match[2])
        slices = int(match[1] or 1)
        if chip_name in _FAMILIES and slices > 0:
            shape = _read_size(_FAMILIES[chip_name], match[3], match[4])
            if shape is not None:
                return Topology(name.strip(), CHIPS[chip_name], shape, slices)
    raise UserError(f'unknown topology {name!r}: {_hint(name)}')


def _read_size(family: _Family, separator: str, size: str) -> tuple[int, ...] | None:
    """The slice shape that is written after the chip's name; None if there is no such slice."""
    if separator == '-':
        if not size.isdigit() or int(size) % family.counted:
            return None
        return _shape(family, int(size) // family.counted)
    sides = tuple(int(side) if side else 0 for side in size.split('x'))
    fits = len(sides) == family.dimensions and family.smallest <= math.prod(sides) <= family.largest
    return sides if fits else None


def _hint(name: str) -> str:
    """What might have been meant, or what there is."""
    names = topology_names()
    prefix = re.match(r'\s*\d+x(?=[a-z])', name.lower())
    bare = name.strip().lower()[prefix.end() if prefix else 0 :]
    shaped = re.match(r'([a-z0-9]+):', bare)
    if shaped and _ALIASES.get(shaped[1], shaped[1]) in _FAMILIES:
        family = _FAMILIES[_ALIASES.get(shaped[1], shaped[1])]
        example = 'x'.join(['4'] * family.dimensions)
        return (
            f'a shape has {family.dimensions} sides and at most {family.largest} chips,'
            f' such as {shaped[1]}:{example}'
        )
    near = difflib.get_close_matches(bare, names, n=3, cutoff=0.6)
    # The nearest spelling is not the nearest size: v5e-200 should lead to v5e-128 and v5e-256.
    sized = re.fullmatch(r'([a-z0-9]+)-(\d+)', bare)
    if sized and _ALIASES.get(sized[1], sized[1]) in _FAMILIES:
        chip = _ALIASES.get(sized[1], sized[1])
        known = [int(n.split('-')[1]) for n in names if n.startswith(f'{chip}-')]
        known.sort(key=lambda size: abs(math.log(size / max(int(sized[2]), 1))))
        near = [f'{chip}-{size}' for size in sorted(known[:3])]
    if near:
        return f'did you mean {", ".join(near)}?'
    return (
        'give CHIP-SIZE with CHIP one of ' + ', '.join(CHIPS) + ', such as v5e-256, 2xv5e-256 for'
        ' two slices, or a shape in chips, such as v5p:4x4x8'
    )


def topology_devices(wanted: Topology) -> list[Any]:
    """Ahead-of-time devices of `wanted`: they can be compiled for, and hold no data.

    Call `configure_ahead_of_time` first.  Devices of several slices carry `slice_index`.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(
            f'topology {wanted.name}: compiling for a TPU needs the package libtpu; install it'
            " with: pip install 'bigssl-jax[plan]'"
        )
    from jax.experimental import topologies

    family = _FAMILIES[wanted.chip.name]
    shape = 'x'.join(map(str, wanted.shape))
    options: dict[str, Any] = {}
    if family.chip_config:
        options['chip_config_name'] = family.chip_config
    if math.prod(wanted.shape) == 1:
        options['chips_per_host_bounds'] = (1, 1, 1)  # libtpu expects 2x2x1 unless told
    if wanted.slices > 1:
        options['num_slices'] = wanted.slices
    try:
        description = topologies.get_topology_desc(
            f'{family.compiler_name}:{shape}', platform='tpu', **options
        )
    except Exception as error:
        raise UserError(f'topology {wanted.name}: libtpu refuses {shape}: {error}') from error
    devices = list(description.devices)
    if len(devices) != wanted.devices:
        raise RuntimeError(
            f'topology {wanted.name}: libtpu shows {len(devices)} devices,'
            f' the table of chips says {wanted.devices}'
        )
    return devices


def configure_ahead_of_time() -> None:
    """Sets the environment for compiling without a TPU; call it before the first backend starts.

    The CPU stays the default backend, libtpu asks no cloud metadata server, and several processes
    may compile at the same time (libtpu otherwise takes a lock file: one process a machine).
    """
    os.environ.update(
        TPU_SKIP_MDS_QUERY='1',
        ALLOW_MULTIPLE_LIBTPU_LOAD='1',
        # These two only keep libtpu from complaining that it cannot find out for itself.
        TPU_ACCELERATOR_TYPE='v5litepod-16',
        TPU_WORKER_HOSTNAMES='localhost',
    )
    os.environ.setdefault('TPU_LOG_DIR', 'disabled')  # else a file in /tmp for every process
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    use_cpu()
