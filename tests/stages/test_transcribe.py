"""Long files transcribe as their pieces do, in bounded memory and in order; outputs continue.

The recogniser here is a synthetic one that can be decided exactly: a frame of 640 equal samples is
the token whose number their level tells, silence is nothing, and what stands near either end of a
window is heard wrongly.
"""

import itertools
import json
import tracemalloc
import types

import numpy as np
import pytest
import soundfile

from bigssl_jax.config import UserError
from bigssl_jax.stages import audio_windows
from bigssl_jax.stages.audio_windows import AudioWindows, Windowing, one_ahead
from bigssl_jax.stages.transcribe import transcribe
from bigssl_jax.stages.transcript_file import TranscriptFile

FRAME = 640
LETTERS = '▁abcdefgh'
WINDOWING = Windowing.of_seconds(4.0, 1.2, FRAME)


class Letters:
    """Stands for a tokenizer: token 3 is a space, 4 and on are letters."""

    vocabulary_size = 3 + len(LETTERS)

    def piece(self, token):
        return ('<pad>', '<eos>', '<unk>', *LETTERS)[token]

    def decode(self, tokens):
        return ' '.join(''.join(map(self.piece, tokens)).replace('▁', ' ').split())


class Levels:
    """Stands for a recogniser; `edge` frames at both ends of a window are spoilt."""

    def __init__(self, edge=6):
        self.edge, self.shapes = edge, []

    def recognise(self, batches):
        for batch in batches:
            self.shapes.append(batch['audio'].shape)
            for row, number in enumerate(batch['utterances']):
                if number >= 0:
                    audio = batch['audio'][row, : batch['sample_counts'][row]]
                    yield self.hypothesis(int(number), audio)

    def hypothesis(self, number, audio):
        frames = -(-len(audio) // FRAME)
        level = np.pad(audio, (0, -len(audio) % FRAME)).reshape(frames, FRAME).max(1) // 1000
        found = [(n, int(level[n])) for n in np.flatnonzero(level)]
        spoilt = [
            (n, 4 if n < self.edge or n >= frames - self.edge else token) for n, token in found
        ]
        starts = np.array([n for n, _ in spoilt], np.int32)
        return types.SimpleNamespace(
            utterance=number,
            tokens=np.array([token for _, token in spoilt], np.int32),
            start_frames=starts,
            end_frames=starts + 1,
            token_confidence=np.full(len(starts), 0.5, np.float32),
            frames=frames,
            alternatives=(),
        )


def sound(text, seconds, first=10, gap=3):
    """int16 samples that say `text` from frame `first` on, a letter every `gap` frames."""
    audio = np.zeros(int(seconds * 16000), np.int16)
    for n, letter in enumerate(text):
        start = (first + n * gap) * FRAME
        audio[start : start + FRAME] = 1000 * (3 + LETTERS.index('▁' if letter == ' ' else letter))
    return audio


def listen(paths, recogniser=None, windowing=WINDOWING, multiple=1):
    reader = AudioWindows(paths, windowing, multiple)
    recogniser = recogniser or Levels()
    told = []
    lines = list(transcribe(recogniser, reader, paths, Letters(), FRAME, told.append))
    return lines, reader, told


def random_text(rng, length):
    words = (''.join(rng.choice(list('abcdefgh'), rng.integers(1, 6))) for _ in itertools.count())
    text = ''
    while len(text) < length:
        text += next(words) + ' '
    return text[:length].strip()


def test_files_of_every_length_in_order(tmp_path):
    rng = np.random.default_rng(0)
    said = {
        'a-short': ('ab', 0.9, 6),  # shorter than the overlap
        'b-long': (random_text(rng, 300), 40.0, 10),
        'c-silent': ('', 21.0, 0),
        'd-one-window': (random_text(rng, 25), 4.0, 8),
        'f-a-bit-more': (random_text(rng, 25), 4.02, 8),
        'g-instant': ('', 0.01, 0),
    }
    paths = []
    for name, (text, seconds, first) in said.items():
        paths.append(tmp_path / f'{name}.wav')
        soundfile.write(paths[-1], sound(text, seconds, first), 16000, subtype='PCM_16')
    paths.insert(4, tmp_path / 'e-broken.wav')
    paths[4].write_bytes(b'RIFF, but not really')
    paths.append(tmp_path / 'h-missing.wav')
    lines, reader, told = listen(paths)
    assert [line['id'] for line in lines] == [str(path) for path in paths]
    for line, path in zip(lines, paths, strict=True):
        if path.stem in said:
            text, seconds, first = said[path.stem]
            assert line['text'] == text
            assert line['seconds'] == pytest.approx(seconds, abs=1e-3)
            assert ' '.join(word['text'] for word in line['words']) == text
            starts = [
                n for n in range(len(text)) if text[n] != ' ' and text[n - 1 : n] in ('', ' ')
            ]
            expected = [(first + 3 * n) * 0.04 for n in starts]  # absolute, in seconds
            assert [word['start'] for word in line['words']] == pytest.approx(expected, abs=1e-3)
            assert line['confidence'] == (0.5 if text else 0.0)
    assert 'unreadable' in lines[4]['error'] and 'convert it' in lines[4]['error']
    assert 'missing' in lines[7]['error'] and 'text' not in lines[7]
    assert reader.places == {}
    assert sum(told) == sum(reader.samples.values()) + WINDOWING.overlap * sum(
        max(0, count - 1) for count in reader.counts.values()
    )


def test_a_long_file_is_heard_as_its_pieces_are(tmp_path):
    """Pieces of under a window, each transcribed alone, against all of them in one file."""
    rng = np.random.default_rng(1)
    pieces = [sound(random_text(rng, rng.integers(5, 25)) + ' ', 3.9) for _ in range(40)]
    paths = [tmp_path / f'{n:02d}.wav' for n in range(40)]
    for path, piece in zip(paths, pieces, strict=True):
        soundfile.write(path, piece, 16000, subtype='PCM_16')
    silence = [np.zeros(int(16000 * s), np.int16) for s in rng.uniform(0, 3, 40)]
    whole = np.concatenate(list(itertools.chain(*zip(pieces, silence, strict=True))))
    # On whole frames, which is what the synthetic recogniser can read.
    lengths = np.array([len(a) + len(b) for a, b in zip(pieces, silence, strict=True)])
    whole = np.concatenate(
        [np.pad(np.concatenate(p), (0, -n % FRAME)) for p, n in zip(
            zip(pieces, silence, strict=True), lengths, strict=True)]
    )  # fmt: skip
    soundfile.write(tmp_path / 'whole.wav', whole, 16000, subtype='PCM_16')
    one_by_one, _, _ = listen(paths)
    together, reader, _ = listen([tmp_path / 'whole.wav'])
    assert reader.counts[0] > 40
    assert together[0]['text'] == ' '.join(line['text'] for line in one_by_one)


def test_a_file_that_fails_at_its_end_has_no_text(tmp_path):
    path = tmp_path / 'cut.flac'
    noise = np.random.default_rng(0).integers(-99, 99, 320000).astype(np.int16)
    soundfile.write(path, noise, 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    soundfile.write(tmp_path / 'good.wav', sound('abc', 2.0), 16000, subtype='PCM_16')
    lines, reader, _ = listen([path, tmp_path / 'good.wav'])
    assert reader.counts[0] >= 3  # windows that came before it broke
    assert 'text' not in lines[0] and 'cut.flac' in lines[0]['error']
    assert lines[1]['text'] == 'abc'
    assert reader.places == {}


def test_hours_are_read_in_bounded_memory(tmp_path):
    path = tmp_path / 'hours.flac'
    with soundfile.SoundFile(path, 'w', 16000, 1) as file:
        for _ in range(30):
            file.write(np.zeros(60 * 16000, np.int16))
    recogniser, windowing = Levels(), Windowing.of_seconds(30.0, 4.0, FRAME)
    listen([path], windowing=windowing)  # the libraries' own memory
    tracemalloc.start()
    lines, _, _ = listen([path], recogniser, windowing)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines[0]['seconds'] == 1800
    # 58 MB of samples; three batches of 3.8 MB, one waiting list, one window and one block.
    assert peak < 25e6
    assert recogniser.shapes[0] == (4, 480000)


def test_rows_divide_among_devices_and_a_lone_length_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_windows, 'PATIENCE', 8)
    paths = [tmp_path / 'a.wav', *(tmp_path / f'b{n:02d}.wav' for n in range(40))]
    for n, path in enumerate(paths):
        soundfile.write(path, sound('ab', 3.5 if n else 0.9), 16000, subtype='PCM_16')
    reader = AudioWindows(paths, WINDOWING, 3)
    batches = list(reader.batches())
    assert all(len(batch['rows']) % 3 == 0 for batch in batches)
    lone = next(n for n, batch in enumerate(batches) if 0 in batch['utterances'])
    assert max(batches[lone]['utterances']) == 0 and lone == 0
    seen = np.concatenate([batch['utterances'] for batch in batches])
    assert sorted(seen[seen >= 0]) == list(range(41))
    for batch in batches:
        filler = batch['utterances'] < 0
        assert not batch['sample_counts'][filler].any() and (batch['sources'][filler] == -1).all()


@pytest.mark.parametrize(
    'window, overlap, told',
    [(0.5, 0.1, '--window 0.5'), (10, 5.1, '--overlap 5.1'), (10, 0, '--overlap 0')],
)
def test_windows_that_cannot_be_joined_are_refused(window, overlap, told):
    with pytest.raises(UserError, match=told):
        Windowing.of_seconds(window, overlap, FRAME)


def test_windows_start_on_whole_frames():
    windowing = Windowing.of_seconds(30.0, 4.0, FRAME)
    assert (windowing.window, windowing.overlap) == (480000, 64000)
    odd = Windowing.of_seconds(10.01, 1.0, FRAME)
    assert (odd.window - odd.overlap) % FRAME == 0 and 16000 <= odd.overlap < 16000 + FRAME


def test_one_ahead_keeps_the_order_reads_no_further_and_passes_errors_on():
    made = []

    def items():
        for n in range(4):
            made.append(n)
            yield n
        raise KeyError('at the end')

    used = []
    with pytest.raises(KeyError, match='at the end'):
        for n in one_ahead(items()):
            used.append(n)
            assert len(made) <= len(used) + 1
    assert used == [0, 1, 2, 3]


def write_some(path, names, count, identity=None, overwrite=False):
    """A command that ends after `count` lines, or finishes."""
    with TranscriptFile(str(path), identity or {'model': 'm'}, names, overwrite) as file:
        kept = file.kept
        for name in names[kept : kept + count]:
            error = {'error': 'bad'} if name == 'b' else {'text': name.upper(), 'seconds': 1.5}
            file.write({'id': name, **error})
        if file.count == len(names):
            file.finish()
    return file


def test_an_interrupted_output_continues(tmp_path):
    path, names = tmp_path / 'out.jsonl', list('abcd')
    write_some(path, names, 2)
    assert not path.exists()
    partial = tmp_path / 'out.jsonl.partial'
    with partial.open('a') as file:
        file.write('{"id": "c", "te')  # cut short by a kill
    last = write_some(path, names, 9)
    assert (last.kept, last.count, last.failed, last.seconds) == (2, 4, 1, 4.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line['id'] for line in lines] == names
    assert lines[2] == {'id': 'c', 'text': 'C', 'seconds': 1.5} and 'error' in lines[1]
    assert [p.name for p in tmp_path.iterdir()] == ['out.jsonl']


def test_an_output_is_not_written_over_or_continued_by_another_command(tmp_path):
    path, names = tmp_path / 'out.jsonl', list('abcd')
    write_some(path, names, 2)
    with pytest.raises(UserError, match='another model'):
        write_some(path, names, 9, identity={'model': 'n'})
    with pytest.raises(UserError, match=r"partial:3 is of 'b', which is not file 2"):
        write_some(path, list('acd'), 9)
    write_some(path, names, 9)
    with pytest.raises(UserError, match='is there already'):
        write_some(path, names, 9)
    write_some(path, ['x'], 9, overwrite=True)
    assert json.loads(path.read_text())['id'] == 'x'
    with pytest.raises(UserError, match='No such file'):
        write_some(tmp_path / 'no' / 'out.jsonl', names, 9)


def test_without_a_file_lines_are_printed(capsys):
    lines = [{'id': 'a.wav', 'text': 'é', 'seconds': 1.0}, {'id': 'b.wav', 'error': 'bad'}]
    for output, printed in ((None, 'a.wav: é\n'), ('-', None)):
        with TranscriptFile(output, {}, ['a.wav', 'b.wav']) as file:
            for line in lines:
                file.write(line)
            file.finish()
        assert file.lines == lines and not file.on_disk
        out = capsys.readouterr().out
        assert out == printed or [json.loads(x) for x in out.splitlines()] == lines
