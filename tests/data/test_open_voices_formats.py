"""Readers of the package formats, on tiny made-up files of each."""

import io
import pathlib
import struct

import numpy as np
import pytest
import soundfile

from bigssl_jax.data.errors import BadAudio, DataError
from bigssl_jax.data.open_voices import decode, festvox_ru, fillets, prompts, queen, tuxpaint
from bigssl_jax.data.open_voices.utterance import Utterance, safe_id, spoken

RATE = 16000


def tone(seconds: float, rate: int = RATE, hz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype('f4')


def encoded(samples: np.ndarray, rate: int, container: str, **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, **options)
    return buffer.getvalue()


def write(path: pathlib.Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# ---------------------------------------------------------------------------- the queen's game file


def game_string(text: str) -> bytes:
    return bytes([len(text) + 1]) + text.encode('cp850') + b'\0' if text else b'\0'


def padded(data: bytes, align: int) -> bytes:
    return data + b'\0' * (-len(data) % align)


def dialogue(talk_key: int, person: list, joe: list, greetings: tuple[str, str]) -> bytes:
    """A .DOG resource of one level; `person` and `joe` hold (number, text)."""
    tree = 32 + 96
    joe_block = b''
    for number, text in joe:  # blocks start at multiples of 4 already
        joe_block += struct.pack('>2h', 0, number) + game_string(text)
        joe_block = padded(joe_block, 4)
    # Where Joe's lines start, the second value also says whether he stays silent at first.
    person_at = tree + len(joe_block)
    person_block = b''
    for number, text in person:
        person_block = padded(person_block + struct.pack('>2h', 0, number) + game_string(text), 4)
    greetings_at = person_at + len(person_block)
    header = struct.pack(
        '>5h 6h 3H', -1, 1, talk_key, len(joe), len(person), *[0] * 6, person_at, 0, greetings_at
    )
    body = padded(header, 32) + b'\0' * 96 + joe_block + person_block
    return b'\0' * 20 + body + padded(game_string(greetings[0]), 2) + game_string(greetings[1])


def actor(number: int, animation: int = 0, execute: int = 0, copy_of: int = 0) -> bytes:
    values = [0] * 17
    values[0], values[4], values[5], values[12] = number, animation, execute, copy_of
    return struct.pack('>17h', *values) + struct.pack('>2h', 1, 5)  # one person to turn on


def cutaway(actors: list[bytes], texts: list[str]) -> bytes:
    body = b''.join(actors)
    texts_at = 12 + len(body)
    strings = b''
    for text in texts:
        strings = padded(strings + game_string(text), 2) if text else strings + b'\0'
    return b'\0' * 20 + struct.pack('>4h2H', 0, len(actors), 0, 0, texts_at, 0) + body + strings


def world_resources() -> dict[str, bytes]:
    """2 descriptions, 2 names, 1 room; object 1 is a person called Trader Bob, 2 a thing."""
    texts = [
        'A fine chair', 'It is *AO broken', 'Trader Bob', 'Gorilla', 'Lobby',
        *[f'verb{i}' for i in range(12)], *[f'Answer {chr(97 + i % 26)}' for i in range(40)],
    ]  # fmt: skip
    objects = [(1, -3), (2, 7)]
    jas = struct.pack('>4H', 1, 2, 2, 2) + b''.join(
        struct.pack('>h3HhHHh', name, 0, 0, 0, 0, 0, 0, image) for name, image in objects
    )
    return {'QUEEN.JAS': b'\0' * 20 + jas, 'QUEEN2.JAS': '\r\n'.join(texts).encode('cp850')}


def resource_file(resources: dict[str, bytes]) -> bytes:
    header = struct.pack('>4s9sH', b'QTBL', b'CEM10', len(resources))
    offset, table, content = len(header) + 21 * len(resources), b'', b''
    for name, data in resources.items():
        table += struct.pack('>12sBII', name.encode(), 1, offset + len(content), len(data))
        content += data
    return header + table + content


@pytest.fixture(scope='module')
def game(tmp_path_factory) -> dict[str, Utterance]:
    sound = encoded(tone(1.0, 11025), 11025, 'MP3')
    animation = struct.pack('>10h', 3, *[0] * 9) + struct.pack('>h', -2)
    resources = world_resources()
    resources['AND1.DOG'] = dialogue(
        9,
        person=[(0x2A, 'Stop. *FL Now! *GD heard *WTgo on'), (3, 'It was 1945.')],
        joe=[(4, '@@ Hello^_! @@'), (5, 'Bye*XY00(237,112), then.')],
        greetings=('Farewell.', '<sneeze>'),
    )
    resources['C1A.CUT'] = cutaway(
        [
            actor(0),  # Joe
            actor(2, animation=1, execute=1) + animation,  # a thing that moves and is silent
            actor(1, execute=1),  # a person: no animation follows
            actor(-2),  # a text on the screen, read by the narrator
            actor(2, copy_of=1),  # becomes Trader Bob
        ],
        ['entry', 'Hi there.', '', 'Welcome.', 'Meanwhile', 'Again me.'],
    )
    names = [
        '09002AP1', '09002AP2', '09002AP3', '09002AP4', '090003P1', '090004J1', '090005J1',
        '090005J2', '09XXXXP1', '09XXXXJ1', 'C1A__011', 'C1A__031', 'C1A__041', 'C1A__051',
        'JOE00411', 'JOE00421', 'JOE00422', 'JOE00011', '103SSSSS',
    ]  # fmt: skip
    for name in names:
        resources[f'{name}.SB'] = sound
    root = tmp_path_factory.mktemp('queen')
    write(root / queen.RESOURCE_FILE, resource_file(resources))
    found = list(queen.utterances({'flight-of-the-amazon-queen': root}))
    assert len({u.id for u in found}) == len(found)
    return {u.id: u for u in found}


@pytest.mark.parametrize(
    ('name', 'text', 'speaker', 'group'),
    [
        ('09002AP1', 'Stop.', 'queen_and', 'AND1.DOG'),
        ('09002AP4', 'go on', 'queen_and', 'AND1.DOG'),
        ('090003P1', None, 'queen_and', 'AND1.DOG'),  # digits: no text
        ('090004J1', 'Hello!', 'queen_joe', 'AND1.DOG'),
        ('090005J2', ', then.', 'queen_joe', 'AND1.DOG'),
        ('09XXXXP1', 'Farewell.', 'queen_and', 'AND1.DOG'),
        ('09XXXXJ1', None, 'queen_joe', 'AND1.DOG'),
        ('C1A__011', 'Hi there.', 'queen_joe', 'C1A.CUT'),
        ('C1A__031', 'Welcome.', 'queen_bob', 'C1A.CUT'),
        ('C1A__041', 'Meanwhile', 'queen_narr', 'C1A.CUT'),
        ('C1A__051', 'Again me.', 'queen_bob', 'C1A.CUT'),
        ('JOE00011', 'Answer a', 'queen_joe', 'JAS0'),
        ('JOE00411', 'A fine chair', 'queen_joe', 'JAS5'),
        ('JOE00421', 'It is', 'queen_joe', 'JAS5'),
        ('JOE00422', 'broken', 'queen_joe', 'JAS5'),
    ],
)
def test_queen_line(game, name, text, speaker, group):
    assert (game[name].text, game[name].speaker, game[name].group) == (text, speaker, group)


def test_queen_leaves_out_effects_and_silent_parts(game):
    assert '103SSSSS' not in game  # a sound effect: no text names it
    assert '09002AP2' not in game  # *GD follows: nothing is said
    assert game['09002AP3'].text == 'heard'


def test_queen_sounds_are_as_long_as_at_the_true_rate(game):
    utterance = game['09002AP1']
    stored = soundfile.info(io.BytesIO(utterance.audio))
    assert stored.samplerate == 11025
    samples = decode.decode(utterance)
    assert samples.dtype == np.int16
    assert len(samples) == pytest.approx(stored.frames * RATE / 11840, abs=2)
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * RATE / len(samples) == pytest.approx(440 * 11840 / 11025, abs=3)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('plain', ['plain']),
        ('one*AOtwo', ['one', 'two']),
        ('one*GDtwo*WTthree', [None, 'two', 'three']),
        ('*FLtext', ['', 'text']),
        ('end*FR', ['end']),
        ('walk*XY00(237,112)on', ['walk', 'on']),
    ],
)
def test_queen_parts(text, expected):
    assert queen.parts(text) == expected


