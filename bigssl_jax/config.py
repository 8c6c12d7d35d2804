"""Experiment configs: loading, defaults, validation, and the hash that names a configuration.

An experiment is a plain `ml_collections.ConfigDict`, returned by `get_config(arg)` of a file in
`experiments/`.  It is data: no classes, no callables.  `resolve` turns what the file says into what
will run: every field that the file leaves out takes its default from `schema.py`'s tables, every
field that no table knows stops the run before any work and names the nearest valid one.

    experiment file  --get_config(arg)-->  ConfigDict  --overrides-->  --resolve-->  plain dicts
"""

import copy
import difflib
import hashlib
import importlib.util
import json
import math
import pathlib
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import ml_collections

LONGEST = 200  # characters of a value in a message


class UserError(Exception):
    """An error that the user can mend; the command line prints it as one line, exit code 2."""


class ConfigError(UserError):
    """A field of the experiment config is unknown, of the wrong type, or contradicts another."""


def load(path_and_argument: str) -> ml_collections.ConfigDict:
    """Loads `FILE.py` or `FILE.py:ARG` by calling its `get_config(ARG)`.

    Raises:
      ConfigError: the file is missing, is not Python, has no `get_config`, fails, or returns no
        group of fields.
    """
    config = call_file('--config', path_and_argument, 'get_config')
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise ConfigError(
            f'--config: get_config of {path_and_argument!r} returns {in_short(config)}; it must'
            ' return an ml_collections.ConfigDict'
        )
    return config


def call_file(option: str, path_and_argument: str, function: str) -> Any:
    """What `function` of `FILE.py` returns, called with ARG when `FILE.py:ARG` is given.

    Args:
      option: the command-line option that named the file; errors begin with it.
      path_and_argument: `FILE.py` or `FILE.py:ARG`.
      function: its name.

    Raises:
      ConfigError: the file is missing, is not Python, has no such function, or fails.
    """
    path_text, _, argument = path_and_argument.partition(':')
    path = pathlib.Path(path_text)
    if not path.is_file():
        raise ConfigError(
            f'{option}: no file {path_text!r}; give a Python file with {function}(arg)'
        )
    spec = importlib.util.spec_from_file_location(f'experiment_{path.stem}', path)
    if spec is None or spec.loader is None:
        raise ConfigError(f'{option}: {path_text!r} is not a Python file (.py)')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ConfigError(f'{option}: {path_text!r} defines no {function}(arg)')
        call = getattr(module, function)
        return call(argument) if argument else call()
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f'{option}: {_place(path, error)}: {_reason(error)}') from error


def _place(path: pathlib.Path, error: Exception) -> str:
    """`FILE:LINE` of the deepest line of `path` that `error` came through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    return f'{path}:{lines[-1]}' if lines else str(path)


def _reason(error: Exception) -> str:
    """The error without its own mention of file and line."""
    return f'{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}'


def unknown_field(field: str, name: str, allowed: Iterable[str]) -> ConfigError:
    """The error for an unknown `name` under `field`, naming the nearest of `allowed`."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]!r}?' if near else 'allowed: ' + ', '.join(map(shown, allowed))
    where = f'{field + "." if field else ""}{shown(name)}'
    return ConfigError(f'unknown config field {where}: {hint}')


def shown(name: str) -> str:
    """A name as it stands in a message: itself, or quoted where it would be misread."""
    plain = name and name.isprintable() and ' ' not in name and len(name) <= LONGEST
    return name if plain else in_short(name)


