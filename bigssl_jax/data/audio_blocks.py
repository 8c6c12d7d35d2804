"""Audio files of any length as a run of blocks: what `read_audio` gives, in bounded memory.

    file --decode a block--> float32 [n, channels] --mean--> [n] --soxr stream--> [n'] --> int16

A resampler looks some milliseconds to both sides.  Resampling each block by itself would see
silence beyond its ends, and every border would click.  So one resampler goes through the whole
file: it keeps the tail of a block until the next one comes, and is flushed at the end.  The blocks
joined are, up to the rounding of a float32, the samples that `read_audio` returns.

A file is read from its beginning, so no format needs an index to seek by.  What its header promises
is held against what is there before the first block where libsndfile tells (wav, ogg), and at the
end where it does not (flac, mp3): the caller must drop what a file gave when it fails later.
"""

import os
from collections.abc import Iterator

import numpy as np

from bigssl_jax.data.audio_files import (
    CUT_IN_TWO,
    PYAV_FORMATS,
    open_audio,
    promised_frames,
    refuse_empty,
    size_of,
    to_int16,
)
from bigssl_jax.data.errors import BadAudio

# What a folder is searched for; a file that is named is tried whatever its ending.
AUDIO_SUFFIXES = (
    *('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aif', '.aiff', '.au', '.caf', '.sph'),
    *PYAV_FORMATS,
)


def read_blocks(
    path: str | os.PathLike, sample_rate: int = 16000, block_seconds: float = 10.0
) -> Iterator[np.ndarray]:
    """Decodes a file block by block, mixes down, resamples.

    Args:
      path: the file.
      sample_rate: Hz of the result.
      block_seconds: of audio decoded at a time, about.

    Yields:
      int16 [S], S >= 1; joined they are the whole recording.

    Raises:
      BadAudio: missing, unreadable, empty, truncated or not_finite; possibly after some blocks.
    """
    name = os.fspath(path)
    kind = os.path.splitext(name)[1].lower()
    total = 0
    try:
        with open_audio(path) as file:
            decode = _pyav_blocks if kind in PYAV_FORMATS else _sndfile_blocks
            for block in _resampled(decode(file, kind, block_seconds), sample_rate):
                total += block.size
                if block.size:
                    yield block
        if not total:
            raise BadAudio('empty', 'no samples')
    except BadAudio as error:
        raise BadAudio(error.reason, error.detail, name) from None


def _resampled(blocks: Iterator[tuple[np.ndarray, int]], sample_rate: int) -> Iterator[np.ndarray]:
    """(float32 [n, channels], rate) -> int16 [n'], through one resampler."""
    import soxr

    stream = None
    for block, rate in blocks:
        if not np.isfinite(block).all():
            raise BadAudio('not_finite', f'{(~np.isfinite(block)).sum()} such values')
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        if rate != sample_rate:
            if stream is None:
                stream = soxr.ResampleStream(rate, sample_rate, 1, dtype='float32', quality='HQ')
            mono = stream.resample_chunk(mono)
        yield to_int16(mono, sample_rate, sample_rate)
    if stream is not None:
        rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)
        yield to_int16(rest, sample_rate, sample_rate)


def _sndfile_blocks(file, kind, block_seconds):
    """Yields (float32 [n, channels], rate)."""
    import soundfile

    promised = promised_frames(file)
    if promised == CUT_IN_TWO:
        raise BadAudio('truncated', 'the last Ogg page is cut in two')
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        if not size_of(file):
            raise BadAudio('empty', '0 bytes') from None
        raise BadAudio('unreadable', error.error_string or f'error {error.code}') from None
    with sound:
        if sound.format == 'MP3':  # soundfile seeks after every read, and seeking in MP3 slips
            file.seek(0)
            yield from _pyav_blocks(file, '.mp3', block_seconds)
            return
        rate, total = sound.samplerate, 0
        whole = max(sound.frames, promised or 0)
        if promised and sound.frames < promised:
            raise _truncated(sound.frames, whole, rate)
        size = max(1, round(block_seconds * rate))
        while True:
            try:
                block = sound.read(size, dtype='float32', always_2d=True)
            except soundfile.LibsndfileError as error:
                detail = error.error_string or f'error {error.code}'
                raise BadAudio('unreadable', f'damaged or cut off: {detail}') from None
            if not len(block):
                break
            total += len(block)
            yield block, rate
        if total < whole:
            raise _truncated(total, whole, rate)


def _truncated(found: int, whole: int, rate: int) -> BadAudio:
    return BadAudio('truncated', f'{found / rate:.3f} s decoded of {whole / rate:.3f} s')


def _pyav_blocks(file, kind, block_seconds):
    """Yields (float32 [n, channels], rate); packets are gathered to about `block_seconds`."""
    import av

    refuse_empty(file)
    try:
        with av.open(file, format=PYAV_FORMATS.get(kind)) as container:
            if not container.streams.audio:
                raise BadAudio('unreadable', 'no audio in this file')
            rate = container.streams.audio[0].rate
            planar = av.AudioResampler(format='fltp')
            parts, gathered = [], 0
            for frame in container.decode(audio=0):
                for piece in planar.resample(frame):
                    parts.append(piece.to_ndarray().T)
                    gathered += len(parts[-1])
                if gathered >= block_seconds * rate:
                    yield np.concatenate(parts), rate
                    parts, gathered = [], 0
            if parts:
                yield np.concatenate(parts), rate
    except av.FFmpegError as error:
        raise BadAudio('unreadable', error.strerror or str(error)) from None
