"""What must be set before JAX starts: platform, host devices, compilation cache, quiet logs.

XLA:CPU runs one small model on about one core.  With n host devices and a data-parallel mesh it
uses n cores, so on a CPU `configure_platform` asks for one host device per core.  The request has
no effect on the devices of a TPU or GPU.

With libtpu installed, which plans need on any machine, JAX looks for a TPU wherever it starts, and
libtpu complains in several lines where there is none.  So a machine without an accelerator is said
to be a CPU.
"""

import glob
import os
import sys

# XLA:CPU ends the process when one device has waited for another for 40 seconds.  A search takes
# longer on one half of a batch than on the other, and a busy machine anything; what really hangs is
# the watchdog's business.
PATIENCE = {
    '--xla_cpu_collective_call_warn_stuck_timeout_seconds': 600,
    '--xla_cpu_collective_call_terminate_timeout_seconds': 7200,
}


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def has_accelerator() -> bool:
    """Whether the system shows a TPU (accel, vfio) or a GPU (nvidia, dxg of WSL, kfd of AMD)."""
    patterns = ('accel*', 'accel/*', 'vfio/[0-9]*', 'nvidia*', 'dxg', 'kfd')
    return any(glob.glob(f'/dev/{pattern}') for pattern in patterns)


def configure_platform(host_devices: int | None = None) -> None:
    """Sets the environment for JAX; call it before the first use of a device.

    XLA reads its flags once, when a backend starts; importing JAX does not start one.  A platform
    that the user has chosen (JAX_PLATFORMS) stays.

    Args:
      host_devices: devices that the CPU backend shows; default: one per core.  A count that the
        user has already put into XLA_FLAGS wins.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if '--xla_force_host_platform_device_count' not in flags:
        count = host_devices or cpu_cores()
        flags += f' --xla_force_host_platform_device_count={count}'
    flags += ''.join(f' {name}={value}' for name, value in PATIENCE.items() if name not in flags)
    os.environ['XLA_FLAGS'] = flags.strip()
    if not os.environ.get('JAX_PLATFORMS') and not has_accelerator():
        use_cpu()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')


def use_cpu() -> None:
    """Makes the CPU the only platform, for this process and those that it starts."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:  # it has read the variable already
        import jax

        jax.config.update('jax_platforms', 'cpu')


def enable_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory` (unless JAX_COMPILATION_CACHE_DIR names another)."""
    import jax

    if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        jax.config.update('jax_compilation_cache_dir', os.path.abspath(directory))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
