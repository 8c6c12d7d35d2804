"""One JSON object per log line; a resumed run drops the lines that it writes again."""

import json

import pytest

from bigssl_jax.training.metrics import MetricLog, Progress, clock, truncate_after


def steps(path):
    return [json.loads(line)['step'] for line in path.read_text().splitlines()]


def test_lines_after_the_restored_step_and_a_torn_last_line_are_dropped(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.5}\n{"step": 30, "lo')
    truncate_after(path, 20)
    assert steps(path) == [10, 20]
    truncate_after(path, 15)
    assert steps(path) == [10]
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_without_a_file_starts_one(tmp_path):
    log = MetricLog(tmp_path, 0, tensorboard=False)
    log.write(5, {'loss': 1.25, 'skipped': 0})
    assert json.loads((tmp_path / 'metrics.jsonl').read_text()) == {
        'step': 5, 'loss': 1.25, 'skipped': 0,
    }  # fmt: skip
    log.close()


def test_a_resumed_log_continues_where_the_checkpoint_was(tmp_path):
    for start, last in ((0, 4), (2, 5)):
        log = MetricLog(tmp_path, start, tensorboard=False)
        for step in range(start + 1, last + 1):
            log.write(step, {'from': start})
        log.close()
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [(line['step'], line['from']) for line in lines] == [
        (1, 0), (2, 0), (3, 2), (4, 2), (5, 2),
    ]  # fmt: skip


def test_tensorboard_gets_the_scalars(tmp_path):
    tensorboard = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    log = MetricLog(tmp_path, 0, tensorboard=True)
    log.write(3, {'loss': 0.5, 'note': 'text is for the file only'})
    log.close()
    events = tensorboard.EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    tags = events.Tags()
    assert 'loss' in {*tags['scalars'], *tags['tensors']}
    assert 'note' not in {*tags['scalars'], *tags['tensors']}


def test_progress_tells_step_loss_speed_and_time_left(capsys):
    progress = Progress('teacher', total_steps=100, later_audio_seconds=6000.0)
    progress.show(50, 1.2345, audio_per_second=20.0, batch_seconds=10.0)
    progress.show(60, 1.1, audio_per_second=20.0, batch_seconds=10.0)  # too soon after
    progress.show(100, 1.0, audio_per_second=20.0, batch_seconds=10.0)
    first, last = capsys.readouterr().err.splitlines()
    assert first == ('teacher: step 50/100  loss 1.234  20 s audio/s  left 0:25 (whole run 5:25)')
    assert 'step 100/100' in last and 'left 0:00' in last


@pytest.mark.parametrize(
    ('seconds', 'text'), [(0, '0:00'), (61.9, '1:01'), (3599, '59:59'), (3723, '1:02:03')]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
