"""Audio files of any common kind to 16 kHz mono int16 samples.

    bytes on disk --decode--> float32 [S, channels] --mean--> [S] --soxr HQ--> [S'] --round--> int16

libsndfile decodes wav, flac, ogg (Vorbis and Opus), mp3, aiff, au, sphere ...; PyAV decodes what it
does not know, chosen by the file name's ending (`PYAV_FORMATS`). A cut (offset, duration) of a long
file seeks, decodes only the cut, and resamples only the cut; MP3 has no index to seek by, so there
the file is decoded up to the cut (PyAV; sample for sample libsndfile's result).

A decoder often hides damage: libsndfile shortens a truncated WAV or Ogg file without a word. So the
promise made by a file's own header is read here (`promised_frames`) and held against what was
decoded.
"""

from __future__ import annotations

import io
import os
import struct
from typing import Any, BinaryIO

import numpy as np

from bigssl_jax.data.errors import BadAudio

# Endings that libsndfile cannot read -> the container PyAV is told (None: it finds out).
PYAV_FORMATS = {'.g722': 'g722', '.gsm': 'gsm'} | dict.fromkeys(
    ('.aac', '.amr', '.m4a', '.mka', '.mkv', '.mp4', '.webm', '.wma')
)
CUT_SLACK = 0.25  # seconds by which a cut may pass the end: manifests round, encoders pad
SILENCE = 8  # int16 steps, -72 dB of full scale: dithered digital silence stays below
OGG_TAIL = 1 << 16  # an Ogg page is at most 65,307 bytes
CUT_IN_TWO = 1 << 62  # frames
WAV_UNKNOWN = 0x7FFFF000  # sizes from here up are what writers into a pipe put: "unknown"


def read_audio(
    source: str | os.PathLike | bytes,
    offset: float = 0.0,
    duration: float | None = None,
    sample_rate: int = 16000,
    *,
    true_rate: int | None = None,
    max_seconds: float | None = None,
    kind: str = '',
) -> np.ndarray:
    """Decodes, mixes down, resamples.

    Args:
      source: path, or the bytes of an encoded file.
      offset, duration: the cut in seconds; None is up to the end.
      sample_rate: Hz of the result.
      true_rate: Hz of the recording when the file's header states a wrong one.
      max_seconds: a longer recording or cut is refused before it is decoded as a whole.
      kind: ending such as '.g722', for bytes whose kind does not show.

    Returns:
      int16 [S], channels averaged, clipped at full scale.

    Raises:
      BadAudio: missing, unreadable, empty, truncated, bad_cut, too_long or not_finite.
    """
    name = f'<{len(source)} bytes>' if isinstance(source, bytes) else os.fspath(source)
    kind = (kind or ('' if isinstance(source, bytes) else os.path.splitext(name)[1])).lower()
    try:
        with open_audio(source) as file:
            decode = _decode_pyav if kind in PYAV_FORMATS else _decode_sndfile
            waveform, rate = decode(file, kind, offset, duration, true_rate, max_seconds)
    except BadAudio as error:
        raise BadAudio(error.reason, error.detail, name) from None
    if not np.isfinite(waveform).all():
        raise BadAudio('not_finite', f'{(~np.isfinite(waveform)).sum()} such values', name)
    samples = to_int16(waveform, rate, sample_rate)
    if not samples.size:
        raise BadAudio('empty', 'no samples', name)
    return samples


def to_int16(waveform: np.ndarray, rate: float, sample_rate: int) -> np.ndarray:
    """float32 [S] or [S, channels] in [-1, 1] at `rate` Hz -> int16 [S'] at `sample_rate` Hz."""
    if waveform.ndim == 2:
        waveform = waveform[:, 0] if waveform.shape[1] == 1 else waveform.mean(axis=1)
    if rate != sample_rate and waveform.size:
        import soxr

        waveform = soxr.resample(waveform, rate, sample_rate, quality='HQ')
    # 16-bit files at the right rate come through unchanged: n / 32768 is exact in float32.
    return np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)


