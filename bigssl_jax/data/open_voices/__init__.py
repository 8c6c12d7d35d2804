"""Real recorded speech from Debian packages: fifteen hours, fifteen languages, free licences.

    from bigssl_jax.data import open_voices
    for entry in open_voices.entries('queen', cache_dir='~/.cache/bigssl'): ...
    open_voices.write_manifest(['queen', 'ast_en'], 'corpora/voices', '~/.cache/bigssl', jobs=2)

One module per package format yields `Utterance`s (encoded bytes, text, speaker, scene); `build`
decodes them to 16 kHz and makes manifest entries; `open_voices_dataset_builder` is the same for
TensorFlow Datasets and is the only module here that imports TensorFlow. `../SOURCES.md` says whose
voices these are and under which licences.
"""

from bigssl_jax.data.open_voices.build import entries, write_entries, write_manifest
from bigssl_jax.data.open_voices.sets import SETS, VERSION, SpeechSet
from bigssl_jax.data.open_voices.utterance import Utterance

__all__ = [
    'SETS',
    'VERSION',
    'SpeechSet',
    'Utterance',
    'entries',
    'write_entries',
    'write_manifest',
]
