"""A trained Transformer language model as a beam search asks for one.

The search keeps N = batch x beam hypotheses, which grow at different times, fork, and are dropped:
it reorders the rows of the state as it likes, and throws a row's step away when the hypothesis was
not extended.  So every leaf of the state has N in front, and each row carries its own place
(`models/language_model.py`); nothing here knows of frames.

A state has keys and values of the last `slots` tokens of each hypothesis, or of all, where the
search allows no more:

    N x slots x layers x width x 2 numbers       16 x 4 x 128 x 8 x 1024 x 2 in bf16: 0.27 GB

Longer hypotheses go on with what they said last; with slots = `context` of the model that is what
it was trained to do.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bigssl_jax.decoding.fusion import LanguageModel
from bigssl_jax.models import language_model as lm

SLOTS = 256


def neural_lm(config: lm.LanguageModelConfig, params: Any, slots: int = SLOTS) -> LanguageModel:
    """A language model for fusion.

    Args:
      config: of the model.
      params: its parameters, unboxed, arrays on the devices of the search or numpy.
      slots: tokens of a hypothesis that are remembered.
    """
    return LanguageModel(
        params=params,
        initial=_bound(_initial, config, min(slots, config.context)),
        advance=_bound(_advance, config),
        final=_bound(_final, config),
    )


@functools.lru_cache(maxsize=64)
def _bound(function: Any, *given: Any) -> Any:
    """One partial for equal arguments: equal models are one compiled program's key."""
    return functools.partial(function, *given)


def _initial(
    config: lm.LanguageModelConfig, slots: int, params: Any, count: int, length: int
) -> Any:
    """State of `count` hypotheses without a token; 'end' is log P(</s>) after the last step."""
    del params
    slots = min(slots, length + 1)  # the start of the sentence has one
    zeros = jnp.zeros((count,), jnp.float32)
    return {'cache': lm.initial_state(config, count, slots), 'end': zeros}


def _advance(
    config: lm.LanguageModelConfig, params: Any, state: Any, tokens: jax.Array
) -> tuple[Any, jax.Array]:
    """One token more: (state, log-probabilities of the next, float32 [N, V], the blank -inf)."""
    cache, logits = lm.step(config, params, state['cache'], tokens)
    found = lm.log_probs(logits, config.blank_id)
    return {'cache': cache, 'end': found[:, lm.END]}, found


def _final(config: lm.LanguageModelConfig, params: Any, state: Any) -> jax.Array:
    """log P(</s>) float32 [N]."""
    del config, params
    return state['end']
