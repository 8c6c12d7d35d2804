"""The BigSSL recipes at the paper's sizes: what bigssl_xl.py, bigssl_xxl.py and bigssl_g.py share.

    bigssl plan --config experiments/bigssl.py:size=g,variant=ps --topology v5e-256
    bigssl run  --config experiments/bigssl.py:size=xl,variant=p --workdir gs://bucket/xl-p \\
        --config.corpora.unlabelled.manifest=... --config.corpora.labelled.manifest=...

Arguments, comma-separated:
    size=xl|xxl|g            encoder preset XL, XXL or G
    variant=supervised       labels only: the baseline of the same size
            p                pre-trained, then fine-tuned
            ps               pre-trained, then self-trained upstream on what a teacher wrote down,
                             then fine-tuned downstream
            nst              pre-trained; a fine-tuned teacher labels; a student starts from the
                             pre-trained encoder again, on labels and pseudo-labels 1 : 9
    objective=wav2vec2       contrastive with linear targets (BigSSL's)
              best_rq        random-projection quantiser: cannot collapse, cheaper
    decoder=rnnt             what is fine-tuned: a transducer with two LSTM layers of 640
            ctc              a linear softmax on the frames

Implements the method of arXiv 2109.13226.  Where a setting comes from: [paper] its text,
[recalled] commonly reported of the paper or its predecessor arXiv 2010.10504, [ours] our choice.
Not as in the paper: LayerNorm in place of BatchNorm in the convolution module, and a plain linear
projection from encoder to decoder in place of linear, Swish and BatchNorm [recalled].

Recordings come from three manifests: `unlabelled` (audio suffices), `labelled` (with text; splits
train, dev, test) and nothing else; the paper's own sets are not public.
"""

import functools

import ml_collections

from bigssl_jax.config import ConfigError

VARIANTS = {
    'supervised': ('supervised', 'evaluate'),
    'p': ('pretrain', 'finetune', 'evaluate'),
    'ps': ('pretrain', 'teacher', 'labels', 'upstream', 'finetune', 'evaluate'),
    'nst': ('pretrain', 'teacher', 'labels', 'student', 'evaluate'),
}
# Padded seconds of a pre-training batch: 2048 utterances [recalled] (G: 4096 [recalled, unsure]) of
# 15 s on average [ours].  Word-pieces: 1k [recalled]; G's are unknown, 4k [ours].
SIZES = {
    'xl': {'preset': 'XL', 'batch_seconds': 30720.0, 'algorithm': 'adamw', 'pieces': 1024},
    'xxl': {'preset': 'XXL', 'batch_seconds': 30720.0, 'algorithm': 'adafactor', 'pieces': 1024},
    'g': {'preset': 'G', 'batch_seconds': 61440.0, 'algorithm': 'adafactor', 'pieces': 4096},
}
OBJECTIVES = ('wav2vec2', 'best_rq')
# RNN-T [paper]; LSTM 640, two layers for all three sizes, joint 640 [recalled]; G's width is
# unknown, 640 [ours].  These are the objective's defaults, written out.
DECODERS = {
    'rnnt': {'prediction': 'lstm', 'prediction_layers': 2, 'prediction_dim': 640, 'joint_dim': 640},
    'ctc': {},
}
# For `bigssl plan`: "approximately a million hours" [paper], 500k of them labelled [recalled].
PASS_HOURS = {'pretrain': 1e6, 'labels': 5e5, 'upstream': 5e5}
MAX_SECONDS = 30.0  # [ours]; the paper's cap is unknown
# Rows of every batch divide by this, so that a run may go on on any mesh up to 256 devices.
ROWS_MULTIPLE = 256


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """The recipe's config; `argument` as in the head of this file (default: size=xl,variant=p)."""
    size, variant, objective, decoder = _read(argument)
    given = SIZES[size]
    config = ml_collections.ConfigDict()
    config.name = f'bigssl-{size}-{variant}'
    config.seed = 0
    config.encoder = {'preset': given['preset'], 'dropout': 0.1}
    # Parameters over 16 neighbouring chips, the batch over all: beyond 16, gathers cost more than
    # they save (docs/plans.md).
    config.compute = {
        'mesh': {'slice': 1, 'data': -1, 'fsdp': 16, 'tensor': 1},
        'pass_hours': {name: PASS_HOURS[name] for name in VARIANTS[variant] if name in PASS_HOURS},
    }
    config.corpora = {
        'unlabelled': {'manifest': 'data/unlabelled.jsonl'},
        'labelled': {'manifest': 'data/labelled.jsonl'},
    }
    train = {'max_seconds': MAX_SECONDS}
    labelled = {'corpus': 'labelled', 'with_text': True}
    config.selections = {
        'unlabelled': {'corpus': 'unlabelled', **train},
        'labelled': {**labelled, 'splits': ('train',), **train},
        'dev': {**labelled, 'splits': ('dev',)},
        'test': {**labelled, 'splits': ('test',)},
    }
    config.tokenizer = {
        'model_type': 'unigram',
        'vocabulary_size': given['pieces'],
        'selection': 'labelled',
    }
    config.statistics = {'selection': 'unlabelled', 'seconds': 36000.0}
    config.stages = _stages(given, variant, objective, decoder)
    config.recipe = VARIANTS[variant]
    return config


