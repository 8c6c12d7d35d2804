"""TFDS builders become corpora: encoded bytes and TFDS's own Audio feature, in stored order."""

import io
import pathlib

import numpy as np
import pytest
import soundfile

from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.prepare import prepare_command

tfds = pytest.importorskip('tensorflow_datasets')


def tone(number):
    return (3000 * np.sin(np.arange(4000 + 100 * number) / (3 + number))).astype(np.int16)


class PlainSpeech(tfds.core.GeneratorBasedBuilder):
    """As TFDS's speech builders are: an Audio feature, numbered speakers, splits by TFDS."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({
                'speech': tfds.features.Audio(sample_rate=8000, dtype=np.int64),
                'transcription': tfds.features.Text(),
                'speaker_id': np.int64,
            }),
            citation='Nobody, 2026',
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples(0, 4), 'test': self._generate_examples(4, 6)}

    def _generate_examples(self, start, stop):
        for k in range(start, stop):
            yield k, {'speech': tone(k).astype(int), 'transcription': f't{k}', 'speaker_id': k}


class CodedSpeech(tfds.core.GeneratorBasedBuilder):
    """As ours are: the bytes of FLAC files, a text that may be unknown."""

    VERSION = tfds.core.Version('2.0.0')

    def _info(self):
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({
                'id': text, 'audio': tfds.features.Tensor(shape=(), dtype=np.object_),
                'text': text, 'has_text': np.bool_, 'seen': np.bool_, 'licence': text,
            })
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for k in range(3):
            file = io.BytesIO()
            soundfile.write(file, tone(k), 16000, format='FLAC', subtype='PCM_16')
            yield k, {
                'id': f'c/{k}', 'audio': file.getvalue(), 'text': 'x' if k else '',
                'has_text': k > 0, 'seen': k == 2, 'licence': 'CC0-1.0',
            }  # fmt: skip


class NoSpeech(tfds.core.GeneratorBasedBuilder):
    """A dataset without audio."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({'label': np.int64})
        )

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        yield 0, {'label': 0}


def prepared(name, tmp_path, **kwargs):
    out = str(tmp_path / 'c')
    result = prepare_command(
        tfds=name, out=out, jobs=1, data_dir=str(tmp_path / 'tfds'), progress=False, **kwargs
    )
    return result, Corpus.open(out)


def test_an_audio_feature_is_resampled_and_numbers_become_names(tmp_path):
    result, corpus = prepared('plain_speech', tmp_path, shard_size=4)
    assert result['rows'] == 6 and not result['already_complete']
    rows = {text: row for row, text in enumerate(corpus.column('text').to_pylist())}
    assert sorted(rows) == [f't{k}' for k in range(6)]
    speakers, splits = corpus.column('speaker').to_pylist(), corpus.column('split').to_pylist()
    for k in range(6):
        assert len(corpus.read(rows[f't{k}'])) == 2 * len(tone(k))
        assert speakers[rows[f't{k}']] == str(k)
        assert splits[rows[f't{k}']] == ('train' if k < 4 else 'test')
    assert splits == ['test'] * 2 + ['train'] * 4
    assert len(set(corpus.column('id').to_pylist())) == 6
    assert corpus.info['source'] == 'tfds:plain_speech/1.0.0'
    assert corpus.info['attribution'] == 'Nobody, 2026'
    again, _ = prepared('plain_speech', tmp_path, shard_size=4)
    assert again['already_complete'] and again['fingerprint'] == result['fingerprint']


def test_encoded_bytes_come_through_bit_for_bit_and_unknown_text_stays_unknown(tmp_path):
    _, corpus = prepared('coded_speech', tmp_path)
    rows = {key: row for row, key in enumerate(corpus.column('id').to_pylist())}
    for k in range(3):
        np.testing.assert_array_equal(corpus.read(rows[f'c/{k}']), tone(k))
    texts, seen = corpus.column('text').to_pylist(), corpus.column('seen').to_pylist()
    assert [texts[rows[f'c/{k}']] for k in range(3)] == [None, 'x', 'x']
    assert [seen[rows[f'c/{k}']] for k in range(3)] == [False, False, True]
    assert corpus.info['licences'] == {'CC0-1.0': 3}


def test_a_folder_of_a_prepared_dataset_is_a_name_too(tmp_path):
    builder = tfds.builder('coded_speech', data_dir=str(tmp_path / 'elsewhere'))
    builder.download_and_prepare()
    _, corpus = prepared(str(builder.data_path), tmp_path)
    assert corpus.num_rows == 3


def test_unknown_builders_and_datasets_without_speech_are_one_line(tmp_path):
    with pytest.raises(DataError, match="'no_such_thing' cannot be built") as caught:
        prepared('no_such_thing', tmp_path)
    assert '\n' not in str(caught.value)
    with pytest.raises(DataError, match='has no feature audio or speech; it has label'):
        prepared('no_speech', tmp_path)


@pytest.mark.parametrize('form', ['array_record', 'tfrecord'])
def test_a_file_that_is_cut_or_gone_is_named_in_one_line(tmp_path, form):
    builder = tfds.builder('coded_speech', data_dir=str(tmp_path / 'tfds'), file_format=form)
    builder.download_and_prepare()
    folder = pathlib.Path(builder.data_path)
    (file,) = folder.glob(f'*{form}*')
    content = file.read_bytes()
    # The second half of an ArrayRecord of this size is its index.
    for harm in (content[:-7], content[: len(content) // 2], content[:10], None):
        file.unlink() if harm is None else file.write_bytes(harm)
        with pytest.raises(DataError) as caught:
            prepared(str(folder), tmp_path)
        said = str(caught.value)
        assert "split 'train' in" in said and str(folder) in said and '\n' not in said
        assert 'copy its files again' in said
        assert not (tmp_path / 'c' / 'corpus.json').exists()
    file.write_bytes(content)
    assert prepared(str(folder), tmp_path)[1].num_rows == 3
