"""Everything that a step changes, in one pytree."""

from typing import Any

import flax.struct
import jax

from bigssl_jax.training.guard import Guard, new_guard


class TrainState(flax.struct.PyTreeNode):
    """The part of training that decides the future, besides the config and the corpus.

    Attributes:
      step: int32 scalar, finished updates, including skipped ones.
      skipped: int32 scalar, updates skipped because loss or gradient was not finite.
      params: {'encoder': ..., 'heads': {objective: ...}}, float32 masters.
      optimizer: state of the optax transformation.
      ema: exponential moving average of `params`, or {} when the stage keeps none.
      constants: arrays that never change: feature statistics, BEST-RQ projection and codebooks.
      guard: what divergence is told by.
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    optimizer: Any
    ema: Any
    constants: Any
    guard: Guard = flax.struct.field(default_factory=new_guard)

    def evaluated_params(self) -> Any:
        """The parameters to evaluate and to export: the average where there is one."""
        return self.ema or self.params
