"""Self-supervised training of the encoder on audio without transcripts."""

from typing import Any

from bigssl_jax.stages.context import Context
from bigssl_jax.stages.training_stage import run_training


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pre-trains; returns (outputs, results) for done.json."""
    return run_training(context)