def test_queen_refuses_another_file(tmp_path):
    write(tmp_path / queen.RESOURCE_FILE, b'x' * 64)
    with pytest.raises(DataError, match='not the resource file'):
        list(queen.utterances({'flight-of-the-amazon-queen': tmp_path}))


# ---------------------------------------------------------------------------- the other formats


def test_festvox_ru(tmp_path):
    voice = tmp_path / festvox_ru.VOICE
    lines = '( ru_0001 "Прядь волос." )\n( ru_0002 "Да" )\n'
    write(voice / 'etc/txt.done.data', lines)
    for name in ('ru_0001', 'ru_0002'):
        write(voice / f'wav/{name}.wav', encoded(tone(0.5), RATE, 'WAV'))
    found = list(festvox_ru.utterances({'festvox-ru': tmp_path}))
    assert [u.id for u in found] == ['ru_0001', 'ru_0002']
    assert found[1].text == 'Да' and found[1].group == 'ru_0002' and found[1].language == 'ru'
    assert len(decode.decode(found[0])) == 8000


def test_festvox_ru_drops_stress_marks(tmp_path):
    write(tmp_path / festvox_ru.VOICE / 'etc/txt.done.data', '( a "вол+ос" )\n')
    write(tmp_path / festvox_ru.VOICE / 'wav/a.wav', b'')
    assert next(festvox_ru.utterances({'festvox-ru': tmp_path})).text == 'волос'


