"""What the layers of finished encoders know besides words: linear probes, see evaluation/probe.py.

    every model, every selection  ->  <stage>/features/<model>-<selection>.npy   [N, L + 1, D]
    every task, every model       ->  <stage>/probes.json

Features are computed once, in the order of the selection, whatever the number of tasks that use
them; an interrupted stage continues with the first file that is missing.  Beside the models stands
`log_mel`, the averages of the normalised features that all encoders are given: what a layer knows
more than these, the encoder has found.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigssl_jax.audio import AudioConfig
from bigssl_jax.config import UserError
from bigssl_jax.data.stream import one_pass
from bigssl_jax.evaluation.probe import ProbeSet, probe
from bigssl_jax.models import ConformerConfig, Encoder, attention_kernels
from bigssl_jax.models.conformer import frame_mean
from bigssl_jax.objectives import EncoderCall
from bigssl_jax.parallel import replicated, use_mesh
from bigssl_jax.parallel.distributed import barrier, batch_slice, is_primary, say
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.model import Model, load_model
from bigssl_jax.stages.probe_fields import PARTS, probe_selections
from bigssl_jax.stages.shared_encoder import is_path
from bigssl_jax.training.loop import HOST_KEYS, to_devices
from bigssl_jax.training.trainer import parameter_layout

LOG_MEL = 'log_mel'


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Probes every model with every task; returns (outputs, results) for done.json.

    Several processes compute features together, and the first one fits classifiers.
    """
    fields = context.fields
    selections = list(dict.fromkeys(name for _, name in probe_selections(fields)))
    for number, name in enumerate(fields['models']):
        model = load_model(pathlib.Path(name) if is_path(name) else context.workdir / name)
        columns = {name: 'layers', LOG_MEL: LOG_MEL} if number == 0 else {name: 'layers'}
        _write_features(context, model, columns, selections)
    if not is_primary():
        return {}, {}
    found = {
        task: {name: _probe_task(context, given, name) for name in (LOG_MEL, *fields['models'])}
        for task, given in fields['tasks'].items()
    }
    artefacts.write_json(context.directory / 'probes.json', found)
    results = {
        f'{task} {name} accuracy': round(result['best']['test'], 4)
        for task, by_model in found.items()
        for name, result in by_model.items()
    }
    return {'probes.json': artefacts.file_hash(context.directory / 'probes.json')}, results


def _path(context: Context, name: str, selection: str) -> pathlib.Path:
    return context.directory / 'features' / f'{name.replace("/", "_")}-{selection}.npy'


def _write_features(
    context: Context, model: Model, columns: Mapping[str, str], selections: list[str]
) -> None:
    """Computes what is missing of `columns` (name of a file -> output of `averager`)."""
    missing = [
        selection
        for selection in selections
        if not all(_path(context, name, selection).exists() for name in columns)
    ]
    barrier(f'{context.name}: features that are missing')
    if not missing:
        return
    if model.encoder is None:
        raise UserError(f'{model.directory} has no encoder; name a pretrain or finetune stage')
    encoder = attention_kernels.portable(model.encoder, context.mesh.devices.flat[0].platform)
    arrays = model.read(
        {
            'params': {'encoder': parameter_layout(encoder, {}, context.mesh)['encoder']},
            'constants': {'encoder': model.shapes()['constants']['encoder']},
        }
    )
    constants = jax.device_put(arrays['constants']['encoder'], replicated(context.mesh))
    average = averager(encoder, model.audio, context.mesh)
    for selection in missing:
        stream = one_pass(context.pass_config(selection), *batch_slice(context.mesh))
        kept: dict[str, np.ndarray] = {}
        rows = len(stream.sources[0].column('id'))
        with stream.batches(0) as batches:
            for batch in batches:
                with use_mesh(context.mesh):
                    named = {f'its_{key}': batch[key] for key in HOST_KEYS}
                    on_devices = to_devices({'': {**batch, **named}}, context.mesh)['']
                    found = average(arrays['params']['encoder'], constants, on_devices)
                found = jax.device_get(found)
                places = found.pop('utterances')
                for name, output in columns.items():
                    values = found[output]
                    if name not in kept:
                        kept[name] = np.full((rows, *values.shape[1:]), np.nan, np.float32)
                    kept[name][places[places >= 0]] = values[places >= 0]
        if is_primary():
            for name, values in kept.items():
                _save(_path(context, name, selection), values)
        say(f'{context.name}: {rows} utterances of {selection} heard by {", ".join(columns)}')


def _save(path: pathlib.Path, values: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    with temporary.open('wb') as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@functools.lru_cache(maxsize=16)
def averager(
    encoder: ConformerConfig, audio: AudioConfig, mesh: jax.sharding.Mesh
) -> Callable[..., dict[str, jax.Array]]:
    """(params, constants, batch) -> means over frames, and the utterances that they are of.

    'layers' float32 [B, L + 1, D], 'log_mel' float32 [B, 1, F], 'utterances' int32 [B]; every
    process is given those of the whole batch.
    """

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def average(params: Any, constants: Any, batch: Mapping[str, jax.Array]) -> Any:
        call = EncoderCall(
            encoder=Encoder(encoder),
            params=params,
            constants=constants,
            audio=audio,
            deterministic=True,
        )
        features, mask = call.features(batch)
        return {
            'layers': call.layer_means(features, mask),
            LOG_MEL: frame_mean(features, mask)[:, None],
            'utterances': jnp.asarray(batch['its_utterances']),
        }

    return average


def _probe_task(context: Context, task: Mapping[str, Any], name: str) -> dict[str, Any]:
    train, dev, test = (_probe_set(context, name, task[part], task['field']) for part in PARTS)
    regularisation = context.fields['regularisation']
    result = probe(train, dev, test, regularisation, context.config['seed']).to_json()
    best = result['best']
    say(
        f'{context.name}: {task["field"]} by {name}: {best["test"]:.1%} of {result["classes"]}'
        f' classes, layer {best["layer"]} ({best["classifier"]})'
    )
    return json.loads(json.dumps(result))


def _probe_set(context: Context, name: str, selection: str, field: str) -> ProbeSet:
    """The utterances of a selection that have a label."""
    features = np.load(_path(context, name, selection), mmap_mode='r')
    source = one_pass(context.pass_config(selection)).sources[0]
    labels, speakers = source.column(field), source.column('speaker')
    if field == 'speaker':  # the classes themselves; what was drawn at random is the utterance
        speakers = [''] * len(labels)
    kept = [row for row, label in enumerate(labels) if label]
    if len(kept) < len(labels):
        say(f'{context.name}: {len(labels) - len(kept)} utterances of {selection} have no {field}')
    return ProbeSet(features[kept], [labels[row] for row in kept], [speakers[row] for row in kept])
