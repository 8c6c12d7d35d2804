"""ARPA files: n-gram language models as text, read, written, evaluated and used on n-best lists.

    \\data\\                     how many n-grams of each order follow
    ngram 1=4
    ngram 2=3

    \\1-grams:                  log10 P(w), the words, log10 backoff weight of the words as context
    -0.60   the     -0.30
    ...
    \\2-grams:                  log10 P(w | the)
    -0.40   the cat
    ...
    \\end\\

    P(w | h) = the entry "h w", where there is one, else backoff(h) P(w | h without its first word)

A context without an entry has the backoff weight 1.  Unknown words are scored as `<unk>`; a model
that has none gives them 10^-100, as KenLM does.
"""

import dataclasses
import gzip
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from bigssl_jax.config import UserError

START, END, UNKNOWN = '<s>', '</s>', '<unk>'
UNKNOWN_LOG10 = -100.0
LN10 = math.log(10.0)

Ngram = tuple[str, ...]
_COUNT = re.compile(r'ngram\s+(\d+)\s*=\s*(\d+)')


@dataclasses.dataclass(frozen=True)
class Arpa:
    """An n-gram model in memory.

    Attributes:
      entries: per order, words -> (log10 probability, log10 backoff weight or None).
      lines: per order, words -> line of the file; empty for a model that was not read.
      name: of the file, for messages.
    """

    entries: tuple[Mapping[Ngram, tuple[float, float | None]], ...]
    lines: tuple[Mapping[Ngram, int], ...] = ()
    name: str = 'n-gram model'

    @property
    def order(self) -> int:
        """Length of the longest n-grams."""
        return len(self.entries)

    def log10_probability(self, context: Sequence[str], word: str) -> float:
        """log10 P(word | context), by the recursion above."""
        context = tuple(context)[max(len(context) - self.order + 1, 0) :]
        ngram = (*context, word)
        if ngram in self.entries[len(context)]:
            return self.entries[len(context)][ngram][0]
        if not context:
            return UNKNOWN_LOG10 if word == UNKNOWN else self.log10_probability((), UNKNOWN)
        backoff = self.entries[len(context) - 1].get(context, (0.0, None))[1]
        return (backoff or 0.0) + self.log10_probability(context[1:], word)

    def sentence(self, words: Sequence[str]) -> tuple[float, int]:
        """(ln P(<s> words </s>), number of words that are not in the vocabulary)."""
        known = [word if (word,) in self.entries[0] else UNKNOWN for word in words]
        unknown = sum((word,) not in self.entries[0] for word in words)
        text = [START, *known, END]
        total = sum(self.log10_probability(text[:i], text[i]) for i in range(1, len(text)))
        return total * LN10, unknown


def read_arpa(path: str | os.PathLike) -> Arpa:
    """Reads an ARPA file, plain or gzipped (.gz).

    Raises:
      UserError: it cannot be read, or is not a whole ARPA file: file, line and reason.
    """
    path = pathlib.Path(path)
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as file:
            model = _Reader(str(path), file).read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{path}: cannot be read as an ARPA file: {reason}') from error
    _check_contexts(model)
    return model


class _Reader:
    """Lines of one file, numbered, and the grammar above."""

    def __init__(self, name: str, lines: Iterator[str]):
        self.name, self._lines, self.number = name, lines, 0

    def read(self) -> Arpa:
        counts = self._header()
        entries: list[dict[Ngram, tuple[float, float | None]]] = []
        numbers: list[dict[Ngram, int]] = []
        for order, count in enumerate(counts, 1):
            found, where = self._section(order, count, order == len(counts))
            entries.append(found)
            numbers.append(where)
        line = self._next()
        if line != '\\end\\':
            raise self.error(f'{line!r} stands where \\end\\ must follow the last n-gram')
        return Arpa(tuple(entries), tuple(numbers), self.name)

    def error(self, reason: str) -> UserError:
        return UserError(f'{self.name}:{self.number}: {reason}')

    def _next(self) -> str:
        """The next line that is not empty, without the white space around it."""
        for line in self._lines:
            self.number += 1
            line = line.strip(' \t\r\n')
            if line:
                return line
        raise self.error('the file ends before \\end\\; it is not complete')

    def _header(self) -> list[int]:
        line = self._next()
        if line != '\\data\\':
            raise self.error(
                f'an ARPA file begins with \\data\\, this one with {line[:40]!r};'
                ' binary KenLM files must be converted from their ARPA text'
            )
        counts: list[int] = []
        while (line := self._next()) != '\\1-grams:':
            match = _COUNT.fullmatch(line)
            if not match or int(match[1]) != len(counts) + 1:
                raise self.error(f'{line!r} must be "ngram {len(counts) + 1}=COUNT"')
            counts.append(int(match[2]))
        if not counts:
            raise self.error('\\data\\ announces no n-grams')
        return counts

    def _section(
        self, order: int, count: int, highest: bool
    ) -> tuple[dict[Ngram, tuple[float, float | None]], dict[Ngram, int]]:
        if order > 1 and (line := self._next()) != f'\\{order}-grams:':
            raise self.error(
                f'{line[:60]!r} stands where \\{order}-grams: must begin: \\data\\ announces fewer'
                f' {order - 1}-grams than there are, or a section is missing'
            )
        entries: dict[Ngram, tuple[float, float | None]] = {}
        lines: dict[Ngram, int] = {}
        for seen in range(count):
            line = self._next()
            if line.startswith('\\') and line.endswith(('-grams:', '\\end\\')):
                raise self.error(
                    f'\\data\\ announces {count} {order}-grams, but there are {seen}'
                    f' before {line!r}'
                )
            ngram, value = self._entry(line, order, highest)
            if ngram in entries:
                raise self.error(f'{" ".join(ngram)!r} stands here a second time')
            entries[ngram], lines[ngram] = value, self.number
        return entries, lines

    def _entry(
        self, line: str, order: int, highest: bool
    ) -> tuple[Ngram, tuple[float, float | None]]:
        parts = [part for part in re.split(r'[ \t]+', line) if part]
        allowed = (order + 1,) if highest else (order + 1, order + 2)
        if len(parts) not in allowed:
            raise self.error(
                f'{line[:60]!r} has {len(parts)} columns; a {order}-gram has'
                f' {" or ".join(map(str, allowed))}: log10 probability, {order} words'
                f'{"" if highest else ", log10 backoff weight"}'
            )
        try:
            probability = float(parts[0])
            backoff = float(parts[-1]) if len(parts) == order + 2 else None
        except ValueError:
            raise self.error(f'{line[:60]!r} has no number where one must be') from None
        if not probability <= 0.0 or math.isnan(backoff or 0.0):
            raise self.error(f'log10 probability {parts[0]} must be 0 or below')
        return tuple(parts[1 : order + 1]), (probability, backoff)


