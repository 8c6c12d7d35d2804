"""The one train step.

    for each (objective, stream, weight):   sum of loss over its micro-batches / sum of weights
    total gradient  ->  clip by global norm  ->  direction per parameter group  ->  x -rate
    not finite?     ->  keep the old parameters, count the step as skipped
    loss, finite    ->  the guard that tells divergence (`guard.py`)
    EMA             ->  decay min(d, (1 + t) / (10 + t))

An objective's totals are additive, so splitting a batch into micro-batches changes nothing but the
order of summation.  Random keys are named: `fold_in(fold_in(key, step), crc32(objective name))`,
then the objective folds in the row of the global batch; no key depends on devices or hosts.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigssl_jax.training.guard import watch
from bigssl_jax.training.state import TrainState

Totals = dict[str, jax.Array]
# (params, constants, batch, key) -> additive totals, with 'loss' and 'weight' among them.
TotalsFunction = Callable[[Any, Any, dict[str, jax.Array], jax.Array], Totals]


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the loss.

    Attributes:
      name: the objective's name in the config; names its metrics.
      totals: the objective bound to its encoder and heads.
      weight: factor of the normalised loss.
    """

    name: str
    totals: TotalsFunction
    weight: float


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the step does besides the objectives.

    Attributes:
      clip_norm: global gradient norm above which gradients are scaled down; 0: never.
      ema_decay: 0 keeps no average.
      micro_batches: pieces into which every batch is cut, one after the other.
    """

    clip_norm: float = 20.0
    ema_decay: float = 0.0
    micro_batches: int = 1


def make_train_step(
    terms: tuple[Term, ...],
    optimizer: optax.GradientTransformation,
    labels: Any,
    settings: StepSettings,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Builds `train_step(state, batches, rates, key) -> (state, report)`.

    Args:
      terms: the summands of the loss.
      optimizer: directions per group, from `make_optimizer`.
      labels: the tree of group names, from `make_optimizer`.
      settings: clipping, averaging, accumulation.

    Returns:
      A pure function, to be jitted with the state donated.  `batches` maps a term's name to its
      Batch; `rates` maps a group's name to its learning rate (float32 scalar); `key` is the
      stage's key.  `report` holds {'totals': {term: totals}, 'grad_norm', 'finite'}.
    """

    def train_step(
        state: TrainState,
        batches: Mapping[str, dict[str, jax.Array]],
        rates: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> tuple[TrainState, dict[str, Any]]:
        step_key = jax.random.fold_in(key, state.step)
        gradients = jax.tree.map(jnp.zeros_like, state.params)
        loss = jnp.zeros((), jnp.float32)
        totals = {}
        for term in terms:
            term_key = jax.random.fold_in(step_key, zlib.crc32(term.name.encode()))
            term_gradients, totals[term.name] = _gradients(
                term.totals, state, batches[term.name], term_key, settings.micro_batches
            )
            scale = term.weight / jnp.maximum(totals[term.name]['weight'], 1.0)
            loss += scale * totals[term.name]['loss']
            gradients = optax.tree.add_scale(gradients, scale, term_gradients)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        if settings.clip_norm:
            shrink = jnp.minimum(1.0, settings.clip_norm / jnp.maximum(norm, 1e-9))
            gradients = jax.tree.map(lambda g: g * shrink, gradients)
        new = _update(state, gradients, optimizer, labels, rates, settings.ema_decay)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        kept = kept.replace(
            step=state.step + 1,
            skipped=state.skipped + (1 - finite.astype(jnp.int32)),
            guard=watch(state.guard, state.step - state.skipped, loss, finite),
        )
        return kept, {'totals': totals, 'grad_norm': norm, 'finite': finite}

    return train_step


def _gradients(
    totals_function: TotalsFunction,
    state: TrainState,
    batch: dict[str, jax.Array],
    key: jax.Array,
    micro_batches: int,
) -> tuple[Any, Totals]:
    """Gradient of the summed loss, and the totals, over all micro-batches."""

    def loss(params: Any, piece: dict[str, jax.Array]) -> tuple[jax.Array, Totals]:
        totals = totals_function(params, state.constants, piece, key)
        return totals['loss'], totals

    gradient = jax.grad(loss, has_aux=True)
    if micro_batches == 1:
        return gradient(state.params, batch)
    # Row r goes to piece r mod n: every piece stays spread over all devices.
    pieces = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(
            0, 1
        ),
        batch,
    )

    def add(carry: Any, piece: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, gradient(state.params, piece)), None

    first = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, state.params, first)
    )
    return jax.lax.scan(add, zeros, pieces)[0]


def _update(
    state: TrainState,
    gradients: Any,
    optimizer: optax.GradientTransformation,
    labels: Any,
    rates: Mapping[str, jax.Array],
    ema_decay: float,
) -> TrainState:
    """The state after an accepted update (step counters untouched)."""
    directions, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = jax.tree.map(
        lambda p, d, label: p - (rates[label] * d).astype(p.dtype), state.params, directions, labels
    )
    ema = state.ema
    if ema_decay:
        t = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + t) / (10.0 + t))
        ema = jax.tree.map(lambda average, p: average + (1.0 - decay) * (p - average), ema, params)
    return state.replace(params=params, optimizer=optimizer_state, ema=ema)
