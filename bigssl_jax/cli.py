"""The `bigssl` command: each verb is a few lines that call into a room.

    bigssl run         a recipe: pre-train, fine-tune, pseudo-label, self-train, evaluate
    bigssl sweep       a recipe with many configs; one table of the results
    bigssl plan        what a recipe costs on TPU pods, without one
    bigssl prepare     a manifest or a TFDS builder into an indexed corpus
    bigssl inspect     what a corpus holds
    bigssl transcribe  audio files into text
    bigssl score       WER and CER of hypotheses against references
    bigssl report      one HTML page from a run's workdir

Exit codes stand in exits.py.

Nothing heavy is imported before a verb runs: `bigssl --help` must answer at once, and what JAX
reads from the environment has to be set before its first import.
"""

import argparse
import json
import os
import pathlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from bigssl_jax import __version__
from bigssl_jax.exits import EXIT_STOPPED, EXIT_TERMINATED, EXIT_USER_ERROR, exit_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      arguments: the words after `bigssl`; default: those of this process.

    Returns:
      The exit code (see exits.py).
    """
    from bigssl_jax.overrides import collect_overrides

    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options, rest = parser.parse_known_args(words)
    try:
        options.overrides = collect_overrides(rest, options.verb)
    except ValueError as error:
        parser.error(str(error))  # exits with 2
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = options.function(options)
        _write_json(result, options.json)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # `bigssl ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit:
        raise
    except BaseException as error:
        code, line = exit_of(error)
        if not line:
            raise
        return _say(line, code)


def _say(message: str, code: int) -> int:
    """Prints `message` as one line on standard error and returns `code`."""
    if os.environ.get('BIGSSL_TRACEBACK'):
        import traceback

        traceback.print_exc()
    print('bigssl: ' + ' '.join(message.split()), file=sys.stderr)
    return code


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack, so that files and pipelines are closed."""
    raise SystemExit(EXIT_TERMINATED)


def make_parser() -> argparse.ArgumentParser:
    """The command line of all verbs."""
    parser = argparse.ArgumentParser(
        prog='bigssl',
        description='Semi-supervised speech recognition in JAX.',
        epilog='`bigssl VERB --help` shows an example of each verb.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--version', action='version', version=f'bigssl-jax {__version__}')
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
    with_config = (_add_run, _add_sweep, _add_plan)
    for add in (*with_config, _add_prepare, _add_inspect, _add_transcribe, _add_score, _add_report):
        add(verbs)
    return parser


def _add_verb(verbs: Any, name: str, text: str, example: str, function: Any) -> Any:
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
# run


def _add_run(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        'run',
        'Run the stages of a recipe.  Finished stages are kept, interrupted ones continue.',
        '  bigssl run --config experiments/quickstart.py --workdir runs/quickstart\n'
        '  bigssl run --config experiments/quickstart.py --workdir runs/quickstart \\\n'
        '      --stages pretrain,teacher --config.seed=1',
        _run,
    )
    _add_config(verb)
    verb.add_argument('--workdir', required=True, metavar='DIR', help='where everything is written')
    verb.add_argument(
        '--stages', metavar='A,B', help='run only these stages, in the order of the recipe'
    )
    verb.add_argument(
        '--check', action='store_true', help='resolve the config, print its hash, run nothing'
    )


def _add_config(verb: Any) -> None:
    """`--config`, and a word on overrides, for the verbs that read an experiment."""
    verb.add_argument(
        '--config', required=True, metavar='FILE[:ARG]', help='experiment file, with its argument'
    )
    verb.add_argument_group(
        'overrides', '--config.FIELD=VALUE   set one field of the config; repeatable'
    )


def _run(options: argparse.Namespace) -> dict[str, Any] | None:
    from bigssl_jax.config import ConfigError
    from bigssl_jax.parallel.distributed import finish, is_primary, leave, start_distributed
    from bigssl_jax.parallel.startup import configure_platform

    if '://' in options.workdir:
        raise ConfigError(
            f'--workdir {options.workdir!r} is no folder; mount the bucket (gcsfuse) and name the'
            ' folder where it is mounted'
        )
    if options.check:
        configure_platform()
        return _check_run(options)
    start_distributed()
    try:
        result = _run_recipe(options)
        finish()
    except BaseException as error:
        leave(error, *exit_of(error))  # returns for a single process
        raise
    if not is_primary():
        options.json = None
    return result


def _run_recipe(options: argparse.Namespace) -> dict[str, Any]:
    from bigssl_jax.evaluation.report import write_report
    from bigssl_jax.evaluation.results_table import print_result_table
    from bigssl_jax.parallel.distributed import is_primary
    from bigssl_jax.stages import artefacts, schema
    from bigssl_jax.stages.recipe import run_recipe

    config = _load_experiment(options)
    schema.resolve(config)  # what the overrides made of it, before anything is written
    artefacts.check_writable(options.workdir)
    result = run_recipe(config, options.workdir, stages=_stage_names(options))
    if not is_primary():
        return result
    print_result_table(options.workdir)
    page = write_report(options.workdir)
    print(f'report: {page}')
    return {**result, 'report': str(page)}


