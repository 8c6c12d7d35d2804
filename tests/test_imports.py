"""The floors of the house: who may import whom, and what importing may cost.

cli > stages > training, evaluation > objectives, decoding > models > audio > parallel, config
data stands beside models; stages and cli alone import it; TensorFlow lives in data alone
"""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'bigssl_jax'
FILES = sorted(PACKAGE.rglob('*.py'))

# room -> rooms it may import, besides itself
_BOTTOM = {'config', 'overrides', 'parallel', 'sweeps'}
_MODEL = _BOTTOM | {'audio', 'models'}
ALLOWED: dict[str, set[str]] = {
    'config': set(),
    'overrides': {'config'},
    'sweeps': {'config'},
    'compiler_crashes': set(),
    'parallel': {'config'},
    'audio': _BOTTOM,
    'models': _BOTTOM | {'audio'},
    'objectives': _MODEL,
    'decoding': _MODEL,
    'training': _MODEL | {'objectives', 'decoding'},
    'evaluation': _MODEL | {'objectives', 'decoding'},
    'data': {'config'},
    'stages': _MODEL
    | {'objectives', 'decoding', 'training', 'evaluation', 'data', 'compiler_crashes'},
    'exits': {'config', 'training'},
    'verbs': _BOTTOM | {'stages', 'evaluation', 'data'},
    'cli': _BOTTOM
    | {'exits', 'verbs', 'compiler_crashes', 'stages', 'training', 'evaluation', 'data'},
    '__init__': set(),
    '__main__': {'cli'},
}
TENSORFLOW = ('tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio', 'array_record')


def module_name(path: pathlib.Path) -> str:
    """`bigssl_jax/models/conformer.py` -> `bigssl_jax.models.conformer`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imported_names(path: pathlib.Path) -> list[tuple[int, str]]:
    """Every (line, absolute dotted name) that a file imports, at any depth of nesting."""
    package = module_name(path).split('.')
    if path.name != '__init__.py':
        package = package[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = '.'.join([*base, *([node.module] if node.module else [])])
            names += [(node.lineno, f'{stem}.{alias.name}') for alias in node.names]
    return names


def room_of(name: str) -> str | None:
    """The room of a dotted name of ours; None for other packages and for the package itself."""
    parts = name.split('.')
    if parts[0] != 'bigssl_jax' or len(parts) < 2 or parts[1] == '__version__':
        return None
    return parts[1]


def test_every_room_is_on_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix('.py') for path in FILES}
    assert rooms - ALLOWED.keys() == set()


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_imports_go_down_only(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    wrong = [
        f'{path.name}:{line} imports {name}'
        for line, name in imported_names(path)
        if room_of(name) not in {None, room, *ALLOWED[room]}
    ]
    assert not wrong


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_tensorflow_stays_in_the_data_room(path):
    if path.relative_to(PACKAGE).parts[0] == 'data':
        return
    wrong = [
        f'{path.name}:{line} imports {name}'
        for line, name in imported_names(path)
        if name.split('.')[0] in TENSORFLOW
    ]
    assert not wrong


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_files_stay_readable_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 500


def test_the_reader_of_imports_sees_what_it_must(tmp_path):
    """The checks above rest on `imported_names`: it must find nested and relative imports."""
    path = PACKAGE / 'models' / 'made_up.py'

    class Source:
        name = 'made_up.py'

        def relative_to(self, other):
            return path.relative_to(other)

        def read_text(self):
            return (
                'import jax\n'
                'from . import layers\n'
                'from ..data import stream\n'
                'from bigssl_jax import stages\n'
                'def f():\n'
                '    import tensorflow as tf\n'
            )

    assert imported_names(Source()) == [
        (1, 'jax'),
        (2, 'bigssl_jax.models.layers'),
        (3, 'bigssl_jax.data.stream'),
        (4, 'bigssl_jax.stages'),
        (6, 'tensorflow'),
    ]


_IMPORT_ALL = """
import importlib, json, sys
outside, loaded, failed = {outside!r}, [], {{}}
for name in {names!r}:
    importlib.import_module(name)
    for heavy in outside:
        if heavy in sys.modules and heavy not in failed:
            failed[heavy] = name
backends = []
if 'jax' in sys.modules:
    from jax._src import xla_bridge
    backends = sorted(xla_bridge._backends)
print(json.dumps({{'heavy': failed, 'backends': backends}}))
"""


def import_in_fresh_process(names: list[str]) -> dict:
    """Imports `names` in order in a new process; which TensorFlow modules and backends came up."""
    code = _IMPORT_ALL.format(outside=TENSORFLOW, names=names)
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_any_module_starts_no_backend():
    names = [module_name(path) for path in FILES if path.stem != '__main__']
    assert import_in_fresh_process(names)['backends'] == []


def test_everything_but_data_imports_without_tensorflow():
    names = [
        module_name(path)
        for path in FILES
        if path.stem != '__main__' and path.relative_to(PACKAGE).parts[0] != 'data'
    ]
    assert import_in_fresh_process([*names, 'bigssl_jax.data'])['heavy'] == {}


def test_importing_the_package_is_quick_and_light():
    """Under 0.3 s beyond what the interpreter itself takes (best of five, a busy machine aside)."""
    code = (
        'import sys, time; start = time.perf_counter(); before = set(sys.modules);'
        ' import bigssl_jax; print(time.perf_counter() - start);'
        ' print(sorted({"jax", "numpy", "flax", "tensorflow"} & (set(sys.modules) - before)))'
    )
    runs = [
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True
        ).stdout.splitlines()
        for _ in range(5)
    ]
    assert min(float(seconds) for seconds, _ in runs) < 0.3
    assert {heavy for _, heavy in runs} == {'[]'}
