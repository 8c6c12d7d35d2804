"""Hypotheses of all models side by side, aligned with the reference, for the report."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigssl_jax.evaluation.alignment import Op, align
from bigssl_jax.evaluation.results_table import Row
from bigssl_jax.evaluation.wer import count_errors
from bigssl_jax.evaluation.workdir import Run, WorkdirError, read_json, read_lines

Audio = Callable[[str, str], bytes | None]


def aligned_sets(
    run: Run, rows: Sequence[Row], audio: Audio | None, count: int, audio_bytes: int
) -> list[dict[str, Any]]:
    """Every test set's utterances, those with most errors of the set's last model first.

    Args:
      run: the run.
      rows: its result table; gives the order of models.
      audio: (set, id) -> audio file's bytes; None: the stage's own clips.
      count: utterances per set.
      audio_bytes: total of audio bytes; later clips are left out and counted.

    Returns:
      [{'stage', 'set', 'models', 'total', 'shown': [utterance], 'silent': clips left out}], where
      an utterance is {'id', 'speaker', 'seconds', 'audio': bytes or None, 'errors', 'words',
      'confidence', 'models': [{'model', 'text', 'confidence', 'errors', 'words', 'ops'}]}.
    """
    sets = []
    budget = audio_bytes
    for stage, name in dict.fromkeys((row.stage, row.set) for row in rows):
        directory = run.path / stage
        lines = read_lines(directory / f'hypotheses-{name}.jsonl')
        if not lines:
            continue
        models = [row.model for row in rows if (row.stage, row.set) == (stage, name)]
        found = _by_utterance(lines, models, directory / f'hypotheses-{name}.jsonl')
        clips = read_json(directory / 'audio' / name / 'clips.json') or {}
        chosen = _choose(found, clips, count)
        silent = 0
        for utterance in chosen:
            sound = _sound(directory, name, clips, audio, utterance['id'])
            if sound is not None and len(sound) > budget:
                sound, silent = None, silent + 1
            budget -= len(sound or b'')
            utterance['audio'] = sound
            for hypothesis in utterance['models']:
                hypothesis['ops'] = _runs(align(hypothesis['reference'], hypothesis['text']))
        sets.append(
            {
                'stage': stage, 'set': name, 'models': models, 'total': len(found),
                'shown': chosen, 'silent': silent,
            }
        )  # fmt: skip
    return sets


def _by_utterance(
    lines: Sequence[Mapping[str, Any]], models: Sequence[str], path: pathlib.Path
) -> list[dict[str, Any]]:
    """Groups lines by id; errors are counted for all; sorted by the last model's errors."""
    for number, line in enumerate(lines, 1):
        missing = {'id', 'reference', 'text'} - line.keys()
        if missing:
            raise WorkdirError(f'{path}:{number} is damaged: no field {sorted(missing)[0]!r}')
    references = [line['reference'] for line in lines]
    counts = count_errors(references, [line['text'] for line in lines])
    found: dict[str, dict[str, Any]] = {}
    for line, errors, words in zip(lines, counts.errors, counts.reference_words, strict=True):
        utterance = found.setdefault(
            line['id'],
            {
                'id': line['id'], 'speaker': line.get('speaker') or '',
                'seconds': line.get('seconds'), 'models': [],
            },
        )  # fmt: skip
        utterance['models'].append(
            {
                'model': line.get('model', models[-1]), 'reference': line['reference'],
                'text': line['text'], 'confidence': line.get('confidence'),
                'errors': int(errors), 'words': int(words),
            }
        )  # fmt: skip
    order = {model: n for n, model in enumerate(models)}
    for utterance in found.values():
        utterance['models'].sort(key=lambda h: order.get(h['model'], len(order)))
        last = utterance['models'][-1]
        utterance |= {name: last[name] for name in ('errors', 'words', 'confidence')}
    return sorted(found.values(), key=lambda u: (-u['errors'], u['words'], u['id']))


def _choose(
    found: Sequence[dict[str, Any]], clips: Mapping[str, str], count: int
) -> list[dict[str, Any]]:
    """At most `count` utterances: all with a clip, then the worst of the others; worst first."""
    place = {u['id']: n for n, u in enumerate(found)}
    first = sorted(found, key=lambda u: u['id'] not in clips)[:count]
    return sorted(first, key=lambda u: place[u['id']])


def _sound(
    directory: pathlib.Path, name: str, clips: Mapping[str, str], audio: Audio | None, identity: str
) -> bytes | None:
    if audio is not None:
        return audio(name, identity)
    if identity not in clips:
        return None
    # Only the file name: the list must not lead out of its folder.
    path = directory / 'audio' / name / pathlib.PurePath(clips[identity]).name
    return path.read_bytes() if path.is_file() else None


def _runs(ops: Sequence[Op]) -> list[Op]:
    """Joins neighbouring matches, which reads better and makes smaller pages."""
    joined: list[Op] = []
    for op in ops:
        if joined and op.kind == joined[-1].kind == 'equal':
            words = f'{joined[-1].reference} {op.reference}'
            joined[-1] = Op('equal', words, words)
        else:
            joined.append(op)
    return joined
