"""What the quickstart's encoders know besides words: who speaks, and in which language.

    bigssl run --config experiments/probes.py --workdir runs/probes
    bigssl run --config experiments/probes.py:runs/study/pretrain,runs/study/teacher --workdir ...

Linear classifiers on averages over time of every layer (docs/probe.md).  Speakers are the
characters of a game, told apart in scenes that no classifier has heard.  Languages are those of
short prompts of a drawing program, one to a few voices each: who tells the voices apart tells the
languages as well, so that the second task is the easier one.

The argument: folders of finished pretrain or finetune stages, by default those of the quickstart.
"""

import ml_collections

MODELS = ('runs/quickstart/supervised', 'runs/quickstart/pretrain', 'runs/quickstart/student')
LONGEST = 10.0


def get_config(models: str = '') -> ml_collections.ConfigDict:
    """The experiment's config.

    Args:
      models: folders with commas between; '' is `MODELS`.
    """
    config = ml_collections.ConfigDict()
    config.name = 'probes'
    config.corpora = {
        'game': {'open_voices': ('queen',), 'fallback_synthetic_hours': 2.5},
        'prompts': {'open_voices': ('tuxpaint',), 'fallback_synthetic_hours': 0.5},
    }
    config.selections = {
        f'{corpus}_{split}': {'corpus': corpus, 'splits': (split,), 'max_seconds': LONGEST}
        for corpus in config.corpora
        for split in ('train', 'dev', 'test')
    }
    config.statistics = {'selection': 'game_train', 'seconds': 600.0}
    config.stages = {
        'probe': {
            'kind': 'probe',
            'models': tuple(models.split(',')) if models else MODELS,
            'tasks': {'speaker': task('game', 'speaker'), 'language': task('prompts', 'language')},
            'batch_seconds': 64.0,
        },
    }
    config.recipe = ('probe',)
    return config


def task(corpus: str, field: str) -> dict:
    """A task on the splits of a corpus."""
    return {'field': field} | {split: f'{corpus}_{split}' for split in ('train', 'dev', 'test')}
