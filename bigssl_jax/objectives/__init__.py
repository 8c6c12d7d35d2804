"""Objectives: losses on top of the one encoder.

An objective is a frozen dataclass with `name`, `init_params(key, encoder_config)`,
`init_constants(key)`, `totals(encode, params, constants, batch, key)`, `summarise(totals)` and
`health(summary, step)`.  Totals are additive: summing them over micro-batches or steps is exact.
"""

from bigssl_jax.objectives.best_rq import BestRQ
from bigssl_jax.objectives.ctc import CTC
from bigssl_jax.objectives.encoder_call import EncoderCall
from bigssl_jax.objectives.next_token import NextToken
from bigssl_jax.objectives.quantizer import quantize
from bigssl_jax.objectives.rnnt import HAT, RNNT
from bigssl_jax.objectives.wav2vec2 import Wav2Vec2

# The objectives whose heads write text, by their names in configs.
TRANSCRIPT = {'ctc': CTC, 'rnnt': RNNT, 'hat': HAT}

__all__ = [
    'CTC',
    'HAT',
    'RNNT',
    'TRANSCRIPT',
    'BestRQ',
    'EncoderCall',
    'NextToken',
    'Wav2Vec2',
    'quantize',
]
