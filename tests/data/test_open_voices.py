"""open_voices: packages, splits, and the whole way from package files to entries and TFDS."""

import gzip
import io
import json
import lzma
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow
import pytest
import soundfile

from bigssl_jax.data import open_voices
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.manifest import Entry, read_manifest
from bigssl_jax.data.open_voices import asterisk, build, deb, decode, fetch, splits

RATE = 16000
PROMPTS = """; a comment
agent-loginok: Agent logged in.
dial: Dial 2 now, then press #.
extension: Dial 1234.
letters/at: at [@]
beep: [this is a simple beep tone]
twice: twice: Said once.
"""


def ar_member(name: str, data: bytes) -> bytes:
    header = f'{name:<16}{0:<12}{0:<6}{0:<6}{"100644":<8}{len(data):<10}`\n'.encode()
    assert len(header) == 60
    return header + data + b'\n' * (len(data) % 2)


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name, data in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            archive.addfile(item, io.BytesIO(data))
        link = tarfile.TarInfo('./usr/link')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        archive.addfile(link)
    return buffer.getvalue()


COMPRESSIONS = {
    'xz': lzma.compress,
    'gz': gzip.compress,
    'zst': lambda data: pyarrow.compress(data, codec='zstd', asbytes=True),
}


def make_deb(path: pathlib.Path, files: dict[str, bytes], compression: str = 'xz') -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = COMPRESSIONS[compression](tar(files))
    path.write_bytes(
        b'!<arch>\n'
        + ar_member('debian-binary', b'2.0\n')
        + ar_member('control.tar.gz', gzip.compress(tar({'./control': b'odd'})))
        + ar_member(f'data.tar.{compression}', data)
    )
    return path


def g722(seconds: float) -> bytes:
    """A 440 Hz tone, encoded by PyAV."""
    import av

    wave = np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)
    buffer = io.BytesIO()
    with av.open(buffer, 'w', format='g722') as container:
        stream = container.add_stream('g722', rate=RATE)
        stream.layout = 'mono'
        frame = av.AudioFrame.from_ndarray(
            (wave * 9000).astype(np.int16)[None], format='s16', layout='mono'
        )
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


@pytest.fixture(scope='module')
def deb_dir(tmp_path_factory) -> pathlib.Path:
    """A folder with the two packages of ast_en, tiny."""
    folder = tmp_path_factory.mktemp('debs')
    texts = gzip.compress(PROMPTS.encode())
    make_deb(
        folder / 'asterisk-core-sounds-en_1.0_all.deb',
        {'./usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz': texts},
        'zst',
    )
    sounds = './usr/share/asterisk/sounds/en_US_f_Allison'
    names = ('agent-loginok', 'dial', 'extension', 'letters/at', 'beep', 'twice', 'unlisted')
    make_deb(
        folder / 'asterisk-core-sounds-en-g722_1.0_all.deb',
        {f'{sounds}/{name}.g722': g722(0.5 + 0.1 * i) for i, name in enumerate(names)},
    )
    return folder


# ---------------------------------------------------------------------------- packages


@pytest.mark.parametrize('compression', COMPRESSIONS)
def test_unpack_writes_regular_files_only(tmp_path, compression):
    package = make_deb(tmp_path / 'p_1_all.deb', {'./usr/share/a': b'abc', './b': b''}, compression)
    deb.unpack(package, tmp_path / 'out')
    found = {p.relative_to(tmp_path / 'out').as_posix() for p in (tmp_path / 'out').rglob('*')}
    assert found == {'usr', 'usr/share', 'usr/share/a', 'b'}
    assert (tmp_path / 'out/usr/share/a').read_bytes() == b'abc'


def test_unpack_keeps_within_its_folder(tmp_path):
    package = make_deb(tmp_path / 'p_1_all.deb', {'../evil': b'x', '/evil2': b'x', './ok': b'y'})
    deb.unpack(package, tmp_path / 'deep/out')
    assert [p.name for p in (tmp_path / 'deep/out').rglob('*')] == ['ok']
    assert not list(tmp_path.rglob('evil*'))


@pytest.mark.parametrize('cut', [4, 100, 0.9])
def test_damaged_package_leaves_nothing(tmp_path, cut):
    package = make_deb(tmp_path / 'p_1_all.deb', {'./a': bytes(range(256)) * 50})
    content = package.read_bytes()
    package.write_bytes(content[: cut if isinstance(cut, int) else int(cut * len(content))])
    with pytest.raises(DataError, match='p_1_all.deb'):
        deb.unpack(package, tmp_path / 'out')
    assert [p.name for p in tmp_path.iterdir()] == ['p_1_all.deb']


