"""A model folder is written and read in any layout, checked array by array, and shared by path."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax import linen as nn

from bigssl_jax.audio import AudioConfig
from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.models.presets import conformer
from bigssl_jax.objectives.encoder_call import named_key
from bigssl_jax.parallel import make_mesh
from bigssl_jax.parallel.fingerprint import fingerprint
from bigssl_jax.stages import schema
from bigssl_jax.stages.model import load_model, save_model
from bigssl_jax.stages.recipe import run_recipe
from bigssl_jax.stages.recognition import Recogniser
from bigssl_jax.stages.training_stage import _first_state, make_trainer

ENCODER = {
    'num_layers': 2, 'model_dim': 32, 'num_heads': 4, 'kernel_size': 5,
    'subsampling_channels': (4, 8), 'num_mels': 40,
}  # fmt: skip
HEADS = {'ctc': {'objective': 'ctc'}}


def small_arrays() -> tuple[dict, dict]:
    """Parameters and constants of no encoder in particular."""
    rng = np.random.default_rng(0)
    params = {
        'encoder': {'norm': {'scale': rng.random(8, np.float32)}, 'kernel': rng.random((4, 8))},
        'heads': {'ctc': {'kernel': rng.random((8, 3), np.float32)}},
    }
    return params, {'encoder': {'feature_mean': np.zeros(40, np.float32)}, 'heads': {'ctc': {}}}


@pytest.fixture
def folder(tmp_path):
    """A stage folder with a small model, and what `save_model` returned."""
    directory = tmp_path / 'teacher'
    directory.mkdir()
    encoder = conformer('tiny', **ENCODER)
    audio = AudioConfig(num_mels=40)
    info = save_model(directory / 'model', encoder, audio, HEADS, *small_arrays(), None, 3)
    return types.SimpleNamespace(path=directory, info=info)


def test_what_is_saved_is_read_back_in_numpy_whole_or_in_part(folder):
    params, constants = small_arrays()
    model = load_model(folder.path)
    assert (model.hash, model.encoder.model_dim, model.audio.num_mels) == (
        folder.info['hash'], 32, 40,
    )  # fmt: skip
    whole = model.read(model.shapes())
    assert fingerprint(whole) == fingerprint({'params': params, 'constants': constants})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(whole))
    norm = {'norm': model.shapes()['params']['encoder']['norm']}
    part = model.read({'params': {'encoder': norm}})
    wanted = {'params': {'encoder': {'norm': params['encoder']['norm']}}}
    assert jax.tree.structure(part) == jax.tree.structure(wanted)
    assert fingerprint(part) == fingerprint(wanted)
    assert sorted(p.name for p in folder.path.iterdir()) == ['model']


def test_a_missing_array_and_another_shape_are_named(folder):
    model = load_model(folder.path)
    scale = {'scale': jax.ShapeDtypeStruct((9,), np.float32)}
    with pytest.raises(UserError, match=r'norm/scale has shape \(8,\), and shape \(9,\) is'):
        model.read({'params': {'encoder': {'norm': scale}}})
    with pytest.raises(UserError, match=r'params/encoder/scale is missing, and shape \(9,\) is'):
        model.read({'params': {'encoder': scale}})


def test_a_damaged_folder_is_refused_and_the_array_named(folder):
    model = load_model(folder.path)
    texts = dict(model.arrays)
    texts['params/heads/ctc/kernel'] = texts['params/heads/ctc/kernel'][:-1] + 'x'
    changed = dataclasses.replace(model, arrays=texts)
    changed.read({'params': {'encoder': model.shapes()['params']['encoder']}})
    with pytest.raises(UserError, match='damaged: the fingerprint of params/heads/ctc/kernel'):
        changed.read(model.shapes())
    path = folder.path / 'model' / 'model.json'
    path.write_text(json.dumps({**folder.info, 'arrays': texts}))
    with pytest.raises(UserError, match='model.json is damaged'):
        load_model(folder.path)
    path.write_text(json.dumps(folder.info))
    shapes, arrays = model.shapes(), folder.path / 'model' / 'arrays'
    largest = max((f for f in arrays.rglob('d/*') if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10] + bytes(10))
    with pytest.raises(UserError, match='arrays is damaged'):
        model.read(shapes)
    path.unlink()
    with pytest.raises(UserError, match='no model in .*name the folder of a finished'):
        load_model(folder.path)


def experiment(init_from: str = '', **encoder) -> dict:
    """A config with a pretrain and a finetune stage."""
    best_rq = {'best_rq': {'objective': 'best_rq', 'stream': 's', 'codebook_size': 64}}
    return {
        'corpora': {'c': {'manifest': 'none'}},
        'selections': {'all': {'corpus': 'c'}},
        'statistics': {'selection': 'all'},
        'tokenizer': {'selection': 'all'},
        'audio': {'num_mels': 40},
        'encoder': {'preset': 'tiny', **ENCODER, **encoder},
        'stages': {
            'base': {
                'kind': 'pretrain', 'objectives': best_rq,
                'streams': {'s': {'sources': {'a': {'selection': 'all'}}}},
            },
            'teacher': {
                'kind': 'finetune', 'init_from': init_from or 'base',
                'objectives': {'ctc': {'objective': 'ctc', 'stream': 's'}},
                'streams': {'s': {'sources': {'a': {'selection': 'all', 'labels': 'text'}}}},
                'optimizer': {'ema_decay': 0.9},
            },
        },
        'recipe': ('teacher',) if init_from else ('base', 'teacher'),
    }  # fmt: skip


def test_a_path_of_another_workdir_is_checked_field_by_field(folder, tmp_path):
    def run(path, **encoder):
        run_recipe(experiment(str(path), **encoder), tmp_path / 'mine')

    with pytest.raises(ConfigError, match=r"stages.teacher.init_from is '.*nowhere': no model in"):
        run(tmp_path / 'nowhere')
    with pytest.raises(ConfigError, match=r'made with encoder.num_layers=2, here it is 3; set'):
        run(folder.path, num_layers=3)
    with pytest.raises(ConfigError, match='encoder.subsampling_channels=.*here it is'):
        run(folder.path, subsampling_channels=(4, 16))
    assert not (tmp_path / 'mine').exists()
    # What does not touch the meaning of a parameter may differ: the corpus is missed next.
    with pytest.raises(UserError, match='none'):
        run(folder.path, dropout=0.3, remat='none', dtype='bfloat16')


def test_the_identity_of_a_stage_holds_the_encoder_not_its_place(folder, tmp_path):
    def identity(path):
        return schema.identity_of(schema.resolve(experiment(str(path))), 'teacher')

    moved = shutil.copytree(folder.path, tmp_path / 'elsewhere' / 'copy')
    assert identity(folder.path) == identity(folder.path / 'model') == identity(moved)
    params, constants = small_arrays()
    params['heads']['ctc']['kernel'][0, 0] += 1
    again = load_model(folder.path)
    save_model(moved / 'model', again.encoder, again.audio, HEADS, params, constants, None, 3)
    assert load_model(moved).hash != again.hash
    assert identity(moved) == identity(folder.path)  # the head is not taken
    params['encoder']['norm']['scale'][0] += 1
    save_model(moved / 'model', again.encoder, again.audio, HEADS, params, constants, None, 3)
    assert identity(moved) != identity(folder.path)
    assert schema.upstream_of(schema.resolve(experiment(str(moved)))['stages']['teacher']) == []
    with_head = experiment(str(moved))
    with_head['stages']['teacher']['init_heads'] = ('ctc',)
    assert schema.identity_of(schema.resolve(with_head), 'teacher') != identity(moved)


def save_random(workdir, config, stage: str, trainer, tokenizer) -> tuple[dict, dict]:
    """Saves random parameters as the model of stage 'base'; returns them and their statistics."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), nn.unbox(trainer.abstract_params)
    )
    statistics = {name: np.full(40, 2.5, np.float32) for name in ('feature_mean', 'feature_std')}
    save_model(
        workdir / 'base' / 'model', trainer.encoder, trainer.audio,
        config['stages'][stage]['objectives'], params,
        {'encoder': statistics, 'heads': {}}, tokenizer, 9,
    )  # fmt: skip
    return params, statistics


