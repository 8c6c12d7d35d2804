"""What pretrain and finetune share: from a stage's config to a finished training run.

config  ->  encoder, heads          (shapes)
        ->  parameters, constants   (born sharded; the encoder may come from an earlier stage)
        ->  terms of the loss       (objective, stream, weight)
        ->  the loop                ->  <stage>/checkpoints, <stage>/model
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bigssl_jax.audio import (
    AudioConfig,
    NoiseConfig,
    SpecAugmentConfig,
    SpeedConfig,
    add_noise,
    row_keys,
    speed_perturb,
)
from bigssl_jax.config import ConfigError
from bigssl_jax.models import ConformerConfig, Encoder
from bigssl_jax.objectives import EncoderCall
from bigssl_jax.parallel import logical_to_shardings, replicated, use_mesh
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.model import load_model, save_model
from bigssl_jax.stages.schema import make_objective, training_audio_seconds
from bigssl_jax.training.checkpoint import Checkpointer, tree_hash
from bigssl_jax.training.initialise import take_matching
from bigssl_jax.training.loop import LoopSettings, Run, train
from bigssl_jax.training.optimizers import make_optimizer, make_schedules, path_name
from bigssl_jax.training.state import TrainState
from bigssl_jax.training.step import StepSettings, Term, Totals, make_train_step


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A stage's model, losses and optimizer: everything about its step but the data.

    Attributes:
      encoder: encoder config.
      audio: front-end config.
      objectives: name -> objective (frozen dataclass of the objectives room).
      fields: the stage's resolved config fields.
      seed: of the experiment.
      mesh: devices.
    """

    encoder: ConformerConfig
    audio: AudioConfig
    objectives: Mapping[str, Any]
    fields: Mapping[str, Any]
    seed: int
    mesh: jax.sharding.Mesh

    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters, boxed with their logical axes."""
        features = jnp.zeros((1, 16, self.encoder.num_mels), jnp.float32)
        mask = jnp.ones((1, 16), bool)
        encoder = Encoder(self.encoder).init(jax.random.fold_in(key, 0), features, mask)['params']
        heads = {
            name: objective.init_params(_named(key, name), self.encoder)
            for name, objective in self.objectives.items()
        }
        return {'encoder': encoder, 'heads': heads}

    @functools.cached_property
    def _abstract_params(self) -> Any:
        with use_mesh(self.mesh):
            return jax.eval_shape(self.init_params, jax.random.key(0))

    @functools.cached_property
    def optimizer(self) -> tuple[optax.GradientTransformation, Any]:
        """The combined direction, and the tree of group names."""
        groups = self.fields['optimizer']['groups']
        return make_optimizer(nn.unbox(self._abstract_params), groups)

    def make_state(self, statistics: Mapping[str, np.ndarray]) -> TrainState:
        """A fresh state, every array born where it will live."""
        return jax.jit(self._make_state, out_shardings=self.shardings(statistics))(statistics)

    def _make_state(self, statistics: Mapping[str, Any]) -> TrainState:
        key = jax.random.key(self.seed)
        with use_mesh(self.mesh):
            params = nn.unbox(self.init_params(_named(key, 'params')))
        constants_key = _named(key, 'constants')
        heads = {
            name: objective.init_constants(_named(constants_key, name))
            for name, objective in self.objectives.items()
        }
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            params=params,
            optimizer=self.optimizer[0].init(params),
            ema=params if self.fields['optimizer']['ema_decay'] else {},
            constants={'encoder': dict(statistics), 'heads': heads},
        )

    def shardings(self, statistics: Mapping[str, Any]) -> TrainState:
        """A TrainState of shardings: optimizer and EMA leaves lie as their parameter does."""
        params = logical_to_shardings(self._abstract_params, self.mesh)
        known = {
            path_name(path): (leaf.shape, sharding)
            for (path, leaf), sharding in zip(
                jax.tree_util.tree_leaves_with_path(nn.unbox(self._abstract_params)),
                jax.tree.leaves(params),
                strict=True,
            )
        }

        def like_parameter(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
            parts = path_name(path).split('/')
            for start in range(len(parts)):
                shape, sharding = known.get('/'.join(parts[start:]), (None, None))
                if shape == leaf.shape:
                    return sharding
            return replicated(self.mesh)

        abstract = jax.eval_shape(self._make_state, statistics)
        return jax.tree_util.tree_map_with_path(like_parameter, abstract)

    def abstract_state(self, statistics: Mapping[str, Any]) -> TrainState:
        """Shapes, dtypes and shardings of the state, for restoring."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self._make_state, statistics),
            self.shardings(statistics),
        )

    def _totals(
        self, name: str, params: Any, constants: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> Totals:
        objective = self.objectives[name]
        batch = self._perturb(batch, key)
        call = EncoderCall(
            encoder=Encoder(self.encoder),
            params=params['encoder'],
            constants=constants['encoder'],
            audio=self.audio,
            spec_augment=_config(self.fields, 'spec_augment'),
            deterministic=False,
        )
        head = params['heads'][name]
        return objective.totals(call, head, constants['heads'][name], batch, key)

    def _perturb(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The batch with its waveforms sped up or slowed down and noise added, if so configured."""
        audio, counts = batch['audio'], batch['sample_counts']
        speed, noise = _config(self.fields, 'speed_perturb'), _config(self.fields, 'noise')
        if speed is not None:
            keys = row_keys(_named(key, 'speed'), batch['rows'])
            audio, counts = speed_perturb(audio, counts, keys, speed)
        if noise is not None:
            keys = row_keys(_named(key, 'noise'), batch['rows'])
            audio = add_noise(audio, counts, keys, noise)
        return {**batch, 'audio': audio, 'sample_counts': counts}

    def train_step(self) -> Any:
        """The jitted step, its state donated."""
        optimizer, labels = self.optimizer
        terms = tuple(
            Term(name, functools.partial(self._totals, name), fields['weight'])
            for name, fields in self.fields['objectives'].items()
        )
        given = self.fields['optimizer']
        settings = StepSettings(given['clip_norm'], given['ema_decay'], given['micro_batches'])
        return jax.jit(make_train_step(terms, optimizer, labels, settings), donate_argnums=0)

    def transcript_head(self) -> str:
        """The name of the CTC objective.

        Raises:
          ConfigError: the stage has none.
        """
        for name, fields in self.fields['objectives'].items():
            if fields['objective'] == 'ctc':
                return name
        raise ConfigError('a stage with a dev set needs a ctc objective')

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Readable metrics of all terms; `loss` is their weighted sum."""
        metrics: dict[str, float] = {'loss': 0.0}
        for name, objective in self.objectives.items():
            summary = objective.summarise(totals[name])
            metrics['loss'] += self.fields['objectives'][name]['weight'] * summary['loss']
            metrics |= {f'{name}/{metric}': value for metric, value in summary.items()}
        return metrics

    def health(self, metrics: Mapping[str, float]) -> str | None:
        """The first objective's advice, when one has collapsed."""
        for name, objective in self.objectives.items():
            own = {k.removeprefix(f'{name}/'): v for k, v in metrics.items() if k.startswith(name)}
            advice = objective.health(own)
            if advice:
                return advice
        return None


def _named(key: jax.Array, name: str) -> jax.Array:
    """The key of one purpose."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _config(fields: Mapping[str, Any], name: str) -> Any:
    """The stage's augmentation config of that name, or None."""
    kinds = {'spec_augment': SpecAugmentConfig, 'speed_perturb': SpeedConfig, 'noise': NoiseConfig}
    return None if fields[name] is None else kinds[name](**fields[name])


def make_trainer(
    config: Mapping[str, Any], stage: str, mesh: jax.sharding.Mesh, vocabulary_size: int | None
) -> Trainer:
    """The trainer of a stage of a resolved config."""
    fields = config['stages'][stage]
    overrides = {k: v for k, v in config['encoder'].items() if k != 'preset'}
    return Trainer(
        encoder=ConformerConfig(**overrides),
        audio=AudioConfig(**config['audio']),
        objectives={
            name: make_objective(given, vocabulary_size, config['audio']['num_mels'])
            for name, given in fields['objectives'].items()
        },
        fields=fields,
        seed=config['seed'],
        mesh=mesh,
    )


def run_training(context: Context, evaluate: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains the context's stage, continuing where it stopped, and writes its model folder.

    Args:
      context: the stage's surroundings.
      evaluate: (trainer, state) -> dev metrics, called every `eval_every` steps.

    Returns:
      (outputs, results) for done.json.
    """
    from bigssl_jax.data.stream import stream
    from bigssl_jax.data.tokenizer import Tokenizer

    fields = context.fields
    labelled = any(
        source['labels'] for s in fields['streams'].values() for source in s['sources'].values()
    )
    tokenizer = context.tokenizer_path if labelled else None
    vocabulary = Tokenizer(tokenizer).vocabulary_size if tokenizer else None
    trainer = make_trainer(context.config, context.name, context.mesh, vocabulary)
    statistics = {k: np.asarray(v) for k, v in np.load(context.statistics_path).items()}
    streams = {
        name: stream(
            context.stream_config(fields['streams'][given['stream']]),
            seed=context.config['seed'],
            host=jax.process_index(),
            num_hosts=jax.process_count(),
        )
        for name, given in fields['objectives'].items()
    }
    checkpointer = Checkpointer(
        context.directory / 'checkpoints',
        keep=fields['keep'],
        identity={'config': context.identity_hash()}
        | {f'stream of {name}': s.fingerprint for name, s in streams.items()},
    )

    def make_state() -> TrainState:
        state = trainer.make_state(statistics)
        if fields['init_from']:
            earlier = load_model(context.workdir / fields['init_from'])
            encoder, matching = take_matching(state.params['encoder'], earlier.params['encoder'])
            params = {**state.params, 'encoder': encoder}
            print(f'{context.name}: encoder from {fields["init_from"]}: {matching}', flush=True)
            # Fresh buffers: the step donates its state, and no buffer may be donated twice.
            ema = jax.tree.map(jnp.copy, params) if state.ema else {}
            state = state.replace(params=params, ema=ema)
        return state

    run = Run(
        name=context.name,
        directory=context.directory,
        mesh=context.mesh,
        train_step=trainer.train_step(),
        streams=streams,
        schedules=make_schedules(fields['optimizer']['groups'], fields['steps']),
        key=_named(jax.random.key(context.config['seed']), context.name),
        summarise=trainer.summarise,
        health=trainer.health,
        evaluate=functools.partial(evaluate, trainer) if evaluate else None,
        later_audio_seconds=context.later_audio_seconds,
    )
    settings = LoopSettings(
        steps=fields['steps'],
        log_every=fields['log_every'],
        eval_every=fields['eval_every'],
        save_every=fields['save_every'],
    )
    try:
        state = train(
            run,
            settings,
            make_state,
            trainer.abstract_state(statistics),
            checkpointer,
            context.stop,
            tensorboard=context.config['compute']['tensorboard'],
        )
    finally:
        checkpointer.close()
    info = save_model(
        context.directory / 'model',
        trainer.encoder,
        trainer.audio,
        fields['objectives'],
        state.evaluated_params(),
        state.constants,
        tokenizer,
        fields['steps'],
    )
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    outputs = {'model': {'hash': info['hash'], 'params': tree_hash(state.params)}}
    results = {
        'parameters': int(parameters),
        'steps': fields['steps'],
        'skipped_steps': int(state.skipped),
        'audio_hours': round(training_audio_seconds(context.config, context.name) / 3600, 2),
        'excluded': {name: s.excluded for name, s in streams.items()},
    }
    return outputs, results