def _check_run(options: argparse.Namespace) -> dict[str, Any]:
    """What `run` would do, found out without a device and without touching the workdir."""
    from bigssl_jax.config import config_hash
    from bigssl_jax.stages import schema
    from bigssl_jax.stages.recipe import wanted_stages

    resolved = schema.resolve(_load_experiment(options))
    stages = wanted_stages(resolved, _stage_names(options))
    digest = config_hash(resolved)
    print(f'{resolved["name"]}: config {digest} is in order; stages: {", ".join(stages)}')
    return {'name': resolved['name'], 'config_hash': digest, 'stages': stages}


def _stage_names(options: argparse.Namespace) -> list[str] | None:
    """The names in `--stages`, or None for the whole recipe."""
    return [name for name in options.stages.split(',') if name] if options.stages else None


def _load_experiment(options: argparse.Namespace) -> Any:
    """The ConfigDict that `--config` and the `--config.FIELD=VALUE` words describe."""
    from bigssl_jax import config as config_lib
    from bigssl_jax.overrides import apply_overrides
    from bigssl_jax.stages import schema

    config = config_lib.load(options.config)
    return apply_overrides(config, options.overrides, schema.resolve(config))


# ---------------------------------------------------------------------------------------------
# sweep, plan


def _add_sweep(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        'sweep',
        'Run a recipe with many configs.  Lists, runs, resumes them; one table of the results.',
        '  bigssl sweep --config experiments/quickstart.py \\\n'
        '      --sweep experiments/sweeps/learning_rate.py --list\n'
        '  bigssl sweep --config experiments/quickstart.py \\\n'
        '      --sweep experiments/sweeps/learning_rate.py --workdir runs/lr --jobs 2\n'
        "  ... --launcher 'sbatch --job-name={name} --output={log} --wrap={command}'\n"
        '  ... --collect --metric test.student.wer,test.student.cer',
        _sweep,
    )
    _add_config(verb)
    verb.add_argument(
        '--sweep', required=True, metavar='FILE[:ARG]', help='Python file with get_sweep()'
    )
    verb.add_argument('--workdir', metavar='DIR', help='one folder a run; needed to run')
    action = verb.add_mutually_exclusive_group()
    action.add_argument('--list', action='store_true', help='show the runs, start nothing')
    action.add_argument('--collect', action='store_true', help='show the results, start nothing')
    verb.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at a time (1)')
    verb.add_argument(
        '--launcher', default='', metavar='WORDS', help='start {command} with this, without a shell'
    )
    verb.add_argument('--retry', action='store_true', help='start failed runs again')
    verb.add_argument(
        '--metric', default='', metavar='A,B', help='columns; the first sorts (NAME:max: down)'
    )


def _sweep(options: argparse.Namespace) -> dict[str, Any]:
    from bigssl_jax.stages.sweep import sweep_command

    result = sweep_command(
        options.config,
        options.sweep,
        options.overrides,
        options.workdir,
        action='list' if options.list else 'collect' if options.collect else 'run',
        jobs=options.jobs,
        launcher=options.launcher,
        retry=options.retry,
        metrics=[name for name in options.metric.split(',') if name],
    )
    states = result.get('states', {})
    if options.list or options.collect:
        return result
    unfinished = states.get('waiting', 0) + states.get('stopped', 0)
    failed = states.get('failed', 0)
    if unfinished or failed:
        _write_json(result, options.json)
        if unfinished:
            sys.exit(_say(f'{unfinished} runs to do; the same command continues', EXIT_STOPPED))
        sys.exit(_say(f'{failed} runs failed; --retry starts them again', EXIT_USER_ERROR))
    return result


def _add_plan(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        'plan',
        'Plan a recipe on TPU pods.  Memory, FLOPs, chip-hours of its very steps, without a TPU.',
        '  bigssl plan --config experiments/bigssl_g.py --topology v5e-256,v5p-128,2xv5e-256',
        _plan,
    )
    _add_config(verb)
    verb.add_argument('--topology', required=True, metavar='A,B', help='slices, by cloud names')
    verb.add_argument('--stage', metavar='NAME', help='only this stage of the recipe')
    choice = verb.add_mutually_exclusive_group()
    choice.add_argument('--quick', action='store_true', help='compile what is configured, no more')
    choice.add_argument('--search', action='store_true', help='also the best batch, remat and mesh')


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    from bigssl_jax.parallel.topologies import configure_ahead_of_time

    configure_ahead_of_time()
    from bigssl_jax.stages.plan import plan_command

    extent = 'search' if options.search else 'quick' if options.quick else 'usual'
    return plan_command(_load_experiment(options), options.topology, options.stage, extent)


# ---------------------------------------------------------------------------------------------
# corpora


def _add_prepare(verbs: Any) -> None:
    verb = _add_verb(
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
    verb = _add_verb(
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
    verb = _add_verb(
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
    verb = _add_verb(
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
    verb = _add_verb(
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


def _write_json(result: Any, path: str | None) -> None:
    """Writes a verb's result for machines."""
    if path is None:
        return
    from bigssl_jax.config import UserError

    text = json.dumps(result, indent=1, default=str) + '\n'
    try:
        pathlib.Path(path).write_text(text)
    except OSError as error:
        raise UserError(f'--json {path!r} cannot be written ({error.strerror})') from error


if __name__ == '__main__':
    sys.exit(main())
