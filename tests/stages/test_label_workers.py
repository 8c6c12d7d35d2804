"""`bigssl label`: workers that know nothing of each other, and one label set."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from tones import with_teacher

from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.data.label_sets import LabelSet
from bigssl_jax.stages import schema
from bigssl_jax.stages.label import label_command

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def config(tmp_path):
    from bigssl_jax import config as config_lib

    return config_lib.load(f'{HERE / "tone_experiment.py"}:{tmp_path / "manifest.jsonl"}')


def test_a_teacher_that_is_not_finished_is_named(config, tmp_path):
    for stage in (None, 'labels'):
        with pytest.raises(ConfigError, match="labels: stage 'prepare' is not finished; run it"):
            label_command(config, tmp_path / 'run', stage)
    assert not (tmp_path / 'run' / 'labels').exists()


def test_stages_that_are_no_labels_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"--stage 'teacher' is no pseudo_label .* are labels$"):
        label_command(config, tmp_path, 'teacher')
    config.recipe = ('supervised',)
    with pytest.raises(ConfigError, match='has no pseudo_label stage; its stages are supervised'):
        label_command(config, tmp_path, None)


def test_a_teacher_of_another_config_is_refused(config, tmp_path):
    (tmp_path / 'teacher').mkdir()
    identity = schema.identity_of(schema.resolve(config), 'teacher')
    identity['fields']['steps'] = 7
    (tmp_path / 'teacher' / 'stage.json').write_text(json.dumps(identity))
    (tmp_path / 'teacher' / 'done.json').write_text('{}')
    with pytest.raises(UserError, match='made by another config .*steps: 7 -> 100'):
        label_command(config, tmp_path, None)


@pytest.mark.parametrize('field', ['part_hours', 'lease_seconds'])
def test_numbers_must_be_above_zero(config, field):
    config.stages.labels[field] = 0.0
    with pytest.raises(ConfigError, match=f'stages.labels.{field} is 0.0; it must be above 0'):
        schema.resolve(config)


def test_the_lease_is_not_part_of_what_labels_follow_from(config):
    before = schema.identity_of(schema.resolve(config), 'labels')
    config.stages.labels.lease_seconds = 5.0
    assert schema.identity_of(schema.resolve(config), 'labels') == before
    config.stages.labels.part_hours = 2.0
    assert schema.identity_of(schema.resolve(config), 'labels') != before


@pytest.mark.parametrize('value', [-1, 'many'])
def test_the_number_of_posteriors_is_checked(config, value):
    with pytest.raises((ConfigError, TypeError), match='top_k|int'):
        config.stages.labels.top_k = value
        schema.resolve(config)


def test_a_transducer_has_no_posteriors_of_frames(config):
    config.stages.labels.top_k = 4
    schema.resolve(config)
    config.stages.teacher.objectives = {'hat': {'objective': 'hat', 'stream': 'mix'}}
    with pytest.raises(ConfigError, match=r"labels.top_k is 4, .* 'teacher' is a transducer"):
        schema.resolve(config)


@pytest.mark.slow
def test_posteriors_are_those_that_greedy_decoding_heard(recipe, finished, tmp_path):
    workdir = with_teacher(finished, tmp_path / 'run')
    stages = '--stages', 'labels', '--config.stages.labels.top_k=4'
    ended = recipe.run(workdir, *stages)
    assert ended.returncode == 0, ended.stderr
    labels = LabelSet.open(workdir / 'labels' / 'labels')
    table = labels.table(['id', 'tokens', 'score', 'frames']).to_pylist()
    assert len(table) > 20
    mass = []
    for row, (name, ids, log_probs) in zip(table, labels.posteriors(), strict=True):
        assert (row['id'], row['frames'], 4) == (name, *ids.shape)
        best = [key for key, _ in itertools.groupby(ids[:, 0].tolist()) if key != 0]
        assert best == row['tokens']
        path = log_probs[:, 0].astype(np.float64).sum()
        assert path == pytest.approx(row['score'], rel=1e-2, abs=1e-2)
        mass.append(np.exp(log_probs.astype(np.float64)).sum(axis=1))
    result = json.loads((workdir / 'labels' / 'done.json').read_text())['results']['top_k']
    assert result['k'] == 4
    assert result['mass'] == pytest.approx(np.concatenate(mass).mean(), abs=2e-3)
    # The labels are those of a stage without posteriors.
    plain = LabelSet.open(finished.workdir / 'labels' / 'labels').table(['id', 'text'])
    assert labels.table(['id', 'text']).equals(plain)