def _read(argument: str) -> tuple[str, str, str, str]:
    """(size, variant, objective, decoder) of an argument such as 'size=g,variant=ps'."""
    values = {'size': 'xl', 'variant': 'p', 'objective': 'wav2vec2', 'decoder': 'rnnt'}
    allowed = {
        'size': SIZES,
        'variant': VARIANTS,
        'objective': OBJECTIVES,
        'decoder': DECODERS,
    }
    for item in argument.split(',') if argument else ():
        name, _, value = item.partition('=')
        if name not in allowed or value not in allowed[name]:
            choices = '; '.join(f'{key}={"|".join(values)}' for key, values in allowed.items())
            raise ConfigError(f'experiment argument {item!r}; allowed: {choices}')
        values[name] = value
    return values['size'], values['variant'], values['objective'], values['decoder']


def _stages(given: dict, variant: str, objective: str, decoder: str) -> dict:
    """The stages of a variant; every fine-tuning on labels is the same."""
    algorithm = given['algorithm']
    labels = {'labelled': {'selection': 'labelled', 'labels': 'text'}}
    written = {'selection': 'unlabelled', 'labels': 'labels'}
    last = VARIANTS[variant][-2]
    finetune = functools.partial(_finetune, algorithm, decoder)
    stages = {
        'supervised': finetune(labels),
        'pretrain': _pretrain(given['batch_seconds'], objective, algorithm),
        'teacher': finetune(labels, 'pretrain'),
        'labels': {
            'kind': 'pseudo_label',
            'teacher': 'teacher',
            'selection': 'unlabelled',
            'batch_seconds': 7680.0,
        },
        # The S of PS: what the teacher wrote, nothing else.
        'upstream': finetune({'pseudo': written}, 'pretrain'),
        'finetune': finetune(labels, 'upstream' if variant == 'ps' else 'pretrain'),
        'student': finetune(
            {
                'labelled': {**labels['labelled'], 'weight': 1.0},
                'pseudo': {**written, 'weight': 9.0},
            },
            'pretrain',
        ),
        'evaluate': {'kind': 'evaluate', 'models': (last,), 'sets': ('test',)},
    }
    return {name: stages[name] for name in VARIANTS[variant]}


def _pretrain(batch_seconds: float, objective: str, algorithm: str) -> dict:
    """400k steps [recalled]; peak 2e-3, 25k warm-up, clipping at 20, no EMA [recalled]."""
    return {
        'kind': 'pretrain',
        'steps': 400_000,
        'objectives': {objective: {'objective': objective, 'stream': 'unlabelled'}},
        'streams': {
            'unlabelled': _stream({'unlabelled': {'selection': 'unlabelled'}}, batch_seconds)
        },
        'optimizer': {'groups': {'all': _group('.*', algorithm, 2e-3, 25_000)}, 'clip_norm': 20.0},
        'log_every': 100,
        'save_every': 2000,
        'keep': 3,
    }


def _finetune(algorithm: str, decoder: str, sources: dict, init_from: str = '') -> dict:
    """Encoder and decoder with their own rates [recalled]; SpecAugment; EMA 0.9999 [recalled].

    256 utterances a batch is what w2v-BERT used [recalled]; 100k steps as in USM [paper: USM].
    """
    return {
        'kind': 'finetune',
        'steps': 100_000,
        'init_from': init_from,
        'objectives': {decoder: {'objective': decoder, 'stream': 'labelled', **DECODERS[decoder]}},
        'streams': {'labelled': _stream(sources, 256 * MAX_SECONDS)},
        'spec_augment': {},
        'optimizer': {
            'groups': {
                'encoder': _group('^encoder/', algorithm, 3e-4, 5000),
                'decoder': _group('^heads/', algorithm, 1e-3, 1500),
            },
            'clip_norm': 20.0,
            'ema_decay': 0.9999,
        },
        'log_every': 100,
        'eval_every': 2000,
        'dev': 'dev',
        'save_every': 1000,
        'keep': 3,
    }


def _stream(sources: dict, batch_seconds: float) -> dict:
    return {
        'sources': sources,
        'batch_seconds': batch_seconds,
        'num_buckets': 6,
        'max_seconds': MAX_SECONDS,
        'rows_multiple': ROWS_MULTIPLE,
    }


def _group(pattern: str, algorithm: str, peak: float, warmup: int) -> dict:
    """b2 = 0.98 [recalled]; inverse square root after the warm-up [paper: praxis]."""
    return {
        'pattern': pattern,
        'algorithm': algorithm,
        'peak': peak,
        'warmup': warmup,
        'schedule': 'inverse_sqrt',
        'b2': 0.98,
    }
