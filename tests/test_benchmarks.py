"""Benchmarks still run: their own checks are that both sides compute the same."""

import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / 'benchmarks'


@pytest.mark.slow
def test_transducer_loss(tmp_path):
    written = tmp_path / 'result.json'
    words = ['--no-peer', '--repeats', '1', '--sizes', '2,200,20,128', '--json', str(written)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / 'transducer_loss.py'), *words],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'B 2, T 200, U 20, V 128' in done.stdout
    (found,) = json.loads(written.read_text())
    forms = found['forms']
    fused, reference = (forms[f'from frames: {form}'] for form in ('fused', 'reference'))
    assert abs(fused['loss'] - reference['loss']) < 1e-4 * reference['loss']
    assert fused['planned_mb'] < reference['planned_mb'] / 2
