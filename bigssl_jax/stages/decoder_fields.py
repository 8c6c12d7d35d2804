"""The fields `decoder` and `tune` of a stage: defaults, checks, and the language models they name.

decoder.ngram    'trigrams'              a stage of the recipe
                 'lm/4gram.arpa.gz'      a file: it has a '/' or ends in .arpa or .gz
decoder.lm       'lm'                    a stage of the recipe
                 'runs/lm/lm'            the folder of a stage or model elsewhere
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.decoding.config import WEIGHTS
from bigssl_jax.stages import artefacts

# How a finished model is listened to: dev scores, labels, tests.
DECODER: dict[str, Any] = dataclasses.asdict(DecoderConfig())

# Weights of the decoder to try on a selection before anything is scored; '' or (): none.
TUNE: dict[str, Any] = {'selection': '', **dict.fromkeys(WEIGHTS, ())}

STAGE_KINDS = {'lm': 'language_model', 'ngram': 'ngram'}
SUFFIXES = ('.arpa', '.gz')


def is_file(name: str) -> bool:
    """Whether a language model is named by file or folder, not by its stage."""
    return '/' in name or name.endswith(SUFFIXES)


def file_hashes(decoder: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of the files and folders that a decoder config names, by field.

    They stand for the names in a stage's identity: a file may move, and must not change.

    Raises:
      UserError: one is missing.
    """
    return {
        field: model_hash(field, pathlib.Path(decoder[field]))
        for field in ('lm', 'ngram')
        if is_file(decoder[field])
    }


def model_hash(field: str, path: pathlib.Path) -> str:
    """The hash of an ARPA file's bytes, or of the arrays of a language model's folder.

    Raises:
      UserError: there is none.
    """
    if field == 'lm':
        return artefacts.model_info(path)[1]['hash']
    try:
        return artefacts.file_hash(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'decoder.ngram: {path} cannot be read: {reason}') from error


def language_model_stages(decoder: Mapping[str, Any]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(field, name of a stage, kinds that it may have) of each stage that `decoder` names."""
    return [
        (f'decoder.{field}', decoder[field], (kind,))
        for field, kind in STAGE_KINDS.items()
        if decoder and not is_file(decoder[field])
    ]


def check_decoder(path: str, stage: Mapping[str, Any]) -> None:
    """Checks a stage's `decoder` and `tune`, if it has them.

    Args:
      path: of the stage, for messages.
      stage: its fields, all of them.

    Raises:
      ConfigError: a value that cannot be, or fields that contradict each other.
    """
    if 'decoder' not in stage:
        return
    try:
        DecoderConfig(**stage['decoder'])
    except ConfigError as error:
        raise ConfigError(str(error).replace('decoder.', f'{path}.decoder.')) from error
    tuned = [name for name, grid in stage.get('tune', {}).items() if grid and name in WEIGHTS]
    if tuned and not stage['tune']['selection']:
        raise ConfigError(
            f'config field {path}.tune.{tuned[0]} is {stage["tune"][tuned[0]]!r}, but'
            ' tune.selection names no selection to tune on; set it to one that is not scored'
        )
    if stage.get('tune', {}).get('selection'):
        _check_tune(path, stage['decoder'], stage['tune'], tuned)


def _check_tune(
    path: str, decoder: Mapping[str, Any], tune: Mapping[str, Any], tuned: list[str]
) -> None:
    if not tuned or decoder['kind'] != 'beam':
        raise ConfigError(
            f'config field {path}.tune.selection is {tune["selection"]!r}; tuning also needs'
            f" decoder.kind 'beam' and weights to try in one of {', '.join(WEIGHTS)}"
        )
    for name in ('lm', 'ngram'):
        if f'{name}_weight' in tuned and not decoder[name]:
            raise ConfigError(
                f'config field {path}.tune.{name}_weight is {tune[f"{name}_weight"]!r}, but'
                f' decoder.{name} names no model; set it'
            )
