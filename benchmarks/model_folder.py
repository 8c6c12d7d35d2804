"""Host memory and time that writing and reading a model folder takes, relative to the model's size.

    python benchmarks/model_folder.py [--megabytes 200] [--devices 8]

    save      from arrays split over the devices: the arrays, which on a CPU are host memory too,
              are there before and are not counted
    numpy     read whole into numpy arrays: the result alone is 1.0
    sharded   read into arrays split over the devices: on a CPU the result alone is 1.0

Each runs in a process of its own; memory is the process's peak (getrusage) above what it held
before.  A model folder is checked as it is read, so the fingerprints are part of all three.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

MODES = ('save', 'numpy', 'sharded')


def main() -> None:
    """Runs every mode in a process of its own and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--megabytes', type=int, default=200)
    parser.add_argument('--devices', type=int, default=8)
    parser.add_argument('--json', type=pathlib.Path, help='also write the figures here')
    parser.add_argument('--mode', choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument('--folder', type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options.mode, options.folder, options.megabytes)))
        return
    flags = f'--xla_force_host_platform_device_count={options.devices}'
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
    found = {}
    print(f'{options.megabytes} MB on {options.devices} devices')
    print(f'{"":10}{"extra memory / model":>22}{"MB/s":>8}')
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            words = ['--mode', mode, '--folder', folder, '--megabytes', str(options.megabytes)]
            done = subprocess.run(
                [sys.executable, __file__, *words],
                env=environment, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found[mode] = json.loads(done.stdout.splitlines()[-1])
            print(f'{mode:10}{found[mode]["memory"]:22.2f}{found[mode]["speed"]:8.0f}')
    if options.json:
        options.json.write_text(json.dumps(found))


def measure(mode: str, folder: pathlib.Path, megabytes: int) -> dict[str, float]:
    """{'memory': peak above the start over the model's size, 'speed': MB/s} of one mode."""
    from bigssl_jax.parallel import make_mesh
    from bigssl_jax.stages.model import load_model

    mesh = make_mesh({'data': 1, 'fsdp': -1})
    # Programs compiled, threads started, libraries loaded: what a small model takes is not its own.
    _save(folder / 'warm', _params(mesh, 4))
    warm = load_model(folder / 'warm')
    warm.read(warm.shapes())
    warm.read({'params': _layout(mesh, 4)})
    params = _params(mesh, megabytes) if mode == 'save' else None
    held, started = _resident(), time.perf_counter()
    if mode == 'save':
        _save(folder / 'model', params)
    else:
        model = load_model(folder / 'model')
        wanted = model.shapes() if mode == 'numpy' else {'params': _layout(mesh, megabytes)}
        params = model.read(wanted)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {'memory': (peak - held) / (megabytes * 1e6), 'speed': megabytes / seconds}


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


def _layout(mesh: Any, megabytes: int) -> Any:
    """Abstract parameters as an encoder has them: stacked kernels, split over fsdp."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    kernels = 8
    rows = 64 * max(1, round(megabytes * 1e6 / 4 / kernels / 4 / 1024 / 64))
    split = NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
    kernel = jax.ShapeDtypeStruct((4, rows, 1024), np.float32, sharding=split)
    return {'encoder': {f'kernel{i}': kernel for i in range(kernels)}, 'heads': {}}


def _params(mesh: Any, megabytes: int) -> Any:
    """Random parameters, made where they lie."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def one(leaf: Any) -> Any:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding,
            lambda at: rng.random([len(range(n)[s]) for n, s in zip(leaf.shape, at, strict=True)],
                                  np.float32),
        )  # fmt: skip

    return jax.block_until_ready(jax.tree.map(one, _layout(mesh, megabytes)))


def _save(directory: pathlib.Path, params: Any) -> None:
    from bigssl_jax.audio import AudioConfig
    from bigssl_jax.models.presets import conformer
    from bigssl_jax.stages.model import save_model

    constants: dict[str, Any] = {'encoder': {}, 'heads': {}}
    save_model(directory, conformer('tiny'), AudioConfig(), {}, params, constants, None, 0)


if __name__ == '__main__':
    main()
