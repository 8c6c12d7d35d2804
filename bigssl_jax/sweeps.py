"""The words of a sweep file: which configs an experiment is run with.

    from bigssl_jax.sweeps import chain, product, sweep, zip_

    def get_sweep():
        return product(
            sweep('stages.pretrain.optimizer.groups.all.peak', [1e-3, 2e-3]),
            zip_(sweep('encoder.preset', ['tiny', 'small']), sweep('seed', [0, 1])),
        )

A space is a list of points, a point a dict from a field's path to its value; nothing more is hidden
behind it, so a list comprehension is a filter and `random.Random(0).sample(space, 10)` a random
search.  The path `argument` stands for the argument of the experiment file (`study.py:seed=1`).
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigssl_jax.config import ConfigError

Point = dict[str, Any]

# The path that stands for ARG of `--config FILE:ARG`.
ARGUMENT = 'argument'

_PATH = re.compile(r'\w[\w-]*(\.\w[\w-]*)*')


def sweep(path: str, values: Iterable[Any]) -> list[Point]:
    """One field over its values: `sweep('seed', range(3))` is three points.

    Args:
      path: a config field, its groups separated by dots; or 'argument'.
      values: numbers, texts, None, or lists and dicts of them; numpy's scalars become Python's.

    Raises:
      ConfigError: a path that is none, no values, a value that no config file could hold.
    """
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise ConfigError(f"sweep({path!r}, ...): name a config field, as 'encoder.dropout'")
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f'sweep({path!r}, {values!r}): give a list of values')
    points = [{path: _plain(path, value)} for value in values]
    if not points:
        raise ConfigError(f'sweep({path!r}, ...) has no values; give at least one')
    return points


def product(*spaces: Sequence[Point]) -> list[Point]:
    """Every combination of a point of each space; the last space varies fastest."""
    return [_joined(points) for points in itertools.product(*map(_checked, spaces))]


def zip_(*spaces: Sequence[Point]) -> list[Point]:
    """The first points of all spaces together, then the second ones, and so on.

    Raises:
      ConfigError: spaces of different lengths.
    """
    lengths = [len(_checked(space)) for space in spaces]
    if len(set(lengths)) > 1:
        raise ConfigError(f'zip_ of spaces with {lengths} points; all must have equally many')
    return [_joined(points) for points in zip(*spaces, strict=True)]


def chain(*spaces: Sequence[Point]) -> list[Point]:
    """The points of all spaces, one space after the other; their fields may differ."""
    return [dict(point) for space in spaces for point in _checked(space)]


def check_space(space: Any) -> list[Point]:
    """What a sweep file's `get_sweep` returned, if it is a space of at least one point.

    Raises:
      ConfigError: it is not.
    """
    points = [
        {path: _plain(path, value) for path, value in point.items()} for point in _checked(space)
    ]
    if not points:
        raise ConfigError('get_sweep() returned no points')
    return points


def _checked(space: Any) -> Sequence[Point]:
    is_list = isinstance(space, Sequence) and not isinstance(space, str)
    if not is_list or not all(isinstance(point, Mapping) for point in space):
        raise ConfigError(
            f'{str(space)[:60]!r} is not a list of points; use sweep(path, values), and product,'
            ' zip_ and chain of such'
        )
    return space


def _joined(points: Iterable[Point]) -> Point:
    joined: Point = {}
    for point in points:
        for path in point.keys() & joined.keys():
            raise ConfigError(f'{path} is swept twice; name it in one part of a product or zip_')
        joined |= point
    return joined


def _plain(path: str, value: Any) -> Any:
    """`value` as Python's own types: what a config file could say."""
    if type(value).__module__ == 'numpy' and hasattr(value, 'tolist'):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(path, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(path, item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f'{path}: {value!r} ({type(value).__name__}) is not a value of a config')


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """A short label for every path: its last part, with as much before it as tells it apart.

    `stages.teacher.optimizer.groups.all.peak` is `peak`; beside that of another stage it is
    `teacher.peak`.
    """
    paths = list(dict.fromkeys(paths))
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(path.split('.')[-1], []).append(path)
    labels = {}
    for last, group in alike.items():
        common = set.intersection(*(set(path.split('.')) for path in group))
        for path in group:
            telling = [part for part in path.split('.')[:-1] if part not in common]
            labels[path] = '.'.join([*telling, last])
    taken = list(labels.values())
    return {path: labels[path] if taken.count(labels[path]) == 1 else path for path in paths}


def varied_paths(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths that not every point sets to the same value, in order of appearance."""
    paths = list(dict.fromkeys(path for point in points for path in point))
    first: Mapping[str, Any] = points[0] if points else {}
    return [
        path
        for path in paths
        if any(path not in point or repr(point[path]) != repr(first.get(path)) for point in points)
    ]


def point_names(points: Sequence[Point]) -> list[str]:
    """A name for every point: its number, then the values that differ between points.

    Only letters, digits and `._-+`, at most 80 characters.  The number alone makes names unique;
    a name follows from the point's place and values, and from which fields vary.
    """
    paths = varied_paths(points)
    labels = short_names(paths)
    names = []
    for number, point in enumerate(points):
        words = [f'{labels[path]}_{value_text(point[path])}' for path in paths if path in point]
        text = '-'.join([f'{number:03d}', *words])
        names.append(re.sub(r'[^\w.+-]+', '-', text, flags=re.ASCII)[:80].rstrip('-._'))
    return names


def value_text(value: Any) -> str:
    """A value in few characters, for names: `0.001`, `tiny`, `4-8`; of a path its last part."""
    if isinstance(value, float):
        return f'{value:.6g}'
    if isinstance(value, Mapping):
        return '-'.join(f'{name}_{value_text(item)}' for name, item in value.items())
    if isinstance(value, tuple | list):
        return '-'.join(map(value_text, value))
    return str(value).rstrip('/').split('/')[-1][:32]
