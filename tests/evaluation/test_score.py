"""`bigssl score`: what it prints and returns, and one clear line for every bad input."""

import json

import pytest

from bigssl_jax.config import UserError
from bigssl_jax.evaluation import paired_test, wer
from bigssl_jax.evaluation.score import score_command


def write(path, lines):
    text = ''.join((x if isinstance(x, str) else json.dumps(x)) + '\n' for x in lines)
    path.write_text(text)
    return path


def texts(path, **by_id):
    return write(path, [{'id': name, 'text': text} for name, text in by_id.items()])


@pytest.fixture
def references(tmp_path):
    return write(
        tmp_path / 'references.jsonl',
        [
            {'id': 'u1', 'text': 'Hello there', 'speaker': 'anna'},
            {'id': 'u2', 'text': 'over the river', 'speaker': 'bert'},
            {'id': 'u3', 'text': '', 'speaker': 'anna'},
        ],
    )


def test_scores_in_any_order_of_lines(tmp_path, references, capsys):
    first = texts(tmp_path / 'a.jsonl', u3='', u2='over a river', u1='hello there')
    second = texts(tmp_path / 'b.jsonl', u1='hello there', u2='over the river', u3='ghost word')
    result = score_command(references, first, second, normalise=str.lower, worst=2)
    truth, speakers = ['hello there', 'over the river', ''], ['anna', 'bert', 'anna']
    system_a, system_b = ['hello there', 'over a river', ''], [*truth[:2], 'ghost word']
    assert result['systems'][0]['wer'] == wer(truth, system_a, speakers).to_json()
    assert result['systems'][1]['wer'] == wer(truth, system_b, speakers).to_json()
    assert result['paired']['wer'] == paired_test(truth, system_a, system_b, speakers).to_json()
    assert [item['id'] for item in result['worst']] == ['u2']
    assert ['substitute', 'the', 'a'] in result['worst'][0]['alignment']
    json.dumps(result, allow_nan=False)
    printed = capsys.readouterr().out
    assert '20.0 %' in printed and '40.0 %' in printed
    assert 'REF:  over THE river' in printed
    assert 'bootstrap over 2 speakers' in printed


def test_one_system_has_no_paired_test(tmp_path, references):
    only = texts(tmp_path / 'a.jsonl', u1='Hello there', u2='over the river', u3='')
    result = score_command(references, only)
    assert result['paired'] is None and result['systems'][0]['wer']['value'] == 0


def test_silence_only_is_scored(tmp_path, capsys):
    truth, said = texts(tmp_path / 'r', u1='', u2=''), texts(tmp_path / 'h', u1='x', u2='')
    result = score_command(truth, said, said)
    assert result['systems'][0]['wer']['value'] is None
    assert result['systems'][0]['wer']['i'] == 1
    assert 'no reference words' in capsys.readouterr().out


def test_markup_in_texts_is_printed_as_it_is(tmp_path, capsys):
    truth = texts(tmp_path / 'r', **{'[red]id[/red]': '[bold]one[/bold] two'})
    said = texts(tmp_path / 'h', **{'[red]id[/red]': '[/] two'})
    score_command(truth, said, worst=1)
    printed = capsys.readouterr().out
    assert '[red]id[/red]: 1 errors' in printed and '[BOLD]ONE[/BOLD]' in printed


def test_line_separators_inside_a_text_do_not_split_it(tmp_path):
    path = tmp_path / 'r.jsonl'
    path.write_text(json.dumps({'id': 'u1', 'text': 'a\u2028b'}, ensure_ascii=False) + '\n')
    assert score_command(path, path)['systems'][0]['wer']['value'] == 0


GOOD = {'id': 'u1', 'text': 'x'}


@pytest.mark.parametrize(
    'lines, message',
    [
        ([], r'h\.jsonl: no lines'),
        (['', ' '], r'h\.jsonl: no lines'),
        ([GOOD, '{"id": '], r'h\.jsonl:2: not JSON'),
        (['[1]'], r'h\.jsonl:1: .* is no JSON object'),
        ([{'id': 'u1'}], r"h\.jsonl:1: no field 'text'"),
        ([{'id': 'u1', 'error': 'a.wav: empty'}], r"h\.jsonl:1: 'u1' was not .* \(a\.wav: empty\)"),
        ([{'text': 'x'}], r"h\.jsonl:1: no field 'id'"),
        ([{'id': 'u1', 'text': None}], r'h\.jsonl:1: text is None'),
        ([{'id': ['u1'], 'text': 'x'}], r'h\.jsonl:1: id is '),
        ([GOOD, '', GOOD], r"h\.jsonl:3: id 'u1' stands in line 1"),
        ([GOOD], r"h\.jsonl: 2 of 3 ids of .* have no hypothesis \('u2', 'u3'\)"),
    ],
)
def test_bad_hypotheses_name_file_and_line(tmp_path, references, lines, message):
    path = write(tmp_path / 'h.jsonl', lines)
    with pytest.raises(UserError, match=message) as caught:
        score_command(references, path)
    assert '\n' not in str(caught.value)


def test_extra_ids_are_refused(tmp_path, references):
    path = texts(tmp_path / 'h.jsonl', u1='', u2='', u3='', u4='', u5='')
    with pytest.raises(UserError, match=r"h\.jsonl:4: 2 ids are not in .* \('u4', 'u5'\)"):
        score_command(references, path)


def test_missing_and_binary_files_are_refused(tmp_path, references):
    with pytest.raises(UserError, match='No such file'):
        score_command(references, tmp_path / 'none.jsonl')
    with pytest.raises(UserError, match='directory'):
        score_command(references, tmp_path)
    (tmp_path / 'audio.wav').write_bytes(b'RIFF\xff\xfe\x00')
    with pytest.raises(UserError, match='not UTF-8'):
        score_command(references, tmp_path / 'audio.wav')


def test_bad_second_system_is_named(tmp_path, references):
    first = texts(tmp_path / 'a.jsonl', u1='', u2='', u3='')
    second = texts(tmp_path / 'b.jsonl', u1='', u2='')
    with pytest.raises(UserError, match=r'b\.jsonl: 1 of 3'):
        score_command(references, first, second)
