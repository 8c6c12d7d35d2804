"""What the fields of an experiment may hold beyond their types: ranges, names, entries of lists.

A field means the same wherever it stands, so one table by name holds the numbers:

    'micro_batches': '1 ..'         at least 1
    'ema_decay': '0 .. below 1'
    'peak': '0 ..'

Everything here is found when the config is read: met in a stage, it would be a traceback, hours
later.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from bigssl_jax.config import ConfigError, choose, in_short, merge, shown
from bigssl_jax.data.selection import DEFAULTS as SELECTION
from bigssl_jax.data.selection import resolve as resolve_selection
from bigssl_jax.data.text import NORMALISERS
from bigssl_jax.data.tokenizer import MODEL_TYPES
from bigssl_jax.training.guard import GuardSettings

# Fields that may be None although their default is not: no limit, or all there is.
OPTIONAL = ('vocabulary_size', 'max_seconds', 'max_labels')

# Lowest and highest value of a number, by the field's name; None: no bound.
RANGES: dict[str, tuple[float, float | None]] = {
    'seed': (0, 2**32 - 1),
    'steps': (0, 2**31 - 1),
    'weight': (0, None),
    'vocabulary_size': (4, 2**20),
    'seconds': (0, None),
    'fallback_synthetic_hours': (0, None),
    'max_quarantine': (0, 1),
    # of streams and passes
    'batch_seconds': (0.1, None),
    'batch_tokens': (1, 2**31 - 1),
    'num_buckets': (1, 1000),
    'min_seconds': (0, None),
    'max_seconds': (0, None),
    'max_labels': (0, None),
    'max_tokens': (1, 2**31 - 1),
    'rows_multiple': (0, 2**31 - 1),
    'max_left_out': (0, 1),
    'max_unknown': (0, 1),
    # of training
    'log_every': (1, None),
    'eval_every': (0, None),
    'save_every': (1, None),
    'clip_norm': (0, None),
    'ema_decay': (0, 1),
    'micro_batches': (1, 2**16),
    'peak': (0, None),
    'warmup': (0, None),
    'start': (0, None),
    'b1': (0, 0.999999),
    'b2': (0, 0.999999),
    'eps': (0, None),
    'weight_decay': (0, None),
    # of other stages
    'order': (1, 16),
    'report_clips': (0, None),
    # of the machine
    'max_replicated': (0, 1),
    'expected_speed': (1e-6, None),
    'watchdog_minutes': (0, None),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    'rates': ('proportional', 'weights'),
    'model_type': MODEL_TYPES,
    'normaliser': NORMALISERS,
}
# Lists of words and lists of numbers.
WORDS = ('open_voices', 'speakers', 'recipe', 'init_heads', 'models', 'sets', 'texts')
# Groups whose entries the experiment names: the names become folders, or parts of metrics' names.
NAMED = ('corpora', 'selections', 'stages', 'streams', 'sources', 'objectives', 'groups', 'tasks')
# What a run's folder holds beside its stages.
TAKEN = ('prepare', 'corpora', 'tokenizer', 'compilation_cache', 'config.json', 'report.html')
# Groups that have checks of their own and other meanings of these names.
ELSEWHERE = ('audio', 'encoder', 'filter', 'selections', 'divergence', 'mesh', 'decoder')


def group(field: str, value: Any) -> Mapping[str, Any]:
    """`value`, which must be a group of fields.

    Raises:
      ConfigError: it is none.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f'config field {field} is {in_short(value)}; it must be a group')
    return value


def check_table(field: str, entries: Mapping[str, Any]) -> None:
    """Checks that every entry of a table is a group of fields."""
    for name, entry in entries.items():
        group(f'{field}.{name}', entry)


def check_names(config: Any, field: str = '') -> None:
    """Checks the names that an experiment gives to its corpora, selections, stages and the like.

    Raises:
      ConfigError: one that cannot be a folder, or that the run itself needs.
    """
    for name, value in config.items() if isinstance(config, Mapping) else ():
        path = f'{field}.{name}' if field else name
        if name in NAMED and isinstance(value, Mapping):
            for given in value:
                if not re.fullmatch(r'\w[^\s/,.\\]{0,99}', given) or not given.isprintable():
                    raise ConfigError(
                        f'config field {path} has an entry named {shown(given)}; a name is up to'
                        " 100 letters, digits, '-', '_', and begins with a letter or digit"
                    )
                if name == 'stages' and given in TAKEN:
                    raise ConfigError(
                        f'config field {path} has an entry named {given!r}, which a run makes by'
                        ' itself; choose another name'
                    )
        check_names(value, path)


