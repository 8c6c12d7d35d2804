"""Blocks joined are the whole file, at any rate and border; every damage is named."""

import tracemalloc

import av
import numpy as np
import pytest
import soundfile

from bigssl_jax.data.audio_blocks import read_blocks
from bigssl_jax.data.audio_files import read_audio
from bigssl_jax.data.errors import BadAudio


def chirp(rate, seconds=2.0, channels=1):
    """float32 [S, channels]: rising tones, so that any click or slip changes the samples."""
    t = np.arange(int(rate * seconds)) / rate
    voices = [np.sin(2 * np.pi * (300 + 100 * c) * t * (1 + t)) for c in range(channels)]
    return (0.4 * np.stack(voices, axis=1)).astype(np.float32)


def write_pyav(path, container, codec, rate=16000):
    """A second of chirp in a container that libsndfile does not know."""
    samples = (chirp(rate).T * 32767).astype(np.int16)
    with av.open(str(path), 'w', format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        for start in range(0, samples.shape[1], 960):
            piece = np.ascontiguousarray(samples[:, start : start + 960])
            frame = av.AudioFrame.from_ndarray(piece, format='s16', layout='mono')
            frame.sample_rate, frame.pts = rate, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize('ending', ['wav', 'flac', 'ogg', 'mp3'])
@pytest.mark.parametrize('rate', [8000, 16000, 44100])
def test_blocks_joined_are_the_file(tmp_path, ending, rate):
    path = tmp_path / f'a.{ending}'
    soundfile.write(path, chirp(rate, channels=2), rate)
    whole = read_audio(path).astype(int)
    for seconds in (0.013, 0.5, 60.0):
        blocks = list(read_blocks(path, block_seconds=seconds))
        assert all(block.dtype == np.int16 and block.size for block in blocks)
        assert len(blocks) > (1 if seconds < 1 else 0)
        joined = np.concatenate(blocks).astype(int)
        assert joined.shape == whole.shape
        # Rounding may fall the other way; a click of the resampler would be hundreds of steps.
        assert np.abs(joined - whole).max() <= 1


@pytest.mark.parametrize(
    'ending, container, codec',
    [('m4a', 'mp4', 'aac'), ('webm', 'webm', 'libopus'), ('mka', 'matroska', 'flac')],
)
def test_containers_of_video_are_read_too(tmp_path, ending, container, codec):
    path = write_pyav(tmp_path / f'a.{ending}', container, codec, 48000)
    whole = read_audio(path).astype(int)
    joined = np.concatenate(list(read_blocks(path, block_seconds=0.1))).astype(int)
    assert joined.shape == whole.shape and 31000 < joined.size < 34000
    assert np.abs(joined - whole).max() <= 1
    assert np.abs(joined).max() > 8000


def test_an_hour_is_read_in_the_memory_of_a_few_blocks(tmp_path):
    path = tmp_path / 'long.wav'
    with soundfile.SoundFile(path, 'w', 8000, 1, 'PCM_16') as file:
        for _ in range(60):
            file.write(np.zeros(60 * 8000, np.int16))
    next(read_blocks(path))  # the libraries' own memory
    tracemalloc.start()
    total = sum(block.size for block in read_blocks(path, block_seconds=10.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 3600 * 16000
    assert peak < 5e6  # a block is 0.3 MB as float32 at 8 kHz, 0.6 MB at 16 kHz


def reason_of(path):
    with pytest.raises(BadAudio) as caught:
        list(read_blocks(path, block_seconds=0.1))
    assert str(path) in str(caught.value)
    return caught.value.reason


def test_damage_is_named(tmp_path):
    assert reason_of(tmp_path / 'none.wav') == 'missing'
    (tmp_path / 'empty.wav').write_bytes(b'')
    assert reason_of(tmp_path / 'empty.wav') == 'empty'
    (tmp_path / 'empty.m4a').write_bytes(b'')
    assert reason_of(tmp_path / 'empty.m4a') == 'empty'
    (tmp_path / 'text.wav').write_bytes(b'RIFF, but not really')
    assert reason_of(tmp_path / 'text.wav') == 'unreadable'
    (tmp_path / 'text.mp4').write_bytes(b'no audio')
    assert reason_of(tmp_path / 'text.mp4') == 'unreadable'
    soundfile.write(tmp_path / 'none.flac', np.zeros(0), 16000)
    assert reason_of(tmp_path / 'none.flac') == 'empty'
    soundfile.write(tmp_path / 'nan.wav', np.full(4000, np.nan), 16000, subtype='FLOAT')
    assert reason_of(tmp_path / 'nan.wav') == 'not_finite'


@pytest.mark.parametrize('ending', ['wav', 'flac', 'ogg'])
def test_a_file_cut_short_is_named(tmp_path, ending):
    path = tmp_path / f'a.{ending}'
    soundfile.write(path, chirp(16000, seconds=8.0), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert reason_of(path) in ('truncated', 'unreadable')


def test_an_empty_file_is_empty_for_every_reader(tmp_path):
    (tmp_path / 'empty.m4a').write_bytes(b'')
    with pytest.raises(BadAudio, match='empty: 0 bytes'):
        read_audio(tmp_path / 'empty.m4a')
