"""`bigssl transcribe`: audio files of any length into text, one bad file never stopping the rest.

    files --audio_windows.py--> batches --Recogniser--> hypotheses of windows
          --long_form.Joiner--> one hypothesis a file --> lines, in the order of the files

A line is written as soon as its file and all before it are done.  With an output file, lines go to
`FILE.partial` first; the file gets its name when all lines are there.  An interrupted command
finds `FILE.partial`, keeps its lines and continues behind them.
"""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import ml_collections
import numpy as np

from bigssl_jax.config import ConfigError, UserError, config_hash
from bigssl_jax.data.audio_blocks import AUDIO_SUFFIXES
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.decoding.long_form import Joiner, Piece
from bigssl_jax.decoding.words import words
from bigssl_jax.overrides import apply_overrides
from bigssl_jax.parallel import make_mesh
from bigssl_jax.stages.audio_windows import RATE, AudioWindows, Windowing, one_ahead
from bigssl_jax.stages.decoder_fields import file_hashes
from bigssl_jax.stages.model import load_model
from bigssl_jax.stages.recognition import Hypothesis, Recogniser
from bigssl_jax.stages.transcript_file import TranscriptFile
from bigssl_jax.training.metrics import Progress, clock

WINDOW_SECONDS = 30.0
OVERLAP_SECONDS = 4.0

Line = dict[str, Any]


class Recognises(Protocol):
    """What transcription needs of a recogniser."""

    def recognise(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Hypothesis]: ...


