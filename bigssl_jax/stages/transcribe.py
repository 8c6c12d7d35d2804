"""`bigssl transcribe`: audio files into text, one bad file never stopping the rest."""

import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bigssl_jax.config import UserError
from bigssl_jax.data.audio_files import read_audio
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.parallel import make_mesh
from bigssl_jax.stages.model import Model, load_model
from bigssl_jax.stages.recognition import Hypothesis, Recogniser
from bigssl_jax.training.metrics import clock

AUDIO_SUFFIXES = ('.wav', '.flac', '.ogg', '.opus', '.mp3', '.g722')
BATCH_SECONDS = 120.0
# Lengths are rounded up to these, so that a folder of files needs few compiled programs.
LENGTHS = (2.0, 4.0, 8.0, 16.0, 30.0)


def transcribe_command(
    checkpoint: str, audio: Sequence[str], output: str | None = None
) -> dict[str, Any]:
    """Transcribes files and folders with a fine-tuned model.

    Args:
      checkpoint: a finished finetune stage's folder, or its `model` folder.
      audio: files, or folders that are searched for audio files.
      output: JSON Lines to write instead of text on standard output: id, text, confidence,
        seconds, words (text, start, end, confidence); a file that fails has `error` instead.

    Returns:
      {'files', 'failed', 'audio_seconds', 'rtfx', 'utterances': the lines}.

    Raises:
      UserError: no model there, or none of the files could be read.
    """
    model = load_model(pathlib.Path(checkpoint))
    mesh = make_mesh({'data': -1})
    recogniser = Recogniser.of_model(model, mesh)
    tokenizer = Tokenizer(model.tokenizer_path)
    paths = list(_files(audio))
    lines: dict[int, dict[str, Any]] = {}
    waveforms: dict[int, np.ndarray] = {}
    for number, path in enumerate(paths):
        try:
            waveforms[number] = read_audio(path, max_seconds=LENGTHS[-1])
        except DataError as error:
            lines[number] = {'id': str(path), 'error': str(error)}
            print(f'{path}: {error}', file=sys.stderr)
    started = time.monotonic()
    for hypothesis in recogniser.recognise(_batches(waveforms, mesh.size)):
        number = hypothesis.utterance
        lines[number] = _line(str(paths[number]), hypothesis, tokenizer, model)
    seconds = time.monotonic() - started
    heard = sum(len(w) for w in waveforms.values()) / 16000
    ordered = [lines[number] for number in range(len(paths))]
    _write(ordered, output)
    print(
        f'{len(waveforms)} of {len(paths)} files, {clock(heard)} of audio in {clock(seconds)}'
        f' (RTFx {heard / max(seconds, 1e-9):.1f}, compilation included)',
        file=sys.stderr,
    )
    if not waveforms:
        raise UserError('none of the files could be transcribed; the lines above say why')
    return {
        'files': len(paths),
        'failed': len(paths) - len(waveforms),
        'audio_seconds': round(heard, 3),
        'rtfx': round(heard / max(seconds, 1e-9), 2),
        'utterances': ordered,
    }


def _files(audio: Sequence[str]) -> Iterator[pathlib.Path]:
    """The named files, and the audio files inside the named folders, sorted."""
    for name in audio:
        path = pathlib.Path(name)
        if path.is_dir():
            inside = [p for p in path.rglob('*') if p.suffix.lower() in AUDIO_SUFFIXES]
            if not inside:
                raise UserError(f'{name}: no audio file ({", ".join(AUDIO_SUFFIXES)}) inside')
            yield from sorted(inside)
        else:
            yield path


def _batches(waveforms: dict[int, np.ndarray], multiple: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of similar lengths, padded to one of LENGTHS; rows are filled up with silence."""
    for shortest, longest in zip((0.0, *LENGTHS), LENGTHS, strict=False):
        numbers = [n for n, w in waveforms.items() if shortest * 16000 < len(w) <= longest * 16000]
        size = max(1, int(BATCH_SECONDS / longest) // multiple) * multiple
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            audio = np.zeros((size, int(longest * 16000)), np.int16)
            counts = np.zeros(size, np.int32)
            for row, number in enumerate(chosen):
                audio[row, : len(waveforms[number])] = waveforms[number]
                counts[row] = len(waveforms[number])
            fillers = [-1] * (size - len(chosen))
            yield {
                'audio': audio,
                'sample_counts': counts,
                'rows': np.arange(size, dtype=np.int32),
                'utterances': np.asarray(chosen + fillers, np.int32),
                'sources': np.asarray([0] * len(chosen) + fillers, np.int32),
            }


def _line(name: str, hypothesis: Hypothesis, tokenizer: Tokenizer, model: Model) -> dict[str, Any]:
    frame_seconds = model.audio.hop_ms * 4 / 1000
    return {
        'id': name,
        'text': hypothesis.text,
        'confidence': round(hypothesis.confidence, 4),
        'seconds': round(hypothesis.seconds, 3),
        'words': [
            {
                'text': word.text,
                'start': round(word.start, 3),
                'end': round(word.end, 3),
                'confidence': round(word.confidence, 4),
            }
            for word in hypothesis.words(tokenizer, frame_seconds)
        ],
    }


def _write(lines: Sequence[dict[str, Any]], output: str | None) -> None:
    if output is None:
        for line in lines:
            if 'text' in line:
                print(f'{line["id"]}: {line["text"]}')
        return
    try:
        with open(output, 'w', encoding='utf-8') as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + '\n')
    except OSError as error:
        raise UserError(f'--output {output}: {error.strerror}') from error
