"""Alignments spell both texts and hold as many errors as the rate counts."""

import jiwer
import numpy as np
import pytest

from bigssl_jax.evaluation.alignment import align, alignment_text, error_count


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('unit', ['word', 'character'])
def test_both_texts_can_be_read_back(seed, unit):
    generator = np.random.default_rng(seed)
    a, b = (' '.join(generator.choice(list('abcde'), generator.integers(0, 9))) for _ in range(2))
    ops = align(a, b, unit)
    glue = ' ' if unit == 'word' else ''
    assert glue.join(op.reference for op in ops if op.kind != 'insert') == a
    assert glue.join(op.hypothesis for op in ops if op.kind != 'delete') == b
    process = jiwer.process_words if unit == 'word' else jiwer.process_characters
    expected = process([a], [b])
    errors = expected.substitutions + expected.deletions + expected.insertions
    assert error_count(ops) == errors
    assert all((op.reference == op.hypothesis) == (op.kind == 'equal') for op in ops)


def test_print_out_lines_up():
    text = alignment_text(align('the quick brown fox', 'the slick brown fox jumps'))
    assert text.split('\n') == [
        'REF:  the QUICK brown fox *****',
        'HYP:  the SLICK brown fox JUMPS',
        '          S               I',
    ]


def test_long_texts_wrap_at_the_width():
    text = alignment_text(align('word ' * 40, 'word ' * 39), width=60)
    assert max(map(len, text.split('\n'))) <= 60
    assert text.count('REF:') > 1


def test_two_empty_texts_align_to_nothing():
    assert align('', '') == []
