"""What a compiled stage costs: FLOPs, bytes, bounds of the step time, chip-hours.

Each of the four resources (products, HBM, links inside a slice, network between slices) must at
least be busy for its work divided by its peak rate; a step takes as long as the busiest of them
when everything overlaps, and as long as all together when nothing does.  So the first is a lower
bound of the step time and makes an upper bound of the MFU, where products or the network between
slices are the busiest.  Where HBM or ICI is, it is an estimate: memory traffic is one itself
(parallel/hbm.py), and collectives are taken for rings (parallel/cost.py).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from bigssl_jax.config import ConfigError
from bigssl_jax.parallel import make_mesh
from bigssl_jax.parallel.collectives import ideal_fsdp_bytes
from bigssl_jax.parallel.cost import Flops, Roofline, count_flops, roofline
from bigssl_jax.parallel.topologies import Topology
from bigssl_jax.stages.plan.compilation import DRAFT, FULL, Compiled, Memory, compile_program
from bigssl_jax.stages.plan.search import Attempt
from bigssl_jax.stages.plan.step import (
    ASSUMED_VOCABULARY,
    Batch,
    Program,
    changed,
    is_training,
    stage_program,
)

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device sends along some mesh axes in a step.

    Attributes:
      axes: the mesh axes.
      operations: operation -> bytes.
      bytes: of all operations.
      ideal: the least for parameters and gradients; None for axes that carry activations.
    """

    axes: tuple[str, ...]
    operations: Mapping[str, float]
    bytes: float
    ideal: float | None


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest batch that fits, drafted (see `compilation.DRAFT`), and the next one, refused.

    Attributes:
      rows: of the global batch of the largest stream.
      rows_per_device: as far as the mesh splits batches.
      changes: config fields that make it.
      peak: bytes of HBM at its peak.
      refused_rows: the smallest batch that was seen not to fit; None: none was.
      crashed: whether that one does not fit because the compiler crashes.
    """

    rows: int
    rows_per_device: float
    changes: Mapping[str, Any]
    peak: int
    refused_rows: int | None
    crashed: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a stage costs on a topology.

    Attributes:
      experiment, stage, kind: whose plan it is.
      topology, chip, chips, devices: where; JAX shows one or two devices per chip.
      mesh: axis -> size.
      batches: objective -> its batch.
      parameters: number of parameters.
      held: what lies in memory between steps -> bytes per device.
      limit: bytes of HBM that a program may use, per device.
      fits: whether the program compiles; if not, what follows from the compiled program is None.
      needed, complaint: bytes per device that the compiler wanted, and its words if it did not fit.
      memory: of one device.
      model_flops: of one step, all devices: without anything computed twice.
      hardware_flops: as the program runs, rematerialisation included.
      traffic: bytes between devices, by mesh axes.
      hbm_bytes: read and written by one device, an estimate.
      roofline: seconds that each resource is busy in a step.
      model_flops_seconds: of the model FLOPs at the chips' peak.
      audio_hours: in one step, padding included.
      pass_hours: of one pass over the stage's data; 0: not known.
      largest: the largest batch that fits; None when it was not looked for.
      remedies: changes of the config with which a plan that does not fit does.
      assumptions: what the config leaves open, and what was taken.
      compile_seconds: that the compiler took, here or when the answer was kept.
    """

    experiment: str
    stage: str
    kind: str
    topology: str
    chip: str
    chips: int
    devices: int
    mesh: Mapping[str, int]
    batches: Mapping[str, Batch]
    parameters: int
    held: Mapping[str, int]
    limit: int
    fits: bool
    needed: int
    complaint: str
    memory: Memory | None
    model_flops: float
    hardware_flops: float
    traffic: tuple[Traffic, ...]
    hbm_bytes: float
    roofline: Roofline | None
    model_flops_seconds: float
    audio_hours: float
    pass_hours: float
    largest: Largest | None
    remedies: tuple[Mapping[str, Any], ...]
    assumptions: tuple[str, ...]
    compile_seconds: float

    @property
    def headroom(self) -> int:
        """Bytes of HBM per device that are left at the peak; negative when it does not fit."""
        return self.limit - self.needed

    @property
    def is_bound(self) -> bool:
        """Whether times are lower bounds: HBM and ICI, when they are the busiest, are estimates."""
        return self.roofline is not None and self.roofline.bound in ('compute', 'dcn')

    @property
    def serial_seconds(self) -> float | None:
        """The step if no resource worked while another does."""
        return sum(dataclasses.astuple(self.roofline)) if self.roofline else None

    @property
    def mfu(self) -> float | None:
        """Upper bound of the model FLOPs utilisation."""
        return self.model_flops_seconds / self.roofline.seconds if self.roofline else None

    @property
    def audio_hours_per_chip_hour(self) -> float | None:
        """Upper bound: hours of audio, padding included, that one chip gets through in an hour."""
        if self.roofline is None:
            return None
        return self.audio_hours * 3600 / self.roofline.seconds / self.chips

    @property
    def pass_chip_hours(self) -> float | None:
        """Lower bound: chip-hours for one pass over the stage's data."""
        speed = self.audio_hours_per_chip_hour
        return self.pass_hours / speed if speed and self.pass_hours else None

    def to_json(self) -> dict[str, Any]:
        """All fields and what follows from them, as JSON has it."""
        result = dataclasses.asdict(self)
        derived = ('headroom', 'is_bound', 'mfu', 'audio_hours_per_chip_hour', 'pass_chip_hours')
        result |= {name: getattr(self, name) for name in derived}
        for name, batch in self.batches.items():
            result['batches'][name]['seconds'] = batch.seconds
        if self.roofline:
            result['roofline'] |= {
                'seconds': self.roofline.seconds,
                'bound': self.roofline.bound,
                'serial': self.serial_seconds,
            }
        return result


