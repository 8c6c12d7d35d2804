"""Flight of the Amazon Queen: an English adventure game, voiced throughout, in one resource file.

The talkie release as ScummVM plays it (Debian: flight-of-the-amazon-queen). What follows was learnt
from the file and from how ScummVM's "queen" engine behaves with it; all integers are big-endian.

Resource file `queen.1c`: a header `QTBL`, a version text and the number of resources, then a table
of (name, bundle, offset, size). The resources that matter here:

    *.SB         one spoken line: MP3, 16 kbit/s. The headers say 11,025 Hz, but the recordings ran
                 at 11,840 Hz and are played so.
    *.DOG        one dialogue with one person: that person's lines ('P') and the answers of the
                 hero, Joe ('J'), each with a number.
    *.CUT        one cutaway (a film scene): objects in order of appearance, most of which speak.
    QUEEN.JAS    counts and the table of objects (name, place, image).
    QUEEN2.JAS   all other texts, one a line: descriptions that Joe speaks, names, rooms, verbs,
                 Joe's stock answers.

A text is spoken in parts: a `*` command within it (turn left, pause, walk) ends a part, and every
part has a sound of its own, counted from 1 in hexadecimal. So the third part of what the person of
dialogue 9 says under number 0x2A is `09002AP3.SB`:

    dialogue     %2d talk key, %4x number, P or J, %x part      (blanks become 0)
    greeting     the same with SSSS (Joe starts), XXXX (they part) for the number
    cutaway      the name, filled to 5 letters by `_`, %02d object, %x part
    description  JOE, %04d number, %x part

The group of an utterance is the dialogue, the cutaway, or eight neighbouring descriptions.
"""

from __future__ import annotations

import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.open_voices.utterance import Utterance, spoken

RESOURCE_FILE = 'usr/share/scummvm/flight-of-the-amazon-queen/queen.1c'
TRUE_SAMPLE_RATE = 11840

FILE_HEADER = struct.Struct('>4s 9s H')  # 'QTBL', version, number of resources
TABLE_ROW = struct.Struct('>12s B I I')  # name, bundle, offset, size
RESOURCE_HEADER = 20  # bytes before the content of .DOG, .CUT and QUEEN.JAS
TEXT_ENCODING = 'cp850'

# Dialogue: levels, unique key, talk key, numbers of Joe's and the person's lines, two game state
# conditions of three values; offsets of the person's lines, of a cutaway name, of the greetings.
DIALOGUE_HEADER = struct.Struct('>5h 6h 3H')
DIALOGUE_TREE = 32  # offset of the tree of choices
DIALOGUE_LEVEL = 96  # bytes of one level of the tree; Joe's lines follow the last
LINE_HEADER = struct.Struct('>2h')  # unused, number

# Cutaway: panel, objects, two flags, offset of the texts, offset of the picture bank names.
CUTAWAY_HEADER = struct.Struct('>h h 2h H H')
CUTAWAY_OBJECT = struct.Struct('>17h')  # see `_Actor`
ANIMATION_FRAME = 20  # bytes; a frame that starts with ANIMATION_END ends the list
ANIMATION_END = -2

WORLD_HEADER = struct.Struct('>4H')  # numbers of rooms, names, objects, descriptions
WORLD_OBJECT = struct.Struct('>h 3H h H H h')  # name, x, y, description, entry, room, state, image
PERSON_IMAGES = (-3, -4)
JOE = 0  # the object number of the hero
TEXT_OBJECTS = (-2, -3, -4)  # a text without an object: spoken, or spoken and shown, or shown
NARRATOR_OBJECTS = (-2, -3)
NUM_VERBS = 12
NUM_ANSWERS = 40  # Joe's stock answers
DESCRIPTIONS_PER_GROUP = 8

COMMAND_MARK = '*'
WALK = 'XY'  # *XY00(237,112): walk there and go on
WALK_LENGTH = 11
SILENT_COMMANDS = ('GD', 'GM')  # Joe reaches down or forward: the text before is not spoken
TYPOGRAPHY = re.compile(r'\^_|@@')  # trade mark sign, music notes

# One person may be named in several ways: by dialogue file, by object name.
SAME_SPEAKER = {
    'joe_king': 'joe', 'princess_azura': 'azura', 'azura_obj': 'azura', 'trader_bob': 'bob',
    'anderson': 'and', 'witch_doctor': 'witch', 'zombie_woman': 'zombie',
    'bedraggled_prisoner': 'prin', 'mary_lou': 'lou', 'secretary': 'sec',
    'showering_amazon': 'showeram', 'wedgewood': 'wedge',
}  # fmt: skip


