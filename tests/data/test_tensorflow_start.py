"""TensorFlow starts in silence, hides nothing but its remarks, leaves the accelerators alone."""

import os
import subprocess
import sys
import types

import pytest

from bigssl_jax.data import tensorflow_start

REMARK = b'I0000 00:00:17 99 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU'
REMARK += b' will not be used.\n'


def test_a_process_that_starts_tensorflow_and_tensorboard_prints_nothing(tmp_path):
    """With the devices really counted: the C++ side speaks, if ever, in this order."""
    code = (
        'from bigssl_jax.data.tensorflow_start import tensorflow\n'
        'from bigssl_jax.training.metrics import MetricLog\n'
        'import pathlib, sys\n'
        'tf = tensorflow()\n'
        'MetricLog(pathlib.Path(sys.argv[1]), 0, tensorboard=True).close()\n'
        'print({device.device_type for device in tf.config.list_logical_devices()})\n'
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith('TF_')}
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)],
        capture_output=True, text=True, timeout=200, check=True, env=clean,
    )  # fmt: skip
    assert done.stderr == ''
    assert done.stdout == "{'CPU'}\n"


def test_tensorflow_is_told_to_leave_every_accelerator(monkeypatch):
    asked = []
    config = types.SimpleNamespace(set_visible_devices=lambda d, kind: asked.append((d, kind)))
    monkeypatch.setitem(sys.modules, 'tensorflow', types.SimpleNamespace(config=config))
    tensorflow_start.tensorflow.__wrapped__()
    assert asked == [([], 'GPU'), ([], 'TPU')]


def test_all_but_the_remarks_is_passed_on_also_when_the_start_fails(capfd):
    with pytest.raises(ImportError), tensorflow_start.without_remarks():
        os.write(2, b'libfoo.so: version mismatch\n' + REMARK)
        raise ImportError
    os.write(2, b'later\n')
    assert capfd.readouterr().err == 'libfoo.so: version mismatch\nlater\n'
