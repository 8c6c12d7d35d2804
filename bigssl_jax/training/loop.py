"""The one training loop.

    restore or initialise  ->  for step k: batch k of every stream, one train step
                           ->  now and then: log, evaluate, save
    on SIGTERM or SIGINT   ->  finish the step, save, raise Stopped
    on divergence          ->  back to a calm checkpoint, past the batches since, at lower rates

Step k uses batch k + p of every stream, where p batches were passed over after divergences; p is
saved with the state, so "continue" means "start at the restored step".  With several
processes all run this loop, each on its slice of every batch; they agree on stops and on saves that
are due by the clock (`parallel/agreement.py`), and process 0 alone logs.

The state of a stage is initialised, in this order of precedence:
  1. from the stage's own newest checkpoint, when there is one: an interrupted run continues;
  2. otherwise from `make_state()`, which the stage builds: fresh parameters, of which some may
     have been replaced by those of an earlier stage (`initialise.py` reports what was matched).
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bigssl_jax.config import UserError
from bigssl_jax.parallel import batch_sharding, replicated, use_mesh
from bigssl_jax.parallel.agreement import Agreement
from bigssl_jax.parallel.distributed import (
    barrier,
    batch_slice,
    is_primary,
    process_index,
    say,
)
from bigssl_jax.parallel.watchdog import Watchdog
from bigssl_jax.training.checkpoint import Checkpointer
from bigssl_jax.training.guard import GuardSettings, divergence, is_calm
from bigssl_jax.training.metrics import MetricLog, Progress, host_memory
from bigssl_jax.training.schedules import Schedule
from bigssl_jax.training.signals import Stopped, StopRequest
from bigssl_jax.training.state import TrainState

AUDIO = 'audio_seconds'
HOST_KEYS = ('utterances', 'sources')  # for the host's book-keeping; not sent to the devices


class TrainingFailed(UserError):
    """Training cannot go on: it diverged again and again, or an objective has collapsed."""


class BatchSource(Protocol):
    """What the loop needs of a stream: batches from step `start` on, in order."""

    def batches(self, start: int) -> contextlib.AbstractContextManager[Iterator[dict]]: ...


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """When the loop stops, logs, evaluates and saves (in steps, where the name says no minutes)."""

    steps: int
    log_every: int = 50
    eval_every: int = 0
    save_every: int = 500
    save_minutes: float = 10.0
    watchdog_minutes: float = 30.0
    # Save after every evaluation, so that the best states can be kept.
    save_evaluated: bool = False
    guard: GuardSettings = GuardSettings()


@dataclasses.dataclass(frozen=True)
class Cursor:
    """What decides the next step besides the state; saved with it.

    Attributes:
      passed_over: batches left out after divergences.
      rate_factor: of all learning rates.
      rollbacks: how often the run went back.
    """

    passed_over: int = 0
    rate_factor: float = 1.0
    rollbacks: int = 0


@dataclasses.dataclass(frozen=True)
class Diverged:
    """Why, and after which step, training must go back."""

    step: int
    reason: str
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with.

    Attributes:
      name: the stage, for the progress line.
      directory: the stage's directory.
      mesh: devices.
      train_step: the jitted step of `make_train_step`, state donated.
      streams: term name -> stream.
      schedules: group name -> schedule.
      key: the stage's random key.
      summarise: accumulated totals of all terms -> readable metrics.
      health: (metrics, step) -> advice when an objective has collapsed, else None.
      evaluate: state -> metrics on the dev set, or None.
      later_audio_seconds: audio that later stages will train on, for the time left.
    """

    name: str
    directory: pathlib.Path
    mesh: jax.sharding.Mesh
    train_step: Callable[..., tuple[TrainState, dict[str, Any]]]
    streams: Mapping[str, BatchSource]
    schedules: Mapping[str, Schedule]
    key: jax.Array
    summarise: Callable[[Mapping[str, Any]], dict[str, float]]
    health: Callable[[Mapping[str, float], int], str | None]
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    later_audio_seconds: float = 0.0


def train(
    run: Run,
    settings: LoopSettings,
    make_state: Callable[[], TrainState],
    abstract_state: Any,
    checkpointer: Checkpointer,
    stop: StopRequest,
    tensorboard: bool = True,
) -> TrainState:
    """Trains from the newest checkpoint (or `make_state()`) to `settings.steps`.

    Returns:
      The final state, which is also on disk as checkpoint `settings.steps`.

    Raises:
      Stopped: a signal asked for a stop; the state has been saved.
      TrainingFailed: it diverged too often, or an objective's health alarm.
    """
    found = checkpointer.restore_newest(abstract_state)
    start, state, cursor = found or (0, make_state(), {})
    while start < settings.steps:
        position = Cursor(**cursor)
        ended = _train(run, settings, start, state, position, checkpointer, stop, tensorboard)
        if not isinstance(ended, Diverged):
            return ended
        del state  # its memory is needed for the one to go back to
        back_to, restored = _calm(checkpointer, abstract_state, settings, ended, position)
        state = make_state() if restored is None else restored
        start, cursor = back_to, _pass_over(run, settings, ended, position, back_to)
    return state