class Line(NamedTuple):
    """A text of the game: the name of its sounds without the part, who says it, in which scene."""

    sound: str
    text: str
    speaker: str
    scene: str


class Resources:
    """The resource file: `names`, and the bytes of each by `read`."""

    def __init__(self, path: pathlib.Path) -> None:
        self._data = path.read_bytes()
        magic, _, count = FILE_HEADER.unpack_from(self._data)
        if magic != b'QTBL':
            raise DataError(f'{path}: not the resource file of the game (starts with {magic!r})')
        self._table: dict[str, tuple[int, int]] = {}
        for row in range(count):
            at = FILE_HEADER.size + row * TABLE_ROW.size
            name, _, offset, size = TABLE_ROW.unpack_from(self._data, at)
            self._table[name.split(b'\0')[0].decode('ascii')] = (offset, size)
        self.names = list(self._table)

    def read(self, name: str, skip: int = 0) -> bytes:
        """The content of resource `name` from byte `skip` on."""
        offset, size = self._table[name]
        return self._data[offset + skip : offset + size]


def read_string(data: bytes, at: int, align: int = 2) -> tuple[str, int]:
    """Reads a text (length byte, characters, ends at a zero) -> (text, offset of what follows)."""
    length = data[at]
    if length == 0:
        return '', at + 1
    text = data[at + 1 : at + 1 + length].split(b'\0')[0].decode(TEXT_ENCODING)
    return text, -(-(at + 1 + length) // align) * align


def parts(text: str) -> list[str | None]:
    """Splits a text at its `*` commands into what each sound says; None where nothing sounds."""
    pieces: list[str | None] = []
    start = at = 0
    while (at := text.find(COMMAND_MARK, at)) >= 0:
        piece, at = text[start:at], at + 1
        if text.startswith(WALK, at):
            at += WALK_LENGTH
        pieces.append(None if text.startswith(SILENT_COMMANDS, at) else piece)
        start = at = at + 2
    return pieces + [text[start:]] if start < len(text) else pieces


def dialogue_lines(name: str, data: bytes) -> Iterator[Line]:
    """Yields the lines of a dialogue resource `name` (content without the resource header)."""
    header = DIALOGUE_HEADER.unpack_from(data)
    levels, _, talk_key, joe_count, person_count = header[:5]
    person_at, _, greetings_at = header[-3:]
    joe_at = DIALOGUE_TREE + abs(levels) * DIALOGUE_LEVEL  # negative: Joe cannot leave
    person = re.sub(r'\d+$', '', name.split('.')[0])
    for at, count, suffix in ((person_at, person_count, 'P'), (joe_at, joe_count, 'J')):
        for _ in range(count):
            _, number = LINE_HEADER.unpack_from(data, at)
            text, at = read_string(data, at + LINE_HEADER.size, align=4)
            speaker = 'joe' if suffix == 'J' else person
            yield Line(f'{talk_key:2d}{number & 0xFFFF:4x}{suffix}', text, speaker, name)
    _, joe_is_silent = LINE_HEADER.unpack_from(data, joe_at)
    if not joe_is_silent:
        text, _ = read_string(data, joe_at + LINE_HEADER.size)
        yield Line(f'{talk_key:2d}SSSSJ', text, 'joe', name)
    text, at = read_string(data, greetings_at)
    yield Line(f'{talk_key:2d}XXXXP', text, person, name)
    yield Line(f'{talk_key:2d}XXXXJ', read_string(data, at)[0], 'joe', name)


class World:
    """QUEEN.JAS and QUEEN2.JAS: the objects' names and images, and the loose texts."""

    def __init__(self, jas: bytes, texts: list[str]) -> None:
        rooms, names, objects, self.descriptions = WORLD_HEADER.unpack_from(jas)
        self._texts = texts
        self._answers_at = self.descriptions + names + rooms + NUM_VERBS
        table = (
            WORLD_OBJECT.unpack_from(jas, WORLD_HEADER.size + i * WORLD_OBJECT.size)
            for i in range(objects)
        )
        self._objects = dict(enumerate(((row[0], row[-1]) for row in table), start=1))

    def is_person(self, number: int) -> bool:
        return self._objects[number][1] in PERSON_IMAGES

    def become(self, number: int, other: int) -> None:
        """Object `number` takes the name and image of `other`, as a cutaway may ask."""
        self._objects[number] = self._objects[other]

    def speaker(self, number: int) -> str:
        """Who speaks for object `number` of a cutaway; negative: not an object."""
        if number == JOE:
            return 'joe'
        if number < 0:
            return 'narr' if number in NARRATOR_OBJECTS else 'unknown'
        name = abs(self._objects[number][0])
        return self._texts[self.descriptions + name - 1].strip() if name else 'unknown'

    def joe_lines(self) -> Iterator[Line]:
        """Yields Joe's stock answers, then his descriptions; they are numbered through."""
        answers = self._texts[self._answers_at : self._answers_at + NUM_ANSWERS]
        for number, text in enumerate(answers + self._texts[: self.descriptions], start=1):
            yield Line(f'JOE{number:04d}', text, 'joe', f'JAS{number // DESCRIPTIONS_PER_GROUP}')


class _Actor(NamedTuple):
    """One object of a cutaway."""

    number: int
    animation: int
    execute: int
    copy_of: int

    @classmethod
    def read(cls, data: bytes, at: int) -> _Actor:
        values = CUTAWAY_OBJECT.unpack_from(data, at)
        return cls(values[0], values[4], values[5], values[12])

    def is_animated(self, world: World) -> bool:
        """Whether frames of an animation follow in the file; may rename the object in `world`."""
        if self.copy_of > 0:
            if self.number != self.copy_of:
                world.become(self.number, self.copy_of)
            return False
        if self.number in TEXT_OBJECTS or not self.execute:
            return False
        if self.number == JOE:
            return bool(self.animation)
        person = self.number > 0 and world.is_person(self.number)
        return bool(self.animation) or not person


def cutaway_lines(name: str, data: bytes, world: World) -> Iterator[Line]:
    """Yields the lines of a cutaway resource `name` (content without the resource header)."""
    _, count, _, _, texts_at, _ = CUTAWAY_HEADER.unpack_from(data)
    _, text_at = read_string(data, texts_at)  # the first text is for the game's own use
    at = CUTAWAY_HEADER.size
    for index in range(1, abs(count) + 1):  # negative: the player cannot skip the scene
        actor = _Actor.read(data, at)
        at += CUTAWAY_OBJECT.size
        at += 2 + 2 * _int16(data, at)  # how many people to turn on, and which
        if actor.is_animated(world):
            while _int16(data, at) != ANIMATION_END:
                at += ANIMATION_FRAME
            at += 2
        text, text_at = read_string(data, text_at)
        if text:
            sound = f'{name.split(".")[0]:_<5.5}{index:02d}'
            yield Line(sound, text, world.speaker(actor.number), name)


def _int16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], 'big', signed=True)


