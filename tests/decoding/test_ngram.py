"""N-gram models: KenLM's scores, a walk in plain Python against the automaton, broken files."""

import gzip
import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from bigssl_jax.config import UserError
from bigssl_jax.decoding import fusion
from bigssl_jax.decoding.arpa import LN10, Arpa, read_arpa, rescore, write_arpa
from bigssl_jax.decoding.ngram import load_ngram, ngram_model
from bigssl_jax.decoding.witten_bell import estimate

FIXTURE = json.loads(pathlib.Path(__file__).with_name('kenlm_fixture.json').read_text())
PIECES = ['<pad>', '</s>', '<unk>', 'a', 'b', 'c', 'd']


@pytest.fixture
def arpa_path(tmp_path):
    path = tmp_path / 'model.arpa'
    path.write_text(FIXTURE['arpa'])
    return path


def padded(sentences, pieces):
    """Ids of sentences of pieces, unknown ones as 2: tokens [N, U] with rubbish behind, counts."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    counts = np.array([len(s) for s in sentences], np.int32)
    tokens = np.full((len(sentences), max(counts) + 2), 5, np.int32)
    for row, sentence in zip(tokens, sentences, strict=True):
        row[: len(sentence)] = [ids.get(word, 2) for word in sentence]
    return tokens, counts


def random_model(seed, order=4, vocabulary=5):
    """A backoff model with arbitrary weights and holes: only prefixes of n-grams must exist."""
    random = np.random.default_rng(seed)
    words = PIECES[3:] + ['e', 'f'][: max(vocabulary - 4, 0)]
    entries = [{('</s>',): (-1.0, None), ('<unk>',): (-2.5, -0.1), ('<s>',): (-99.0, -0.2)}]
    entries[0] |= {(w,): (-random.uniform(0.2, 2), -random.uniform(0, 1)) for w in words[:-1]}
    for _ in range(1, order):
        known = [n for n in entries[-1] if n[-1] != '</s>']
        level = {}
        for ngram in known:
            for word in [*words[:-1], '</s>', '<unk>']:
                if random.random() < 0.35:
                    level[*ngram, word] = (-random.uniform(0.1, 2), -random.uniform(0, 1))
        entries.append(level)
    entries[-1] = {n: (p, None) for n, (p, _) in entries[-1].items()}
    return Arpa(tuple(entries)), [*PIECES[:3], *words]


def test_scores_equal_kenlm(arpa_path):
    model = read_arpa(arpa_path)
    sentences = [s.split() for s in FIXTURE['sentences']]
    found = [model.sentence(s)[0] / LN10 for s in sentences]
    np.testing.assert_allclose(found, FIXTURE['log10'], atol=1e-4)
    language_model, summary = load_ngram(arpa_path, PIECES)
    tokens, counts = padded(sentences, PIECES)
    on_device = jax.jit(fusion.sequence_scores)(language_model, tokens, counts)
    np.testing.assert_allclose(on_device / LN10, FIXTURE['log10'], atol=1e-4)
    assert (summary.order, summary.ngrams, summary.skipped, summary.missing_pieces) == (3, 18, 0, 0)
    assert [model.sentence(s)[1] for s in sentences[8:11]] == [0, 1, 2]


@pytest.mark.parametrize('order', [1, 2, 4])
def test_automaton_equals_the_recursion_in_every_context(order):
    """Whole distributions after random histories, holes and missing pieces included."""
    for seed in range(3):
        model, pieces = random_model(seed, order)
        language_model, summary = ngram_model(model, pieces)
        assert summary.missing_pieces == 1  # the last word has no unigram: it scores as <unk>
        histories = np.random.default_rng(seed).integers(2, len(pieces), (40, 6)).astype(np.int32)
        advance = jax.jit(language_model.advance)
        params = language_model.params
        start = language_model.initial(params, 40, 9)
        state, found = advance(params, start, np.zeros(40, np.int32))
        for position in range(7):
            final = language_model.final(params, state)
            for row in range(40):
                spelled = [pieces[i] for i in histories[row, :position]]
                known = [w if (w,) in model.entries[0] else '<unk>' for w in spelled]
                for token, piece in enumerate(pieces[2:-1], 2):
                    expected = model.log10_probability(['<s>', *known], piece) * LN10
                    assert found[row, token] == pytest.approx(expected, abs=1e-4)
                unknown = model.log10_probability(['<s>', *known], '<unk>') * LN10
                assert found[row, len(pieces) - 1] == pytest.approx(unknown, abs=1e-4)
                end = model.log10_probability(['<s>', *known], '</s>') * LN10
                assert final[row] == pytest.approx(end, abs=1e-4)
            assert np.isneginf(np.asarray(found)[:, :2]).all()
            if position < 6:
                state, found = advance(params, state, histories[:, position])


def test_estimate_sums_to_one_and_prefers_what_it_saw():
    random = np.random.default_rng(0)
    vocabulary = list('abcdefg')
    sentences = [
        [vocabulary[min(int(x), 5)] for x in random.exponential(1.5, random.integers(0, 9))]
        for _ in range(60)
    ]
    model = estimate(sentences, 3, vocabulary)
    words = [*vocabulary, '</s>', '<unk>']
    contexts = [c for n in range(4) for c in itertools.product(['<s>', *vocabulary], repeat=n)]
    for context in contexts[:: max(len(contexts) // 150, 1)]:
        total = sum(10 ** model.log10_probability(context, word) for word in words)
        assert total == pytest.approx(1.0, abs=1e-6)
    seen = sum(model.sentence(s)[0] for s in sentences)
    flat = sum(math.log(1 / 9) * (len(s) + 1) for s in sentences)
    assert seen < 0 and seen > 0.75 * flat


def test_estimate_worked_by_hand():
    """Two sentences, 'a b' and 'a': c(a) 2, c(b) 1, c(</s>) 2, T = 3, V = {a, b, </s>, <unk>}."""
    model = estimate([['a', 'b'], ['a']], 2, ['a', 'b'])
    assert 10 ** model.log10_probability([], 'a') == pytest.approx((2 + 3 / 4) / 8)
    # After 'a': 'b' and </s> once each, T = 2, so half of the mass is shared out by the unigrams.
    assert 10 ** model.log10_probability(['a'], 'b') == pytest.approx(1 / 4 + 0.5 * 1.75 / 8)
    assert 10 ** model.log10_probability(['a'], 'a') == pytest.approx(0.5 * 2.75 / 8)


def test_written_models_read_back(tmp_path):
    model = estimate([list('abca'), list('bb')], 3, list('abcd'))
    for name in ('model.arpa', 'model.arpa.gz'):
        write_arpa(model, tmp_path / name)
        again = read_arpa(tmp_path / name)
        assert [set(level) for level in again.entries] == [set(level) for level in model.entries]
        for sentence in ('', 'abc', 'dcd', 'xa'):
            expected = model.sentence(list(sentence))
            assert again.sentence(list(sentence)) == pytest.approx(expected, abs=1e-5)
    with gzip.open(tmp_path / 'model.arpa.gz', 'rt') as file:
        assert file.readline() == '\\data\\\n'
    with pytest.raises(UserError, match='cannot be written'):
        write_arpa(model, tmp_path / 'none' / 'model.arpa')


BROKEN = [
    (('\\data\\', 'DATA'), r':1: an ARPA file begins'),
    (('ngram 2=7', 'ngram 2=8'), r':24: .*announces 8 2-grams, but there are 7 before'),
    (('ngram 2=7', 'ngram 2=6'), r':22: .*announces fewer 2-grams'),
    (('ngram 2=7', 'ngram 3=7'), r':3: .*"ngram 2=COUNT"'),
    (('-0.6\ta\t-0.42', '-0.6\ta'), r':10: .a. needs a backoff weight, because .a b. \(line 17\)'),
    (('-0.9\tb c\t-0.37\n', '-0.9\tb d\t-0.37\n'), r':27: .b c a. needs an entry .b c.'),
    (('-0.6\ta\t', 'x\ta\t'), r':10: .* no number'),
    (('-0.6\ta\t', '0.6\ta\t'), r':10: log10 probability 0.6'),
    (('-0.33\ta b c', '-0.33\ta b c\t-1'), r':26: .* has 5 columns'),
    (('-0.8\tb\t', '-0.8\ta\t'), r":11: 'a' stands here a second time"),
    (('\\end\\', ''), r':30: the file ends before'),
]


@pytest.mark.parametrize(('change', 'message'), BROKEN)
def test_broken_files_are_one_line_with_its_number(arpa_path, change, message):
    assert change[0] in FIXTURE['arpa']
    arpa_path.write_text(FIXTURE['arpa'].replace(*change, 1))
    with pytest.raises(UserError, match=message) as error:
        read_arpa(arpa_path)
    assert '\n' not in str(error.value) and str(arpa_path) in str(error.value)


def test_unreadable_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match='No such file'):
        read_arpa(tmp_path / 'none.arpa')
    (tmp_path / 'not.arpa.gz').write_bytes(b'plain')
    with pytest.raises(UserError, match='cannot be read as an ARPA file'):
        read_arpa(tmp_path / 'not.arpa.gz')
    (tmp_path / 'binary.arpa').write_bytes(b'mmap lm http://kheafield.com/code\xff\xfe')
    with pytest.raises(UserError, match='cannot be read as an ARPA file'):
        read_arpa(tmp_path / 'binary.arpa')


def test_words_that_are_no_pieces_are_skipped_and_counted(arpa_path):
    """Without 'd' as a piece one unigram of 18 n-grams is skipped; without 'b' most of them."""
    few = PIECES[:6]
    language_model, summary = load_ngram(arpa_path, few)
    assert (summary.skipped, summary.examples, summary.ngrams) == (1, ('d',), 17)
    tokens, counts = padded([list('abc')], few)
    found = fusion.sequence_scores(language_model, tokens, counts)
    np.testing.assert_allclose(found, read_arpa(arpa_path).sentence(list('abc'))[0], rtol=1e-5)
    with pytest.raises(UserError, match=r"9 of 18 n-grams .* for example 'b', 'd'; .* rescore"):
        load_ngram(arpa_path, ['<pad>', '</s>', '<unk>', 'a', 'c'])


def test_rescoring_reorders_and_counts_unknown_words(arpa_path):
    model = read_arpa(arpa_path)
    texts = ['c b x', 'a b c', 'a b']
    result = rescore(model, texts, [-1.0, -2.0, -2.5], weight=0.8, word_reward=0.5)
    expected = [
        s + 0.8 * model.sentence(t.split())[0] + 0.5 * len(t.split())
        for s, t in zip([-1.0, -2.0, -2.5], texts, strict=True)
    ]
    assert result.order == sorted(range(3), key=lambda i: -expected[i]) and result.order[0] == 1
    np.testing.assert_allclose(result.scores, sorted(expected, reverse=True))
    assert (result.words, result.unknown_words) == (8, 1)
    assert rescore(model, texts, [-1.0, -2.0, -2.5], weight=0.0).order == [0, 1, 2]
