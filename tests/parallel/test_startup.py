"""What JAX is told before it starts."""

import os
import subprocess
import sys

from bigssl_jax.parallel.startup import PATIENCE, configure_platform


def test_flags_of_the_user_stay_and_the_rest_is_added(monkeypatch):
    terminate = list(PATIENCE)[1]
    monkeypatch.setenv('XLA_FLAGS', f'--xla_force_host_platform_device_count=3 {terminate}=50')
    configure_platform(2)
    configure_platform(4)
    assert os.environ['XLA_FLAGS'].split() == [
        '--xla_force_host_platform_device_count=3',
        f'{terminate}=50',
        f'{list(PATIENCE)[0]}=600',
    ]


def test_jax_knows_the_flags():
    """It ends a process with a flag that it does not know."""
    script = (
        'from bigssl_jax.parallel.startup import configure_platform; configure_platform(2);'
        ' import jax; print(len(jax.devices()))'
    )
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    done = subprocess.run(
        [sys.executable, '-c', script],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, '2\n'), done.stderr
