"""A made-up workdir: two fine-tuned models, pseudo-labels, an evaluate stage, hostile texts."""

import json
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bigssl_jax.evaluation.clips import choose_clips, write_clips
from bigssl_jax.evaluation.confidence import label_quality
from bigssl_jax.evaluation.score import compare_texts, score_texts
from bigssl_jax.evaluation.wer import ErrorCounts, count_errors

HOSTILE = '</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>&"\''
WORDS = (
    'okay then joe we should look at the river before it gets dark and find a way to the temple'
    ' of the amazon queen while the pilot sleeps'
).split()
MODELS = {'supervised': 0.55, 'pretrained': 0.35, 'student': 0.25}
STEPS = 400


@pytest.fixture(scope='session')
def counts_of() -> Callable[[np.ndarray, np.ndarray], ErrorCounts]:
    """counts_of(errors, words): utterances whose errors are all substitutions."""

    def counts_of(errors: np.ndarray, words: np.ndarray) -> ErrorCounts:
        zeros = np.zeros_like(errors)
        return ErrorCounts(errors, zeros, zeros, words)

    return counts_of


def dump(path: pathlib.Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True))


def garble(generator: np.random.Generator, text: str, rate: float) -> str:
    """`text` with about `rate` of its words replaced, dropped or doubled."""
    words = []
    for word in text.split():
        if generator.random() > rate:
            words.append(word)
            continue
        action = generator.integers(3)
        words += [[str(generator.choice(WORDS))], [], [word, 'uh']][action]
    return ' '.join(words)


def sentences(generator: np.random.Generator, count: int) -> list[str]:
    return [' '.join(generator.choice(WORDS, generator.integers(1, 12))) for _ in range(count)]


def config() -> dict[str, Any]:
    training = {'kind': 'finetune', 'steps': STEPS, 'init_from': '', 'dev': 'dev',
                'optimizer': {'clip_norm': 5.0, 'groups': {'all': {'peak': 0.002}}}}  # fmt: skip
    return {
        'name': 'quickstart', 'seed': 17, 'data_dir': '',
        'corpora': {'queen': {}, 'ast_en': {}},
        'encoder': {'preset': 'tiny', 'num_layers': 4, 'model_dim': 144},
        'recipe': ['pretrain', 'supervised', 'pretrained', 'labels', 'student', 'test'],
        'stages': {
            'pretrain': {'kind': 'pretrain', 'steps': STEPS},
            'supervised': training,
            'pretrained': training | {'init_from': 'pretrain'},
            'labels': {'kind': 'pseudo_label', 'teacher': 'pretrained', 'filter': {'share': 0.7}},
            'student': training | {'init_from': 'pretrain', 'steps': 2 * STEPS},
            'test': {'kind': 'evaluate', 'models': list(MODELS),
                     'sets': ['queen_test', 'ast_en']},
        },
    }  # fmt: skip


def finish(workdir: pathlib.Path, stage: str, kind: str, seconds: float, results: Any) -> None:
    dump(workdir / stage / 'done.json',
         {'stage': stage, 'kind': kind, 'seconds': seconds, 'results': results,
          'finished_at': '2025-11-21T09:30:12+00:00'})  # fmt: skip


def write_metrics(workdir: pathlib.Path, stage: str, pretrain: bool, last: int) -> None:
    generator = np.random.default_rng(zlib.crc32(stage.encode()))
    lines, speed = [], generator.uniform(100, 200)
    for step in range(10, last + 1, 10):
        loss = (9 if pretrain else 60) * float(np.exp(-step / 120)) + 1.4 + generator.random() / 5
        term = 'best_rq' if pretrain else 'ctc'
        line = {'step': step, 'loss': loss, f'{term}/loss': loss, 'grad_norm': 2.0,
                'audio_seconds_per_second': 150 + 8 * generator.random()}  # fmt: skip
        if pretrain:
            line |= {'best_rq/masked_accuracy': 0.4 * (1 - float(np.exp(-step / 200))),
                     'best_rq/chance': 0.04, 'best_rq/code_perplexity': 900.0 + step,
                     'best_rq/codes_used': 0.93}  # fmt: skip
        elif step % 50 == 0:
            rate = 0.3 + 0.7 * float(np.exp(-step / speed))
            line |= {'dev/wer': rate + 0.2, 'dev/cer': rate / 2}
        lines.append(json.dumps(line) + '\n')
    lines.append('{"step": 99999, "los')  # cut short by a kill
    (workdir / stage).mkdir(parents=True, exist_ok=True)
    (workdir / stage / 'metrics.jsonl').write_text(''.join(lines))


