"""Named text normalisers: one rule for references, training text and teacher output alike.

    name       "Don't panic, Mr. O’Neil — it's 7!"   ->
    none       Don't panic, Mr. O’Neil — it's 7!       only runs of white space become one space
    basic      dont panic mr oneil its 7               lower case, no punctuation, any script
    english    don't panic mr o'neil it's 7            basic, but apostrophes within words stay

Digits are kept as they are, and no normaliser guesses how they were spoken ("1984" has four
readings). A model with a spoken vocabulary cannot learn them: `is_spoken` is False for such lines
under 'english', and streams and tokenizer training leave them out and count them.

For scoring alone there is 'whisper-english', the rules of Whisper (arXiv 2212.04356, appendix C) as
the package `whisper-normalizer` has them: spelt numbers become digits, contractions and British
spellings are rewritten, fillers and brackets dropped ("Mr. O'Neil's 21" and "mister o neil is
twenty one" are equal). Published word error rates often use it; no one speaks what it writes, so
nothing learns from it.
"""

import functools
import re
import unicodedata
from collections.abc import Callable

from bigssl_jax.data.errors import DataError

NORMALISERS = ('none', 'basic', 'english')
SCORING_NORMALISERS = (*NORMALISERS, 'whisper-english')

_SPACES = re.compile(r'\s+')
_APOSTROPHES = dict.fromkeys(map(ord, '\u2018\u2019\u02bc\u02bb\u2032\u00b4\uff07'), "'")
_LONE_APOSTROPHE = re.compile(r"(?<!\w)'+|'+(?!\w)")


def normalise_text(text: str, name: str) -> str:
    """Text as the named normaliser writes it; idempotent.

    Args:
      text: any text.
      name: one of `NORMALISERS`.

    Raises:
      DataError: unknown name.
    """
    check_normaliser(name)
    if name == 'none':
        return _SPACES.sub(' ', text).strip()
    # NFKC folds ligatures and full-width forms; again after lowering, which can undo it.
    text = unicodedata.normalize('NFKC', text)
    text = unicodedata.normalize('NFKC', text.lower())
    if name == 'english':
        text = text.translate(_APOSTROPHES)
        text = ''.join(c if c == "'" else _letters_only(c) for c in text)
        text = _LONE_APOSTROPHE.sub(' ', text)
    else:
        text = ''.join(map(_letters_only, text.translate(_APOSTROPHES)))
    return _SPACES.sub(' ', text).strip()


def scoring_normaliser(name: str) -> Callable[[str], str]:
    """The function that scoring applies to references and hypotheses alike.

    Args:
      name: one of `SCORING_NORMALISERS`.

    Raises:
      DataError: unknown name, or a package that it needs is not installed.
    """
    _check(name, SCORING_NORMALISERS)
    if name != 'whisper-english':
        return functools.partial(normalise_text, name=name)
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise DataError(
            "normaliser 'whisper-english' needs the package whisper-normalizer, which is not"
            " installed: pip install 'bigssl-jax[whisper]'"
        ) from None
    return EnglishTextNormalizer()


def is_spoken(text: str, name: str) -> bool:
    """Whether normalised text is what was said, letter by letter: no digits under 'english'."""
    return name != 'english' or not any(c.isdigit() for c in text)


def check_normaliser(name: str) -> None:
    """Raises DataError unless `name` is a normaliser."""
    _check(name, NORMALISERS)


def _check(name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise DataError(f'normaliser is {name!r}, must be one of {", ".join(allowed)}')


def _letters_only(character: str) -> str:
    """Letters, their combining marks and digits as they are; apostrophes nothing; else a space."""
    if character == "'":
        return ''
    return character if unicodedata.category(character)[0] in 'LMN' else ' '
