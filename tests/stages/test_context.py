"""What a stage asks of its streams follows from mesh, micro-batches and config."""

import pathlib

import jax
import pytest

from bigssl_jax import config as config_lib
from bigssl_jax.parallel import make_mesh
from bigssl_jax.stages import schema
from bigssl_jax.stages.context import Context
from bigssl_jax.training.signals import StopRequest

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def context(tmp_path):
    """The context of a stage of the tone experiment, after a change of its config."""

    def make(stage: str, micro_batches: int = 1, data_dir: str = '') -> Context:
        config = config_lib.load(f'{HERE / "tone_experiment.py"}:manifest.jsonl')
        config.data_dir = data_dir
        config.stages['student']['optimizer']['micro_batches'] = micro_batches
        mesh = make_mesh({'data': 1}, jax.devices()[:1])
        return Context(schema.resolve(config), stage, tmp_path, mesh, StopRequest())

    return make


@pytest.mark.parametrize('pieces', [1, 3])
def test_every_batch_can_be_cut_into_its_micro_batches(context, pieces):
    student = context('student', micro_batches=pieces)
    fields = student.fields['streams']['mix']
    assert student.stream_config(fields)['multiple_of'] == pieces


def test_labels_come_from_text_or_from_the_folder_of_a_stage(context, tmp_path):
    student = context('student')
    sources = student.stream_config(student.fields['streams']['mix'])['sources']
    assert sources['labelled']['labels'] == 'text'
    assert sources['pseudo']['labels'] == str(tmp_path / 'labels' / 'labels')
    pretrain = context('pretrain')
    config = pretrain.stream_config(pretrain.fields['streams']['all'])
    assert config['sources']['all']['labels'] is None
    assert config['tokenizer'] is None


def test_exclusions_are_spelt_out_with_the_folder_of_their_corpus(context, tmp_path):
    rest = context('labels').selection('rest')
    assert rest['corpus'] == str(tmp_path / 'corpora' / 'tones')
    assert rest['exclude'] == (context('labels').selection('labelled'),)
    elsewhere = context('labels', data_dir='/prepared').selection('rest')
    assert elsewhere['corpus'] == '/prepared/tones'


def test_where_prepared_corpora_lie_is_not_part_of_a_stage_s_identity(context):
    assert context('student').identity == context('student', data_dir='/prepared').identity
    assert context('student').identity != context('student', micro_batches=2).identity