def _train(
    run: Run,
    settings: LoopSettings,
    start: int,
    state: TrainState,
    cursor: Cursor,
    checkpointer: Checkpointer,
    stop: StopRequest,
    tensorboard: bool,
) -> TrainState | Diverged:
    """Trains from `state`, after `start` steps, to the end or to a divergence."""
    window, agreement = Window(run, settings, start), Agreement()
    saved_at = time.monotonic()
    stacks = run.directory / f'stacks-process{process_index()}.txt'
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(run.name, settings.watchdog_minutes, stacks))
        stack.enter_context(use_mesh(run.mesh))
        first = start + cursor.passed_over
        sources = {n: stack.enter_context(s.batches(first)) for n, s in run.streams.items()}
        # After the streams: they keep TensorFlow off the accelerators, which TensorBoard would not.
        log = MetricLog(run.directory, start, tensorboard) if is_primary() else None
        if log:
            stack.callback(log.close)
        for step in range(start, settings.steps):
            waited = time.monotonic()
            batches = {name: next(source) for name, source in sources.items()}
            window.wait_seconds += time.monotonic() - waited
            rates = {
                name: np.float32(cursor.rate_factor * schedule(step))
                for name, schedule in run.schedules.items()
            }
            state, report = run.train_step(state, to_devices(batches, run.mesh), rates, run.key)
            window.add(report, batches)
            done = step + 1
            last = done == settings.steps
            metrics: dict[str, float] = {}
            if done % settings.log_every == 0 or last:
                metrics = window.close(done, state, rates)
                reason = divergence(state.guard, settings.guard)
                if reason:
                    return Diverged(done, reason, metrics)
                advice = run.health(metrics, done) if 'loss' in metrics else None
                if advice:
                    if log:
                        log.write(done, metrics)
                    raise TrainingFailed(f'{run.name}, step {done}: {advice}')
            scores: dict[str, float] = {}
            if settings.eval_every and (done % settings.eval_every == 0 or last) and run.evaluate:
                scores = run.evaluate(state)
            if (metrics or scores) and log:
                log.write(done, {**metrics, **scores})
            due = is_primary() and time.monotonic() - saved_at > 60 * settings.save_minutes
            if due or done % settings.save_every == 0:
                saved_at = time.monotonic()
            stop_now, save_now = agreement.exchange((stop.requested, due))
            save_now |= done % settings.save_every == 0 or last or stop_now
            if save_now or (scores and settings.save_evaluated):
                with window.saving():
                    checkpointer.save(done, state, dataclasses.asdict(cursor), scores)
            if stop_now and not last:
                checkpointer.wait()
                barrier(f'{run.name} stopped')
                raise Stopped(f'{run.name} stopped after step {done}; the same command continues')
            watchdog.feed()
    checkpointer.wait()
    return state


def _calm(
    checkpointer: Checkpointer,
    abstract_state: Any,
    settings: LoopSettings,
    ended: Diverged,
    cursor: Cursor,
) -> tuple[int, TrainState | None]:
    """The newest checkpoint to go back to, (0, None) where there is none; later ones are deleted.

    Raises:
      TrainingFailed: the run has gone back often enough.
    """
    if cursor.rollbacks >= settings.guard.max_rollbacks:
        raise TrainingFailed(
            f'step {ended.step}: {ended.reason}; the run went back {cursor.rollbacks} times before'
            ' (rollbacks.jsonl; allowed: divergence.max_rollbacks): lower the peak learning rate or'
            ' optimizer.clip_norm'
        )
    checkpointer.wait()
    for step in checkpointer.steps():
        state, _ = checkpointer.restore(step, abstract_state)
        if is_calm(state.guard):
            checkpointer.drop_after(step)
            return step, state
    checkpointer.drop_after(0)
    return 0, None


