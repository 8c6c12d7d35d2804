"""The whole loop on real recorded speech, on two CPU cores, in under half an hour.

    bigssl run --config experiments/quickstart.py --workdir runs/quickstart
    bigssl run --config experiments/quickstart.py:my.jsonl --workdir runs/mine      own manifest

    supervised   fine-tuned from scratch on the labelled subset: the baseline
    pretrain     BEST-RQ on all training audio, transcripts unused
    teacher      fine-tuned from the pre-trained encoder on the labelled subset          (P)
    labels       the teacher writes down the rest of the training audio
    student      from the pre-trained encoder again, on labelled + pseudo-labelled       (P + NST)
    evaluate     all three on held-out scenes, and on a voice and domain never trained on

Implements the method of arXiv 2109.13226 in miniature: BEST-RQ (arXiv 2202.01855) in place of
wav2vec 2.0, CTC in place of RNN-T, a Conformer of 2 M parameters in place of 8 B.  Cost and result:
docs/results.md.
"""

import ml_collections

# With more, minutes of training do not reach the point where labels are what is lacking.
LABELLED_HOURS = 1 / 6

# Padded seconds of a step: on a CPU cost grows with audio, so small batches buy more updates.
BATCH_SECONDS = 32.0
# Few lines are longer; a bucket for them would be mostly padding.
MAX_SECONDS = 6.0


def get_config(manifest: str = '') -> ml_collections.ConfigDict:
    """The quickstart's config.

    Args:
      manifest: a JSON Lines or TSV manifest to use instead of the quickstart corpus: lines of up to
        six seconds, more than ten minutes of them with transcripts (or set
        selections.labelled.hours lower) and others beside these.  Splits that it does not name are
        drawn by group, and without groups line by line.
    """
    config = ml_collections.ConfigDict()
    config.name = 'quickstart'
    config.seed = 0
    config.encoder = {'preset': 'tiny', 'dropout': 0.1}
    config.compute = {'expected_speed': 180.0}
    if manifest:
        config.corpora = {'speech': {'manifest': manifest, 'split_by': 'group'}}
        config.selections = selections('speech', 'speech', {})
    else:
        # One voice with labels, because one voice can be learnt in minutes; all forty characters of
        # its game without, because audio is free.  The exam is another voice, room and topic.
        config.corpora = {
            'hero': {
                'open_voices': ('queen',),
                'speakers': ('queen_joe',),
                'fallback_synthetic_hours': 1.5,
            },
            'game': {'open_voices': ('queen',), 'fallback_synthetic_hours': 2.5},
            'exam': {'open_voices': ('ast_en',), 'fallback_synthetic_hours': 0.3},
        }
        exam = {'corpus': 'exam', 'splits': ('test',)}
        config.selections = selections('hero', 'game', {'exam': exam})
    config.tokenizer = {'model_type': 'char', 'vocabulary_size': None, 'selection': 'labelled'}
    config.statistics = {'selection': 'unlabelled', 'seconds': 1800.0}

    labelled = {'selection': 'labelled', 'labels': 'text'}
    pseudo = {'selection': 'rest', 'labels': 'labels', 'filter': FILTER}
    config.stages = {
        'supervised': finetune(1500, {'labelled': labelled}),
        'pretrain': pretrain(4000),
        'teacher': finetune(1500, {'labelled': labelled}, init_from='pretrain'),
        'labels': {
            'kind': 'pseudo_label',
            'teacher': 'teacher',
            'selection': 'rest',
            'filter': FILTER,
        },
        'student': finetune(
            2400,
            {'labelled': {**labelled, 'weight': 1.0}, 'pseudo': {**pseudo, 'weight': 1.0}},
            init_from='pretrain',
        ),
        'evaluate': {
            'kind': 'evaluate',
            'models': ('supervised', 'teacher', 'student'),
            'sets': ('test',) if manifest else ('test', 'exam'),
            'compare': (('supervised', 'teacher'), ('teacher', 'student')),
        },
    }
    config.recipe = ('supervised', 'pretrain', 'teacher', 'labels', 'student', 'evaluate')
    return config


FILTER = ({'kind': 'empty'}, {'kind': 'confidence', 'percentile': 10.0})


def selections(speech: str, unlabelled: str, extra: dict) -> dict:
    """Named parts of the corpora; test and dev lines that occur in training are left out."""
    train = {'corpus': speech, 'splits': ('train',), 'max_seconds': MAX_SECONDS}
    held_out = {'with_text': True, 'unseen': True}
    chosen = {
        'labelled': {**train, 'with_text': True, 'hours': LABELLED_HOURS},
        'rest': {**train, 'min_seconds': 0.5, 'exclude': ('labelled',)},
        'unlabelled': {**train, 'corpus': unlabelled},
        'dev': {'corpus': speech, 'splits': ('dev',), **held_out},
        'test': {'corpus': speech, 'splits': ('test',), **held_out},
    }
    return chosen | {name: {**spec, **held_out} for name, spec in extra.items()}


def pretrain(steps: int) -> dict:
    """BEST-RQ on all training audio."""
    return {
        'kind': 'pretrain',
        'steps': steps,
        'objectives': {
            # Short spans and few codes: 400 ms and 8192 codes teach nothing within minutes.
            'best_rq': {
                'objective': 'best_rq',
                'stream': 'unlabelled',
                'codebook_size': 256,
                'num_codebooks': 4,
                'mask_span_ms': 120.0,
                'mask_start_probability': 0.03,
                # A healthy run leaves chance behind at step 140.
                'collapse_after_steps': 1500,
            }
        },
        'streams': {
            'unlabelled': {
                'sources': {'unlabelled': {'selection': 'unlabelled'}},
                'batch_seconds': BATCH_SECONDS,
                'num_buckets': 4,
                'max_seconds': MAX_SECONDS,
            }
        },
        'optimizer': {'groups': {'all': group(2e-3, steps)}},
    }


def finetune(steps: int, sources: dict, init_from: str = '') -> dict:
    """CTC on characters, with SpecAugment."""
    return {
        'kind': 'finetune',
        'steps': steps,
        'init_from': init_from,
        'objectives': {'ctc': {'objective': 'ctc', 'stream': 'labelled'}},
        'streams': {
            'labelled': {
                'sources': sources,
                'batch_seconds': BATCH_SECONDS,
                'num_buckets': 4,
                'max_seconds': MAX_SECONDS,
            }
        },
        'spec_augment': {'freq_width': 20, 'time_masks': 5},
        'optimizer': {'groups': {'all': group(1.5e-3, steps)}, 'ema_decay': 0.998},
        'eval_every': 500,
        'dev': 'dev',
    }


def group(peak: float, steps: int) -> dict:
    """AdamW, warm-up over a tenth of the steps, then down to zero: the runs are short."""
    return {'peak': peak, 'warmup': steps // 10, 'schedule': 'cosine', 'weight_decay': 0.01}