def check_audio(
    samples: np.ndarray,
    sample_rate: int = 16000,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
    max_clipped: float = 1.0,
) -> None:
    """Raises BadAudio for int16 samples that training should not see.

    Reasons: too_short, too_long, silent (peak below -72 dB), clipped (more than the fraction
    `max_clipped` of all samples at full scale).
    """
    seconds = len(samples) / sample_rate
    if seconds < min_seconds:
        raise BadAudio('too_short', f'{seconds:.3f} s, at least {min_seconds:g} s wanted')
    if max_seconds is not None and seconds > max_seconds:
        raise BadAudio('too_long', f'{seconds:.1f} s, at most {max_seconds:g} s wanted')
    peak = int(np.abs(samples.astype(np.int32)).max(initial=0))
    if peak < SILENCE:
        raise BadAudio('silent', f'peak {peak} of 32768')
    if peak >= 32767:
        clipped = float(np.mean((samples == 32767) | (samples == -32768)))
        if clipped > max_clipped:
            raise BadAudio('clipped', f'{clipped:.1%} at full scale, at most {max_clipped:.1%}')


def open_audio(source: Any) -> BinaryIO:
    """A path or bytes as a binary file. BadAudio: missing or unreadable."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return open(source, 'rb')
    except (FileNotFoundError, NotADirectoryError):
        raise BadAudio('missing', 'no such file') from None
    except (OSError, ValueError) as error:
        raise BadAudio('unreadable', getattr(error, 'strerror', None) or str(error)) from None


def _decode_sndfile(file, kind, offset, duration, true_rate, max_seconds):
    """-> float32 [S, channels], rate. `file` is an open binary file."""
    import soundfile

    promised = promised_frames(file)
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        if not size_of(file):
            raise BadAudio('empty', '0 bytes') from None
        reason = 'truncated' if promised == CUT_IN_TWO else 'unreadable'
        raise BadAudio(reason, error.error_string or f'error {error.code}') from None
    with sound:
        if sound.format == 'MP3' and offset:  # seeking in MP3 lands anywhere near
            file.seek(0)
            return _decode_pyav(file, '.mp3', offset, duration, true_rate, max_seconds)
        rate = true_rate or sound.samplerate
        start = round(offset * rate)
        count = None if duration is None else max(1, round(duration * rate))
        if promised == 0 or (not sound.frames and not promised):
            raise BadAudio('empty', 'no samples')
        if offset and sound.frames <= start:
            raise BadAudio('bad_cut', f'offset {offset:g} s, {sound.frames / rate:g} s long')
        _refuse_long(duration, (sound.frames - start) / rate, max_seconds)
        try:
            sound.seek(start)
            waveform = sound.read(-1 if count is None else count, dtype='float32', always_2d=True)
        except soundfile.LibsndfileError as error:
            detail = error.error_string or f'error {error.code}'
            raise BadAudio('unreadable', f'damaged or cut off: {detail}') from None
        cut_in_two = promised == CUT_IN_TWO
        whole = max(sound.frames, 0 if cut_in_two else promised or 0) - start
    if count is None and cut_in_two:
        raise BadAudio('truncated', 'the last Ogg page is cut in two')
    # What the header promises must be there; a cut may pass the promised end by a little.
    asked = whole if count is None else count
    if len(waveform) < max(min(asked, whole), asked - CUT_SLACK * rate):
        found, asked = len(waveform) / rate, asked / rate
        raise BadAudio('truncated', f'{found:.3f} s decoded of {asked:.3f} s')
    return waveform, rate


def _refuse_long(duration: float | None, seconds: float, max_seconds: float | None) -> None:
    length = seconds if duration is None else min(seconds, duration)
    if max_seconds is not None and length > max_seconds:
        raise BadAudio('too_long', f'{length:.1f} s, at most {max_seconds:g} s wanted')


def refuse_empty(file: BinaryIO) -> None:
    """BadAudio for a file of 0 bytes (FFmpeg fails in many ways on one); leaves it at its start."""
    if not size_of(file):
        raise BadAudio('empty', '0 bytes')
    file.seek(0)


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file; leaves it at its end."""
    return file.seek(0, os.SEEK_END)


