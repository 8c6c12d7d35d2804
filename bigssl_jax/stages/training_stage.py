"""What pretrain, finetune and language_model share: from a stage's config to a finished run.

config  ->  trainer                 (encoder, objectives, optimizer)
        ->  streams                 (one per objective)
        ->  first state             (fresh; the encoder may come from an earlier stage)
        ->  the loop                ->  <stage>/checkpoints, <stage>/model
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bigssl_jax.audio import AudioConfig
from bigssl_jax.config import UserError
from bigssl_jax.data.stream import Stream, stream
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.models import ConformerConfig, attention_kernels
from bigssl_jax.objectives.encoder_call import named_key
from bigssl_jax.parallel.distributed import barrier, batch_slice, is_primary, say
from bigssl_jax.parallel.fingerprint import fingerprint
from bigssl_jax.parallel.layout import check_layout, landed, layout_lines
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.model import load_model, save_model
from bigssl_jax.stages.schema import make_objective, training_audio_seconds
from bigssl_jax.stages.shared_encoder import is_path
from bigssl_jax.training.checkpoint import TREE, Checkpointer, Keep, tree_hash
from bigssl_jax.training.guard import GuardSettings
from bigssl_jax.training.initialise import match_parameters, only
from bigssl_jax.training.loop import LoopSettings, Run, train
from bigssl_jax.training.optimizers import make_schedules
from bigssl_jax.training.state import TrainState
from bigssl_jax.training.trainer import Trainer

# They may write more labels than there are frames.
TRANSDUCERS = ('rnnt', 'hat')

Evaluate = Callable[[Trainer, TrainState], dict[str, float]]


def make_trainer(
    config: Mapping[str, Any], stage: str, mesh: jax.sharding.Mesh, vocabulary_size: int | None
) -> Trainer:
    """The trainer of a stage of a resolved config.

    Raises:
      UserError: the config asks for a kernel that the mesh's devices do not have.
    """
    fields = config['stages'][stage]
    encoder = None
    if fields['kind'] != 'language_model':
        overrides = {k: v for k, v in config['encoder'].items() if k != 'preset'}
        encoder = ConformerConfig(**overrides)
        attention_kernels.check_platform(encoder.attention, mesh.devices.flat[0].platform)
    return Trainer(
        encoder=encoder,
        audio=AudioConfig(**config['audio']),
        objectives={
            name: make_objective(given, vocabulary_size, config['audio']['num_mels'])
            for name, given in fields['objectives'].items()
        },
        fields=fields,
        seed=config['seed'],
        mesh=mesh,
    )


def run_training(
    context: Context,
    evaluate: Evaluate | None = None,
    open_streams: Callable[[Context], dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains the context's stage, continuing where it stopped, and writes its model folder.

    Args:
      context: the stage's surroundings.
      evaluate: dev metrics of a state, computed every `eval_every` steps.
      open_streams: one stream for every objective; default: of audio.

    Returns:
      (outputs, results) for done.json.
    """
    fields = context.fields
    tokenizer = context.tokenizer_path if _is_labelled(fields) else None
    vocabulary = Tokenizer(tokenizer).vocabulary_size if tokenizer else None
    trainer = make_trainer(context.config, context.name, context.mesh, vocabulary)
    rows = landed(trainer.abstract_params, context.mesh)
    check_layout(rows, context.mesh, context.config['compute']['max_replicated'])
    say('\n'.join(layout_lines(rows, context.mesh)))
    statistics = {}
    if trainer.encoder is not None:
        statistics = {k: np.asarray(v) for k, v in np.load(context.statistics_path).items()}
    streams = (open_streams or _open_streams)(context)
    abstract_state = trainer.abstract_state(statistics)
    checkpointer = _checkpointer(
        context,
        'dev_wer' if trainer.encoder else 'dev_loss',
        {'config': context.identity_hash(), TREE: tree_hash(abstract_state)}
        | {f'stream of {name}': s.fingerprint for name, s in streams.items()},
    )
    try:
        state = train(
            _run(context, trainer, streams, evaluate),
            LoopSettings(
                steps=fields['steps'],
                log_every=fields['log_every'],
                eval_every=fields['eval_every'],
                save_every=fields['save_every'],
                watchdog_minutes=context.config['compute']['watchdog_minutes'],
                save_evaluated=fields['keep_best'] > 0,
                guard=GuardSettings(**fields['divergence']),
            ),
            lambda: _first_state(context, trainer, statistics),
            abstract_state,
            checkpointer,
            context.stop,
            tensorboard=context.config['compute']['tensorboard'],
        )
        exported = _exported(checkpointer, trainer, state, statistics, fields['export'])
    finally:
        checkpointer.close()
    info = save_model(
        context.directory / 'model',
        trainer.encoder,
        trainer.audio,
        fields['objectives'],
        exported.evaluated_params(),
        exported.constants,
        tokenizer,
        int(exported.step),
    )
    outputs = {'model': {'hash': info['hash'], 'params': fingerprint(state.params)}}
    results = {
        'parameters': sum(int(leaf.size) for leaf in jax.tree.leaves(state.params)),
        'steps': fields['steps'],
        'exported_step': int(exported.step),
        'skipped_steps': int(state.skipped),
        'audio_hours': round(training_audio_seconds(context.config, context.name) / 3600, 2),
        'excluded': {name: s.excluded for name, s in streams.items()},
    }
    return outputs, results


