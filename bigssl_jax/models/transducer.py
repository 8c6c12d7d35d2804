"""The decoder of a transducer: prediction network, joint network, and what a search asks of them.

    frame t    --encoder_projection----> [J] \\
                                              + --> tanh --output--> V logits --> log-probabilities
    labels ..u --prediction--> projection --> [J] /

Two factorisations of the V logits:

    'softmax'   RNN-T (Graves 2012): one softmax over the labels and the blank
    'hat'       HAT (Variani et al. 2020): logit `blank_id` decides by a sigmoid whether to go on to
                the next frame; if not, a softmax over the other logits decides on the label

With the encoder's part left out, the label scores of either are an internal language model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigssl_jax.models.prediction import Prediction, PredictionConfig
from bigssl_jax.parallel import stored

FACTORISATIONS = ('softmax', 'hat')


@dataclasses.dataclass(frozen=True)
class TransducerConfig:
    """A transducer's decoder.

    Attributes:
      prediction: its prediction network.
      joint_dim: J.
      factorisation: 'softmax' or 'hat'.
    """

    prediction: PredictionConfig
    joint_dim: int = 640
    factorisation: str = 'softmax'

    def __post_init__(self) -> None:
        if self.joint_dim < 1:
            raise ValueError(f'joint_dim is {self.joint_dim}; it must be >= 1')
        if self.factorisation not in FACTORISATIONS:
            raise ValueError(
                f'factorisation is {self.factorisation!r}; allowed: {", ".join(FACTORISATIONS)}'
            )


class Transducer(NamedTuple):
    """What a search needs of a transducer, for N hypotheses at once.

    Attributes:
      initial: n -> state before <start>, a tree of arrays with leading axis n.
      advance: (state, labels int32 [N]) -> (state, projected float32 [N, J]); the first label of a
        hypothesis is <start>, that is `blank_id`.
      log_probs: (encoded [N, J], projected [N, J]) -> float32 [N, V], which sum to 1.
      internal_lm: projected [N, J] -> float32 [N, V], log-probabilities of the labels without the
        encoder; the blank has -inf.
      blank_id: of the blank.
      vocabulary_size: V.
    """

    initial: Callable[[int], Any]
    advance: Callable[[Any, jax.Array], tuple[Any, jax.Array]]
    log_probs: Callable[[jax.Array, jax.Array], jax.Array]
    internal_lm: Callable[[jax.Array], jax.Array]
    blank_id: int
    vocabulary_size: int


def init_transducer(key: jax.Array, config: TransducerConfig, encoder_dim: int) -> dict[str, Any]:
    """Boxed parameters, float32; kernels LeCun normal, biases zero.

    V P + n (8 P^2 + 4 P) of the prediction network (LSTM), (D J + J) + P J + (J V + V) of the rest.
    """
    prediction, joint = config.prediction, config.joint_dim
    keys = jax.random.split(key, 4)
    example = jnp.zeros((1, 1), jnp.int32)
    return {
        'prediction': Prediction(prediction).init(keys[0], example)['params'],
        'encoder_projection': _dense(keys[1], encoder_dim, joint, 'mlp') | _bias(joint, 'mlp'),
        'prediction_projection': _dense(keys[2], prediction.dim, joint, 'mlp'),
        'output': _dense(keys[3], joint, prediction.vocabulary_size, 'vocab')
        | _bias(prediction.vocabulary_size, 'vocab'),
    }


def project_encoder(params: Mapping[str, Any], frames: jax.Array, dtype: Any) -> jax.Array:
    """Encoder frames [..., D] -> float32 [..., J]; the product runs in `dtype`."""
    given = params['encoder_projection']
    return _product(frames, given['kernel'], 'mlp', dtype) + given['bias']


def project_prediction(params: Mapping[str, Any], predicted: jax.Array, dtype: Any) -> jax.Array:
    """Outputs of the prediction network [..., P] -> float32 [..., J]."""
    return _product(predicted, params['prediction_projection']['kernel'], 'mlp', dtype)


def joint_logits(params: Mapping[str, Any], joint: jax.Array, dtype: Any) -> jax.Array:
    """Sums of encoder's and prediction's part [..., J] -> logits float32 [..., V]."""
    given = params['output']
    return _product(jnp.tanh(joint), given['kernel'], 'vocab', dtype) + given['bias']


def factorised(logits: jax.Array, factorisation: str, blank_id: int) -> jax.Array:
    """Log-probabilities float32 [..., V] of joint logits [..., V]."""
    if factorisation == 'softmax':
        return jax.nn.log_softmax(logits, axis=-1)
    blank = logits[..., blank_id : blank_id + 1]
    labels = label_log_probs(logits, blank_id) - jax.nn.softplus(blank)
    is_blank = jnp.arange(logits.shape[-1]) == blank_id
    return jnp.where(is_blank, -jax.nn.softplus(-blank), labels)


def label_log_probs(logits: jax.Array, blank_id: int) -> jax.Array:
    """Log-softmax over all logits [..., V] but the blank's, which becomes -inf."""
    is_blank = jnp.arange(logits.shape[-1]) == blank_id
    return jax.nn.log_softmax(jnp.where(is_blank, -jnp.inf, logits), axis=-1)


def bind(config: TransducerConfig, params: Mapping[str, Any], dtype: Any) -> Transducer:
    """The decoder with its parameters, to be called inside `jax.jit` and used there."""
    given = config.prediction
    prediction = Prediction(given)
    variables = {'params': params['prediction']}

    def initial(rows: int) -> Any:
        return prediction.apply(variables, rows, method='initial_state')

    def advance(state: Any, labels: jax.Array) -> tuple[Any, jax.Array]:
        state, predicted = prediction.apply(variables, state, labels, method='step')
        return state, project_prediction(params, predicted, dtype)

    def log_probs(encoded: jax.Array, projected: jax.Array) -> jax.Array:
        logits = joint_logits(params, encoded + projected, dtype)
        return factorised(logits, config.factorisation, given.blank_id)

    def internal_lm(projected: jax.Array) -> jax.Array:
        return label_log_probs(joint_logits(params, projected, dtype), given.blank_id)

    return Transducer(
        initial, advance, log_probs, internal_lm, given.blank_id, given.vocabulary_size
    )


def _dense(key: jax.Array, inputs: int, outputs: int, axis: str) -> dict[str, Any]:
    kernel = jax.random.normal(key, (inputs, outputs), jnp.float32) * inputs**-0.5
    return {'kernel': nn.LogicallyPartitioned(kernel, ('embed', axis))}


def _bias(size: int, axis: str) -> dict[str, Any]:
    return {'bias': nn.LogicallyPartitioned(jnp.zeros((size,), jnp.float32), (axis,))}


def _product(x: jax.Array, kernel: jax.Array, axis: str, dtype: Any) -> jax.Array:
    """x @ kernel ('embed', `axis`), operands in `dtype`, accumulated and returned in float32."""
    kernel = stored(kernel, ('embed', axis), dtype)
    return jnp.matmul(x.astype(dtype), kernel, preferred_element_type=jnp.float32)
