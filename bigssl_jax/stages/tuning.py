"""Fusion weights tuned on a dev selection, for the `tune` field of an evaluate stage.

    decode the dev set once, keeping n-best lists    -> the parts of every hypothesis' score
    search a grid of weights on the lists            -> the weights with fewest word errors
    decode the dev set again with these weights      -> whether they hold; if not, the old ones stay

The second decoding is the verdict: lists made with other weights flatter the weights that reorder
them best.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bigssl_jax.config import UserError
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.evaluation.fusion_weights import tune_weights
from bigssl_jax.evaluation.wer import count_errors
from bigssl_jax.stages.recognition import Hypothesis, Recogniser


def tune(
    recogniser: Recogniser,
    search: DecoderConfig,
    hear: Callable[[Recogniser], list[Hypothesis]],
    reference: Callable[[Hypothesis], str],
    normalise: Callable[[str], str],
    grid: Mapping[str, Sequence[float]],
) -> tuple[DecoderConfig, dict[str, Any]]:
    """The search with the best weights of a grid, and what was found on the way.

    Args:
      recogniser: of the model.
      search: a beam search; its weights are where the lists come from.
      hear: decodes the dev set with a recogniser, always in the same order.
      reference: the normalised transcript of what was heard.
      normalise: text of a hypothesis as references are written.
      grid: name of a weight of the decoder -> weights to try; () for none.
    """
    lists = hear(recogniser.searching(dataclasses.replace(search, nbest=search.beam)))
    if not lists:
        raise UserError('tune.selection holds no utterance; name one with transcripts')
    references = [reference(heard) for heard in lists]
    acoustic, parts = _parts(recogniser, lists)
    errors = _errors(lists, references, normalise, acoustic.shape)
    start = {name: getattr(search, name) for name in parts}
    tried = {name: grid[name] for name in parts if grid.get(name)}  # CTC has no internal LM
    found = tune_weights(acoustic, parts, errors, tried, start)
    weights: dict[str, Any] = dict(found.weights)
    tuned = dataclasses.replace(search, **weights)
    verdict = dataclasses.replace(tuned, nbest=search.beam)  # the program of the lists
    again = [[normalise(heard.text)] for heard in hear(recogniser.searching(verdict))]
    verified = sum(_edits(references, again))
    holds = verified <= found.start_errors
    words = sum(len(reference.split()) for reference in references)
    report = {
        'start': start,
        'found': found.weights,
        'kept': found.weights if holds else start,
        'points': found.points,
        'words': words,
        'start_wer': found.start_errors / max(words, 1),
        'list_wer': found.errors / max(words, 1),
        'oracle_wer': found.oracle_errors / max(words, 1),
        'verified_wer': verified / max(words, 1),
    }
    return (tuned if holds else search), report


def _parts(
    recogniser: Recogniser, lists: Sequence[Hypothesis]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Acoustic log-probabilities [N, K], -inf for a short list, and every part [N, K]."""
    width = max(len(heard.alternatives) for heard in lists)
    place = [(n, k) for n, heard in enumerate(lists) for k in range(len(heard.alternatives))]
    chosen = [lists[n].alternatives[k] for n, k in place]
    columns = recogniser.fusion_parts([alternative.tokens for alternative in chosen])
    acoustic = np.full((len(lists), width), -np.inf)
    parts = {name: np.zeros(acoustic.shape) for name in columns}
    for i, (n, k) in enumerate(place):
        acoustic[n, k] = chosen[i].log_probability
        for name, column in columns.items():
            parts[name][n, k] = column[i]
    return acoustic, parts


def _errors(
    lists: Sequence[Hypothesis],
    references: Sequence[str],
    normalise: Callable[[str], str],
    shape: tuple[int, ...],
) -> np.ndarray:
    texts = [[normalise(a.text) for a in heard.alternatives] for heard in lists]
    edits = iter(_edits(references, texts))
    errors = np.zeros(shape, np.int64)
    for n, row in enumerate(texts):
        for k in range(len(row)):
            errors[n, k] = next(edits)
    return errors


def _edits(references: Sequence[str], texts: Sequence[Sequence[str]]) -> list[int]:
    """Word errors of all texts of each list, one list after the other."""
    pairs = [
        (reference, text) for reference, row in zip(references, texts, strict=True) for text in row
    ]
    return count_errors([r for r, _ in pairs], [t for _, t in pairs]).errors.tolist()