# ---------------------------------------------------------------------------------------------
# one plan


@dataclasses.dataclass(frozen=True)
class Question:
    """A stage of a config on a topology: what plans, remedies and searches are asked about.

    Attributes:
      config: resolved.
      stage: its name.
      where: the topology.
      devices: ahead-of-time devices of it.
      cache: folder of measurements.
      report: is told, in a line, what is being compiled.
    """

    config: Mapping[str, Any]
    stage: str
    where: Topology
    devices: Sequence[Any]
    cache: pathlib.Path
    report: Report

    def change(self, changes: Mapping[str, Any]) -> 'Question':
        """The same question with some fields of the config changed."""
        return dataclasses.replace(self, config=changed(self.config, changes))

    def mesh(self) -> Mesh:
        """The config's mesh over the topology; its `slice` axis follows the topology.

        Raises:
          ConfigError: the sizes do not multiply to the devices.
        """
        axes = {**self.config['compute']['mesh'], 'slice': self.where.slices}
        try:
            return make_mesh(axes, list(self.devices))
        except ConfigError as error:
            raise ConfigError(
                f'{self.where.name} ({self.where.devices} devices): {error} (compute.mesh)'
            ) from error

    def program(self) -> Program:
        """The stage's program on that mesh."""
        return stage_program(self.config, self.stage, self.mesh())

    def compile(self, program: Program, what: str, effort: str) -> Compiled:
        """Compiles, or finds what was measured before."""
        self.report(f'{self.stage} on {self.where.name}: {what}')
        return compile_program(program, device_limit(self.where), self.cache, effort)

    def attempt(self, changes: Mapping[str, Any], what: str, units: int = 0) -> Attempt:
        """Drafts with some changes; arguments that alone do not fit are refused without."""
        question = self.change(changes)
        program = question.program()
        held = sum(program.parts.values())
        if held > device_limit(self.where):
            return Attempt(units, False, held, device_limit(self.where))
        found = question.compile(program, what, DRAFT)
        return Attempt(units, found.fits, found.needed, found.available, (question, found))


def device_limit(where: Topology) -> int:
    """Bytes of HBM of one device that a program may use."""
    return where.chip.hbm_bytes // where.chip.devices_per_chip


def plan_question(question: Question, effort: str = FULL) -> Plan:
    """The plan of a stage as it is configured.

    Args:
      question: what is planned.
      effort: of the compiler.

    Raises:
      ConfigError, DataError: the mesh does not match the topology, the batch or the parameters.
    """
    program = question.program()
    fields = question.config['stages'][question.stage]
    what = f'compiling {program.parameters / 1e6:,.0f} M parameters'
    found = question.compile(program, what, effort)
    model, hardware = step_flops(question, program)
    where = question.where
    traffic = link_traffic(question, program, found)
    return Plan(
        experiment=question.config['name'],
        stage=question.stage,
        kind=fields['kind'],
        topology=where.name,
        chip=where.chip.name,
        chips=where.chips,
        devices=where.devices,
        mesh=dict(program.mesh.shape),
        batches=program.batches,
        parameters=program.parameters,
        held=program.parts,
        limit=found.available,
        fits=found.fits,
        needed=found.needed,
        complaint=found.complaint,
        memory=found.memory,
        model_flops=model.total,
        hardware_flops=hardware.total,
        traffic=traffic,
        hbm_bytes=found.hbm_bytes,
        roofline=step_seconds(where, program.mesh, hardware, found.hbm_bytes, traffic)
        if found.fits
        else None,
        model_flops_seconds=model.total / (where.chips * where.chip.flops_per_second),
        audio_hours=program.audio_seconds / 3600,
        pass_hours=pass_hours(question.config, question.stage),
        largest=None,
        remedies=(),
        assumptions=assumptions(question.config, question.stage, found.unread, program.turns),
        compile_seconds=found.seconds,
    )


def step_flops(question: Question, program: Program) -> tuple[Flops, Flops]:
    """(model FLOPs, hardware FLOPs) of a step, all devices together.

    Model FLOPs are those of the same step with nothing rematerialised.
    """
    hardware = count_flops(program.call, *program.arguments, turns=program.turns)
    if not is_training(question.config, question.stage):
        return hardware, hardware
    plain = question.change({'encoder.remat': 'none'}).program()
    return count_flops(plain.call, *plain.arguments, turns=program.turns), hardware