def _pass_over(
    run: Run, settings: LoopSettings, ended: Diverged, cursor: Cursor, back_to: int
) -> dict[str, Any]:
    """The cursor past the batches since step `back_to`; notes it in rollbacks.jsonl."""
    new = dataclasses.asdict(
        Cursor(
            passed_over=cursor.passed_over + ended.step - back_to,
            rate_factor=cursor.rate_factor * settings.guard.rate_factor,
            rollbacks=cursor.rollbacks + 1,
        )
    )
    if is_primary():
        line = {'reason': ended.reason, 'diverged': ended.step, 'back_to': back_to}
        with (run.directory / 'rollbacks.jsonl').open('a') as file:
            file.write(json.dumps({**line, **new, 'metrics': dict(ended.metrics)}) + '\n')
    say(
        f'{run.name} diverged at step {ended.step}: {ended.reason}; back to step {back_to}, past'
        f' {ended.step - back_to} batches, with rates times {new["rate_factor"]:g}'
    )
    return new


def to_devices(batches: Mapping[str, dict], mesh: jax.sharding.Mesh) -> dict[str, dict]:
    """Puts this host's rows of every batch on its devices, as global arrays."""
    sharding = batch_sharding(mesh)
    return {
        name: {
            key: jax.make_array_from_process_local_data(sharding, value)
            for key, value in batch.items()
            if key not in HOST_KEYS
        }
        for name, batch in batches.items()
    }


class Window:
    """Totals since the last log line, summed on the devices so that no step waits for the host.

    Steps that were skipped count for nothing: one NaN would hide what the other steps did.
    """

    def __init__(self, run: Run, settings: LoopSettings, start: int):
        self._run, self._kind = run, AUDIO
        self._progress = Progress(run.name, settings.steps, run.later_audio_seconds)
        # Every process holds a slice of the rows; their length in all is told from process 0's.
        self._slices = batch_slice(run.mesh)[1]
        self._add = jax.jit(_add_finite, out_shardings=replicated(run.mesh))
        self._reset(start)

    def _reset(self, step: int) -> None:
        self._first = step
        self._totals: dict[str, Any] | None = None
        self._work = self._padded = 0.0
        self._examples = 0
        self._started, self.wait_seconds, self._save_seconds = time.monotonic(), 0.0, 0.0

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Counts the time inside as time for which a checkpoint held up training."""
        began = time.monotonic()
        yield
        self._save_seconds += time.monotonic() - began

    def add(self, report: Mapping[str, Any], batches: Mapping[str, dict]) -> None:
        """Adds one step's report; `batches` are this host's, for the speed."""
        self._totals = self._add(self._totals, report)
        for batch in batches.values():
            self._kind, done, padded = work_of(batch)
            self._work += self._slices * done
            self._padded += self._slices * padded
            # Filler rows count for nothing.
            counts = batch['sample_counts' if self._kind == AUDIO else 'label_counts']
            self._examples += self._slices * int((counts > 0).sum())

    def close(self, step: int, state: TrainState, rates: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of the window that ends with `step`; shows the progress line."""
        assert self._totals is not None
        totals = jax.device_get(self._totals)
        seconds = time.monotonic() - self._started
        steps = step - self._first
        finite = int(totals['finite'])
        metrics = self._run.summarise(totals['totals']) if finite else {}
        metrics |= {f'rate/{name}': float(rate) for name, rate in rates.items()}
        metrics |= {
            'grad_norm': float(totals['grad_norm']) / max(finite, 1),
            'skipped': int(state.skipped),
            'step_seconds': seconds / steps,
            'input_wait_seconds': self.wait_seconds / steps,
            'save_seconds': self._save_seconds,
            'examples_per_second': self._examples / seconds,
            f'{self._kind}_per_second': self._work / seconds,
            'padding_fraction': 1.0 - self._work / max(self._padded, 1e-9),
            'host_memory_mb': host_memory(),
        }
        if self._kind == AUDIO:
            metrics['rtfx_per_device'] = self._work / seconds / self._run.mesh.size
        loss = metrics.get('loss', math.nan)
        self._progress.show(step, loss, self._work / seconds, self._work / steps, self._kind)
        self._reset(step)
        return metrics


def work_of(batch: Mapping[str, Any]) -> tuple[str, float, float]:
    """(what is counted, how much of it a batch holds, how much padded): audio, or text's tokens."""
    if 'audio' in batch:
        return AUDIO, float(batch['sample_counts'].sum()) / 16000, batch['audio'].size / 16000
    return 'tokens', float(batch['label_counts'].sum()), float(batch['labels'].size)


def _add_finite(total: Any, report: dict[str, Any]) -> dict[str, Any]:
    """`total` (None: nothing yet) plus a step's report, or plus zeros if it was not finite."""
    finite = report['finite']
    report = {**report, 'finite': jnp.int32(1)}
    kept = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), report)
    return kept if total is None else jax.tree.map(jnp.add, total, kept)