def _check_contexts(model: Arpa) -> None:
    """Every context of a longer n-gram is an entry with a backoff weight."""
    for order in range(1, model.order):
        for ngram, line in model.lines[order].items():
            context = ngram[:-1]
            entry = model.entries[order - 1].get(context)
            if entry is None:
                raise UserError(
                    f'{model.name}:{line}: {" ".join(ngram)!r} needs an entry'
                    f' {" ".join(context)!r} among the {order}-grams; there is none'
                )
            if entry[1] is None:
                raise UserError(
                    f'{model.name}:{model.lines[order - 1][context]}: {" ".join(context)!r} needs a'
                    f' backoff weight, because {" ".join(ngram)!r} (line {line}) begins with it'
                )


def write_arpa(model: Arpa, path: str | os.PathLike) -> None:
    """Writes a model atomically, gzipped if the name ends in .gz.

    Raises:
      UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with (gzip.open if path.suffix == '.gz' else open)(
            temporary, 'wt', encoding='utf-8'
        ) as file:
            file.write('\\data\\\n')
            for order, entries in enumerate(model.entries, 1):
                file.write(f'ngram {order}={len(entries)}\n')
            for order, entries in enumerate(model.entries, 1):
                file.write(f'\n\\{order}-grams:\n')
                for ngram, (probability, backoff) in sorted(entries.items()):
                    tail = '' if backoff is None else f'\t{backoff:.7g}'
                    file.write(f'{probability:.7g}\t{" ".join(ngram)}{tail}\n')
            file.write('\n\\end\\\n')
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror or error}') from error


@dataclasses.dataclass(frozen=True)
class Rescored:
    """An n-best list in its new order.

    Attributes:
      order: indices into the list that was given, best first.
      scores: score + weight ln P(text) + word_reward words, in that order.
      log_probability: ln P(text) of the n-gram model, in that order.
      words, unknown_words: counts over the whole list; unknown ones were scored as <unk>.
    """

    order: list[int]
    scores: list[float]
    log_probability: list[float]
    words: int
    unknown_words: int


def rescore(
    model: Arpa,
    texts: Sequence[str],
    scores: Sequence[float],
    weight: float,
    word_reward: float = 0.0,
    split: Callable[[str], list[str]] = str.split,
) -> Rescored:
    """Ranks one utterance's n-best list again with a word-level model, on the host.

    Args:
      model: over words.
      texts: hypotheses.
      scores: of the search, natural logarithms.
      weight: of the model's natural log-probability.
      word_reward: added per word, because every factor of the model makes a text less probable.
      split: text into the model's words.
    """
    if len(texts) != len(scores):
        raise ValueError(f'rescore: {len(texts)} texts but {len(scores)} scores')
    sentences = [split(text) for text in texts]
    found = [model.sentence(words) for words in sentences]
    totals = [
        score + weight * log_probability + word_reward * len(words)
        for score, (log_probability, _), words in zip(scores, found, sentences, strict=True)
    ]
    order = sorted(range(len(texts)), key=lambda i: -totals[i])
    return Rescored(
        order=order,
        scores=[totals[i] for i in order],
        log_probability=[found[i][0] for i in order],
        words=sum(map(len, sentences)),
        unknown_words=sum(unknown for _, unknown in found),
    )
