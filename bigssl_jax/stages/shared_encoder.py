"""`init_from` as a path: many workdirs start from one encoder, pre-trained in another.

A stage's `init_from` names a stage before it in the recipe or, with a slash in it, the folder of a
model anywhere ('runs/other/pretrain', relative to the current directory).  Such an encoder is an
input like any other: its fingerprint is part of the stage's identity, so a stage never continues
from two different ones, and a model that was only moved is the same model.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from bigssl_jax.audio import AudioConfig
from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.models import ConformerConfig
from bigssl_jax.stages import artefacts

# Fields of the encoder that do not change what its parameters mean.
FREE = ('dropout', 'dtype', 'remat', 'attention')


def is_path(model: str) -> bool:
    """Whether `model` is the folder of a model, not the name of a stage."""
    return '/' in model


def encoder_identity(stage: str, path: str, with_heads: bool = False) -> str:
    """What a stage that starts from the model at `path` puts into its identity.

    Args:
      stage: its name.
      path: folder of the model.
      with_heads: whether it takes heads too, and not the encoder alone.

    Raises:
      ConfigError: there is no model.
    """
    info = _info(stage, path)
    return f'model {info["hash"]}' if with_heads else f'encoder {info["encoder_hash"]}'


def check_shared_encoder(config: Mapping[str, Any], stage: str) -> None:
    """Checks the model folder that a stage of a resolved config starts from, if it names one.

    Raises:
      ConfigError: there is no model, or its encoder or front end differs from that of `config`.
    """
    path = config['stages'].get(stage, {}).get('init_from', '')
    if not is_path(path):
        return
    info = _info(stage, path)
    there = {
        'encoder': dataclasses.asdict(ConformerConfig(**info['encoder'])),
        'audio': dataclasses.asdict(AudioConfig(**info['audio'])),
    }
    for group, fields in there.items():
        for name, value in fields.items():
            here = config[group][name]
            # As JSON, because a list and a tuple say the same.
            if name not in FREE and json.dumps(here) != json.dumps(value):
                raise ConfigError(
                    f'stages.{stage}.init_from: {path} was made with {group}.{name}={value!r},'
                    f' here it is {here!r}; set config field {group}.{name} to {value!r}'
                )


def _info(stage: str, path: str) -> dict[str, Any]:
    try:
        info = artefacts.model_info(pathlib.Path(path))[1]
    except UserError as error:
        raise ConfigError(f'config field stages.{stage}.init_from is {path!r}: {error}') from error
    if info['encoder'] is None:
        raise ConfigError(
            f'config field stages.{stage}.init_from is {path!r}, a language model, which has no'
            ' encoder; name the folder of a pretrain or finetune stage'
        )
    return info