def check_values(config: Mapping[str, Any]) -> None:
    """Checks numbers, words and lists of a config whose types are in order.

    Raises:
      ConfigError: one that is not allowed.
    """
    for path, name, value in _fields(config, ''):
        if name in CHOICES:
            choose(path, value, CHOICES[name])
        elif name in WORDS:
            check_words(path, value)
        elif name in RANGES and isinstance(value, int | float):
            lowest, highest = RANGES[name]
            if name == 'weight' and '.sources.' in path:
                lowest = 1e-9  # of a share of nothing no batch is made
            if value < lowest or (highest is not None and value > highest):
                allowed = f'{lowest} or more' if highest is None else f'{lowest} to {highest}'
                raise ConfigError(f'config field {path} is {value!r}; allowed: {allowed}')
        elif name == 'pattern':
            _check_pattern(path, value)
    choose('audio.sample_rate', config['audio']['sample_rate'], (16000,))
    for axis, size in config['compute']['mesh'].items():
        if size != -1 and not 1 <= size < 2**31:
            raise ConfigError(
                f'config field compute.mesh.{axis} is {size}; allowed: 1 or more, -1: what is left'
            )


def _fields(node: Mapping[str, Any], field: str) -> Iterator[tuple[str, str, Any]]:
    """(path, name, value) of every field that has no checks elsewhere."""
    for name, value in node.items():
        path = f'{field}.{name}' if field else name
        if isinstance(value, Mapping):
            if name not in ELSEWHERE:
                yield from _fields(value, path)
        else:
            yield path, name, value


def check_words(path: str, value: Any) -> None:
    """Checks a list of words.

    Raises:
      ConfigError: it is no list, or an entry is no word.
    """
    if isinstance(value, str) or not all(isinstance(word, str) and word for word in value):
        raise ConfigError(f'config field {path} is {in_short(value)}; it must be a list of names')


def check_keeping(field: str, stage: Mapping[str, Any]) -> None:
    """Checks what a training stage keeps, and when it goes back.

    Raises:
      ConfigError: a value that cannot be, or fields that contradict each other.
    """
    try:
        GuardSettings(**stage['divergence'])
    except ValueError as error:
        raise ConfigError(f'config field {field}.{error}') from error
    for name, least in (('keep', 1), ('keep_every', 0), ('keep_best', 0)):
        if stage[name] < least:
            raise ConfigError(
                f'config field {field}.{name} is {stage[name]}; allowed: {least}, ...'
            )
    choose(f'{field}.export', stage['export'], ('last', 'best'))
    if stage['keep_best'] and not (stage['dev'] and stage['eval_every']):
        raise ConfigError(
            f'config field {field}.keep_best is {stage["keep_best"]}, but the stage is not scored'
            ' while it trains; set its dev and eval_every'
        )
    if stage['export'] == 'best' and not stage['keep_best']:
        raise ConfigError(f"config field {field}.export is 'best'; set keep_best to 1 or more")


def _check_pattern(path: str, value: str) -> None:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f'config field {path} is {in_short(value)}, which is no regular expression: {error}'
        ) from error


def check_selection(name: str, selections: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Checks the fields of a selection; returns the names of those that it excludes.

    Raises:
      ConfigError: a value that cannot be, or selections that exclude each other.
    """
    field = f'selections.{name}'
    spec = merge(field, SELECTION, selections[name])
    if spec['exclude'] is not None:
        if not isinstance(spec['exclude'], tuple):
            raise ConfigError(
                f'config field {field}.exclude is {in_short(spec["exclude"])}; it must be a list'
            )
        check_words(f'{field}.exclude', spec['exclude'])
    try:
        resolve_selection({**spec, 'corpus': spec['corpus'] or '-', 'exclude': None})
    except ConfigError as error:
        told = str(error).replace('selection.', f'{field}.')
        raise ConfigError(f'config field {told}') from error
    _refuse_circle(name, selections, ())
    return spec['exclude'] or ()


def _refuse_circle(name: str, selections: Mapping[str, Any], above: tuple[str, ...]) -> None:
    if name in above:
        circle = ' -> '.join((*above[above.index(name) :], name))
        raise ConfigError(
            f'config field selections.{name}.exclude leads back to itself: {circle}; a selection'
            ' cannot leave out what is left of itself'
        )
    excluded = selections.get(name, {}).get('exclude') or ()
    for other in excluded if isinstance(excluded, tuple) else ():
        if isinstance(other, str):
            _refuse_circle(other, selections, (*above, name))


def check_texts(field: str, source: Mapping[str, Any]) -> None:
    """Checks where a source of text comes from.

    Raises:
      ConfigError: not from exactly one of a selection and files.
    """
    if isinstance(source['texts'], str):
        raise ConfigError(f'config field {field}.texts is {source["texts"]!r}; it must be a list')
    if bool(source['selection']) == bool(source['texts']):
        raise ConfigError(
            f'config field {field}: give either a selection, whose transcripts are read, or texts'
            f' (files); given are selection={source["selection"]!r}, texts={source["texts"]!r}'
        )


def without(names: Collection[str], fields: Any) -> Any:
    """`fields` without those called `names`, at any depth."""
    if not isinstance(fields, Mapping):
        return fields
    return {k: without(names, v) for k, v in fields.items() if k not in names}
