"""Alignment of one reference with one hypothesis, word by word, for people to read.

REF:  the  QUICK  brown  ***  FOX
HYP:  the  SLICK  brown   a   ***
             S             I    D
"""

import dataclasses
from collections.abc import Sequence

from bigssl_jax.evaluation.wer import Unit


@dataclasses.dataclass(frozen=True)
class Op:
    """One step of an alignment.

    Attributes:
      kind: 'equal', 'substitute', 'delete' or 'insert'.
      reference: the reference word; '' for an insertion.
      hypothesis: the hypothesis word; '' for a deletion.
    """

    kind: str
    reference: str
    hypothesis: str


def align(reference: str, hypothesis: str, unit: Unit = 'word') -> list[Op]:
    """The minimum-edit alignment of two texts; the same one that `wer` and `cer` count."""
    import jiwer

    process = {'word': jiwer.process_words, 'character': jiwer.process_characters}[unit]
    output = process([reference], [hypothesis])
    source, target = output.references[0], output.hypotheses[0]
    ops = []
    for chunk in output.alignments[0]:
        # Chunks of substitutions and matches span as many words on both sides.
        length = max(
            chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
        )
        for n in range(length):
            ops.append(
                Op(
                    chunk.type,
                    '' if chunk.type == 'insert' else source[chunk.ref_start_idx + n],
                    '' if chunk.type == 'delete' else target[chunk.hyp_start_idx + n],
                )
            )
    return ops


def error_count(ops: Sequence[Op]) -> int:
    """Number of steps that are errors."""
    return sum(op.kind != 'equal' for op in ops)


def alignment_text(ops: Sequence[Op], width: int = 100) -> str:
    """Three lines per block of at most `width` columns: REF, HYP and the kind of each error."""
    letters = {'equal': '', 'substitute': 'S', 'delete': 'D', 'insert': 'I'}
    blocks: list[list[list[str]]] = [[[], [], []]]
    used = 0
    for op in ops:
        source, target = op.reference, op.hypothesis
        if op.kind != 'equal':
            source, target = source.upper(), target.upper()
        columns = max(len(source), len(target))
        if used and used + columns + 1 > width - 6:
            blocks.append([[], [], []])
            used = 0
        used += columns + 1
        texts = source or '*' * columns, target or '*' * columns, letters[op.kind]
        for line, text in zip(blocks[-1], texts, strict=True):
            line.append(text.ljust(columns))
    heads = 'REF:  ', 'HYP:  ', '      '
    return '\n'.join(
        (head + ' '.join(words)).rstrip()
        for block in blocks
        for head, words in zip(heads, block, strict=True)
    )
