"""Shallow fusion: what language models add to a beam's scores, and what is taken away again.

    score(y) = log P(y | audio)
             + lm_weight          * log P_lm(y </s>)
             + ngram_weight       * log P_ngram(y </s>)
             - internal_lm_weight * log P_internal(y)        transducers only
             + length_reward      * |y|

All but the first line depend on the labels alone, however they are aligned.  A search therefore
adds them once, in the step that appends a label to a hypothesis, never for a blank; merging two
alignments of one label sequence leaves them as they are; `</s>` is added when the audio ends.

Internal-LM subtraction (HAT, arXiv 2003.07705) takes away what a transducer has learned of the
language of its own transcripts, so that an external model is not counted on top of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigssl_jax.config import ConfigError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('params',),
    meta_fields=('initial', 'advance', 'final'),
)
@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What a search needs of a language model; an argument of jitted functions.

    The functions are pure, and equal ones must compare equal (module-level functions, or one
    `functools.partial` kept for the model's life): they are part of the compiled program's key.

    Attributes:
      params: pytree of arrays, the argument of all three.
      initial: (params, n, length) -> state of n sequences without a token, none of which will have
        more than `length`; a pytree of arrays [n, ...].
      advance: (params, state, tokens int32 [n]) -> (state, log_probs float32 [n, V]), the
        distribution of the next token, blank -inf.  The blank given to an initial state stands for
        the start of the sentence: it gives the distribution of the first token.
      final: (params, state) -> float32 [n], log P(</s>), for a state that has been advanced.
    """

    params: Any
    initial: Callable[[Any, int, int], Any]
    advance: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]
    final: Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Weights of the sum above; all zero: the acoustic model alone decides.

    Attributes:
      lm_weight: of the neural language model.
      ngram_weight: of the n-gram model.
      internal_lm_weight: of a transducer's internal language model, subtracted.
      length_reward: nats per label.
    """

    lm_weight: float = 0.0
    ngram_weight: float = 0.0
    internal_lm_weight: float = 0.0
    length_reward: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lowest = -math.inf if field.name == 'length_reward' else 0.0
            if not (math.isfinite(value) and value >= lowest):
                allowed = 'any finite number' if lowest else '0 or more'
                raise ConfigError(f'decoder.{field.name} is {value}; allowed: {allowed}')


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('models', 'weights', 'internal_lm_weight', 'length_reward'),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Fusion:
    """Language models with their weights: a pytree, so that new weights need no new program.

    Attributes:
      models: external language models.
      weights: float32 [number of models].
      internal_lm_weight, length_reward: float32 scalars.
    """

    models: tuple[LanguageModel, ...]
    weights: jax.Array
    internal_lm_weight: jax.Array
    length_reward: jax.Array


class FusionState(NamedTuple):
    """Where the language models stand in n hypotheses.

    Attributes:
      states: one per model, arrays [n, ...].
      label_scores: float32 [n, V], what the next label adds; [n, 1] where no model is fused.
    """

    states: tuple[Any, ...]
    label_scores: jax.Array


def make_fusion(
    config: FusionConfig = FusionConfig(),
    lm: LanguageModel | None = None,
    ngram: LanguageModel | None = None,
) -> Fusion:
    """The models of weights above zero.

    Raises:
      ConfigError: a weight is given for a model that is not.
    """
    models, weights = [], []
    for name, weight, model in (
        ('lm', config.lm_weight, lm),
        ('ngram', config.ngram_weight, ngram),
    ):
        if weight and model is None:
            raise ConfigError(
                f'decoder.{name}_weight is {weight}, but decoder.{name} names no model;'
                f' set decoder.{name}, or the weight to 0'
            )
        if weight and model is not None:
            models.append(model)
            weights.append(weight)
    return Fusion(
        models=jax.tree.map(jnp.asarray, tuple(models)),
        weights=jnp.asarray(weights, jnp.float32),
        internal_lm_weight=jnp.float32(config.internal_lm_weight),
        length_reward=jnp.float32(config.length_reward),
    )


def start(fusion: Fusion, count: int, length: int, blank_id: int) -> FusionState:
    """`count` hypotheses without a label, which may have up to `length`."""
    states = tuple(model.initial(model.params, count, length) for model in fusion.models)
    return advance(fusion, states, jnp.full((count,), blank_id, jnp.int32))


def advance(fusion: Fusion, states: tuple[Any, ...], tokens: jax.Array) -> FusionState:
    """Appends tokens int32 [n] to the sequences that `states` stand for."""
    found = [
        model.advance(model.params, state, tokens)
        for model, state in zip(fusion.models, states, strict=True)
    ]
    scores = jnp.full((tokens.shape[0], 1), fusion.length_reward)
    for i, (_, log_probs) in enumerate(found):
        scores = scores + fusion.weights[i] * log_probs.astype(jnp.float32)
    return FusionState(tuple(state for state, _ in found), scores)


def final(fusion: Fusion, state: FusionState) -> jax.Array:
    """What the end of the sentence adds: float32 [n]."""
    total = jnp.zeros((state.label_scores.shape[0],), jnp.float32)
    for i, (model, inner) in enumerate(zip(fusion.models, state.states, strict=True)):
        total = total + fusion.weights[i] * model.final(model.params, inner)
    return total


def label_scores_of(state: FusionState, labels: jax.Array) -> jax.Array:
    """What each of `labels` int32 [n, C] would add: float32 [n, C]."""
    if state.label_scores.shape[1] == 1:
        return jnp.broadcast_to(state.label_scores, labels.shape)
    return jnp.take_along_axis(state.label_scores, labels, axis=1)


def sequence_scores(
    model: LanguageModel, tokens: jax.Array, counts: jax.Array, blank_id: int = 0
) -> jax.Array:
    """log P(tokens </s>) of whole sequences, unweighted.

    Args:
      model: the language model.
      tokens: int32 [N, U]; columns from `counts` on may hold anything.
      counts: int32 [N].
      blank_id: of the blank.

    Returns:
      float32 [N].
    """
    count = tokens.shape[0]
    model = jax.tree.map(jnp.asarray, model)  # a scan cannot index numpy arrays

    def step(carry: Any, column: jax.Array) -> tuple[Any, None]:
        state, total, token, position = carry
        state, log_probs = model.advance(model.params, state, token)
        inside = position < counts
        token = jnp.where(inside, column, blank_id)
        added = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        ending = jnp.where(position == counts, model.final(model.params, state), 0.0)
        total = total + jnp.where(inside, added, ending)
        return (state, total, token, position + 1), None

    initial = (
        model.initial(model.params, count, tokens.shape[1]),
        jnp.zeros((count,), jnp.float32),
        jnp.full((count,), blank_id, jnp.int32),
        jnp.zeros((), jnp.int32),
    )
    columns = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, 1)))
    carry, _ = jax.lax.scan(step, initial, columns.T)
    return carry[1]
