"""Tokenizers: sentencepiece models, trained reproducibly, with a record of what they came from.

Ids are fixed: 0 pad (which CTC also uses as its blank), 1 eos, 2 unknown, no bos. The model file
embeds its training options but no path and no time, so equal text gives an equal file. Beside
`x.model` lies `x.model.json`: hashes of model and text, counts, options, library version.

Text reaches sentencepiece already normalised (`bigssl_jax.data.text`), so its own rule is
'identity'. 'char' models spell a space as one piece and add none in front; the other types keep
sentencepiece's leading space, which makes a word look the same at the start of a line.
"""

import collections
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.tensorflow_start import tensorflow
from bigssl_jax.data.text import check_normaliser, is_spoken, normalise_text

MODEL_TYPES = ('char', 'unigram', 'bpe')
PAD, EOS, UNKNOWN = 0, 1, 2


class Tokenizer:
    """A trained sentencepiece model; needs no TensorFlow. Thread-safe, picklable by path."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        try:
            with open(self.path, 'rb') as file:
                model = file.read()
        except OSError as error:
            raise DataError(f'tokenizer {self.path}: {error.strerror or error}') from None
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except Exception as error:
            raise DataError(
                f'tokenizer {self.path} is not a sentencepiece model: {error}'
            ) from None
        self.hash = hashlib.sha256(model).hexdigest()
        ids = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if ids != (PAD, EOS, UNKNOWN) or self._processor.bos_id() != -1:
            raise DataError(
                f'tokenizer {self.path} has (pad, eos, unk, bos) ='
                f' {ids + (self._processor.bos_id(),)}, must be (0, 1, 2, -1): train it here'
            )

    def __reduce__(self):
        return Tokenizer, (self.path,)

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, pad, eos and unknown included."""
        return self._processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        """Token ids of normalised text; unknown characters become id 2."""
        return self._processor.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in order."""
        return self._processor.Encode(list(texts), num_threads=1) if len(texts) else []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; pad and eos vanish, unknown shows as U+2047 with spaces."""
        kept = [int(i) for i in ids if int(i) not in (PAD, EOS)]
        return ' '.join(self._processor.DecodeIds(kept).split())

    def unknown_count(self, text: str) -> int:
        """How many tokens of normalised text are unknown."""
        return self.encode(text).count(UNKNOWN)

    def unknown_characters(self, text: str) -> set[str]:
        """The characters of a text that the model has never seen."""
        return {c for c in text if not c.isspace() and self.encode(c)[-1:] == [UNKNOWN]}

    def piece(self, token: int) -> str:
        """The piece that an id stands for; a leading U+2581 is a space."""
        return self._processor.IdToPiece(int(token))

    def provenance(self) -> dict[str, Any]:
        """What `train_tokenizer` recorded, or {} for a model without a record."""
        try:
            with open(self.path + '.json', encoding='utf-8') as file:
                return json.load(file)
        except FileNotFoundError:
            return {}


def train_tokenizer(
    texts: Iterable[str],
    path: str | os.PathLike,
    *,
    model_type: str = 'char',
    vocabulary_size: int | None = None,
    normaliser: str = 'english',
    source: str = '',
) -> dict[str, Any]:
    """Trains a sentencepiece model and writes `path` and `path.json`, atomically.

    Args:
      texts: training lines, raw; normalised here. Empty and unspoken (digits) lines are left out.
      path: the model file to write.
      model_type: 'char', 'unigram' or 'bpe'.
      vocabulary_size: ids in all; for 'char' None takes every character that occurs, and a smaller
        number keeps the most frequent.
      normaliser: see `bigssl_jax.data.text`.
      source: where the text is from, for the record.

    Returns:
      the provenance record: sha256, text_sha256, vocabulary_size, lines, characters, left_out, ...

    Raises:
      DataError: no text, unknown options, or a vocabulary that this text cannot fill.
    """
    check_normaliser(normaliser)
    if model_type not in MODEL_TYPES:
        raise DataError(f'model_type is {model_type!r}, must be one of {", ".join(MODEL_TYPES)}')
    lines, left_out = _training_lines(texts, normaliser)
    if not lines:
        raise DataError('no text to train a tokenizer on: every line was empty or held digits')
    characters = collections.Counter(c for line in lines for c in line if c != ' ')
    if vocabulary_size is None:
        if model_type != 'char':
            raise DataError(f'model_type {model_type!r} needs a vocabulary_size')
        vocabulary_size = len(characters) + 4  # pad, eos, unknown, space
    model = _train(lines, model_type, vocabulary_size)
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    _write_atomically(path, model)
    tokenizer = Tokenizer(path)
    record = {
        'sha256': tokenizer.hash,
        'text_sha256': hashlib.sha256('\n'.join(lines).encode()).hexdigest(),
        'model_type': model_type,
        'vocabulary_size': tokenizer.vocabulary_size,
        'normaliser': normaliser,
        'lines': len(lines),
        'characters': sum(map(len, lines)),
        'alphabet': ''.join(sorted(characters)),
        'left_out': left_out,
        'sentencepiece': sentencepiece.__version__,
        'source': source,
    }
    _write_atomically(
        path + '.json', json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode()
    )
    return record


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The same model as a `seqio.SentencePieceVocabulary` (imports seqio and TensorFlow)."""
    tensorflow()
    import seqio

    Tokenizer(path)  # our own checks and messages first
    return seqio.SentencePieceVocabulary(os.fspath(path))


def encode_ragged(
    tokenizer: Tokenizer, texts: Sequence[str], block: int = 1 << 16
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of many texts: (values int32 [total], offsets int64 [N + 1])."""
    values: list[np.ndarray] = [np.zeros(0, np.int32)]
    counts: list[np.ndarray] = [np.zeros(0, np.int64)]
    for start in range(0, len(texts), block):
        encoded = tokenizer.encode_batch(texts[start : start + block])
        counts.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        values.append(np.fromiter((i for ids in encoded for i in ids), np.int32))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return np.concatenate(values), offsets


def _training_lines(texts: Iterable[str], normaliser: str) -> tuple[list[str], dict[str, int]]:
    lines, left_out = [], {'empty': 0, 'digits': 0}
    for text in texts:
        line = normalise_text(text or '', normaliser)
        if not line:
            left_out['empty'] += 1
        elif not is_spoken(line, normaliser):
            left_out['digits'] += 1
        else:
            lines.append(line)
    return lines, left_out


def _train(lines: list[str], model_type: str, vocabulary_size: int) -> bytes:
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            model_type=model_type,
            vocab_size=vocabulary_size,
            character_coverage=1.0,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,
            normalization_rule_name='identity',
            add_dummy_prefix=model_type != 'char',
            num_threads=1,
            shuffle_input_sentence=False,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except Exception as error:  # the library raises RuntimeError and OSError with C++ messages
        reason = str(error).split('] ')[-1].strip()
        raise DataError(
            f'sentencepiece cannot train a {model_type} model of {vocabulary_size} ids from'
            f' {len(lines)} lines: {reason}'
        ) from None
    return buffer.getvalue()


def _write_atomically(path: str, content: bytes) -> None:
    temporary = f'{path}.{os.getpid()}.tmp'
    with open(temporary, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