def test_a_stage_starts_from_the_encoder_and_its_statistics_and_reports_every_name(tmp_path):
    mesh = make_mesh({'data': -1}, jax.devices()[:1])
    config = schema.resolve(experiment())
    base = make_trainer(config, 'base', mesh, None)
    earlier, theirs = save_random(tmp_path, config, 'base', base, None)
    context = types.SimpleNamespace(
        name='teacher', fields=config['stages']['teacher'], workdir=tmp_path,
        directory=tmp_path / 'teacher',
    )  # fmt: skip
    trainer = make_trainer(config, 'teacher', mesh, 12)
    state = _first_state(context, trainer, {name: np.ones(40, np.float32) for name in theirs})
    assert fingerprint(state.params['encoder']) == fingerprint(earlier['encoder'])
    head_key = named_key(named_key(jax.random.key(config['seed']), 'params'), 'ctc')
    fresh = nn.unbox(trainer.objectives['ctc'].init_params(head_key, trainer.encoder))
    np.testing.assert_allclose(state.params['heads']['ctc']['kernel'], fresh['kernel'], rtol=1e-5)
    assert fingerprint(state.ema) == fingerprint(state.params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))
    assert fingerprint(state.constants['encoder']) == fingerprint(theirs)
    # No buffer twice: the step donates its state.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
    assert len(set(pointers)) == len(pointers)
    report = json.loads((tmp_path / 'teacher' / 'initialised.json').read_text())
    assert report['from'] == 'base'
    assert report['model'] == load_model(tmp_path / 'base').hash
    assert len(report['matched']) == len(jax.tree.leaves(state.params['encoder']))
    assert report['new'] == ['heads/ctc/bias', 'heads/ctc/kernel']
    assert report['dropped'] == ['heads/best_rq/bias', 'heads/best_rq/kernel']