def _checkpointer(context: Context, metric: str, identity: Mapping[str, str]) -> Checkpointer:
    """The stage's checkpoints; with `--accept`, those made from something else too."""
    fields = context.fields
    checkpointer = Checkpointer(
        context.directory / 'checkpoints',
        Keep(fields['keep'], fields['keep_every'], fields['keep_best'], metric),
        identity,
        artefacts.accepted_checkpoints(context.directory),
    )
    for step, other in checkpointer.accept().items() if context.accept else ():
        changed = artefacts.differences(other, identity)
        say(f'{context.name}: step {step} is accepted (accepted.jsonl): {"; ".join(changed)}')
        if is_primary():
            line = {'step': step, 'checkpoint': other, 'changed': changed}
            artefacts.note_accepted(context.directory, line)
    return checkpointer


def _exported(
    checkpointer: Checkpointer,
    trainer: Trainer,
    state: TrainState,
    statistics: Mapping[str, np.ndarray],
    which: str,
) -> TrainState:
    """The state that becomes the model: the last, or the best on the dev set."""
    best = checkpointer.best_step() if which == 'best' else None
    if best is None or best == int(state.step):
        return state
    return checkpointer.restore(best, trainer.abstract_state(statistics))[0]


def _is_labelled(fields: Mapping[str, Any]) -> bool:
    streams = fields['streams'].values()
    return any(
        source.get('labels', 'text') for stream in streams for source in stream['sources'].values()
    )


def _open_streams(context: Context) -> dict[str, Stream]:
    """One stream for every objective."""
    fields = context.fields
    host, num_hosts = batch_slice(context.mesh)
    streams = {
        name: stream(
            context.stream_config(fields['streams'][given['stream']])
            | {'for_ctc': given['objective'] not in TRANSDUCERS},
            seed=context.config['seed'],
            host=host,
            num_hosts=num_hosts,
        )
        for name, given in fields['objectives'].items()
    }
    if is_primary():
        # Of a cut shard, training would otherwise learn when it comes to it, perhaps after days.
        corpora = {s.corpus.directory: s.corpus for one in streams.values() for s in one.sources}
        for corpus in corpora.values():
            corpus.verify()
    barrier(f'streams of {context.name}')  # all have read what the first may now write
    if is_primary():
        corpora = {c.corpus.directory: c.corpus for s in streams.values() for c in s.sources}
        for corpus in corpora.values():
            corpus.verify()  # a shard that went since is told now, not in the middle of an epoch
        context.remember_batches()
        lines = [
            {'objective': name, **line} for name, s in streams.items() for line in s.left_out()
        ]
        artefacts.write_lines(context.directory / 'left_out.jsonl', lines)
    return streams


def _first_state(
    context: Context, trainer: Trainer, statistics: Mapping[str, np.ndarray]
) -> TrainState:
    """Fresh parameters, or those of the model that `init_from` names where they match.

    Raises:
      UserError: what the model has does not match, or its heads know another tokenizer.
    """
    source = context.fields.get('init_from')
    if not source:
        return trainer.make_state(statistics)
    earlier = load_model(pathlib.Path(source) if is_path(source) else context.workdir / source)
    wanted, shapes = trainer.abstract_state(statistics).params, earlier.shapes()
    heads = context.fields['init_heads']
    if heads and earlier.tokenizer != artefacts.file_hash(context.tokenizer_path):
        raise UserError(
            f'stages.{context.name}.init_heads is {heads!r}, but {source} was trained with another'
            ' tokenizer, so that its heads write other pieces; set init_heads to (), or use its'
            ' tokenizer'
        )
    matching = match_parameters(wanted, shapes['params'], heads)
    arrays = earlier.read(
        {
            'params': only(wanted, matching.matched),
            'constants': {'encoder': shapes['constants']['encoder']},
        }
    )
    if jax.process_index() == 0:
        what = ' and '.join(('encoder', *heads))
        report = {'from': source, 'model': earlier.hash} | dataclasses.asdict(matching)
        artefacts.write_json(context.directory / 'initialised.json', report)
        print(f'{context.name}: {what} from {source}: {matching} (initialised.json)', flush=True)
    taken = traverse_util.flatten_dict(arrays['params'], sep='/')
    # The encoder knows features that were normalised with the statistics of its own training.
    return trainer.make_state(arrays['constants']['encoder'], taken)


def _run(
    context: Context,
    trainer: Trainer,
    streams: Mapping[str, Any],
    evaluate: Evaluate | None,
) -> Run:
    fields = context.fields
    return Run(
        name=context.name,
        directory=context.directory,
        mesh=context.mesh,
        train_step=trainer.train_step(),
        streams=streams,
        schedules=make_schedules(fields['optimizer']['groups'], fields['steps']),
        key=named_key(jax.random.key(context.config['seed']), context.name),
        summarise=trainer.summarise,
        health=trainer.health,
        evaluate=functools.partial(evaluate, trainer) if evaluate else None,
        later_audio_seconds=context.later_audio_seconds,
    )
