"""How a process finds out that it is one of several, and which rows of a batch are its own."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from bigssl_jax.config import UserError
from bigssl_jax.parallel import distributed
from bigssl_jax.parallel.distributed import Launch, batch_slice, launch_of

EXPLICIT = {
    'BIGSSL_COORDINATOR': 'host0:8476', 'BIGSSL_NUM_PROCESSES': '4', 'BIGSSL_PROCESS_ID': '3',
}  # fmt: skip
SLURM = {
    'SLURM_JOB_ID': '71', 'SLURM_STEP_NODELIST': 'node[01-04]', 'SLURM_NTASKS': '8',
    'SLURM_PROCID': '5', 'SLURM_LOCALID': '1',
}  # fmt: skip
GKE = {'TPU_WORKER_HOSTNAMES': 'w0,w1', 'TPU_WORKER_ID': '1', 'KUBERNETES_SERVICE_HOST': '10.0.0.1'}
INDEXED = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'}


def test_three_variables_say_it_all():
    assert launch_of(EXPLICIT) == Launch('explicit', 'host0:8476', 4, 3, 1)
    # They go before everything that a scheduler has set.
    assert launch_of({**EXPLICIT, **SLURM, **GKE}, 'Google', tpu=True).method == 'explicit'


@pytest.mark.parametrize(
    ('changed', 'local'),
    [
        ({'BIGSSL_COORDINATOR': '127.0.0.1:9'}, 4),
        ({'BIGSSL_COORDINATOR': '[::1]:9'}, 4),
        ({'BIGSSL_LOCAL_PROCESSES': '2'}, 2),
    ],
)
def test_processes_on_one_machine_share_its_cores(changed, local):
    assert launch_of({**EXPLICIT, **changed}).local_processes == local


@pytest.mark.parametrize('left_out', EXPLICIT)
def test_all_three_or_none(left_out):
    given = {name: value for name, value in EXPLICIT.items() if name != left_out}
    with pytest.raises(UserError, match=f'but not {left_out}; set all three'):
        launch_of(given)


@pytest.mark.parametrize(
    ('name', 'value', 'told'),
    [
        ('BIGSSL_COORDINATOR', 'host0', 'must be host:port'),
        ('BIGSSL_COORDINATOR', 'host0:70000', 'must be host:port'),
        ('BIGSSL_NUM_PROCESSES', 'four', "is 'four'; it must be a whole number"),
        ('BIGSSL_PROCESS_ID', '4', 'ids of n processes are 0 to n - 1'),
    ],
)
def test_values_that_cannot_be_are_refused(name, value, told):
    with pytest.raises(UserError, match=told):
        launch_of({**EXPLICIT, name: value})


@pytest.mark.parametrize(
    ('environment', 'machine', 'method'),
    [
        (SLURM, {}, 'slurm'),
        ({'OMPI_MCA_orte_hnp_uri': '1.0;tcp://h:1', 'OMPI_COMM_WORLD_SIZE': '2'}, {}, 'ompi'),
        (GKE, {'tpu': True}, 'gketpu'),
        ({'TPU_WORKER_HOSTNAMES': 'w', 'MEGASCALE_NUM_SLICES': '2'}, {'tpu': True}, 'gketpu'),
        ({}, {'tpu': True, 'product': 'Google Compute Engine'}, 'gcetpu'),
        (INDEXED, {'kubernetes': True}, 'k8s'),
    ],
)
def test_a_cluster_shows_itself(environment, machine, method):
    assert launch_of(environment, **machine) == Launch(method)


@pytest.mark.parametrize(
    ('environment', 'machine'),
    [
        ({}, {}),
        ({'SLURM_JOB_ID': '71', 'SLURM_NTASKS': '8'}, {}),  # a job script, not a step of srun
        ({**SLURM, 'SLURM_NTASKS': '1'}, {}),
        ({**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}, {}),
        (GKE, {}),  # the variables of a pod, and no TPU in it
        ({**GKE, 'JAX_PLATFORMS': 'cpu'}, {'tpu': True}),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, {'tpu': True, 'product': 'Google'}),
        ({}, {'tpu': True, 'product': 'ThinkPad'}),  # another chip behind /dev/vfio
        ({}, {'product': 'Google Compute Engine'}),  # a virtual machine without a TPU
        ({'TPU_SKIP_MDS_QUERY': '1'}, {'tpu': True, 'product': 'Google Compute Engine'}),
        (INDEXED, {}),
    ],
)
def test_without_evidence_it_is_a_single_process(environment, machine):
    assert launch_of(environment, **machine) == Launch()


def test_one_of_several_pods_does_not_run_the_whole_alone():
    with pytest.raises(UserError, match=r'JOB_COMPLETION_INDEX is 3.*BIGSSL_COORDINATOR'):
        launch_of({**INDEXED, 'JOB_COMPLETION_INDEX': '3'})


def test_a_single_process_agrees_with_itself_and_waits_for_nobody():
    assert distributed.is_primary()
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    distributed.barrier('nobody', timeout_seconds=0.0)
    assert distributed.gather('name', {'a': 1}) == [{'a': 1}]
    assert distributed.from_primary('name', 'value') == 'value'
    distributed.finish()
    distributed.leave(ValueError(), 1, '')  # and is not ended by what would end several


class Device:
    """A device of some process, as far as a mesh and its shardings look at it."""

    def __init__(self, number: int, process: int):
        self.id, self.process_index, self.platform = number, process, 'cpu'
        self.device_kind, self.client = 'made up', jax.devices()[0].client


def slices(monkeypatch, processes, **sizes):
    """(index, number) of every process, on a mesh whose devices belong to `processes`, in order."""
    from bigssl_jax.parallel import MESH_AXES

    devices = np.asarray([Device(i, p) for i, p in enumerate(processes)], object)
    mesh = Mesh(devices.reshape([sizes.get(name, 1) for name in MESH_AXES]), MESH_AXES)
    found = []
    for process in sorted(set(processes)):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        found.append(batch_slice(mesh))
    return found


def test_every_process_reads_the_rows_of_its_devices(monkeypatch):
    four = [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert slices(monkeypatch, [0, 0, 1, 1, 2, 2, 3, 3], data=8) == four
    assert slices(monkeypatch, [0, 0, 1, 1, 2, 2, 3, 3], data=4, fsdp=2) == four
    assert slices(monkeypatch, [0, 0, 1, 1, 2, 2, 3, 3], data=2, fsdp=2, tensor=2) == four
    # Not in the order of the processes, not side by side: slices in the order of their rows.
    assert slices(monkeypatch, [1, 1, 0, 0], data=4) == [(1, 2), (0, 2)]
    assert slices(monkeypatch, [0, 1, 0, 1], data=4) == [(0, 2), (1, 2)]


def test_processes_that_share_a_tensor_axis_read_the_same_rows(monkeypatch):
    pairs = [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert slices(monkeypatch, [0, 1, 2, 3], data=2, tensor=2) == pairs
    assert slices(monkeypatch, [0, 0, 1, 1], tensor=4) == [(0, 1), (0, 1)]


@pytest.mark.parametrize('processes', [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
def test_rows_that_overlap_in_part_or_are_dealt_unevenly_are_refused(monkeypatch, processes):
    with pytest.raises(UserError, match='overlap in part'):
        slices(monkeypatch, processes, data=3, tensor=2)
