"""Streams let go of their threads and leave TensorFlow alone until it is needed."""

import pathlib
import subprocess
import sys

import pytest

from bigssl_jax import data


@pytest.fixture
def config(corpus):
    return {
        'sources': {'s0': {'selection': {'corpus': str(corpus.directory)}}},
        'batch_seconds': 12.0,
    }


def test_closing_stops_reading(config):
    stream = data.stream(config, 0)
    batches = stream.batches()
    next(batches)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def run_program(program: str) -> subprocess.CompletedProcess:
    """Runs Python text in a process of its own."""
    return subprocess.run(
        [sys.executable, '-c', program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=pathlib.Path(__file__).parents[2],
    )


def test_a_program_that_forgets_to_close_still_ends(config):
    program = f'from bigssl_jax import data; print(len(next(data.stream({config!r}, 0).batches())))'
    run = run_program(program)
    assert (run.returncode, run.stdout.strip()) == (0, '5'), run.stderr


def test_planning_alone_imports_no_tensorflow(config):
    program = (
        f'import sys; from bigssl_jax import data; data.stream({config!r}, 0).batch(3);'
        "print('tensorflow' in sys.modules, 'seqio' in sys.modules)"
    )
    run = run_program(program)
    assert run.stdout.strip() == 'False False', run.stderr
