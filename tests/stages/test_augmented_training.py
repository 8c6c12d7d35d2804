"""Speed perturbation and noise where they are used: in the train step of a configured stage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigssl_jax.parallel import make_mesh
from bigssl_jax.stages import schema
from bigssl_jax.stages.training_stage import make_trainer

MELS = 16
SIZE = 12000
BOTH = {'speed_perturb': {'percents': (80, 125)}, 'noise': {'probability': 1.0, 'high_db': 20.0}}
FAST_COMPILE = {'xla_backend_optimization_level': 0}  # compiling is all that these tests cost


def config(augmentation: dict) -> dict:
    """CTC in a model of one small layer, with no other randomness than `augmentation`."""
    stage = {
        'kind': 'finetune',
        'objectives': {'ctc': {'objective': 'ctc', 'stream': 'all'}},
        'streams': {'all': {'sources': {'all': {'selection': 'all', 'labels': 'text'}}}},
        **augmentation,
    }
    return schema.resolve(
        {
            'corpora': {'speech': {'manifest': 'speech.jsonl'}},
            'selections': {'all': {'corpus': 'speech'}},
            'tokenizer': {'selection': 'all'},
            'statistics': {'selection': 'all'},
            'audio': {'num_mels': MELS},
            'encoder': {
                'preset': 'tiny', 'num_layers': 1, 'model_dim': 16, 'num_heads': 2,
                'kernel_size': 3, 'dropout': 0.0, 'subsampling_channels': (2, 4), 'num_mels': MELS,
            },
            'stages': {'train': stage},
            'recipe': ('train',),
        }
    )  # fmt: skip


def make(**augmentation):
    """The stage's trainer."""
    mesh = make_mesh({'data': 1}, jax.devices()[:1])
    return make_trainer(config(augmentation), 'train', mesh, vocabulary_size=6)


@functools.cache
def training(augmented: bool):
    """step(batch, number, seed) -> report of train step `number` of one and the same model."""
    trainer = make(**(BOTH if augmented else {}))
    statistics = {'feature_mean': np.full(MELS, 9, np.float32), 'feature_std': np.ones(MELS)}
    statistics = {name: np.float32(value) for name, value in statistics.items()}
    rng = np.random.default_rng(0)
    first = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), trainer.abstract_state(statistics))
    params = jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), first.params)
    first = first.replace(params=params, constants={**first.constants, 'encoder': statistics})
    rates = {'all': np.float32(1e-3)}
    lowered = trainer.train_step().lower(first, {'ctc': make_batch()}, rates, jax.random.key(0))
    compiled = lowered.compile(compiler_options=FAST_COMPILE)

    def step(batch: dict, number: int = 0, seed: int = 0) -> dict:
        state = jax.device_put(first.replace(step=np.int32(number)), jax.devices()[0])
        _, report = compiled(state, {'ctc': batch}, rates, jax.random.key(seed))
        assert report['finite']
        return jax.device_get(report)['totals']['ctc']

    return step


def make_batch(counts=(SIZE, 9000), label_counts=(5, 3), size: int = SIZE) -> dict:
    """Noise of changing loudness, the first row as long as the buffer; labels without repeats."""
    rng = np.random.default_rng(1)
    audio = np.zeros((len(counts), size), np.int16)
    labels = np.zeros((len(counts), 24), np.int32)
    for row, (count, number) in enumerate(zip(counts, label_counts, strict=True)):
        loudness = np.repeat(rng.uniform(200, 4000, SIZE // 400), 400)
        audio[row, :count] = (rng.normal(size=SIZE) * loudness)[:count]
        labels[row, :number] = 1 + np.arange(number) % 5
    return {
        'audio': audio,
        'sample_counts': np.asarray(counts, np.int32),
        'labels': labels,
        'label_counts': np.asarray(label_counts, np.int32),
        'rows': np.arange(len(counts), dtype=np.int32),
    }


def frames_of(samples: int) -> int:
    """Encoder frames: windows of 25 ms every 10 ms, four to a frame."""
    return -(-(1 + (samples - 400) // 160) // 4)


def test_both_change_the_loss_and_follow_from_seed_and_step_alone():
    step, batch = training(True), make_batch()
    first = step(batch)
    jax.tree.map(np.testing.assert_array_equal, first, step(batch))
    losses = [float(step(batch, number, seed)['loss']) for number in (0, 1) for seed in (0, 1)]
    assert len({*losses, float(training(False)(batch)['loss'])}) == 5


def test_the_step_hears_every_utterance_whole_at_every_speed():
    """The first row fills its buffer: slowed down, it must outgrow it."""
    step, heard = training(True), set()
    for number in range(8):
        heard.add(int(step(make_batch((SIZE, 0), (5, 0)), number)['frames']))
    assert heard == {frames_of(SIZE * 100 // 80), frames_of(SIZE * 100 // 125)}


def test_rows_mind_neither_their_batch_mates_nor_fillers_nor_what_padding_holds():
    step, whole = training(True), make_batch()
    parts = []
    for row in (0, 1):
        mine = np.arange(2) == row
        alone = {name: np.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
                 for name, x in whole.items()}  # fmt: skip
        parts.append(step({**alone, 'rows': whole['rows']}))
    assert [part['utterances'] for part in parts] == [1, 1]
    together = step(whole)
    assert sum(part['loss'] for part in parts) == pytest.approx(together['loss'], rel=1e-5)
    dirty = {**whole, 'audio': whole['audio'].copy()}
    dirty['audio'][1, 9000:] = 32767
    jax.tree.map(np.testing.assert_array_equal, step(dirty), together)


def test_an_utterance_too_fast_for_its_labels_is_counted_and_left_out():
    """17 labels need as many frames: 11,800 samples make 18, and 15 when sped up by a quarter."""
    batch = make_batch((11800, 9000), (17, 3))
    assert (frames_of(11800), frames_of(11800 * 100 // 125)) == (18, 15)
    none = training(False)(batch)
    assert (none['invalid'], none['labels']) == (0, 20)
    seen = set()
    for number in range(8):
        totals = training(True)(batch, number)
        assert np.isfinite(totals['loss'])
        seen.add((int(totals['invalid']), int(totals['labels'])))
    assert seen == {(0, 20), (1, 3)}


def test_a_wider_bucket_changes_neither_speed_nor_noise():
    perturb = jax.jit(make(**BOTH).perturb)
    for number in range(4):
        key = jax.random.key(number)
        narrow, wide = perturb(make_batch(), key), perturb(make_batch(size=SIZE + 2560), key)
        np.testing.assert_array_equal(wide['sample_counts'], narrow['sample_counts'])
        size = narrow['audio'].shape[1]
        np.testing.assert_allclose(wide['audio'][:, :size], narrow['audio'], atol=0.05)
        assert not np.asarray(wide['audio'][:, size:]).any()
        beyond = jnp.arange(size) >= narrow['sample_counts'][:, None]
        assert not np.asarray(narrow['audio'])[np.asarray(beyond)].any()
