"""A teacher writes what it hears in audio without transcripts.

The selection is cut into parts; each part becomes one Parquet file, written atomically, and the
set becomes visible when all are there and have been read back.  The teacher hears the audio as it
is: no augmentation.  Where the corpus happens to know the truth, `quality.json` says how good the
labels are; the truth is never used for anything else.

Any number of workers share the parts out by the ledger of the set (data/label_ledger.py): the
processes of a run, and those that `bigssl label` starts beside it.  Each labels with a teacher on
its own devices; nobody waits for anybody until all that is left is in others' hands.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigssl_jax.config import UserError, config_hash
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.label_filters import filter_labels, keep_mask
from bigssl_jax.data.label_ledger import Ledger
from bigssl_jax.data.label_sets import LabelSet, LabelWriter, count_reasons
from bigssl_jax.data.label_work import complete
from bigssl_jax.data.stream import Stream, one_pass
from bigssl_jax.data.text import normalise_text
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.evaluation.confidence import label_quality
from bigssl_jax.parallel.distributed import is_primary, local_mesh, process_count
from bigssl_jax.parallel.watchdog import Watchdog
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.label_fields import with_folders
from bigssl_jax.stages.model import load_model
from bigssl_jax.stages.recognition import Hypothesis, Recogniser
from bigssl_jax.training.metrics import Progress
from bigssl_jax.training.signals import Stopped


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Labels the stage's selection; returns (outputs, results) for done.json."""
    fields = context.fields
    teacher = load_model(context.workdir / fields['teacher'])
    mesh = context.mesh
    if process_count() > 1:
        mesh = local_mesh(context.config['compute']['mesh'])
    recogniser = Recogniser.of_model(
        teacher, mesh, DecoderConfig(**fields['decoder']), context.workdir, fields['top_k']
    )
    whole = one_pass(context.pass_config(fields['selection'], mesh))
    source = whole.sources[0]
    num_parts = max(1, round(source.samples / 16000 / 3600 / fields['part_hours']))
    key = {
        'teacher': teacher.hash,
        'decoder': recogniser.decoder_name,
        # What is heard, not where it lies: a moved workdir keeps its labels.
        'config': config_hash({'selection': source.identity, 'parts': num_parts}),
    }
    if fields['top_k']:
        key['top_k'] = str(fields['top_k'])
    directory = context.directory / 'labels'
    writer = LabelWriter(directory, key, num_parts, _tell)
    ledger = Ledger(directory, fields['lease_seconds'])
    with context.watchdog() as watchdog:
        worker = _Worker(context, recogniser, whole, writer, watchdog)
        labels = complete(
            writer,
            ledger,
            worker.make,
            worker.look,
            provenance={'teacher': str(fields['teacher']), 'decoder': recogniser.decoder_name},
            num_rows=len(source),
        )
    if not is_primary():
        return {}, {}
    writer.unverified()  # reads what other workers have entered
    results = {
        'utterances': labels.num_rows,
        'hours': round(labels.hours, 3),
        'quarantined': labels.record['quarantined'],
        'workers': len({(r['worker']['host'], r['worker']['pid']) for r in writer.records}),
        **_speed(writer.records),
        **_kept_mass(labels),
        **kept_labels(labels, with_folders(fields['filter'], context.workdir)),
    }
    quality = measure_quality(context, labels, whole)
    if quality is not None:
        artefacts.write_json(context.directory / 'quality.json', quality)
        results['label_wer'] = quality['all']['wer']['value']
    return {'labels': labels.fingerprint, 'rows': labels.num_rows}, results


