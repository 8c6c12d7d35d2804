"""Checkpoints: everything that decides the future, saved by Orbax.

One checkpoint holds the TrainState (parameters, optimizer, EMA, step, constants such as the BEST-RQ
projection and codebooks) and a small JSON of identities: the config's hash, the fingerprints of the
streams, the tokenizer's hash.  Random keys follow from the seed and the step, and so does the order
of the data, so neither has state to save.
"""

import contextlib
import hashlib
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bigssl_jax.config import UserError


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


def tree_hash(tree: Any) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a tree's arrays; equal bits, equal hash."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {array.shape} {array.dtype}'.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


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
