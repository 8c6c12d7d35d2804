"""Bytes that a compiled program moves through the main memory of a device: an estimate.

The compiler's own figure (`cost_analysis()['bytes accessed']`) reads the body of a loop once and
counts the small fast memory of the chip as if it were HBM.  Here the program's text is added up:
an instruction that is not part of a fusion reads its operands once and writes its result once, as
often as its computation runs, unless the layout says that the array is not in HBM.

    of a large array, only the slice that is read or updated in place counts, also where the
    slicing is part of a fusion: the stacked parameters of a scan are operands of every turn
    views (bitcast, tuple, get-tuple-element), loops and calls move nothing themselves
    a copy between HBM and fast memory counts on the side of HBM

What it leaves out makes it too small: a product whose operands do not fit the fast memory reads
them several times, and tiled layouts pad small dimensions.  What it ignores makes it too large: a
result that a neighbour reads at once may still be in fast memory.  On a program without loops it
equals the compiler's figure for the same rules; there is no TPU to measure it against, so it is
a figure to rank configurations by, not a lower bound.
"""

from collections.abc import Mapping

from bigssl_jax.parallel import hlo

_MOVES_NOTHING = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional',
    'call', 'after-all', 'partition-id', 'replica-id', 'iota', 'optimization-barrier', 'recv',
    'add-dependency', 'domain',
}  # fmt: skip
_SLICES = {'slice', 'dynamic-slice', 'gather'}
_VIEWS = {'bitcast', 'get-tuple-element'}


def hbm_bytes(compiled_text: str, assumed_turns: int = 1) -> float:
    """Bytes read from and written to HBM by one device in one run (an estimate, see above).

    Args:
      compiled_text: `compiled.as_text()`.
      assumed_turns: of loops whose number of turns the text does not tell.
    """
    program = hlo.parse(compiled_text)
    counts = hlo.execution_counts(program, assumed_turns)
    inside = hlo.fusions(program).keys() | _applied(program)
    return float(
        sum(
            counts.get(name, 0) * _moved(program, computation, instruction)
            for name, computation in program.computations.items()
            if name not in inside
            for instruction in computation.values()
        )
    )


def _applied(program: hlo.Program) -> set[str]:
    """Computations of single elements: what a reduction or a sort applies."""
    return {
        called
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.operation not in ('while', 'conditional', 'call', 'fusion', 'async-start')
        for called in instruction.called
    }


def _in_hbm(arrays: tuple[hlo.Array, ...]) -> int:
    return sum(array.size for array in arrays if array.memory == 0)


def _moved(
    program: hlo.Program, computation: Mapping[str, hlo.Instruction], instruction: hlo.Instruction
) -> float:
    """Bytes that one run of an instruction moves."""
    operation = instruction.operation
    if operation in _MOVES_NOTHING or operation.endswith(('-done', '-update')):
        return 0
    if operation == 'custom-call' and 'AllocateBuffer' in instruction.attributes:
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if operation in ('copy-start', 'slice-start'):
        # (to, from, context), or ((from), to, context)
        source = operands[0].arrays[0]
        target = instruction.arrays[operation == 'slice-start']
        return target.size * ((source.memory == 0) + (target.memory == 0))
    if operation == 'fusion':
        return _fusion(program, instruction, operands)
    if operation in _SLICES:
        return _sliced(operands[0], instruction.arrays) + _in_hbm(instruction.arrays)
    if operation in ('dynamic-update-slice', 'scatter'):
        update = operands[1 if operation == 'dynamic-update-slice' else len(operands) - 1].arrays
        return _in_hbm(update) + (operands[0].arrays[0].memory == 0) * _size(update)
    if operation == 'send':
        return _in_hbm(operands[0].arrays)
    result = () if operation.endswith('-start') else instruction.arrays
    if operation.endswith('-start'):  # the result follows the operands in a tuple
        result = instruction.arrays[len(operands) : 2 * len(operands)]
    return _in_hbm(result) + sum(_in_hbm(operand.arrays) for operand in operands)


def _size(arrays: tuple[hlo.Array, ...]) -> int:
    return sum(array.size for array in arrays)


def _sliced(source: hlo.Instruction, parts: tuple[hlo.Array, ...]) -> int:
    """Bytes read from `source` to make `parts` of it."""
    return 0 if source.arrays[0].memory else _size(parts)


def _fusion(
    program: hlo.Program, fusion: hlo.Instruction, operands: list[hlo.Instruction]
) -> float:
    """What a fusion reads of its operands and writes of its results."""
    body = program.computations[fusion.called[0]]
    parameters = _parameters(body)
    total = 0.0
    for place, operand in enumerate(operands):
        if place in parameters and _in_hbm(operand.arrays):
            total += min(_read(program, body, parameters[place]), _in_hbm(operand.arrays))
    root = _root(body)
    results = [body[name] for name in root.operands] if root.operation == 'tuple' else [root]
    arrays = fusion.arrays
    if len(results) != len(arrays):  # a custom call with several results
        return total + _in_hbm(arrays)
    for result, array in zip(results, arrays, strict=True):
        total += _written(program, body, result) if array.memory == 0 else 0
    return total


def _read(program: hlo.Program, body: Mapping[str, hlo.Instruction], name: str) -> float:
    """Bytes of the value `name` that the body of a fusion reads."""
    total = 0.0
    for user in body.values():
        for place, operand in enumerate(user.operands):
            if operand != name or user.operation == 'parameter':
                continue
            if user.operation in _VIEWS:
                total += _read(program, body, user.name)
            elif user.operation in _SLICES and place == 0:
                total += _size(user.arrays)
            elif user.operation == 'dynamic-update-slice' and place == 0:
                continue  # updated in place
            elif user.operation == 'fusion':
                inner = program.computations[user.called[0]]
                parameter = _parameters(inner)[place]
                total += _read(program, inner, parameter)
                if _viewed(inner, _root(inner)).name == parameter:
                    total += _read(program, body, user.name)
            elif user.operation == 'tuple' or _goes_on(user):
                continue  # passed on
            else:
                return float(_size(body[name].arrays))
    return total


def _parameters(body: Mapping[str, hlo.Instruction]) -> dict[int, str]:
    """Names of a computation's parameters by their number."""
    return {
        int(instruction.operands[0]): name
        for name, instruction in body.items()
        if instruction.operation == 'parameter'
    }


def _root(body: Mapping[str, hlo.Instruction]) -> hlo.Instruction:
    return next(instruction for instruction in body.values() if instruction.is_root)


def _viewed(body: Mapping[str, hlo.Instruction], value: hlo.Instruction) -> hlo.Instruction:
    """What `value` is another view of, or `value` itself."""
    while value.operation in _VIEWS and value.operands[0] in body:
        value = body[value.operands[0]]
    return value


def _goes_on(instruction: hlo.Instruction) -> bool:
    """Whether it is a part of a collective that another fusion has started, and counted."""
    return 'chain_id=' in instruction.attributes or 'AsyncCollective' in instruction.attributes


def _written(
    program: hlo.Program, body: Mapping[str, hlo.Instruction], result: hlo.Instruction
) -> float:
    """Bytes that a fusion writes for one of its results."""
    result = _viewed(body, result)
    if result.operation == 'parameter' or _goes_on(result):
        return 0.0  # passed on
    if result.operation == 'dynamic-update-slice':
        return float(_size(body[result.operands[1]].arrays))
    if result.operation == 'fusion' and len(result.arrays) == 1:
        inner = program.computations[result.called[0]]
        return _written(program, inner, _root(inner))
    return float(_size(result.arrays))