def promised_frames(file: BinaryIO) -> int | None:
    """Frames that the header promises where libsndfile would not tell; None when nothing is known.

    WAV: the data chunk's size. Ogg: `CUT_IN_TWO` when the file ends within a page.
    """
    head = file.read(12)
    promised = None
    if head[:4] == b'RIFF' and head[8:] == b'WAVE':
        promised = _wav_frames(file)
    elif head[:4] == b'OggS' and _ogg_is_cut(file):
        promised = CUT_IN_TWO
    file.seek(0)
    return promised


def _wav_frames(file: BinaryIO) -> int | None:
    block = 0
    while len(header := file.read(8)) == 8:
        name, size = header[:4], struct.unpack('<I', header[4:])[0]
        if name == b'fmt ':
            body = file.read(size + size % 2)
            if len(body) < 14:
                return None
            # Block-compressed kinds (ADPCM, GSM) hold several frames in a block: only PCM, float
            # and companded samples (tags 1, 3, 6, 7, extensible) have one frame a block.
            tag, block = struct.unpack_from('<H', body)[0], struct.unpack_from('<H', body, 12)[0]
            if tag not in (1, 3, 6, 7, 0xFFFE):
                return None
        elif name == b'data':
            return size // block if block and size < WAV_UNKNOWN else None
        else:
            file.seek(size + size % 2, os.SEEK_CUR)
    return None


def _ogg_is_cut(file: BinaryIO) -> bool:
    size = size_of(file)
    file.seek(max(0, size - OGG_TAIL))
    tail = file.read()
    page = tail.rfind(b'OggS')
    if page < 0 or len(tail) < page + 27:
        return page >= 0
    segments = tail[page + 26]
    table = tail[page + 27 : page + 27 + segments]
    return len(table) < segments or len(tail) < page + 27 + segments + sum(table)


def _decode_pyav(file, kind, offset, duration, true_rate, max_seconds):
    """-> float32 [S, channels], rate. Decodes from the start and keeps the cut only."""
    import av

    refuse_empty(file)
    try:
        with av.open(file, format=PYAV_FORMATS.get(kind)) as container:
            if not container.streams.audio:
                raise BadAudio('unreadable', 'no audio in this file')
            rate = true_rate or container.streams.audio[0].rate
            start = round(offset * rate)
            stop = None if duration is None else start + max(1, round(duration * rate))
            waveform, decoded = _pyav_frames(container, rate, start, stop, max_seconds)
    except av.FFmpegError as error:
        raise BadAudio('unreadable', error.strerror or str(error)) from None
    if decoded == 0:
        raise BadAudio('empty', 'no samples')
    if offset and decoded <= start:
        raise BadAudio('bad_cut', f'offset {offset:g} s, {decoded / rate:g} s long')
    if stop is not None and decoded < stop - CUT_SLACK * rate:
        asked = (stop - start) / rate
        raise BadAudio('truncated', f'{len(waveform) / rate:.3f} s decoded of {asked:.3f} s')
    return waveform, rate


def _pyav_frames(container, rate, start, stop, max_seconds):
    """-> (float32 [S, channels] of the cut, number of frames decoded so far)."""
    import av

    # fltp: one row a channel, float; a resampler to the same rate changes the sample format only.
    planar = av.AudioResampler(format='fltp')
    parts, position = [], 0
    for frame in container.decode(audio=0):
        for piece in planar.resample(frame):
            block = piece.to_ndarray().T
            parts.append(
                block[max(0, start - position) : None if stop is None else stop - position]
            )
            position += len(block)
        if (
            max_seconds is not None
            and (position - start) / rate > max_seconds
            and (stop is None or (stop - start) / rate > max_seconds)
        ):
            raise BadAudio('too_long', f'more than {max_seconds:g} s')
        if stop is not None and position >= stop:
            break
    if not parts:
        return np.zeros((0, 1), np.float32), 0
    return np.concatenate(parts), position
