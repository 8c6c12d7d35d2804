"""How sure a search is of each token of its best hypothesis: three measures, each in [0, 1].

    max_probability   of the label at its best frame; near 1 for most tokens of a peaky model,
                      right or wrong
    entropy           1 - H(p) / ln V at that frame: looks at all of the distribution
    posterior         the share of the n-best list, by softmax of its scores, that has the same
                      token at the same time: looks at all of the search, language models included

A word's confidence is the mean over its tokens (`words`), an utterance's the mean over all.
"""

import jax
import jax.numpy as jnp

from bigssl_jax.config import choose
from bigssl_jax.decoding.nbest import NBest

MEASURES = ('max_probability', 'entropy', 'posterior')
# Two hypotheses may write one sound a few frames apart [ours].
TOLERANCE_FRAMES = 3


def token_confidences(nbest: NBest, measure: str) -> jax.Array:
    """Confidences of the best hypotheses' tokens: float32 [B, U], 0 from their counts on.

    Raises:
      ConfigError: `measure` is none of MEASURES.
    """
    choose('decoder.confidence', measure, MEASURES)
    if measure == 'max_probability':
        return nbest.token_confidence[:, 0]
    if measure == 'entropy':
        return nbest.token_certainty[:, 0]
    return token_posteriors(nbest)


def posteriors(scores: jax.Array) -> jax.Array:
    """Softmax of an n-best list's scores [..., K]; hypotheses that do not exist (-inf) have 0."""
    return jax.nn.softmax(scores, axis=-1)


def token_posteriors(nbest: NBest, tolerance: int = TOLERANCE_FRAMES) -> jax.Array:
    """The measure 'posterior': float32 [B, U].

    Args:
      nbest: at least two hypotheses, or every posterior is 1.
      tolerance: frames that the two occurrences of a token may lie apart.
    """
    real = jnp.arange(nbest.tokens.shape[2]) < nbest.token_counts[..., None]

    def shared(carry: jax.Array, other: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        tokens, starts, ends, inside, weight = other
        same = nbest.tokens[:, 0, :, None] == tokens[:, None]
        early = starts[:, None] - nbest.token_end_frames[:, 0, :, None] < tolerance
        late = nbest.token_start_frames[:, 0, :, None] - ends[:, None] < tolerance
        found = jnp.any(same & early & late & inside[:, None], axis=2)
        return carry + jnp.where(found, weight[:, None], 0.0), None

    fields = (
        nbest.tokens,
        nbest.token_start_frames,
        nbest.token_end_frames,
        real,
        posteriors(nbest.scores),
    )
    # One hypothesis after the other: [B, U, U] is enough.
    ranks = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), fields)
    total, _ = jax.lax.scan(shared, jnp.zeros(real[:, 0].shape), ranks)
    return jnp.where(real[:, 0], jnp.minimum(total, 1.0), 0.0)
