"""Manifests: the list of utterances that a person hands to `bigssl prepare`.

A manifest is JSON Lines (one object a line) or TSV (a header line, then one utterance a line):

    {"audio": "clips/0001.flac", "text": "hello there", "speaker": "anna"}
    {"audio": "meeting.mp3", "offset": 61.5, "duration": 7.2, "text": "shall we begin"}

Only `audio` is required. Relative paths are meant from the manifest's own folder, so that a folder
with its manifest can be moved. Every error names file, line and field; a field that is not known is
an error, because a mistyped `txet` would otherwise cost the transcripts in silence.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from bigssl_jax.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class Entry:
    """One utterance before preparation.

    `audio` is a path, the encoded bytes of an audio file, or int16 samples [S] (then `sample_rate`
    must be set). `offset` and `duration` in seconds cut it out of a longer recording.
    `sample_rate` (Hz) corrects a file whose header states a wrong rate; None believes the header.
    `encoding`, an ending such as '.g722', is for audio whose name does not tell.
    `group` names what must not be split between training and test (a scene, a book, a session).
    `seen` marks a test line whose text also stands in training.
    """

    id: str
    audio: Any
    text: str | None = None
    speaker: str = ''
    language: str = ''
    domain: str = ''
    group: str = ''
    split: str = ''
    seen: bool = False
    offset: float = 0.0
    duration: float | None = None
    licence: str = ''
    sample_rate: int | None = None
    encoding: str = ''


FIELDS = tuple(field.name for field in dataclasses.fields(Entry))
STRING_FIELDS = ('speaker', 'language', 'domain', 'group', 'split', 'licence', 'encoding')
# Names that other tools use for the same thing: offered in the error message, never guessed.
KNOWN_ELSEWHERE = {
    other: field
    for field, others in {
        'id': 'utt_id utterance_id key',
        'audio': 'path file filename wav audio_filepath audio_path',
        'text': 'transcript transcription sentence',
        'speaker': 'speaker_id client_id',
        'language': 'lang locale',
        'domain': 'set',
        'offset': 'start begin',
        'duration': 'dur length',
        'licence': 'license',
        'sample_rate': 'rate sampling_rate',
    }.items()
    for other in others.split()
}


def nearest_field(name: str) -> str | None:
    """The manifest field that `name` was probably meant to be, or None."""
    lower = name.strip().lower()
    if lower in KNOWN_ELSEWHERE:
        return KNOWN_ELSEWHERE[lower]
    close = difflib.get_close_matches(lower, FIELDS, n=1)
    return close[0] if close else None


def read_manifest(path: str, ignore: Sequence[str] = ()) -> Iterator[Entry]:
    """Yields the entries of a JSON Lines or TSV manifest, in order.

    `ignore` names fields of other tools that are to be passed over.
    Raises DataError with file:line for the first thing wrong, and at the end for an empty manifest.
    """
    seen: dict[str, int] = {}
    for line, record in _records(path):
        entry = entry_from_record(record, path, line, ignore)
        if entry.id in seen:
            raise DataError(
                f'{path}:{line}: id {entry.id!r} was used before, at line {seen[entry.id]}; '
                'every utterance needs an id of its own'
            )
        seen[entry.id] = line
        yield entry
    if not seen:
        raise DataError(f'{path}: the manifest is empty; it needs one line per utterance')


def manifest_origin(path: str, split_by: str = '') -> dict[str, str]:
    """What a corpus of this manifest was made from, for its corpus.json: plain JSON.

    Args:
      path: the manifest; its bytes count, not its place, so that its folder can be moved.
      split_by: field by which missing splits were drawn; '' when they were not.

    Raises:
      DataError: the manifest cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
    except FileNotFoundError:
        raise DataError(f'{path}: there is no such manifest') from None
    except (OSError, ValueError) as error:
        raise DataError(
            f'{path}: cannot be read: {getattr(error, "strerror", None) or error}'
        ) from None
    return {'kind': 'manifest', 'sha256': digest[:16], 'split_by': split_by}


