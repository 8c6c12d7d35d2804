"""The `decoder` field: what it refuses, and what of it names the labels that a search wrote."""

import pytest

from bigssl_jax.config import ConfigError
from bigssl_jax.decoding import DecoderConfig

FUSED = dict(kind='beam', beam=4, ngram='x.arpa', ngram_weight=0.3)


@pytest.mark.parametrize(
    ('fields', 'told'),
    [
        (
            {'kind': 'beem'},
            "decoder.kind is 'beem'; allowed: 'greedy', 'beam'; did you mean 'beam'",
        ),
        ({'kind': 'beam', 'beam': 0}, 'decoder.beam is 0; it must be at least 1'),
        ({'kind': 'beam', 'expansions': 0}, 'decoder.expansions is 0; it must be at least 1'),
        ({'kind': 'beam', 'beam': 4, 'nbest': 5}, 'nbest is 5, but decoder.beam keeps 4'),
        ({'kind': 'beam', 'confidence': 'max'}, "confidence is 'max'; allowed: 'max_probability'"),
        ({'kind': 'beam', 'lm_weight': 0.3}, 'lm_weight is 0.3, but decoder.lm names no model'),
        ({**FUSED, 'ngram_weight': -0.1}, 'ngram_weight is -0.1; allowed: 0 or more'),
        ({**FUSED, 'length_reward': float('nan')}, 'length_reward is nan; allowed: any finite'),
        (
            {'nbest': 2},
            "nbest is 2, which a greedy search does not use; set decoder.kind to 'beam'",
        ),
        ({'ngram': 'x.arpa'}, "ngram is 'x.arpa', which a greedy search does not use"),
    ],
)
def test_refuses_what_cannot_be(fields, told):
    with pytest.raises(ConfigError, match=told):
        DecoderConfig(**fields)


def test_fields_that_change_nothing_do_not_name_labels():
    assert DecoderConfig().decisive(ctc=True) == {}
    assert DecoderConfig(max_symbols=3).decisive(ctc=False) == {'max_symbols': 3}
    plain = {'beam': 4, 'expansions': 8, 'ngram': 'x.arpa', 'ngram_weight': 0.3}
    assert DecoderConfig(**FUSED).decisive(ctc=True) == plain
    assert DecoderConfig(**FUSED, nbest=4, internal_lm_weight=0.2).decisive(ctc=True) == plain
    inner = DecoderConfig(**FUSED, internal_lm_weight=0.2).decisive(ctc=False)
    assert inner == {**plain, 'max_symbols': 5, 'internal_lm_weight': 0.2}


def test_weights_and_models_need_no_program_of_their_own():
    fused = DecoderConfig(**FUSED, length_reward=0.5, nbest=2)
    assert fused.program == DecoderConfig(kind='beam', beam=4, nbest=2)
    assert DecoderConfig(kind='beam', beam=6, confidence='posterior').ranks == 6
    assert fused.ranks == 2 and fused.fusion.length_reward == 0.5
