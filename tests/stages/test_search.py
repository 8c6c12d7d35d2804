"""Beam search in stages: names of searches, language models by stage and file, tuned weights."""

import dataclasses
import json
import pathlib
import shutil
import types

import numpy as np
import pytest

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.evaluation.results_table import result_table
from bigssl_jax.objectives import CTC, RNNT
from bigssl_jax.stages import schema
from bigssl_jax.stages.recipe import run_recipe
from bigssl_jax.stages.recognition import Alternative
from bigssl_jax.stages.search import decoder_name, load_models
from bigssl_jax.stages.transcribe import search_of
from bigssl_jax.stages.tuning import tune

HERE = pathlib.Path(__file__).parent
BEAM = {'kind': 'beam', 'beam': 4, 'nbest': 4, 'ngram': 'trigrams', 'ngram_weight': 0.1}
HEAD = {'prediction_layers': 1, 'prediction_dim': 16, 'joint_dim': 32, 'ctc_weight': 0.5}
TRANSDUCER = {
    'steps': 240,
    'objectives': {'rnnt': {'objective': 'rnnt', 'stream': 'mix', **HEAD}},
}
GRID = {'ngram_weight': (0.0, 0.1, 0.3), 'length_reward': (0.0, 0.5)}


@pytest.fixture
def config(recipe):
    """The tone experiment; at its end a transducer, an n-gram model and a tuned beam search."""
    config = config_lib.load(f'{HERE / "tone_experiment.py"}:{recipe.manifest}')
    config.stages['rnnt'] = config.stages.supervised.to_dict() | TRANSDUCER
    config.stages['trigrams'] = {'kind': 'ngram', 'selection': 'labelled', 'order': 3}
    config.stages['beams'] = {
        'kind': 'evaluate',
        'models': ('supervised', 'rnnt'),
        'sets': ('test',),
        'decoder': dict(BEAM),
        'tune': {'selection': 'dev', **GRID},
        'compare': (('greedy/rnnt', 'rnnt'),),
        'batch_seconds': 32.0,
        'num_buckets': 1,
        'report_clips': 0,
    }
    config.stages['greedy'] = {
        **config.stages['beams'].to_dict(),
        'compare': (),
        'models': ('rnnt',),
        'decoder': {'kind': 'greedy'},
        'tune': {},
    }
    config.recipe = (*config.recipe, 'rnnt', 'greedy', 'trigrams', 'beams')
    return config


