"""Corpora, order and streams: everything between files on disk and a batch of arrays.

The only room that may import TensorFlow, and only when a stream is opened: importing this package
imports nothing heavy, names are resolved at first use (PEP 562).

    from bigssl_jax import data
    corpus = data.Corpus.open("corpora/mine")
    batch = data.stream(config, seed=0).batch(7)

Three files hold a function of their own name (`inspect`, `prepare`, `stream`). Python would bind
`data.stream` to the function or to the module, whichever was asked for first; here it is always the
function. The module's other names come by `from bigssl_jax.data.stream import one_pass`.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

_HOME = {
    'BadAudio': 'errors',
    'Corpus': 'corpus',
    'DataError': 'errors',
    'Entry': 'manifest',
    'inspect': 'inspect',
    'one_pass': 'stream',
    'prepare': 'prepare',
    'read_audio': 'audio_files',
    'read_manifest': 'manifest',
    'select': 'selection',
    'stream': 'stream',
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _Room(types.ModuleType):
    """This package, by the rule above: the import system's `data.stream = module` is turned."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _HOME.get(name) == name and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Room
