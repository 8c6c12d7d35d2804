"""A Transformer language model: which token comes next.

    input      <start>  y1   y2  ..  yU         <start> is the blank's id, which no text holds
                  |      |    |       |
    block         each position sees itself and the `context - 1` before it
                  |      |    |       |
    logits       y1     y2   y3  .. </s>        [B, U + 1, V]

    block(x):  x += attention(LayerNorm(x));  x += FFN(LayerNorm(x))       12 D^2 + 13 D parameters

Positions are relative: query and key are rotated by angles that grow with their place (rotary
embedding, arXiv 2104.09864), so that their product depends on how far apart they stand and on
nothing else.  It has no parameters and no table of distances, and keys can be rotated once and
kept.  The published model has relative positions of a kind not stated [recalled]; rotary ones are
ours.

The model exists twice, with the same parameters.  Whole, for training, where all tokens are known;
and as a step, for decoding, where they come one by one.  A step keeps the keys and values of the
last S tokens of each sequence in arrays of fixed size, place p in slot p mod S:

    S = 4, p = 5:     slot    0   1   2   3
                      place   4   5   2   3         all four may be seen; slot 2 is the next to go

Sequences of one batch may stand at different places: each carries its own p.  With S >= the tokens
so far, or S = `context`, steps equal the whole.

Shape letters: B batch, N sequences of a search, U tokens, T = U + 1, D model, H heads, K head
dimension, S slots, L layers, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigssl_jax.config import ConfigError
from bigssl_jax.models.attention import MASKED_SCORE, attend
from bigssl_jax.models.config import DTYPES
from bigssl_jax.models.layers import (
    HEADS,
    RESIDUAL,
    Dense,
    Dropout,
    FeedForward,
    LayerNorm,
    named,
    zero_padding,
)
from bigssl_jax.parallel import constrain, stored

State = dict[str, jax.Array]

# 8 layers and 103 M parameters [recalled]; width 1024 follows from them, heads and the vocabulary
# of 1024 word-pieces for which the count holds are ours.
PRESETS: dict[str, dict[str, Any]] = {
    'lm-103m': dict(num_layers=8, model_dim=1024, num_heads=16),
    'lm-tiny': dict(num_layers=2, model_dim=128, num_heads=4),
}
REMAT = ('none', 'full')
END = 1  # </s> of every tokenizer here


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """A language model.

    Attributes:
      vocabulary_size: V, blank and </s> included.
      num_layers, model_dim, num_heads: L, D, H; K = D / H must be even.
      ffn_multiplier: hidden width of the feed-forward module over D.
      dropout: on the embedding, behind both modules and inside the feed-forward module.
      context: tokens that one position sees, itself included.
      blank_id: never predicted; as an input it is <start>.
      dtype: of products and activations; parameters, norms, softmax and logits are float32.
      remat: what the backward pass keeps of each layer: 'none' all, 'full' the layer's input.
    """

    vocabulary_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    ffn_multiplier: int = 4
    dropout: float = 0.1
    context: int = 512
    blank_id: int = 0
    dtype: str = 'float32'
    remat: str = 'none'

    def __post_init__(self) -> None:
        for name in ('vocabulary_size', 'num_layers', 'num_heads', 'ffn_multiplier', 'context'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least 1')
        if self.model_dim < 1 or self.model_dim % (2 * self.num_heads):
            raise ConfigError(
                f'model_dim is {self.model_dim}, num_heads {self.num_heads}; model_dim must be a'
                ' multiple of 2 num_heads'
            )
        for name, allowed in (('dtype', DTYPES), ('remat', REMAT)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f'{name} is {getattr(self, name)!r}; allowed: {", ".join(allowed)}'
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f'dropout is {self.dropout}; allowed: 0 to below 1')

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        return self.model_dim * self.ffn_multiplier


def language_model(name: str, vocabulary_size: int, **overrides: Any) -> LanguageModelConfig:
    """The config of a preset ('lm-103m', 'lm-tiny') for a vocabulary, with fields replaced.

    Raises:
      ConfigError: unknown preset, or an override that the config refuses.
    """
    if name not in PRESETS:
        raise ConfigError(f'language model {name!r}; allowed: {", ".join(PRESETS)}')
    return LanguageModelConfig(vocabulary_size, **{**PRESETS[name], **overrides})


def rotary(x: jax.Array, places: jax.Array) -> jax.Array:
    """Turns each pair (x_k, x_{k + K/2}) by the angle place * 10000^(-2k / K).

    Args:
      x: [..., H, K], any float dtype.
      places: [...], integers, broadcast over H.

    Returns:
      As x; the angles are float32.
    """
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = places[..., None, None].astype(jnp.float32) * rates
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class Block(nn.Module):
    """One layer; `__call__` for whole sequences, `step` for one token each."""

    config: LanguageModelConfig

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        heads = (config.num_heads, config.head_dim)
        axes = ('embed', 'heads', 'head_dim')
        self.norm = LayerNorm(dtype=dtype)
        self.query, self.key, self.value = (Dense(heads, axes, dtype) for _ in range(3))
        self.output = Dense((config.model_dim,), ('heads', 'head_dim', 'embed'), dtype)
        self.ffn = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def __call__(
        self, x: jax.Array, mask: jax.Array, bias: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """x [B, T, D], mask bool [B, T], bias float32 [1, 1, T, T] -> [B, T, D]."""
        x = zero_padding(x, mask)
        query, key, value = self._project(x, jnp.arange(x.shape[1])[None])
        h = self.output(constrain(attend(query, key, value, mask, bias), HEADS))
        x = constrain(x + self.dropout(h, deterministic), RESIDUAL)
        x = x + self.ffn(x, mask, deterministic)
        # The second result is the scan's per-layer output; there is none.
        return constrain(x, RESIDUAL), None

    def step(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, places: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [N, 1, D], keys and values [N, S, H, K], places int32 [N] -> the same, a token on."""
        query, key, value = self._project(x, places[:, None])
        slots = keys.shape[1]
        rows, slot = jnp.arange(x.shape[0]), places % slots
        keys = keys.at[rows, slot].set(key[:, 0].astype(keys.dtype))
        values = values.at[rows, slot].set(value[:, 0].astype(values.dtype))
        seen = jnp.arange(slots) <= places[:, None]
        x = x + self.output(attend(query, keys, values, seen))
        return x + self.ffn(x, jnp.ones(x.shape[:2], bool), True), keys, values

    def _project(self, x: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = self.norm(x)
        query = rotary(self.query(h) * self.config.head_dim**-0.5, places)
        key, value = rotary(self.key(h), places), self.value(h)
        return constrain(query, HEADS), constrain(key, HEADS), constrain(value, HEADS)


def _stack(config: LanguageModelConfig) -> Any:
    """The scanned block class; parameters gain a leading axis named 'layer'."""
    block: Any = Block
    if config.remat == 'full':
        policy = jax.checkpoint_policies.nothing_saveable
        block = nn.remat(block, policy=policy, prevent_cse=False, static_argnums=(4,))
    return nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: 'layer'},
    )


