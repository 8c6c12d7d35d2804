"""The `bigssl` command: each verb is a few lines that call into a room.

    bigssl run         a recipe: pre-train, fine-tune, pseudo-label, self-train, evaluate
    bigssl label       one more worker at the labels of a run
    bigssl sweep       a recipe with many configs; one table of the results
    bigssl plan        what a recipe costs on TPU pods, without one
    bigssl prepare     a manifest or a TFDS builder into an indexed corpus
    bigssl inspect     what a corpus holds
    bigssl transcribe  audio files into text
    bigssl score       WER and CER of hypotheses against references
    bigssl report      one HTML page from a run's workdir

Exit codes stand in exits.py, the verbs without a config in verbs.py.

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
from bigssl_jax.verbs import WITHOUT_CONFIG, add_verb


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
    options.words = words
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
    for add in (_add_run, _add_label, _add_sweep, _add_plan, *WITHOUT_CONFIG):
        add(verbs)
    return parser


# ---------------------------------------------------------------------------------------------
# run


def _add_run(verbs: Any) -> None:
    verb = add_verb(
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
        '--accept', metavar='A,B',
        help='let the training of these stages go on though config, corpora or tokenizer changed',
    )  # fmt: skip
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
    from bigssl_jax.parallel.distributed import finish, is_primary, leave, start_distributed
    from bigssl_jax.parallel.startup import configure_platform

    _check_folder(options.workdir)
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


def _check_folder(workdir: str) -> None:
    from bigssl_jax.config import ConfigError

    if '://' in workdir:
        raise ConfigError(
            f'--workdir {workdir!r} is no folder; mount the bucket (gcsfuse) and name the'
            ' folder where it is mounted'
        )


def _run_recipe(options: argparse.Namespace) -> dict[str, Any]:
    from bigssl_jax.evaluation.report import write_report
    from bigssl_jax.evaluation.results_table import print_result_table
    from bigssl_jax.parallel.distributed import is_primary
    from bigssl_jax.stages import artefacts, schema
    from bigssl_jax.stages.recipe import run_recipe

    config = _load_experiment(options)
    schema.resolve(config)  # what the overrides made of it, before anything is written
    artefacts.check_writable(options.workdir)
    result = run_recipe(
        config, options.workdir, _stage_names(options.stages), _stage_names(options.accept) or ()
    )
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
    stages = wanted_stages(resolved, _stage_names(options.stages))
    digest = config_hash(resolved)
    print(f'{resolved["name"]}: config {digest} is in order; stages: {", ".join(stages)}')
    return {'name': resolved['name'], 'config_hash': digest, 'stages': stages}


def _stage_names(words: str | None) -> list[str] | None:
    """The names in a list with commas, or None."""
    return [name for name in words.split(',') if name] if words else None


def _load_experiment(options: argparse.Namespace) -> Any:
    """The ConfigDict that `--config` and the `--config.FIELD=VALUE` words describe."""
    from bigssl_jax import config as config_lib
    from bigssl_jax.overrides import apply_overrides
    from bigssl_jax.stages import schema

    config = config_lib.load(options.config)
    return apply_overrides(config, options.overrides, schema.resolve(config))


def _add_label(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        'label',
        'Help a run with its pseudo-labels.  Start any number of these on any machines that share'
        ' the workdir, beside `bigssl run` or alone: they divide the parts among themselves.',
        '  bigssl label --config experiments/quickstart.py --workdir runs/quickstart\n'
        '  bigssl label --config experiments/quickstart.py --workdir runs/quickstart \\\n'
        '      --stage labels --config.stages.labels.lease_seconds=600',
        _label,
    )
    _add_config(verb)
    verb.add_argument('--workdir', required=True, metavar='DIR', help='of the run')
    verb.add_argument(
        '--stage', metavar='NAME', help='a pseudo_label stage (default: the first not finished)'
    )


def _label(options: argparse.Namespace) -> dict[str, Any]:
    from bigssl_jax.parallel.startup import configure_platform

    _check_folder(options.workdir)
    configure_platform()
    from bigssl_jax.stages.label import label_command

    return label_command(_load_experiment(options), options.workdir, options.stage)


# ---------------------------------------------------------------------------------------------
# sweep, plan


def _add_sweep(verbs: Any) -> None:
    verb = add_verb(
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
    verb = add_verb(
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
    from bigssl_jax.compiler_crashes import NOTE, run_surviving
    from bigssl_jax.parallel.topologies import configure_ahead_of_time

    if NOTE not in os.environ:
        # Its child writes --json, and says what is wrong.
        sys.exit(run_surviving([sys.executable, '-m', 'bigssl_jax', *options.words]))

    configure_ahead_of_time()
    from bigssl_jax.stages.plan import plan_command

    extent = 'search' if options.search else 'quick' if options.quick else 'usual'
    return plan_command(_load_experiment(options), options.topology, options.stage, extent)


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
