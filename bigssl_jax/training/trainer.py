"""A training stage's model, losses and optimizer: everything about its step but the data.

encoder, heads  ->  parameters     born sharded, the same bits on every mesh
objectives      ->  terms          bound to the encoder, the front end and the augmentation
groups          ->  optimizer      state laid out as the parameters are
"""

import dataclasses
import functools
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
from bigssl_jax.objectives import TRANSCRIPT, EncoderCall
from bigssl_jax.objectives.encoder_call import named_key
from bigssl_jax.parallel import logical_to_shardings, replicated, use_mesh
from bigssl_jax.training.optimizers import make_optimizer, path_name
from bigssl_jax.training.state import TrainState
from bigssl_jax.training.step import StepSettings, Term, Totals, make_train_step


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A stage's model, losses and optimizer: everything about its step but the data.

    Attributes:
      encoder: encoder config; None for a language model: its objectives read text alone.
      audio: front-end config.
      objectives: name -> objective (frozen dataclass of the objectives room).
      fields: the stage's resolved config fields.
      seed: of the experiment.
      mesh: devices.
    """

    encoder: ConformerConfig | None
    audio: AudioConfig
    objectives: Mapping[str, Any]
    fields: Mapping[str, Any]
    seed: int
    mesh: jax.sharding.Mesh

    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters, boxed with their logical axes."""
        return _init_params(self.encoder, self.objectives, key)

    @functools.cached_property
    def abstract_params(self) -> Any:
        """Shapes, dtypes and logical axes of the parameters (boxed); nothing is allocated."""
        with use_mesh(self.mesh):
            return jax.eval_shape(self.init_params, jax.random.key(0))

    @functools.cached_property
    def optimizer(self) -> tuple[optax.GradientTransformation, Any]:
        """The combined direction, and the tree of group names."""
        groups = self.fields['optimizer']['groups']
        return make_optimizer(nn.unbox(self.abstract_params), groups)

    def make_state(
        self,
        statistics: Mapping[str, np.ndarray],
        taken: Mapping[str, jax.Array] | None = None,
    ) -> TrainState:
        """A first state, every array born where it will live.

        Args:
          statistics: of the features.
          taken: name, such as 'encoder/norm/scale' -> the parameter to start with instead of a
            fresh one, laid out as `shardings` says; its memory goes over to the state.
        """
        make = jax.jit(self._make_state, out_shardings=self.shardings(statistics), donate_argnums=1)
        return make(statistics, dict(taken or {}))

    def _make_state(
        self, statistics: Mapping[str, Any], taken: Mapping[str, jax.Array] | None = None
    ) -> TrainState:
        key = jax.random.key(self.seed)
        with use_mesh(self.mesh):
            params = nn.unbox(self.init_params(named_key(key, 'params')))
        if taken:
            params = jax.tree_util.tree_map_with_path(
                lambda path, fresh: taken.get(path_name(path), fresh), params
            )
        constants_key = named_key(key, 'constants')
        heads = {
            name: objective.init_constants(named_key(constants_key, name))
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
        params = logical_to_shardings(self.abstract_params, self.mesh)
        known = {
            path_name(path): (leaf.shape, sharding)
            for (path, leaf), sharding in zip(
                jax.tree_util.tree_leaves_with_path(nn.unbox(self.abstract_params)),
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
        head, own = params['heads'][name], constants['heads'][name]
        if self.encoder is None:
            return objective.totals(None, head, own, batch, key)
        batch = self.perturb(batch, key)
        call = EncoderCall(
            encoder=Encoder(self.encoder),
            params=params['encoder'],
            constants=constants['encoder'],
            audio=self.audio,
            spec_augment=_config(self.fields, 'spec_augment'),
            deterministic=False,
        )
        return objective.totals(call, head, own, batch, key)

    def perturb(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The batch with its waveforms sped up or slowed down and noise added, if so configured."""
        audio, counts = batch['audio'], batch['sample_counts']
        speed, noise = _config(self.fields, 'speed_perturb'), _config(self.fields, 'noise')
        if speed is not None:
            keys = row_keys(named_key(key, 'speed'), batch['rows'])
            audio, counts = speed_perturb(audio, counts, keys, speed)
        if noise is not None:
            keys = row_keys(named_key(key, 'noise'), batch['rows'])
            audio = add_noise(audio, counts, keys, noise)
        return {**batch, 'audio': audio, 'sample_counts': counts}

    def train_step(self) -> Any:
        """The jitted step: its state is donated, and lies after the step as it lay before."""
        optimizer, labels = self.optimizer
        terms = tuple(
            Term(name, functools.partial(self._totals, name), fields['weight'])
            for name, fields in self.fields['objectives'].items()
        )
        given = self.fields['optimizer']
        settings = StepSettings(given['clip_norm'], given['ema_decay'], given['micro_batches'])
        statistics = {
            name: jax.ShapeDtypeStruct((self.audio.num_mels,), jnp.float32)
            for name in (('feature_mean', 'feature_std') if self.encoder else ())
        }
        # Left to the compiler, the new state may lie otherwise, and step 2 would compile again.
        return jax.jit(
            make_train_step(terms, optimizer, labels, settings),
            donate_argnums=0,
            out_shardings=(self.shardings(statistics), None),
        )

    def transcript_head(self) -> str:
        """The name of the first objective whose head writes text.

        Raises:
          ConfigError: the stage has none.
        """
        for name, objective in self.objectives.items():
            if isinstance(objective, tuple(TRANSCRIPT.values())):
                return name
        raise ConfigError(f'a stage with a dev set needs an objective of {", ".join(TRANSCRIPT)}')

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Readable metrics of all terms; `loss` is their weighted sum."""
        metrics: dict[str, float] = {'loss': 0.0}
        for name, objective in self.objectives.items():
            summary = objective.summarise(totals[name])
            metrics['loss'] += self.fields['objectives'][name]['weight'] * summary['loss']
            metrics |= {f'{name}/{metric}': value for metric, value in summary.items()}
        return metrics

    def health(self, metrics: Mapping[str, float], step: int) -> str | None:
        """The first objective's advice, when one has collapsed by `step`."""
        for name, objective in self.objectives.items():
            own = {k.removeprefix(f'{name}/'): v for k, v in metrics.items() if k.startswith(name)}
            advice = objective.health(own, step)
            if advice:
                return advice
        return None


def _init_params(
    encoder: ConformerConfig | None, objectives: Mapping[str, Any], key: jax.Array
) -> Any:
    return {
        'encoder': _init_encoder(encoder, jax.random.fold_in(key, 0)) if encoder else {},
        'heads': {
            name: objective.init_params(named_key(key, name), encoder)
            for name, objective in objectives.items()
        },
    }


def _init_encoder(encoder: ConformerConfig, key: jax.Array) -> Any:
    features = jnp.zeros((1, 16, encoder.num_mels), jnp.float32)
    mask = jnp.ones((1, 16), bool)
    return Encoder(encoder).init(key, features, mask)['params']


def parameter_layout(
    encoder: ConformerConfig | None, objectives: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> Any:
    """{'encoder', 'heads'} of `jax.ShapeDtypeStruct` with the shardings that the rules give."""
    with use_mesh(mesh):
        boxed = jax.eval_shape(
            functools.partial(_init_params, encoder, objectives), jax.random.key(0)
        )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        logical_to_shardings(boxed, mesh),
    )


def _config(fields: Mapping[str, Any], name: str) -> Any:
    """The stage's augmentation config of that name, or None."""
    kinds = {'spec_augment': SpecAugmentConfig, 'speed_perturb': SpeedConfig, 'noise': NoiseConfig}
    return None if fields[name] is None else kinds[name](**fields[name])
