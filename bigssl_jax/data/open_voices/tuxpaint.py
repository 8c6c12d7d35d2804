"""Tux Paint stamps: volunteers name animals and things in many languages, 44 kHz Ogg Vorbis.

Beside the picture `stamps/<folder>/<stamp>.png` lie `<stamp>_desc_<language>.ogg` and the texts
shown on the screen, `<stamp>.txt`. The text is often longer than what is said, so the recordings
are taken as unlabelled. Several volunteers may hide behind one language.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping

from bigssl_jax.data.open_voices.utterance import Utterance, safe_id

STAMPS = 'usr/share/tuxpaint/stamps'
RECORDING = re.compile(r'(?P<stamp>.+)_desc_(?P<language>[a-z]{2})$')


def utterances(roots: Mapping[str, pathlib.Path]) -> Iterator[Utterance]:
    """Yields every spoken description; the group is the stamp, shared by all languages."""
    stamps = roots['tuxpaint-stamps-default'] / STAMPS
    for path in sorted(stamps.rglob('*_desc_*.ogg')):
        match = RECORDING.match(path.relative_to(stamps).with_suffix('').as_posix())
        if match is None:
            continue
        yield Utterance(
            id=safe_id(f'{match["language"]}__{match["stamp"]}'),
            audio=path.read_bytes(),
            encoding='ogg',
            text=None,
            speaker=f'tuxpaint_{match["language"]}',
            group=match['stamp'],
            language=match['language'],
        )
