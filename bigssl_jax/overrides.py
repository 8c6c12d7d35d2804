"""Fields of a config set on the command line: `--config.stages.teacher.steps=500`.

Of an experiment's config, or of a decoder's where there is no experiment: `--decoder.beam=8`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from bigssl_jax.config import ConfigError, to_dict, unknown_field

# The verbs that have a config, and what it is called.
VERBS = {
    'run': 'config',
    'label': 'config',
    'plan': 'config',
    'sweep': 'config',
    'transcribe': 'decoder',
}

_OVERRIDE = re.compile(r'--(?P<config>config|decoder)\.(?P<path>[^=]+)(?P<value>=.*)?$', re.DOTALL)


def collect_overrides(rest: Sequence[str], verb: str) -> list[tuple[str, str]]:
    """`--config.a.b=c` or `--config.a.b c` as pairs (path, text).

    Raises:
      ValueError: any other word.
    """
    pairs: list[tuple[str, str]] = []
    words = list(rest)
    while words:
        word = words.pop(0)
        match = _OVERRIDE.match(word)
        if not match or match['config'] != VERBS.get(verb):
            raise ValueError(f'unknown argument {word!r}; `bigssl {verb} --help` lists them')
        if match['value'] is not None:
            pairs.append((match['path'], match['value'][1:]))
        elif words and not words[0].startswith('--'):
            pairs.append((match['path'], words.pop(0)))
        else:
            raise ValueError(f'{word} needs a value: {word}=VALUE')
    return pairs


def apply_overrides(
    config: Any, overrides: Sequence[tuple[str, str]], fields: Mapping[str, Any]
) -> Any:
    """Lays command-line values over a config, each converted to the type its field has.

    The experiment file need not mention a field to have it overridden, so what exists is looked up
    in `fields`; and `config`, not `fields`, is what gets changed, so that defaults which follow
    from other fields (all of `encoder` from `encoder.preset`) still follow from them.

    Args:
      config: the experiment file's `ConfigDict`; it is left as it is.
      overrides: pairs (path such as 'stages.teacher.steps', text of the value).
      fields: the same config with every default filled in.

    Returns:
      A new, locked `ConfigDict`.

    Raises:
      ConfigError: an unknown field (the nearest valid one is named) or a value of another type.
    """
    config = ml_collections.ConfigDict(to_dict(config), type_safe=False)
    for path, _ in overrides:
        _ensure_field(config, path, fields)
    # A private FlagValues: nothing of ours may depend on, or show in, the process-wide flags.
    words = ['bigssl', *(f'--config.{path}={text}' for path, text in overrides)]
    values = flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dict(
            'config', config, flag_values=values, sys_argv=words
        )
        values(words)
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(str(error).replace('flag --', 'config field ')) from error
    return holder.value


def _ensure_field(config: Any, path: str, fields: Mapping[str, Any]) -> None:
    """Gives `config` the field `path` with its default, so that an override knows its type.

    Raises:
      ConfigError: `fields` has no such field.
    """
    *groups, last = path.split('.')
    seen, known, node = '', fields, config
    for name in (*groups, last):
        if not isinstance(known, Mapping):
            raise ConfigError(f'--config.{path}: {seen} is a single value, it has no fields')
        if name not in known:
            raise unknown_field(seen, name, known)
        known = known[name]
        if node.get(name) is None:
            # None has no type: take whatever literal is given.
            empty = ml_collections.config_dict.placeholder(object)
            plain = dict(known) if name == last and isinstance(known, Mapping) else known
            node[name] = {} if name != last else empty if known is None else plain
        elif isinstance(known, float) and isinstance(node[name], int):
            node[name] = known  # the file says 1 where 1.5 may be given
        node = node[name]
        seen = f'{seen}.{name}' if seen else name
