"""What every test runs under: the CPU, one device, quiet libraries, one compilation cache.

Nothing is imported here.  Tests that need several devices start a process of their own with
XLA_FLAGS=--xla_force_host_platform_device_count=N: the count cannot change once JAX has started.
"""

import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')
# Workers of pytest-xdist and processes started by tests compile each program once between them.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
