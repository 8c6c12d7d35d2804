"""BigSSL XL: 0.58 billion parameters (24 x 1024, 8 heads), as supervised baseline, P, PS or NST.

    bigssl plan --config experiments/bigssl_xl.py --topology v5e-64
    bigssl run --config experiments/bigssl_xl.py:variant=ps --workdir /mnt/bucket/xl-ps \\
        --config.corpora.unlabelled.manifest=... --config.corpora.labelled.manifest=...

Plan (docs/plans.md, `bigssl plan`; the compiler's figures, nothing was run): pre-training, 1,024
x 30 s a step, on v5e-64 (data 4 x fsdp 16) peaks at 2.6 of 15.75 GiB a chip; 2.85 PFLOP a step,
at least 0.30 s, at most 75 % MFU; a million hours take at least 630 chip-hours.
Fine-tuning with RNN-T, 256 x 30 s a step, peaks at 1.4 GiB.

Little of the paper's setting stands in its text. Recalled: 0.6B, layers, width and heads,
batches of 2,048 utterances, 400k steps, Adam, peak rate 2e-3, 25k warm-up, clipping at 20.
Unknown: relative attention (here: none), dropout, the longest utterance. bigssl.py says where
each setting comes from, and what is not as in the paper.
"""

import pathlib

import ml_collections

from bigssl_jax import config as config_lib


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """The config; `argument`: variant=supervised|p|ps|nst, objective=wav2vec2|best_rq,
    decoder=rnnt|ctc."""
    shared = pathlib.Path(__file__).with_name('bigssl.py')
    return config_lib.load(f'{shared}:size=xl' + (f',{argument}' if argument else ''))
