"""festvox-ru: one Russian voice reads sentences of novels in a studio, 16 kHz WAV.

The transcripts are one Festival list a line; `+` marks the stressed vowel that follows and goes:

    ( ru_0002 "Она завела, прядь волнистых вол+ос за ухо ..." )
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping

from bigssl_jax.data.open_voices.utterance import Utterance, spoken

VOICE = 'usr/share/festival/voices/russian/msu_ru_nsh_clunits'
LINE = re.compile(r'^\( (\S+) "(.*)" \)\s*$', re.MULTILINE)


def utterances(roots: Mapping[str, pathlib.Path]) -> Iterator[Utterance]:
    """Yields the sentences in the order of the transcript; each is a group of its own."""
    voice = roots['festvox-ru'] / VOICE
    transcript = (voice / 'etc/txt.done.data').read_text(encoding='utf-8')
    for name, text in LINE.findall(transcript):
        yield Utterance(
            id=name,
            audio=(voice / 'wav' / f'{name}.wav').read_bytes(),
            encoding='wav',
            text=spoken(text.replace('+', '')),
            speaker='festvox_ru_nsh',
            group=name,
            language='ru',
        )
