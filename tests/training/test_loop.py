"""The loop on a toy problem: it resumes to the same bits, survives NaN, stops when asked.

The toy is a least-squares fit; batch k is a pure function of k, as with a real stream.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.parallel import make_mesh
from bigssl_jax.parallel.fingerprint import fingerprint
from bigssl_jax.training import loop
from bigssl_jax.training.checkpoint import Checkpointer, Keep
from bigssl_jax.training.guard import GuardSettings
from bigssl_jax.training.loop import LoopSettings, Run, TrainingFailed, train
from bigssl_jax.training.optimizers import GROUP_DEFAULTS, make_optimizer, make_schedules
from bigssl_jax.training.signals import Stopped, StopRequest
from bigssl_jax.training.state import TrainState
from bigssl_jax.training.step import StepSettings, Term, make_train_step

GROUPS = {'all': {**GROUP_DEFAULTS, 'peak': 0.3, 'warmup': 2, 'schedule': 'constant'}}
STEPS = 12


class Toy:
    """A stream whose batches `bad` hold NaN; `at` is called before batch k is given out."""

    def __init__(self, bad=(), at=None):
        self.bad, self.at, self.asked = set(bad), at, []

    @contextlib.contextmanager
    def batches(self, start):
        yield map(self._batch, itertools.count(start))

    def _batch(self, k):
        self.asked.append(k)
        if self.at:
            self.at(k)
        x = np.random.default_rng(k).normal(size=(32, 3)).astype(np.float32)
        y = x @ np.float32([1, -2, 3]) + (np.float32(np.nan) if k in self.bad else 0)
        return {
            'x': x, 'y': y, 'audio': np.zeros((32, 160), np.int16),
            'sample_counts': np.full(32, 80, np.int32), 'utterances': np.arange(32),
        }  # fmt: skip


def totals(params, constants, batch, key):
    error = batch['x'] @ params['kernel'] - batch['y']
    # Noise that follows from the step's key: resuming must draw the same.
    error += 0.01 * jax.random.normal(key, error.shape)
    return {'loss': jnp.sum(error**2), 'weight': jnp.float32(error.size)}


def make_state():
    params = {'kernel': jnp.zeros(3)}
    optimizer, _ = make_optimizer(params, GROUPS)
    return TrainState(
        step=jnp.int32(0), skipped=jnp.int32(0), params=params,
        optimizer=optimizer.init(params), ema=jax.tree.map(jnp.copy, params), constants={},
    )  # fmt: skip


def make_run(directory, stream, **given):
    state = jax.eval_shape(make_state)
    optimizer, labels = make_optimizer(state.params, GROUPS)
    step = make_train_step((Term('toy', totals, 1.0),), optimizer, labels, StepSettings(0.0, 0.9))
    fields = dict(
        name='toy',
        directory=directory,
        mesh=make_mesh({'data': 1}, jax.devices()[:1]),
        train_step=jax.jit(step, donate_argnums=0),
        streams={'toy': stream},
        schedules=make_schedules(GROUPS, STEPS),
        key=jax.random.key(5),
        summarise=lambda t: {'loss': float(t['toy']['loss']) / float(t['toy']['weight'])},
        health=lambda metrics, step: None,
    )
    return Run(**{**fields, **given})


SETTINGS = LoopSettings(steps=STEPS, log_every=2, save_every=5)


def go(directory, stream=None, settings=SETTINGS, stop=None, **given):
    directory.mkdir(exist_ok=True)
    checkpointer = Checkpointer(directory / 'checkpoints', Keep(2), {'config': 'toy'})
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state()
    )
    try:
        return train(
            make_run(directory, stream or Toy(), **given), settings, make_state, abstract,
            checkpointer, stop or StopRequest(), tensorboard=False,
        )  # fmt: skip
    finally:
        checkpointer.close()


def saved(directory):
    return sorted(int(p.name) for p in (directory / 'checkpoints').iterdir())


def log(directory):
    return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]


def test_training_fits_and_logs_and_saves_the_last_step(tmp_path):
    state = go(tmp_path / 'a')
    lines = log(tmp_path / 'a')
    assert [line['step'] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]['loss'] < lines[0]['loss']
    assert lines[0]['padding_fraction'] == pytest.approx(0.5)
    assert saved(tmp_path / 'a') == [10, 12]
    assert int(state.step) == STEPS


def test_the_log_says_where_the_time_and_the_memory_go(tmp_path, monkeypatch):
    real = Checkpointer.save

    def slow_save(*given):
        time.sleep(0.2)
        return real(*given)

    monkeypatch.setattr(Checkpointer, 'save', slow_save)
    # Every batch comes late, and a quarter of its rows are fillers.
    half = Toy(at=lambda k: time.sleep(0.02))
    batch_of = half._batch
    half._batch = lambda k: {
        **batch_of(k), 'sample_counts': np.repeat([80, 0], [24, 8]).astype(np.int32)
    }  # fmt: skip
    began = time.monotonic()
    go(tmp_path / 'a', half)
    seconds = time.monotonic() - began
    lines = log(tmp_path / 'a')
    for line in lines:
        assert line['input_wait_seconds'] >= 0.02
        assert line['step_seconds'] >= line['input_wait_seconds']
        steps_a_second = 1 / line['step_seconds']
        assert line['examples_per_second'] == pytest.approx(24 * steps_a_second)
        assert line['audio_seconds_per_second'] == pytest.approx(24 * 80 / 16000 * steps_a_second)
        assert line['rtfx_per_device'] == line['audio_seconds_per_second']  # one device
        assert line['padding_fraction'] == pytest.approx(1 - 24 * 80 / (32 * 160))
        resident = int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * 4096 / 1e6
        assert line['host_memory_mb'] == pytest.approx(resident, rel=0.5)
    # Saved after steps 5 and 10, inside the windows that end with 6 and 12.
    held_up = [line['step'] for line in lines if line['save_seconds'] >= 0.2]
    assert held_up == [6, 12] and sum(line['save_seconds'] for line in lines) < seconds


@pytest.mark.parametrize('broken_at', [3, 7, 11])
def test_a_run_that_broke_off_resumes_at_its_checkpoint_to_the_same_bits(tmp_path, broken_at):
    whole = go(tmp_path / 'whole')

    def fail(k):
        if k == broken_at:
            raise RuntimeError('power cut')

    with pytest.raises(RuntimeError, match='power cut'):
        go(tmp_path / 'broken', Toy(at=fail))
    resumed = Toy()
    state = go(tmp_path / 'broken', resumed)
    assert resumed.asked[0] == broken_at // 5 * 5
    assert fingerprint(state) == fingerprint(whole)
    # The lines after the restored step were dropped and written again, none is missing or double.
    assert [x['step'] for x in log(tmp_path / 'broken')] == [
        x['step'] for x in log(tmp_path / 'whole')
    ]
    ours, theirs = log(tmp_path / 'broken'), log(tmp_path / 'whole')
    assert ours[-1]['loss'] == theirs[-1]['loss']


def test_a_finished_run_asks_for_no_batch(tmp_path):
    first = go(tmp_path / 'a')
    stream = Toy()
    again = go(tmp_path / 'a', stream)
    assert stream.asked == []
    assert fingerprint(again) == fingerprint(first)


def test_a_stop_request_saves_raises_and_the_same_call_continues(tmp_path):
    whole = go(tmp_path / 'whole')
    stop = StopRequest()

    def ask(k):
        stop.requested = stop.requested or k == 6

    with pytest.raises(Stopped, match='toy stopped after step 7; the same command continues'):
        go(tmp_path / 'a', Toy(at=ask), stop=stop)
    assert saved(tmp_path / 'a')[-1] == 7
    stream = Toy()
    assert fingerprint(go(tmp_path / 'a', stream)) == fingerprint(whole)
    assert stream.asked[0] == 7


def test_a_stop_request_in_the_last_step_ends_the_run_as_finished(tmp_path):
    stop = StopRequest()
    stop.requested = True
    settings = dataclasses.replace(SETTINGS, steps=1)
    assert int(go(tmp_path / 'a', settings=settings, stop=stop).step) == 1


def test_batches_with_nan_are_skipped_and_counted(tmp_path):
    state = go(tmp_path / 'a', Toy(bad=(2, 3, 8)))
    assert int(state.skipped) == 3
    assert log(tmp_path / 'a')[-1]['skipped'] == 3
    changed = (state.params, state.optimizer, state.ema)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(changed))
    lines = log(tmp_path / 'a')
    # Both steps up to 4 were skipped: there is no loss to tell. Step 10 is told by step 9's alone.
    assert [x['step'] for x in lines if 'loss' not in x] == [4]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]['loss'] < lines[0]['loss']


STRICT = dataclasses.replace(SETTINGS, guard=GuardSettings(max_skipped=2.5))


def rollbacks(directory):
    return [json.loads(line) for line in (directory / 'rollbacks.jsonl').read_text().splitlines()]


def test_after_many_skipped_steps_the_run_goes_back_and_past_their_batches(tmp_path):
    stream = Toy(bad=(5, 6, 7))
    state = go(tmp_path / 'a', stream, STRICT)
    assert int(state.step) == STEPS and int(state.skipped) == 0
    # Noticed after step 8; back to the checkpoint of step 5, whose next batch is now number 8.
    (line,) = rollbacks(tmp_path / 'a')
    assert (line['diverged'], line['back_to'], line['passed_over']) == (8, 5, 3)
    assert stream.asked[:8] == list(range(8)) and 8 in stream.asked[8:10]
    rates = {x['step']: x['rate/all'] for x in log(tmp_path / 'a')}
    assert rates[4] == pytest.approx(0.3) and rates[6] == pytest.approx(0.15)


@pytest.mark.parametrize('broken_at', [8, 13])
def test_a_run_that_went_back_is_resumed_to_the_same_bits(tmp_path, broken_at):
    whole = go(tmp_path / 'whole', Toy(bad=(5, 6, 7)), STRICT)

    def fail(k):
        if k == broken_at and (tmp_path / 'broken' / 'rollbacks.jsonl').exists():
            raise RuntimeError('power cut')

    with pytest.raises(RuntimeError, match='power cut'):
        go(tmp_path / 'broken', Toy(bad=(5, 6, 7), at=fail), STRICT)
    state = go(tmp_path / 'broken', Toy(bad=(5, 6, 7)), STRICT)
    assert fingerprint(state) == fingerprint(whole)


def test_a_run_that_diverges_again_and_again_ends_with_advice(tmp_path):
    with pytest.raises(TrainingFailed, match=r'went back 3 times .*lower the peak'):
        go(tmp_path / 'a', Toy(bad=range(5, 100)), STRICT)
    assert [line['back_to'] for line in rollbacks(tmp_path / 'a')] == [5, 5, 5]
    assert [line['passed_over'] for line in rollbacks(tmp_path / 'a')] == [3, 6, 9]


def test_a_loss_that_rises_takes_the_run_back(tmp_path):
    class Spike(Toy):
        def _batch(self, k):
            batch = super()._batch(k)
            return {**batch, 'y': batch['y'] * (100 if 130 <= k < 135 else 1)}

    settings = dataclasses.replace(SETTINGS, steps=150, save_every=40)
    state = go(tmp_path / 'a', Spike(), settings)
    first, *_ = lines = rollbacks(tmp_path / 'a')
    assert 130 < first['diverged'] <= 136
    # Going back does not leave the bad batches behind at once where they are many.
    assert {line['back_to'] for line in lines} == {120} and len(lines) <= 3
    assert all('the loss has risen' in line['reason'] for line in lines)
    np.testing.assert_allclose(state.params['kernel'], [1, -2, 3], atol=0.05)


@pytest.mark.parametrize('what', ['a flipped byte', 'a cut file', 'a lost folder'])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, capsys, what):
    whole = go(tmp_path / 'a')
    newest = tmp_path / 'a' / 'checkpoints' / '12'
    if what == 'a lost folder':
        shutil.rmtree(newest / 'state')
    else:
        for file in (newest / 'state').rglob('d/*'):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content[: len(content) // (2 if what == 'a cut file' else 1)])
    stream = Toy()
    assert fingerprint(go(tmp_path / 'a', stream)) == fingerprint(whole)
    assert stream.asked[0] == 10
    assert '12 is damaged' in capsys.readouterr().out
    assert (tmp_path / 'a' / 'checkpoints' / '12.damaged').is_dir()


def test_a_collapsed_objective_ends_the_run_with_its_advice(tmp_path):
    with pytest.raises(TrainingFailed, match='toy, step 2: all codes are one at 2'):
        go(tmp_path / 'a', health=lambda metrics, step: f'all codes are one at {step}')
    assert [line['step'] for line in log(tmp_path / 'a')] == [2]  # what led to it can be read


def test_dev_metrics_appear_every_eval_every_steps_and_at_the_end(tmp_path):
    settings = dataclasses.replace(SETTINGS, eval_every=5)
    go(tmp_path / 'a', settings=settings, evaluate=lambda state: {'dev': int(state.step)})
    assert {x['step']: x['dev'] for x in log(tmp_path / 'a') if 'dev' in x} == {
        5: 5,
        10: 10,
        12: 12,
    }


def test_the_log_opens_after_the_streams_that_keep_tensorflow_off_the_accelerators(
    tmp_path, monkeypatch
):
    opened = []

    class Watched(Toy):
        def batches(self, start):
            opened.append('stream')
            return super().batches(start)

    class Log(loop.MetricLog):
        def __init__(self, *arguments):
            opened.append('log')
            super().__init__(*arguments)

    monkeypatch.setattr(loop, 'MetricLog', Log)
    go(tmp_path / 'a', Watched(), dataclasses.replace(SETTINGS, steps=1))
    assert opened == ['stream', 'log']


def test_time_passed_saves_between_the_steps_that_save(tmp_path):
    settings = dataclasses.replace(SETTINGS, save_every=1000, save_minutes=0.0)

    def fail(k):
        if k == 4:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        go(tmp_path / 'a', Toy(at=fail), settings)
    assert saved(tmp_path / 'a')[-1] == 4
