"""Every format, rate and channel count gives the tone that went in; every damage is named."""

import io

import numpy as np
import pytest
import soundfile

from bigssl_jax.data.audio_files import check_audio, read_audio, to_int16
from bigssl_jax.data.errors import REASONS, BadAudio

FORMATS = {
    'wav': {'format': 'WAV', 'subtype': 'PCM_16'},
    'wav24': {'format': 'WAV', 'subtype': 'PCM_24'},
    'wavfloat': {'format': 'WAV', 'subtype': 'FLOAT'},
    'ulaw': {'format': 'WAV', 'subtype': 'ULAW'},
    'flac': {'format': 'FLAC', 'subtype': 'PCM_16'},
    'ogg': {'format': 'OGG', 'subtype': 'VORBIS'},
    'opus': {'format': 'OGG', 'subtype': 'OPUS'},
    'mp3': {'format': 'MP3', 'subtype': 'MPEG_LAYER_III'},
}
LOSSY = ('ulaw', 'ogg', 'opus', 'mp3')


def speech_like(rate, seconds=2.0, channels=1):
    """float32 [S, channels]: tones below 1 kHz with a moving envelope, the same at any rate."""
    t = np.arange(int(rate * seconds)) / rate
    envelope = 0.2 + 0.8 * np.sin(2 * np.pi * 1.3 * t) ** 2
    voices = [np.sin(2 * np.pi * (220 + 90 * c) * t) * envelope for c in range(channels)]
    return (0.3 * np.stack(voices, axis=1)).astype(np.float32)


def encoded(name, rate=16000, **kwargs):
    buffer = io.BytesIO()
    soundfile.write(buffer, speech_like(rate, **kwargs), rate, **FORMATS[name])
    return buffer.getvalue()


def reason_of(*args, **kwargs):
    with pytest.raises(BadAudio) as caught:
        read_audio(*args, **kwargs)
    return caught.value.reason


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('rate', [8000, 16000, 48000])
@pytest.mark.parametrize('channels', [1, 2])
def test_any_format_rate_and_channel_count_gives_the_tone_at_16_khz(name, rate, channels):
    samples = read_audio(encoded(name, rate, channels=channels))
    expected = speech_like(16000, channels=channels).mean(axis=1)
    assert samples.dtype == np.int16
    assert abs(len(samples) - 32000) <= 1
    inner = slice(800, 31200)  # resampling and codecs ring at the ends
    error = samples[inner] / 32768 - expected[inner]
    noise = np.sqrt(np.mean(error**2) / np.mean(expected[inner] ** 2))
    assert noise < (0.06 if name in LOSSY else 1e-3)


@pytest.mark.parametrize('rate', [11025, 11840, 22050, 44100])
def test_odd_rates_keep_the_length_and_the_pitch(rate):
    samples = read_audio(encoded('wav', rate)).astype(float)
    assert abs(len(samples) - 32000) <= 2
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert abs(np.argmax(spectrum) * 16000 / len(samples) - 220) < 3


def test_16_bit_files_at_the_right_rate_come_through_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    for ending in ('wav', 'flac'):
        path = tmp_path / f'a.{ending}'
        soundfile.write(path, values, 16000, subtype='PCM_16')
        np.testing.assert_array_equal(read_audio(path), values)


def test_samples_beyond_full_scale_are_clipped_not_wrapped():
    np.testing.assert_array_equal(
        to_int16(np.array([-3.0, -1.0, 0.5, 1.0, 7.0], np.float32), 16000, 16000),
        [-32768, -32768, 16384, 32767, 32767],
    )


def test_true_rate_overrules_a_header_that_lies():
    data = encoded('wav', 8000)  # 16000 frames that claim 8 kHz
    assert len(read_audio(data)) == 32000
    assert len(read_audio(data, true_rate=16000)) == 16000


def test_g722_and_gsm_have_no_header_and_are_known_by_their_ending(tmp_path):
    av = pytest.importorskip('av')
    wanted = speech_like(16000)[:, 0]
    path = tmp_path / 'prompt.g722'
    with av.open(str(path), 'w', format='g722') as container:
        stream = container.add_stream('adpcm_g722', rate=16000)
        stream.layout = 'mono'
        frame = av.AudioFrame.from_ndarray(
            (wanted[None, :] * 32768).astype(np.int16), format='s16', layout='mono'
        )
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    samples = read_audio(path)
    assert len(samples) == 32000
    delay = 22  # of G.722's two filter banks
    assert np.corrcoef(samples[delay:], wanted[:-delay])[0, 1] > 0.999
    np.testing.assert_array_equal(read_audio(path, 0.5, 0.25), samples[8000:12000])
    np.testing.assert_array_equal(read_audio(path.read_bytes(), kind='.g722'), samples)
    assert reason_of(path, 9.0) == 'bad_cut'
    assert reason_of(path, 1.0, 3.0) == 'truncated'
    assert reason_of(path, max_seconds=1.0) == 'too_long'
    assert len(read_audio(path, 1.0, 0.5, max_seconds=1.0)) == 8000


