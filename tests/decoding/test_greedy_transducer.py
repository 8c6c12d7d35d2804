"""Greedy transducer decoding against a decoder in plain Python, one utterance at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.decoding import GreedyResult, greedy_transducer
from bigssl_jax.models.prediction import PredictionConfig
from bigssl_jax.models.transducer import Transducer, TransducerConfig, bind, init_transducer

BLANK, VOCABULARY, JOINT = 1, 7, 8
CONFIGS = {
    'lstm': TransducerConfig(PredictionConfig(VOCABULARY, dim=8, blank_id=BLANK), JOINT),
    'stateless': TransducerConfig(
        PredictionConfig(VOCABULARY, kind='stateless', dim=8, blank_id=BLANK), JOINT
    ),
    'hat': TransducerConfig(
        PredictionConfig(VOCABULARY, num_layers=1, dim=8, blank_id=BLANK), JOINT, 'hat'
    ),
}


@functools.cache
def head(name):
    """Parameters whose best paths hold blanks, labels and repeated labels."""
    params = nn.unbox(init_transducer(jax.random.key(3), CONFIGS[name], 3))
    params['output']['kernel'] *= 4.0
    params['output']['bias'] = params['output']['bias'].at[BLANK].set(1.0)
    return params


@functools.partial(jax.jit, static_argnums=(0, 4))
def decode(name, params, encoded, mask, max_symbols):
    transducer = bind(CONFIGS[name], params, jnp.float32)
    return greedy_transducer(encoded, mask, transducer, max_symbols)


def utterances(frames=9):
    """Encoded frames, and how many of each row are real."""
    rng = np.random.default_rng(0)
    encoded = 1.5 * rng.normal(size=(5, frames, JOINT)).astype(np.float32)
    return encoded, np.arange(frames) < np.array([frames, 4, 1, 0, 7])[:, None]


def slow(transducer, encoded, max_symbols):
    """One row, real frames only: tokens as (id, frame, probability), and the two scores."""
    advance, log_probs = jax.jit(transducer.advance), jax.jit(transducer.log_probs)
    state, projected = advance(transducer.initial(1), jnp.array([BLANK]))
    tokens, log_probability, entropies = [], 0.0, []
    for frame, here in enumerate(encoded):
        for symbol in range(max_symbols + 1):
            log_p = np.asarray(log_probs(here[None], projected), np.float64)[0]
            best = BLANK if symbol == max_symbols else int(log_p.argmax())
            log_probability += log_p[best]
            entropies.append(-(np.exp(log_p) * log_p).sum() / np.log(VOCABULARY))
            if best == BLANK:
                break
            tokens.append((best, frame, np.exp(log_p[best])))
            state, projected = advance(state, jnp.array([best]))
    return tokens, log_probability, np.mean(entropies) if entropies else 0.0


@pytest.mark.parametrize(
    ('name', 'max_symbols'), [('lstm', 3), ('lstm', 1), ('stateless', 3), ('hat', 2)]
)
def test_equals_the_slow_decoder(name, max_symbols):
    encoded, mask = utterances()
    padded = np.where(mask[..., None], encoded, np.nan)
    result = jax.device_get(decode(name, head(name), padded, mask, max_symbols))
    transducer = bind(CONFIGS[name], head(name), jnp.float32)
    assert result.tokens.shape == (5, 9 * max_symbols)
    several = 0
    for row in range(5):
        tokens, log_probability, entropy = slow(transducer, encoded[row][mask[row]], max_symbols)
        count = result.token_counts[row]
        assert count == len(tokens)
        ids, frames, confidence = zip(*tokens, strict=True) if tokens else ((), (), ())
        several += len(frames) - len(set(frames))
        for field, column in (
            (result.tokens, ids),
            (result.token_start_frames, frames),
            (result.token_end_frames, [frame + 1 for frame in frames]),
            (result.token_confidence, confidence),
        ):
            np.testing.assert_allclose(field[row, :count], column, rtol=1e-4)
            assert not field[row, count:].any()
        mean = np.mean(confidence) if tokens else 0.0
        np.testing.assert_allclose(result.confidence[row], mean, rtol=1e-4)
        np.testing.assert_allclose(result.log_probability[row], log_probability, rtol=1e-4)
        np.testing.assert_allclose(result.score[row], log_probability / max(count, 1), rtol=1e-4)
        np.testing.assert_allclose(result.entropy[row], entropy, rtol=1e-4)
    assert result.token_counts.sum() > 4
    assert (several > 0) == (max_symbols > 1)


def test_padding_and_batch_mates_change_nothing():
    encoded, mask = utterances()
    whole = jax.device_get(decode('lstm', head('lstm'), encoded, mask, 2))
    wide = np.pad(encoded, ((0, 0), (0, 5), (0, 0)), constant_values=np.nan)
    wide_mask = np.pad(mask, ((0, 0), (0, 5)))
    wide = jax.device_get(decode('lstm', head('lstm'), wide, wide_mask, 2))
    alone = jax.device_get(decode('lstm', head('lstm'), encoded[1:2], mask[1:2], 2))
    columns = whole.tokens.shape[1]
    for name in GreedyResult._fields:
        a, b, c = getattr(whole, name), getattr(wide, name), getattr(alone, name)
        np.testing.assert_allclose(b[:, :columns] if b.ndim == 2 else b, a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(c[0], a[1], rtol=1e-5, atol=1e-6)


def table(moves):
    """A transducer that wants `moves[frame][labels written so far]`, whatever it has written.

    The encoder's part of a frame is its number.
    """
    wanted = jnp.asarray(moves)

    def log_probs(encoded, projected):
        best = wanted[encoded[:, 0].astype(jnp.int32), projected[:, 0].astype(jnp.int32)]
        return jax.nn.log_softmax(20.0 * jax.nn.one_hot(best, 4))

    def advance(state, labels):
        return state + 1, state[:, None].astype(jnp.float32)

    return Transducer(lambda n: jnp.zeros(n, jnp.int32), advance, log_probs, lambda x: x, 0, 4)


def test_the_path_of_the_drawing():
    """a; blank; blank; b; blank: two labels, in frames 0 and 2."""
    transducer = table([[1, 0, 0], [0, 0, 0], [0, 2, 0]])
    encoded, mask = jnp.arange(3.0)[None, :, None], jnp.ones((1, 3), bool)
    result = jax.jit(lambda: greedy_transducer(encoded, mask, transducer))()
    assert result.tokens[0, :3].tolist() == [1, 2, 0]
    assert result.token_counts.tolist() == [2]
    assert result.token_start_frames[0, :2].tolist() == [0, 2]
    np.testing.assert_allclose(result.confidence, 1.0, atol=1e-6)
    np.testing.assert_allclose(result.entropy, 0.0, atol=1e-6)


def test_a_model_that_never_stops_is_stopped():
    transducer = table(np.full((3, 40), 2))
    encoded, mask = jnp.arange(3.0)[None, :, None], jnp.ones((1, 3), bool)
    result = jax.jit(lambda: greedy_transducer(encoded, mask, transducer, 4))()
    assert result.token_counts.tolist() == [12]
    assert result.token_start_frames[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # Each of the three forced blanks costs its own, very small probability.
    assert result.log_probability[0] == pytest.approx(-60.0, rel=1e-3)
