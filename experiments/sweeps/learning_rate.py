"""Peak learning rates of the quickstart: pre-training against fine-tuning.

    bigssl sweep --config experiments/quickstart.py --sweep experiments/sweeps/learning_rate.py \\
        --workdir runs/learning_rate

Six runs of about half an hour each on two CPU cores.  For a first look, shorter:

    ... --config.stages.pretrain.steps=500
"""

from bigssl_jax.sweeps import product, sweep, zip_

PEAK = 'stages.{}.optimizer.groups.all.peak'


def get_sweep() -> list[dict]:
    """Teacher and student share a peak; the supervised baseline keeps its own."""
    finetune = [7.5e-4, 1.5e-3, 3e-3]
    return product(
        sweep(PEAK.format('pretrain'), [1e-3, 2e-3]),
        zip_(sweep(PEAK.format('teacher'), finetune), sweep(PEAK.format('student'), finetune)),
    )
