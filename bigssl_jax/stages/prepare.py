"""The first stage of every recipe: corpora, tokenizer, feature statistics.

Corpora live in `data_dir` (default <workdir>/corpora) and are shared by experiments that mean the
same by a name (see origin.py); the tokenizer and the feature statistics belong to the run.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bigssl_jax.audio import AudioConfig, Statistics, feature_statistics, frame_mask, log_mel
from bigssl_jax.parallel.distributed import is_primary
from bigssl_jax.parallel.startup import cpu_cores
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.origin import (
    check_origin,
    open_voices_sets,
    origin_of,
    synthetic_origin,
)
from bigssl_jax.training.signals import Stopped

STATISTICS_BATCH = 16


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes what is missing; returns (outputs, results) for done.json.

    Of several processes the first does it; the others wait for the end of the stage.
    """
    if not is_primary():
        return {}, {}
    corpora = prepare_corpora(context)
    selections = selection_sizes(context)
    tokenizer = train_text_model(context)
    statistics = measure_features(context)
    outputs = {
        'corpora': {name: info['fingerprint'] for name, info in corpora.items()},
        'statistics': artefacts.file_hash(context.statistics_path),
    }
    if tokenizer:
        outputs['tokenizer'] = tokenizer['sha256']
    return outputs, {
        'corpora': corpora,
        'tokenizer': tokenizer,
        'statistics': statistics,
        'selections': selections,
    }


def prepare_corpora(context: Context) -> dict[str, Any]:
    """Prepares every corpus of the config; name -> {rows, hours, fingerprint, source, ...}."""
    from bigssl_jax.data.corpus import Corpus

    missing = _missing(context)
    _check_origins(context, missing)
    if missing:
        with _alone(context):
            still_missing = _missing(context)
            _check_origins(context, still_missing)  # of what another run has made meanwhile
            _prepare_missing(context, still_missing)
    report = {}
    for name in context.config['corpora']:
        corpus = Corpus.open(context.corpus_directory(name))
        corpus.verify()
        report[name] = {
            'rows': len(corpus),
            'hours': round(corpus.hours, 3),
            'fingerprint': corpus.fingerprint,
            'source': corpus.info['source'],
            'quarantined': corpus.info.get('quarantined', 0),
        }
    return report


def _missing(context: Context) -> dict[str, Mapping[str, Any]]:
    return {
        name: fields
        for name, fields in context.config['corpora'].items()
        if not (context.corpus_directory(name) / 'corpus.json').exists()
    }


def _check_origins(context: Context, missing: Mapping[str, Any]) -> None:
    for name in context.config['corpora']:
        if name not in missing:
            check_origin(context.config['corpora'], name, context.corpus_directory(name))


@contextlib.contextmanager
def _alone(context: Context) -> Iterator[None]:
    """Waits until no other run prepares corpora in the same data_dir, and keeps others waiting."""
    from bigssl_jax.data.folder import file_lock

    folder = context.corpus_directory('')
    waited_for: list[str] = []

    def wait(holder: str) -> bool:
        if context.stop.requested:
            raise Stopped('stopped while waiting for corpora; the same command continues')
        if not waited_for:
            print(f'prepare: waiting for another run ({holder}) to prepare {folder}', flush=True)
            waited_for.append(holder)
        time.sleep(0.5)
        return True

    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(str(folder / '.prepare.lock'), wait):
        yield


def _prepare_missing(context: Context, missing: Mapping[str, Mapping[str, Any]]) -> None:
    from bigssl_jax.data.prepare import prepare

    given = context.config['corpora']
    origins = {name: origin_of(given, name) for name in missing}
    voices, synthetic = _open_voices(context, missing)
    for name, fields in missing.items():
        entries: str | Iterable[Any]
        if fields['manifest']:
            entries, source = _manifest_entries(fields), f'manifest {fields["manifest"]}'
        elif fields['tfds']:
            from bigssl_jax.data.tfds_entries import entries_from_tfds

            entries, source = entries_from_tfds(fields['tfds']), f'tfds {fields["tfds"]}'
        else:
            entries = voices[name]
            source = 'synthetic speech' if synthetic else 'open_voices'
            if synthetic:
                origins[name] = synthetic_origin(given, name)
        directory = context.corpus_directory(name)
        prepare(
            entries,
            directory,
            jobs=cpu_cores(),
            source=source,
            origin=origins[name],
            max_quarantine_fraction=fields['max_quarantine'],
        )


def _manifest_entries(fields: Mapping[str, Any]) -> Any:
    """A manifest's path; or its entries, missing splits drawn, seen test lines marked."""
    if not fields['split_by']:
        return fields['manifest']
    from bigssl_jax.data.manifest import read_manifest
    from bigssl_jax.data.open_voices import splits

    folder = pathlib.Path(fields['manifest']).absolute().parent
    drawn = [
        dataclasses.replace(
            entry,
            audio=str(folder / entry.audio),
            split=entry.split
            or splits.split_of('manifest', getattr(entry, fields['split_by']) or entry.id),
        )
        for entry in read_manifest(fields['manifest'])
    ]
    return list(splits.mark_seen(drawn))