def test_a_head_comes_along_where_the_tokenizer_is_the_same(tmp_path):
    mesh = make_mesh({'data': -1}, jax.devices()[:1])
    config = schema.resolve(experiment())
    trainer = make_trainer(config, 'teacher', mesh, 12)
    tokenizer = tmp_path / 'tokenizer.model'
    tokenizer.write_bytes(b'pieces')
    earlier, theirs = save_random(tmp_path, config, 'teacher', trainer, tokenizer)
    context = types.SimpleNamespace(
        name='teacher', fields=config['stages']['teacher'] | {'init_heads': ('ctc',)},
        workdir=tmp_path, directory=tmp_path / 'teacher', tokenizer_path=tokenizer,
    )  # fmt: skip
    state = _first_state(context, trainer, theirs)
    assert fingerprint(state.params) == fingerprint(earlier)
    tokenizer.write_bytes(b'other pieces')
    with pytest.raises(UserError, match=r'teacher.init_heads is .*base was trained with another'):
        _first_state(context, trainer, theirs)


def test_a_tokenizer_that_was_exchanged_is_refused(folder, tmp_path):
    tokenizer = tmp_path / 'tokenizer.model'
    tokenizer.write_bytes(b'pieces')
    encoder, arrays = conformer('tiny', **ENCODER), small_arrays()
    where = folder.path / 'model'
    save_model(where, encoder, AudioConfig(num_mels=40), HEADS, *arrays, tokenizer, 3)
    load_model(where).check_tokenizer()
    (where / 'tokenizer.model').write_bytes(b'other pieces')
    with pytest.raises(UserError, match='tokenizer.model is not the tokenizer that this model'):
        load_model(where).check_tokenizer()
    mesh = make_mesh({'data': -1}, jax.devices()[:1])
    with pytest.raises(UserError, match='its heads would write other pieces'):
        Recogniser.of_model(load_model(where), mesh)


# One model on every mesh of eight fake devices.
COMMON = """
import json, pathlib, sys, zlib
import jax, numpy as np
from bigssl_jax.audio import AudioConfig
from bigssl_jax.models.presets import conformer
from bigssl_jax.objectives import CTC
from bigssl_jax.parallel import make_mesh
from bigssl_jax.parallel.fingerprint import fingerprint
from bigssl_jax.stages.model import load_model, save_model
from bigssl_jax.training.trainer import parameter_layout

ENCODER = conformer('tiny', num_layers=2, model_dim=32, num_heads=4, kernel_size=5,
                    subsampling_channels=(4, 8), num_mels=40)
CONSTANTS = {'encoder': {'feature_mean': np.full(40, 10, np.float32),
                         'feature_std': np.full(40, 3, np.float32)}, 'heads': {'ctc': {}}}

def mesh_of(*sizes):
    axes = dict(zip(('data', 'fsdp', 'tensor'), sizes))
    return make_mesh(axes, jax.devices()[:np.prod(sizes)])

def layout(mesh, vocabulary):
    return parameter_layout(ENCODER, {'ctc': CTC(vocabulary)}, mesh)

def filled(abstract):
    def one(path, leaf):
        rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        value = rng.standard_normal(leaf.shape).astype(np.float32) * leaf.shape[-1] ** -0.5
        name = jax.tree_util.keystr(path)
        value = 1 + 0.1 * value if 'scale' in name else 20 * value if 'heads' in name else value
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: value[at])
    return jax.tree_util.tree_map_with_path(one, abstract)

def save(folder, params, tokenizer=None):
    heads = {'ctc': {'objective': 'ctc'}}
    return save_model(folder, ENCODER, AudioConfig(num_mels=40), heads, params, CONSTANTS,
                      tokenizer, 1)['hash']
"""

