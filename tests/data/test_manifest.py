"""Manifests: what is right is read, what is wrong is named with file, line and field."""

import json

import numpy as np
import pytest

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.manifest import FIELDS, Entry, read_manifest


@pytest.fixture
def write(tmp_path):
    def write_file(content, name='m.jsonl'):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def error_of(path, **kwargs):
    with pytest.raises(DataError) as caught:
        list(read_manifest(path, **kwargs))
    message = str(caught.value)
    assert '\n' not in message
    return message


def test_json_lines_with_all_fields(write, tmp_path):
    record = {
        'id': 'u1', 'audio': 'sub/a.wav', 'text': 'Grüße "you"', 'speaker': 17, 'language': 'de',
        'domain': 'phone', 'group': 'call-3', 'split': 'test', 'seen': True, 'offset': 1.5,
        'duration': 2, 'licence': 'CC0-1.0', 'sample_rate': 11840, 'encoding': '.g722',
    }  # fmt: skip
    assert set(record) == set(FIELDS)
    path = write(json.dumps(record) + '\n\n')
    assert list(read_manifest(path)) == [
        Entry('u1', str(tmp_path / 'sub/a.wav'), 'Grüße "you"', '17', 'de', 'phone', 'call-3',
              'test', True, 1.5, 2.0, 'CC0-1.0', 11840, '.g722')
    ]  # fmt: skip


def test_defaults_relative_paths_and_ids(write, tmp_path):
    path = write(
        '{"audio": "./x/a.flac"}\n{"audio": "/abs/b.mp3", "text": ""}\n'
        '{"audio": "x/a.flac", "offset": 2.5, "duration": null}\n'
    )
    first, second, third = read_manifest(path)
    assert (first.id, first.audio, first.text) == ('x/a', str(tmp_path / 'x/a.flac'), None)
    assert (second.id, second.audio, second.text) == ('/abs/b', '/abs/b.mp3', '')
    assert (third.id, third.duration) == ('x/a@2.500', None)


def test_tsv_equals_json_lines(write):
    tsv = write(
        'audio\ttext\tspeaker\tseen\tduration\r\na.wav\tsaid "hi" to\tanna\ttrue\t1.5\r\n'
        'b.wav\t\t\t\t\n',
        'm.tsv',
    )
    jsonl = write(
        '{"audio": "a.wav", "text": "said \\"hi\\" to", "speaker": "anna", "seen": true, '
        '"duration": 1.5}\n{"audio": "b.wav"}\n'
    )
    assert list(read_manifest(tsv)) == list(read_manifest(jsonl))


def test_a_byte_order_mark_is_no_part_of_the_first_field(write):
    assert next(read_manifest(write(b'\xef\xbb\xbf{"audio": "a.wav"}'))).id == 'a'


@pytest.mark.parametrize(
    ('line', 'field', 'hint'),
    [
        ('{"audio": "a.wav", "txet": "x"}', "'txet'", "'text'"),
        ('{"audio_filepath": "a.wav"}', "'audio_filepath'", "'audio'"),
        ('{"audio": "a.wav", "lang": "en"}', "'lang'", "'language'"),
        ('{"audio": "a.wav", "zzzzzz": 1}', "'zzzzzz'", 'speaker'),
        ('{"text": "no audio"}', "'audio'", 'missing'),
        ('{"audio": ""}', "'audio'", 'missing'),
        ('{"audio": ["a.wav"]}', "'audio'", 'must be text'),
        ('{"audio": "a\\u0000.wav"}', "'audio'", 'characters'),
        ('{"audio": "a.wav", "text": "\\ud800"}', "'text'", 'characters'),
        ('{"audio": "a.wav", "text": {"a": 1}}', "'text'", 'must be text'),
        ('{"audio": "a.wav", "offset": -1}', "'offset'", '0 or more'),
        ('{"audio": "a.wav", "offset": "soon"}', "'offset'", "'soon'"),
        ('{"audio": "a.wav", "duration": 0}', "'duration'", 'more than 0'),
        ('{"audio": "a.wav", "duration": NaN}', "'duration'", 'nan'),
        ('{"audio": "a.wav", "duration": 1e999}', "'duration'", 'inf'),
        ('{"audio": "a.wav", "duration": true}', "'duration'", 'True'),
        ('{"audio": "a.wav", "seen": "maybe"}', "'seen'", 'true or false'),
        ('{"audio": "a.wav", "seen": [1]}', "'seen'", 'true or false'),
        ('{"audio": "a.wav", "sample_rate": 16000.5}', "'sample_rate'", 'whole number'),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_field(write, line, field, hint):
    path = write('{"audio": "good.wav"}\n\n' + line + '\n')
    message = error_of(path)
    assert message.startswith(f'{path}:3: ')
    assert field in message and hint in message


def test_broken_lines(write, tmp_path):
    assert ':2: not JSON' in error_of(write('{"audio": "a.wav"}\n{"audio": '))
    assert ':1: holds list' in error_of(write('["a.wav"]'))
    assert ':1: not UTF-8' in error_of(write(b'{"audio": "\xff.wav"}'))
    assert ':1: not JSON' in error_of(write('[' * 100000))
    assert 'no such manifest' in error_of(str(tmp_path / 'none.jsonl'))
    assert 'cannot be read' in error_of(str(tmp_path))
    assert "'audio' among them" in error_of(write('a.wav\thello\n', 'm.tsv'))
    assert ':2: has 1 columns, the header has 2' in error_of(write('audio\ttext\na.wav\n', 'm.tsv'))
    assert 'named twice' in error_of(write('audio\taudio\n', 'm.tsv'))


def test_empty_and_duplicate(write):
    assert 'empty' in error_of(write(''))
    assert 'empty' in error_of(write('\n  \n'))
    assert 'empty' in error_of(write('audio\ttext\n', 'm.tsv'))
    message = error_of(write('{"audio": "a.wav"}\n{"audio": "b.wav", "id": "a"}\n'))
    assert ":2: id 'a' was used before, at line 1" in message


def test_fields_of_other_tools_can_be_ignored_by_name(write):
    path = write('{"audio": "a.wav", "pnc": 1, "emotion": "x"}\n')
    assert next(read_manifest(path, ignore=('pnc', 'emotion'))).id == 'a'
    assert "'emotion'" in error_of(path, ignore=('pnc',))


def test_damaged_manifests_never_give_another_exception(write):
    rng = np.random.default_rng(0)
    sound = (
        b'{"audio": "a.wav", "text": "x", "offset": 1.5, "seen": true}\n'
        b'{"audio": "b.wav", "speaker": 3, "duration": 2}\n'
    )
    alphabet = b'{}[]":,0123456789eE+-.\\u\0\xff\xc3\t\n truefalsn'
    outcomes = set()
    for name in ('m.jsonl', 'm.tsv'):
        for _ in range(400):
            data = bytearray(sound.replace(b', ', b'\t') if name == 'm.tsv' else sound)
            for _ in range(rng.integers(1, 6)):
                place = rng.integers(len(data))
                data[place : place + rng.integers(2)] = [alphabet[rng.integers(len(alphabet))]]
            try:
                list(read_manifest(write(bytes(data), name)))
                outcomes.add('read')
            except DataError as error:
                assert '\n' not in str(error)
                outcomes.add('refused')
    assert outcomes == {'read', 'refused'}