def write_evaluation(directory: pathlib.Path, name: str, hostile: bool, count: int) -> tuple:
    generator = np.random.default_rng(len(name))
    references = sentences(generator, count)
    references[2] = ''
    ids = [f'{name}/{n:04d}' for n in range(count)]
    speakers = [f'{name}-speaker-{n % 9}' for n in range(count)]
    if hostile:
        references[0] = f'{references[0]} {HOSTILE} ' + 'long ' * 30
        ids[1], speakers[1] = f'{HOSTILE}', f'<b>{HOSTILE}</b>'
    texts = {m: [garble(generator, t, rate) for t in references] for m, rate in MODELS.items()}
    texts['student'][2] = 'hallucinated words'
    lines = [
        {'id': ids[n], 'model': model, 'reference': references[n], 'text': texts[model][n],
         'confidence': float(generator.random()), 'speaker': speakers[n], 'seconds': 1 + n / 7}
        for model in MODELS for n in range(count)
    ]  # fmt: skip
    (directory / f'hypotheses-{name}.jsonl').write_text(
        ''.join(json.dumps(line) + '\n' for line in lines)
    )
    errors = count_errors(references, texts['student']).errors
    tone = (3000 * np.sin(np.arange(8000) * 0.2)).astype(np.int16)
    write_clips(directory, name, [ids[n] for n in choose_clips(errors, 10)], lambda _: tone)
    test = compare_texts(references, texts['supervised'], texts['student'], speakers)
    comparison = {'set': name, 'first': 'supervised', 'second': 'student', **test}
    return {m: score_texts(references, texts[m], speakers) for m in MODELS}, comparison


def make_run(workdir: pathlib.Path, hostile: bool = True) -> pathlib.Path:
    """A finished run."""
    generator = np.random.default_rng(0)
    dump(workdir / 'config.json',
         {'config': config(), 'hash': '0123456789abcdef', 'version': '0.1.0',
          'machine': 'x86_64, 2 CPU cores',
          'defaults': {'seed': 0, 'name': 'quickstart'}})  # fmt: skip
    for name, source in (('queen', 'open_voices'), ('ast_en', 'synthetic speech')):
        dump(workdir / 'corpora' / name / 'corpus.json',
             {'rows': 6587, 'seconds': 15192.0, 'source': source,
              'licences': {'freeware': 6000, 'CC-BY-SA-3.0': 587}})  # fmt: skip
    finish(workdir, 'prepare', 'prepare', 42.5, {
        'corpora': {'queen': {'rows': 6587}}, 'statistics': {'utterances': 900, 'seconds': 3600},
        'selections': {'labelled': {'utterances': 812, 'hours': 0.5},
                       'unlabelled': {'utterances': 5200, 'hours': 3.4}},
    })  # fmt: skip
    for stage in ('pretrain', 'supervised', 'pretrained', 'student'):
        write_metrics(workdir, stage, stage == 'pretrain', STEPS * (1 + (stage == 'student')))
        kind = 'pretrain' if stage == 'pretrain' else 'finetune'
        finish(workdir, stage, kind, 431.0, {
            'loss': 1.523, 'steps': 400, 'masked_accuracy': 0.31, 'audio_hours': 12.25,
            'initialised': HOSTILE[:30],
        })  # fmt: skip
    truth = sentences(generator, 200)
    confidence = generator.random(200)
    labels = [garble(generator, t, 0.6 * (1 - c)) for t, c in zip(truth, confidence, strict=True)]
    dump(workdir / 'labels' / 'quality.json',
         label_quality(truth, labels, confidence, confidence > 0.3))  # fmt: skip
    finish(workdir, 'labels', 'pseudo_label', 61.0, {'labels': 200, 'kept': 140})
    directory = workdir / 'test'
    directory.mkdir(parents=True)
    queen, queen_test = write_evaluation(directory, 'queen_test', hostile, 60)
    prompts, prompts_test = write_evaluation(directory, 'ast_en', False, 40)
    scores = {'queen_test': queen, 'ast_en': prompts}
    dump(directory / 'comparisons.json', [queen_test, prompts_test])
    dump(directory / 'scores.json', scores)
    finish(workdir, 'test', 'evaluate', 12.0, {'scores': scores})
    return workdir


@pytest.fixture(scope='session')
def made_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run, to be read only."""
    return make_run(tmp_path_factory.mktemp('made') / 'run')


@pytest.fixture
def finished_run(made_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A finished run, to be changed."""
    return shutil.copytree(made_run, tmp_path / 'run')


@pytest.fixture
def half_run(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run that was stopped in its second training stage."""
    workdir = tmp_path / 'half'
    dump(workdir / 'config.json', {'config': config(), 'hash': 'ab', 'machine': 'x86_64'})
    finish(workdir, 'prepare', 'prepare', 4.0, {})
    finish(workdir, 'pretrain', 'pretrain', 9.0, {'loss': float('nan')})
    dump(workdir / 'supervised' / 'stage.json', {})
    write_metrics(workdir, 'supervised', False, 120)
    return workdir