def _open_voices(
    context: Context, missing: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, list[Any]], bool]:
    """Entries of the missing corpora of open_voices sets: (corpus -> entries, whether synthetic).

    All sets of the experiment are asked for in one call, also those of corpora that are there, so
    that `seen` holds over the whole experiment wherever an earlier call was interrupted.
    """
    wanted = {name: fields for name, fields in missing.items() if fields['open_voices']}
    if not wanted:
        return {}, False
    from bigssl_jax.data.errors import DataError
    from bigssl_jax.data.open_voices import entries

    cache = context.corpus_directory('open_voices_cache')
    given = context.config['corpora']
    sets = open_voices_sets(given)
    deb_dir = next((fields['deb_dir'] for fields in given.values() if fields['deb_dir']), None)
    try:
        found = list(entries(sets, cache, deb_dir=deb_dir, jobs=cpu_cores()))
    except DataError as error:
        if not all(fields['fallback_synthetic_hours'] for fields in wanted.values()):
            raise
        print(f'{error}\nfalling back to SYNTHETIC speech; results will say so', flush=True)
        return _synthetic(context, wanted), True
    by_corpus = {
        name: [
            entry
            for entry in found
            if entry.id.split('/')[0] in fields['open_voices']
            and (not fields['speakers'] or entry.speaker in fields['speakers'])
        ]
        for name, fields in wanted.items()
    }
    return by_corpus, False


def _synthetic(context: Context, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Synthesised entries for every corpus, each with its own sentences."""
    from bigssl_jax.data import synthetic_speech

    cache = context.corpus_directory('synthetic_cache')
    return {
        name: list(
            synthetic_speech.entries(
                cache,
                num_utterances=max(1, round(fields['fallback_synthetic_hours'] * 1480)),
                seed=synthetic_origin(context.config['corpora'], name)['seed'],
                jobs=cpu_cores(),
            )
        )
        for name, fields in wanted.items()
    }


def train_text_model(context: Context) -> dict[str, Any] | None:
    """Trains the tokenizer on the texts of its selection; returns its provenance record."""
    fields = context.config['tokenizer']
    if not fields['selection']:
        return None
    from bigssl_jax.data.corpus import Corpus
    from bigssl_jax.data.selection import select
    from bigssl_jax.data.tokenizer import train_tokenizer

    spec = context.selection(fields['selection'])
    corpus = Corpus.open(spec['corpus'])
    rows = select(corpus, spec)
    texts = [text for text in corpus.column('text').take(rows).to_pylist() if text]
    return train_tokenizer(
        texts,
        context.tokenizer_path,
        model_type=fields['model_type'],
        vocabulary_size=fields['vocabulary_size'],
        normaliser=fields['normaliser'],
        source=fields['selection'],
    )


def measure_features(context: Context) -> dict[str, float]:
    """Mean and standard deviation of every mel bin over a subset of the training audio."""
    from bigssl_jax.data.corpus import Corpus
    from bigssl_jax.data.selection import id_hash, select

    fields = context.config['statistics']
    spec = context.selection(fields['selection'])
    corpus = Corpus.open(spec['corpus'])
    rows = select(corpus, spec)
    ids = corpus.column('id').take(rows).to_pylist()
    rows = rows[np.argsort([id_hash(utterance) for utterance in ids])]
    seconds = np.cumsum(corpus.sample_counts[rows]) / corpus.sample_rate
    rows = rows[: int(np.searchsorted(seconds, fields['seconds'])) + 1]
    audio = AudioConfig(**context.config['audio'])
    statistics = feature_totals(corpus, rows, audio)
    context.statistics_path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        context.statistics_path,
        feature_mean=np.asarray(statistics.mean, np.float32),
        feature_std=np.asarray(statistics.std, np.float32),
    )
    return {'utterances': len(rows), 'seconds': round(float(min(seconds[-1], fields['seconds'])))}


def feature_totals(corpus: Any, rows: np.ndarray, audio: AudioConfig) -> Statistics:
    """Statistics over `rows` of a corpus, in float64 on the host, log-mel on the accelerator."""
    longest = int(corpus.sample_counts[rows].max())

    @jax.jit
    def totals(waveform: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        features, frame_counts = log_mel(waveform, counts, audio)
        return feature_statistics(features, frame_mask(frame_counts, features.shape[1]))

    total: tuple[Any, Any, Any] = (0.0, 0.0, 0.0)
    for start in range(0, len(rows), STATISTICS_BATCH):
        waveform = np.zeros((STATISTICS_BATCH, longest), np.int16)
        counts = np.zeros(STATISTICS_BATCH, np.int32)
        for i, row in enumerate(rows[start : start + STATISTICS_BATCH]):
            samples = corpus.read(int(row))
            waveform[i, : len(samples)], counts[i] = samples, len(samples)
        batch = jax.device_get(totals(waveform, counts))
        total = tuple(t + np.asarray(b, np.float64) for t, b in zip(total, batch, strict=True))
    return Statistics.from_totals(*total)


def selection_sizes(context: Context) -> dict[str, dict[str, float]]:
    """Utterances and hours of every named selection, for the report.

    Raises:
      DataError: one is empty: a stage would find out hours later.
    """
    from bigssl_jax.data.corpus import Corpus
    from bigssl_jax.data.errors import DataError
    from bigssl_jax.data.selection import select

    sizes = {}
    for name in context.config['selections']:
        spec = context.selection(name)
        corpus = Corpus.open(spec['corpus'])
        try:
            rows = select(corpus, spec)
        except DataError as error:
            raise DataError(f'selections.{name}: {error}') from error
        seconds = float(corpus.sample_counts[rows].sum()) / corpus.sample_rate
        sizes[name] = {'utterances': len(rows), 'hours': round(seconds / 3600, 3)}
    return sizes
