"""`CORPUS=manifest.jsonl make quickstart`: what does not suffice is said within seconds."""

import json
import pathlib

import numpy as np
import pytest
import soundfile

from bigssl_jax import config as config_lib
from bigssl_jax.config import UserError
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.label_sets import LabelWriter
from bigssl_jax.overrides import apply_overrides
from bigssl_jax.stages import prepare as prepare_stage
from bigssl_jax.stages import schema
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.pseudo_label import kept_labels
from bigssl_jax.training.signals import StopRequest

QUICKSTART = pathlib.Path(__file__).parents[2] / 'experiments' / 'quickstart.py'
SECONDS = 0.6


@pytest.fixture
def sizes(tmp_path, monkeypatch):
    """sizes(lines, hours) -> utterances of each selection; line i has the fields `lines[i]`."""
    monkeypatch.setattr(prepare_stage, 'cpu_cores', lambda: 1)
    noise = np.random.default_rng(0).integers(-9000, 9000, int(16000 * SECONDS)).astype(np.int16)

    def sizes(lines: list[dict], hours: float | None = None) -> dict[str, float]:
        for number in range(len(lines)):
            soundfile.write(tmp_path / f'{number}.wav', noise, 16000, subtype='PCM_16')
        manifest = tmp_path / 'speech.jsonl'
        named = [{'audio': f'{n}.wav', **fields} for n, fields in enumerate(lines)]
        manifest.write_text(''.join(json.dumps(line) + '\n' for line in named))
        config = config_lib.load(f'{QUICKSTART}:{manifest}')
        words = [] if hours is None else [('selections.labelled.hours', str(hours))]
        resolved = schema.resolve(apply_overrides(config, words, schema.resolve(config)))
        context = Context(resolved, 'prepare', tmp_path / 'run', None, StopRequest())
        prepare_stage.prepare_corpora(context)
        found = prepare_stage.selection_sizes(context)
        return {name: size['utterances'] for name, size in found.items()}

    return sizes


def test_one_speaker_and_few_transcripts_suffice_for_every_stage(sizes):
    lines = [{'speaker': 'me', **({'text': f'word {n}'} if n % 2 else {})} for n in range(160)]
    found = sizes(lines, hours=0.005)
    assert found['labelled'] == 0.005 * 3600 / SECONDS
    assert found['labelled'] + found['rest'] == found['unlabelled'] > 120
    assert found['dev'] > 0 and found['test'] > 0


def test_too_little_that_is_transcribed_names_the_hours_there_are(sizes):
    with pytest.raises(
        DataError, match=r'selections.labelled: .*hours is 0.167, .* leave 0.0\d+ h'
    ):
        sizes([{'text': f'word {n}'} for n in range(160)])


def test_no_transcripts_at_all_are_told_by_what_is_left(sizes):
    with pytest.raises(DataError, match=r'selections.dev: .* 160 in all, .* 0 with with_text=True'):
        sizes([{}] * 160)


def test_a_split_that_remained_empty_is_named(sizes):
    with pytest.raises(
        DataError, match="selections.dev: .*no utterance has split 'dev'; .*name `sp"
    ):
        sizes([{'text': 'word', 'split': 'train'}] * 20, hours=0.001)


def test_a_teacher_that_writes_nothing_ends_the_run_before_its_student(tmp_path):
    writer = LabelWriter(tmp_path / 'labels', {'teacher': 'a'}, 1)
    columns = {'id': ['a', 'b'], 'text': ['', ''], 'tokens': [[], []], 'score': [0.0, 0.0]}
    writer.write(0, columns | {'confidence': [0.9, 0.8], 'seconds': [1.0, 1.0]})
    labels = writer.finish()
    steps = ({'kind': 'empty'}, {'kind': 'confidence', 'percentile': 10.0})
    with pytest.raises(
        UserError, match=r"leaves none of 2 labels \(2 by 'empty'\); train the teach"
    ):
        kept_labels(labels, steps)
    assert kept_labels(labels, None)['filter'] == []
