"""`open_voices` for TensorFlow Datasets: one config per set, on the same functions as `build`.

    from bigssl_jax.data.open_voices import open_voices_dataset_builder  # registers it; imports TF
    builder = tfds.builder('open_voices/queen')
    builder.download_and_prepare()

Audio is stored as the bytes of a 16 kHz mono FLAC file in a string feature (TFDS's own `Audio`
feature takes five bytes a sample). `text` is empty where it is not known (`has_text` False). On
systems without apt, put the `.deb` files into a folder and name it as TFDS's manual folder:

    config = tfds.download.DownloadConfig(manual_dir='debs')
    builder.download_and_prepare(download_config=config)

Packages and decoded files are cached in the download folder. `seen` is known within one set only:
for an experiment over several sets use `open_voices.entries`, which looks over all of them.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.open_voices import build, sets


class Builder(tfds.core.GeneratorBasedBuilder):
    """Recorded speech from Debian packages; see `bigssl_jax.data.open_voices`."""

    name = 'open_voices'
    VERSION = tfds.core.Version(sets.VERSION)
    RELEASE_NOTES = {sets.VERSION: 'First version.'}
    # TFDS's own way to find this file needs importlib_resources, which it does not require.
    code_path = epath.Path(__file__)
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(
            name=speech_set.name, version=sets.VERSION, description=speech_set.description
        )
        for speech_set in sets.ALL_SETS
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        speech_set = sets.find(self.builder_config.name)
        return self.dataset_info_from_configs(
            description=f'{speech_set.description}. Packages: {", ".join(speech_set.packages)}.',
            license=speech_set.licence,
            citation=speech_set.attribution,
            features=tfds.features.FeaturesDict(
                {
                    'id': tfds.features.Text(),
                    'audio': tfds.features.Tensor(shape=(), dtype=np.object_),
                    'text': tfds.features.Text(),
                    'has_text': np.bool_,
                    'speaker': tfds.features.Text(),
                    'language': tfds.features.Text(),
                    'domain': tfds.features.Text(),
                    'group': tfds.features.Text(),
                    'seen': np.bool_,
                    'duration': np.float32,
                    'licence': tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        cache = pathlib.Path(dl_manager.download_dir) / self.name
        manual = getattr(dl_manager, '_manual_dir', None)
        deb_dir = os.fspath(manual) if manual and any(pathlib.Path(manual).glob('*.deb')) else None
        jobs = os.cpu_count() or 1
        found = list(build.entries(self.builder_config.name, cache, deb_dir, jobs))
        splits = sorted({entry.split for entry in found})
        return {
            split: self._generate_examples([e for e in found if e.split == split])
            for split in splits
        }

    def _generate_examples(self, entries: list[Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
        for entry in entries:
            yield (
                entry.id,
                {
                    'id': entry.id,
                    'audio': pathlib.Path(entry.audio).read_bytes(),
                    'text': entry.text or '',
                    'has_text': entry.text is not None,
                    'speaker': entry.speaker,
                    'language': entry.language,
                    'domain': entry.domain,
                    'group': entry.group,
                    'seen': entry.seen,
                    'duration': entry.duration,
                    'licence': entry.licence,
                },
            )
