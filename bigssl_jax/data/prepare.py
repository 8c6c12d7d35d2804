"""From a manifest or a TFDS builder to a prepared corpus: parallel, resumable, the same bytes.

    entries  e0 e1 e2 e3 | e4 e5 e6 e7 | e8 ...        shard k = entries [k n, (k + 1) n)
                 |             |
             worker 0      worker 1                    any number of workers, any order
                 |             |
    shards/  audio-00000   audio-00001  ...            temporary name, fsync, rename
    parts/   audio-00000   audio-00001  ...            what is in the shard; written after it
                 \\             /
       index/*.npy  metadata.parquet  quarantine.jsonl
                      |
                 corpus.json                           last: its presence means complete

Which entry goes to which shard is arithmetic, so a shard's bytes depend on its own entries only:
not on the number of workers, on their order, or on how often the work was killed. A shard is
finished when its part exists and carries the hash of the very entries that it would be made from.

An utterance that cannot be used is left out, written to quarantine.jsonl with a reason and counted;
more of them than `max_quarantine_fraction` stop the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bigssl_jax.data.corpus import FORMAT, INDICES, Corpus, file_sha256, read_corpus_json
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.folder import atomic_path, folder_lock, remove_temporaries, write_atomically
from bigssl_jax.data.manifest import Entry, manifest_origin, read_manifest
from bigssl_jax.data.shards import (
    SCHEMA,
    Options,
    Shard,
    build_shard,
    make_shard,
    part_file,
    part_totals,
    shard_file,
    text_sha256,
)
from bigssl_jax.data.workers import run_tasks

ROWS_PER_GROUP = 1 << 16  # of metadata.parquet


def prepare(
    entries: str | os.PathLike | Iterable[Entry],
    out: str | os.PathLike,
    *,
    jobs: int | None = None,
    options: Options | None = None,
    max_quarantine_fraction: float | None = 0.1,
    ignore: Sequence[str] = (),
    source: str = '',
    attribution: str = '',
    origin: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Makes, finishes, or finds complete the corpus in the folder `out`.

    Args:
      entries: path of a manifest, or an iterable of Entry. An iterable that has an `identity`
        (str) and a length is read once and never held; any other is made a list.
      out: folder, new or of an earlier, interrupted call. The result does not depend on how often
        or where that was interrupted.
      jobs: worker processes; None is one for each core.
      options: sample rate, shard size, limits of length.
      max_quarantine_fraction: the most entries that may be unusable; None is any number.
      ignore: fields of the manifest to pass over.
      source, attribution: recorded in corpus.json; `source` defaults to the manifest's name.
      origin: recorded in corpus.json as it is (plain JSON): what the corpus was made from, for
        those who find it there later.
      progress: show a progress bar on the error output.

    Returns:
      The content of corpus.json.

    Raises:
      DataError: a bad manifest, a folder in use or of another corpus, too many bad utterances, no
        usable utterance, a disk that is full or read-only.
    """
    out, options = os.path.abspath(os.fspath(out)), options or Options()
    if max_quarantine_fraction is not None and not 0 <= max_quarantine_fraction <= 1:
        raise DataError(
            f'max_quarantine_fraction={max_quarantine_fraction} (--max-quarantine): must be a share'
            ' of the utterances, 0 to 1'
        )
    if jobs is not None and jobs < 1:
        raise DataError(f'jobs={jobs} (--jobs): must be at least 1 process')
    jobs = jobs or (os.cpu_count() or 1)
    root = ''
    if isinstance(entries, str | os.PathLike):
        path = os.fspath(entries)
        root, source = os.path.dirname(os.path.abspath(path)), source or os.path.basename(path)
        entries = _Manifest(path, tuple(ignore))
    elif not hasattr(entries, 'identity'):
        entries = list(entries)
        _refuse_duplicates(entries)
    total, inputs = _survey(entries, root, options)
    facts = {
        'entries': total,
        'inputs': inputs,
        'source': source,
        'attribution': attribution,
        'origin': origin,
    }
    info = _complete_corpus(out, inputs, options)
    if info is None or os.path.exists(os.path.join(out, 'parts')):
        with folder_lock(out), _one_line_for_a_full_disk(out):
            info = _complete_corpus(out, inputs, options)  # another process may just have finished
            if info is None:
                shards = _shards(entries, out, root, options)
                _build_all(shards, out, jobs, total, max_quarantine_fraction, progress)
                info = _publish(out, -(-total // options.shard_size), options, facts)
            shutil.rmtree(os.path.join(out, 'parts'), ignore_errors=True)
    Corpus(out, info).verify()
    return info


@contextlib.contextmanager
def _one_line_for_a_full_disk(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f'{error.filename or out}: cannot be written: {error.strerror or error}; mend that and '
            'run again: finished work is kept'
        ) from None


class _Manifest:
    """A manifest as an iterable that can be read again, so that it is never held in memory."""

    def __init__(self, path: str, ignore: tuple[str, ...]) -> None:
        self.path, self.ignore = path, ignore

    def __iter__(self) -> Iterator[Entry]:
        return read_manifest(self.path, self.ignore)


def _refuse_duplicates(entries: list[Entry]) -> None:
    repeated = [key for key, n in Counter(entry.id for entry in entries).items() if n > 1]
    if repeated:
        raise DataError(f'id {repeated[0]!r} is used by more than one utterance; ids are unique')


def _survey(entries: Any, root: str, options: Options) -> tuple[int, str]:
    """-> number of entries, hash of entries and options. Finds a bad manifest before any work."""
    if hasattr(entries, 'identity'):
        return len(entries), text_sha256(f'{entries.identity} {dataclasses.asdict(options)}')
    total, digests = 0, hashlib.sha256()
    for shard in _shards(entries, '', root, options):
        total += len(shard.entries)
        digests.update(shard.digest.encode())
    if not total:
        raise DataError('no utterances to prepare: the list of entries is empty')
    return total, digests.hexdigest()


def _shards(entries: Iterable[Entry], out: str, root: str, options: Options) -> Iterator[Shard]:
    iterator = iter(entries)
    for number in itertools.count():
        chunk = tuple(itertools.islice(iterator, options.shard_size))
        if not chunk:
            return
        yield make_shard(number, chunk, out, root, options)


def _complete_corpus(out: str, inputs: str, options: Options) -> dict[str, Any] | None:
    """corpus.json of a finished corpus of these inputs, None if unfinished, DataError if other."""
    info = read_corpus_json(out)
    if info is None or info['inputs'] == inputs:
        return info
    changed = [
        f'{name} is {info["config"].get(name)} there, {value} asked for'
        for name, value in dataclasses.asdict(options).items()
        if info['config'].get(name) != value
    ]
    raise DataError(
        f'{out}: holds a corpus made from other inputs ({"; ".join(changed) or "other entries"}); '
        'choose another folder, or delete this one to prepare it anew'
    )


# ---------------------------------------------------------------- all shards


def _build_all(shards, out, jobs, total, allowed_fraction, show) -> None:
    """Builds every shard in `jobs` processes; stops as soon as too many entries are unusable."""
    for name in ('', 'shards', 'parts', 'index'):
        os.makedirs(os.path.join(out, name), exist_ok=True)
        remove_temporaries(os.path.join(out, name))
    bad: list[dict[str, str]] = []

    def done(totals: dict[str, Any]) -> None:
        advance(totals['entries'], totals['samples'])
        bad.extend(totals['quarantine'])
        if allowed_fraction is not None and len(bad) > allowed_fraction * total:
            _write_quarantine(out, bad)
            raise DataError(
                f'{out}: more than {allowed_fraction:.1%} of {total} utterances cannot be used: '
                f'{_reasons(bad)}, such as {bad[0]["audio"]}: {bad[0]["detail"]}; see '
                'quarantine.jsonl there, mend the files or raise the share that is allowed '
                "(--max-quarantine, in an experiment the corpus's max_quarantine), and run again: "
                'finished work is kept'
            )

    with _progress(total, show) as advance:
        run_tasks(build_shard, shards, jobs, done)


def _reasons(bad: Iterable[dict[str, str]]) -> str:
    counts = Counter(item['reason'] for item in bad)
    return ', '.join(f'{count} {reason}' for reason, count in sorted(counts.items()))


@contextlib.contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with hours done, hours per second and the time left; yields its advance function."""
    if not show:
        yield lambda entries, samples: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn('preparing'),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn('{task.fields[hours]}'),
        bars.TimeElapsedColumn(),
        bars.TextColumn('left'),
        bars.TimeRemainingColumn(),
    )
    began, samples_done = time.monotonic(), 0
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task('', total=total, hours='')

        def advance(entries: int, samples: int) -> None:
            nonlocal samples_done
            samples_done += samples
            hours = samples_done / 16000 / 3600
            rate = hours / max(1e-9, time.monotonic() - began)
            bar.update(task, advance=entries, hours=f'{hours:.2f} h, {rate * 60:.1f} h/min')

        yield advance


# ---------------------------------------------------------------- the end


def _publish(out: str, num_shards: int, options: Options, facts: dict[str, Any]) -> dict[str, Any]:
    """Joins the parts into index, metadata and quarantine; writes corpus.json last."""
    totals = [part_totals(os.path.join(out, part_file(k))) for k in range(num_shards)]
    rows = sum(part['rows'] for part in totals)
    bad = [item for part in totals for item in part['quarantine']]
    _write_quarantine(out, bad)
    if not rows:
        raise DataError(
            f'{out}: none of {facts["entries"]} utterances can be used: {_reasons(bad)}, such as '
            f'{bad[0]["audio"]}: {bad[0]["detail"]}; see quarantine.jsonl there'
        )
    _remove_stale_shards(out, num_shards)
    licences = _write_tables(out, num_shards, rows)
    files = [f'index/{name}.npy' for name in INDICES] + ['metadata.parquet', 'quarantine.jsonl']
    content = [options.sample_rate, *((p['sha256'], p['metadata_sha256']) for p in totals)]
    info = {
        'format': FORMAT,
        'fingerprint': text_sha256(json.dumps(content)),
        'rows': rows,
        'seconds': sum(part['samples'] for part in totals) / options.sample_rate,
        'sample_rate': options.sample_rate,
        'encoding': 'pcm16',
        'quarantined': len(bad),
        'quarantine_reasons': dict(sorted(Counter(item['reason'] for item in bad).items())),
        'licences': licences,
        'config': dataclasses.asdict(options),
        **facts,
        'files': [_described(out, name) for name in files],
        'shards': [
            {'file': shard_file(k), 'rows': p['rows'], 'bytes': p['bytes'], 'sha256': p['sha256']}
            for k, p in enumerate(totals)
        ],
    }
    text = json.dumps(info, indent=1, ensure_ascii=False) + '\n'
    write_atomically(os.path.join(out, 'corpus.json'), text.encode())
    return info


def _described(out: str, name: str) -> dict[str, Any]:
    path = os.path.join(out, name)
    return {'file': name, 'bytes': os.path.getsize(path), 'sha256': file_sha256(path)}


def _write_quarantine(out: str, bad: list[dict[str, str]]) -> None:
    text = ''.join(json.dumps(item, ensure_ascii=False) + '\n' for item in bad)
    write_atomically(os.path.join(out, 'quarantine.jsonl'), text.encode())


def _remove_stale_shards(out: str, num_shards: int) -> None:
    """An interrupted run over a longer list may have left shards that this list does not have."""
    keep = {os.path.basename(shard_file(k)) for k in range(num_shards)}
    for name in os.listdir(os.path.join(out, 'shards')):
        if name not in keep:
            os.remove(os.path.join(out, 'shards', name))


def _write_tables(out: str, num_shards: int, rows: int) -> dict[str, int]:
    """Writes index/*.npy and metadata.parquet part by part; -> number of rows of each licence."""
    licences: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        index = {}
        for name, dtype in INDICES.items():
            path = stack.enter_context(atomic_path(os.path.join(out, 'index', f'{name}.npy')))
            index[name] = np.lib.format.open_memmap(path, 'w+', dtype, (rows,))
        path = stack.enter_context(atomic_path(os.path.join(out, 'metadata.parquet')))
        writer = stack.enter_context(pq.ParquetWriter(path, SCHEMA, compression='zstd'))
        start, waiting = 0, []
        for number in range(num_shards):
            part = pq.read_table(os.path.join(out, part_file(number)))
            stop = start + part.num_rows
            index['sample_counts'][start:stop] = part['samples'].to_numpy()
            index['offset_of'][start:stop] = part['offset'].to_numpy()
            index['shard_of'][start:stop] = number
            for item in pc.value_counts(part['licence']).to_pylist():
                licences[item['values']] += item['counts']
            waiting.append(part.select(SCHEMA.names).replace_schema_metadata(None))
            start = stop
            if sum(table.num_rows for table in waiting) >= ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(waiting), row_group_size=ROWS_PER_GROUP)
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=ROWS_PER_GROUP)
        for array in index.values():
            array.flush()
    return dict(sorted(licences.items()))


# ---------------------------------------------------------------- the command


def prepare_command(
    manifest: str | None = None,
    tfds: str | None = None,
    out: str = '',
    jobs: int | None = None,
    *,
    data_dir: str | None = None,
    max_quarantine_fraction: float | None = 0.1,
    ignore: Sequence[str] = (),
    source: str = '',
    attribution: str = '',
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """`bigssl prepare`: prepares, prints a table, returns the figures in it.

    Either `manifest` (a file) or `tfds` (a builder's name, or the folder of a prepared dataset;
    `data_dir` is where TFDS keeps its data). `options` are the fields of `Options`.
    """
    if bool(manifest) == bool(tfds) or not out:
        raise DataError('prepare needs --out and either --manifest or --tfds')
    entries: Any = manifest
    if manifest:
        origin = manifest_origin(manifest)
    elif tfds:
        from bigssl_jax.data.tfds_entries import entries_from_tfds, tfds_origin

        origin = tfds_origin(tfds)
        entries = entries_from_tfds(tfds, data_dir)
        source, attribution = source or entries.source, attribution or entries.attribution
    before, began, cpu_began = read_corpus_json(out), time.monotonic(), _cpu_seconds()
    info = prepare(
        entries,
        out,
        jobs=jobs,
        options=Options(**options),
        max_quarantine_fraction=max_quarantine_fraction,
        ignore=ignore,
        source=source,
        attribution=attribution,
        origin=origin,
        progress=progress,
    )
    result = {
        'out': out,
        'already_complete': before is not None,
        'rows': info['rows'],
        'hours': round(info['seconds'] / 3600, 4),
        'shards': len(info['shards']),
        'bytes': sum(shard['bytes'] for shard in info['shards']),
        'quarantined': info['quarantined'],
        'quarantine_reasons': info['quarantine_reasons'],
        'fingerprint': info['fingerprint'],
        'seconds': round(time.monotonic() - began, 2),
        'cpu_seconds': round(_cpu_seconds() - cpu_began, 2),
    }
    _print_result(result)
    return result


def _cpu_seconds() -> float:
    """Of this process and its finished workers."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


def _print_result(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    state = 'was complete: nothing to do' if result['already_complete'] else 'is complete'
    table = Table(show_header=False)
    reasons = ', '.join(f'{count} {name}' for name, count in result['quarantine_reasons'].items())
    table.add_row('utterances', f'{result["rows"]:,}')
    table.add_row('hours', f'{result["hours"]:,.2f}')
    table.add_row('shards', f'{result["shards"]:,} ({result["bytes"] / 1e9:.2f} GB)')
    table.add_row('left out', f'{result["quarantined"]:,} {reasons and f"({reasons})"}')
    speed = ''
    if not result['already_complete']:
        rate = result['hours'] / max(result['cpu_seconds'], 1e-9)
        speed = f', {result["cpu_seconds"]:,.1f} core-seconds: {rate:.2f} h per core-second'
    table.add_row('time', f'{result["seconds"]:,.1f} s{speed}')
    console = Console()
    console.print(f'{result["out"]} {state}', markup=False, highlight=False)
    console.print(table)
