"""From the bytes of a package to 16 kHz mono: the one place where the sets' codecs are known."""

from __future__ import annotations

import io
import os
import pathlib

import numpy as np

from bigssl_jax.data.errors import BadAudio, DataError
from bigssl_jax.data.open_voices.utterance import Utterance

SAMPLE_RATE = 16000
G722_RATE = 16000
GSM_RATE = 8000


def decode(utterance: Utterance) -> np.ndarray:
    """Decodes to int16 [S] at 16 kHz, mono (mean of channels).

    Raises BadAudio when the bytes cannot be decoded or hold no samples.
    """
    import soxr

    try:
        samples, rate = _samples(utterance)
    except Exception as error:  # each decoder has exceptions of its own
        raise BadAudio('unreadable', str(error)[:200], utterance.id) from None
    rate = utterance.sample_rate or rate
    if not samples.size:
        raise BadAudio('empty', f'{utterance.encoding} without samples', utterance.id)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE)
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def write_flac(path: pathlib.Path, samples: np.ndarray) -> None:
    """Writes int16 samples [S] of 16 kHz as FLAC, atomically: a file that is there is complete.

    Raises DataError when it cannot be written.
    """
    import soundfile

    unfinished = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        soundfile.write(unfinished, samples, SAMPLE_RATE, format='FLAC', subtype='PCM_16')
        os.replace(unfinished, path)
    except (OSError, soundfile.SoundFileError) as error:
        unfinished.unlink(missing_ok=True)
        raise DataError(f'{path}: cannot be written: {error}') from None


def _samples(utterance: Utterance) -> tuple[np.ndarray, int]:
    """float32 [S] or [S, channels] in [-1, 1], and the rate (Hz) that the header states."""
    import soundfile

    source = io.BytesIO(utterance.audio)
    if utterance.encoding == 'g722':
        return _g722(source), G722_RATE
    if utterance.encoding == 'gsm':
        return soundfile.read(
            source, dtype='float32', format='RAW', subtype='GSM610', samplerate=GSM_RATE, channels=1
        )
    return soundfile.read(source, dtype='float32')


def _g722(source: io.BytesIO) -> np.ndarray:
    import av

    with av.open(source, format='g722') as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    joined = np.concatenate(frames) if frames else np.zeros(0, np.int16)
    return joined.astype(np.float32) / 32768.0
