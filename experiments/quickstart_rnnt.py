"""CTC against RNN-T in the quickstart's setting: the same encoder, labels, steps and batches.

    bigssl run --config experiments/quickstart_rnnt.py:runs/quickstart --workdir runs/rnnt
    bigssl run --config experiments/quickstart_rnnt.py --workdir runs/rnnt      pre-trains itself

    ctc       the quickstart's teacher again
    rnnt      a transducer with a small LSTM, and a CTC loss beside it on the same frames
    evaluate  both, with a paired test

The argument is the workdir of a finished quickstart, whose corpora and pre-trained encoder are then
used as they are.
"""

import pathlib

import ml_collections

from bigssl_jax import config as config_lib

# The paper's decoder has 9 M parameters, more than four times this encoder.  With ten minutes of
# labels a transducer hardly learns to listen without the CTC loss.
DECODER = {
    'prediction_layers': 1,
    'prediction_dim': 128,
    'prediction_dropout': 0.2,
    'joint_dim': 128,
    'ctc_weight': 0.3,
}


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
    rnnt = {**ctc, 'objectives': {'rnnt': {'objective': 'rnnt', 'stream': 'labelled', **DECODER}}}
    evaluate |= {'models': ('ctc', 'rnnt'), 'compare': (('ctc', 'rnnt'),)}
    before = {} if quickstart else {'pretrain': pretrain}
    chosen = {**before, 'ctc': ctc, 'rnnt': rnnt, 'evaluate': evaluate}
    config.stages, config.recipe = chosen, tuple(chosen)
    return config
