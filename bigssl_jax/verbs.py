"""The verbs of the command line that read no config, and what all verbs have.

See cli.py.  Nothing heavy is imported before a verb runs.
"""

import argparse
import sys
from typing import Any


def add_verb(verbs: Any, name: str, text: str, example: str, function: Any) -> Any:
    """A sub-command with what every verb has: help, an example, `--json`."""
    verb = verbs.add_parser(
        name,
        help=text[0].lower() + text[1:].split('.')[0],
        description=text,
        epilog=f'example:\n{example}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_argument('--json', metavar='FILE', help='also write the result as JSON to FILE')
    verb.set_defaults(function=function)
    return verb


# ---------------------------------------------------------------------------------------------
# corpora


def _add_prepare(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        'prepare',
        'Prepare a corpus.  Reads a manifest or a TFDS builder, writes indexed shards; bad files go'
        ' to quarantine.jsonl; interrupted, the same command continues.',
        '  bigssl prepare --manifest speech.jsonl --out corpora/mine\n'
        '  bigssl prepare --tfds open_voices/ast_en --out corpora/ast_en\n'
        'a manifest line: {"audio": "a.flac", "text": "hello there", "speaker": "anna"}',
        _prepare,
    )
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument('--manifest', metavar='FILE', help='JSON Lines (.jsonl) or TSV')
    source.add_argument('--tfds', metavar='NAME', help='a TFDS builder: name[/config][:version]')
    verb.add_argument('--out', required=True, metavar='DIR', help='the corpus to make')
    verb.add_argument('--jobs', type=int, metavar='N', help='processes (default: one per core)')
    verb.add_argument('--data-dir', metavar='DIR', help='where TFDS keeps its data (with --tfds)')
    verb.add_argument(
        '--shard-size', type=int, default=512, metavar='N', help='of utterances (512)'
    )
    for name, default, text in (
        ('--min-seconds', 0.1, 'shorter ones are put aside (0.1)'),
        ('--max-seconds', 120.0, 'longer ones, too (120)'),
    ):
        verb.add_argument(name, type=float, default=default, metavar='S', help=text)
    verb.add_argument(
        '--max-quarantine', type=float, default=0.1, metavar='SHARE',
        help='stop when more than this share of the utterances is bad (0.1)',
    )  # fmt: skip
    verb.add_argument(
        '--ignore', default='', metavar='A,B', help='manifest fields to pass over, comma-separated'
    )


def _prepare(options: argparse.Namespace) -> Any:
    from bigssl_jax.data.prepare import prepare_command

    return prepare_command(
        manifest=options.manifest,
        tfds=options.tfds,
        out=options.out,
        jobs=options.jobs,
        data_dir=options.data_dir,
        shard_size=options.shard_size,
        min_seconds=options.min_seconds,
        max_seconds=options.max_seconds,
        max_quarantine_fraction=options.max_quarantine,
        ignore=[name for name in options.ignore.split(',') if name],
        progress=sys.stderr.isatty(),
    )


def _add_inspect(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        'inspect',
        'Show what a corpus holds.  Counts, hours, lengths, padding waste of buckets, examples.',
        '  bigssl inspect runs/quickstart/corpora/queen',
        _inspect,
    )
    verb.add_argument('corpus', metavar='DIR', help='a prepared corpus')
    verb.add_argument('--examples', type=int, default=5, metavar='N', help='lines to show (5)')


def _inspect(options: argparse.Namespace) -> Any:
    from bigssl_jax.data.inspect import inspect_command

    return inspect_command(options.corpus, options.examples)


# ---------------------------------------------------------------------------------------------
# transcribe, score, report


def _add_transcribe(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        'transcribe',
        'Transcribe audio files.  Any common kind, rate and length; one line of text a file.  An'
        ' interrupted command with --output continues.  Fields of a decoder set the search.',
        '  bigssl transcribe --checkpoint runs/quickstart/student hello.wav talk.flac\n'
        '  bigssl transcribe --checkpoint runs/quickstart/student --output out.jsonl *.flac \\\n'
        '      --decoder.beam=8 --decoder.nbest=4 --decoder.ngram=a.arpa --decoder.ngram_weight=.3',
        _transcribe,
    )
    verb.add_argument(
        '--checkpoint', required=True, metavar='DIR', help="a fine-tuning stage's folder"
    )
    verb.add_argument('audio', nargs='+', metavar='AUDIO', help='audio files, or folders of them')
    verb.add_argument(
        '--output',
        metavar='FILE',
        help='JSON Lines: id, text, confidence, seconds, words (-: print)',
    )
    verb.add_argument('--overwrite', action='store_true', help='replace an output that is there')
    for name, default, text in (
        ('--window', 30.0, 'longer files are cut into windows of this length (30)'),
        ('--overlap', 4.0, 'which share this much with the next (4)'),
    ):
        verb.add_argument(name, type=float, default=default, metavar='S', help=text)


def _transcribe(options: argparse.Namespace) -> Any:
    from bigssl_jax.parallel.startup import configure_platform

    configure_platform()
    from bigssl_jax.stages.transcribe import transcribe_command

    return transcribe_command(
        options.checkpoint, options.audio, options.output, options.window, options.overlap,
        options.overwrite, options.overrides,
    )  # fmt: skip


def _add_score(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        'score',
        'Score hypotheses.  WER and CER, substitutions, deletions, insertions, 95 % intervals; with'
        ' --second, a paired test.',
        '  bigssl score --references test.jsonl --hypotheses student.jsonl \\\n'
        '      --second teacher.jsonl\n'
        'each line: {"id": "u1", "text": "hello there"}',
        _score,
    )
    verb.add_argument('--references', required=True, metavar='FILE', help='JSON Lines: id, text')
    verb.add_argument('--hypotheses', required=True, metavar='FILE', help='JSON Lines: id, text')
    verb.add_argument('--second', metavar='FILE', help='a second system, for a paired test')
    verb.add_argument(
        '--normaliser', default='english', metavar='NAME',
        help='of texts: none, basic, english (default) or whisper-english',
    )  # fmt: skip
    verb.add_argument(
        '--worst', type=int, default=0, metavar='N', help='show the N worst utterances, aligned'
    )


def _score(options: argparse.Namespace) -> Any:
    from bigssl_jax.data.text import scoring_normaliser
    from bigssl_jax.evaluation.score import score_command

    result = score_command(
        options.references,
        options.hypotheses,
        second=options.second,
        normalise=scoring_normaliser(options.normaliser),
        worst=options.worst,
    )
    return {**result, 'normaliser': options.normaliser}


def _add_report(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        'report',
        'Write the report of a run.  One self-contained HTML page: tables, curves, alignments.',
        '  bigssl report runs/quickstart',
        _report,
    )
    verb.add_argument('workdir', metavar='DIR', help='the workdir of a run')
    verb.add_argument('--output', metavar='FILE', help='the page (default: DIR/report.html)')


def _report(options: argparse.Namespace) -> Any:
    from bigssl_jax.evaluation.report import write_report

    page = write_report(options.workdir, options.output)
    print(f'report: {page}')
    return {'report': str(page)}


WITHOUT_CONFIG = (_add_prepare, _add_inspect, _add_transcribe, _add_score, _add_report)
