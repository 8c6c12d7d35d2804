"""What a stage leaves on disk, and how a rerun knows it.

    <workdir>/<stage>/stage.json   the stage's identity: everything its result follows from; written
                                   before its first work
    <workdir>/<stage>/done.json    what it made (with hashes), from what, and its results; written
                                   last, so its presence means "complete"

A rerun of a finished stage is a no-op; an unfinished one continues; one whose identity differs from
`stage.json` is refused, because the files beside it belong to another experiment.  Where a stage
failed before it made anything, there are none, and a mended config takes the folder over.  Training
that shall go on all the same is accepted by name; `accepted.jsonl` says what had changed.
"""

import datetime
import hashlib
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from bigssl_jax.config import ConfigError, UserError, config_hash


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON atomically: a reader sees the old file or the whole new one.

    Raises:
      UserError: the folder cannot be written.
    """
    # A name that no other process chooses: workers may write the same file.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open('w') as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f'cannot write {path}: {error.strerror or error}') from error


def check_writable(directory: str) -> None:
    """Creates `directory` and proves that files can be written there, before any work is done.

    Raises:
      ConfigError: it cannot be created or written.
    """
    try:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b'\0')
    except OSError as error:
        raise ConfigError(
            f'--workdir {directory!r} cannot be written ({error.strerror}); name another folder'
        ) from error


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file, or None when it does not exist."""
    return json.loads(path.read_text()) if path.exists() else None


def file_hash(path: pathlib.Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def model_info(directory: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """The model folder at `directory`, or inside the stage folder there, and its model.json.

    Raises:
      UserError: there is no model.
    """
    directory = directory.absolute()
    if not (directory / 'model.json').exists() and (directory / 'model').is_dir():
        directory = directory / 'model'
    info = read_json(directory / 'model.json')
    if info is None:
        raise UserError(
            f'no model in {directory} (model.json is missing); name the folder of a finished'
            ' pretrain or finetune stage'
        )
    if 'arrays' not in info:
        raise UserError(f'{directory} was written by an older version; train its stage again')
    return directory, info


def differences(old: Any, new: Any, path: str = '') -> list[str]:
    """The fields in which two nested mappings differ, as `field: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for name in sorted(set(old) | set(new)):
            field = f'{path}.{name}' if path else name
            found += differences(old.get(name), new.get(name), field)
        return found
    same = json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    return [] if same else [f'{path}: {old!r} -> {new!r}']


def claim(directory: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """Marks `directory` as belonging to a stage of this identity.

    Raises:
      ConfigError: it belongs to a stage of another identity.
    """
    check(directory, identity)
    if not (directory / 'stage.json').exists() or _is_empty(directory):
        write_json(directory / 'stage.json', identity)


def accept(directory: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """Takes a folder that another config began as one of this identity, and notes what changed."""
    old = read_json(directory / 'stage.json')
    if old is not None:
        fields = differences(old, json.loads(json.dumps(identity)))
        if fields:
            note_accepted(directory, {'changed': fields})
    write_json(directory / 'stage.json', identity)


def note_accepted(directory: pathlib.Path, what: Mapping[str, Any]) -> None:
    """Appends a line to the stage's accepted.jsonl."""
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    with (directory / 'accepted.jsonl').open('a') as file:
        file.write(json.dumps({'at': at, **what}) + '\n')


def accepted_checkpoints(directory: pathlib.Path) -> list[dict[str, str]]:
    """The identities of checkpoints that were accepted in the stage's folder."""
    path = directory / 'accepted.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return [line['checkpoint'] for line in map(json.loads, lines) if 'checkpoint' in line]


def check(directory: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """Raises a ConfigError if `directory` belongs to a stage of another identity."""
    old = read_json(directory / 'stage.json')
    if old is None or _is_empty(directory):
        return
    fields = differences(old, json.loads(json.dumps(identity)))
    if fields:
        shown = '; '.join(fields[:4]) + (f'; and {len(fields) - 4} more' if len(fields) > 4 else '')
        raise ConfigError(
            f'{directory} was made by another config ({shown}); use another --workdir,'
            f' or delete {directory} to make it again'
        )


def _is_empty(directory: pathlib.Path) -> bool:
    """Whether a stage that began in `directory` left nothing that follows from its config."""
    names = {path.name for path in directory.iterdir() if path.suffix != '.tmp'}
    return names <= {'stage.json', 'elapsed.json'}


def read_done(directory: pathlib.Path) -> dict[str, Any] | None:
    """The stage's done.json, or None when it is not finished."""
    return read_json(directory / 'done.json')


def output_hash(done: Mapping[str, Any]) -> str:
    """One hash for all that a finished stage made; what is made from it records this."""
    return config_hash({'identity': done['identity'], 'outputs': done['outputs']})


def write_lines(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON Lines atomically."""
    temporary = path.with_name(f'.{path.name}.tmp')
    with temporary.open('w') as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + '\n')
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
