"""Metrics: one JSON object per log line in `metrics.jsonl`, TensorBoard, and a progress line."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from bigssl_jax.parallel.distributed import is_primary
from bigssl_jax.training.disk import writing


def truncate_after(path: pathlib.Path, step: int) -> None:
    """Drops log lines later than `step`: they belong to work that a resumed run does again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)['step'] <= step:
                kept.append(line + '\n')
        except ValueError:
            break  # a line cut short by a kill
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(kept))
    os.replace(temporary, path)


def host_memory() -> float:
    """Megabytes that this process holds in memory now (Linux: /proc/self/statm)."""
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


class MetricLog:
    """Writes a stage's metrics to `metrics.jsonl` and, unless switched off, to TensorBoard.

    Args:
      directory: the stage's directory.
      start_step: step from which training continues; later lines are dropped.
      tensorboard: whether to write event files under `tensorboard/`.
    """

    def __init__(self, directory: pathlib.Path, start_step: int, tensorboard: bool):
        self._path = directory / 'metrics.jsonl'
        with writing('the log', self._path):
            truncate_after(self._path, start_step)
            self._file = self._path.open('a')
        self._writer = _tensorboard_writer(directory / 'tensorboard') if tensorboard else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line; scalars also go to TensorBoard."""
        with writing('the log', self._path):
            self._file.write(json.dumps({'step': step, **values}) + '\n')
            self._file.flush()
        if self._writer is not None:
            scalars = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self._writer.write_scalars(step, scalars)

    def close(self) -> None:
        """Flushes everything to disk."""
        with writing('the log', self._path):
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _tensorboard_writer(directory: pathlib.Path) -> Any:
    # clu's writer imports TensorFlow, which training must run without when it writes no events.
    from clu import metric_writers

    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(directory)))


class Progress:
    """A progress line: step, loss, seconds of audio per second, time left.

    On a terminal the line is redrawn; in a log file it is printed at most every `interval` seconds.
    Of several processes only process 0 shows it.

    Args:
      name: the stage.
      total_steps: last step of the stage.
      later_audio_seconds: audio still to be trained on in later stages, for the whole run's time.
      unit: what is counted.
      interval: least seconds between two lines in a log file.
    """

    def __init__(
        self,
        name: str,
        total_steps: int,
        later_audio_seconds: float = 0.0,
        unit: str = 'step',
        interval: float = 10.0,
    ):
        self._name, self._total, self._later = name, total_steps, later_audio_seconds
        self._unit, self._interval, self._shown = unit, interval, -1e9
        self._terminal = sys.stderr.isatty()

    def show(
        self,
        step: int,
        loss: float | None,
        audio_per_second: float,
        batch_seconds: float,
        kind: str = 'audio_seconds',
    ) -> None:
        """Draws the line.

        Args:
          step: steps done.
          loss: of the last window; None where there is none.
          audio_per_second: seconds of audio worked on in a second.
          batch_seconds: seconds of audio in a step, for the time left.
          kind: 'audio_seconds', or 'tokens' when both are of those.
        """
        seconds_left = (self._total - step) * batch_seconds / max(audio_per_second, 1e-9)
        unit = 's audio' if kind == 'audio_seconds' else kind
        text = (
            f'{self._name}: {self._unit} {step}/{self._total}'
            + ('' if loss is None else f'  loss {loss:.3f}')
            + f'  {audio_per_second:.0f} {unit}/s  left {clock(seconds_left)}'
        )
        if self._later and kind == 'audio_seconds':
            text += (
                f' (whole run {clock(seconds_left + self._later / max(audio_per_second, 1e-9))})'
            )
        self.draw(text, step >= self._total)

    def draw(self, text: str, last: bool) -> None:
        """Shows `text` as the line, when one is due; `last` always is."""
        now = time.monotonic()
        if not is_primary():
            return
        if not self._terminal and now - self._shown < self._interval and not last:
            return
        self._shown = now
        end = '\n' if last or not self._terminal else ''
        print(f'\r{text}\x1b[K' if self._terminal else text, end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the line off a terminal, before something else is printed there."""
        if self._terminal and is_primary():
            print('\r\x1b[K', end='', file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02d}:{second:02d}' if hours else f'{minute}:{second:02d}'
