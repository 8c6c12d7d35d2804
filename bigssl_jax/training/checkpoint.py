"""Checkpoints: everything that decides the future, saved by Orbax.

One checkpoint holds the TrainState (parameters, optimizer, EMA, step, constants such as the BEST-RQ
projection and codebooks), the cursor (how many batches were passed over, by what factor the rates
are lowered), and a small JSON of identities: the config's hash, the fingerprints of the streams,
the tree of arrays.  Random keys follow from the seed and the step, and so does the order of the
data, so neither has state to save.

A checkpoint records the fingerprint of its state.  One that cannot be read, or reads as other bits,
is damaged: it is set aside as <step>.damaged, and the one before it is used.

Arrays go from the devices that hold them to disk and back: no process ever holds a whole state.
What was saved from one mesh, by any number of processes, is restored onto another bit for bit.
`save_arrays` and `restore_arrays` do the same for a finished model, or a part of it.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from bigssl_jax.config import UserError
from bigssl_jax.parallel.distributed import barrier, from_primary, gather, is_primary, say
from bigssl_jax.parallel.fingerprint import fingerprint
from bigssl_jax.training.disk import writing

# A device reads whole chunks: small ones let another mesh read little more than its own pieces.
CHUNK_BYTES = 16 * 2**20
# Beside the identity in its JSON: the cursor, and the fingerprint of the state.
RECORD = 'saved'
# Of an identity: without the same arrays nothing can go on.
TREE = 'tree of arrays'


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class Damaged(CheckpointError):
    """A checkpoint cannot be read, or holds other bits than were saved."""


def tree_hash(abstract_state: Any) -> str:
    """A hash of the names, shapes and dtypes of a state's arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_state)
    text = '\n'.join(
        f'{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}' for path, leaf in leaves
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay on disk.

    Attributes:
      newest: so many of the newest.
      every: those of steps that this divides, for ever; 0: none.
      best: so many with the lowest `metric`; 0: none.
      metric: of the dev set.
    """

    newest: int
    every: int = 0
    best: int = 0
    metric: str = 'dev_wer'

    def policy(self) -> managers.PreservationPolicy:
        """The same, as Orbax wants it."""
        policies: list[managers.PreservationPolicy] = [managers.LatestN(self.newest)]
        if self.every:
            policies.append(managers.EveryNSteps(self.every))
        if self.best:
            policies.append(
                managers.BestN(
                    n=self.best,
                    get_metric_fn=lambda metrics: metrics[self.metric],
                    reverse=True,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return managers.AnyPreservationPolicy(policies)


class Checkpointer:
    """The checkpoints of one training stage.

    Args:
      directory: where they live; created when missing.
      keep: which of them stay.
      identity: values that must be equal when training continues, e.g. {'config': hash}.
      accepted: other identities whose checkpoints may be continued.

    Raises:
      CheckpointError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        keep: Keep,
        identity: Mapping[str, str],
        accepted: Sequence[Mapping[str, str]] = (),
    ):
        self.directory = pathlib.Path(directory).absolute()
        self._identity, self._metric = dict(identity), keep.metric
        self._accepted = [dict(other) for other in accepted]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f'cannot write checkpoints to {directory}: {error}') from error
        if not os.access(self.directory, os.W_OK):
            raise CheckpointError(f'cannot write checkpoints to {directory}: it is read-only')
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.policy(),
            best_fn=lambda metrics: metrics[keep.metric],
            best_mode='min',
            enable_async_checkpointing=True,
            # What a kill left half saved; another step's would otherwise stay for ever.
            cleanup_tmp_directories=True,
        )
        with quiet_orbax(), self._writing():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, the newest first; the same in every process."""
        return from_primary('checkpoints', sorted(self._manager.all_steps(), reverse=True))

    def best_step(self) -> int | None:
        """The step with the lowest dev metric among the checkpoints that are there, or None."""
        return from_primary('best checkpoint', self._manager.best_step())

    def save(
        self,
        step: int,
        state: Any,
        cursor: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving; returns once the arrays are copied.  Saving a step twice is a no-op.

        Args:
          step: of the state.
          state: arrays.
          cursor: what `restore` gives back beside them; JSON.
          metrics: of the dev set, where this state was scored on it.

        Raises:
          CheckpointError: the disk is full or cannot be written; often of the save before this one,
            which went on beside the training.
        """
        if step in self._manager.all_steps():
            return
        scored = {k: v for k, v in (metrics or {}).items() if k == self._metric}
        record = {**self._identity, RECORD: {'cursor': cursor, 'state': fingerprint(state)}}
        with quiet_orbax(), self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), identity=ocp.args.JsonSave(record)
                ),
                metrics=scored or None,
            )

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """State and cursor of `step`.

        Args:
          step: one of `steps()`.
          abstract_state: the shapes, dtypes and shardings that the state shall have.

        Raises:
          CheckpointError: it belongs to another config, corpus or tokenizer.
          Damaged: it cannot be read, or holds other bits than were saved.
        """
        identity, record = self._identity_of(step)
        accepted = identity in self._accepted
        for name, value in self._identity.items():
            if identity.get(name) != value and not (accepted and name != TREE):
                cure = '' if name == TREE else ', or go on with what is there now (--accept STAGE)'
                raise CheckpointError(
                    f'{self.directory}/{step} was made with another {name} ({identity.get(name)},'
                    f' now {value}); use another workdir, restore what changed{cure}'
                )
        state = self._read(step, 'state', ocp.args.StandardRestore(abstract_state))
        if record.get('state') != fingerprint(state):
            raise Damaged(
                f'{self.directory}/{step} is damaged: it holds other bits than were saved'
            )
        return state, record.get('cursor') or {}

    def accept(self) -> dict[int, dict[str, str]]:
        """Lets training continue from the checkpoints that are there, whatever they were made with.

        Returns:
          The identities, by step, that were not accepted before.
        """
        new = {}
        for step in self.steps():
            try:
                identity, _ = self._identity_of(step)
            except Damaged:
                continue  # told and set aside when it is its turn
            if identity != self._identity and identity not in self._accepted:
                self._accepted.append(identity)
                new[step] = identity
        return new

    def _identity_of(self, step: int) -> tuple[dict[str, str], dict[str, Any]]:
        """What a checkpoint was made with, and its record."""
        found = dict(self._read(step, 'identity', ocp.args.JsonRestore()))
        record = found.pop(RECORD, {})
        return found, record

    def _read(self, step: int, item: str, how: Any) -> Any:
        """One item of a checkpoint; all processes fail together."""
        found, reason = None, ''
        try:
            with quiet_orbax():
                found = self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:  # zarr, JSON, protocol buffers: each library has its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        reasons = [text for text in gather(f'read {item} of {step}', reason) if text]
        if reasons:
            raise Damaged(f'{self.directory}/{step} is damaged: {reasons[0]}')
        return found

    def restore_newest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, cursor) of the newest checkpoint that is whole; None where there is none.

        Damaged ones are told of and set aside.

        Raises:
          CheckpointError: all are damaged, or they belong to another config, corpus or tokenizer.
        """
        steps = self.steps()
        for step in steps:
            try:
                return step, *self.restore(step, abstract_state)
            except Damaged as error:
                say(f'{error}; it is set aside as {step}.damaged, and the one before it is used')
                self._set_aside(step)
        if steps:
            raise CheckpointError(
                f'none of {len(steps)} checkpoints in {self.directory} can be read; copy one back'
                ' from a backup, or delete that folder to train from the beginning'
            )
        return None

    def _set_aside(self, step: int) -> None:
        if is_primary():
            os.replace(self.directory / str(step), self.directory / f'{step}.damaged')
        barrier(f'checkpoint {step} set aside')
        self._manager.reload()

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        self.wait()
        for later in self.steps():
            if later > step:
                self._manager.delete(later)
        barrier(f'checkpoints after {step} dropped')

    def wait(self) -> None:
        """Blocks until every started save is on disk; CheckpointError when it cannot be."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes pending saves and releases threads."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing('checkpoints', self.directory, CheckpointError)


def save_arrays(directory: pathlib.Path, tree: Any) -> None:
    """Saves nested dicts of arrays, and returns when they are on disk.

    In several processes all of them call this together, and each writes the pieces that its
    devices hold; numpy arrays are written by the first.  `directory` appears when it is complete.
    """
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with quiet_orbax(), writing('arrays', directory, CheckpointError):
        with ocp.StandardCheckpointer() as checkpointer:
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


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Its threads log, with their stacks, what is raised here as well."""
    return '/orbax/' not in record.pathname or record.levelno < logging.ERROR


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax, which logs dozens of lines per checkpoint; warnings still pass."""
    loggers = [logging.getLogger('absl'), logging.getLogger('orbax')]
    loggers[0].addFilter(_not_of_orbax)  # to stay: threads go on after the block; twice is once
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
