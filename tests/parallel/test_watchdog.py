"""A step that hangs is told with its stacks, then ended; whatever it hangs in."""

import subprocess
import sys
import time

import pytest

from bigssl_jax.parallel.watchdog import EXIT_HUNG

PERIOD = 1.0
HANG = """
import ctypes, pathlib, sys, time
from bigssl_jax.parallel.watchdog import Watchdog

def a_step_that_hangs():
    {hang}

with Watchdog('toy', {minutes}, pathlib.Path(sys.argv[1])) as watchdog:
    for _ in range(4):
        time.sleep({period} / 2)
        watchdog.feed()
    print('hanging', flush=True)
    a_step_that_hangs()
"""


def run(tmp_path, hang):
    code = HANG.format(hang=hang, minutes=PERIOD / 60, period=PERIOD)
    return subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'toy' / 'stacks.txt')],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_hanging_step_is_told_with_its_stacks_and_ended_with_77(tmp_path):
    started = time.monotonic()
    ended = run(tmp_path, 'time.sleep(50)')
    assert time.monotonic() - started < 30
    assert ended.returncode == EXIT_HUNG == 77
    assert ended.stdout == 'hanging\n'  # four feedings, half a period apart, kept it quiet
    stacks = (tmp_path / 'toy' / 'stacks.txt').read_text()
    assert 'toy: no step ended for' in stacks
    for text in (stacks, ended.stderr):
        assert 'in a_step_that_hangs' in text
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith('bigssl: toy: no step ended for') and 'stacks.txt says where' in last


def test_native_code_that_keeps_the_interpreter_is_ended_as_well(tmp_path):
    ended = run(tmp_path, 'ctypes.PyDLL(None).sleep(50)')
    assert ended.returncode == 1
    assert 'in a_step_that_hangs' in ended.stderr


@pytest.mark.parametrize('rest', ['time.sleep(0)', 'watchdog.__exit__(None, None, None)'])
def test_steps_that_end_are_left_alone(tmp_path, rest):
    ended = run(tmp_path, rest)
    assert (ended.returncode, ended.stderr) == (0, '')
    assert not (tmp_path / 'toy').exists()


def test_nothing_is_watched_with_a_period_of_nothing(tmp_path):
    code = HANG.format(hang='time.sleep(0.5)', minutes=0, period=PERIOD)
    ended = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'stacks.txt')],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, '')
