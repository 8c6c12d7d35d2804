"""Parameter groups, each with its own optimizer and schedule.

An optimizer here returns a *direction* (Adam's or Adafactor's normalised gradient plus decoupled
weight decay).  The train step multiplies each group's direction by minus its learning rate, which
is an argument of the step and not part of the compiled program.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigssl_jax.config import ConfigError, choose
from bigssl_jax.training.schedules import Schedule

ALGORITHMS = ('adamw', 'adafactor', 'frozen')
# Names of the parameters that weight decay shrinks: matrices, not biases and norms.
WEIGHTS = ('kernel', 'kernel0', 'kernel1', 'depthwise', 'embedding')

GROUP_DEFAULTS: dict[str, Any] = {
    'pattern': '.*',
    'algorithm': 'adamw',
    'peak': 1e-3,
    'warmup': 1000,
    'schedule': 'inverse_sqrt',
    'start': 0,
    'b1': 0.9,
    'b2': 0.98,
    'eps': 1e-9,
    'weight_decay': 0.0,
}


def path_name(path: tuple) -> str:
    """A key path as `encoder/layers/ffn_start/kernel`."""
    return '/'.join(str(getattr(key, 'key', getattr(key, 'name', key))) for key in path)


def _adam_decay(step: jax.Array, decay: float) -> jax.Array:
    """The second-moment decay that makes a running mean equal Adam's bias-corrected one."""
    t = jnp.asarray(step, jnp.float32) + 1.0
    return decay * (1.0 - decay ** (t - 1.0)) / (1.0 - decay**t)


def _direction(group: Mapping[str, Any]) -> optax.GradientTransformation:
    algorithm = choose('optimizer.groups.*.algorithm', group['algorithm'], ALGORITHMS)
    if algorithm == 'frozen':
        # Masking the gradient instead would let weight decay move frozen leaves.
        return optax.set_to_zero()
    if algorithm == 'adamw':
        core = optax.scale_by_adam(b1=group['b1'], b2=group['b2'], eps=group['eps'])
    else:
        # The setting of praxis `ShardedAdafactor.HParamsAdamB`: Adam's bias-corrected decay of a
        # factored second moment, update clipping at 1, no scaling by the parameter's norm, and a
        # first moment in bfloat16.
        core = optax.chain(
            optax.scale_by_factored_rms(decay_rate=group['b2'], decay_rate_fn=_adam_decay),
            optax.clip_by_block_rms(1.0),
            optax.ema(group['b1'], debias=False, accumulator_dtype=jnp.bfloat16),
        )
    if not group['weight_decay']:
        return core

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path_name(path).endswith(WEIGHTS), params
        )

    return optax.chain(core, optax.add_decayed_weights(group['weight_decay'], mask=matrices))


def group_labels(params: Any, groups: Mapping[str, Mapping[str, Any]]) -> Any:
    """The tree of group names: a parameter belongs to the first group whose pattern it matches.

    Raises:
      ConfigError: a parameter that no group matches, or a group that matches nothing.
    """
    matched: set[str] = set()

    def label(path: tuple, _: Any) -> str:
        name = path_name(path)
        for group, fields in groups.items():
            if re.search(fields['pattern'], name):
                matched.add(group)
                return group
        raise ConfigError(
            f'parameter {name!r} matches no pattern of optimizer.groups:'
            f' {[fields["pattern"] for fields in groups.values()]}'
        )

    labels = jax.tree_util.tree_map_with_path(label, params)
    for group in groups:
        if group not in matched:
            raise ConfigError(
                f'optimizer.groups.{group}.pattern {groups[group]["pattern"]!r}'
                ' matches no parameter'
            )
    return labels


def make_optimizer(
    params: Any, groups: Mapping[str, Mapping[str, Any]]
) -> tuple[optax.GradientTransformation, Any]:
    """The combined direction of all groups, and the tree of group names.

    Args:
      params: parameters, abstract ones suffice.
      groups: group name -> fields of GROUP_DEFAULTS.
    """
    labels = group_labels(params, groups)
    directions = {name: _direction(fields) for name, fields in groups.items()}
    return optax.multi_transform(directions, labels), labels


def make_schedules(
    groups: Mapping[str, Mapping[str, Any]], total_steps: int
) -> dict[str, Schedule]:
    """One schedule per group; a frozen group's rate is zero."""
    return {
        name: Schedule(
            peak=0.0 if fields['algorithm'] == 'frozen' else fields['peak'],
            warmup=fields['warmup'],
            shape=fields['schedule'],
            total_steps=total_steps,
            start=fields['start'],
        )
        for name, fields in groups.items()
    }
