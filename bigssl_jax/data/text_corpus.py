"""Sentences for a language model, as token ids on disk: written once, mapped and not read.

    tokens.bin     ids of all sentences, one after the other, uint16 (or int32)
    offsets.npy    int64 [N + 1], where each sentence begins
    words.npy      int32 [N], its words
    text.json      counts, hashes, what was left out; written last

A text of a billion words is gone through once, a block of lines at a time.  Left out and counted:

    empty_text           nothing left after normalisation
    digits               text that does not say how it was spoken
    unknown_characters   letters that the tokenizer does not have
    too_many_tokens      more than `max_tokens`
"""

import array
import collections
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.selection import select
from bigssl_jax.data.text import is_spoken, normalise_text
from bigssl_jax.data.tokenizer import UNKNOWN, Tokenizer

_BLOCK = 1 << 14


def text_lines(paths: Sequence[str | os.PathLike]) -> Iterator[str]:
    """Lines of text files, in the order of the files; names that end in .gz are unpacked.

    Raises:
      DataError: a missing, damaged or foreign file; the message names it and its line.
    """
    for path in paths:
        opened = gzip.open if str(path).endswith('.gz') else open
        number = 0
        try:
            with opened(path, 'rb') as file:
                for line in file:
                    number += 1
                    yield line.decode('utf-8')
        except UnicodeDecodeError:
            raise DataError(f'{path}:{number} is not UTF-8; is it a text file?') from None
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, 'strerror', None) or error
            raise DataError(f'{path}: {reason} (after line {number})') from None


def transcripts(selection: Mapping[str, Any]) -> Iterator[str]:
    """The transcripts of a selection (see `selection.DEFAULTS`), in row order."""
    corpus = Corpus.open(selection['corpus'])
    column, rows = corpus.column('text'), select(corpus, selection)
    for start in range(0, len(rows), _BLOCK):
        yield from (t for t in column.take(rows[start : start + _BLOCK]).to_pylist() if t)


class TextCorpus:
    """An opened text corpus.

    Attributes:
      info: what text.json holds: sentences, tokens, words, excluded, tokenizer, sha256.
      offsets: int64 [N + 1].  words: int32 [N].
    """

    def __init__(self, directory: str | os.PathLike):
        path = pathlib.Path(directory)
        try:
            self.info: dict[str, Any] = json.loads((path / 'text.json').read_text())
        except (OSError, ValueError):
            raise DataError(f'{path} is no text corpus: text.json is missing or damaged') from None
        self._tokens = np.memmap(path / 'tokens.bin', self.info['dtype'], 'r')
        self.offsets = np.load(path / 'offsets.npy', mmap_mode='r')
        self.words = np.load(path / 'words.npy', mmap_mode='r')
        if self._tokens.size != self.info['tokens'] or len(self) != self.info['sentences']:
            raise DataError(f'{path} is damaged: its files are shorter than text.json says')

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tokens(self, row: int) -> np.ndarray:
        """Token ids of one sentence."""
        return self._tokens[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of sentences: int64 [N]."""
        return np.asarray(self.offsets[np.asarray(rows) + 1] - self.offsets[rows])


def write_text_corpus(
    directory: str | os.PathLike,
    lines: Iterable[str],
    tokenizer: Tokenizer,
    normaliser: str,
    max_tokens: int,
    what: str,
) -> TextCorpus:
    """Makes a text corpus, or opens it when it is there.

    Args:
      directory: made under a temporary name, then renamed.
      lines: one sentence each, raw.
      tokenizer, normaliser: how sentences become token ids.
      max_tokens: longer sentences are left out.
      what: names the text in messages.

    Raises:
      DataError: nothing is left; the message says why.
    """
    path = pathlib.Path(directory)
    if (path / 'text.json').exists():
        return TextCorpus(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtype = 'uint16' if tokenizer.vocabulary_size <= 1 << 16 else 'int32'
    excluded: collections.Counter = collections.Counter()
    digest, counts, words = hashlib.sha256(), array.array('i'), array.array('i')
    with (temporary / 'tokens.bin').open('wb') as file:
        for block in _blocks(lines):
            for text, ids in _usable(block, tokenizer, normaliser, max_tokens, excluded):
                content = np.asarray(ids, dtype).tobytes()
                file.write(content)
                digest.update(content)
                digest.update(b'\n')
                counts.append(len(ids))
                words.append(len(text.split()))
    if not counts:
        left_out = ', '.join(f'{n} {reason}' for reason, n in excluded.items()) or 'no lines'
        raise DataError(f'{what} holds no sentence to learn from ({left_out})')
    offsets = np.concatenate([[0], np.cumsum(np.asarray(counts), dtype=np.int64)])
    np.save(temporary / 'offsets.npy', offsets.astype(np.int64))
    np.save(temporary / 'words.npy', np.asarray(words, np.int32))
    info = {
        'sentences': len(counts), 'tokens': int(offsets[-1]), 'words': int(sum(words)),
        'excluded': dict(excluded), 'dtype': dtype, 'tokenizer': tokenizer.hash,
        'normaliser': normaliser, 'max_tokens': max_tokens, 'sha256': digest.hexdigest(),
    }  # fmt: skip
    (temporary / 'text.json').write_text(json.dumps(info, indent=1))
    temporary.rename(path)
    return TextCorpus(path)


def _blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(lines)
    while block := list(itertools.islice(iterator, _BLOCK)):
        yield block


def _usable(
    block: Sequence[str], tokenizer: Tokenizer, normaliser: str, max_tokens: int,
    excluded: collections.Counter,
) -> Iterator[tuple[str, list[int]]]:  # fmt: skip
    """(text, ids) of the lines that can be learned from; counts the others."""
    texts = [normalise_text(line, normaliser) for line in block]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if not text:
            excluded['empty_text'] += 1
        elif not is_spoken(text, normaliser):
            excluded['digits'] += 1
        elif UNKNOWN in ids:
            excluded['unknown_characters'] += 1
        elif len(ids) > max_tokens:
            excluded['too_many_tokens'] += 1
        else:
            yield text, ids