class LanguageModel(nn.Module):
    """The language model.  Parameters: L (12 D^2 + 13 D) + 2 V D + V + 2 D (ffn_multiplier 4)."""

    config: LanguageModelConfig

    def setup(self) -> None:
        config = self.config
        init = named(nn.initializers.normal(config.model_dim**-0.5), 'vocab', 'embed')
        shape = (config.vocabulary_size, config.model_dim)
        self.embedding = self.param('embedding', init, shape)
        self.input_dropout = Dropout(config.dropout)
        self.blocks = _stack(config)(config)
        self.norm = LayerNorm(dtype=jnp.dtype(config.dtype))
        self.output = Dense((config.vocabulary_size,), ('embed', 'vocab'), jnp.dtype(config.dtype))

    def __call__(
        self, tokens: jax.Array, counts: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """All positions at once.

        Args:
          tokens: int32 [B, U]; columns from `counts` on may hold anything.
          counts: int32 [B].
          deterministic: False applies dropout, with a random stream named 'dropout'.

        Returns:
          Logits float32 [B, U + 1, V]; position u has seen u tokens.  Padded ones hold anything
          finite.
        """
        config = self.config
        tokens = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=config.blank_id)
        places = jnp.arange(tokens.shape[1])
        mask = places <= counts[:, None]
        x = self.input_dropout(zero_padding(self._embed(tokens), mask), deterministic)
        apart = places[:, None] - places[None, :]
        bias = jnp.where((apart >= 0) & (apart < config.context), 0.0, MASKED_SCORE)
        x, _ = self.blocks(constrain(x, RESIDUAL), mask, bias[None, None], deterministic)
        return self._logits(zero_padding(x, mask))

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """[B, T] -> [B, T, D]; a token outside of the vocabulary is the nearest one inside."""
        dtype = jnp.dtype(self.config.dtype)
        table = stored(self.embedding, ('vocab', 'embed'), dtype)
        return jnp.take(table, tokens, axis=0, mode='clip') * self.config.model_dim**0.5

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.output(self.norm(x)).astype(jnp.float32)

    def first(self, tokens: jax.Array) -> jax.Array:
        """tokens [N] -> what goes into the first block, [N, 1, D]."""
        return self._embed(tokens[:, None])

    def last(self, x: jax.Array) -> jax.Array:
        """What comes out of the last block, [N, 1, D] -> logits float32 [N, V]."""
        return self._logits(x)[:, 0]


