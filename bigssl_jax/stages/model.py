"""A trained model as a folder: what every later stage, and `bigssl transcribe`, reads.

<stage>/model/
  model.json        encoder and audio config, heads, tokenizer hash, step, hash of the parameters
  arrays/           {'params': {'encoder', 'heads'}, 'constants'}, written by Orbax
  tokenizer.model   for models with a transcript head
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bigssl_jax.audio import AudioConfig
from bigssl_jax.config import UserError
from bigssl_jax.models import ConformerConfig
from bigssl_jax.stages import artefacts
from bigssl_jax.training.checkpoint import quiet_orbax, tree_hash


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model in memory.

    Attributes:
      directory: its folder.
      encoder: encoder config.
      audio: audio config.
      heads: objective name -> {'objective', its fields}.
      params: {'encoder': ..., 'heads': {objective name: ...}}, numpy arrays.
      constants: {'encoder': feature statistics, 'heads': {...}}, numpy arrays.
      hash: SHA-256 of params and constants.
    """

    directory: pathlib.Path
    encoder: ConformerConfig
    audio: AudioConfig
    heads: Mapping[str, Mapping[str, Any]]
    params: Any
    constants: Any
    hash: str

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The sentencepiece model of the transcript head."""
        return self.directory / 'tokenizer.model'

    def transcript_head(self) -> str:
        """The name of the CTC head.

        Raises:
          UserError: the model has none: it is pre-trained only.
        """
        for name, fields in self.heads.items():
            if fields['objective'] == 'ctc':
                return name
        raise UserError(
            f'{self.directory} has no transcript head (heads: {", ".join(self.heads)});'
            ' name the folder of a fine-tuned stage'
        )


def save_model(
    directory: pathlib.Path,
    encoder: ConformerConfig,
    audio: AudioConfig,
    heads: Mapping[str, Mapping[str, Any]],
    params: Any,
    constants: Any,
    tokenizer: pathlib.Path | None,
    step: int,
) -> dict[str, Any]:
    """Writes a model folder under a temporary name, renames it, returns what `model.json` says.

    Args:
      directory: the folder; one that is there, left by a stage that did not finish, is replaced.
      encoder, audio: of the model.
      heads: objective name -> its config fields.
      params, constants: {'encoder': ..., 'heads': {objective name: ...}}.
      tokenizer: file to copy beside the arrays, or None.
      step: of the training stage.
    """
    arrays = jax.tree.map(np.asarray, {'params': params, 'constants': constants})
    temporary = directory.with_name(f'.{directory.name}.tmp').absolute()
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary / 'arrays', arrays)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, temporary / 'tokenizer.model')
    info = {
        'encoder': dataclasses.asdict(encoder),
        'audio': dataclasses.asdict(audio),
        'heads': {name: dict(fields) for name, fields in heads.items()},
        'tokenizer': artefacts.file_hash(tokenizer) if tokenizer else None,
        'step': step,
        'hash': tree_hash(arrays),
    }
    artefacts.write_json(temporary / 'model.json', info)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    return info


def load_model(directory: pathlib.Path) -> Model:
    """Reads a model folder, or the stage folder that holds one.

    Raises:
      UserError: there is no model, or its arrays do not match the recorded hash.
    """
    directory = pathlib.Path(directory).absolute()
    if not (directory / 'model.json').exists() and (directory / 'model').is_dir():
        directory = directory / 'model'
    info = artefacts.read_json(directory / 'model.json')
    if info is None:
        raise UserError(
            f'no model in {directory} (model.json is missing); name the folder of a finished'
            ' pretrain or finetune stage'
        )
    with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        arrays = jax.tree.map(np.asarray, checkpointer.restore(directory / 'arrays'))
    if tree_hash(arrays) != info['hash']:
        raise UserError(f'{directory}/arrays is damaged: its hash is not the one in model.json')
    return Model(
        directory=directory,
        encoder=ConformerConfig(**info['encoder']),
        audio=AudioConfig(**info['audio']),
        heads=info['heads'],
        params=arrays['params'],
        constants=arrays['constants'],
        hash=info['hash'],
    )
