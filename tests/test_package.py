"""What a user of the package finds: versions, bounds, locks, files that ship."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

import bigssl_jax

ROOT = pathlib.Path(__file__).parent.parent
LOCKS = sorted(ROOT.glob('requirements-lock-3.*.txt'))


def setup_arguments() -> dict:
    """What setup.py passes to `setuptools.setup`, read by running it with a stand-in."""
    found: dict = {}
    import types

    stand_in = types.SimpleNamespace(
        setup=lambda **arguments: found.update(arguments),
        find_packages=lambda include: [
            '.'.join(path.parent.relative_to(ROOT).parts)
            for path in sorted(ROOT.glob('bigssl_jax/**/__init__.py'))
        ],
    )
    source = (ROOT / 'setup.py').read_text().replace('import setuptools\n', '')
    exec(
        compile(source, 'setup.py', 'exec'),
        {'setuptools': stand_in, '__file__': str(ROOT / 'setup.py')},
    )
    return found


def bounds(requirement: str) -> tuple[str, list[str]]:
    """`'jax[tpu]>=1,<2'` -> `('jax', ['>=1', '<2'])`."""
    match = re.match(r'([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?(.*)', requirement)
    assert match
    return match[1].lower().replace('_', '-'), match[2].split(',')


def all_requirements() -> list[str]:
    arguments = setup_arguments()
    return [*arguments['install_requires'], *sum(arguments['extras_require'].values(), [])]


def locked(path: pathlib.Path) -> dict[str, str]:
    lines = [line.split('#')[0].strip() for line in path.read_text().splitlines()]
    pairs = [line.split('==') for line in lines if line]
    return {name.lower().replace('_', '-'): version for name, version in pairs}


def test_version_agrees_with_the_installed_distribution():
    assert importlib.metadata.version('bigssl-jax') == bigssl_jax.__version__


def test_extras_and_python_versions():
    arguments = setup_arguments()
    assert set(arguments['extras_require']) == {'tpu', 'plan', 'gpu', 'whisper', 'dev'}
    assert arguments['python_requires'] == '>=3.11,<3.14'
    assert arguments['entry_points']['console_scripts'] == ['bigssl = bigssl_jax.cli:main']


@pytest.mark.parametrize('requirement', all_requirements())
def test_every_dependency_has_a_lower_and_an_upper_bound(requirement):
    _, limits = bounds(requirement)
    assert [limit.strip('0123456789.') for limit in limits] == ['>=', '<']


def test_there_is_a_lock_for_every_supported_python():
    assert [path.name for path in LOCKS] == [
        f'requirements-lock-3.{minor}.txt' for minor in (11, 12, 13)
    ]


@pytest.mark.parametrize('path', LOCKS, ids=lambda path: path.name)
def test_locked_versions_lie_within_the_bounds(path):
    from packaging.specifiers import SpecifierSet

    arguments = setup_arguments()
    versions = locked(path)
    for requirement in [*arguments['install_requires'], *arguments['extras_require']['dev']]:
        name, limits = bounds(requirement)
        assert versions[name] in SpecifierSet(','.join(limits)), requirement


# What `jax[tpu]` of each locked version of JAX asks for.
LIBTPU = {'0.10.2': '0.0.42.', '0.12.0.1': '0.0.50.'}


@pytest.mark.parametrize('path', LOCKS, ids=lambda path: path.name)
def test_locks_have_the_libtpu_of_their_jax(path):
    versions = locked(path)
    wanted = LIBTPU[versions['jax']]
    assert versions['libtpu'].startswith(wanted)
    if versions['jax'] == importlib.metadata.version('jax'):
        asked = [r for r in importlib.metadata.requires('jax') or [] if r.startswith('libtpu')]
        assert asked == [f'libtpu=={wanted}*; extra == "tpu"']


@pytest.mark.parametrize('path', LOCKS, ids=lambda path: path.name)
def test_locks_name_no_place_of_download(path):
    """A lock must work with any mirror, and tell nothing of the machine that made it."""
    assert not re.search(r'://|--|@|\bfile:|\s/', path.read_text().replace('# ', ''))


def test_every_third_party_import_is_a_declared_dependency():
    import ast

    arguments = setup_arguments()
    # What an extra brings is imported where it is used, and its absence is a clear message.
    requirements = [*arguments['install_requires'], *arguments['extras_require']['whisper']]
    declared = {bounds(requirement)[0] for requirement in requirements}
    home = {
        'absl': 'absl-py',
        'orbax': 'orbax-checkpoint',
        'ml-collections': 'ml-collections',
        'sklearn': 'scikit-learn',
        'PIL': 'pillow',
    }
    missing = set()
    for path in ROOT.glob('bigssl_jax/**/*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or '']
            for name in names:
                top = name.split('.')[0]
                if top in sys.stdlib_module_names or top == 'bigssl_jax':
                    continue
                top = home.get(top, top).lower().replace('_', '-')
                if top not in declared:
                    missing.add(f'{path.name}: {top}')
    assert not missing


def test_every_room_is_packaged():
    rooms = {path.parent.name for path in ROOT.glob('bigssl_jax/*/*.py')}
    packaged = {path.parent.name for path in ROOT.glob('bigssl_jax/*/__init__.py')}
    assert rooms == packaged


def test_python_m_runs_the_command():
    done = subprocess.run(
        [sys.executable, '-m', 'bigssl_jax', '--version'],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == f'bigssl-jax {bigssl_jax.__version__}'
