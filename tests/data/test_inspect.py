"""The facts that `inspect` states are those of the corpus; the tables show them."""

import json

import numpy as np
import pytest

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.inspect import _bar, inspect, inspect_command
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.prepare import Options, prepare

SECONDS = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp('inspect') / 'c'
    half_scale = np.where(np.arange(64000) % 2, 16384, -16384).astype(np.int16)  # -6 dB
    entries = [
        Entry(
            id=f'u{k}',
            audio=half_scale[: int(16000 * seconds)],
            text=None if k == 7 else 'two [words]',
            speaker=f'speaker-{min(k, 2)}',
            language='en' if k < 5 else 'de',
            split='test' if k == 0 else 'train',
            licence='CC0-1.0',
            sample_rate=16000,
        )
        for k, seconds in enumerate(SECONDS)
    ]
    entries.append(Entry('quiet', np.zeros(16000, np.int16), sample_rate=16000))
    options = Options(shard_size=3)
    prepare(entries, out, jobs=1, options=options, max_quarantine_fraction=None, progress=False)
    return str(out)


def test_the_facts(directory):
    facts = inspect(directory)
    assert json.loads(json.dumps(facts)) == facts
    assert facts['rows'] == 8 and facts['hours'] == pytest.approx(sum(SECONDS) / 3600)
    assert facts['labelled_rows'] == 7 and facts['words'] == 14
    assert facts['labelled_hours'] == pytest.approx(sum(SECONDS[:7]) / 3600)
    assert facts['splits'] == {
        'train': {'rows': 7, 'hours': pytest.approx(17.5 / 3600)},
        'test': {'rows': 1, 'hours': pytest.approx(0.5 / 3600)},
    }
    assert list(facts['languages']) == ['de', 'en']  # the larger first: 10.5 and 7.5 s
    assert facts['domains'] == {'(none)': {'rows': 8, 'hours': pytest.approx(18 / 3600)}}
    assert facts['speakers']['speaker-2']['rows'] == 6
    assert facts['seconds'] == {'shortest': 0.5, 'mean': 2.25, 'median': 2.25, 'longest': 4.0}
    assert facts['licences'] == {'CC0-1.0': 8}
    assert facts['quarantined'] == 1 and facts['quarantine_reasons'] == {'silent': 1}
    assert facts['quarantine_examples'][0]['id'] == 'quiet'


def test_the_histogram_counts_every_utterance_once(directory):
    histogram = inspect(directory)['histogram']
    assert sum(bar['rows'] for bar in histogram) == 8
    assert histogram[0]['from'] == 0 and histogram[-1]['to'] >= 4.0
    for bar in histogram[:-1]:
        expected = sum(bar['from'] <= s < bar['to'] for s in SECONDS)
        assert bar['rows'] == expected


def test_padding_waste_equals_a_count_by_hand(directory):
    facts = inspect(directory)
    usual = [s for s in SECONDS if s <= np.quantile(SECONDS, 0.995)]
    for plan in facts['padding'].values():
        bounds = np.array(plan['bounds_seconds'])
        padded = sum(bounds[np.searchsorted(bounds, s)] for s in usual)
        assert plan['waste'] == pytest.approx(1 - sum(usual) / padded, abs=0.03)
    wastes = [plan['waste'] for plan in facts['padding'].values()]
    assert wastes == sorted(wastes, reverse=True) and wastes[0] > 0.3 and wastes[-1] < 0.05


def test_examples_are_spread_over_the_corpus_with_their_level(directory):
    examples = inspect(directory, examples=3)['examples']
    assert [row['row'] for row in examples] == [0, 3, 7]
    assert [row['seconds'] for row in examples] == [0.5, 2.0, 4.0]
    assert all(row['level_db'] == pytest.approx(-6.0, abs=0.05) for row in examples)
    assert examples[0]['text'] == 'two [words]' and examples[2]['text'] is None
    assert inspect(directory, examples=0)['examples'] == []


def test_the_command_shows_what_it_returns(directory, capsys):
    facts = inspect_command(directory)
    output = capsys.readouterr().out
    assert facts == inspect(directory)
    for shown in ('speaker-2', 'two [words]', '(no text)', 'CC0-1.0', 'left out: <16000 samples>'):
        assert shown in output


def test_bars_are_proportional_and_never_vanish():
    assert _bar(1.0, 10) == '█' * 10
    assert _bar(0.5, 10) == '█' * 5
    assert _bar(0.0, 10) == ''
    assert _bar(1e-9, 10) == '▏'


def test_a_folder_without_a_corpus_is_refused(tmp_path):
    with pytest.raises(DataError, match='holds no corpus.json'):
        inspect_command(str(tmp_path))