def _records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, raw record) whatever the format is."""
    try:
        with open(path, 'rb') as file:
            lines = _text_lines(path, file)
            yield from _tsv_records(path, lines) if _is_tsv(path) else _json_records(path, lines)
    except FileNotFoundError:
        raise DataError(f'{path}: there is no such manifest') from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise DataError(
            f'{path}: cannot be read: {getattr(error, "strerror", None) or error}'
        ) from None


def _is_tsv(path: str) -> bool:
    return path.lower().endswith(('.tsv', '.txt'))


def _text_lines(path: str, file) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(file, start=1):
        try:
            text = raw.decode('utf-8-sig' if number == 1 else 'utf-8').strip('\r\n')
        except UnicodeDecodeError:
            raise DataError(
                f'{path}:{number}: not UTF-8 text; save the manifest as UTF-8'
            ) from None
        if text.strip():
            yield number, text


def _json_records(path: str, lines) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in lines:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, 'msg', None) or str(error)
            raise DataError(
                f'{path}:{number}: not JSON ({reason}); JSON Lines hold one object a line, '
                'and a table with tabs must be named .tsv'
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f'{path}:{number}: holds {type(record).__name__}, must be an object '
                'such as {"audio": "a.wav", "text": "hello"}'
            )
        yield number, record


def _tsv_records(path: str, lines) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    for number, text in lines:
        cells = text.split('\t')  # speech has quotation marks in it: TSV here knows no quoting
        if header is None:
            header = [name.strip() for name in cells]
            if 'audio' not in header:
                raise DataError(
                    f'{path}:{number}: the first line of a TSV manifest must name its columns, '
                    f"'audio' among them; found {', '.join(map(repr, header))[:200]}"
                )
            if len(set(header)) < len(header):
                raise DataError(f'{path}:{number}: a column is named twice')
            continue
        if len(cells) != len(header):
            raise DataError(
                f'{path}:{number}: has {len(cells)} columns, the header has {len(header)}'
            )
        yield number, {k: v for k, v in zip(header, cells, strict=True) if v.strip()}


def entry_from_record(
    record: dict[str, Any], path: str, line: int, ignore: Sequence[str] = ()
) -> Entry:
    """Checks one raw record and makes it an Entry; `path` and `line` are for messages and paths."""
    where = f'{path}:{line}'
    for name in record:
        if name not in FIELDS and name not in ignore:
            near = nearest_field(name)
            hint = f'did you mean {near!r}?' if near else f'fields are {", ".join(FIELDS)}'
            raise DataError(f'{where}: field {name!r} is not known; {hint}')
    given = _string(record, 'audio', where)
    if not given:
        raise DataError(f"{where}: field 'audio' is missing; it names the audio file")
    offset = _number(record, 'offset', where, 0.0) or 0.0
    duration = _number(record, 'duration', where, None)
    if duration == 0:
        raise DataError(f"{where}: field 'duration' is 0, must be more than 0 seconds")
    return Entry(
        id=_string(record, 'id', where) or _default_id(given, offset),
        audio=os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), given)),
        text=_string(record, 'text', where, keep_empty=True),
        seen=_boolean(record, 'seen', where),
        offset=offset,
        duration=duration,
        sample_rate=_rate(record, where),
        **{name: _string(record, name, where) or '' for name in STRING_FIELDS},
    )


def _default_id(audio: str, offset: float) -> str:
    stem = os.path.splitext(audio)[0].replace(os.sep, '/').removeprefix('./')
    return f'{stem}@{offset:.3f}' if offset else stem


def _string(record: dict, name: str, where: str, keep_empty: bool = False) -> str | None:
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # speaker numbers and the like
    if value is None or (value == '' and not keep_empty):
        return None
    if not isinstance(value, str):
        raise DataError(f'{where}: field {name!r} is {str(value)[:80]!r}, must be text')
    if '\0' in value or any('\ud800' <= c <= '\udfff' for c in value):
        raise DataError(f'{where}: field {name!r} holds characters that are not text')
    return value


def _number(record: dict, name: str, where: str, default: float | None) -> float | None:
    value = record.get(name)
    if value is None:
        return default
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise DataError(
            f'{where}: field {name!r} is {str(value)[:80]!r}, must be seconds, 0 or more'
        )
    return number


def _rate(record: dict, where: str) -> int | None:
    value = _number(record, 'sample_rate', where, None)
    if value is not None and not (value.is_integer() and 1000 <= value <= 768000):
        raise DataError(
            f"{where}: field 'sample_rate' is {record['sample_rate']!r}, must be a whole number "
            'of Hz from 1000 to 768000'
        )
    return None if value is None else int(value)


def _boolean(record: dict, name: str, where: str) -> bool:
    value = record.get(name, False)
    if isinstance(value, str):
        value = {'true': True, '1': True, 'false': False, '0': False}.get(value.lower())
    if value in (True, False):  # also 1 and 0
        return bool(value)
    if value is None and record.get(name) is None:
        return False
    raise DataError(f'{where}: field {name!r} is {record[name]!r}, must be true or false')
