"""Made-up manifests: whatever stands in one, a user meets entries or one line with file and line.

    lines of fields, right and wrong  --broken at random places-->  read, prepared

A manifest in order, of audio that is not, ends in quarantine: every entry is a row of the corpus or
a line of quarantine.jsonl, never both, never none.
"""

import contextlib
import io
import json
import math
import os
import re
import tempfile
import wave

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigssl_jax import cli
from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.errors import REASONS, DataError
from bigssl_jax.data.manifest import FIELDS, KNOWN_ELSEWHERE, read_manifest
from bigssl_jax.data.prepare import prepare
from bigssl_jax.data.shards import Options

FEW = dict(derandomize=True, deadline=None, database=None)
MANY = dict(FEW, suppress_health_check=list(HealthCheck))

NUMBERS = st.one_of(
    st.integers(-2, 20),
    st.floats(-1.0, 3.0),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e300, 1e-300, 10**400, 2**64, 16000]),
)
TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from([
        '', ' ', 'a.wav', 'tone.wav', './tone.wav', 'no/../tone.wav', '/dev/null', '/', '..',
        'x' * 5000, 'e\u0301', '\u202ewav', '\u2028', '\x85', 'a\nb', 'a\tb', '\0', '\ud800',
        '\ufeff', '1', 'true', 'nan', 'train', '16000', '-1', '1e999', '.g722', '.mp3',
    ]),
)  # fmt: skip
VALUES = st.one_of(
    TEXT, TEXT, NUMBERS, st.booleans(), st.none(), st.lists(NUMBERS, max_size=2),
    st.dictionaries(TEXT, NUMBERS, max_size=1),
)  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(FIELDS), st.sampled_from(sorted(KNOWN_ELSEWHERE)), st.text(max_size=4)
)
# Mostly in order: three right fields for each that may be anything.
PLAIN = {
    'id': st.sampled_from(['a', 'b', 'ä/1', 'x' * 300]),
    'text': st.sampled_from(['hello', '', 'it\u2019s', '\u05e9\u05dc\u05d5\u05dd']),
    'speaker': st.integers(0, 3),
    'offset': st.sampled_from([0, 0.05, 0.3, 5, 1e12]),
    'duration': st.sampled_from([0.2, 0.1, 1e-9, 10, 1e12]),
    'sample_rate': st.sampled_from([16000, 8000, 44100]),
    'seen': st.booleans(),
}
AUDIO = st.sampled_from(['tone.wav', 'quiet.wav', 'cut.wav', 'noise.bin', 'empty.wav', 'gone.wav'])
GOOD = st.fixed_dictionaries({'audio': AUDIO}, optional=PLAIN)
RECORDS = st.one_of(
    GOOD,
    GOOD,
    st.builds(lambda record, name, value: {**record, name: value}, GOOD, NAMES, VALUES),
    st.dictionaries(NAMES, VALUES, max_size=4),
)
DAMAGE = st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=3)), max_size=3)


def as_lines(records) -> bytes:
    return ''.join(json.dumps(record) + '\n' for record in records).encode()


def as_table(records) -> bytes:
    names = sorted({name for record in records for name in record})
    rows = [names, *([str(record.get(name, '')) for name in names] for record in records)]
    return '\n'.join('\t'.join(row) for row in rows).encode('utf-8', 'surrogatepass')


def damaged(data: bytes, damage) -> bytes:
    """`data` with bytes replaced at places given as fractions of its length."""
    for place, piece in damage:
        start = place * len(data) >> 16
        data = data[:start] + piece + data[start + len(piece) :]
    return data


MANIFESTS = st.tuples(
    st.sampled_from(['m.jsonl', 'm.tsv', 'm.json', 'm.txt']),
    st.lists(RECORDS, max_size=4),
    DAMAGE,
    st.sampled_from([b'', b'\xef\xbb\xbf', b'\n\n', b'\0', b'\xff\xfe']),
)


def write_manifest(folder: str, manifest) -> str:
    name, records, damage, head = manifest
    table = name.endswith(('.tsv', '.txt'))
    path = os.path.join(folder, name)
    with open(path, 'wb') as file:
        file.write(head + damaged((as_table if table else as_lines)(records), damage))
    return path


