"""What any process asks for, known to all processes at the same step.

A signal reaches one process, a clock runs differently in each; but all must save, or stop, after
the same step, or the collectives of one wait for ever for those of another.  So every step each
process puts its wishes into a tiny maximum over the devices, and reads the result of the step
before.  That one is complete when the devices are, so no step waits for it: the host stays at most
one step ahead, and a wish is granted one step later, everywhere.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """Wishes of all processes, one step late; with a single process, its own at once."""

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        if jax.process_count() > 1:
            # Not the order of the training mesh: all devices of a process side by side.
            devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
            grid = np.asarray(devices).reshape(jax.process_count(), -1)
            mesh = Mesh(grid, ('process', 'device'))
            self._rows = NamedSharding(mesh, PartitionSpec('process'))
            self._maximum = jax.jit(
                lambda wishes: wishes.max(axis=0),
                out_shardings=NamedSharding(mesh, PartitionSpec()),
            )

    def exchange(self, wishes: Sequence[bool]) -> list[bool]:
        """Gives this step's wishes; returns which of them any process had in the step before.

        Every process must call it once a step, with the same number of wishes.
        """
        if jax.process_count() == 1:
            return list(wishes)
        mine = np.asarray([wishes], np.int32)
        granted = self._pending
        self._pending = self._maximum(jax.make_array_from_process_local_data(self._rows, mine))
        if granted is None:
            return [False] * len(wishes)
        return [bool(wish) for wish in np.asarray(granted)]
