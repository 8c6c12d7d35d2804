"""Several processes as one program: how they find each other, agree, and end together.

    environment --launch_of--> Launch --start_distributed--> jax.distributed, the peers' connections

Every process runs the same program on its own devices and its own slice of every batch.  Process 0,
the primary one, also writes the files that are written once, and talks.  The others wait for it at
named barriers.  Barriers may wait long (a corpus takes hours to prepare), because a process that
dies does not let anybody wait: `peers.py` ends all of them with its reason.

A program that was started without any sign of a cluster is a single process, and nothing here does
anything: no port, no thread, no look at the network.
"""

import contextlib
import ctypes
import dataclasses
import glob
import importlib.util
import json
import math
import os
import pathlib
import re
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src.distributed import global_state  # the coordination client has no public name

from bigssl_jax.config import UserError
from bigssl_jax.parallel import peers
from bigssl_jax.parallel.mesh import batch_parts, make_mesh
from bigssl_jax.parallel.sharding import batch_sharding
from bigssl_jax.parallel.startup import configure_platform, cpu_cores

EXPLICIT = ('BIGSSL_COORDINATOR', 'BIGSSL_NUM_PROCESSES', 'BIGSSL_PROCESS_ID')
START_SECONDS = 300.0  # for all processes to come; BIGSSL_START_SECONDS sets another time
BARRIER_SECONDS = 600.0
WORK_SECONDS = 7 * 24 * 3600.0  # where one process works and the others only wait
_LOOPBACK = ('localhost', '127.0.0.1', '::1', '[::1]')

_peers: peers.Peers | None = None
_calls: dict[str, int] = {}


class ProcessesDisagree(UserError):
    """The processes of one run were started differently, or did not come to the same place."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
      method: 'single', 'explicit', or what jax.distributed is to detect: 'slurm', 'ompi',
        'gketpu', 'gcetpu', 'k8s'.
      coordinator: host:port of process 0 (explicit only).
      num_processes, process_id: explicit only.
      local_processes: processes of this run that share the cores of this machine.
    """

    method: str = 'single'
    coordinator: str = ''
    num_processes: int = 1
    process_id: int = 0
    local_processes: int = 1


