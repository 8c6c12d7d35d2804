"""Learning-rate schedules, as plain functions of the number of finished updates.

Rates are computed on the host and enter the train step as an argument: stages that differ only in
their rates share one compiled program.
"""

import dataclasses
import math

from bigssl_jax.config import choose

SHAPES = ('inverse_sqrt', 'linear', 'cosine', 'constant')


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A warm-up to `peak` over `warmup` updates, then a decay of the given `shape`.

    Attributes:
      peak: highest rate, reached at update `warmup`.
      warmup: updates of linear warm-up.
      shape: 'inverse_sqrt' is `peak * min(s/w, sqrt(w/s))` (METHODS 1.3: the peak-parameterised
        form of praxis `LinearRampupSqrtDecay`); 'linear' and 'cosine' fall to zero at
        `total_steps`; 'constant' stays.
      total_steps: updates of the stage.
      start: updates before this one have rate zero (frozen warm-up of a parameter group).
    """

    peak: float
    warmup: int
    shape: str
    total_steps: int
    start: int = 0

    def __post_init__(self) -> None:
        choose('optimizer.groups.*.schedule', self.shape, SHAPES)

    def __call__(self, step: int) -> float:
        """The rate of the update that makes `step` + 1 finished updates of `step`."""
        position = step + 1 - self.start
        if position <= 0:
            return 0.0
        warmup = max(self.warmup, 1)
        if position <= warmup:
            return self.peak * position / warmup
        if self.shape == 'constant':
            return self.peak
        if self.shape == 'inverse_sqrt':
            return self.peak * math.sqrt(warmup / position)
        span = max(self.total_steps - self.start - warmup, 1)
        progress = min((position - warmup) / span, 1.0)
        if self.shape == 'linear':
            return self.peak * (1.0 - progress)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