def in_short(value: Any) -> str:
    """A value as it stands in a message: one line, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f'a {type(value).__name__} beyond bounds'
    return text if len(text) <= LONGEST else f'{text[: LONGEST - 4]} ...'


def choose(field: str, value: Any, allowed: Iterable[Any]) -> Any:
    """Returns `value`, or raises a ConfigError that lists what `field` may be."""
    allowed = list(allowed)
    if value not in allowed:
        names = [name for name in allowed if isinstance(name, str)]
        near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
        hint = f'; did you mean {near[0]!r}?' if near else ''
        raise ConfigError(
            f'config field {field} is {in_short(value)}; allowed:'
            f' {", ".join(map(repr, allowed))}{hint}'
        )
    return value


def merge(
    field: str,
    defaults: Mapping[str, Any],
    given: Mapping[str, Any],
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Lays `given` over `defaults`, recursively; types must agree.

    A default of `None` accepts any plain data; an empty mapping accepts any keys (a free-form
    table).

    Args:
      field: where the group stands, for messages.
      defaults: every field that there is.
      given: those that are set.
      optional: names of fields that may be None although their default is not.

    Raises:
      ConfigError: a field that `defaults` lacks, a value of another type, a number that is not
        finite or beyond 64 bits.
    """
    merged = copy.deepcopy(dict(defaults))  # callers fill in what they are given
    given = _plain(given)
    if not isinstance(given, Mapping):
        raise _no_group(field, given)
    for name, value in given.items():
        path = f'{field}.{name}' if field else name
        if name not in defaults:
            raise unknown_field(field, str(name), defaults)
        default = defaults[name]
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                raise _no_group(path, value)
            merged[name] = merge(path, default, value, optional) if default else _data(path, value)
        elif value is None and name in optional:
            merged[name] = None
        else:
            merged[name] = _checked(path, default, value)
    return merged


def _no_group(field: str, value: Any) -> ConfigError:
    return ConfigError(f'config field {field} is {in_short(value)}; it must be a group of fields')


def _checked(path: str, default: Any, value: Any) -> Any:
    """`value` if its type agrees with that of `default` (integers are accepted as floats)."""
    value = _data(path, value)
    if default is None:
        return value
    if isinstance(value, bool) and type(default) in (int, float):
        raise ConfigError(f'config field {path} is {value!r}; it must be a number')
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(default, float):
        value = float(value)
    if isinstance(value, type(default)):
        # Only where the default is infinite has infinity a meaning: no limit.
        if isinstance(value, float) and not math.isfinite(value) and math.isfinite(default):
            raise ConfigError(f'config field {path} is {value}; it must be a finite number')
        if isinstance(value, tuple) and default:  # entries of one type, as those of the default
            return tuple(_checked(f'{path}[{i}]', default[0], v) for i, v in enumerate(value))
        return value
    wanted = {tuple: 'list'}.get(type(default), type(default).__name__)
    raise ConfigError(
        f'config field {path} is {in_short(value)} ({type(value).__name__}); it must be a {wanted},'
        f' for example {default!r}'
    )


def _data(path: str, value: Any) -> Any:
    """`value` as plain data.

    Raises:
      ConfigError: some of it is no data, not a number, or an integer beyond 64 bits.
    """
    value = _plain(value)
    for field, part in _leaves(path, value):
        if part is not None and not isinstance(part, str | bool | int | float):
            what, cure = in_short(part), 'text, numbers, True, False, None, and lists of them'
        elif isinstance(part, float) and math.isnan(part):
            what, cure = 'nan', 'a number'
        elif isinstance(part, int) and not -(2**63) <= part < 2**63:
            what, cure = 'beyond 64 bits', 'a smaller number'
        else:
            continue
        raise ConfigError(f'config field {field} is {what}; it must be {cure}')
    return value


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that is no group and no list."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _leaves(f'{path}.{shown(name)}', entry)
    elif isinstance(value, tuple):
        for place, entry in enumerate(value):
            yield from _leaves(f'{path}[{place}]', entry)
    else:
        yield path, value


def _plain(value: Any) -> Any:
    """ConfigDicts as dicts, lists as tuples, recursively: comparable and hashable as JSON."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, tuples and scalars."""
    return _plain(config)


def to_json(config: Any) -> str:
    """The canonical text of a config: sorted keys, so that equal configs give equal text."""
    return json.dumps(_plain(config), sort_keys=True, indent=1)


def config_hash(config: Any) -> str:
    """The first 16 hex digits of the SHA-256 of `to_json(config)`: the name of a configuration."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]
