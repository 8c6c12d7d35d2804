"""The JobSet against its published schema, and its words against how Kubernetes reads them.

The schema is the OpenAPI document of JobSet v1alpha2 and Kubernetes' Job and Pod, as the package
kubeflow-trainer-api ships it (models generated from it).  What an OpenAPI schema cannot say is
checked here, each with its source.
"""

import copy
import json
import pathlib
import re

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

GOLDEN = pathlib.Path(__file__).parent / 'golden'
NAMES = sorted(path.stem for path in GOLDEN.glob('gke*.txt'))


def manifest(name: str) -> dict:
    text = (GOLDEN / f'{name}.txt').read_text()
    return yaml.safe_load(re.search(r"<<'MANIFEST'\n(.*)\nMANIFEST\n", text, re.DOTALL)[1])


def read_back(value: dict) -> dict:
    """What the schema's models keep of a manifest: types are checked, unknown fields are lost."""
    return json.loads(json.dumps(JobsetV1alpha2JobSet.from_dict(copy.deepcopy(value)).to_dict()))


def without_empty(value):
    """Without absent and empty fields, which the models add."""
    if isinstance(value, dict):
        cleaned = {key: without_empty(item) for key, item in value.items()}
        return {key: item for key, item in cleaned.items() if item not in (None, {}, [])}
    if isinstance(value, list):
        return [without_empty(item) for item in value]
    return value


@pytest.mark.parametrize('name', NAMES)
def test_the_schema_accepts_every_field(name):
    written = manifest(name)
    assert without_empty(read_back(written)) == without_empty(written)


@pytest.mark.parametrize(
    'path, value',
    [
        (['spec', 'replicatedJobs', 0, 'replicas'], 'two'),
        (['spec', 'failurePolicy', 'maxRestart'], 3),
        (['spec', 'replicatedJobs', 0, 'template', 'spec', 'completions'], '4'),
        (
            ['spec', 'replicatedJobs', 0, 'template', 'spec', 'template', 'spec', 'nodeSelectr'],
            {'a': 'b'},
        ),
    ],
)
def test_the_schema_refuses_mistakes(path, value):
    """The check above can fail: a wrong type raises, a mistyped field is lost."""
    wrong = manifest('gke')
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        kept = read_back(wrong)
    except (ValueError, TypeError):
        return
    assert without_empty(kept) != without_empty(wrong)


@pytest.mark.parametrize('name', NAMES)
def test_what_the_schema_cannot_say(name):
    written = manifest(name)
    # github.com/kubernetes-sigs/jobset/blob/main/config/components/crd/bases (enumerations)
    assert (written['apiVersion'], written['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    [rule] = written['spec']['failurePolicy']['rules']
    assert rule['action'] in {'FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts'}
    assert re.fullmatch(r'[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?', rule['name'])
    # kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy: needs Never, and
    # the rule's reason is the one that the JobSet looks for
    [job] = written['spec']['replicatedJobs']
    spec = job['template']['spec']
    pod = spec['template']['spec']
    assert pod['restartPolicy'] == 'Never'
    assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
    [failure] = spec['podFailurePolicy']['rules']
    assert failure['onExitCodes']['containerName'] == pod['containers'][0]['name']
    assert failure['onExitCodes']['values'] == [2]
    assert spec['completions'] == spec['parallelism']
    # cloud.google.com/kubernetes-engine/docs/how-to/tpus: all chips of a host, as a limit
    chips = 1
    for side in pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'):
        chips *= int(side)
    limits = pod['containers'][0]['resources']['limits']
    assert chips == limits['google.com/tpu'] * spec['completions']
    # A pod is called SET-slice-REPLICA-POD: a host name has at most 63 characters.
    longest = 'x' * 40 + f'-{job["name"]}-{job["replicas"]}-{spec["completions"]}-abcde'
    assert len(longest) <= 63
    # cloud.google.com/kubernetes-engine/docs/how-to/cloud-storage-fuse-csi-driver-setup
    volumes = pod.get('volumes', [])
    annotations = spec['template']['metadata'].get('annotations', {})
    assert bool(volumes) == (annotations.get('gke-gcsfuse/volumes') == 'true')


def expanded(text: str) -> str:
    """How Kubernetes reads a word: $(NAME) is replaced when NAME is known, $$ is one dollar."""
    return re.sub(
        r'\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)',
        lambda match: '$' if match[0] == '$$' else f'<value of {match[1]}>',
        text,
    )


def test_words_arrive_as_they_were_given():
    pod = manifest('gke')['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
    words = [expanded(word) for word in pod['containers'][0]['command']]
    assert words[-2:] == [
        '--config.name=it\'s "50%" $(date) `id` $HOME \\ *',
        '--config.note=two\nlines; & | #',
    ]
    pod = manifest('gke_slices')['spec']['replicatedJobs'][0]['template']['spec']['template'][
        'spec'
    ]
    values = {item['name']: expanded(item['value']) for item in pod['containers'][0]['env']}
    assert values == {'A': '$(B) "q"', 'EMPTY': ''}


def test_a_control_character_is_refused(world):
    message = world.refused(
        *['gke.sh', 'run', '--name', 'pod', '--topology', 'v5e-16', '--image', 'i', '--dry-run'],
        *['--', 'echo', 'a\x07'],
    )
    assert 'control character' in message
