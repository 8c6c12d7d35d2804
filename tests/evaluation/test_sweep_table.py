"""Results of many runs in one table, against made-up workdirs."""

import csv
import io
import json
import math

import pytest

from bigssl_jax.config import UserError
from bigssl_jax.evaluation.sweep_table import (
    Metric,
    Row,
    check_metrics,
    default_metric,
    differing_fields,
    metrics_of,
    parse_metric,
    print_sweep_table,
    sort_rows,
    to_csv,
)
from bigssl_jax.evaluation.workdir import read_run


def row(name: str, state: str = 'done', values=None, metrics=None, intervals=None) -> Row:
    values = values or {}
    return Row(name, state, values, values, metrics or {}, intervals or {}, 61.5)


def test_metrics_are_the_scores_and_numbers_on_disk(finished_run):
    metrics, intervals = metrics_of(read_run(finished_run))
    scores = json.loads((finished_run / 'test' / 'scores.json').read_text())
    for set_name, models in scores.items():
        for model, score in models.items():
            for kind in ('wer', 'cer'):
                name = f'{set_name}.{model}.{kind}'
                assert metrics[name] == score[kind]['value']
                assert intervals[name] == (score[kind]['low'], score[kind]['high'])
    lines = (finished_run / 'pretrain' / 'metrics.jsonl').read_text().splitlines()
    last = json.loads(lines[-2])  # the very last was cut short
    assert metrics['pretrain.best_rq/loss'] == last['best_rq/loss']
    assert 'pretrain.step' not in metrics
    assert not any(name.startswith('prepare') for name in metrics)


def test_an_unfinished_stage_has_no_result(finished_run):
    (finished_run / 'test' / 'done.json').unlink()
    (finished_run / 'student' / 'done.json').unlink()
    metrics, intervals = metrics_of(read_run(finished_run))
    assert intervals == {}
    assert not any(name.startswith('student.') for name in metrics)
    assert 'pretrain.loss' in metrics


def test_two_stages_that_score_the_same_carry_their_names(finished_run):
    info = json.loads((finished_run / 'config.json').read_text())
    info['config']['stages']['again'] = info['config']['stages']['test']
    info['config']['recipe'].append('again')
    (finished_run / 'config.json').write_text(json.dumps(info))
    (finished_run / 'again').mkdir()
    for name in ('done.json', 'scores.json'):
        text = (finished_run / 'test' / name).read_text()
        (finished_run / 'again' / name).write_text(text)
    metrics, _ = metrics_of(read_run(finished_run))
    assert 'ast_en.student.wer' not in metrics
    assert metrics['again.ast_en.student.wer'] == metrics['test.ast_en.student.wer']


def test_the_default_metric_is_the_last_model_on_the_largest_set(finished_run, half_run):
    assert default_metric(read_run(finished_run)) == 'queen_test.student.wer'
    assert default_metric(read_run(half_run)).endswith('.loss')


def test_fields_that_differ_are_found_by_comparing_all_leaves():
    configs = [
        {'a': {'b': 1, 'c': (1, 2)}, 'd': None},
        {'a': {'b': 1, 'c': [1, 2]}, 'd': 3},
        {'a': {'b': 1, 'c': (1, 3)}, 'd': 3, 'e': {'f': 0}},
    ]
    assert differing_fields(configs) == [
        {'a.c': (1, 2), 'd': None, 'e.f': None},
        {'a.c': [1, 2], 'd': 3, 'e.f': None},
        {'a.c': (1, 3), 'd': 3, 'e.f': 0},
    ]
    assert differing_fields([{'a': 1}]) == [{}]


def test_rows_without_the_metric_come_last():
    rows = [row('0'), row('1', metrics={'m': 2.0}), row('2', metrics={'m': math.nan}),
            row('3', metrics={'m': -1.0}), row('4', metrics={'n': 0.0})]  # fmt: skip
    assert [r.name for r in sort_rows(rows, Metric('m'))] == ['3', '1', '0', '2', '4']
    assert [r.name for r in sort_rows(rows, Metric('m', highest=True))] == ['1', '3', '0', '2', '4']


def test_metrics_are_named_with_their_order():
    assert parse_metric('a.b.wer') == Metric('a.b.wer')
    assert parse_metric('pretrain.best_rq/loss:min') == Metric('pretrain.best_rq/loss')
    assert parse_metric('x:max') == Metric('x', highest=True)
    with pytest.raises(UserError, match='after the colon comes min or max'):
        parse_metric('x:up')


def test_an_unknown_metric_names_the_nearest():
    rows = [row('0'), row('1', metrics={'test.student.wer': 0.5})]
    check_metrics(rows, ['test.student.wer'])
    check_metrics([row('0')], ['anything'])
    with pytest.raises(UserError, match="did you mean 'test.student.wer'"):
        check_metrics(rows, ['test.studnt.wer'])
    with pytest.raises(UserError, match='there are: test.student.wer'):
        check_metrics(rows, ['zzz'])


def test_the_csv_is_read_back_by_python():
    rows = [
        row('000-a', values={'p': 1e-3, 'q': 'x, "y"\nz'}, metrics={'m': 0.25, 'n': 3},
            intervals={'m': (0.2, 0.3)}),
        row('001-b', 'failed', values={'p': None}),
    ]  # fmt: skip
    first, second = csv.DictReader(io.StringIO(to_csv(rows)))
    assert first == {'run': '000-a', 'state': 'done', 'seconds': '61.5', 'p': '0.001',
                     'q': 'x, "y"\nz', 'm': '0.25', 'm.low': '0.2', 'm.high': '0.3',
                     'n': '3'}  # fmt: skip
    assert (second['run'], second['state'], second['p'], second['m']) == ('001-b', 'failed', '', '')


def test_the_table_shows_what_varies_and_the_metric_with_its_interval(capsys):
    rows = [
        row('001-peak_0.001', values={'peak': 1e-3}, metrics={'t.m.wer': 0.123, 'l.loss': 2.5},
            intervals={'t.m.wer': (0.1, 0.15)}),
        row('000-peak_0.002', 'failed', values={'peak': 2e-3}),
    ]  # fmt: skip
    print_sweep_table(rows, ['t.m.wer', 'l.loss'])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ['run', 'peak', 'state', 't.m.wer', 'l.loss']
    assert lines[2] == ['001', '0.001', 'done', '12.3', '%', '(10.0–15.0)', '2.5']
    assert lines[3] == ['000', '0.002', 'failed', '–', '–']
    print_sweep_table([rows[0], row('001-peak_0.5', values={'peak': 0.5})], [])
    shown = capsys.readouterr().out
    assert '001-peak_0.5' in shown
    assert 'state' not in shown
