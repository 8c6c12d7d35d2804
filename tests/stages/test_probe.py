"""The probe stage after the tone recipe: what it writes, what it says, what it refuses."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError
from bigssl_jax.data.stream import one_pass
from bigssl_jax.evaluation.report import write_report
from bigssl_jax.stages import schema
from bigssl_jax.stages.recipe import run_recipe

HERE = pathlib.Path(__file__).parent
TASK = {'field': 'speaker', 'train': 'labelled', 'dev': 'probe_dev', 'test': 'probe_test'}


@pytest.fixture
def config(recipe):
    """The tone experiment, and at its end a probe for who of five speaks."""
    config = config_lib.load(f'{HERE / "tone_experiment.py"}:{recipe.manifest}').to_dict()
    train = {'corpus': 'tones', 'splits': ('train',)}
    # They follow from the config, so the finished stages must know them.
    config['selections'] |= {
        'probe_dev': {**train, 'exclude': ('labelled',), 'hours': 0.012},
        'probe_test': {**train, 'exclude': ('labelled', 'probe_dev')},
    }
    config['stages']['probe'] = {
        'kind': 'probe', 'models': ('pretrain', 'teacher'), 'tasks': {'who': TASK},
        'regularisation': (0.01, 1.0), 'batch_seconds': 32.0, 'num_buckets': 1,
    }  # fmt: skip
    config['recipe'] = ('supervised', 'pretrain', 'teacher', 'probe')
    return config


def test_layers_are_averaged_in_the_order_of_the_selection_and_probed(
    config, finished, tmp_path, capsys
):
    """The stages before it are those of the finished recipe, taken over as they are."""
    shutil.copytree(finished.workdir, tmp_path, dirs_exist_ok=True)
    resolved = schema.resolve(config)
    for name in ('prepare', 'supervised', 'pretrain', 'teacher'):
        identity = schema.identity_of(resolved, name)
        (tmp_path / name / 'stage.json').write_text(json.dumps(identity))
    folder = str(finished.workdir / 'student')
    config['stages']['probe']['models'] += (folder,)
    assert run_recipe(config, tmp_path)['ran'] == ['probe']
    said = capsys.readouterr().out
    probes = json.loads((tmp_path / 'probe' / 'probes.json').read_text())
    assert set(probes['who']) == {'log_mel', 'pretrain', 'teacher', folder}
    for name, layers in (('log_mel', 1), ('pretrain', 3), ('teacher', 3), (folder, 3)):
        found = probes['who'][name]
        assert len(found['layers']) == layers and found['classes'] == 5
        # Speakers are a factor of every frequency: far from one in five.
        assert found['low'] > found['chance'] > 0.1
        assert f'speaker by {name}: {found["best"]["test"]:.1%} of 5 classes' in said

    rows = one_pass({'sources': {'s': {'selection': {
        'corpus': str(tmp_path / 'corpora' / 'tones'), 'splits': ('train',),
    }, 'labels': None}}}).sources[0]  # fmt: skip
    assert sum(probes['who']['log_mel']['utterances']) == len(rows.column('id'))
    for name in ('log_mel', 'pretrain', 'teacher'):
        values = np.load(tmp_path / 'probe' / 'features' / f'{name}-labelled.npy')
        assert len(values) == probes['who'][name]['utterances'][0]
        assert np.isfinite(values).all() and len(np.unique(values, axis=0)) == len(values)

    page = write_report(tmp_path).read_text()
    assert 'Probes' in page and 'log_mel' in page
    # An interrupted stage computes only what is missing, and finds the same.
    for gone in ('done.json', 'probes.json', 'features/teacher-probe_dev.npy'):
        (tmp_path / 'probe' / gone).unlink()
    kept = tmp_path / 'probe' / 'features' / 'pretrain-labelled.npy'
    before = kept.stat().st_mtime_ns
    assert run_recipe(config, tmp_path)['ran'] == ['probe']
    assert kept.stat().st_mtime_ns == before
    assert json.loads((tmp_path / 'probe' / 'probes.json').read_text()) == probes


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'tasks': {}}, r'stages.probe.tasks is empty'),
        ({'tasks': {'who': {**TASK, 'field': 'speeker'}}}, r'tasks.who.field.*speaker'),
        ({'tasks': {'who': {**TASK, 'dev': 'nowhere'}}}, r"probe.tasks.who.dev is 'nowhere'"),
        ({'tasks': {'who': 'speaker'}}, r"tasks.who is 'speaker'; it must be a group"),
        ({'regularisation': (1.0, 0.1)}, r'regularisation is \(1.0, 0.1\); allowed: positive'),
        ({'models': ('labels',)}, r"needs stage 'labels'"),
    ],
)
def test_bad_fields_are_one_clear_line(config, change, message):
    config['stages']['probe'] |= change
    with pytest.raises(ConfigError, match=message):
        schema.resolve(config)
