"""The whole recipe on tone speech: it learns, says what it made, and never does work twice."""

import copy
import json
import pathlib
import shutil

import numpy as np
import pytest

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.parallel.fingerprint import fingerprint
from bigssl_jax.stages import artefacts, training_stage
from bigssl_jax.stages.model import load_model
from bigssl_jax.stages.recipe import run_recipe
from bigssl_jax.stages.transcribe import transcribe_command

HERE = pathlib.Path(__file__).parent
STAGES = ('prepare', 'supervised', 'pretrain', 'teacher', 'labels', 'student', 'evaluate')
MADE_FROM = {
    'prepare': set(),
    'supervised': {'prepare'},
    'pretrain': {'prepare'},
    'teacher': {'prepare', 'pretrain'},
    'labels': {'prepare', 'teacher'},
    'student': {'prepare', 'pretrain', 'labels'},
    'evaluate': {'prepare', 'supervised', 'teacher', 'student'},
}
REWRITTEN = {'config.json', 'report.html'}  # by every call, with equal content


@pytest.fixture
def config(recipe):
    """The tone experiment, to be changed at will."""
    return config_lib.load(f'{HERE / "tone_experiment.py"}:{recipe.manifest}')


def contents(workdir: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Time of change and hash of every file of a workdir."""
    return {
        str(path.relative_to(workdir)): (path.stat().st_mtime_ns, artefacts.file_hash(path))
        for path in workdir.rglob('*')
        if path.is_file()
    }


def scores(finished) -> dict:
    return json.loads((finished.workdir / 'evaluate' / 'scores.json').read_text())['test']


def test_every_stage_records_what_it_made_and_from_what(finished):
    assert set(finished.done) == set(STAGES)
    for name, done in finished.done.items():
        assert done['stage'] == name
        assert done['outputs'], name
        expected = {up: artefacts.output_hash(finished.done[up]) for up in MADE_FROM[name]}
        assert done['inputs'] == expected, name


def test_recorded_hashes_are_those_of_the_files(finished):
    for name in ('supervised', 'pretrain', 'teacher', 'student'):
        model = load_model(finished.workdir / name)
        recorded = finished.done[name]['outputs']['model']['hash']
        assert model.hash == fingerprint(model.read(model.shapes())) == recorded
    hypotheses = finished.workdir / 'evaluate' / 'hypotheses-test.jsonl'
    recorded = finished.done['evaluate']['outputs'][hypotheses.name]
    assert artefacts.file_hash(hypotheses) == recorded


def test_the_student_keeps_nine_tenths_of_the_labels_and_scores_every_test_line(finished):
    labels = finished.done['labels']['results']
    sizes = finished.done['prepare']['results']['selections']
    assert (
        labels['utterances'] == sizes['rest']['utterances'] == 140 - sizes['labelled']['utterances']
    )
    assert 1 <= sum(step['removed_rows'] for step in labels['filter']) <= labels['utterances'] // 5
    lines = (finished.workdir / 'evaluate' / 'hypotheses-test.jsonl').read_text().splitlines()
    models = [json.loads(line)['model'] for line in lines]
    assert {name: models.count(name) for name in models} == dict.fromkeys(scores(finished), 12)


def test_error_on_unheard_speakers_falls_far_below_one_hundred_percent(finished):
    by_model = scores(finished)
    for name in ('supervised', 'teacher', 'student'):
        assert by_model[name]['cer']['value'] < 0.4
    log = (finished.workdir / 'supervised' / 'metrics.jsonl').read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in log]
    assert losses[-1] < 0.5 * losses[0]


def test_pre_training_learns_codes_that_did_not_collapse(finished):
    log = (finished.workdir / 'pretrain' / 'metrics.jsonl').read_text().splitlines()
    first, last = json.loads(log[0]), json.loads(log[-1])
    assert last['best_rq/loss'] < first['best_rq/loss']
    assert last['best_rq/code_perplexity'] > 5


def test_the_report_and_the_table_name_every_model(finished):
    page = (finished.workdir / 'report.html').read_text()
    for name in ('supervised', 'teacher', 'student'):
        assert name in page
        assert name in finished.out
    assert finished.out.count('report.html') == finished.out.count('test set') == 1


def test_a_second_run_does_nothing_and_says_so(finished, config, capsys):
    before = contents(finished.workdir)
    result = run_recipe(config, finished.workdir)
    assert result['ran'] == []
    assert 'all 7 stages' in capsys.readouterr().out
    after = contents(finished.workdir)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= REWRITTEN
    assert before['config.json'][1] == after['config.json'][1]


def test_a_changed_config_is_refused_by_field_and_damages_nothing(finished, config):
    before = contents(finished.workdir)
    config.stages['teacher']['steps'] = 101
    with pytest.raises(ConfigError, match=r'fields\.steps: 100 -> 101.*--workdir'):
        run_recipe(config, finished.workdir)
    config.stages['teacher']['steps'] = 100
    config.seed = 4
    with pytest.raises(ConfigError, match=r'shared\.seed: 3 -> 4'):
        run_recipe(config, finished.workdir, stages=['evaluate'])
    assert contents(finished.workdir) == before


def test_a_stage_on_its_own_needs_its_inputs(finished, config, tmp_path):
    with pytest.raises(ConfigError, match=r"supervised: stage 'prepare' is not finished"):
        run_recipe(config, tmp_path / 'new', stages=['supervised'])
    assert not (tmp_path / 'new' / 'supervised').exists()
    shutil.copytree(finished.workdir / 'prepare', tmp_path / 'half' / 'prepare')
    with pytest.raises(ConfigError, match=r"labels: stage 'teacher' is not finished"):
        run_recipe(config, tmp_path / 'half', stages=['labels'])
    with pytest.raises(ConfigError, match="did you mean 'teacher'"):
        run_recipe(config, tmp_path / 'new', stages=['techer'])


def test_a_damaged_model_is_noticed(finished, tmp_path):
    model = shutil.copytree(finished.workdir / 'teacher' / 'model', tmp_path / 'model')
    info = json.loads((model / 'model.json').read_text())
    (model / 'model.json').write_text(json.dumps({**info, 'hash': '0' * 64}))
    with pytest.raises(UserError, match='damaged'):
        load_model(model)


def test_transcribe_gives_text_words_with_times_and_an_error_line(
    finished, recipe, tmp_path, capsys
):
    truth = {line['id']: line for line in map(json.loads, recipe.manifest.open())}
    chosen = [recipe.manifest.parent / truth[name]['audio'] for name in ('test-00', 'test-01')]
    broken = tmp_path / 'broken.wav'
    broken.write_bytes(b'RIFF, but not really')
    output = tmp_path / 'out.jsonl'
    summary = transcribe_command(
        str(finished.workdir / 'supervised'), [str(p) for p in (*chosen, broken)], str(output)
    )
    assert (summary['files'], summary['failed']) == (3, 1)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line['id'] for line in lines] == [str(p) for p in (*chosen, broken)]
    scored = (finished.workdir / 'evaluate' / 'hypotheses-test.jsonl').read_text().splitlines()
    heard = {(x['model'], x['id']): x['text'] for x in map(json.loads, scored)}
    for line, name in zip(lines, ('test-00', 'test-01'), strict=False):
        assert line['text'] == heard['supervised', name]
        assert ' '.join(word['text'] for word in line['words']) == line['text']
        times = [t for word in line['words'] for t in (word['start'], word['end'])]
        assert np.all(np.diff(times) >= 0)
        assert 0 <= times[0] and times[-1] <= line['seconds'] + 0.04
        assert 0 < line['confidence'] <= 1
    assert 'text' not in lines[2]
    assert lines[2]['error']
    assert str(broken) in capsys.readouterr().err


def test_transcribe_without_a_transcript_head_or_a_readable_file_is_a_user_error(
    finished, tmp_path
):
    (tmp_path / 'a.wav').write_bytes(b'no audio')
    with pytest.raises(UserError, match='no transcript head'):
        transcribe_command(str(finished.workdir / 'pretrain'), [str(tmp_path / 'a.wav')])
    with pytest.raises(UserError, match='none of the files'):
        transcribe_command(str(finished.workdir / 'teacher'), [str(tmp_path / 'a.wav')])


def test_training_goes_on_with_what_has_changed_where_that_is_accepted(
    finished, config, tmp_path, monkeypatch
):
    for name in ('prepare', 'corpora', 'tokenizer'):
        shutil.copytree(finished.workdir / name, tmp_path / name)
    stages, fields = ['prepare', 'supervised'], config['stages']['supervised']
    fields['steps'], fields['log_every'], fields['eval_every'] = 4, 1, 0
    with monkeypatch.context() as patch:
        patch.setattr(training_stage, 'save_model', lambda *arguments: pytest.fail('stopped here'))
        with pytest.raises(pytest.fail.Exception, match='stopped here'):
            run_recipe(config, tmp_path, stages)
    before, config = config, copy.deepcopy(config)
    fields = config['stages']['supervised']
    fields['steps'] = 7
    fields['streams']['mix']['batch_seconds'] *= 2
    with pytest.raises(ConfigError, match='made by another config .*steps: 4 -> 7.*batch_seconds'):
        run_recipe(config, tmp_path, stages)
    with pytest.raises(ConfigError, match='--accept prepare: allowed .* that train: supervised'):
        run_recipe(config, tmp_path, stages, accept=['prepare'])
    assert run_recipe(config, tmp_path, stages, accept=['supervised'])['ran'] == ['supervised']
    lines = (tmp_path / 'supervised' / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    notes = (tmp_path / 'supervised' / 'accepted.jsonl').read_text().splitlines()
    fields_noted, *checkpoints_noted = map(json.loads, notes)
    assert any('batch_seconds' in field for field in fields_noted['changed'])
    assert checkpoints_noted[0]['step'] == 4
    assert any('stream of ctc' in field for field in checkpoints_noted[0]['changed'])
    assert run_recipe(config, tmp_path, stages)['ran'] == []
    with pytest.raises(ConfigError, match='supervised is finished; delete it'):
        run_recipe(before, tmp_path, stages, accept=['supervised'])


def test_a_finished_stage_whose_input_was_made_anew_is_refused(finished, recipe, config, tmp_path):
    for name in ('prepare', 'supervised'):
        (tmp_path / name).mkdir()
        for file in ('stage.json', 'done.json'):
            shutil.copyfile(finished.workdir / name / file, tmp_path / name / file)
    assert run_recipe(config, tmp_path, stages=['prepare', 'supervised'])['ran'] == []
    path = tmp_path / 'prepare' / 'done.json'
    done = json.loads(path.read_text())
    path.write_text(json.dumps({**done, 'outputs': {**done['outputs'], 'statistics': 'another'}}))
    with pytest.raises(ConfigError, match=r"supervised was made from another 'prepare'"):
        run_recipe(config, tmp_path, stages=['prepare', 'supervised'])
