"""BigSSL G: 7.8 billion parameters (36 x 3072, 16 heads), as supervised baseline, P, PS or NST.

    bigssl plan --config experiments/bigssl_g.py --topology v5e-256
    bigssl run --config experiments/bigssl_g.py:variant=ps --workdir /mnt/bucket/g-ps \\
        --config.corpora.unlabelled.manifest=... --config.corpora.labelled.manifest=...

Plan (docs/plans.md, `bigssl plan`; the compiler's figures, nothing was run): pre-training, 2,048
x 30 s a step, on v5e-256 (data 16 x fsdp 16) peaks at 9.1 of 15.75 GiB a chip; 73.6 PFLOP a step,
at least 1.95 s, at most 75 % MFU; a million hours take at least 8,100 chip-hours.  Fine-tuning with
RNN-T, 256 x 30 s a step, peaks at 8.6 GiB and takes about 0.6 s, the time of its links. It fits
v5p-128, v4-512 and v6e-256 with far more room.

Known of the paper's setting: "8 billion" [paper]. Recalled: layers, width and heads, 400 ms
spans, linear targets, peak rate 2e-3, 25k warm-up, clipping at 20, no EMA in pre-training,
Adafactor. Unknown: convolution norm, relative attention (here: none), batch, steps, word-pieces,
mesh, dropout, hardware. bigssl.py says where each setting comes from, and what is not as in the
paper.
"""

import pathlib

import ml_collections

from bigssl_jax import config as config_lib


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """The config; `argument`: variant=supervised|p|ps|nst, objective=wav2vec2|best_rq,
    decoder=rnnt|ctc."""
    shared = pathlib.Path(__file__).with_name('bigssl.py')
    return config_lib.load(f'{shared}:size=g' + (f',{argument}' if argument else ''))
