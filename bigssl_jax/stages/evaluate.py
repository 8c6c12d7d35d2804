"""Scores finished models on test sets: WER and CER with intervals, paired tests, clips to hear."""

from collections.abc import Mapping
from typing import Any

from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.stream import Stream, one_pass
from bigssl_jax.data.text import normalise_text
from bigssl_jax.decoding import DecoderConfig
from bigssl_jax.evaluation.clips import choose_clips, write_clips
from bigssl_jax.evaluation.score import compare_texts, score_texts
from bigssl_jax.evaluation.wer import count_errors
from bigssl_jax.parallel.distributed import batch_slice, is_primary
from bigssl_jax.stages import artefacts
from bigssl_jax.stages.comparisons import read_hypotheses
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.model import Model, load_model
from bigssl_jax.stages.recognition import Hypothesis, Recogniser
from bigssl_jax.stages.tuning import tune


def run(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores every model on every set; returns (outputs, results) for done.json.

    Several processes decode each batch together, and the first one scores.
    """
    fields = context.fields
    models = {name: load_model(context.workdir / name) for name in fields['models']}
    recognisers = {name: _recogniser(context, model) for name, model in models.items()}
    tuning = {name: report for name, (_, report) in recognisers.items() if report}
    scores: dict[str, Any] = {}
    comparisons = []
    outputs = {}
    for set_name in fields['sets']:
        lines: dict[str, list[dict[str, Any]]] = {}
        for name, (recogniser, _) in recognisers.items():
            stream = one_pass(context.pass_config(set_name), *batch_slice(context.mesh))
            normaliser = context.config['tokenizer']['normaliser']
            lines[name] = transcribe_set(recogniser, stream, normaliser)
        if not is_primary():
            continue
        scores[set_name] = {name: _score(context, lines[name]) for name in models}
        comparisons += _comparisons(context, set_name, lines)
        path = context.directory / f'hypotheses-{set_name}.jsonl'
        artefacts.write_lines(
            path, [{'model': name, **line} for name in models for line in lines[name]]
        )
        outputs[path.name] = artefacts.file_hash(path)
        last = lines[fields['models'][-1]]
        _clips(context, set_name, context.selection(set_name)['corpus'], last)
    if not is_primary():
        return {}, {}
    artefacts.write_json(context.directory / 'scores.json', scores)
    artefacts.write_json(context.directory / 'comparisons.json', comparisons)
    results = {
        f'{set_name} {name} WER': score['wer']['value']
        for set_name, by_model in scores.items()
        for name, score in by_model.items()
    }
    if tuning:
        artefacts.write_json(context.directory / 'tuning.json', tuning)
        results['tuned'] = {name: report['kept'] for name, report in tuning.items()}
    return outputs, results


def _recogniser(context: Context, model: Model) -> tuple[Recogniser, dict[str, Any] | None]:
    """A model's recogniser with the stage's decoder, tuned where the stage says so."""
    search = DecoderConfig(**context.fields['decoder'])
    recogniser = Recogniser.of_model(model, context.mesh, search, context.workdir)
    grid = dict(context.fields['tune'])
    selection = grid.pop('selection')
    if not selection:
        return recogniser, None
    config, part = context.pass_config(selection), batch_slice(context.mesh)
    normaliser = context.config['tokenizer']['normaliser']

    def normalise(text: str) -> str:
        return normalise_text(text, normaliser)

    def hear(recogniser: Recogniser) -> list[Hypothesis]:
        return _in_order(recogniser, one_pass(config, *part))

    texts = one_pass(config, *part).sources[0].column('text')

    def reference(heard: Hypothesis) -> str:
        return normalise(texts[heard.utterance] or '')

    tuned, report = tune(recogniser, search, hear, reference, normalise, grid)
    return recogniser.searching(tuned), report


def _in_order(recogniser: Recogniser, stream: Stream) -> list[Hypothesis]:
    """All hypotheses of a stream, in the selection's order."""
    with stream.batches(0) as batches:
        return sorted(recogniser.recognise(batches), key=lambda h: h.utterance)


def transcribe_set(recogniser: Recogniser, stream: Stream, normaliser: str) -> list[dict[str, Any]]:
    """Hypotheses beside references, in the selection's order."""
    source = stream.sources[0]
    ids, texts = source.column('id'), source.column('text')
    speakers = source.column('speaker')
    return [
        {
            'id': ids[h.utterance],
            'reference': normalise_text(texts[h.utterance] or '', normaliser),
            'text': normalise_text(h.text, normaliser),
            'confidence': round(h.confidence, 4),
            'speaker': speakers[h.utterance],
            'seconds': round(h.seconds, 3),
        }
        for h in _in_order(recogniser, stream)
    ]


def _columns(lines: list[dict[str, Any]]) -> tuple[list[str], list[str], list[str]]:
    return (
        [line['reference'] for line in lines],
        [line['text'] for line in lines],
        [line['speaker'] for line in lines],
    )


def _score(context: Context, lines: list[dict[str, Any]]) -> dict[str, Any]:
    references, texts, speakers = _columns(lines)
    return score_texts(references, texts, speakers, context.config['seed'])


def _comparisons(
    context: Context, set_name: str, lines: Mapping[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    found = []
    for pair in context.fields['compare']:
        first, second = (
            lines[name] if name in lines else read_hypotheses(context.workdir, name, set_name)
            for name in pair
        )
        references, texts, speakers = _columns(first)
        others = _columns(second)[1]
        test = compare_texts(references, texts, others, speakers, context.config['seed'])
        found.append({'set': set_name, 'first': pair[0], 'second': pair[1], **test})
    return found


def _clips(context: Context, set_name: str, corpus: str, lines: list[dict[str, Any]]) -> None:
    """Audio of some utterances for the report: the worst of the last model, and a spread."""
    counts = count_errors([line['reference'] for line in lines], [line['text'] for line in lines])
    chosen = choose_clips(counts.errors.tolist(), context.fields['report_clips'])
    opened = Corpus.open(corpus)
    row_of = {name: row for row, name in enumerate(opened.column('id').to_pylist())}
    write_clips(
        context.directory,
        set_name,
        [lines[i]['id'] for i in chosen],
        lambda name: opened.read(row_of[name]),
    )
