"""Greedy CTC decoding against a slow decoder in plain Python, on peaky and on flat logits."""

import itertools

import jax
import numpy as np
import pytest

from bigssl_jax.decoding import GreedyResult, greedy_ctc

decode = jax.jit(greedy_ctc, static_argnums=2)


def slow(logits, blank):
    """One row, real frames only: tokens as (id, start, end, confidence), and the three scores."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    tokens, frame = [], 0
    for label, run in itertools.groupby(p.argmax(-1)):
        length = len(list(run))
        if label != blank:
            confidence = p[frame : frame + length, label].max()
            tokens.append((label, frame, frame + length, confidence))
        frame += length
    log_probability = np.log(p.max(-1)).sum()
    entropy = (-(p * np.log(p)).sum(-1) / np.log(p.shape[-1])).mean() if len(p) else 0.0
    return tokens, log_probability, entropy


def some_logits(sharpness, seed=0, rows=5, frames=23, vocabulary=6):
    """Logits whose best path has runs, repeats and blanks; real frames per row."""
    random = np.random.default_rng(seed)
    path = np.repeat(random.integers(0, vocabulary, (rows, frames)), 2, axis=1)[:, :frames]
    path[random.random((rows, frames)) < 0.4] = 0
    logits = random.normal(size=(rows, frames, vocabulary))
    logits += sharpness * np.eye(vocabulary)[path]
    counts = np.array([frames, 11, 1, 0, 17])[:rows]
    return logits.astype(np.float32), np.arange(frames) < counts[:, None]


@pytest.mark.parametrize('blank', [0, 3])
@pytest.mark.parametrize('sharpness', [0.0, 2.0, 8.0])
def test_equals_the_slow_decoder(blank, sharpness):
    logits, mask = some_logits(sharpness)
    padded = np.where(mask[..., None], logits, np.nan)
    result = jax.device_get(decode(padded, mask, blank))
    seen = 0
    for row in range(len(logits)):
        tokens, log_probability, entropy = slow(logits[row][mask[row]].astype(np.float64), blank)
        count = result.token_counts[row]
        assert count == len(tokens)
        seen += count
        columns = list(zip(*tokens, strict=True)) or [(), (), (), ()]
        fields = (
            result.tokens,
            result.token_start_frames,
            result.token_end_frames,
            result.token_confidence,
        )
        for field, column in zip(fields, columns, strict=True):
            np.testing.assert_allclose(field[row, :count], column, rtol=1e-5)
            assert not field[row, count:].any()
        mean = np.mean(columns[3]) if tokens else 0.0
        np.testing.assert_allclose(result.confidence[row], mean, rtol=1e-5)
        np.testing.assert_allclose(
            result.log_probability[row], log_probability, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            result.score[row], log_probability / max(count, 1), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(result.entropy[row], entropy, rtol=1e-4, atol=1e-6)
    assert seen > 10


def test_padding_and_batch_mates_change_nothing():
    logits, mask = some_logits(2.0)
    whole = jax.device_get(decode(logits, mask, 0))
    wide_logits = np.pad(logits, ((0, 0), (0, 9), (0, 0)), constant_values=np.nan)
    wide = jax.device_get(decode(wide_logits, np.pad(mask, ((0, 0), (0, 9))), 0))
    alone = jax.device_get(decode(logits[1:2], mask[1:2], 0))
    frames = logits.shape[1]
    for name in GreedyResult._fields:
        a, b, c = getattr(whole, name), getattr(wide, name), getattr(alone, name)
        np.testing.assert_allclose(b[:, :frames] if b.ndim == 2 else b, a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(c[0], a[1], rtol=1e-5, atol=1e-6)


def test_one_row_worked_by_hand():
    """The example of the module's docstring: - a a - a b b -."""
    path = np.array([0, 1, 1, 0, 1, 2, 2, 0])
    logits = 20.0 * np.eye(3, dtype=np.float32)[path][None]
    result = jax.device_get(decode(logits, np.ones((1, 8), bool), 0))
    assert result.token_counts[0] == 3
    assert result.tokens.dtype == np.int32 and result.tokens.shape == (1, 8)
    assert result.tokens[0, :3].tolist() == [1, 1, 2]
    assert result.token_start_frames[0, :3].tolist() == [1, 4, 5]
    assert result.token_end_frames[0, :3].tolist() == [3, 5, 7]
    np.testing.assert_allclose(result.confidence, 1.0, atol=1e-6)
    np.testing.assert_allclose(result.entropy, 0.0, atol=1e-6)


def test_flat_logits_are_as_uncertain_as_can_be():
    result = jax.device_get(decode(np.zeros((1, 4, 5), np.float32), np.ones((1, 4), bool), 4))
    np.testing.assert_allclose(result.entropy, 1.0, rtol=1e-6)
    np.testing.assert_allclose(result.log_probability, -4 * np.log(5), rtol=1e-6)


def test_bfloat16_logits_are_accepted():
    import jax.numpy as jnp

    logits, mask = some_logits(8.0)
    result = decode(jnp.asarray(logits, jnp.bfloat16), mask, 0)
    assert result.confidence.dtype == jnp.float32
    np.testing.assert_array_equal(result.tokens, decode(logits, mask, 0).tokens)