@pytest.mark.parametrize('name', ['wav', 'flac', 'ogg', 'opus', 'mp3'])
def test_a_cut_equals_the_same_piece_of_the_whole(name):
    data = encoded(name, seconds=4.0)
    whole = read_audio(data)
    for offset, duration in [(0.0, 1.0), (1.5, 0.75), (3.0, 1.0)]:
        cut = read_audio(data, offset, duration)
        start = round(offset * 16000)
        piece = whole[start : start + round(duration * 16000)]
        assert len(cut) == len(piece)
        assert np.abs(cut.astype(int) - piece).max() <= (1 if name in LOSSY else 0)
    np.testing.assert_allclose(read_audio(data, 1.0).astype(int), whole[16000:], atol=1)


def test_a_cut_of_an_hour_does_not_read_the_hour(tmp_path):
    path = tmp_path / 'hour.flac'
    hiss = np.random.default_rng(0).integers(-50, 51, 8000 * 60).astype(np.int16)
    with soundfile.SoundFile(path, 'w', 8000, 1, 'PCM_16') as file:
        for minute in range(60):
            file.write(hiss + np.int16(minute * 100))
    reads = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            reads.append(len(buffer))
            return super().readinto(buffer)

    import bigssl_jax.data.audio_files as audio_files

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio_files, 'open_audio', lambda source: Counting(source))
        cut = read_audio(str(path), 45 * 60 + 10, 2.0)
    assert len(cut) == 32000 and abs(np.mean(cut) - 4500) < 5
    assert sum(reads) < path.stat().st_size / 10


def test_a_cut_may_pass_the_end_a_little_and_no_more():
    data = encoded('wav')
    assert len(read_audio(data, 1.5, 0.6)) == 8000
    assert reason_of(data, 1.5, 2.0) == 'truncated'
    assert reason_of(data, 2.0, 0.5) == 'bad_cut'
    assert reason_of(data, 7.0) == 'bad_cut'


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('kept', [0.35, 0.6, 0.97])
def test_a_file_cut_short_is_noticed_in_every_format(name, kept):
    data = encoded(name, seconds=6.0)
    assert reason_of(data[: int(len(data) * kept)]) in ('truncated', 'unreadable')


def test_a_cut_out_of_the_sound_part_of_a_damaged_file_is_still_refused_where_data_ends():
    data = encoded('wav', seconds=6.0)
    half = data[: len(data) // 2]
    assert len(read_audio(half, 0.5, 1.0)) == 16000
    assert reason_of(half, 2.5, 1.0) == 'truncated'


def test_wav_from_a_pipe_with_unknown_size_is_read():
    data = bytearray(encoded('wav'))
    place = data.index(b'data') + 4
    for size in (b'\xff\xff\xff\xff', b'\x00\xf0\xff\x7f'):
        data[place : place + 4] = size
        assert len(read_audio(bytes(data))) == 32000


def test_missing_unreadable_empty_and_not_finite_are_told_apart(tmp_path):
    assert reason_of(tmp_path / 'none.wav') == 'missing'
    assert reason_of(tmp_path / 'none.wav' / 'x.wav') == 'missing'
    assert reason_of(tmp_path) == 'unreadable'
    assert reason_of(b'') == 'empty'
    assert reason_of(b'this is a text file, not audio\n' * 99) == 'unreadable'
    assert reason_of(b'junk' * 99, kind='.m4a') == 'unreadable'
    assert reason_of(b'', kind='.m4a') == 'empty'
    assert reason_of(encoded('wav', seconds=0)) == 'empty'
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(4000, np.nan, np.float32), 16000, **FORMATS['wavfloat'])
    assert reason_of(buffer.getvalue()) == 'not_finite'


def test_hours_long_files_are_refused_before_decoding():
    data = encoded('flac', seconds=6.0)
    assert reason_of(data, max_seconds=5.0) == 'too_long'
    assert len(read_audio(data, 1.0, 4.0, max_seconds=5.0)) == 64000


def test_check_audio_names_what_training_should_not_see():
    tone = to_int16(speech_like(16000), 16000, 16000)
    check_audio(tone, min_seconds=0.1, max_seconds=3.0, max_clipped=0.1)

    def reason(samples, **limits):
        with pytest.raises(BadAudio) as caught:
            check_audio(samples, **limits)
        return caught.value.reason

    assert reason(tone[:100], min_seconds=0.1) == 'too_short'
    assert reason(tone, max_seconds=1.9) == 'too_long'
    assert reason(np.zeros(16000, np.int16)) == 'silent'
    dither = np.random.default_rng(0).integers(-2, 3, 16000).astype(np.int16)
    assert reason(dither) == 'silent'
    loud = np.clip(tone.astype(int) * 40, -32768, 32767).astype(np.int16)
    assert reason(loud, max_clipped=0.25) == 'clipped'
    check_audio(np.full(100, -32768, np.int16))  # the one value whose absolute overflows


def test_an_error_travels_between_processes_with_its_reason():
    import pickle

    error = pickle.loads(pickle.dumps(BadAudio('silent', 'peak 0', 'a.wav')))
    assert (error.reason, error.detail, error.source) == ('silent', 'peak 0', 'a.wav')
    assert str(error) == 'a.wav: silent: peak 0'
    assert 'silent' in REASONS
