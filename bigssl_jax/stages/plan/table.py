"""Plans as tables for people, within 80 columns; every number with its unit."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigssl_jax.compiler_crashes import CRASHED
from bigssl_jax.stages.plan.options import Found, mesh_text
from bigssl_jax.stages.plan.price import Plan
from bigssl_jax.training.metrics import clock

RESOURCES = {'compute': 'products', 'hbm': '~HBM', 'ici': '~ICI', 'dcn': 'DCN'}
_SHOWN = 8  # combinations of a search, and changes of a plan


def print_plan(plan: Plan) -> None:
    """One stage on one topology."""
    console = Console(highlight=False)
    console.print(_main_table(plan))
    if plan.traffic:
        console.print(_traffic_table(plan))
    for line in _verdict(plan):
        console.print(Text(line))
    for line in plan.assumptions:
        console.print(Text(f'assumed: {line}', style='dim'))
    console.print()


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify='left', box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify='right' if name in right else 'left')
    return table


def _main_table(plan: Plan) -> Table:
    where = f'{plan.chips:,} {plan.chip} chips'
    if plan.devices != plan.chips:
        where += f', {plan.devices:,} devices'
    table = _table(f'{plan.experiment} / {plan.stage} on {plan.topology}: {where}', 'what', 'value')
    for what, value in _rows(plan):
        table.add_row(what, Text(value))
    return table


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield 'mesh', mesh_text(plan.mesh)
    for name, batch in plan.batches.items():
        labels = f', {batch.labels} labels' if batch.labels else ''
        each = batch.rows * plan.mesh['tensor'] / plan.devices
        yield (
            f'batch of {name}',
            f'{batch.rows:,} x {batch.samples / 16000:g} s = {batch.seconds / 3600:,.2f} h{labels};'
            f' {each:g} a device',
        )
    yield 'parameters', f'{plan.parameters:,}'
    held = ', '.join(f'{name} {gib(size)}' for name, size in plan.held.items() if size)
    yield 'held per device', held
    if plan.memory:
        memory = plan.memory
        yield 'HBM arguments', gib(memory.arguments)
        yield 'HBM temporaries', gib(memory.temporaries)
        yield 'HBM peak', f'{gib(memory.peak)} of {gib(plan.limit)}; {gib(plan.headroom)} left'
    else:
        needed = f'not known, {CRASHED}' if plan.complaint == CRASHED else gib(plan.needed)
        yield 'HBM needed', f'{needed} of {gib(plan.limit)}: DOES NOT FIT'
    yield 'model FLOPs', f'{si(plan.model_flops)}FLOP a step'
    more = plan.hardware_flops / plan.model_flops - 1
    yield 'hardware FLOPs', f'{si(plan.hardware_flops)}FLOP a step ({more:+.1%}: recomputed)'
    if plan.roofline:
        yield from _bounds(plan)


def _bounds(plan: Plan) -> Iterator[tuple[str, str]]:
    roofline = plan.roofline
    assert roofline is not None
    busy = dataclasses.asdict(roofline).items()
    each = ', '.join(f'{RESOURCES[name]} {seconds(value)}' for name, value in busy if value)
    yield 'busy in a step', each
    least, most = ('at least', 'at most') if plan.is_bound else ('about', 'about')
    yield (
        'step time',
        f'{least} {seconds(roofline.seconds)} ({RESOURCES[roofline.bound]});'
        f' {seconds(plan.serial_seconds or 0.0)} if nothing overlaps',
    )
    yield 'MFU', f'{most} {plan.mfu:.1%}'
    yield 'audio', f'{most} {plan.audio_hours_per_chip_hour:,.1f} h per chip-hour'
    if plan.pass_chip_hours:
        yield (
            'one pass',
            f'{plan.pass_hours:,.0f} h: {least} {plan.pass_chip_hours:,.0f} chip-hours'
            f' ({plan.pass_chip_hours / plan.chips:,.1f} h on {plan.chips:,} chips)',
        )
    if plan.largest:
        rows = f'{plan.largest.rows:,} rows ({plan.largest.rows_per_device:g} a device)'
        refused = plan.largest.refused_rows
        verb = 'crash the compiler' if plan.largest.crashed else 'do not fit'
        yield (
            'largest batch',
            f'{rows}, peak {gib(plan.largest.peak)}'
            + (f'; {refused:,} rows {verb}' if refused else ''),
        )


def _traffic_table(plan: Plan) -> Table:
    columns = ('along', 'MiB', 'ideal MiB', 'x ideal', 'as')
    table = _table('between devices: what each sends in a step', *columns, right=columns[1:4])
    for row in plan.traffic:
        if row.bytes < 2**10 and not row.ideal:
            continue
        ideal = '' if row.ideal is None else f'{row.ideal / 2**20:,.1f}'
        times = f'{row.bytes / row.ideal:.2f}' if row.ideal else ''
        largest = sorted(row.operations.items(), key=lambda item: -item[1])
        operations = ', '.join(f'{name} {size / row.bytes:.0%}' for name, size in largest[:2])
        table.add_row('+'.join(row.axes), f'{row.bytes / 2**20:,.1f}', ideal, times, operations)
    return table


def _verdict(plan: Plan) -> Iterator[str]:
    """What a plan that does not fit is told, and how to have the largest batch."""
    if plan.fits:
        return
    largest = max(plan.held, key=lambda name: plan.held[name])
    held = sum(plan.held.values())
    yield (
        f'It does not fit: {gib(plan.needed)} per device needed, {gib(plan.limit)} there.'
        f' Held between steps: {gib(held)}, the most of it {largest} ({gib(plan.held[largest])}).'
    )
    if plan.complaint:
        yield f'The compiler: {plan.complaint}'
    if not plan.remedies:
        yield 'No change that was tried fits: more chips are needed, or a smaller model.'
        return
    yield 'It fits with any one of:'
    for changes in plan.remedies:
        yield '  ' + flags(changes)


def print_found(plan: Plan, found: Sequence[Found]) -> None:
    """What a search over batch, remat and mesh found, the best first."""
    console = Console(highlight=False)
    if not found:
        console.print(f'search: nothing fits {plan.topology}')
        return
    columns = ('mesh', 'remat', 'rows', 'peak', 'bound by', 'MFU', 'h / chip-h')
    table = _table(
        f'search: {plan.stage} on {plan.topology}; times are bounds',
        *columns,
        right=columns[2:4] + columns[5:],
    )
    for item in found[:_SHOWN]:
        made = item.plan
        assert made.roofline is not None, 'only what fits is found'
        table.add_row(
            mesh_text(made.mesh),
            str(item.changes.get('encoder.remat', '')),
            f'{max(batch.rows for batch in made.batches.values()):,}',
            gib(made.needed),
            RESOURCES[made.roofline.bound],
            f'{made.mfu:.1%}',
            f'{made.audio_hours_per_chip_hour:,.1f}',
        )
    console.print(table)
    console.print(Text('the best: ' + flags(found[0].changes)))
    console.print()


def print_summary(plans: Sequence[Plan]) -> None:
    """Several plans side by side."""
    columns = ('stage', 'topology', 'chips', 'HBM peak', 'step >=', 'MFU <=', 'h/chip-h <=')
    table = _table('side by side (all bounds)', *columns, 'chip-h a pass >=', right=columns[2:])
    table.columns[-1].justify = 'right'
    for plan in plans:
        roofline = plan.roofline
        fits = f'{gib(plan.needed)}' + ('' if plan.fits else ' (!)')
        table.add_row(
            plan.stage,
            plan.topology,
            f'{plan.chips:,}',
            fits,
            seconds(roofline.seconds) if roofline else 'does not fit',
            f'{plan.mfu:.1%}' if roofline else '',
            f'{plan.audio_hours_per_chip_hour:,.1f}' if roofline else '',
            f'{plan.pass_chip_hours:,.0f}' if plan.pass_chip_hours else '',
        )
    Console(highlight=False).print(table)


# ---------------------------------------------------------------------------------------------
# numbers and words


def gib(size: float) -> str:
    """Bytes in GiB, or MiB below a tenth of one."""
    return f'{size / 2**30:,.2f} GiB' if abs(size) >= 0.1 * 2**30 else f'{size / 2**20:,.2f} MiB'


def si(number: float) -> str:
    """A number with an SI prefix: 3.62 P."""
    for prefix, size in (('E', 1e18), ('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6)):
        if number >= size:
            return f'{number / size:,.3g} {prefix}'
    return f'{number:,.3g} '


def seconds(value: float) -> str:
    """Seconds in s, ms or us."""
    for unit, size in (('s', 1.0), ('ms', 1e-3)):
        if value >= size:
            return f'{value / size:,.3g} {unit}'
    return f'{value / 1e-6:,.3g} us'


def flags(changes: Any) -> str:
    """Changes of the config as words of the command line."""
    return ' '.join(f'--config.{path}={value}' for path, value in changes.items())


@contextmanager
def progress() -> Iterator['Progress']:
    """Says on standard error what is being done; redrawn on a terminal, a line each in a file."""
    shown = Progress()
    try:
        yield shown
    finally:
        shown.clear()


class Progress:
    """The line that says what is being compiled, and for a search how long it may still take."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._search = ''

    def say(self, text: str) -> None:
        """Shows `text`."""
        if self._terminal:
            spent = clock(time.monotonic() - self._started)
            print(f'\r{self._search}{text} ({spent})\x1b[K', end='', file=sys.stderr, flush=True)
        else:
            print(f'{self._search}{text}', file=sys.stderr, flush=True)

    def start_search(self) -> None:
        """Begins to count anew."""
        self._began = time.monotonic()

    def searched(self, done: int, of: int, text: str) -> None:
        """Shows how far a search is; the time left is that of the combinations done so far."""
        left = ''
        if done:
            left = f', left {clock((time.monotonic() - self._began) / done * (of - done))} at most'
        self._search = f'[{done}/{of}{left}] ' if done < of else ''
        self.say(text)

    def clear(self) -> None:
        """Leaves the line empty for what comes next."""
        if self._terminal:
            print('\r\x1b[K', end='', file=sys.stderr, flush=True)
