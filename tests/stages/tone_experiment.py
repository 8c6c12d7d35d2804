"""The whole recipe on tone speech (see tones.py), small enough to train in seconds.

bigssl run --config tests/stages/tone_experiment.py:MANIFEST --workdir DIR
"""

import ml_collections


def get_config(manifest: str) -> ml_collections.ConfigDict:
    """The tiny experiment over the tone speech of `manifest`."""
    config = ml_collections.ConfigDict()
    config.name = 'tones'
    config.seed = 3
    config.corpora = {'tones': {'manifest': manifest}}
    train = {'corpus': 'tones', 'splits': ('train',)}
    config.selections = {
        'labelled': {**train, 'with_text': True, 'hours': 0.04},
        'rest': {**train, 'exclude': ('labelled',)},
        'unlabelled': train,
        'dev': {'corpus': 'tones', 'splits': ('dev',), 'with_text': True},
        'test': {'corpus': 'tones', 'splits': ('test',), 'with_text': True},
    }
    config.tokenizer = {'model_type': 'char', 'vocabulary_size': None, 'selection': 'labelled'}
    config.statistics = {'selection': 'unlabelled', 'seconds': 60.0}
    config.audio = {'num_mels': 40}
    config.encoder = {
        'preset': 'tiny',
        'num_layers': 2,
        'model_dim': 32,
        'num_heads': 2,
        'kernel_size': 5,
        'dropout': 0.05,
        'subsampling_channels': (4, 8),
        'num_mels': 40,
    }
    config.compute = {'tensorboard': False}

    labelled = {'selection': 'labelled', 'labels': 'text'}
    keep = ({'kind': 'empty'}, {'kind': 'confidence', 'percentile': 10.0})
    pseudo = {'selection': 'rest', 'labels': 'labels', 'filter': keep}
    config.stages = {
        'supervised': finetune(100, {'labelled': labelled}),
        'pretrain': pretrain(40),
        'teacher': finetune(100, {'labelled': labelled}, init_from='pretrain'),
        'labels': {
            'kind': 'pseudo_label',
            'teacher': 'teacher',
            'selection': 'rest',
            'filter': keep,
            'batch_seconds': 32.0,
            'num_buckets': 1,
        },
        'student': finetune(
            100, {'labelled': labelled, 'pseudo': pseudo}, init_from='pretrain', eval_every=50
        ),
        'evaluate': {
            'kind': 'evaluate',
            'models': ('supervised', 'teacher', 'student'),
            'sets': ('test',),
            'compare': (('supervised', 'student'),),
            'batch_seconds': 32.0,
            'num_buckets': 1,
            'report_clips': 3,
        },
    }
    config.recipe = ('supervised', 'pretrain', 'teacher', 'labels', 'student', 'evaluate')
    return config


def pretrain(steps: int) -> dict:
    """BEST-RQ with a codebook that so little audio can fill."""
    return {
        'kind': 'pretrain',
        'steps': steps,
        'objectives': {'best_rq': {'objective': 'best_rq', 'stream': 'all', 'codebook_size': 64}},
        'streams': {'all': {'sources': {'all': {'selection': 'unlabelled'}}, **STREAM}},
        # Few steps teach an encoder only to be constant, which is hard to unlearn: it may hardly
        # move here, while the head learns how often each code occurs.
        **schedule(steps, {'heads': ('^heads/', 5e-3), 'encoder': ('^encoder/', 2e-5)}),
    }


def finetune(steps: int, sources: dict, init_from: str = '', eval_every: int = 0) -> dict:
    """CTC on letters."""
    return {
        'kind': 'finetune',
        'steps': steps,
        'init_from': init_from,
        'objectives': {'ctc': {'objective': 'ctc', 'stream': 'mix'}},
        'streams': {'mix': {'sources': sources, **STREAM}},
        'eval_every': eval_every,
        'dev': 'dev' if eval_every else '',
        **schedule(steps),
    }


STREAM = {'batch_seconds': 10.0, 'num_buckets': 1, 'max_seconds': 4.0}


def schedule(steps: int, peaks: dict | None = None) -> dict:
    """A short, steep run that saves often enough to be killed between two checkpoints."""
    groups = {
        name: {'pattern': pattern, 'peak': peak, 'warmup': steps // 8, 'schedule': 'cosine'}
        for name, (pattern, peak) in (peaks or {'all': ('.*', 8e-3)}).items()
    }
    return {
        'optimizer': {'groups': groups, 'ema_decay': 0.9},
        'log_every': 20,
        'save_every': 30,
    }
