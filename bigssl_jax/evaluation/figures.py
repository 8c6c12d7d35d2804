"""Charts as inline SVG, drawn by matplotlib, coloured by the page.

matplotlib draws with placeholder colours; afterwards each becomes a CSS variable, so that one
picture serves light and dark pages.  Text stays text and takes the page's font.  Identifiers get a
prefix per picture, because all pictures share the page's name space.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# Categorical series the page has colours for.
MAX_SERIES = 8
_MAX_POINTS = 300
_DASHES = (0, (4, 3))

_INK, _LINE = '#010203', '#010204'
_SERIES = [f'#01030{n}' for n in range(MAX_SERIES)]
_VARIABLES = {_INK: '--muted', _LINE: '--line'} | {
    colour: f'--series-{n + 1}' for n, colour in enumerate(_SERIES)
}
_STYLE: Any = {
    'text.parse_math': False,  # names may hold dollar signs
    'svg.fonttype': 'none',
    'svg.hashsalt': 'bigssl',
    'font.family': 'sans-serif',
    'font.size': 9.0,
    'text.color': _INK,
    'axes.edgecolor': _LINE,
    'axes.labelcolor': _INK,
    'axes.grid': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.spines.left': False,
    'axes.axisbelow': True,
    'grid.color': _LINE,
    'grid.linewidth': 0.7,
    'xtick.color': _INK,
    'ytick.color': _INK,
    'xtick.major.size': 0.0,
    'ytick.major.size': 0.0,
    'xtick.minor.size': 0.0,
    'ytick.minor.size': 0.0,
    'lines.linewidth': 1.6,
}


class Series(NamedTuple):
    """A named line; `colour` in 0..MAX_SERIES-1; `dashed` for a reference to compare with."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dashed: bool = False


class Interval(NamedTuple):
    """A named value with its interval, as fractions; the limits may be None."""

    name: str
    value: float
    low: float | None
    high: float | None
    colour: int


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    percent: bool = False,
    percent_x: bool = False,
    diagonal: bool = False,
    markers: bool = False,
    from_zero: bool = False,
) -> str:
    """Lines over a common x axis.

    Args:
      series: what to draw; long ones are thinned evenly.
      title: for readers who do not see the picture.
      x_label: name of the x axis.
      percent: y values are fractions, shown as percentages from 0 on.
      percent_x: likewise for x.
      diagonal: draws y = x for comparison.
      markers: marks the points.
      from_zero: the y axis starts at 0; for quantities whose ratio matters.

    Returns:
      An `<svg>` element.
    """
    with _figure(3.6, 2.2) as (figure, axes):
        for one in series:
            step = -(-len(one.x) // _MAX_POINTS) or 1
            # From the end, so that the newest value is drawn.
            x, y = list(one.x)[::-1][::step][::-1], list(one.y)[::-1][::step][::-1]
            lone = len(x) == 1
            axes.plot(x, y, color=_SERIES[one.colour], marker='o' if markers or lone else None,
                      markersize=4, solid_joinstyle='round',
                      linestyle=_DASHES if one.dashed else '-')  # fmt: skip
        values = [v for one in series for v in one.y if v is not None and v == v]
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=_DASHES)
        if percent:
            axes.set_ylim(0, 1.02 if diagonal else max([*values, 0.01]) * 1.08)
            _percent_ticks(axes.yaxis)
        elif from_zero:
            axes.set_ylim(0, max([*values, 0.0]) * 1.08 or 1.0)
        elif values and min(values) > 0 and max(values) > 20 * min(values):
            _log_ticks(axes)
        if percent_x:
            axes.set_xlim(0, 1.02)
            _percent_ticks(axes.xaxis)
        else:
            _integer_ticks(axes.xaxis)
        axes.set_xlabel(x_label)
        return _svg(figure, title)


def interval_chart(values: Sequence[Interval], title: str) -> str:
    """A dot with its interval per row, from the top down; the x axis starts at 0.

    Returns:
      An `<svg>` element.
    """
    with _figure(4.4, 0.45 + 0.3 * len(values)) as (figure, axes):
        for row, one in enumerate(values):
            colour = _SERIES[one.colour]
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2.4, alpha=0.55,
                          solid_capstyle='round')  # fmt: skip
            axes.plot([one.value], [row], color=colour, marker='o', markersize=6.5)
        axes.set_yticks(range(len(values)), [one.name for one in values])
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlim(0, max([one.high or one.value for one in values] + [0.01]) * 1.06)
        axes.grid(visible=False, axis='y')
        _percent_ticks(axes.xaxis)
        return _svg(figure, title)


class _figure:
    """A figure of `width` x `height` inches in the page's style; nothing global is changed."""

    def __init__(self, width: float, height: float):
        self._size = width, height

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib
        from matplotlib.figure import Figure

        self._context = matplotlib.rc_context(_STYLE)
        self._context.__enter__()
        figure = Figure(figsize=self._size, layout='constrained')
        return figure, figure.add_subplot()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _percent_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{100 * value:g} %'))


def _integer_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))


def _log_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(figure: Any, title: str) -> str:
    """The figure as an `<svg>` element that fits its container."""
    import html
    import zlib

    buffer = io.StringIO()
    figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
    text = buffer.getvalue()
    text = text[text.index('<svg') :]
    text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
    text = re.sub(r'<!--.*?-->', '', text, flags=re.DOTALL)
    # The width follows the page; the height follows from the viewBox.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1', text, count=1)
    prefix = f'f{zlib.crc32((title + text).encode()):08x}-'
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = text.replace('url(#', f'url(#{prefix}').replace('href="#', f'href="#{prefix}')
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f'var({variable})')
    label = html.escape(title)
    return text.replace('<svg', f'<svg role="img" aria-label="{label}"', 1)