def lines(resources: Resources) -> Iterator[Line]:
    """Yields all texts of the game that may be spoken, in the order of the resource table."""
    texts = resources.read('QUEEN2.JAS').decode(TEXT_ENCODING).replace('\r', '').split('\n')
    world = World(resources.read('QUEEN.JAS', RESOURCE_HEADER), texts)
    for name in resources.names:
        if name.endswith('.DOG'):
            yield from dialogue_lines(name, resources.read(name, RESOURCE_HEADER))
        elif name.endswith('.CUT'):
            yield from cutaway_lines(name, resources.read(name, RESOURCE_HEADER), world)
    yield from world.joe_lines()


def canonical_speaker(name: str) -> str:
    """'Trader Bob' and 'BOB' -> 'bob'."""
    name = re.sub(r'\W+', '_', name).strip('_').lower()
    return SAME_SPEAKER.get(name, name)


def utterances(roots: Mapping[str, pathlib.Path]) -> Iterator[Utterance]:
    """Yields every sound whose text the game holds.

    `roots` holds the folder of the package. Texts with digits or stage directions ("<sneeze>") are
    left out; the recording stays, as unlabelled speech. Raises DataError for a damaged file.
    """
    path = roots['flight-of-the-amazon-queen'] / RESOURCE_FILE
    if not path.is_file():
        raise DataError(f'{path}: the resource file of the game is missing')
    resources = Resources(path)
    sounds = {name for name in resources.names if name.endswith('.SB')}
    for line in lines(resources):
        for number, text in enumerate(parts(line.text), start=1):
            sound = f'{line.sound}{number:x}'.replace(' ', '0').upper()
            if text is None or not text.strip() or f'{sound}.SB' not in sounds:
                continue
            sounds.remove(f'{sound}.SB')  # a line that comes twice sounds once
            yield Utterance(
                id=sound,
                audio=resources.read(f'{sound}.SB'),
                encoding='mp3',
                text=spoken(TYPOGRAPHY.sub('', text)),
                speaker=f'queen_{canonical_speaker(line.speaker)}',
                group=line.scene,
                language='en',
                sample_rate=TRUE_SAMPLE_RATE,
            )
