"""CTC against RNN-T, and searches against each other, in the quickstart's setting.

    bigssl run --config experiments/quickstart_rnnt.py:runs/quickstart --workdir runs/rnnt
    bigssl run --config experiments/quickstart_rnnt.py --workdir runs/rnnt      pre-trains itself

    ctc       the quickstart's teacher again: the same encoder, labels, steps and batches as
    rnnt      a transducer with a small LSTM, and a CTC loss beside it on the same frames
    greedy    scores both, with a paired test
    beam      the same with a beam search
    ngram, lm  language models of the transcripts of all training lines, those without labels too:
              as if their text were known and their audio were not
    beam_ngram, beam_lm   beam search with each, weights tuned on dev; dev is scored as well

The argument is the workdir of a finished quickstart, whose corpora and pre-trained encoder are then
used as they are.
"""

import pathlib

import ml_collections

from bigssl_jax import config as config_lib

# The paper's decoder has 9 M parameters, more than four times this encoder.  With ten minutes of
# labels a transducer hardly learns to listen without the CTC loss.
RNNT = {
    'objective': 'rnnt',
    'stream': 'labelled',
    'prediction_layers': 1,
    'prediction_dim': 128,
    'prediction_dropout': 0.2,
    'joint_dim': 128,
    'ctc_weight': 0.3,
}
BEAM = {'kind': 'beam', 'beam': 8}


def get_config(quickstart: str = '') -> ml_collections.ConfigDict:
    """The experiment's config.

    Args:
      quickstart: workdir of a finished quickstart; '' prepares the corpora and pre-trains here.
    """
    config = config_lib.load(str(pathlib.Path(__file__).with_name('quickstart.py')))
    config.name = 'quickstart-rnnt'
    stages = config.stages.to_dict()
    pretrain, ctc, evaluate = (stages[name] for name in ('pretrain', 'teacher', 'evaluate'))
    if quickstart:
        config.data_dir = f'{quickstart}/corpora'
        ctc['init_from'] = f'{quickstart}/pretrain'
    config.selections['text'] = {
        **config.selections['labelled'].to_dict(), 'hours': None, 'max_seconds': None,
    }  # fmt: skip
    evaluate |= {'models': ('ctc', 'rnnt'), 'sets': ('dev', 'test'), 'report_clips': 0}
    chosen = {} if quickstart else {'pretrain': pretrain}
    chosen |= {
        'ctc': ctc,
        'rnnt': {**ctc, 'objectives': {'rnnt': RNNT}},
        'ngram': {'kind': 'ngram', 'selection': 'text', 'order': 6},
        'lm': language_model(),
        'greedy': {**evaluate, 'compare': (('ctc', 'rnnt'),)},
        'beam': {**evaluate, 'decoder': BEAM, 'compare': against('greedy')},
        'beam_ngram': {**evaluate, **fused('ngram'), 'compare': against('beam')},
        'beam_lm': {**evaluate, **fused('lm'), 'compare': against('beam')},
    }
    config.stages, config.recipe = chosen, tuple(chosen)
    return config


def against(stage: str) -> tuple:
    """Pairs of each model as `stage` heard it, and as it is heard now."""
    return tuple((f'{stage}/{model}', model) for model in ('ctc', 'rnnt'))


def fused(field: str) -> dict:
    """A beam search that listens to the language model of the stage `field`."""
    return {
        'decoder': {**BEAM, field: field, f'{field}_weight': 0.3, 'length_reward': 0.5},
        'tune': {
            'selection': 'dev',
            f'{field}_weight': (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8),
            'internal_lm_weight': (0.0, 0.1, 0.2, 0.4),
            'length_reward': (0.0, 0.25, 0.5, 1.0, 1.5),
        },
    }


def language_model() -> dict:
    """The tiny one of lm.py, on the transcripts of one voice."""
    stage = config_lib.load(str(pathlib.Path(__file__).with_name('lm.py'))).stages.lm.to_dict()
    stage['streams']['text']['sources'] = {'text': {'selection': 'text'}}
    return stage
