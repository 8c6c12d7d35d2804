"""The quickstart's loop with more speech, a larger model and more steps: hours on two cores.

    bigssl run --config experiments/study.py --workdir runs/study

Pre-trains on every recorded set that installs (about 13 hours in fourteen languages), fine-tunes on
half an hour of one voice, labels the rest of that voice, trains a student, and scores on held-out
scenes and on telephone prompts whose voice and domain no stage has heard.

    study.py:seed=1                    another seed
    study.py:labelled_hours=1.0        more labels

Cost and result: docs/results.md.
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
    config.encoder = {'preset': 'small', 'dropout': 0.1}
    config.compute = {'expected_speed': 40.0}
    config.corpora.game.open_voices = UNLABELLED_SETS
    config.selections.labelled.hours = float(given.get('labelled_hours', 0.5))
    scale = float(given.get('scale', 1.0))
    for name, steps in (
        ('supervised', 2500), ('pretrain', 6000), ('teacher', 2000), ('student', 3000),
    ):  # fmt: skip
        stage = config.stages[name]
        stage.steps = int(steps * scale)
        stage.optimizer.groups.all.warmup = stage.steps // 10
    # The learning rate warms up for 1,200 steps here.
    config.stages.pretrain.objectives.best_rq.collapse_after_steps = 4000
    return config
