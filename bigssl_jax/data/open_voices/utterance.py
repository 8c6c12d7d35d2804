"""What every reader of a package format yields, and the rules for texts that all of them share."""

from __future__ import annotations

import dataclasses
import re

MARKUP = re.compile(r'[0-9()<>\[\]{}&#$%/\\@*_^=+|~]')


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One recording as a package holds it.

    Attributes:
      id: unique within its set; letters, digits, `-` and `_` of the package's own name for it.
      audio: the encoded bytes.
      encoding: 'mp3', 'ogg', 'wav', 'g722' or 'gsm'; the last two have no header.
      text: what is said, or None when that is not known.
      speaker: unique over all sets; a person who speaks in several sets has one name.
      group: the scene: neighbours of one group are never split between training and test.
      language: ISO 639-1 code.
      sample_rate: Hz; given where the header states a wrong rate, else None.
    """

    id: str
    audio: bytes
    encoding: str
    text: str | None
    speaker: str
    group: str
    language: str
    sample_rate: int | None = None


def spoken(text: str) -> str | None:
    """The text with single spaces, or None unless it says for sure what is heard.

    Digits can be read in several ways ("1945", "24 Hours"), and brackets or signs mark a noise
    ("<sneeze>") or a placeholder: such a recording is kept, but as unlabelled speech.
    """
    text = ' '.join(text.split())
    return text if any(map(str.isalpha, text)) and not MARKUP.search(text) else None


def safe_id(text: str) -> str:
    """`text` as part of a file name: anything but letters, digits, `.`, `-`, `_` becomes `_`."""
    return re.sub(r'[^\w.-]', '_', text.replace('/', '__'))
