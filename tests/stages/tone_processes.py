"""The tone recipe in several real processes of this machine, and what they left behind."""

import json
import os
import pathlib
import socket
import subprocess
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).parent


class Processes:
    """`bigssl run` in several processes of this machine."""

    def __init__(
        self, recipe, folder: pathlib.Path, workdir, count: int, *words: str,
        config: str | None = None, last: tuple[str, ...] = (),
    ):  # fmt: skip
        """`last`: words that the last process alone is given."""
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            address = f'127.0.0.1:{probe.getsockname()[1]}'
        folder.mkdir()
        self.said = [folder / str(i) for i in range(count)]
        self.processes = []
        for i in range(count):
            several = {
                'BIGSSL_COORDINATOR': address,
                'BIGSSL_NUM_PROCESSES': str(count),
                'BIGSSL_PROCESS_ID': str(i),
            }
            environment = {
                **os.environ,
                'JAX_COMPILATION_CACHE_DIR': str(recipe.cache),
                **(several if count > 1 else {}),
                # As many devices as the machine has cores would be another number of batch parts.
                'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
            }
            with self.said[i].open('w') as output:
                self.processes.append(
                    subprocess.Popen(
                        recipe.command(
                            workdir, *words, *(last if i == count - 1 else ()), config=config
                        ),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        cwd=HERE.parents[1],
                        env=environment,
                    )
                )

    def codes(self, seconds: float = 1000.0) -> list[int]:
        limit = time.monotonic() + seconds
        return [p.wait(max(0.0, limit - time.monotonic())) for p in self.processes]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + 1000
        while not condition():
            assert all(p.poll() is None for p in self.processes), self.told()
            assert time.monotonic() < limit
            time.sleep(0.01)

    def told(self) -> str:
        return '\n----\n'.join(path.read_text() for path in self.said)

    def last_lines(self) -> list[str]:
        return [path.read_text().strip().splitlines()[-1] for path in self.said]

    def end(self) -> None:
        """Kills what is left of them."""
        for process in self.processes:
            process.kill()
            process.wait()


def log(workdir: pathlib.Path, stage: str) -> dict[int, dict]:
    path = workdir / stage / 'metrics.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith('}')]
    assert len({line['step'] for line in found}) == len(found), 'a step was logged twice'
    return {line['step']: line for line in found}


def losses(workdir: pathlib.Path, stage: str) -> list[float]:
    return [line['loss'] for line in log(workdir, stage).values() if 'loss' in line]


def streams(workdir: pathlib.Path, stage: str) -> dict[str, str]:
    """Fingerprints of the batches that the newest checkpoint was made from."""
    newest = max(int(p.name) for p in (workdir / stage / 'checkpoints').glob('[0-9]*'))
    (record,) = (workdir / stage / 'checkpoints' / str(newest) / 'identity').glob('metadata')
    return {name: x for name, x in json.loads(record.read_text()).items() if name != 'saved'}
