"""Training of a language model on text: transcripts of selections, and plain text files.

    sources --tokenizer--> <stage>/texts/NAME --> batches of sentences --> the same loop and step

The model learns the pieces of the experiment's tokenizer, which is trained before any stage: a
recogniser of the same experiment, or of another one whose tokenizer file is the same, can be fused
with it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigssl_jax.data.text_corpus import TextCorpus, text_lines, transcripts, write_text_corpus
from bigssl_jax.data.text_stream import TextStream
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.parallel import batch_parts, replicated, use_mesh
from bigssl_jax.parallel.distributed import WORK_SECONDS, barrier, batch_slice, is_primary, say
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.training_stage import run_training
from bigssl_jax.training.loop import to_devices
from bigssl_jax.training.state import TrainState
from bigssl_jax.training.trainer import Trainer

DEV = {'batch_tokens': 8192, 'num_buckets': 4, 'rates': 'weights'}
DEV_MAX_TOKENS = 1024


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains; returns (outputs, results) for done.json."""
    return run_training(context, _dev_scores(context), _open_streams)


def _open_streams(context: Context) -> dict[str, TextStream]:
    """One stream for every objective."""
    fields, streams = context.fields, {}
    host, num_hosts = batch_slice(context.mesh)
    for name, objective in fields['objectives'].items():
        given = fields['streams'][objective['stream']]
        sources = {
            source: (
                _text(context, f'{objective["stream"]}-{source}', spec, given['max_tokens']),
                spec['weight'],
            )
            for source, spec in given['sources'].items()
        }
        multiple = context.rows_multiple(given['rows_multiple'])
        seed = context.config['seed']
        streams[name] = TextStream(sources, given, seed, multiple, host, num_hosts)
        for source, (text, _) in sources.items():
            say(
                f'{context.name}: {source}: {text.info["sentences"]:,} sentences,'
                f' {text.info["tokens"]:,} tokens; left out {text.info["excluded"] or "none"}'
            )
    barrier(f'streams of {context.name}')  # all have read what the first may now write
    if is_primary():
        context.remember_batches()
    return streams


def _text(context: Context, name: str, spec: Mapping[str, Any], max_tokens: int) -> TextCorpus:
    """A source's sentences; the first process tokenises them, once."""
    directory = context.directory / 'texts' / name
    if is_primary():
        lines = text_lines(spec['texts']) if spec.get('texts') else None
        if lines is None:
            lines = transcripts(context.selection(spec['selection']))
        what = ', '.join(map(str, spec.get('texts') or ())) or f'selection {spec["selection"]!r}'
        normaliser = context.config['tokenizer']['normaliser']
        tokenizer = Tokenizer(context.tokenizer_path)
        write_text_corpus(directory, lines, tokenizer, normaliser, max_tokens, what)
    barrier(f'{context.name}: text {name}', WORK_SECONDS)
    return TextCorpus(directory)


def _dev_scores(context: Context) -> Any:
    """state -> perplexities of the dev set; None without one."""
    dev = context.fields['dev']
    if not dev:
        return None
    text = _text(context, f'dev-{dev}', {'selection': dev}, DEV_MAX_TOKENS)
    mesh = context.mesh
    stream = TextStream({dev: (text, 1.0)}, DEV, None, batch_parts(mesh), *batch_slice(mesh))
    compiled: dict[str, Any] = {}

    def evaluate(trainer: Trainer, state: TrainState) -> dict[str, float]:
        name, objective = next(iter(trainer.objectives.items()))
        if not compiled:
            compiled['score'] = jax.jit(objective.score, out_shardings=replicated(mesh))
        params = state.evaluated_params()['heads'][name]
        totals: Any = None
        with stream.batches() as batches, use_mesh(mesh):
            for batch in batches:
                found = compiled['score'](params, to_devices({'': batch}, mesh)[''])
                totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
        summary = objective.summarise(jax.device_get(totals))
        return {f'dev_{key}': summary[key] for key in ('loss', 'perplexity', 'word_perplexity')}

    return evaluate