def test_a_tuned_beam_with_an_ngram_model_is_no_worse_than_greedy(finished, config, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(finished.workdir, workdir)
    assert run_recipe(config, workdir)['ran'] == ['rnnt', 'greedy', 'trigrams', 'beams']
    assert (workdir / 'trigrams' / 'model.arpa').read_text().startswith('\\data\\')
    tuning = json.loads((workdir / 'beams' / 'tuning.json').read_text())
    done = json.loads((workdir / 'beams' / 'done.json').read_text())
    beams, *greedy = (
        json.loads((workdir / name / 'scores.json').read_text())['test']
        for name in ('beams', 'evaluate', 'greedy')
    )
    for name, without in zip(('supervised', 'rnnt'), greedy, strict=True):
        report = tuning[name]
        assert report['points'] == 6 and report['oracle_wer'] <= report['list_wer']
        assert report['list_wer'] <= report['start_wer']
        holds = report['verified_wer'] <= report['start_wer']
        assert report['kept'] == (report['found'] if holds else report['start'])
        assert done['results']['tuned'][name] == report['kept']
        assert beams[name]['cer']['value'] <= without[name]['cer']['value'] + 0.02
    assert beams['rnnt']['cer']['value'] < 0.2
    assert set(tuning['rnnt']['found']) - set(tuning['supervised']['found']) == {
        'internal_lm_weight'
    }
    (test,) = json.loads((workdir / 'beams' / 'comparisons.json').read_text())
    assert (test['first'], test['second']) == ('greedy/rnnt', 'rnnt')
    difference = beams['rnnt']['wer']['value'] - greedy[1]['rnnt']['wer']['value']
    assert test['wer']['difference'] == pytest.approx(difference)
    named = [row.name for row in result_table(workdir)]
    assert named[-3:] == ['greedy/rnnt', 'beams/supervised', 'beams/rnnt']
    assert run_recipe(config, workdir)['ran'] == []


@pytest.mark.parametrize(
    ('field', 'value', 'told'),
    [
        ('decoder', {**BEAM, 'ngram': 'labels'}, "decoder.ngram is 'labels', a pseudo_label stage"),
        ('decoder', {**BEAM, 'ngram': 'bigrams'}, "needs stage 'bigrams', which is not before it"),
        ('decoder', {**BEAM, 'beam': 2}, 'stages.beams.decoder.nbest is 4, but'),
        ('decoder', {'kind': 'greedy'}, "tuning also needs decoder.kind 'beam'"),
        ('compare', (('greedy/ctc', 'rnnt'),), "compare is 'greedy/ctc', which is not defined"),
        ('compare', (('beams/rnnt', 'rnnt'),), "needs stage 'beams', which is not before it"),
        ('compare', (('labels/rnnt', 'rnnt'),), 'a pseudo_label stage; it must name a evaluate'),
        ('compare', ('rnnt',), "has 'rnnt'; each entry is a pair of models"),
        ('tune', {'selection': 'dev'}, 'tuning also needs'),
        ('tune', {**GRID}, 'but tune.selection names no selection'),
        ('tune', {'selection': 'dew', **GRID}, "tune.selection is 'dew', which is not defined"),
        ('tune', {'selection': 'dev', 'lm_weight': (0.1,)}, 'but decoder.lm names no model'),
    ],
)
def test_a_bad_field_is_one_line_before_any_work(config, field, value, told):
    config.stages['beams'][field] = value
    with pytest.raises(ConfigError, match=told) as error:
        schema.resolve(config)
    assert '\n' not in str(error.value)


def test_the_identity_of_a_stage_holds_the_file_and_not_its_name(config, tmp_path):
    paths = [tmp_path / name for name in ('a.arpa', 'b.arpa', 'c.arpa')]
    for path, text in zip(paths, ('one', 'one', 'two'), strict=True):
        path.write_text(text)

    def identity(path):
        config.stages['beams']['decoder'] = {**BEAM, 'ngram': str(path)}
        return schema.identity_of(schema.resolve(config), 'beams')

    first, moved, changed = map(identity, paths)
    assert first == moved != changed
    assert 'trigrams' not in first['upstream']
    with pytest.raises(UserError, match='none.arpa cannot be read: No such file'):
        identity(tmp_path / 'none.arpa')


def test_names_of_searches():
    ctc, rnnt = CTC(vocabulary_size=9), RNNT(vocabulary_size=9)
    assert decoder_name(ctc, DecoderConfig(), {}) == 'greedy_ctc-1'
    assert decoder_name(rnnt, DecoderConfig(), {}) == 'greedy_transducer-1 max_symbols=5'
    search = DecoderConfig(**BEAM)
    name = decoder_name(ctc, search, {'ngram': 'f00'})
    assert name == 'beam_ctc-1 beam=4 expansions=8 ngram=f00 ngram_weight=0.1'
    name = 'beam_transducer-1 max_symbols=5 beam=4 expansions=8 ngram=f00 ngram_weight=0.1'
    assert decoder_name(rnnt, search, {'ngram': 'f00'}) == name


def test_a_stage_needs_a_run():
    with pytest.raises(UserError, match="decoder.ngram is 'trigrams'; name a file or folder"):
        load_models(DecoderConfig(**BEAM), None, None, None)


class Listener:
    """A recogniser that answers with made-up lists: one of them depends on the weights."""

    def __init__(self, search=None):
        self.search = search

    def searching(self, search):
        return Listener(search)

    def fusion_parts(self, sequences):
        scores = np.array([-float(tokens[0]) for tokens in sequences])
        return {'ngram_weight': scores, 'length_reward': np.ones(len(sequences))}

    def hear(self, worse):
        lists = [[('no', -1.0, 9), ('yes', -2.0, 1)], [('yes', -1.0, 1), ('no', -3.0, 2)]]
        found = []
        for entries in lists:
            entries = [Alternative(text, np.array([t]), 0.0, p, 0.0) for text, p, t in entries]
            best = max(
                entries,
                key=lambda a: a.log_probability - self.search.ngram_weight * a.tokens[0],
            )
            text = 'no' if worse and self.search.ngram_weight > 0.1 else best.text
            found.append(types.SimpleNamespace(text=text, alternatives=tuple(entries)))
        return found


@pytest.mark.parametrize('worse', [False, True])
def test_weights_are_kept_only_if_decoding_again_confirms_them(worse):
    search = DecoderConfig(kind='beam', ngram='x.arpa')
    tuned, report = tune(
        Listener(),
        search,
        lambda listener: listener.hear(worse),
        lambda heard: 'yes',
        str.lower,
        {'ngram_weight': (0.0, 0.1, 0.2, 0.5), 'internal_lm_weight': (0.0, 1.0)},
    )
    assert report['found'] == {'ngram_weight': 0.2, 'length_reward': 0.0}
    assert (report['start_wer'], report['list_wer'], report['oracle_wer']) == (0.5, 0.0, 0.0)
    assert report['verified_wer'] == (1.0 if worse else 0.0)
    expected = search if worse else dataclasses.replace(search, ngram_weight=0.2)
    assert tuned == expected
    assert report['kept']['ngram_weight'] == expected.ngram_weight


def test_fields_of_a_decoder_on_the_command_line():
    assert search_of([]) == DecoderConfig()
    assert search_of([('max_symbols', '3')]) == DecoderConfig(max_symbols=3)
    given = [('beam', '4'), ('ngram', 'x.arpa'), ('ngram_weight', '1'), ('nbest', '2')]
    assert search_of(given) == DecoderConfig(
        kind='beam', beam=4, nbest=2, ngram='x.arpa', ngram_weight=1.0
    )


@pytest.mark.parametrize(
    ('field', 'value', 'told'),
    [
        ('beem', '4', "^--decoder.beem: did you mean 'beam'?"),
        ('beam', '0', '^--decoder.beam is 0; it must be at least 1'),
        ('beam', 'x', '^--decoder.beam=x: invalid literal'),
        ('ngram_weight', '.3', '^--decoder.ngram_weight is 0.3, but decoder.ngram names no model'),
    ],
)
def test_a_bad_field_on_the_command_line_is_one_line(field, value, told):
    with pytest.raises(ConfigError, match=told):
        search_of([(field, value)])
