"""Supervised training of encoder and transcript head, from scratch or from a pre-trained encoder."""

from typing import Any

from bigssl_jax.stages.context import Context
from bigssl_jax.stages.training_stage import run_training


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fine-tunes; returns (outputs, results) for done.json."""
    return run_training(context)