MESHES = (
    COMMON
    + """
from bigssl_jax.data.tokenizer import Tokenizer, train_tokenizer
from bigssl_jax.stages.recognition import Recogniser

folder = pathlib.Path(sys.argv[1])
train_tokenizer(['abc def', 'fed cab'], folder / 't.model')
size = Tokenizer(folder / 't.model').vocabulary_size
found = {'hashes': [], 'heard': []}
meshes = [mesh_of(*sizes) for sizes in ((1, 1, 1), (8, 1, 1), (1, 4, 2))]
for number in (0, 2):
    params = filled(layout(meshes[number], size))
    found['hashes'].append(save(folder / str(number), params, folder / 't.model'))

rng = np.random.default_rng(0)
samples = 24000
tones = np.sin(np.arange(samples) * rng.uniform(0.05, 1.5, (8, 6, 1))).sum(1)
batch = {
    'audio': (1500 * tones).astype(np.int16),
    'sample_counts': np.array([24000, 20000, 16000, 24000, 9000, 24000, 18000, 0], np.int32),
    'rows': np.arange(8, dtype=np.int32), 'sources': np.zeros(8, np.int32),
    'utterances': np.array([0, 1, 2, 3, 4, 5, 6, -1], np.int32),
}
for mesh, name in zip(meshes, '200'):
    recogniser = Recogniser.of_model(load_model(folder / name), mesh)
    leaves = jax.tree.leaves(recogniser._params)
    held = sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)
    heard = list(recogniser.recognise([batch]))
    found['heard'].append({
        'held': held, 'text': [h.text for h in heard],
        'scores': [h.log_probability for h in heard] + [h.confidence for h in heard],
    })
print(json.dumps(found))
"""
)

PAIR = (
    COMMON
    + """
folder, process, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize('127.0.0.1:' + port, num_processes=2, process_id=process)
written = save(folder, filled(layout(mesh_of(1, 2, 2), 9)))
read = load_model(folder).read({'params': layout(mesh_of(2, 2, 1), 9)})
print(json.dumps([jax.process_count(), written, fingerprint(read)]))
"""
)


def start(script: str, *words: object, devices: int) -> subprocess.Popen:
    """Starts a script on some fake devices."""
    flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    return subprocess.Popen(
        [sys.executable, '-c', script, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'XLA_FLAGS': flags},
    )  # fmt: skip


def ended(process: subprocess.Popen):
    """What the script printed last, as JSON."""
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_a_model_is_written_read_and_heard_alike_on_every_mesh(tmp_path):
    found = ended(start(MESHES, tmp_path, devices=8))
    assert len(found['hashes']) == 2
    assert len(set(found['hashes'])) == 1
    reference, *others = found['heard']
    assert len(reference['text']) == 7
    assert len({*reference['text']}) > 1
    for other in others:
        assert other['text'] == reference['text']
        assert other['scores'] == pytest.approx(reference['scores'], rel=1e-3, abs=1e-3)
    # The share of the parameters that one device holds.
    assert [other['held'] for other in found['heard'][:2]] == [1.0, 1.0]
    assert found['heard'][2]['held'] < 0.2


@pytest.mark.slow
def test_two_processes_write_and_read_a_model_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    pair = [start(PAIR, tmp_path / 'model', process, port, devices=2) for process in range(2)]
    first, second = [ended(process) for process in pair]
    assert first == second
    assert first[0] == 2
    model = load_model(pathlib.Path(tmp_path / 'model'))
    assert model.hash == first[1]
    assert fingerprint({'params': model.read(model.shapes())['params']}) == first[2]
    assert [p.name for p in tmp_path.iterdir()] == ['model']


@pytest.mark.slow
def test_writing_and_reading_takes_about_one_more_copy_on_the_host(tmp_path):
    script = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'model_folder.py'
    subprocess.run([sys.executable, script, '--json', tmp_path / 'found.json'], check=True)
    found = json.loads((tmp_path / 'found.json').read_text())
    assert 0.1 < found['save']['memory'] < 1.5
    # On a CPU the arrays that were read are host memory as well.
    assert 1.0 <= found['numpy']['memory'] < 2.3
    assert 1.0 <= found['sharded']['memory'] < 2.3
