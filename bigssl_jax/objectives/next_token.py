"""Next-token prediction: the training of a language model.

    loss = -sum over sentences of log P(y1 .. yU </s>)

It needs no encoder and hears no audio: its batches (data/text_stream.py) have labels alone, a row
without any is a filler, and the whole model is its head.  A sentence with a token outside the
vocabulary, or with the blank in it, weighs nothing and is counted.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigssl_jax.config import ConfigError
from bigssl_jax.models.language_model import (
    END,
    LanguageModel,
    LanguageModelConfig,
    language_model,
    log_probs,
)
from bigssl_jax.objectives.encoder_call import Batch, EncoderCall, dropout_key


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The objective; fields are config fields.

    Attributes:
      vocabulary_size: V, of the tokenizer.
      preset: size of the model, 'lm-103m' or 'lm-tiny'.
      num_layers, model_dim, num_heads: replace the preset's; 0 keeps it.
      dropout, context, dtype, remat: see `LanguageModelConfig`.
      blank_id: pad of the tokenizer.
    """

    vocabulary_size: int
    preset: str = 'lm-tiny'
    num_layers: int = 0
    model_dim: int = 0
    num_heads: int = 0
    dropout: float = 0.1
    context: int = 512
    dtype: str = 'float32'
    remat: str = 'none'
    blank_id: int = 0
    name: str = 'next_token'

    def __post_init__(self) -> None:
        try:
            _ = self.config
        except ConfigError as error:
            raise ValueError(f'next_token: {error}') from error

    @property
    def config(self) -> LanguageModelConfig:
        """The model's config."""
        sizes = ('num_layers', 'model_dim', 'num_heads')
        same = ('dropout', 'context', 'dtype', 'remat', 'blank_id')
        return language_model(
            self.preset,
            self.vocabulary_size,
            **{name: getattr(self, name) for name in sizes if getattr(self, name)},
            **{name: getattr(self, name) for name in same},
        )

    def init_params(self, key: jax.Array, encoder_config: Any) -> Any:
        """Boxed parameters of the whole model; there is no encoder."""
        del encoder_config
        tokens, counts = jnp.zeros((1, 4), jnp.int32), jnp.array([4], jnp.int32)
        return LanguageModel(self.config).init(key, tokens, counts)['params']

    def init_constants(self, key: jax.Array) -> dict[str, jax.Array]:
        """{}: nothing but the parameters decides the loss."""
        del key
        return {}

    def totals(
        self,
        encode: EncoderCall | None,
        params: Any,
        constants: Mapping[str, jax.Array],
        batch: Batch,
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        """Additive totals of one batch of text, with dropout.

        Returns:
          loss: float32, sum of -log P(sentence) in nats over valid sentences.
          weight: float32, their tokens, </s> included.
          words: float32, their words and as many </s>.
          sentences, invalid: int32, valid rows, and real rows with unusable tokens.
        """
        del encode, constants
        return self.score(params, batch, dropout_key(key, batch))

    def score(
        self, params: Any, batch: Batch, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """As `totals`; without dropout when there is no key, for a dev set."""
        labels, counts = batch['labels'], batch['label_counts']
        real = jnp.arange(labels.shape[1]) < counts[:, None]
        known = (labels > 0) & (labels < self.vocabulary_size) & (labels != self.blank_id)
        present = counts > 0
        usable = jnp.all(known | ~real, axis=1) & (counts <= labels.shape[1])
        valid = present & usable
        model, rngs = LanguageModel(self.config), {} if key is None else {'dropout': key}
        logits = model.apply({'params': params}, labels, counts, key is None, rngs=rngs)
        # Position u predicts token u; behind the last one stands </s>.
        last = jnp.arange(labels.shape[1] + 1) == counts[:, None]
        targets = jnp.where(last, END, jnp.pad(labels, ((0, 0), (0, 1))))
        used = (jnp.pad(real, ((0, 0), (0, 1))) | last) & valid[:, None]
        found = log_probs(logits, self.blank_id)
        targets = jnp.where(used, targets, END)[..., None]
        picked = jnp.take_along_axis(found, targets, axis=-1)[..., 0]
        return {
            'loss': -jnp.sum(jnp.where(used, picked, 0.0)),
            'weight': jnp.sum(used, dtype=jnp.float32),
            'words': jnp.sum(jnp.where(valid, batch['word_counts'] + 1, 0), dtype=jnp.float32),
            'sentences': jnp.sum(valid, dtype=jnp.int32),
            'invalid': jnp.sum(present & ~usable, dtype=jnp.int32),
        }

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """loss (nats per token, </s> included), perplexity, word_perplexity, invalid ..."""
        sentences = int(totals['sentences'])
        loss = float(totals['loss']) / max(float(totals['weight']), 1.0)
        return {
            'loss': loss,
            'perplexity': _exp(loss),
            # Per word: comparable between tokenizers.
            'word_perplexity': _exp(float(totals['loss']) / max(float(totals['words']), 1.0)),
            'tokens_per_sentence': float(totals['weight']) / max(sentences, 1),
            'invalid': float(totals['invalid']),
        }

    def health(self, summary: Mapping[str, float], step: int) -> str | None:
        """Advice when the model is still worse than a uniform guess after 1000 steps, else None."""
        if step >= 1000 and summary['loss'] > math.log(self.vocabulary_size):
            return (
                f'{summary["loss"]:.2f} nats per token, worse than guessing'
                f' ({math.log(self.vocabulary_size):.2f}); lower the peak learning rate, or raise'
                ' its warm-up'
            )
        return None


def _exp(nats: float) -> float:
    """e^nats, kept finite."""
    return math.exp(min(nats, 700.0))
