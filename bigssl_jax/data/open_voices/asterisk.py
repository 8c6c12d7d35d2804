"""Asterisk core sounds: one voice reads the prompts of a telephone exchange, 16 kHz.

`asterisk-core-sounds-XX` holds the texts, gzipped, one prompt a line, `;` starts a comment:

    agent-loginok: Agent logged in.
    letters/at: at [@]
    beep: [this is a simple beep tone]

`asterisk-core-sounds-XX-g722` holds `sounds/<voice>/<prompt>.g722`: raw ITU-T G.722 at 64 kbit/s,
no header. Prompts that are only a bracketed note are tones or silence and are left out.
"""

from __future__ import annotations

import gzip
import pathlib
import re
from collections.abc import Iterator, Mapping

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.open_voices.utterance import Utterance, safe_id, spoken

SIGN_IN_BRACKETS = re.compile(r'\[[^\w\]]*\]')  # "at [@]"
ENGLISH_SIGNS = {'*': ' star ', '#': ' pound '}  # as this voice says them
ENGLISH_DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


def prompt_texts(path: pathlib.Path) -> dict[str, str]:
    """Reads a gzipped text list into prompt name -> text as written."""
    texts = {}
    with gzip.open(path, 'rt', encoding='utf-8-sig', errors='replace') as file:
        for line in file:
            name, colon, text = line.partition(':')
            if colon and not line.startswith(';'):
                name = name.strip()
                texts[name] = text.strip().removeprefix(f'{name}:').strip()
    return texts


def clean(text: str, language: str) -> str | None:
    """What the voice says, or None when the text does not tell.

    A sign in brackets goes. In English `*`, `#` and single digits are spelt ("press 1"). Longer
    numbers, digits in other languages and words in brackets leave the prompt without text.
    """
    text = SIGN_IN_BRACKETS.sub(' ', text)
    if language == 'en':
        for sign, word in ENGLISH_SIGNS.items():
            text = text.replace(sign, word)
        text = re.sub(r'(?<![\w.])\d(?!\w|\.\d)', lambda m: ENGLISH_DIGITS[int(m[0])], text)
    return spoken(text)


def utterances(roots: Mapping[str, pathlib.Path], language: str) -> Iterator[Utterance]:
    """Yields the prompts of `language` that have a text list entry, sorted by name.

    `roots` holds the folders of the two packages. Raises DataError when they hold no prompts.
    """
    package = f'asterisk-core-sounds-{language}'
    lists = sorted(roots[package].glob('usr/share/doc/*/core-sounds-*.txt.gz'))
    folders = sorted(roots[f'{package}-g722'].glob('usr/share/asterisk/sounds/*_*'))
    if not lists or not folders:
        raise DataError(f'{roots[package]}: no Asterisk text list or sound folder found')
    texts = prompt_texts(lists[0])
    voice = folders[0].name.split('_')[-1].lower()
    for path in sorted(folders[0].rglob('*.g722')):
        prompt = path.relative_to(folders[0]).with_suffix('').as_posix()
        text = texts.get(prompt) or texts.get(prompt.split('/', 1)[-1])
        if not text or text[0] in '[(<':
            continue
        yield Utterance(
            id=safe_id(prompt),
            audio=path.read_bytes(),
            encoding='g722',
            text=clean(text, language),
            speaker=f'asterisk_{voice}',
            group=prompt,
            language=language,
        )