def step_seconds(
    where: Topology,
    mesh: Mesh,
    hardware: Flops,
    hbm_bytes: float,
    traffic: Sequence[Traffic],
) -> Roofline:
    """Seconds that each resource is busy in a step."""
    return roofline(
        where,
        mesh,
        flops=hardware.bfloat16_passes / where.devices,
        hbm_bytes=hbm_bytes,
        sent={row.axes: row.bytes for row in traffic if row.bytes},
    )


def link_traffic(question: Question, program: Program, found: Compiled) -> tuple[Traffic, ...]:
    """Bytes that one device sends in a step, by mesh axes, beside the least there could be.

    A collective among n devices in s slices is best done slice by slice: of the bytes that a device
    sends, (s - 1) / (n - 1) then cross the network between slices, and the rest stays inside.
    Nothing is known, and nothing returned, of a program that does not fit or cannot be read.
    """
    if not found.fits or found.unread:
        return ()
    slices = program.mesh.shape['slice']
    by_axes: dict[tuple[str, ...], dict[str, float]] = {}

    def add(axes: tuple[str, ...], operation: str, sent: float) -> None:
        operations = by_axes.setdefault(axes, {})
        operations[operation] = operations.get(operation, 0.0) + sent

    for item in found.collectives:
        axes, sent = tuple(item['axes']), item['bytes_per_device']
        rest = tuple(axis for axis in axes if axis != 'slice')
        across = 0.0
        if 'slice' in axes:
            across = sent * ((slices - 1) / (item['group_size'] - 1) if rest else 1.0)
            add(('slice',), item['operation'], across)
        if rest:
            add(rest, item['operation'], sent - across)
    ideal = _ideal_bytes(question, program)
    for axes in ideal:
        by_axes.setdefault(axes, {})
    rows = [
        Traffic(axes, operations, sum(operations.values()), ideal.get(axes))
        for axes, operations in by_axes.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def _ideal_bytes(question: Question, program: Program) -> dict[tuple[str, ...], float]:
    """Axes -> least bytes for parameters and gradients, both travelling in the compute dtype.

    Gradients are summed slice by slice: inside over `data`, then a `data`-th part between slices.
    """
    width = 2 if question.config['encoder']['dtype'] == 'bfloat16' else 4
    size = float(program.parameters * width)
    shape = program.mesh.shape
    training, pieces = is_training(question.config, question.stage), 1
    if training:
        pieces = question.config['stages'][question.stage]['optimizer']['micro_batches']
    inside = AbstractMesh((1, *program.mesh.axis_sizes[1:]), program.mesh.axis_names)
    least = ideal_fsdp_bytes(size, size * training, inside, (1 + training) * pieces)
    found: dict[tuple[str, ...], float] = {}
    if shape['fsdp'] > 1:
        found[('fsdp',)] = least['all-gather'] + pieces * least['reduce-scatter']
    if shape['data'] > 1 and training:
        found[('data',)] = least['all-reduce']
    if shape['slice'] > 1 and training:
        across = 2 * (shape['slice'] - 1) / shape['slice']
        found[('slice',)] = across * size / (shape['data'] * shape['fsdp'] * shape['tensor'])
    return found


def pass_hours(config: Mapping[str, Any], stage: str) -> float:
    """Hours of one pass over a stage's data: `compute.pass_hours`, or its selections' `hours`."""
    given = config['compute']['pass_hours'].get(stage)
    if given:
        return float(given)
    fields = config['stages'][stage]
    names = [fields['selection']] if 'selection' in fields else []
    for stream in fields.get('streams', {}).values():
        names += [source['selection'] for source in stream['sources'].values()]
    hours = [config['selections'][name].get('hours') for name in dict.fromkeys(names)]
    return float(sum(hours)) if all(hours) else 0.0


def assumptions(
    config: Mapping[str, Any], stage: str, unread: str = '', turns: int = 1
) -> tuple[str, ...]:
    """What config and compiler leave open, and what the plan takes instead.

    Args:
      config, stage: of the plan.
      unread: why the compiled program could not be read; '' when it could.
      turns: assumed of loops of unknown length.
    """
    found = ['every utterance is as long as allowed: hours of audio include padding']
    labelled = config['tokenizer']['selection'] and config['stages'][stage]['kind'] != 'pretrain'
    if labelled and not config['tokenizer']['vocabulary_size']:
        found.append(f'the tokenizer has {ASSUMED_VOCABULARY} ids; its texts will decide')
    if turns > 1:
        found.append(f'the search makes {turns:,} moves: one a frame, one a label of the longest')
    decoder = config['stages'][stage].get('decoder', {})
    if config['stages'][stage]['kind'] == 'pseudo_label' and (decoder['lm'] or decoder['ngram']):
        found.append('the search listens to no language model: what it costs is not counted')
    if unread:
        found.append(
            'HBM and links take no time, because this jaxlib cannot read the compiled program'
            f' ({unread}); a newer JAX may'
        )
    return tuple(found)
