"""Asterisk prompts of other voices, without texts: 8 kHz GSM or WAV, unlabelled speech.

The packages hold `usr/share/asterisk/sounds/<voice or language>/[folder/]<prompt>.gsm|wav`. GSM
06.10 files are raw frames without a header. `silence/` and tones are left out.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping

from bigssl_jax.data.open_voices.utterance import Utterance, safe_id

ENCODINGS = {'.gsm': 'gsm', '.wav': 'wav'}
NO_SPEECH = ('silence', 'beep', 'tone', 'monkeys')


def utterances(
    roots: Mapping[str, pathlib.Path], package: str, speaker: str, language: str
) -> Iterator[Utterance]:
    """Yields every prompt of `package` once, sorted by name."""
    sounds = roots[package] / 'usr/share/asterisk/sounds'
    for path in sorted(sounds.rglob('*')):
        prompt = path.relative_to(sounds).with_suffix('').as_posix()
        if path.suffix not in ENCODINGS or any(word in prompt for word in NO_SPEECH):
            continue
        yield Utterance(
            id=safe_id(prompt),
            audio=path.read_bytes(),
            encoding=ENCODINGS[path.suffix],
            text=None,
            speaker=speaker,
            group=prompt,
            language=language,
        )
