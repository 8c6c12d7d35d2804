"""The quickstart's loop with more speech, more labels and more steps: an hour or two on two cores.

    bigssl run --config experiments/study.py --workdir runs/study

Pre-trains on every recorded set that installs (about 14 hours in fifteen languages), fine-tunes on
half an hour of one voice, labels the rest of that voice, trains a student, and scores on held-out
scenes and on telephone prompts whose voice and domain no stage has heard.

    study.py:seed=1                    another seed
    study.py:labelled_hours=1.0        more labels

Measured with seed 0 in 55 minutes on two cores: with half an hour of labels this encoder of 2 M
parameters does as well without pre-training on the voice that it was trained on; on the unheard
voice both steps lower the character error rate.  docs/results.md has the figures.
"""

import pathlib

import ml_collections

from bigssl_jax import config as config_lib

# ast_es is left out: its speaker is that of ast_en, whose voice must be unheard.
UNLABELLED_SETS = (
    'queen', 'ast_fr', 'ast_it', 'ast_ru', 'ru', 'fillets_cs', 'fillets_nl', 'tuxpaint',
    'prompts_it', 'prompts_fr', 'prompts_es',
)  # fmt: skip


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """The study's config; `argument`: comma-separated seed=N, labelled_hours=H, scale=S.

    `scale` multiplies the steps of every stage.
    """
    given = dict(item.split('=') for item in argument.split(',') if item)
    config = config_lib.load(str(pathlib.Path(__file__).with_name('quickstart.py')))
    config.name = 'study'
    config.seed = int(given.get('seed', 0))
    config.corpora.game.open_voices = UNLABELLED_SETS
    config.selections.labelled.hours = float(given.get('labelled_hours', 0.5))
    scale = float(given.get('scale', 1.0))
    for name, steps in (
        ('supervised', 3000), ('pretrain', 8000), ('teacher', 2500), ('student', 4000),
    ):  # fmt: skip
        stage = config.stages[name]
        stage.steps = int(steps * scale)
        stage.optimizer.groups.all.warmup = stage.steps // 10
    # The learning rate warms up for 800 steps here.
    config.stages.pretrain.objectives.best_rq.collapse_after_steps = 2500
    return config