class _Worker:
    """This process's share of a label set."""

    def __init__(
        self,
        context: Context,
        recogniser: Recogniser,
        whole: Stream,
        writer: LabelWriter,
        watchdog: Watchdog,
    ):
        self._context, self._recogniser, self._whole = context, recogniser, whole
        self._writer, self._watchdog = writer, watchdog
        self._progress = Progress(context.name, writer.num_parts, unit='part')
        self._begun: tuple[float, int] | None = None  # when, and what was verified by then
        self._shown = 0

    def make(self, part: int) -> dict[str, Any]:
        """The labels of one part, in the order of the selection."""
        number, rows = self._writer.num_parts, len(self._whole.sources[0])
        stream = self._whole.part(part, number)
        bad: list[dict[str, str]] = []
        with stream.batches(0, bad=bad) as batches:
            heard = list(self._recogniser.recognise(self._watched(batches)))
        heard.sort(key=lambda h: h.utterance)
        found = [h for h in heard if _is_finite(h)]
        bad += [_undecodable(h, stream) for h in heard if not _is_finite(h)]
        if len(found) + len(bad) != (part + 1) * rows // number - part * rows // number:
            raise RuntimeError(f'part {part}: {len(found)} labels, {len(bad)} in quarantine')
        bad.sort(key=lambda entry: entry['id'])  # threads read in any order
        self._check_budget(bad)
        columns = _columns(found, stream)
        if self._context.fields['top_k']:
            columns |= _posterior_columns(found)
        return {'columns': columns, 'quarantine': bad}

    def _check_budget(self, bad: list[dict[str, str]]) -> None:
        before = sum(record['quarantined'] for record in self._writer.records)
        rows = len(self._whole.sources[0])
        allowed = self._context.fields['max_quarantine']
        if before + len(bad) > allowed * rows:
            bad = self._writer.quarantine() + bad
            self._writer.write_quarantine(bad)
            reasons = ', '.join(f'{n} {reason}' for reason, n in count_reasons(bad).items())
            raise DataError(
                f'{self._context.name}: {len(bad)} of {rows} utterances have no label, more than'
                f' max_quarantine allows ({allowed:.1%}): {reasons}, such as {bad[-1]["id"]}:'
                f' {bad[-1]["detail"]}; see {self._writer.directory}/quarantine.jsonl, mend the'
                f' corpus or raise stages.{self._context.name}.max_quarantine, and run again'
            )

    def look(self, verified: int) -> None:
        """Shows how far all workers are together; Stopped or DataError say why not to go on."""
        self._stop_if_asked()
        self._check_budget([])  # what others have found
        now = time.monotonic()
        if self._begun is None:
            self._begun, self._shown = (now, verified), verified
        began, before = self._begun
        seconds = self._whole.sources[0].samples / 16000 / self._writer.num_parts
        rate = (verified - before) * seconds / max(now - began, 1e-9)
        if verified > self._shown:
            self._shown = verified
            self._progress.show(verified, None, rate, seconds)

    def _watched(self, batches: Any) -> Iterator[Mapping[str, np.ndarray]]:
        for batch in batches:
            self._stop_if_asked()
            yield batch

    def _stop_if_asked(self) -> None:
        self._watchdog.feed()
        if self._context.stop.requested:
            raise Stopped(f'{self._context.name} stopped; the same command continues')


def _is_finite(heard: Hypothesis) -> bool:
    return bool(np.isfinite([heard.log_probability, heard.confidence]).all())


def _undecodable(heard: Hypothesis, stream: Stream) -> dict[str, str]:
    (name,) = stream.sources[0].column('id', np.array([heard.utterance]))
    detail = f'log-probability {heard.log_probability}, confidence {heard.confidence}'
    return {'id': name, 'reason': 'undecodable', 'detail': detail}


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _speed(records: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of audio that a worker labelled in a second, over all parts and workers."""
    timed = [r for r in records if r['work_seconds'] > 0]
    if not timed:
        return {}
    rate = sum(r['seconds'] for r in timed) / sum(r['work_seconds'] for r in timed)
    return {'rtfx': round(rate, 1)}


def _columns(found: list[Hypothesis], stream: Stream) -> dict[str, list]:
    rows = np.array([h.utterance for h in found], np.int64)
    return {
        'id': stream.sources[0].column('id', rows),
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


def _posterior_columns(found: list[Hypothesis]) -> dict[str, list]:
    top = [h.posteriors for h in found if h.posteriors is not None]
    return {
        'top_k_ids': [p.ids.ravel() for p in top],
        'top_k_log_probs': [p.log_probs.ravel() for p in top],
        'top_k_mass': [p.mass for p in top],
    }


def _kept_mass(labels: LabelSet) -> dict[str, Any]:
    """How much of the frames' probability the kept labels hold."""
    if 'top_k' not in labels.key:
        return {}
    table = labels.table(['frames', 'top_k_mass'])
    frames, mass = table['frames'].to_numpy(), table['top_k_mass'].to_numpy().astype(np.float64)
    mean = float((mass * frames).sum() / max(frames.sum(), 1))
    lowest = float(mass.min()) if len(mass) else 0.0
    kept = {'k': int(labels.key['top_k']), 'mass': round(mean, 6), 'lowest': round(lowest, 6)}
    return {'top_k': kept}


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
    texts = source.corpus.column('text')
    if texts.null_count == len(texts):  # nothing to read for a corpus of millions
        return None
    normaliser = context.config['tokenizer']['normaliser']
    truth = dict(zip(source.column('id'), source.column('text'), strict=True))
    speakers = dict(zip(source.column('id'), source.column('speaker'), strict=True))
    table = labels.table(['id', 'text', 'confidence']).to_pydict()
    kept = keep_mask(labels, with_folders(context.fields['filter'], context.workdir))
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
