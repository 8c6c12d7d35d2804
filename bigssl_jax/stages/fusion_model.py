"""A language model's folder, opened for fusion with a recogniser."""

import pathlib

import jax

from bigssl_jax.config import UserError
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.decoding.fusion import LanguageModel
from bigssl_jax.decoding.neural_lm import SLOTS, neural_lm
from bigssl_jax.objectives import NextToken
from bigssl_jax.stages.model import load_model
from bigssl_jax.stages.schema import make_objective
from bigssl_jax.training.trainer import parameter_layout


def load_language_model(
    directory: pathlib.Path, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, slots: int = SLOTS
) -> LanguageModel:
    """The language model in a stage's or model's folder, on the mesh.

    Args:
      directory: a finished language_model stage's folder, or its `model` folder.
      tokenizer: of the model that it will be fused with.
      mesh: devices; each reads its own part of the parameters.
      slots: tokens of a hypothesis that are remembered.

    Raises:
      UserError: no language model there, or one of other pieces than the recogniser's.
    """
    model = load_model(directory)
    name = next((n for n, f in model.heads.items() if f['objective'] == 'next_token'), None)
    if name is None:
        raise UserError(
            f'{directory} holds no language model (heads: {", ".join(model.heads)}); name the'
            ' folder of a finished language_model stage'
        )
    model.check_tokenizer()
    if model.tokenizer != tokenizer.hash:
        raise UserError(
            f'the language model in {directory} was trained with another tokenizer (hash'
            f' {str(model.tokenizer)[:12]}) than {tokenizer.path} ({tokenizer.hash[:12]}): its'
            ' pieces mean something else there; train it in an experiment with the same tokenizer'
        )
    size = Tokenizer(model.tokenizer_path).vocabulary_size
    head: NextToken = make_objective(model.heads[name], size, model.audio.num_mels)
    layout = parameter_layout(None, {name: head}, mesh)['heads'][name]
    arrays = model.read({'params': {'heads': {name: layout}}})
    return neural_lm(head.config, arrays['params']['heads'][name], slots)
