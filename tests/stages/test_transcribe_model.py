"""`bigssl transcribe` with a model folder of random parameters: what it writes, and resuming."""

import json
import pathlib
import zlib

import jax
import numpy as np
import pytest
import soundfile

from bigssl_jax.audio import AudioConfig
from bigssl_jax.config import UserError
from bigssl_jax.data.audio_files import read_audio
from bigssl_jax.data.tokenizer import Tokenizer, train_tokenizer
from bigssl_jax.models.presets import conformer
from bigssl_jax.objectives import CTC
from bigssl_jax.parallel import make_mesh
from bigssl_jax.stages import transcribe as transcribe_lib
from bigssl_jax.stages.model import load_model, save_model
from bigssl_jax.stages.recognition import Recogniser
from bigssl_jax.stages.transcribe import transcribe_command
from bigssl_jax.training.trainer import parameter_layout


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
    """A CTC model that writes something of any sound."""
    path = tmp_path_factory.mktemp('model')
    train_tokenizer(['abc def', 'fed cab'], path / 't.model')
    size = Tokenizer(path / 't.model').vocabulary_size
    encoder = conformer(
        'tiny', num_layers=1, model_dim=16, num_heads=2, kernel_size=3,
        subsampling_channels=(2, 4), num_mels=16,
    )  # fmt: skip
    layout = parameter_layout(
        encoder, {'ctc': CTC(size)}, make_mesh({'data': 1}, jax.devices()[:1])
    )

    def value(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape)
        noise *= 4.0 if 'heads' in name else leaf.shape[-1] ** -0.5
        return (1 + 0.1 * noise if 'scale' in name else noise).astype(np.float32)

    statistics = {'feature_mean': np.full(16, 10, np.float32), 'feature_std': np.full(16, 3.0)}
    statistics = {name: np.float32(x) for name, x in statistics.items()}
    save_model(
        path / 'model', encoder, AudioConfig(num_mels=16), {'ctc': {'objective': 'ctc'}},
        jax.tree_util.tree_map_with_path(value, layout),
        {'encoder': statistics, 'heads': {'ctc': {}}}, path / 't.model', 1,
    )  # fmt: skip
    return path


@pytest.fixture(scope='module')
def recordings(tmp_path_factory) -> pathlib.Path:
    """Two short files of other rates and kinds, one of several windows, one that is none."""
    path = tmp_path_factory.mktemp('recordings')
    rng = np.random.default_rng(0)
    for name, rate, seconds in (('a.wav', 16000, 1.7), ('b.flac', 22050, 1.2), ('d.ogg', 8000, 7)):
        t = np.arange(int(rate * seconds)) / rate
        tones = np.sin(2 * np.pi * rng.uniform(200, 3000, (5, 1)) * t * (1 + 0.2 * np.sin(3 * t)))
        soundfile.write(path / name, 0.1 * tones.sum(0), rate)
    (path / 'c.wav').write_bytes(b'RIFF, but not really')
    return path


def test_lines_are_what_the_recogniser_hears(folder, recordings, tmp_path, capsys):
    output = tmp_path / 'out.jsonl'
    summary = transcribe_command(str(folder), [str(recordings)], str(output), 2.0, 0.6)
    assert (summary['files'], summary['failed'], summary['output']) == (4, 1, str(output))
    assert summary['audio_seconds'] == pytest.approx(1.7 + 1.2 + 7.0, abs=0.01)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [pathlib.Path(line['id']).name for line in lines] == [
        'a.wav', 'b.flac', 'c.wav', 'd.ogg',
    ]  # fmt: skip
    assert 'unreadable' in lines[2]['error'] and 'c.wav' in capsys.readouterr().err
    recogniser = Recogniser.of_model(load_model(folder), make_mesh({'data': -1}))
    for line in lines[:2]:
        samples = read_audio(line['id'])
        row = np.zeros((1, 32000), np.int16)
        row[0, : len(samples)] = samples
        zero = np.zeros(1, np.int32)
        heard = next(recogniser.recognise([
            {'audio': row, 'sample_counts': zero + len(samples), 'rows': zero,
             'utterances': zero, 'sources': zero}
        ]))  # fmt: skip
        assert heard.text and line['text'] == heard.text
    for line in (lines[0], lines[1], lines[3]):
        assert ' '.join(word['text'] for word in line['words']) == line['text']
        times = [t for word in line['words'] for t in (word['start'], word['end'])]
        assert np.all(np.diff(times) >= 0) and times[-1] <= line['seconds']
        assert 0 < line['confidence'] <= 1
    assert lines[3]['words'][-1]['end'] > 4.5  # times are those of the file, not of a window


def test_an_interrupted_command_continues_with_the_same_lines(
    folder, recordings, tmp_path, monkeypatch
):
    whole, broken = tmp_path / 'whole.jsonl', tmp_path / 'broken.jsonl'
    words = str(folder), [str(recordings)]
    transcribe_command(*words, str(whole), 2.0, 0.6)
    real = transcribe_lib.transcribe

    def ends_early(*given):
        for number, line in enumerate(real(*given)):
            if number == 2:
                raise KeyboardInterrupt
            yield line

    with monkeypatch.context() as patch:
        patch.setattr(transcribe_lib, 'transcribe', ends_early)
        with pytest.raises(KeyboardInterrupt):
            transcribe_command(*words, str(broken), 2.0, 0.6)
    assert not broken.exists()
    summary = transcribe_command(*words, str(broken), 2.0, 0.6)
    assert broken.read_text() == whole.read_text()
    assert (summary['files'], summary['failed']) == (4, 1)
    with pytest.raises(UserError, match='is there already'):
        transcribe_command(*words, str(broken), 2.0, 0.6)