def launch_of(
    environment: Mapping[str, str], product: str = '', tpu: bool = False, kubernetes: bool = False
) -> Launch:
    """Decides how this process was started.  A pure function.

    Args:
      environment: variables of the process.
      product: the machine's product name; 'Google...' on Google's virtual machines.
      tpu: whether the machine shows TPU chips.
      kubernetes: whether the `kubernetes` package is there, which JAX needs to ask a cluster.

    Raises:
      UserError: the variables contradict each other.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if given:
        return _explicit(environment, given)

    def several(name: str) -> bool:
        return environment.get(name, '1').isdigit() and int(environment.get(name, '1')) > 1

    # A job script or an interactive shell has SLURM_JOB_ID, but only a step of srun has tasks.
    step = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
    if all(name in environment for name in step) and several('SLURM_NTASKS'):
        if environment.get('SLURM_STEP_NUM_TASKS', '2') != '1':
            return Launch('slurm')
    if 'OMPI_MCA_orte_hnp_uri' in environment and several('OMPI_COMM_WORLD_SIZE'):
        return Launch('ompi')
    if environment.get('JAX_PLATFORMS', 'tpu') == 'cpu':
        tpu = False
    workers = environment.get('TPU_PROCESS_ADDRESSES', environment.get('TPU_WORKER_HOSTNAMES', ''))
    if tpu and workers and (',' in workers or several('MEGASCALE_NUM_SLICES')):
        return Launch('gketpu')
    if 'KUBERNETES_SERVICE_HOST' in environment and 'JOB_COMPLETION_INDEX' in environment:
        if kubernetes:
            return Launch('k8s')
        if environment['JOB_COMPLETION_INDEX'] != '0':
            raise UserError(
                'this pod is one of several of an indexed job (JOB_COMPLETION_INDEX is'
                f' {environment["JOB_COMPLETION_INDEX"]}), but nothing says how many there are;'
                f' set {", ".join(EXPLICIT)}, or install jax[k8s]'
            )
    if tpu and not workers and product.startswith('Google'):
        if 'TPU_SKIP_MDS_QUERY' not in environment:
            return Launch('gcetpu')
    return Launch()


def _explicit(environment: Mapping[str, str], given: list[str]) -> Launch:
    absent = [name for name in EXPLICIT if name not in given]
    if absent:
        raise UserError(
            f'{" and ".join(given)} set, but not {" and ".join(absent)}; set all three, for example'
            ' BIGSSL_COORDINATOR=host0:8476 BIGSSL_NUM_PROCESSES=4 BIGSSL_PROCESS_ID=0, or none'
        )
    coordinator = environment['BIGSSL_COORDINATOR']
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f'BIGSSL_COORDINATOR is {coordinator!r}; it must be host:port of process 0,'
            ' for example host0:8476'
        )
    numbers = {}
    for name in (*EXPLICIT[1:], 'BIGSSL_LOCAL_PROCESSES'):
        text = environment.get(name, '')
        if text and not text.isdigit():
            raise UserError(f'{name} is {text!r}; it must be a whole number')
        numbers[name] = int(text) if text else 0
    count, process = numbers['BIGSSL_NUM_PROCESSES'], numbers['BIGSSL_PROCESS_ID']
    if not 0 <= process < count:
        raise UserError(
            f'BIGSSL_PROCESS_ID is {process} and BIGSSL_NUM_PROCESSES is {count};'
            ' the ids of n processes are 0 to n - 1'
        )
    local = numbers['BIGSSL_LOCAL_PROCESSES'] or (count if host in _LOOPBACK else 1)
    return Launch('explicit', coordinator, count, process, local)


def detect_launch() -> Launch:
    """`launch_of` this process on this machine."""
    name = pathlib.Path('/sys/class/dmi/id/product_name')
    return launch_of(
        os.environ,
        product=name.read_text().strip() if name.exists() else '',
        tpu=bool(glob.glob('/dev/accel[0-9]*') + glob.glob('/dev/vfio/[0-9]*')),
        kubernetes=importlib.util.find_spec('kubernetes') is not None,
    )


# ---------------------------------------------------------------------------------------------
# start and end


def start_distributed() -> None:
    """Configures the platform and joins this process with the others; before any backend starts.

    With several processes on one machine (BIGSSL_LOCAL_PROCESSES, or a coordinator on the loop-back
    address) the host devices of a CPU are one per core of this process's share.

    Raises:
      UserError: contradicting variables, a port that is taken, processes that did not come.
    """
    launch = detect_launch()
    configure_platform(max(1, cpu_cores() // launch.local_processes))
    if launch.method == 'single':
        return
    # The loop agrees on stops itself, and JAX's handler would take SIGTERM away from Python.
    jax.config.update('jax_enable_preemption_service', False)
    seconds = float(os.environ.get('BIGSSL_START_SECONDS') or START_SECONDS)
    deadline = time.monotonic() + seconds
    explicit: dict[str, Any] = {'cluster_detection_method': launch.method}
    if launch.method == 'k8s':  # JAX knows it without a name
        explicit = {}
    if launch.method == 'explicit':
        explicit = {
            'coordinator_address': launch.coordinator,
            'num_processes': launch.num_processes,
            'process_id': launch.process_id,
            'cluster_detection_method': 'deactivate',
        }
        if launch.process_id == 0:
            _check_port(launch.coordinator)
    with _time_limit(launch, seconds):
        # Its own limit comes later than ours: it ends with an abort.
        jax.distributed.initialize(**explicit, initialization_timeout=int(seconds) + 60)
    if process_count() > 1:
        _connect(max(30.0, deadline - time.monotonic()))
        jax.devices()  # here all processes come together to tell what devices they have


def process_count() -> int:
    """Processes of this run; starts no backend."""
    return global_state.num_processes if global_state.client is not None else 1


def process_index() -> int:
    """The number of this process; starts no backend."""
    return global_state.process_id if global_state.client is not None else 0


def is_primary() -> bool:
    """Whether this process is the one that writes and talks."""
    return process_index() == 0


def say(text: str) -> None:
    """Prints a line, once per run and not once per process."""
    if is_primary():
        print(text, flush=True)


def _check_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(':')[2])
    try:
        peers.open_listener(port).close()
    except OSError as error:
        raise UserError(
            f'process 0 cannot listen on port {port} of BIGSSL_COORDINATOR={coordinator}'
            f' ({error.strerror}); choose another port, the same for all processes'
        ) from error


@contextlib.contextmanager
def _time_limit(launch: Launch, seconds: float) -> Iterator[None]:
    """Ends the process with a readable line when JAX has not found the others in time."""
    where = launch.coordinator or f'the coordinator ({launch.method})'
    who = f'process {launch.process_id} of {launch.num_processes}: ' if launch.coordinator else ''
    line = (
        f'{who}not all processes met at {where} within {seconds:.0f} s; start all of them, and'
        ' check that process 0 runs at that address and that its port can be reached'
        ' (BIGSSL_START_SECONDS sets another time)'
    )
    timer = threading.Timer(seconds, peers.end_process, (2, line))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _connect(seconds: float) -> None:
    """Opens the peers' connections: process 0 says through JAX's store where it listens."""
    global _peers
    _hold_aborts()
    count, process = process_count(), process_index()
    assert global_state.coordinator_address is not None
    host = global_state.coordinator_address.rpartition(':')[0].strip('[]')
    try:
        if process == 0:
            listener = peers.open_listener(int(os.environ.get('BIGSSL_PEER_PORT') or 0))
            port, token = listener.getsockname()[1], secrets.token_hex(8)
            global_state.client.key_value_set('bigssl/peers', json.dumps([port, token]))
            _peers = peers.listen(listener, count, token, seconds)
        else:
            found = global_state.client.blocking_key_value_get('bigssl/peers', int(seconds * 1000))
            port, token = json.loads(found)
            _peers = peers.join(process, count, (host, port), token, seconds)
    except (OSError, jax.errors.JaxRuntimeError) as error:
        raise UserError(
            f'process {process} of {count}: the processes cannot talk with process 0 at {host}'
            f' ({str(error).splitlines()[0]}); open a port between them and name it in'
            ' BIGSSL_PEER_PORT'
        ) from error


def _hold_aborts() -> None:
    """Makes an abort wait some seconds, so that the reason for it can be told.

    JAX's client aborts at once when process 0 dies.  A handler in Python would run too late; the
    C library's `sleep` is safe in a signal and may serve as the handler: it is called with the
    signal's number, and so sleeps 6 seconds, in which `peers.py` has its say.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def finish() -> None:
    """The orderly end: waits until all processes have come to it, then takes leave of them."""
    if _peers is None:
        return
    barrier('end', WORK_SECONDS)
    _peers.finish()
    jax.distributed.shutdown()


