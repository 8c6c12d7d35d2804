"""Counts equal jiwer's; intervals agree with closed forms and cover the truth."""

import importlib
import math

import jiwer
import numpy as np
import pytest

from bigssl_jax.evaluation import cer, count_errors, paired_test, wer
from bigssl_jax.evaluation.bootstrap import resampled_sums, units_of
from bigssl_jax.evaluation.wer import summarise


def random_texts(generator: np.random.Generator, count: int) -> list[str]:
    words = ['a', 'b', 'cc', 'dd', "e'e", 'ß', '日本', 'x']
    return [' '.join(generator.choice(words, generator.integers(0, 9))) for _ in range(count)]


@pytest.mark.parametrize('seed', range(20))
def test_fuzz_agrees_with_jiwer(seed):
    generator = np.random.default_rng(seed)
    references, hypotheses = (random_texts(generator, 40) for _ in range(2))
    expected = jiwer.process_words(references, hypotheses)
    result = wer(references, hypotheses)
    assert result.wer == expected.wer
    assert (result.substitutions, result.deletions, result.insertions) == (
        expected.substitutions, expected.deletions, expected.insertions,
    )  # fmt: skip
    assert result.reference_words == sum(len(text.split()) for text in references)
    characters = jiwer.process_characters(references, hypotheses)
    assert cer(references, hypotheses).wer == characters.cer


def test_utterance_counts_equal_jiwer_one_by_one():
    generator = np.random.default_rng(7)
    references, hypotheses = (random_texts(generator, 60) for _ in range(2))
    counts = count_errors(references, hypotheses)
    for n, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        one = jiwer.process_words([reference], [hypothesis])
        assert counts.errors[n] == one.substitutions + one.deletions + one.insertions
        assert counts.reference_words[n] == len(reference.split())


def test_more_utterances_than_a_batch(monkeypatch):
    generator = np.random.default_rng(1)
    references, hypotheses = (random_texts(generator, 50) for _ in range(2))
    whole = count_errors(references, hypotheses)
    # By its full name, because the package's attribute `wer` is the function.
    monkeypatch.setattr(importlib.import_module('bigssl_jax.evaluation.wer'), '_BATCH', 7)
    parts = count_errors(references, hypotheses)
    np.testing.assert_array_equal(whole.errors, parts.errors)
    np.testing.assert_array_equal(whole.insertions, parts.insertions)


def test_empty_references_count_insertions():
    result = wer(['', 'one two'], ['made up words', 'one two'])
    assert result.insertions == 3
    assert result.wer == 3 / 2


def test_no_reference_words_gives_no_rate_but_counts():
    result = wer(['', ''], ['', 'ghost'])
    assert math.isnan(result.wer) and result.insertions == 1
    assert result.to_json()['value'] is None and result.to_json()['low'] is None


def test_empty_hypothesis_counts_deletions():
    assert wer(['one two three'], ['']).deletions == 3


def test_one_utterance_has_no_interval():
    assert all(math.isnan(limit) for limit in wer(['a b'], ['a c']).interval)


@pytest.mark.parametrize(
    'references, hypotheses, message',
    [
        ([], [], 'no utterances'),
        (['a'], ['a', 'b'], '1 references but 2 hypotheses'),
        ('a b', 'a b', 'lists of texts'),
    ],
)
def test_bad_lists_are_refused(references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        wer(references, hypotheses)
    with pytest.raises(ValueError):
        paired_test(references, hypotheses, hypotheses)


def test_wrong_number_of_speakers_is_refused():
    with pytest.raises(ValueError, match='2 utterances but 1 speakers'):
        wer(['a', 'b'], ['a', 'b'], ['anna'])


def test_interval_agrees_with_the_normal_approximation(counts_of):
    # Utterances of equal length: the rate is a mean, whose interval is +-1.96 standard errors.
    generator = np.random.default_rng(0)
    errors = generator.binomial(10, 0.2, 3000)
    result = summarise(counts_of(errors, np.full(3000, 10)), replicates=4000)
    half = 1.96 * errors.std() / math.sqrt(3000) / 10
    np.testing.assert_allclose(result.interval, [result.wer - half, result.wer + half], rtol=0.01)


def test_interval_covers_the_truth_as_often_as_it_says(counts_of):
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(400):
        words = generator.integers(1, 12, 100)
        low, high = summarise(
            counts_of(generator.binomial(words, 0.25), words), replicates=400, seed=trial
        ).interval
        covered += low <= 0.25 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_two_units_resample_to_the_known_distribution():
    sums = resampled_sums(np.array([[0, 1], [1, 1]]), 20_000, seed=0)
    frequencies = [np.mean(sums[:, 0] == k) for k in range(3)]
    np.testing.assert_allclose(frequencies, [0.25, 0.5, 0.25], atol=0.015)
    assert (sums[:, 1] == 2).all()


def test_resampling_by_speaker_resamples_their_sums(counts_of):
    # 30 speakers of 20 equal utterances each: intervals as if each speaker were one utterance.
    generator = np.random.default_rng(5)
    per_speaker = generator.binomial(10, 0.3, 30)
    errors, words = np.repeat(per_speaker, 20), np.full(600, 10)
    names = [f's{n // 20}' for n in range(600)]
    clustered = summarise(counts_of(errors, words), names)
    once = summarise(counts_of(per_speaker, np.full(30, 10)))
    np.testing.assert_allclose(clustered.interval, once.interval)
    assert (clustered.resampled, clustered.units) == ('speaker', 30)
    loose = summarise(counts_of(errors, words))
    ratio = np.diff(clustered.interval)[0] / np.diff(loose.interval)[0]
    assert 0.8 * math.sqrt(20) < ratio < 1.2 * math.sqrt(20)


def test_one_or_unknown_speakers_resample_utterances():
    assert units_of(3, ['anna', 'anna', 'anna'])[1] == 'utterance'
    assert units_of(3, [None, '', None])[1] == 'utterance'
    units, kind = units_of(4, ['anna', None, 'bert', None])
    assert kind == 'speaker' and len(set(units)) == 4


def test_equal_seeds_give_equal_intervals():
    generator = np.random.default_rng(2)
    references, hypotheses = (random_texts(generator, 50) for _ in range(2))
    first, second = (wer(references, hypotheses, seed=4) for _ in range(2))
    assert first == second
    assert first.interval != wer(references, hypotheses, seed=5).interval