def log_probs(logits: jax.Array, blank_id: int = 0) -> jax.Array:
    """Logits [..., V] -> float32 log-probabilities of the next token, the blank -inf."""
    blank = jnp.arange(logits.shape[-1]) == blank_id
    return jax.nn.log_softmax(jnp.where(blank, -jnp.inf, logits.astype(jnp.float32)), axis=-1)


def initial_state(config: LanguageModelConfig, count: int, slots: int) -> State:
    """`count` sequences without a token: {'keys', 'values'} [N, L, S, H, K], 'places' int32 [N]."""
    shape = (count, config.num_layers, slots, config.num_heads, config.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(config.dtype))
    return {'keys': zeros, 'values': zeros, 'places': jnp.zeros((count,), jnp.int32)}


def step(
    config: LanguageModelConfig, params: Any, state: State, tokens: jax.Array
) -> tuple[State, jax.Array]:
    """One token more for each of N sequences.

    Args:
      config: of the model.
      params: its parameters, unboxed.
      state: from `initial_state` or an earlier step.
      tokens: int32 [N]; the blank's id before the first token.

    Returns:
      (the state after them, logits float32 [N, V] of the next tokens).
    """
    model, places = LanguageModel(config), state['places']
    x = model.apply({'params': params}, tokens, method='first')

    def layer(x: jax.Array, given: Any) -> tuple[jax.Array, Any]:
        own, keys, values = given
        x, keys, values = Block(config).apply(
            {'params': own}, x, keys, values, places, method='step'
        )
        return x, (keys, values)

    # Layers are scanned over, so they stand in front; sequences are reordered by the search, so
    # between steps they do.
    front = (jnp.swapaxes(state[name], 0, 1) for name in ('keys', 'values'))
    x, kept = jax.lax.scan(layer, x, (params['blocks'], *front))
    keys, values = (jnp.swapaxes(part, 0, 1) for part in kept)
    logits = model.apply({'params': params}, x, method='last')
    return {'keys': keys, 'values': values, 'places': places + 1}, logits


def parameter_count(config: LanguageModelConfig) -> int:
    """Parameters of the model, from shapes alone: nothing is allocated."""

    def init(tokens: jax.Array, counts: jax.Array) -> Any:
        return LanguageModel(config).init(jax.random.key(0), tokens, counts)

    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    shapes = jax.eval_shape(init, tokens, jax.ShapeDtypeStruct((1,), jnp.int32))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
