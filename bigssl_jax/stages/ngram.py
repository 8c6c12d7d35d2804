"""An n-gram model over the tokenizer's pieces, estimated from the transcripts of a selection.

Its `model.arpa` is what the `decoder.ngram` field of later stages names.  Only transcripts that the
stage may read are read: name a selection of training speakers, never one that is scored.
"""

import math
from typing import Any

from bigssl_jax.config import UserError
from bigssl_jax.data.stream import one_pass
from bigssl_jax.data.text import is_spoken, normalise_text
from bigssl_jax.data.tokenizer import Tokenizer
from bigssl_jax.decoding.arpa import write_arpa
from bigssl_jax.decoding.witten_bell import estimate
from bigssl_jax.parallel.distributed import is_primary
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.search import NGRAM_FILE as FILE


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes `model.arpa`; returns (outputs, results) for done.json.

    Raises:
      UserError: no transcript in the selection.
    """
    if not is_primary():
        return {}, {}
    fields = context.fields
    normaliser = context.config['tokenizer']['normaliser']
    source = one_pass(context.pass_config(fields['selection'])).sources[0]
    lines = [normalise_text(text or '', normaliser) for text in source.column('text')]
    lines = [line for line in lines if line and is_spoken(line, normaliser)]
    if not lines:
        raise UserError(
            f'stages.{context.name}.selection is {fields["selection"]!r}, which holds no'
            ' transcript; name a selection with text'
        )
    tokenizer = Tokenizer(context.tokenizer_path)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocabulary_size)]
    sentences = [[pieces[i] for i in ids] for ids in tokenizer.encode_batch(lines)]
    model = estimate(sentences, fields['order'], pieces[3:])
    path = context.directory / FILE
    write_arpa(model, path)
    tokens = sum(map(len, sentences)) + len(sentences)
    total = sum(model.sentence(sentence)[0] for sentence in sentences)
    results = {
        'sentences': len(sentences),
        'tokens': tokens,
        'ngrams': [len(level) for level in model.entries],
        # Of the text that it was estimated from: how much of it the model remembers.
        'bits_per_token': round(-total / tokens / math.log(2.0), 3),
    }
    return {FILE: artefacts.file_hash(path)}, results
