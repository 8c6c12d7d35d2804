"""Divergence: what a run watches of itself, and when it must go back.

    trouble   steps refused because loss or gradient was not finite, forgotten by 1 % a step:
              m in a row make about m, one in every n steps 100 / n
    average   of the loss of accepted steps, over about the last hundred
    lowest    average so far, from the hundredth accepted step on

These numbers are part of the training state and change inside the step, so a run that was killed
and continued decides as an unbroken one would.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp

MEMORY = 100  # steps
# A loss near zero may triple without harm: so many nats above the lowest are no divergence.
HARMLESS_RISE = 0.5


class Guard(flax.struct.PyTreeNode):
    """What a run watches of itself: float32 scalars, as in the head of this file."""

    trouble: jax.Array
    average: jax.Array
    lowest: jax.Array


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """When a run goes back to a checkpoint; all choices are ours.

    Attributes:
      max_skipped: trouble above which it does.
      max_loss_rise: average loss over the lowest average above which it does; 0: never.
      max_rollbacks: how often, before the run stops.
      rate_factor: of all learning rates, after each time.
    """

    max_skipped: float = 20.0
    max_loss_rise: float = 3.0
    max_rollbacks: int = 3
    rate_factor: float = 0.5

    def __post_init__(self) -> None:
        for name, value, fits, allowed in (
            ('max_skipped', self.max_skipped, self.max_skipped > 0, 'above 0'),
            ('max_loss_rise', self.max_loss_rise, not 0 < self.max_loss_rise <= 1, '0, above 1'),
            ('max_rollbacks', self.max_rollbacks, self.max_rollbacks >= 0, '0 and above'),
            ('rate_factor', self.rate_factor, 0 < self.rate_factor <= 1, 'above 0 to 1'),
        ):
            if not fits:
                raise ValueError(f'divergence.{name} is {value}; allowed: {allowed}')


def new_guard() -> Guard:
    """Before the first step."""
    return Guard(jnp.float32(0), jnp.float32(0), jnp.float32(jnp.inf))


def watch(guard: Guard, accepted: jax.Array, loss: jax.Array, finite: jax.Array) -> Guard:
    """The guard after a step.

    Args:
      guard: before it.
      accepted: int32 scalar, accepted steps before it.
      loss: float32 scalar, the step's loss; anything where not `finite`.
      finite: bool scalar, whether the step is accepted.
    """
    t = accepted.astype(jnp.float32)
    share = jnp.maximum(1.0 / MEMORY, 1.0 / (1.0 + t))
    average = guard.average + share * (loss - guard.average)
    lowest = jnp.where(t >= MEMORY, jnp.minimum(guard.lowest, average), jnp.inf)
    return Guard(
        trouble=guard.trouble * (1.0 - 1.0 / MEMORY) + jnp.where(finite, 0.0, 1.0),
        average=jnp.where(finite, average, guard.average),
        lowest=jnp.where(finite, lowest, guard.lowest),
    )


def divergence(guard: Guard, settings: GuardSettings) -> str | None:
    """Why the run must go back, or None."""
    trouble, average, lowest = float(guard.trouble), float(guard.average), float(guard.lowest)
    if trouble > settings.max_skipped:
        return (
            f'of the last {MEMORY} steps about {trouble:.0f} had a loss or gradient that was not'
            f' finite (allowed: divergence.max_skipped={settings.max_skipped:g})'
        )
    rise = settings.max_loss_rise
    if rise and average > max(rise * lowest, lowest + HARMLESS_RISE):
        return (
            f'the loss has risen to {average:.3f} from {lowest:.3f} (allowed:'
            f' divergence.max_loss_rise={rise:g} times the lowest)'
        )
    return None


def is_calm(guard: Guard) -> bool:
    """Whether a state is one to go back to: no fresh trouble, no loss that is rising."""
    average, lowest = float(guard.average), float(guard.lowest)
    return float(guard.trouble) < 0.5 and (
        math.isinf(lowest) or average <= max(1.1 * lowest, lowest + HARMLESS_RISE / 5)
    )
