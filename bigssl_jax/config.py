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
import pathlib
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections


class UserError(Exception):
    """An error that the user can mend; the command line prints it as one line, exit code 2."""


class ConfigError(UserError):
    """A field of the experiment config is unknown, of the wrong type, or contradicts another."""


def load(path_and_argument: str) -> ml_collections.ConfigDict:
    """Loads `FILE.py` or `FILE.py:ARG` by calling its `get_config(ARG)`.

    Raises:
      ConfigError: the file is missing, is not Python, has no `get_config`, or fails.
    """
    return call_file('--config', path_and_argument, 'get_config')


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
    hint = f'did you mean {near[0]!r}?' if near else 'allowed: ' + ', '.join(allowed)
    return ConfigError(f'unknown config field {field + "." if field else ""}{name}: {hint}')


def choose(field: str, value: Any, allowed: Iterable[Any]) -> Any:
    """Returns `value`, or raises a ConfigError that lists what `field` may be."""
    allowed = list(allowed)
    if value not in allowed:
        names = [name for name in allowed if isinstance(name, str)]
        near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
        hint = f'; did you mean {near[0]!r}?' if near else ''
        raise ConfigError(
            f'config field {field} is {value!r}; allowed: {", ".join(map(repr, allowed))}{hint}'
        )
    return value


def merge(field: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Lays `given` over `defaults`, recursively; types must agree.

    A default of `None` accepts anything; an empty mapping accepts any keys (a free-form table).

    Raises:
      ConfigError: a field that `defaults` lacks, or a value of another type.
    """
    merged = copy.deepcopy(dict(defaults))  # callers fill in what they are given
    for name, value in given.items():
        path = f'{field}.{name}' if field else name
        if name not in defaults:
            raise unknown_field(field, name, defaults)
        default = defaults[name]
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f'config field {path} is {value!r}; it must be a group of fields')
            merged[name] = merge(path, default, value) if default else _plain(value)
        else:
            merged[name] = _checked(path, default, value)
    return merged


def _checked(path: str, default: Any, value: Any) -> Any:
    """`value` if its type agrees with that of `default` (integers are accepted as floats)."""
    value = _plain(value)
    if default is None or value is None or isinstance(value, type(default)):
        if isinstance(value, bool) and isinstance(default, int) and not isinstance(default, bool):
            raise ConfigError(f'config field {path} is {value!r}; it must be a number')
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = {tuple: 'list'}.get(type(default), type(default).__name__)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    raise ConfigError(
        f'config field {path} is {value!r} ({type(value).__name__}); it must be a {wanted},'
        f' for example {default!r}'
    )


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
