"""A prepared corpus reads back exactly, TensorFlow reads the same bytes, damage is named."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bigssl_jax.data.corpus import Corpus, frame_record, masked_crc, unframe_record
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.prepare import Options, prepare


def made_entries(count=11):
    rng = np.random.default_rng(0)
    return [
        Entry(
            id=f'u{k}',
            audio=(3000 * rng.standard_normal(2000 + 37 * k)).astype(np.int16),
            text=None if k % 4 == 3 else f'text {k}',
            speaker=f's{k % 3}',
            language='en',
            split='test' if k > 8 else 'train',
            seen=k == 10,
            licence='CC0-1.0',
            sample_rate=16000,
        )
        for k in range(count)
    ]


@pytest.fixture(scope='module')
def entries():
    return made_entries()


@pytest.fixture
def directory(entries, tmp_path):
    out = tmp_path / 'corpus'
    prepare(entries, out, jobs=1, options=Options(shard_size=4), progress=False)
    return str(out)


def test_the_corpus_holds_what_went_in(directory, entries):
    corpus = Corpus.open(directory)
    assert len(corpus) == corpus.num_rows == 11
    assert corpus.hours == pytest.approx(sum(len(e.audio) for e in entries) / 16000 / 3600)
    for row, entry in enumerate(entries):
        np.testing.assert_array_equal(corpus.read(row), entry.audio)
    assert corpus.sample_counts.tolist() == [len(e.audio) for e in entries]
    assert corpus.sample_counts.dtype == corpus.offset_of.dtype == np.int64
    assert isinstance(corpus.sample_counts, np.memmap)
    assert corpus.shard_of.tolist() == [k // 4 for k in range(11)]
    assert corpus.offset_of[4] == 0 and corpus.offset_of[1] == 2 * 2000 + 16
    for name in ('id', 'text', 'speaker', 'language', 'domain', 'split', 'seen', 'licence'):
        assert corpus.column(name).to_pylist() == [getattr(e, name) for e in entries]
    np.testing.assert_allclose(corpus.column('duration'), corpus.sample_counts / 16000)
    assert [os.path.basename(p) for p in corpus.shard_paths] == [
        f'audio-0000{k}.tfrecord' for k in range(3)
    ]
    with pytest.raises(IndexError):
        corpus.read(11)
    with pytest.raises(DataError, match="no column 'nope'"):
        corpus.column('nope')
    corpus.verify(deep=True)


def test_checksums_equal_the_published_crc32c_values():
    # RFC 3720 B.4: 32 bytes of zeros, of ones, and 0..31.
    for data, crc in [
        (bytes(32), 0x8A9136AA),
        (b'\xff' * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ]:
        rotated = (crc >> 15) | (crc << 17) & 0xFFFFFFFF
        assert masked_crc(data) == (rotated + 0xA282EAD8) % 2**32


def test_any_flipped_bit_of_a_record_is_noticed():
    record = frame_record(b'0123456789')
    assert unframe_record(record) == b'0123456789'
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match='checksum|bytes'):
            unframe_record(bytes(damaged))
    with pytest.raises(ValueError, match='cut short'):
        unframe_record(record[:9])


def test_tensorflow_reads_the_same_records_in_order_and_by_offset(directory):
    tf = pytest.importorskip('tensorflow')
    corpus = Corpus.open(directory)
    payloads = [p.numpy() for p in tf.data.TFRecordDataset(corpus.shard_paths)]
    assert len(payloads) == corpus.num_rows
    for row, payload in enumerate(payloads):
        decoded = tf.io.decode_raw(payload, tf.int16).numpy()
        np.testing.assert_array_equal(decoded, corpus.read(row))

    def record_at(path, offset):
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[path], compression_type='', buffer_size=0, byte_offsets=[offset]
        )
        return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).take(1)

    row = 6  # the third record of the second shard
    place = ([corpus.shard_paths[corpus.shard_of[row]]], [corpus.offset_of[row]])
    dataset = tf.data.Dataset.from_tensor_slices(place).flat_map(record_at)
    (first,) = dataset.as_numpy_iterator()
    np.testing.assert_array_equal(np.frombuffer(first, '<i2'), corpus.read(row))


def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path, entries):
    def fingerprint(name, entries, **options):
        out = tmp_path / name
        settings = Options(**{'shard_size': 4, **options})
        return prepare(entries, out, jobs=1, options=settings, progress=False)['fingerprint']

    first = fingerprint('a', entries)
    assert fingerprint('b', entries) == first
    other_text = [*entries[:-1], Entry(**{**vars(entries[-1]), 'text': 'another'})]
    assert fingerprint('c', other_text) != first
    louder = Entry(**{**vars(entries[0]), 'audio': entries[0].audio + np.int16(1)})
    assert fingerprint('d', [louder, *entries[1:]]) != first


def test_truncated_missing_and_changed_files_are_named_before_any_work(directory):
    corpus = Corpus.open(directory)
    shard = corpus.shard_paths[1]
    content = open(shard, 'rb').read()

    open(shard, 'wb').write(content[:-7])
    with pytest.raises(DataError, match=r'audio-00001.tfrecord has \d+ bytes, should have \d+'):
        corpus.verify()
    with pytest.raises(DataError, match='row 7 cannot be read'):
        corpus.read(7)

    os.remove(shard)
    with pytest.raises(DataError, match='audio-00001.tfrecord is missing'):
        corpus.verify()

    flipped = bytearray(content)
    flipped[100] ^= 1
    open(shard, 'wb').write(flipped)
    corpus.verify()  # names and sizes are right ...
    with pytest.raises(DataError, match='audio-00001.tfrecord has changed'):
        corpus.verify(deep=True)  # ... contents are not
    with pytest.raises(DataError, match='checksum'):
        corpus.read(4)


def test_a_folder_without_a_complete_corpus_is_refused(directory, tmp_path):
    with pytest.raises(DataError, match='does not exist'):
        Corpus.open(tmp_path / 'none')
    with pytest.raises(DataError, match='holds no corpus.json'):
        Corpus.open(tmp_path)
    path = os.path.join(directory, 'index', 'offset_of.npy')
    np.save(path, np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r'index is int64\[3\], corpus.json promises int64\[11\]'):
        Corpus.open(directory)
    open(path, 'wb').write(b'\x93NUMPY')
    with pytest.raises(DataError, match='offset_of.npy: index cannot be read'):
        Corpus.open(directory)
    path = os.path.join(directory, 'corpus.json')
    info = json.load(open(path))
    json.dump({**info, 'format': 'bigssl-corpus-9'}, open(path, 'w'))
    with pytest.raises(DataError, match="format is 'bigssl-corpus-9'"):
        Corpus.open(directory)
    open(path, 'w').write('{"format": ')
    with pytest.raises(DataError, match='corpus.json: cannot be read'):
        Corpus.open(directory)


def test_reading_a_corpus_imports_neither_tensorflow_nor_jax(directory):
    script = (
        'import sys; from bigssl_jax import data; c = data.Corpus.open(sys.argv[1]); c.read(0); '
        'c.column("text"); import bigssl_jax.data.prepare, bigssl_jax.data.inspect; '
        'print(sorted({"tensorflow", "jax", "seqio"} & set(sys.modules)))'
    )
    output = subprocess.run(
        [sys.executable, '-c', script, directory], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == '[]'


def test_names_of_the_room_are_functions_whatever_was_imported_first():
    script = (
        'import bigssl_jax.data.prepare, bigssl_jax.data.inspect\n'
        'from bigssl_jax.data import inspect, prepare\n'
        'from bigssl_jax import data\n'
        'assert data.prepare is prepare and prepare.__name__ == "prepare"\n'
        'assert data.inspect is inspect and callable(inspect)\n'
        'assert "Corpus" in dir(data)\n'
        'try: data.nothing\n'
        'except AttributeError as error: print(error)\n'
    )
    output = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=True
    )
    assert "has no attribute 'nothing'" in output.stdout