def test_unpack_agrees_with_dpkg(tmp_path):
    package = make_deb(tmp_path / 'p_1_all.deb', {'./usr/a': b'abc'})
    try:
        subprocess.run(['dpkg-deb', '-c', str(package)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip('no dpkg-deb here')


def test_fetch_from_a_folder_and_then_from_the_cache(tmp_path, deb_dir):
    names = ['asterisk-core-sounds-en']
    first = fetch.fetch(names, tmp_path, deb_dir)
    again = fetch.fetch(names, tmp_path, tmp_path / 'no such folder')
    assert first == again
    assert first[names[0]].name == 'asterisk-core-sounds-en_1.0_all'


def test_fetch_names_the_missing_package(tmp_path):
    with pytest.raises(fetch.FetchError, match=r'holds no festvox-ru_\*.deb.*apt-get download'):
        fetch.fetch(['festvox-ru'], tmp_path, tmp_path)


def test_fetch_without_apt_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(fetch.FetchError, match='no apt-get.*deb_dir'):
        fetch.fetch(['festvox-ru'], tmp_path)


@pytest.mark.parametrize(
    ('stderr', 'advice'),
    [
        ('E: Unable to locate package x', 'apt-get update'),
        ("E: Can't find a source to download version '1' of 'x:all'", "Can't find a source"),
        ("E: Failed to fetch http://m/x.deb  Temporary failure resolving 'm'", 'no network'),
        ('E: Failed to fetch http://m/x.deb  404  Not Found', 'apt-get update'),
        ('E: Failed to fetch http://m/x.deb  Could not connect to m:80', 'no network'),
        ('E: You do not have enough: No space left on device', 'disk is full'),
    ],
)
def test_apt_errors_are_explained(tmp_path, monkeypatch, stderr, advice):
    apt = tmp_path / 'apt-get'
    apt.write_text(f'#!/bin/sh\necho {json.dumps(stderr)} >&2\nexit 100\n')
    apt.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/bin:/usr/bin')
    with pytest.raises(fetch.FetchError, match=advice):
        fetch.fetch(['x'], tmp_path / 'cache')
    assert not list((tmp_path / 'cache').rglob('*.deb'))


# ---------------------------------------------------------------------------- texts and splits


@pytest.mark.parametrize(
    ('text', 'language', 'expected'),
    [
        ('at [@]', 'en', 'at'),
        ('press 1, or 2.', 'en', 'press one, or two.'),
        ('press * or #', 'en', 'press star or pound'),
        ('dial 500', 'en', None),
        ('3D audio', 'en', None),
        ('at least 28.8 kilobit', 'en', None),
        ('premere 1', 'it', None),
        ('duemila... (data)', 'it', None),
        ('Pagado.', 'es', 'Pagado.'),
    ],
)
def test_asterisk_texts(text, language, expected):
    assert asterisk.clean(text, language) == expected


def test_split_is_fixed_and_has_the_promised_shares():
    # Written down: a change of these moves utterances between training and test.
    assert [splits.split_of('queen', group) for group in ('AND1.DOG', 'BOB1.DOG', 'C41B.CUT')] == [
        'test', 'train', 'train',
    ]  # fmt: skip
    drawn = [splits.split_of('s', str(i)) for i in range(20000)]
    assert drawn.count('test') / 20000 == pytest.approx(0.10, abs=0.01)
    assert drawn.count('dev') / 20000 == pytest.approx(0.05, abs=0.01)


def test_seen_marks_test_lines_that_training_has_in_the_same_language():
    def entry(id, text, split, language='en'):
        return Entry(id, 'a', text=text, split=split, language=language)

    marked = splits.mark_seen(
        [
            entry('a', 'Okay.', 'train'),
            entry('b', ' OKAY! ', 'test'),
            entry('c', "We're here", 'train'),
            entry('d', 'we’re, here', 'dev'),
            entry('e', 'okay', 'test', 'nl'),
            entry('f', 'Okay then', 'test'),
            entry('g', None, 'test'),
            entry('h', None, 'train'),
            entry('i', 'Okay.', 'train'),
        ]
    )
    assert {e.id for e in marked if e.seen} == {'b', 'd'}


# ---------------------------------------------------------------------------- the whole way


def test_entries_from_package_files(tmp_path, deb_dir):
    found = {e.id: e for e in open_voices.entries('ast_en', tmp_path, deb_dir)}
    assert {e.text for e in found.values()} == {
        'Agent logged in.', 'Dial two now, then press pound .', None, 'at', 'Said once.',
    }  # fmt: skip
    assert set(found) == {
        'ast_en/agent-loginok', 'ast_en/dial', 'ast_en/extension', 'ast_en/letters__at',
        'ast_en/twice',
    }  # fmt: skip
    assert {e.split for e in found.values()} == {'test'}
    assert {e.domain for e in found.values()} == {'exam'}
    assert {e.speaker for e in found.values()} == {'asterisk_allison'}
    entry = found['ast_en/dial']
    samples, rate = soundfile.read(entry.audio, dtype='int16')
    assert rate == RATE and len(samples) == round(entry.duration * RATE)
    assert entry.duration == pytest.approx(0.6, abs=0.01)
    peak = np.argmax(np.abs(np.fft.rfft(samples))) * RATE / len(samples)
    assert peak == pytest.approx(440, abs=5)


def test_a_second_call_decodes_nothing(tmp_path, deb_dir, monkeypatch):
    first = list(open_voices.entries('ast_en', tmp_path, deb_dir))
    monkeypatch.setattr(decode, 'decode', lambda _: pytest.fail('decoded again'))
    assert list(open_voices.entries('ast_en', tmp_path, deb_dir)) == first


def test_an_interrupted_call_is_continued(tmp_path, deb_dir):
    first = list(open_voices.entries('ast_en', tmp_path, deb_dir))
    lost = pathlib.Path(first[2].audio)
    content = lost.read_bytes()
    lost.unlink()
    assert list(open_voices.entries('ast_en', tmp_path, deb_dir)) == first
    assert lost.read_bytes() == content


def test_processes_make_the_same(tmp_path, deb_dir, monkeypatch):
    monkeypatch.setattr(build, 'CHUNK', 2)
    alone = list(open_voices.entries('ast_en', tmp_path / 'a', deb_dir))
    together = list(open_voices.entries('ast_en', tmp_path / 'b', deb_dir, jobs=2))
    assert [e.id for e in alone] == [e.id for e in together]
    assert [pathlib.Path(e.audio).read_bytes() for e in alone] == [
        pathlib.Path(e.audio).read_bytes() for e in together
    ]


def test_manifest_can_be_read_and_moved(tmp_path, deb_dir):
    path = open_voices.write_manifest(['ast_en'], tmp_path / 'out', tmp_path / 'c', deb_dir=deb_dir)
    (tmp_path / 'out').rename(tmp_path / 'moved')
    entries = list(read_manifest(str(tmp_path / 'moved' / path.name)))
    assert len(entries) == 5
    assert all(pathlib.Path(e.audio).is_file() for e in entries)
    assert {e.split for e in entries} == {'test'} and all(e.group and e.licence for e in entries)


def test_unknown_set_is_named(tmp_path):
    with pytest.raises(DataError, match="no set 'quen'.*queen"):
        list(open_voices.entries('quen', tmp_path))


def test_every_set_says_whose_it_is():
    sources = pathlib.Path(build.__file__).parent.parent / 'SOURCES.md'
    text = sources.read_text()
    for speech_set in open_voices.SETS.values():
        assert speech_set.licence and speech_set.attribution and speech_set.packages
        assert f'`{speech_set.name}`' in text


def test_import_brings_no_tensorflow():
    code = 'import sys, bigssl_jax.data.open_voices as o; print("tensorflow" in sys.modules)'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == 'False'


@pytest.mark.slow
def test_tfds_builder(tmp_path, deb_dir):
    tfds = pytest.importorskip('tensorflow_datasets')
    from bigssl_jax.data.open_voices import open_voices_dataset_builder  # noqa: F401

    builder = tfds.builder('open_voices/ast_en', data_dir=tmp_path)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(deb_dir))
    )
    assert builder.info.version == open_voices.VERSION
    assert builder.info.redistribution_info.license == 'CC-BY-SA-3.0'
    assert set(builder.info.splits) == {'test'}
    entries = {e.id: e for e in open_voices.entries('ast_en', tmp_path / 'cache', deb_dir)}
    rows = list(tfds.as_numpy(builder.as_dataset('test')))
    assert {row['id'].decode() for row in rows} == set(entries)
    for row in rows:
        entry = entries[row['id'].decode()]
        assert row['audio'] == pathlib.Path(entry.audio).read_bytes()
        assert row['has_text'] == (entry.text is not None)
        assert row['text'].decode() == (entry.text or '')


@pytest.mark.network
def test_ast_en_from_the_mirror(tmp_path):
    found = list(open_voices.entries('ast_en', tmp_path, jobs=2))
    hours = sum(entry.duration for entry in found) / 3600
    assert len(found) == 551
    assert hours == pytest.approx(0.404, abs=0.005)
    texts = [(len(e.text), e.duration) for e in found if e.text]
    assert np.corrcoef(np.transpose(texts))[0, 1] > 0.97  # longer texts take longer to say
