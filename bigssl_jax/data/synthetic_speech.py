"""Synthetic speech: the fallback corpus for machines that cannot have recorded speech.

Sentences of our own grammar (`synthetic_sentences`), spoken by espeak-ng, a formant synthesiser
which the wheel `espeakng-loader` carries with its data. A speaker is an accent, a voice variant, a
pitch and a rate; one speaker reads one scene of eight sentences. Synthetic speech is far easier
than people's: results on it say that the machinery runs, and nothing about people. Entries say so:
`domain` is 'synthetic'.

    sentences -> espeak-ng (ctypes, 22,050 Hz) -> 16 kHz FLAC -> Entry

The calls are those of espeak-ng's C interface (speak_lib.h), in its retrieval mode: samples arrive
in a callback while `espeak_Synth` runs.
"""

from __future__ import annotations

import _ctypes
import concurrent.futures
import ctypes
import dataclasses
import multiprocessing
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from bigssl_jax.data import synthetic_sentences
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.open_voices import splits
from bigssl_jax.data.open_voices.decode import SAMPLE_RATE, write_flac

VERSION = '1.0.0'  # of sentences, speakers and splits
LICENCE = 'CC0-1.0 (texts and recordings made by this project with espeak-ng)'
PEAK = 0.5  # loudest sample, of full scale

# From speak_lib.h.
AUDIO_OUTPUT_RETRIEVAL = 1
RATE_PARAMETER = 1  # words a minute
PITCH_PARAMETER = 3  # 0 to 100
CHARACTERS_UTF8 = 1
BUFFER_MS = 200
Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)

_unload = getattr(_ctypes, 'FreeLibrary' if os.name == 'nt' else 'dlclose')

ACCENTS = (
    'en-US', 'en', 'en-GB-scotland', 'en-US-nyc', 'en-GB-x-rp', 'en-029', 'en-GB-x-gbclan',
    'en-GB-x-gbcwmd',
)  # fmt: skip
VARIANTS = (
    'f1', 'm1', 'f2', 'm2', 'Alicia', 'm3', 'f3', 'm4', 'Andrea', 'm5', 'f4', 'm6', 'Annie', 'm7',
    'f5', 'm8', 'linda', 'Alex', 'anika', 'Michael', 'belinda', 'adam', 'aunty', 'david', 'steph',
    'john', 'steph2', 'max', 'grandma', 'robert', 'shelby', 'paul', 'victor',
)  # fmt: skip
PITCHES = (50, 40, 62)
RATES = (165, 145, 185, 200)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """One synthetic voice: an espeak-ng accent and variant, pitch (0-100), words a minute."""

    accent: str
    variant: str
    pitch: int
    rate: int

    @property
    def name(self) -> str:
        return f'espeak_{self.accent}_{self.variant}_{self.pitch}_{self.rate}'.lower()


def speakers(count: int) -> list[Speaker]:
    """The first `count` of the ACCENTS x VARIANTS speakers, always in the same order.

    Raises DataError when `count` is not between 1 and the number of voices.
    """
    most = len(ACCENTS) * len(VARIANTS)
    if not 1 <= count <= most:
        raise DataError(f'num_speakers is {count}, must be between 1 and {most}')
    return [
        # Accents repeat every 8, variants every 33: all pairs differ, as 8 and 33 share no factor.
        Speaker(
            ACCENTS[i % len(ACCENTS)],
            VARIANTS[i % len(VARIANTS)],
            PITCHES[i % len(PITCHES)],
            RATES[i % len(RATES)],
        )
        for i in range(count)
    ]


