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
    words = ['--no-peer', '--repeats', '1', '--sizes', '2,200,20,1024', '--json', str(written)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / 'transducer_loss.py'), *words],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'B 2, T 200, U 20, V 1024' in done.stdout
    (found,) = json.loads(written.read_text())
    forms = found['forms']
    fused, reference = (forms[f'from frames: {form}'] for form in ('fused', 'reference'))
    assert abs(fused['loss'] - reference['loss']) < 1e-4 * reference['loss']
    assert fused['planned_mb'] < reference['planned_mb'] / 2


@pytest.mark.slow
def test_labelling_holds_no_more_memory_at_its_end(tmp_path):
    written = tmp_path / 'result.json'
    words = ['--utterances', '12000', '--part-utterances', '200', '--json', str(written)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / 'labelling.py'), *words],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    assert (found['utterances'], found['parts']) == (12000, 60)
    middle, end = (found['memory'][n]['megabytes'] for n in (2, 4))
    assert end < middle + 30  # the audio of the second half is 57 MB


@pytest.mark.slow
def test_input_pipeline_reads_the_same_audio_and_starts_in_flat_memory(tmp_path):
    written = tmp_path / 'result.json'
    words = ['--utterances', '100', '--batches', '4', '--repeats', '2', '--cores', '1']
    words += ['--rows', '200000,2000000', '--json', str(written)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / 'input_pipeline.py'), *words],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    assert [row['side'] for row in found['reading']] == ['ours', 'tf.data', 'files']
    assert all(row['hours_per_core_second'] > 0.01 for row in found['reading'])
    ours, unplanned = found['reading'][:2]
    assert ours['padding'] < 0.7 * unplanned['padding']
    small, small_part, large, large_part = found['starting']
    # Ten times the utterances: a plan of all of them grows by nothing, one that leaves out 3 % by
    # what it leaves out.
    assert large['kept_mb'] < small['kept_mb'] + 10
    assert large_part['kept_mb'] < small_part['kept_mb'] + 10 + 8e-6 * 0.15 * 2_000_000
