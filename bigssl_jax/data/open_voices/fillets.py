"""Fish Fillets NG: a puzzle game whose fish talk, in Czech and Dutch, 22 kHz Ogg Vorbis.

Each level has a script folder with dialogues per language and a sound folder per language:

    script/<level>/dialogs_cs.lua       dialogId("bot-m-vidis", "font_small", "Can you see ...?")
                                        dialogStr("Vidíš toho koníka?")
    sound/<level>/cs/bot-m-vidis.ogg

The font names who speaks (font_small and font_big are the two fish). A sound without a dialogue of
its level takes the text of the same name in another level (levels share lines); one without any is
an effect and is left out.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from bigssl_jax.data.open_voices.utterance import Utterance, safe_id, spoken

QUOTED = r'"((?:[^"\\]|\\.)*)"'
DIALOGUE = re.compile(
    rf'dialogId\({QUOTED},\s*{QUOTED},\s*{QUOTED}\)\s*dialogStr\({QUOTED}\)', re.DOTALL
)


class Line(NamedTuple):
    """One line of dialogue: the font names the speaker."""

    font: str
    text: str


def dialogues(lua: str) -> dict[str, Line]:
    """Reads a dialogue script into sound name -> Line."""
    return {
        name: Line(font, re.sub(r'\\(.)', r'\1', text))
        for name, font, _, text in DIALOGUE.findall(lua)
    }


def utterances(roots: Mapping[str, pathlib.Path], language: str) -> Iterator[Utterance]:
    """Yields the spoken lines of `language`, by level; the group is the level."""
    game = 'usr/share/games/fillets-ng'
    scripts = roots['fillets-ng-data'] / game / 'script'
    sounds = roots[f'fillets-ng-data-{language}'] / game / 'sound'
    levels: dict[str, dict[str, Line]] = {}
    anywhere: dict[str, Line] = {}
    for path in sorted(scripts.rglob(f'dialogs_{language}.lua')):
        levels[path.parent.name] = dialogues(path.read_text(encoding='utf-8'))
        anywhere |= levels[path.parent.name]
    for path in sorted(sounds.rglob('*.ogg')):
        level = path.relative_to(sounds).parts[0]
        line = levels.get(level, {}).get(path.stem) or anywhere.get(path.stem)
        if line is None:
            continue
        yield Utterance(
            id=safe_id(f'{level}__{path.stem}'),
            audio=path.read_bytes(),
            encoding='ogg',
            text=spoken(line.text),
            speaker=f'fillets_{language}_{line.font.removeprefix("font_") or "other"}',
            group=level,
            language=language,
        )
