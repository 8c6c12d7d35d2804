"""A teacher writes what it hears in audio without transcripts.

The selection is cut into parts; each part becomes one Parquet file, written atomically, and the
set becomes visible when all are there.  The teacher hears the audio as it is: no augmentation.
Where the corpus happens to know the truth, `quality.json` says how good the labels are; the truth
is never used for anything else.

Several processes share the parts out, and each labels its own with a teacher on its own devices:
nobody waits for anybody until all parts are there.
"""

import time
from typing import Any

import numpy as np

from bigssl_jax.config import UserError, config_hash
from bigssl_jax.data.label_filters import filter_labels, keep_mask
from bigssl_jax.data.label_sets import LabelSet, LabelWriter
from bigssl_jax.data.stream import Stream, one_pass
from bigssl_jax.data.text import normalise_text
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.evaluation.confidence import label_quality
from bigssl_jax.parallel.distributed import (
    WORK_SECONDS,
    from_primary,
    gather,
    is_primary,
    local_mesh,
    process_count,
    process_index,
)
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.model import load_model
from bigssl_jax.stages.recognition import Hypothesis, Recogniser
from bigssl_jax.training.metrics import Progress
from bigssl_jax.training.signals import Stopped

PART_HOURS = 1.0


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Labels the stage's selection; returns (outputs, results) for done.json."""
    fields = context.fields
    teacher = load_model(context.workdir / fields['teacher'])
    mesh = context.mesh
    if process_count() > 1:
        mesh = local_mesh(context.config['compute']['mesh'])
    recogniser = Recogniser.of_model(
        teacher, mesh, DecoderConfig(**fields['decoder']), context.workdir
    )
    config = context.pass_config(fields['selection'], mesh)
    whole = one_pass(config)
    hours = sum(whole.sources[0].lengths[np.arange(len(whole.sources[0]))]) / 16000 / 3600
    num_parts = max(1, round(hours / PART_HOURS))
    key = {
        'teacher': teacher.hash,
        'decoder': recogniser.decoder_name,
        # What is heard, not where it lies: a moved workdir keeps its labels.
        'config': config_hash({'selection': whole.sources[0].identity, 'parts': num_parts}),
    }
    writer = LabelWriter(context.directory / 'labels', key, num_parts)
    started, heard = time.monotonic(), 0.0
    progress = Progress(context.name, num_parts, unit='part')
    # The first process says what is missing: another may already be writing its first part.
    missing = from_primary(f'{context.name}: missing', writer.missing())
    with context.watchdog() as watchdog:
        for part in missing[process_index() :: process_count()]:
            if context.stop.requested:
                raise Stopped(
                    f'{context.name} stopped before part {part}; the same command continues'
                )
            stream = one_pass(config, part=(part, num_parts))
            found = []
            with stream.batches(0) as batches:
                for hypothesis in recogniser.recognise(batches):
                    found.append(hypothesis)
                    watchdog.feed()
            writer.write(part, _columns(sorted(found, key=lambda h: h.utterance), stream))
            heard += sum(h.seconds for h in found)
            rtfx = heard / (time.monotonic() - started)
            progress.show(part + 1, None, rtfx, PART_HOURS * 3600)
    heard = sum(gather(f'{context.name}: seconds', heard, WORK_SECONDS))
    if not is_primary():
        return {}, {}
    labels = writer.finish({'teacher': str(fields['teacher']), 'decoder': recogniser.decoder_name})
    results = {
        'utterances': labels.num_rows,
        'hours': round(labels.hours, 3),
        'rtfx': round(heard / max(time.monotonic() - started, 1e-9), 1),
        **kept_labels(labels, fields['filter']),
    }
    quality = measure_quality(context, labels, whole)
    if quality is not None:
        artefacts.write_json(context.directory / 'quality.json', quality)
        results['label_wer'] = quality['all']['wer']['value']
    return {'labels': labels.fingerprint, 'rows': labels.num_rows}, results


def _columns(found: list[Hypothesis], stream: Stream) -> dict[str, list]:
    ids = stream.sources[0].column('id')
    return {
        'id': [ids[h.utterance] for h in found],
        'text': [h.text for h in found],
        'tokens': [h.tokens for h in found],
        'score': [h.log_probability for h in found],
        'confidence': [h.confidence for h in found],
        'seconds': [h.seconds for h in found],
        'frames': [h.frames for h in found],
        'token_confidence': [h.token_confidence for h in found],
        'token_start_frames': [h.start_frames for h in found],
        'token_end_frames': [h.end_frames for h in found],
    }


def kept_labels(labels: LabelSet, steps: Any) -> dict[str, Any]:
    """What the stage's filter would keep; the student's stream applies the same steps itself."""
    if steps is None:
        return {'kept_hours': round(labels.hours, 3), 'filter': []}
    result = filter_labels(labels, steps)
    if not result.keep.any():
        removed = ', '.join(
            f'{step["removed_rows"]} by {step["kind"]!r}'
            for step in result.report
            if step['removed_rows']
        )
        raise UserError(
            f'the filter leaves none of {labels.num_rows} labels ({removed}); train the teacher on'
            ' more labels or for more steps (an untrained one writes nothing), or loosen the filter'
        )
    return {'kept_hours': round(result.kept_hours, 3), 'filter': result.report}


def measure_quality(context: Context, labels: LabelSet, stream: Stream) -> dict[str, Any] | None:
    """The labels against transcripts, over the utterances that have one; None without any."""
    source = stream.sources[0]
    normaliser = context.config['tokenizer']['normaliser']
    truth = dict(zip(source.column('id'), source.column('text'), strict=True))
    speakers = dict(zip(source.column('id'), source.column('speaker'), strict=True))
    table = labels.table(['id', 'text', 'confidence']).to_pydict()
    kept = keep_mask(labels, context.fields['filter'])
    known = [i for i, name in enumerate(table['id']) if truth[name]]
    if not known:
        return None
    ids = [table['id'][i] for i in known]
    return label_quality(
        references=[normalise_text(truth[name], normaliser) for name in ids],
        labels=[table['text'][i] for i in known],
        confidence=[table['confidence'][i] for i in known],
        kept=[bool(kept[i]) for i in known],
        speakers=[speakers[name] for name in ids],
        seed=context.config['seed'],
    )
