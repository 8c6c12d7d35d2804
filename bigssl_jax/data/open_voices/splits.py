"""Which utterance is for training and which for testing: by scene, the same on every machine.

A keyed hash of (set, group) gives each group a fixed place in [0, 1); the first tenth is 'test',
the next twentieth 'dev', the rest 'train'. No group is ever divided, and new material moves none:

    0        0.10   0.15                                1
    |  test  | dev  |             train                 |

Scenes keep neighbouring lines together, but short lines ("Okay.") come back in many scenes. A dev
or test line whose text also occurs in training is marked `seen`, to be left out of scoring.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

from bigssl_jax.data.manifest import Entry

KEY = b'open_voices splits 1'  # another key is another split: change the sets' version with it
TEST_SHARE = 0.10
DEV_SHARE = 0.05


def place(set_name: str, group: str) -> float:
    """The place of a group in [0, 1): blake2b keyed by KEY, as a fraction of 2^64."""
    digest = hashlib.blake2b(f'{set_name}/{group}'.encode(), key=KEY, digest_size=8).digest()
    return int.from_bytes(digest, 'big') / 2**64


def split_of(set_name: str, group: str) -> str:
    """'train', 'dev' or 'test'; a pure function of the two names."""
    at = place(set_name, group)
    if at < TEST_SHARE:
        return 'test'
    return 'dev' if at < TEST_SHARE + DEV_SHARE else 'train'


def comparable(text: str) -> str:
    """`text` for comparison: lower case, without punctuation, single spaces.

    Stricter scoring rules only ever make fewer texts equal than this one does.
    """
    text = unicodedata.normalize('NFKC', text).casefold().replace('’', "'")
    return ' '.join(re.sub(r"[^\w' ]", ' ', text).replace("'", '').split())


def mark_seen(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Sets `seen` on dev and test entries whose text a training entry of their language has too."""
    training = {
        (entry.language, comparable(entry.text))
        for entry in entries
        if entry.text and entry.split == 'train'
    }
    for entry in entries:
        key = (entry.language, comparable(entry.text or ''))
        yield dataclasses.replace(entry, seen=entry.split != 'train' and key in training)
