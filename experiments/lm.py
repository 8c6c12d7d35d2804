"""A Transformer language model for shallow fusion: the 103 M one of the paper, or a tiny one.

    bigssl run --config experiments/lm.py:size=tiny,quickstart=runs/quickstart --workdir runs/lm
    bigssl run --config experiments/lm.py:size=103m --workdir runs/lm-103m \\
        --config.corpora.labelled.manifest=... --config.corpora.unlabelled.manifest=...

Arguments, comma-separated:
    size=tiny         2 layers, width 128: characters, transcripts of the quickstart's corpora
         103m         8 layers, 103 M parameters, relative positions [recalled]; 1k word-pieces
                      [recalled]; the transcripts of experiments/bigssl.py and the sentences of
                      data/lm-text.txt.gz (LibriSpeech's own: 800 M words), as in the paper: "LM
                      text + transcripts" [recalled]
    quickstart=DIR    with size=tiny: the workdir of a quickstart, whose corpora are then used

The tokenizer is that of the recogniser's experiment (quickstart.py, bigssl.py): trained from the
same selection it is the same file, byte for byte, and the two can be fused.

Cost of 103m [ours, arithmetic]: 100k steps of 65,536 tokens are 6.6e9 tokens, six passes over that
text, and 4e18 FLOPs: 14 chip-hours of a TPU v5e at 40 % of its peak.  It has not been run.  Steps,
batch, rates and dropout of both are ours.
"""

import pathlib

import ml_collections

from bigssl_jax import config as config_lib
from bigssl_jax.config import ConfigError

SIZES = ('tiny', '103m')


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """The experiment's config; `argument` as in the head of this file (default: size=tiny)."""
    given = _read(argument)
    tiny = given['size'] == 'tiny'
    base = 'quickstart.py' if tiny else 'bigssl.py'
    config = config_lib.load(str(pathlib.Path(__file__).with_name(base)))
    config.name = f'lm-{given["size"]}'
    if given['quickstart']:
        config.data_dir = f'{given["quickstart"]}/corpora'
    config.stages = {'lm': _tiny() if tiny else _large()}
    config.recipe = ('lm',)
    config.compute = {n: v for n, v in config.compute.items() if n != 'pass_hours'}
    return config


def _read(argument: str) -> dict[str, str]:
    values = {'size': 'tiny', 'quickstart': ''}
    for item in argument.split(',') if argument else ():
        name, _, value = item.partition('=')
        if name not in values or (name == 'size' and value not in SIZES):
            raise ConfigError(
                f'experiment argument {item!r}; allowed: size={"|".join(SIZES)}; quickstart=DIR'
            )
        values[name] = value
    if values['quickstart'] and values['size'] != 'tiny':
        raise ConfigError('experiment argument quickstart=DIR goes with size=tiny')
    return values


def _tiny() -> dict:
    """Some minutes of two cores."""
    transcripts = {'labelled': {'selection': 'labelled'}, 'rest': {'selection': 'unlabelled'}}
    return {
        'kind': 'language_model',
        'steps': 2000,
        'objectives': {'lm': {'objective': 'next_token', 'stream': 'text', 'preset': 'lm-tiny'}},
        'streams': {
            'text': {
                'sources': transcripts,
                'batch_tokens': 4096,
                'rates': 'proportional',
            }
        },
        'optimizer': {
            'groups': {
                'all': {
                    'peak': 2e-3, 'warmup': 200, 'schedule': 'cosine', 'weight_decay': 0.01,
                }
            }
        },
        'eval_every': 500,
        'dev': 'dev',
        'keep_best': 1,
        'export': 'best',  # so little text is soon known by heart
    }  # fmt: skip


def _large() -> dict:
    """The paper's size."""
    return {
        'kind': 'language_model',
        'steps': 100_000,
        'objectives': {
            'lm': {
                'objective': 'next_token',
                'stream': 'text',
                'preset': 'lm-103m',
                'dtype': 'bfloat16',
                'remat': 'full',
            }
        },
        'streams': {
            'text': {
                'sources': {
                    'transcripts': {'selection': 'labelled'},
                    'text': {'texts': ('data/lm-text.txt.gz',)},
                },
                'batch_tokens': 65_536,
                'num_buckets': 6,
                'rates': 'proportional',
                'rows_multiple': 256,
            }
        },
        'optimizer': {
            'groups': {
                'all': {'peak': 1e-3, 'warmup': 4000, 'schedule': 'inverse_sqrt', 'b2': 0.98}
            },
            'ema_decay': 0.999,
        },
        'log_every': 100,
        'eval_every': 2000,
        'dev': 'dev',
        'save_every': 1000,
        'keep': 3,
    }
