"""Reads the text of a compiled program: what each computation does, and how often it runs.

`compiled.as_text()` is a list of computations, each a list of instructions:

    %body (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
      %w = f32[16,8]{1,0:T(8,128)S(1)} all-gather(%slice), channel_id=1, replica_groups=[2,4]<=[8]
      ROOT %t = (s32[], f32[16,8]{1,0}) tuple(%i, %w)
    }

An instruction has a name, a type with its layout (`S(1)`: not in the main memory), an operation,
operands and attributes.  Computations call each other: a fusion its body, a loop its condition and
body, an asynchronous start what it wraps.  A loop's body stands there once and runs as often as
the loop turns, so anything that is added up over a program needs `execution_counts`.

The text has no promised grammar.  Read here is what the TPU and CPU compilers of XLA write for
JAX 0.10 to 0.12.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

# Bytes of one element; sub-byte types are stored in bytes here, which overstates them.
ELEMENT_BYTES = {
    'pred': 1, 's2': 1, 'u2': 1, 's4': 1, 'u4': 1, 's8': 1, 'u8': 1,
    's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8,
    'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8, 'c64': 8, 'c128': 16,
    'token': 0, 'opaque': 0,
}  # fmt: skip

_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
_CALLED = re.compile(r'\b(?:calls|body|condition|to_apply|\w+_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\b(?:branch_computations|called_computations)=\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type."""

    dtype: str
    shape: tuple[int, ...]
    memory: int  # 0: the main memory (HBM); others are on the chip

    @property
    def size(self) -> int:
        """Bytes, without the padding of tiled layouts."""
        per_element = 1 if self.dtype.startswith('f8') else ELEMENT_BYTES[self.dtype]
        return math.prod(self.shape) * per_element


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = type operation(operands), attributes`."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, in order; one unless the type is a tuple."""
        return tuple(
            Array(
                dtype,
                tuple(int(side.lstrip('<=')) for side in sides.split(',') if side),
                int(space[1]) if (space := re.search(r'S\((\d+)\)', layout or '')) else 0,
            )
            for dtype, sides, layout in _ARRAY.findall(self.type)
        )

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs or applies."""
        if self.operation.endswith(('-done', '-update')):
            return ()  # an asynchronous start has run them
        names = _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip('%') for name in group.split(',')]
        return tuple(names)


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the name of the one that is the program."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: it has no entry computation, or an instruction that does not look like one.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = '', None
    for line in text.splitlines():
        if line == '}' or line.startswith('}, execution_thread='):
            current = None
        elif current is None:
            if header := _COMPUTATION.fullmatch(line.rstrip()):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.strip():
            instruction = _parse_instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError('the text of a compiled program has an ENTRY computation; found none')
    return Program(computations, entry)


def _parse_instruction(line: str) -> Instruction:
    match = _INSTRUCTION.fullmatch(line.rstrip())
    if not match:
        raise ValueError(f'not an instruction of a compiled program: {line.strip()[:200]!r}')
    rest = match[3]
    end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index('(')
    closing = _closing(rest, opening)
    operands = rest[opening + 1 : closing]
    return Instruction(
        name=match[2],
        type=kind,
        operation=rest[:opening],
        # Constants and parameter numbers have no name; they stay as they are written.
        operands=tuple(re.findall(r'%([\w.\-]+)', operands)) or (operands,),
        attributes=rest[closing + 1 :],
        is_root=match[1] is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == '(') - (text[place] == ')')
        if depth == 0:
            return place
    raise ValueError(f'an open parenthesis in {text[:200]!r}')


def execution_counts(program: Program, assumed_turns: int = 1) -> dict[str, int]:
    """How often each computation runs in one run of the program.

    Of a conditional every branch counts as run. A loop whose number of turns the text does not
    tell counts `assumed_turns` times; `unknown_loops` names those.
    """
    counts: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for instruction in program.computations[name].values():
            turns = trip_count(program, name, instruction)
            for called in instruction.called:
                visit(called, times * (assumed_turns if turns is None else turns))

    visit(program.entry, 1)
    return dict(counts)


def unknown_loops(program: Program) -> list[str]:
    """Names of the loops whose number of turns the text does not tell."""
    return [
        instruction.name
        for name, computation in program.computations.items()
        for instruction in computation.values()
        if instruction.operation == 'while' and trip_count(program, name, instruction) is None
    ]


def fusions(program: Program) -> dict[str, tuple[str, Instruction]]:
    """For each body of a fusion, the outermost fusion it is part of, and the computation of that.

    Returns:
      body -> (computation that is itself no such body, its fusion instruction).
    """
    caller = {
        called: (name, instruction)
        for name, computation in program.computations.items()
        for instruction in computation.values()
        if instruction.operation == 'fusion'
        for called in instruction.called
    }

    def outermost(name: str) -> tuple[str, Instruction]:
        return outermost(caller[name][0]) if caller[name][0] in caller else caller[name]

    return {name: outermost(name) for name in caller}


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """Turns of the `while` instruction of `computation`; None if the text does not tell.

    1 for any other instruction.  XLA writes the number down once it knows it
    (`known_trip_count`).  Otherwise a loop of JAX's scan compares a counter with a constant; where
    the compiler has taken a first turn out of the loop, the counter does not start at 0.
    """
    if loop.operation != 'while':
        return 1
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    named = dict(re.findall(r'\b(condition|body)=%?([\w.\-]+)', loop.attributes))
    compared = _comparison(program, named['condition'])
    if compared is None:
        return None
    start = program.computations[computation].get(loop.operands[0])
    counter, bound = compared

    def at_start(place: int) -> int | None:
        if start is None or start.operation != 'tuple':
            return None
        return _integer(program.computations[computation], start.operands[place])

    limit = bound[1] if bound[0] == 'constant' else at_start(bound[1])
    first, step = at_start(counter), _step(program, named['body'], counter, at_start)
    if limit is None or first is None or not step or step < 0:
        return None
    return max(0, -(-(limit - first) // step))


def _comparison(program: Program, condition: str) -> tuple[int, tuple[str, int]] | None:
    """`counter < bound`: where in the loop's tuple the counter is, and what bounds it.

    Returns:
      (place, ('constant', value) or ('element', place)), or None for any other condition.
    """
    outer = program.computations[condition]
    inner, root = outer, _root(outer)
    given: tuple[str, ...] = ()
    if root.operation == 'fusion':
        given = root.operands
        inner = program.computations[root.called[0]]
        root = _root(inner)
    if root.operation != 'compare' or 'direction=LT' not in root.attributes:
        return None
    sides: list[tuple[str, int]] = []
    for name in root.operands:
        instruction = inner[name]
        if instruction.operation == 'parameter' and given:
            instruction = outer[given[int(instruction.operands[0])]]
        if instruction.operation == 'constant':
            sides.append(('constant', int(instruction.operands[0])))
        elif place := re.search(r'index=(\d+)', instruction.attributes):
            sides.append(('element', int(place[1])))
    if len(sides) != 2 or sides[0][0] != 'element':
        return None
    return sides[0][1], sides[1]


def _step(program: Program, body: str, counter: int, at_start: Any) -> int | None:
    """What a turn adds to the counter; constants may be carried along in the loop's tuple."""
    instructions = program.computations[body]
    root = _root(instructions)
    added = instructions.get(root.operands[counter]) if root.operation == 'tuple' else None
    while added is not None and added.operation in ('copy', 'bitcast'):
        added = instructions.get(added.operands[0])
    if added is None or added.operation not in ('add', 'fusion') or len(added.operands) != 2:
        return None
    for operand in added.operands:
        if (value := _integer(instructions, operand)) is not None:
            return value
        place = re.search(r'index=(\d+)', instructions[operand].attributes)
        if place and int(place[1]) != counter:
            return at_start(int(place[1]))
    return None


def _integer(computation: Mapping[str, Instruction], name: str) -> int | None:
    """The value of a constant, also when it has been copied."""
    instruction = computation.get(name)
    while instruction is not None and instruction.operation in ('copy', 'bitcast'):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.operation != 'constant':
        return None
    return int(instruction.operands[0]) if re.match(r'[su]\d+\[\]', instruction.type) else None


def _root(computation: Mapping[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)