def leave(error: BaseException, code: int, line: str) -> None:
    """Ends this process because of `error`, and all others with the same code and reason.

    Returns only for a single process.  When another process has died, this error is most likely its
    consequence, and that reason is the one that is told.

    Args:
      error: what happened; its traceback is shown when `line` is empty.
      code: the exit code.
      line: what the user should read; '' for a defect of ours.
    """
    if _peers is None:
        return
    if not isinstance(error, UserError) or isinstance(error, ProcessesDisagree):
        if code in (1, 2) and _peers.others_ended(2 * peers.GRACE_SECONDS + 1):
            time.sleep(60)  # the watching thread ends the process
    if not line:
        traceback.print_exception(error)
        line = f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'
    end_all(code, line)


def end_all(code: int, line: str) -> None:
    """Ends this process at once, and all others with the same code and reason."""
    if _peers is not None:
        _peers.tell(code, f': {line}')
        line = f'process {process_index()} of {process_count()}: {line}'
    peers.end_process(code, line)


# ---------------------------------------------------------------------------------------------
# agreement


def barrier(name: str, timeout_seconds: float = BARRIER_SECONDS) -> None:
    """Waits until every process is here.

    Raises:
      ProcessesDisagree: some did not come in time; names them.
    """
    if process_count() == 1:
        return
    try:
        global_state.client.wait_at_barrier(f'bigssl/{name}', int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        absent = re.search(r'timed out task names:\s*((?:\d+\s+)+)', str(error))
        who = f'process {", ".join(absent[1].split())} did' if absent else 'not all processes did'
        raise ProcessesDisagree(
            f'{who} not come to {name!r} within {timeout_seconds:.0f} s, where process'
            f' {process_index()} of {process_count()} waited; run the same command again'
        ) from error


def gather(name: str, value: Any, timeout_seconds: float = BARRIER_SECONDS) -> list[Any]:
    """Every process's `value` (small, JSON), in the order of the processes.  Waits for all."""
    if process_count() == 1:
        return [value]
    key = _fresh_key(name)
    global_state.client.key_value_set(f'{key}/{process_index()}', json.dumps(value))
    barrier(f'{name} of all', timeout_seconds)
    found = dict(global_state.client.key_value_dir_get(f'{key}/'))
    return [json.loads(found[f'{key}/{process}']) for process in range(process_count())]


def from_primary(name: str, value: Any, timeout_seconds: float = BARRIER_SECONDS) -> Any:
    """Process 0's `value` (small, JSON) in every process; what the others give is not looked at."""
    if process_count() == 1:
        return value
    key = _fresh_key(name)
    if is_primary():
        global_state.client.key_value_set(key, json.dumps(value))
        return value
    try:
        return json.loads(
            global_state.client.blocking_key_value_get(key, int(timeout_seconds * 1000))
        )
    except jax.errors.JaxRuntimeError as error:
        raise ProcessesDisagree(
            f'process {process_index()} of {process_count()} waited {timeout_seconds:.0f} s for'
            f' what process 0 had to say about {name!r}; run the same command again'
        ) from error


def _fresh_key(name: str) -> str:
    """A key of the store that was not used before; the same one in all processes."""
    _calls[name] = _calls.get(name, 0) + 1
    return f'bigssl/{name}/{_calls[name]}'


def local_mesh(axes: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of this process's devices alone, as near to the sizes in `axes` as they allow.

    For work that processes do apart: what runs on it waits for nobody.
    """
    rest = jax.local_device_count()
    sizes = {}
    for name in ('tensor', 'fsdp'):
        wanted = axes.get(name, 1)
        sizes[name] = math.gcd(rest, wanted if wanted > 0 else rest)
        rest //= sizes[name]
    return make_mesh({**sizes, 'data': rest}, jax.local_devices())


def batch_slice(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which slice of every batch this process reads: (index, number of slices).

    Processes whose devices hold the same rows (a tensor axis that spans them) read the same slice.

    Raises:
      UserError: the mesh cuts batches so that processes share some rows and not others.
    """
    parts = batch_parts(mesh)
    held: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    slices = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(rows) for rows in slices}) > 1 or sum(map(len, slices)) != parts:
        raise UserError(
            f'compute.mesh ({dict(mesh.shape)}) gives the {len(held)} processes rows that overlap'
            ' in part; let the product of the batch axes be a multiple of the number of processes'
        )
    return slices.index(tuple(sorted(held[jax.process_index()]))), len(slices)
