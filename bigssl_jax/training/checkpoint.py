"""Checkpoints: everything that decides the future, saved by Orbax.

One checkpoint holds the TrainState (parameters, optimizer, EMA, step, constants such as the BEST-RQ
projection and codebooks) and a small JSON of identities: the config's hash, the fingerprints of the
streams, the tokenizer's hash.  Random keys follow from the seed and the step, and so does the order
of the data, so neither has state to save.

Arrays go from the devices that hold them to disk and back: no process ever holds a whole state.
What was saved from one mesh, by any number of processes, is restored onto another bit for bit.
`save_arrays` and `restore_arrays` do the same for a finished model, or a part of it.
"""

import contextlib
import logging
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from bigssl_jax.config import UserError

# A device reads whole chunks: small ones let another mesh read little more than its own pieces.
CHUNK_BYTES = 16 * 2**20


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class Checkpointer:
    """The checkpoints of one training stage.

    Args:
      directory: where they live; created when missing.
      keep: newest checkpoints to keep.
      identity: values that must be equal when training continues, e.g. {'config': hash}.

    Raises:
      CheckpointError: the directory cannot be written.
    """

    def __init__(self, directory: pathlib.Path, keep: int, identity: Mapping[str, str]):
        self.directory = pathlib.Path(directory).absolute()
        self._identity = dict(identity)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f'cannot write checkpoints to {directory}: {error}') from error
        with quiet_orbax():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, enable_async_checkpointing=True
                ),
            )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts saving; returns once the arrays are copied.  Saving a step twice is a no-op."""
        if step in self._manager.all_steps():
            return
        with quiet_orbax():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), identity=ocp.args.JsonSave(self._identity)
                ),
            )

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of `step`, laid out as `abstract_state` (shapes, dtypes, shardings) says.

        Raises:
          CheckpointError: it belongs to another config, corpus or tokenizer.
        """
        with quiet_orbax():
            identity = self._manager.restore(
                step, args=ocp.args.Composite(identity=ocp.args.JsonRestore())
            )['identity']
            for name, value in self._identity.items():
                if identity.get(name) != value:
                    raise CheckpointError(
                        f'{self.directory}/{step} was made with another {name}'
                        f' ({identity.get(name)}, now {value}); use another workdir,'
                        ' or restore what changed'
                    )
            return self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            )['state']

    def wait(self) -> None:
        """Blocks until every started save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes pending saves and releases threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_arrays(directory: pathlib.Path, tree: Any) -> None:
    """Saves nested dicts of arrays, and returns when they are on disk.

    In several processes all of them call this together, and each writes the pieces that its
    devices hold; numpy arrays are written by the first.  `directory` appears when it is complete.
    """
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, tree, save_args=arguments)


def stored_shapes(directory: pathlib.Path) -> Any:
    """What `save_arrays` saved, a `jax.ShapeDtypeStruct` for each array; reads no array.

    Raises:
      CheckpointError: it cannot be read.
    """
    with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(directory).item_metadata
    if metadata is None:
        raise CheckpointError(f'{directory} is damaged: Orbax cannot read what arrays it holds')
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)


def restore_arrays(directory: pathlib.Path, wanted: Any) -> Any:
    """Reads what `save_arrays` saved, or a part of it; waits for no other process.

    Args:
      directory: the saved arrays.
      wanted: nested dicts of `jax.ShapeDtypeStruct`, branches left out as you like: what is not
        named is not read.  A leaf with a sharding arrives laid out so, on a mesh that need not be
        the one it was saved from, each device reading its own piece; one without as numpy.

    Raises:
      CheckpointError: an array cannot be read, or its shape differs from the saved one.
    """
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    part = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    # What is on its way takes host memory beside the result: little more than the largest array.
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted))
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=alone, restore_concurrent_gb=4 + math.ceil(largest / 1e9)
    )
    with quiet_orbax(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        try:
            return checkpointer.restore(directory, args=part)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f'{directory} is damaged: {reason}') from error


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax, which logs dozens of lines per checkpoint; warnings still pass."""
    loggers = [logging.getLogger('absl'), logging.getLogger('orbax')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
