"""A small experiment to plan: three stages, an encoder of a few thousand parameters."""

import pathlib

import jax

from bigssl_jax.parallel.topologies import GIB, Chip, Topology
from bigssl_jax.stages import schema
from bigssl_jax.stages.plan import price, step

CHIP = Chip('made-up', 1e12, GIB, 1e11, 4, 4e10, 4, 1e9, 1, 'nowhere')
AXES = ('slice', 'data', 'fsdp', 'tensor')
ONE = Topology('made-up-1', CHIP, (1,), 1)


def experiment(**encoder) -> dict:
    """Pre-training, fine-tuning and labelling with an encoder of a few thousand parameters."""
    sources = {'a': {'selection': 'all'}}
    stream = {'max_seconds': 1.0, 'batch_seconds': 9.0, 'max_labels': 8}
    labelled = {'sources': {'a': {'selection': 'all', 'labels': 'text'}}, **stream}
    return {
        'name': 'small',
        'corpora': {'c': {'manifest': 'nowhere.jsonl'}},
        'selections': {'all': {'corpus': 'c'}},
        'statistics': {'selection': 'all'},
        'tokenizer': {'selection': 'all', 'vocabulary_size': 12},
        'audio': {'num_mels': 20},
        'compute': {'max_replicated': 1.0},
        'encoder': {
            'preset': 'tiny', 'num_layers': 2, 'model_dim': 16, 'num_heads': 2, 'kernel_size': 3,
            'subsampling_channels': (2, 4), 'num_mels': 20, **encoder,
        },
        'stages': {
            'pretrain': {
                'kind': 'pretrain',
                'objectives': {'rq': {'objective': 'best_rq', 'stream': 's', 'codebook_size': 16}},
                'streams': {'s': {'sources': sources, **stream}},
            },
            'teacher': {
                'kind': 'finetune', 'init_from': 'pretrain', 'streams': {'s': labelled},
                'objectives': {'ctc': {'objective': 'ctc', 'stream': 's'}}, 'spec_augment': {},
                'optimizer': {'ema_decay': 0.99},
            },
            'labels': {
                'kind': 'pseudo_label', 'teacher': 'teacher', 'selection': 'all',
                'batch_seconds': 9.0,
            },
        },
        'recipe': ('pretrain', 'teacher', 'labels'),
    }  # fmt: skip


def question(tmp_path, stage: str, where: Topology = ONE, **changes) -> price.Question:
    """A question about the experiment above on one CPU device."""
    config = step.changed(schema.resolve(experiment()), changes)
    return price.Question(config, stage, where, jax.devices()[:1], tmp_path, lambda text: None)


def write_experiment(folder: pathlib.Path) -> pathlib.Path:
    """The experiment as a file."""
    path = folder / 'experiment.py'
    path.write_text(
        'import ml_collections\n'
        f'def get_config():\n    return ml_collections.ConfigDict({experiment()!r})\n'
    )
    return path