class _Synthesiser:
    """espeak-ng, loaded for one utterance and unloaded after it.

    The library keeps oscillator phases and voice settings in globals that nothing resets, so what
    one text sounds like would depend on the texts before. Loading afresh costs 0.3 ms.
    """

    def __enter__(self) -> _Synthesiser:
        try:
            import espeakng_loader
        except ImportError:
            raise DataError(
                'synthetic speech needs espeak-ng: run `pip install espeakng-loader`'
            ) from None
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = os.path.dirname(espeakng_loader.get_data_path())
        self.sample_rate = self._library.espeak_Initialize(
            AUDIO_OUTPUT_RETRIEVAL, BUFFER_MS, data.encode(), 0
        )
        if self.sample_rate <= 0:
            raise DataError(f'espeak-ng cannot start with the data in {data}')
        self._pieces: list[np.ndarray] = []
        self._callback = Callback(self._receive)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)
        return self

    def __exit__(self, *_) -> None:
        self._library.espeak_Terminate()
        _unload(self._library._handle)

    def _receive(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on

    def speak(self, text: str, speaker: Speaker) -> np.ndarray:
        """int16 samples [S] of `text` at `self.sample_rate`."""
        library, voice = self._library, f'gmw/{speaker.accent}+{speaker.variant}'
        if library.espeak_SetVoiceByName(voice.encode()):
            raise DataError(f'espeak-ng has no voice {voice!r}')
        library.espeak_SetParameter(PITCH_PARAMETER, speaker.pitch, 0)
        library.espeak_SetParameter(RATE_PARAMETER, speaker.rate, 0)
        self._pieces.clear()
        encoded = text.encode() + b'\0'
        library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded)), 0, 1, 0, CHARACTERS_UTF8, None, None
        )
        library.espeak_Synchronize()
        if not self._pieces:
            raise DataError(f'espeak-ng said nothing for {text!r} with voice {voice!r}')
        return np.concatenate(self._pieces)


def synthesise(text: str, speaker: Speaker) -> np.ndarray:
    """Speaks `text`: int16 [S], 16 kHz, loudest sample at PEAK of full scale.

    The same samples for the same arguments, whatever was spoken before.
    Raises DataError when espeak-ng is not installed or lacks the voice.
    """
    import soxr

    with _Synthesiser() as engine:
        spoken: np.ndarray = engine.speak(text, speaker).astype(np.float32)
    samples: np.ndarray = soxr.resample(spoken, engine.sample_rate, SAMPLE_RATE)
    loudest = max(float(np.abs(samples).max()), 1.0)
    return np.rint(samples * (PEAK * 32767 / loudest)).astype(np.int16)


def entries(
    cache_dir: str | os.PathLike,
    num_utterances: int = 4000,
    num_speakers: int = 64,
    seed: int = 0,
    jobs: int = 1,
) -> Iterator[Entry]:
    """Yields synthetic entries, their audio as 16 kHz FLAC files below `cache_dir`.

    4,000 utterances are about 3.2 hours. Splits are by scene, as in `open_voices`; files that exist
    are not made again; a smaller corpus is the beginning of a larger one with the same speakers.

    Raises:
      DataError: espeak-ng cannot be had, or a count is out of range.
    """
    if num_utterances < 1:
        raise DataError(f'num_utterances is {num_utterances}, must be 1 or more')
    voices = speakers(num_speakers)
    folder = pathlib.Path(cache_dir) / f'synthetic-{VERSION}-seed{seed}'
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(synthetic_sentences.sentences(seed, num_utterances))
    made = [
        _entry(seed, index, scene, text, voices[scene % num_speakers], folder)
        for index, (scene, text) in enumerate(texts)
    ]
    tasks = [
        (text, voices[scene % num_speakers], entry.audio)
        for entry, (scene, text) in zip(made, texts, strict=True)
    ]
    timed = [
        dataclasses.replace(entry, duration=seconds)
        for entry, seconds in zip(made, _speak_all(tasks, jobs), strict=True)
    ]
    yield from splits.mark_seen(timed)


def _entry(
    seed: int, index: int, scene: int, text: str, speaker: Speaker, folder: pathlib.Path
) -> Entry:
    name = f'{index:06d}_{speaker.name}'
    group = f'synthetic/{seed}-{scene:05d}'
    return Entry(
        id=f'synthetic/{seed}-{name}',
        audio=str(folder / f'{name}.flac'),
        text=text,
        speaker=speaker.name,
        language='en',
        domain='synthetic',
        group=group,
        split=splits.split_of('synthetic', group),
        licence=LICENCE,
    )


def _speak_all(tasks: list[tuple[str, Speaker, str]], jobs: int) -> Iterator[float]:
    """Speaks every task (text, speaker, path) that has no file yet; yields seconds in order."""
    if jobs <= 1:
        yield from map(_speak_to_file, tasks)
        return
    context = multiprocessing.get_context('spawn')  # forking a process that runs JAX can hang it
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(_speak_to_file, tasks, chunksize=32)


def _speak_to_file(task: tuple[str, Speaker, str]) -> float:
    import soundfile

    text, speaker, path = task
    if os.path.exists(path):
        return soundfile.info(path).frames / SAMPLE_RATE
    samples = synthesise(text, speaker)
    write_flac(pathlib.Path(path), samples)
    return len(samples) / SAMPLE_RATE