def test_fillets(tmp_path):
    game = tmp_path / 'usr/share/games/fillets-ng'
    first = 'dialogId("b-m", "font_small", "A \\"x\\"")\ndialogStr("Řekl \\"ano\\".")\n\n'
    second = 'dialogId("c-v", "font_big", "B")\n\ndialogStr("Level %1")\n'
    write(game / 'script/aztec/dialogs_cs.lua', first + second)
    write(game / 'script/aztec/dialogs_nl.lua', first.replace('Řekl', 'Zei'))
    ogg = encoded(tone(0.5, 22050), 22050, 'OGG')
    for path in ('aztec/cs/b-m.ogg', 'aztec/cs/c-v.ogg', 'aztec/cs/splash.ogg', 'bath/cs/b-m.ogg'):
        write(game / 'sound' / path, ogg)
    roots = {'fillets-ng-data': tmp_path, 'fillets-ng-data-cs': tmp_path}
    found = {u.id: u for u in fillets.utterances(roots, 'cs')}
    assert set(found) == {'aztec__b-m', 'aztec__c-v', 'bath__b-m'}  # the splash is an effect
    assert found['aztec__b-m'].text == 'Řekl "ano".'
    assert found['aztec__b-m'].speaker == 'fillets_cs_small'
    assert found['aztec__c-v'].text is None  # a placeholder
    assert found['bath__b-m'].text == 'Řekl "ano".' and found['bath__b-m'].group == 'bath'
    assert len(decode.decode(found['aztec__b-m'])) == pytest.approx(8000, abs=2)


def test_tuxpaint(tmp_path):
    stamps = tmp_path / tuxpaint.STAMPS / 'animals'
    stereo = np.stack([tone(0.5, 44100), 0 * tone(0.5, 44100)], axis=1)
    for name in ('frog_desc_ca.ogg', 'frog_desc_ro.ogg', 'frog.ogg'):
        write(stamps / name, encoded(stereo, 44100, 'OGG'))
    found = list(tuxpaint.utterances({'tuxpaint-stamps-default': tmp_path}))
    assert [(u.id, u.language, u.text) for u in found] == [
        ('ca__animals__frog', 'ca', None),
        ('ro__animals__frog', 'ro', None),
    ]
    assert {u.group for u in found} == {'animals/frog'}
    samples = decode.decode(found[0])
    assert len(samples) == pytest.approx(8000, abs=2)
    assert np.abs(samples).max() == pytest.approx(0.15 * 32768, rel=0.1)  # the mean of channels


def test_prompts_without_header(tmp_path):
    sounds = tmp_path / 'usr/share/asterisk/sounds/es'
    gsm = encoded(tone(0.4, 8000), 8000, 'RAW', subtype='GSM610')
    for name in ('hola.gsm', 'digits/1.gsm', 'silence/1.gsm', 'beep.gsm', 'notes.txt'):
        write(sounds / name, gsm)
    found = list(prompts.utterances({'p': tmp_path}, 'p', 'july', 'es'))
    assert [u.id for u in found] == ['es__digits__1', 'es__hola']
    samples = decode.decode(found[1])
    assert len(samples) == pytest.approx(0.4 * RATE, abs=2 * 320)  # GSM frames are 20 ms
    peak = np.argmax(np.abs(np.fft.rfft(samples))) * RATE / len(samples)
    assert peak == pytest.approx(440, abs=5)


def test_undecodable_and_empty_audio_have_reasons():
    base = Utterance('x', b'no audio at all', 'ogg', None, 's', 'g', 'en')
    with pytest.raises(BadAudio) as unreadable:
        decode.decode(base)
    assert unreadable.value.reason == 'unreadable'
    empty = encoded(np.zeros(0, 'f4'), RATE, 'WAV')
    with pytest.raises(BadAudio) as nothing:
        decode.decode(Utterance('x', empty, 'wav', None, 's', 'g', 'en'))
    assert nothing.value.reason == 'empty'


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('  two   words ', 'two words'),
        ("It's  fine.", "It's fine."),
        ('24 Hours', None),
        ('<gulp>', None),
        ('Hello (sigh)', None),
        ('...', None),
        ('', None),
    ],
)
def test_spoken(text, expected):
    assert spoken(text) == expected


def test_safe_id_is_a_file_name():
    assert safe_id("digits/o'clock one") == 'digits__o_clock_one'