def transcribe_command(
    checkpoint: str,
    audio: Sequence[str],
    output: str | None = None,
    window: float = WINDOW_SECONDS,
    overlap: float = OVERLAP_SECONDS,
    overwrite: bool = False,
    decoder: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Transcribes files and folders with a fine-tuned model.

    Args:
      checkpoint: a finished finetune stage's folder, or its `model` folder.
      audio: files, or folders that are searched for audio files.
      output: JSON Lines to write instead of text on standard output ('-': on standard output): id,
        text, confidence, seconds, words (text, start, end, confidence); a file that fails has
        `error` instead.
      window: seconds that the model hears at once; longer files are cut into overlapping windows.
      overlap: seconds that neighbouring windows share.
      overwrite: replaces an output file that is there.
      decoder: fields of a DecoderConfig with their values as text.  With more than one hypothesis
        asked for, lines of files that the model hears at once also have `alternatives`.

    Returns:
      {'files', 'failed', 'audio_seconds', 'rtfx'} and 'output', or without an output file
      'utterances': the lines.

    Raises:
      UserError: no model there, an output file that is there already, or none of the files could be
        read.
    """
    model = load_model(pathlib.Path(checkpoint))
    frame = round(model.audio.hop_ms * 4 * RATE / 1000)
    windowing = Windowing.of_seconds(window, overlap, frame)
    paths = list(dict.fromkeys(_files(audio)))
    model.transcript_head()
    search = search_of(decoder)
    fields = dataclasses.asdict(search)
    identity = {
        'model': model.hash,
        'window': windowing.window,
        'overlap': windowing.overlap,
        'decoder': config_hash(fields | file_hashes(fields)),
    }
    with TranscriptFile(output, identity, [str(path) for path in paths], overwrite) as file:
        mesh = make_mesh({'data': -1})
        recogniser = Recogniser.of_model(model, mesh, search)
        tokenizer = Tokenizer(model.tokenizer_path)
        reader = AudioWindows(paths[file.kept :], windowing, mesh.size)
        status = _Status(file, len(paths))
        lines = transcribe(recogniser, reader, paths[file.kept :], tokenizer, frame, status.heard)
        for line in lines:
            status.progress.clear()
            if 'error' in line:
                print(line['error'], file=sys.stderr)
            file.write(line)
        file.finish()
    print(status.summary(), file=sys.stderr)
    if file.failed == len(paths):
        raise UserError('none of the files could be transcribed; the lines above say why')
    return {
        'files': len(paths),
        'failed': file.failed,
        'audio_seconds': round(file.seconds, 3),
        'rtfx': round(status.rtfx(), 2),
        **({'output': output} if file.on_disk else {'utterances': file.lines}),
    }


def search_of(decoder: Sequence[tuple[str, str]]) -> DecoderConfig:
    """The search that fields on the command line describe: any but `max_symbols` means a beam.

    Raises:
      ConfigError: an unknown field, or a value that it cannot have.
    """
    kind = 'beam' if {name for name, _ in decoder} - {'kind', 'max_symbols'} else 'greedy'
    given = ml_collections.ConfigDict({'kind': kind})
    defaults = dataclasses.asdict(DecoderConfig())
    try:
        return DecoderConfig(**apply_overrides(given, decoder, defaults).to_dict())
    except ConfigError as error:
        told = str(error).replace('unknown config field ', 'decoder.')
        told = told.replace('config field ', '').replace('config.', 'decoder.')
        raise ConfigError('--' + told.removeprefix('--')) from error


class _Status:
    """The progress line, and the speed: seconds of audio transcribed in a second (RTFx)."""

    def __init__(self, file: TranscriptFile, total: int):
        self._file, self._total, self._before = file, total, file.seconds
        self._started, self._samples = time.monotonic(), 0
        self.progress = Progress('transcribe', total, unit='file')

    def heard(self, samples: int) -> None:
        """Counts a window and shows the line, when one is due."""
        self._samples += samples
        seconds = self._samples / RATE
        rtfx = seconds / (time.monotonic() - self._started)
        text = f'{self._file.count}/{self._total}  {clock(seconds)} of audio  RTFx {rtfx:.1f}'
        self.progress.draw(f'transcribe: file {text}', last=False)

    def rtfx(self) -> float:
        """Of the files that are done; what windows share counts once."""
        return (self._file.seconds - self._before) / max(time.monotonic() - self._started, 1e-9)

    def summary(self) -> str:
        """The last line."""
        took = time.monotonic() - self._started
        return (
            f'{self._file.count - self._file.failed} of {self._total} files,'
            f' {clock(self._file.seconds - self._before)} of audio in {clock(took)}'
            f' (RTFx {self.rtfx():.1f}, compilation included)'
        )


def transcribe(
    recogniser: Recognises,
    reader: AudioWindows,
    paths: Sequence[os.PathLike],
    tokenizer: Tokenizer,
    frame: int,
    heard: Callable[[int], None],
) -> Iterator[Line]:
    """One line for each of the reader's files, in their order, each as soon as it can be said.

    Args:
      recogniser: decodes batches of windows.
      reader: of the files.
      paths: of the files, for their names.
      tokenizer: of the model.
      frame: samples of an encoder frame.
      heard: told the samples of every window that was decoded.
    """
    recordings: dict[int, _Recording] = {}
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocabulary_size)]
    following = 0

    def finished() -> Iterator[Line]:
        nonlocal following
        while following < len(paths):
            recording = recordings.get(following, _Recording())
            name = os.fspath(paths[following])
            if following in reader.errors:
                line = {'id': name, 'error': reader.errors[following]}
            elif recording.count == reader.counts.get(following):
                heard = recording.joiner.joined()
                seconds = reader.samples[following] / RATE
                line = _line(name, heard, seconds, tokenizer, pieces, frame / RATE)
                if recording.alternatives:
                    line['alternatives'] = recording.alternatives
            else:
                return
            recordings.pop(following, None)
            following += 1
            yield line

    for hypothesis in recogniser.recognise(one_ahead(reader.batches())):
        place = reader.places.pop(hypothesis.utterance)
        if place.file >= following:  # else the file has failed, and its line is written
            recording = recordings.setdefault(place.file, _Recording())
            recording.add(place.turn, place.start // frame, hypothesis)
            heard(place.size)
            yield from finished()
    yield from finished()


class _Recording:
    """What was heard in one file so far; windows may come in any order."""

    def __init__(self) -> None:
        self.joiner, self.count = Joiner(), 0
        # The n-best list of a recording of one window, if more than one hypothesis was asked for.
        self.alternatives: list[Line] = []
        self._waiting: dict[int, tuple[int, Hypothesis]] = {}

    def add(self, turn: int, first: int, hypothesis: Hypothesis) -> None:
        """Adds window `turn`, whose first frame is frame `first` of the file."""
        self._waiting[turn] = first, hypothesis
        while self.count in self._waiting:
            start, heard = self._waiting.pop(self.count)
            self.count += 1
            self.alternatives = _alternatives(heard) if self.count == 1 else []
            piece = Piece(
                np.asarray(heard.tokens),
                np.asarray(heard.start_frames) + start,
                np.asarray(heard.end_frames) + start,
                np.asarray(heard.token_confidence),
            )
            self.joiner.add(piece, start, start + heard.frames)


def _alternatives(heard: Hypothesis) -> list[Line]:
    if len(heard.alternatives) < 2:
        return []
    return [
        {
            'text': other.text,
            'score': round(other.score, 4),
            'log_probability': round(other.log_probability, 4),
            'lm_score': round(other.lm_score, 4),
        }
        for other in heard.alternatives
    ]


def _line(
    name: str, heard: Piece, seconds: float, tokenizer: Tokenizer, pieces: Sequence[str],
    frame_seconds: float,
) -> Line:  # fmt: skip
    tokens, starts, ends, confidences = (column.tolist() for column in heard)
    return {
        'id': name,
        'text': tokenizer.decode(tokens),
        'confidence': round(float(np.mean(confidences)) if confidences else 0.0, 4),
        'seconds': round(seconds, 3),
        'words': [
            {
                'text': word.text,
                'start': round(word.start, 3),
                'end': round(min(word.end, seconds), 3),
                'confidence': round(word.confidence, 4),
            }
            for word in words(tokens, starts, ends, confidences, pieces, frame_seconds)
        ],
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
