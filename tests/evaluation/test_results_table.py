"""The result table of a made-up run."""

import json

import pytest

from bigssl_jax.evaluation.results_table import markdown_table, print_result_table, result_table
from bigssl_jax.evaluation.workdir import WorkdirError, read_lines, read_run


def test_rows_follow_the_sets_and_models_of_the_config(finished_run):
    rows = result_table(finished_run)
    assert rows[0].wer['words'] > rows[3].wer['words']
    assert [row.set for row in rows] == ['queen_test'] * 3 + ['ast_en'] * 3
    assert [row.model for row in rows] == ['supervised', 'pretrained', 'student'] * 2
    for name in ('queen_test', 'ast_en'):
        chosen = [row for row in rows if row.set == name]
        best = min(chosen, key=lambda row: row.wer['value'])
        assert [row.model for row in chosen if row.best] == [best.model]


def test_markdown_has_a_line_per_row(finished_run):
    rows = result_table(finished_run)
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count('|') for line in lines}) == 1
    assert f'{100 * rows[0].wer["value"]:.1f} %' in lines[2]


def test_print_out_fits_80_columns_and_says_what_is_synthetic(finished_run, capsys):
    print_result_table(finished_run)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert 'ast_en is synthetic speech' in printed
    for word in ('queen_test', 'pretrained', 'student against supervised', 'labels: 200 labels'):
        assert word in printed


def test_the_order_of_sets_is_that_of_the_config_whatever_their_names_and_sizes(finished_run):
    path = finished_run / 'config.json'
    written = json.loads(path.read_text())
    written['config']['stages']['test']['sets'] = ['ast_en', 'queen_test']
    path.write_text(json.dumps(written))
    assert [row.set for row in result_table(finished_run)] == ['ast_en'] * 3 + ['queen_test'] * 3


def test_no_word_of_the_quickstart_table_is_folded_at_80_columns(finished_run, capsys, monkeypatch):
    """Its widest cells: rates with intervals above 100 %, four-digit counts."""
    path = finished_run / 'config.json'
    written = json.loads(path.read_text())
    written['config']['stages']['test'] |= {'sets': ['test', 'exam'], 'models': ['supervised']}
    path.write_text(json.dumps(written))
    rate = {'value': 1.1277, 'low': 1.1057, 'high': 1.1545, 'words': 3052}
    score = {'supervised': {'wer': rate, 'cer': rate, 'utterances': 1531}}
    (finished_run / 'test' / 'scores.json').write_text(json.dumps({'exam': score, 'test': score}))
    (finished_run / 'test' / 'comparisons.json').unlink()
    monkeypatch.setenv('COLUMNS', '80')
    print_result_table(finished_run)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    interval = ['112.8', '(110.6–115.5)']
    for name in ('test', 'exam'):
        assert [name, 'supervised', *interval, *interval, '1,531'] in lines


def test_run_without_scores_has_no_rows(half_run, capsys):
    assert print_result_table(half_run) == []
    assert 'no scores yet' in capsys.readouterr().out


def test_stages_know_how_far_they_are(half_run):
    status = {stage.name: stage.status for stage in read_run(half_run).stages}
    assert status['pretrain'] == 'done'
    assert status['supervised'] == 'not finished: step 120 of 400'
    assert status['student'] == 'not started'


def test_only_a_line_cut_short_is_forgiven(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line['step'] for line in read_lines(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(WorkdirError, match=r'metrics\.jsonl:2 is damaged'):
        read_lines(path)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(WorkdirError, match='not the workdir of a run'):
        result_table(tmp_path)
    with pytest.raises(WorkdirError, match='not the workdir of a run'):
        result_table(tmp_path / 'missing')
    (tmp_path / 'config.json').write_text('[]')
    with pytest.raises(WorkdirError, match='no field "config"'):
        result_table(tmp_path)
    (tmp_path / 'config.json').write_text('{"config": ')
    with pytest.raises(WorkdirError, match='damaged'):
        result_table(tmp_path)
