"""Words from tokens: boundaries of character and sentencepiece models, times, confidences."""

import numpy as np
import pytest
import sentencepiece

from bigssl_jax.decoding import GreedyResult, Word, words, words_of

MARK = '\u2581'
PIECES = ['<pad>', '</s>', '<unk>', MARK + 'th', 'e', MARK + 'c', 'at', MARK, "'", 's']


def simple(tokens, pieces=PIECES, **options):
    count = len(tokens)
    starts = [2 * i for i in range(count)]
    return words(tokens, starts, [s + 1 for s in starts], [0.5] * count, pieces, **options)


def texts(*arguments, **options):
    return [word.text for word in simple(*arguments, **options)]


def test_sentencepiece_words_with_times_and_confidences():
    found = words([3, 4, 5, 6], [1, 3, 10, 12], [2, 5, 11, 20], [1.0, 0.5, 0.8, 0.4], PIECES)
    assert [word.text for word in found] == ['the', 'cat']
    np.testing.assert_allclose([word[1:] for word in found], [(0.04, 0.2, 0.75), (0.4, 0.8, 0.6)])
    assert isinstance(found[0], Word)


def test_character_words_with_either_space():
    for space in (MARK, ' '):
        pieces = ['<pad>', '</s>', '<unk>', space, 'a', 'b']
        assert texts([3, 4, 5, 3, 3, 5, 4, 3], pieces) == ['ab', 'ba']
    # The space's own confidence and time belong to no word.
    found = words([4, 3, 5], [0, 5, 9], [1, 6, 10], [0.9, 0.1, 0.7], pieces)
    assert [word.confidence for word in found] == [0.9, 0.7]
    assert found[0].end == pytest.approx(0.04) and found[1].start == pytest.approx(0.36)


def test_special_tokens():
    assert texts([0, 3, 4, 1, 0]) == ['the']
    assert texts([3, 2, 4]) == ['th', '\u2047', 'e']
    assert texts([3, 2, 4], unknown=None) == ['th<unk>e']
    assert texts([]) == []


def test_marks_inside_a_piece_end_words_too():
    assert texts([3, 4], ['', '', '', MARK + 'in' + MARK + 'a', 'n' + MARK]) == ['in', 'an']


def test_errors_name_the_token():
    with pytest.raises(ValueError, match='token 99'):
        simple([99])
    with pytest.raises(ValueError, match='equally many'):
        words([1], [], [], [], PIECES)


def test_words_equal_the_text_that_sentencepiece_decodes(tmp_path):
    lines = ['the cat sat on the mat', 'a cat ate the hat', "it's that thin man again"] * 20
    for model_type, size in (('char', None), ('unigram', 30), ('bpe', 30)):
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_prefix=str(tmp_path / model_type),
            model_type=model_type,
            vocab_size=size or 19,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
            num_threads=1,
        )
        model = sentencepiece.SentencePieceProcessor(
            model_file=str(tmp_path / f'{model_type}.model')
        )
        pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
        for line in lines[:3]:
            assert ' '.join(texts(model.Encode(line), pieces)) == line


def test_words_of_a_row_of_a_result():
    tokens = np.array([[3, 4, 0], [5, 6, 7]])
    zeros = np.zeros(2)
    result = GreedyResult(
        tokens, np.array([2, 0]), np.ones((2, 3)), tokens, tokens + 1, zeros, zeros, zeros, zeros
    )
    assert [word.text for word in words_of(result, 0, PIECES)] == ['the']
    assert words_of(result, 1, PIECES) == []
    assert words_of(result, 0, PIECES, frame_seconds=1.0)[0].start == 3.0
