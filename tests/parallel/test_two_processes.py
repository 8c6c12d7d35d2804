"""Two real processes that agree, and that say clearly when one of them is missing."""

import json
import os
import socket
import subprocess
import sys

from bigssl_jax.parallel import peers

SCRIPT = """
import json
from bigssl_jax.exits import exit_of
from bigssl_jax.parallel.distributed import (
    ProcessesDisagree, barrier, batch_slice, finish, from_primary, gather, leave, local_mesh,
    process_index, start_distributed)

start_distributed()
me, found = process_index(), {}
try:
    import jax
    from bigssl_jax.parallel import make_mesh
    from bigssl_jax.parallel.agreement import Agreement

    found['gathered'] = [gather('names', {'me': me}), gather('names', me * 10)]
    found['told'] = [from_primary('word', f'{me} says'), from_primary('word', [me])]
    agreement = Agreement()
    # Process 1 wishes the first thing in step 2, process 0 the second in step 3.
    found['granted'] = [
        agreement.exchange((me == 1 and step == 2, me == 0 and step == 3)) for step in range(6)]
    found['devices'] = [jax.local_device_count(), jax.device_count(), local_mesh({'fsdp': -1}).size]
    found['slice'] = batch_slice(make_mesh({'data': -1}))
    if me == 0:
        try:
            barrier('lunch', timeout_seconds=1)
        except ProcessesDisagree as error:
            found['absent'] = str(error)
    barrier('home')
    print(json.dumps(found))
    finish()
except BaseException as error:
    leave(error, *exit_of(error))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def begin(process: int, port: int, **variables: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
        'BIGSSL_COORDINATOR': f'127.0.0.1:{port}',
        'BIGSSL_NUM_PROCESSES': '2',
        'BIGSSL_PROCESS_ID': str(process),
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, '-c', SCRIPT], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_agree_and_name_the_one_that_is_late():
    port = free_port()
    both = [begin(process, port) for process in (0, 1)]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert first.pop('absent').startswith("process 1 did not come to 'lunch' within 1 s, where")
    assert first.pop('slice') == [0, 2] and second.pop('slice') == [1, 2]
    assert first == second == {
        'gathered': [[{'me': 0}, {'me': 1}], [0, 10]],
        'told': ['0 says', [0]],
        # A step later than wished, in both.
        'granted': [[step == 3, step == 4] for step in range(6)],
        'devices': [2, 4, 2],
    }  # fmt: skip


def test_a_process_whose_siblings_do_not_come_says_where_it_waited():
    port = free_port()
    alone = begin(1, port, BIGSSL_START_SECONDS='2')
    _, err = alone.communicate(timeout=100)
    assert alone.returncode == 2
    line = err.strip().splitlines()[-1]
    assert line.startswith('bigssl: process 1 of 2: not all processes met at ')
    assert f'127.0.0.1:{port} within 2 s' in line


def test_a_port_that_is_taken_is_named():
    taken = peers.open_listener(0)
    port = taken.getsockname()[1]
    first = begin(0, port)
    _, err = first.communicate(timeout=100)
    taken.close()
    assert first.returncode == 1  # raised before `leave` could know of anybody
    assert f'cannot listen on port {port} of BIGSSL_COORDINATOR' in err
