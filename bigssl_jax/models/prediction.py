"""Prediction networks: what a transducer knows of the labels that it has already written.

    input        <start>  y1    y2   ...  yU        <start> is the blank's id
                    |      |     |         |
    embedding    [B, U + 1, P]
                    |      |     |         |
    output         p0     p1    p2   ...  pU        p_u has seen y1 .. yu and nothing later

'lstm' (Graves 2012) remembers everything; 'stateless' (Ghodsi et al. 2020) only the last `context`
labels, as a weighted sum of their embeddings: an n-gram network, cheap to search with.

Both exist twice: whole, for training, where all labels are known; and as a step, for decoding,
where they come one by one.  Labels behind the last real one may be anything: nothing that they
influence stands before them.

The LSTM's own derivative would add up the gradient of the recurrent kernel inside the loop over
labels.  Here the loop backwards only carries the gradients of the gates out; the kernel's gradient
is one product of all steps after it, and the gates are recomputed from h in one product before it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigssl_jax.models.layers import named, row_dropout

KINDS = ('lstm', 'stateless')


@dataclasses.dataclass(frozen=True)
class PredictionConfig:
    """A prediction network.

    Attributes:
      vocabulary_size: V, blank included.
      kind: 'lstm' or 'stateless'.
      num_layers: of the LSTM.
      dim: P, of embedding and output.
      context: labels that a stateless network sees.
      dropout: on the embedding and behind each layer.
      blank_id: of the blank, which also stands for <start>.
      dtype: of the products; state and output are float32.
    """

    vocabulary_size: int
    kind: str = 'lstm'
    num_layers: int = 2
    dim: int = 640
    context: int = 2
    dropout: float = 0.0
    blank_id: int = 0
    dtype: str = 'float32'

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'prediction kind is {self.kind!r}; allowed: {", ".join(KINDS)}')
        for field in ('num_layers', 'dim', 'context'):
            if getattr(self, field) < 1:
                raise ValueError(f'prediction {field} is {getattr(self, field)}; it must be >= 1')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'prediction dropout is {self.dropout}; allowed: 0 to below 1')


class Prediction(nn.Module):
    """A prediction network.  Parameters: V P + n (8 P^2 + 4 P) as LSTM, V P + k P as stateless."""

    config: PredictionConfig

    def setup(self) -> None:
        config = self.config
        shape = (config.vocabulary_size, config.dim)
        init = named(nn.initializers.normal(1.0), 'vocab', 'embed')
        self.embedding = self.param('embedding', init, shape)
        if config.kind == 'lstm':
            self.layers = [_Layer(config, name=f'lstm{i}') for i in range(config.num_layers)]
        else:
            init = named(nn.initializers.normal(config.context**-0.5), None, 'embed')
            self.position_kernel = self.param('position_kernel', init, (config.context, config.dim))

    def __call__(self, labels: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """All outputs at once.

        Args:
          labels: int32 [B, U]; padding may hold any number.
          keys: [B], of the dropout of each row; None for none.

        Returns:
          float32 [B, U + 1, P].
        """
        labels = jnp.pad(labels, ((0, 0), (1, 0)), constant_values=self.config.blank_id)
        x = self._dropped(self._embed(labels), keys, 0)
        if self.config.kind == 'stateless':
            size, context = x.shape[1], self.config.context
            start = self._embed(jnp.full((x.shape[0], context - 1), self.config.blank_id))
            x = jnp.concatenate([start, x], axis=1)
            windows = jnp.stack([x[:, i : i + size] for i in range(context)], axis=2)
            return self._mixed(windows)
        for number, layer in enumerate(self.layers):
            x = self._dropped(layer(x), keys, number + 1)
        return x

    def initial_state(self, rows: int) -> Any:
        """The state before <start>: arrays with leading axis `rows`."""
        config = self.config
        if config.kind == 'stateless':
            return jnp.full((rows, config.context), config.blank_id, jnp.int32)
        zeros = jnp.zeros((rows, config.num_layers, config.dim), jnp.float32)
        return {'hidden': zeros, 'cell': zeros}

    def step(self, state: Any, labels: jax.Array) -> tuple[Any, jax.Array]:
        """One label more: (state, int32 [B]) -> (state, float32 [B, P])."""
        if self.config.kind == 'stateless':
            state = jnp.concatenate([state[:, 1:], labels[:, None]], axis=1)
            return state, self._mixed(self._embed(state))
        x = self._embed(labels)
        hidden, cells = [], []
        for number, layer in enumerate(self.layers):
            x, cell = layer.step(x, state['hidden'][:, number], state['cell'][:, number])
            hidden.append(x)
            cells.append(cell)
        return {'hidden': jnp.stack(hidden, axis=1), 'cell': jnp.stack(cells, axis=1)}, x

    def _embed(self, labels: jax.Array) -> jax.Array:
        return jnp.take(self.embedding, labels, axis=0, mode='clip')

    def _mixed(self, windows: jax.Array) -> jax.Array:
        """Embeddings [..., k, P] of the last k labels -> [..., P]."""
        return nn.swish(jnp.sum(windows * self.position_kernel, axis=-2))

    def _dropped(self, x: jax.Array, keys: jax.Array | None, number: int) -> jax.Array:
        if keys is None or self.config.dropout == 0.0:
            return x
        keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        return row_dropout(x, keys, self.config.dropout)


class _Layer(nn.Module):
    """One LSTM layer P -> P with one bias: 8 P^2 + 4 P parameters; gates in the order i f g o."""

    config: PredictionConfig

    def setup(self) -> None:
        size = self.config.dim
        # Uniform in +-P^-0.5 as PyTorch's; the forget gate starts open [ours].
        init = named(_uniform(size**-0.5), 'embed', 'mlp')
        self.input_kernel = self.param('input_kernel', init, (size, 4 * size))
        self.recurrent_kernel = self.param('recurrent_kernel', init, (size, 4 * size))
        self.bias = self.param('bias', named(_forget_open, 'mlp'), (4 * size,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, U, P] -> float32 [B, U, P], from a state of zeros."""
        gates = self._input_gates(x)
        kernel = self.recurrent_kernel.astype(self.config.dtype)
        return lstm(gates.swapaxes(0, 1), kernel).swapaxes(0, 1)

    def step(self, x: jax.Array, hidden: jax.Array, cell: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step, all [B, P]: (x, hidden, cell) -> (hidden, cell)."""
        kernel = self.recurrent_kernel.astype(self.config.dtype)
        return _cell(self._input_gates(x) + _product(hidden, kernel), cell)

    def _input_gates(self, x: jax.Array) -> jax.Array:
        return _product(x, self.input_kernel.astype(self.config.dtype)) + self.bias


@jax.custom_vjp
def lstm(gates: jax.Array, kernel: jax.Array) -> jax.Array:
    """The recurrence of an LSTM layer, from a state of zeros.

    Args:
      gates: float32 [U, B, 4 P], what input and bias give to the gates i f g o.
      kernel: [P, 4 P], from the last output to the gates; its dtype is that of the products.

    Returns:
      float32 [U, B, P].
    """
    return _run(gates, kernel)[0]


def _run(gates: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs and cells, float32 [U, B, P] each."""

    def step(state: tuple, given: jax.Array) -> tuple[tuple, tuple]:
        hidden, cell = state
        new = _cell(given + _product(hidden, kernel), cell)
        return new, new

    zeros = jnp.zeros((gates.shape[1], kernel.shape[0]), jnp.float32)
    return jax.lax.scan(step, (zeros, zeros), gates)[1]


def _forward(gates: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    hidden, cells = _run(gates, kernel)
    return hidden, (gates, kernel, hidden, cells)


def _backward(saved: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    gates, kernel, hidden, cells = saved
    before, cells_before = (jnp.pad(x, ((1, 0), (0, 0), (0, 0)))[:-1] for x in (hidden, cells))
    inputs = gates + _product(before, kernel)

    def step(carry: tuple, given: tuple) -> tuple[tuple, jax.Array]:
        of_hidden, of_cell = carry
        inputs, cell_before, cotangent = given
        _, pull = jax.vjp(_cell, inputs, cell_before)
        of_inputs, of_cell = pull((cotangent + of_hidden, of_cell))
        return (_product(of_inputs, kernel.T), of_cell), of_inputs

    zeros = jnp.zeros(hidden.shape[1:], jnp.float32)
    given = (inputs, cells_before, cotangent)
    _, of_inputs = jax.lax.scan(step, (zeros, zeros), given, reverse=True)
    of_kernel = jnp.einsum(
        'ubp,ubg->pg', before.astype(kernel.dtype), of_inputs.astype(kernel.dtype)
    )
    return of_inputs, of_kernel


lstm.defvjp(_forward, _backward)


def _cell(gates: jax.Array, cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gates [B, 4 P] and the last cell [B, P] -> output and cell."""
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
    return nn.sigmoid(o) * jnp.tanh(cell), cell


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel in the kernel's dtype, accumulated and returned in float32."""
    return jnp.matmul(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)


def _uniform(limit: float) -> Any:
    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -limit, limit)

    return init


def _forget_open(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del key
    return jnp.zeros(shape, jnp.float32).reshape(4, -1).at[1].set(1.0).reshape(shape)
