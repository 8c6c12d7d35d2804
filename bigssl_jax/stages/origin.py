"""What a corpus was made from: recorded in its corpus.json, compared before it is used again.

Corpora in a shared `data_dir` are found by name, and a name says little: another experiment's
'speech' may be another manifest, or the same one with other splits.  The origin holds what the
corpus follows from, cheap to find out without reading audio:

    manifest      hash of the file's bytes, and by what missing splits were drawn
    tfds          name of the builder
    open_voices   version, sets, speakers, and all sets of the experiment: a test line is marked
                  `seen` when any of them has its text in training
    synthetic     how much speech was synthesised in place of open_voices, and the seed
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from bigssl_jax.config import ConfigError
from bigssl_jax.data.corpus import read_corpus_json
from bigssl_jax.data.manifest import manifest_origin
from bigssl_jax.data.open_voices.sets import VERSION
from bigssl_jax.data.tfds_entries import tfds_origin
from bigssl_jax.stages.artefacts import differences

Corpora = Mapping[str, Mapping[str, Any]]


def origin_of(corpora: Corpora, name: str) -> dict[str, Any]:
    """The origin that the config asks for; plain JSON.

    Raises:
      DataError: a manifest that cannot be read.
      ConfigError: not exactly one kind of source.
    """
    fields = corpora[name]
    kinds = [kind for kind in ('manifest', 'tfds', 'open_voices') if fields[kind]]
    if len(kinds) != 1:
        raise ConfigError(
            f'corpora.{name}: give exactly one of manifest, tfds and open_voices, not'
            f' {" and ".join(kinds) or "none"}'
        )
    if fields['manifest']:
        return manifest_origin(fields['manifest'], fields['split_by'])
    if fields['tfds']:
        return tfds_origin(fields['tfds'])
    return {
        'kind': 'open_voices',
        'version': VERSION,
        'sets': list(fields['open_voices']),
        'speakers': sorted(fields['speakers']),
        'all_sets': sorted(open_voices_sets(corpora)),
    }


def synthetic_origin(corpora: Corpora, name: str) -> dict[str, Any]:
    """The origin of speech synthesised for the open_voices corpus `name`; plain JSON."""
    voices = sorted(other for other, fields in corpora.items() if fields['open_voices'])
    hours = corpora[name]['fallback_synthetic_hours']
    return {'kind': 'synthetic', 'hours': hours, 'seed': voices.index(name)}


def open_voices_sets(corpora: Corpora) -> list[str]:
    """All open_voices sets of the experiment, in the order of its corpora."""
    return list(dict.fromkeys(s for fields in corpora.values() for s in fields['open_voices']))


def check_origin(corpora: Corpora, name: str, directory: pathlib.Path) -> None:
    """Refuses the prepared corpus in `directory` unless it is the one that the config asks for.

    Raises:
      ConfigError: it was made from something else; the message names the difference.
    """
    info = read_corpus_json(str(directory))
    assert info is not None, directory
    recorded = info.get('origin')
    wanted = origin_of(corpora, name)
    if recorded and recorded.get('kind') == 'synthetic' and wanted['kind'] == 'open_voices':
        wanted = synthetic_origin(corpora, name)
    if recorded is None:
        reason = 'it does not record what it was made from'
    elif changed := differences(recorded, json.loads(json.dumps(wanted))):
        reason = '; '.join(changed)
    else:
        return
    raise ConfigError(
        f'{directory} holds another corpus than corpora.{name} asks for ({reason}); rename'
        f' corpora.{name}, choose another data_dir, or delete that folder to prepare it anew'
    )