def check_reading(manifest) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_manifest(folder, manifest)
        try:
            entries = list(read_manifest(path))
        except DataError as error:
            message = str(error)
            assert len(message.splitlines()) == 1 and len(message) < 1000, message
            # File and line, or the whole file where no line is to blame.
            assert re.match(re.escape(path) + r'(:\d+: |: the manifest is empty)', message), message
            return
    assert len({entry.id for entry in entries}) == len(entries) > 0
    for entry in entries:
        assert os.path.isabs(entry.audio) and '\0' not in entry.audio
        assert 0 <= entry.offset < math.inf
        assert entry.duration is None or 0 < entry.duration < math.inf
        json.dumps(entry.__dict__).encode()


@settings(max_examples=150, **FEW)
@given(MANIFESTS)
def test_a_manifest_is_read_or_a_line_is_named(manifest):
    check_reading(manifest)


@pytest.mark.slow
@settings(max_examples=20000, **MANY)
@given(MANIFESTS)
def test_many_manifests(manifest):
    check_reading(manifest)


@pytest.fixture(scope='module')
def sounds(tmp_path_factory):
    """A folder of audio, right and wrong, of the names that manifests use."""
    folder = tmp_path_factory.mktemp('sounds')
    tone = b''.join(
        round(9000 * math.sin(i / 5)).to_bytes(2, 'little', signed=True) for i in range(8000)
    )
    for name, samples in (('tone.wav', tone), ('quiet.wav', bytes(16000)), ('empty.wav', b'')):
        with wave.open(str(folder / name), 'wb') as file:
            file.setparams((1, 2, 16000, 0, 'NONE', ''))
            file.writeframes(samples)
    (folder / 'cut.wav').write_bytes((folder / 'tone.wav').read_bytes()[:9001])
    (folder / 'noise.bin').write_bytes(bytes(range(256)) * 4)
    return str(folder)


def check_preparing(folder: str, manifest) -> None:
    """Whatever a manifest says: a corpus in which every entry is accounted for, or one line."""
    path = write_manifest(folder, manifest)
    with tempfile.TemporaryDirectory() as out:
        options = Options(shard_size=2, max_seconds=20.0)
        try:
            info = prepare(
                path, out, jobs=1, options=options, max_quarantine_fraction=None, progress=False
            )
        except DataError as error:
            assert len(str(error).splitlines()) == 1, str(error)
            assert path in str(error) or out in str(error), str(error)
            return
        with open(os.path.join(out, 'quarantine.jsonl'), encoding='utf-8') as file:
            aside = [json.loads(line) for line in file]
        kept = Corpus.open(out).column('id').to_pylist()
    assert sorted(kept + [item['id'] for item in aside]) == sorted(
        e.id for e in read_manifest(path)
    )
    assert {item['reason'] for item in aside} <= set(REASONS)
    assert info['quarantined'] == len(aside) and info['rows'] == len(kept)


@settings(max_examples=40, **FEW)
@given(MANIFESTS)
def test_every_entry_is_prepared_or_put_aside(sounds, manifest):
    check_preparing(sounds, manifest)


@pytest.mark.slow
@settings(max_examples=4000, **MANY)
@given(MANIFESTS)
def test_every_entry_is_prepared_or_put_aside_many_times(sounds, manifest):
    check_preparing(sounds, manifest)


OPTIONS = ('min-seconds', 'max-seconds', 'max-quarantine', 'shard-size', 'ignore')
WORDS = st.lists(
    st.builds('--{}={}'.format, st.sampled_from(OPTIONS), st.one_of(NUMBERS, TEXT)), max_size=2
)


@settings(max_examples=15, **FEW)
@given(manifest=MANIFESTS, words=WORDS)
def test_the_command_ends_with_one_line(sounds, manifest, words):
    path = write_manifest(sounds, manifest)
    with (
        tempfile.TemporaryDirectory() as out,
        contextlib.redirect_stderr(io.StringIO()) as told,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            code = cli.main(['prepare', '--manifest', path, '--out', out, '--jobs', '1', *words])
        except SystemExit as stopped:  # argparse: a word is no number
            code = stopped.code
    assert code in (0, 2), told.getvalue()
    lines = [line for line in told.getvalue().splitlines() if line.startswith('bigssl')]
    assert len(lines) == (code == 2), told.getvalue()
