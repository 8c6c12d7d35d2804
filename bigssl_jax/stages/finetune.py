"""Supervised training of encoder and transcript head, from scratch or a pre-trained encoder."""

from typing import Any

from bigssl_jax.data.stream import one_pass
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.evaluation import cer, wer
from bigssl_jax.parallel.distributed import batch_slice
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.evaluate import transcribe_set
from bigssl_jax.stages.recognition import Recogniser
from bigssl_jax.stages.search import load_models
from bigssl_jax.stages.training_stage import run_training
from bigssl_jax.training.state import TrainState
from bigssl_jax.training.trainer import Trainer


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fine-tunes; returns (outputs, results) for done.json."""
    if not context.fields['dev']:
        return run_training(context)
    stream = one_pass(context.pass_config(context.fields['dev']), *batch_slice(context.mesh))
    tokenizer = Tokenizer(context.tokenizer_path)
    normaliser = context.config['tokenizer']['normaliser']
    search = DecoderConfig(**context.fields['decoder'])
    language_models = load_models(search, tokenizer, context.workdir, context.mesh)

    def evaluate(trainer: Trainer, state: TrainState) -> dict[str, float]:
        name = trainer.transcript_head()
        assert trainer.encoder is not None, name
        params = state.evaluated_params()
        recogniser = Recogniser(
            trainer.encoder,
            trainer.audio,
            trainer.objectives[name],
            {'encoder': params['encoder'], 'head': params['heads'][name]},
            state.constants['encoder'],
            tokenizer,
            context.mesh,
            search,
            language_models,
        )
        lines = transcribe_set(recogniser, stream, normaliser)
        references = [line['reference'] for line in lines]
        texts = [line['text'] for line in lines]
        return {'dev_wer': wer(references, texts).wer, 'dev_cer': cer(references, texts).wer}

    return run_training(context, evaluate)
