"""Entries from TensorFlow Datasets: our own `open_voices`, and the speech builders TFDS brings.

    'librispeech/lazy_decode'   a registered builder, name[/config][:version]
    'open_voices/queen'         ours; its module is imported so that it is registered
    '/data/tfds/mine/1.0.0'     a folder of a prepared dataset

Builders name their features as they like; `FEATURES` lists the names understood, the first that a
builder has is taken. Audio is either a TFDS `Audio` feature (samples) or the bytes of a file.
Entries come in the stored order, every split after the other, and are never held all at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.tensorflow_start import tensorflow

FEATURES = {
    'audio': ('audio', 'speech'),
    'id': ('id', 'utterance_id', 'audio_id'),
    'text': ('text', 'transcription', 'transcript', 'sentence', 'raw_transcription'),
    'has_text': ('has_text',),  # False: `text` is '' because it is not known
    'speaker': ('speaker', 'speaker_id', 'client_id'),
    'language': ('language', 'locale', 'lang_id'),
    'domain': ('domain',),
    'group': ('group', 'chapter_id'),
    'split': ('split',),
    'seen': ('seen',),
    'licence': ('licence', 'license'),
    'encoding': ('encoding',),
    'sample_rate': ('sample_rate', 'sampling_rate'),
}


def entries_from_tfds(name: str, data_dir: str | None = None) -> TfdsEntries:
    """The entries of a TFDS dataset, which is built (and so perhaps downloaded) if it is not there.

    Raises DataError for an unknown builder, a failed build, or features that hold no speech.
    """
    tensorflow()
    import tensorflow_datasets as tfds

    if name.split('/')[0].split(':')[0] == 'open_voices':
        from bigssl_jax.data.open_voices import open_voices_dataset_builder  # noqa: F401
    try:
        if os.path.isdir(os.path.expanduser(name)):
            builder = tfds.builder_from_directory(os.path.expanduser(name))
        else:
            builder = tfds.builder(name, data_dir=data_dir)
            builder.download_and_prepare()
    except DataError:
        raise
    except Exception as error:  # TFDS raises what it likes, from KeyError to its own kinds
        reason = str(error).strip().split('\n')[0][:300]
        raise DataError(f'TFDS dataset {name!r} cannot be built: {reason}') from error
    return TfdsEntries(builder, name)


def tfds_origin(name: str) -> dict[str, str]:
    """What a corpus of this dataset was made from, for its corpus.json: plain JSON."""
    return {'kind': 'tfds', 'name': name}


class TfdsEntries:
    """An iterable of entries that can be read again; `identity` names the dataset's version.

    Attributes: `identity` str; `licence`, `source` str for corpus.json.
    """

    def __init__(self, builder: Any, name: str) -> None:
        self._builder = builder
        self.source = f'tfds:{builder.info.full_name}'
        self.attribution = ' '.join((builder.info.citation or '').split())
        self._splits = sorted(builder.info.splits)
        sizes = [
            (split, builder.info.splits[split].num_examples, builder.info.splits[split].num_bytes)
            for split in self._splits
        ]
        self.identity = f'{builder.info.full_name} {sizes}'
        self._length = sum(size for _, size, _ in sizes)
        features = builder.info.features
        self._names = {
            field: next((name for name in names if name in features), None)
            for field, names in FEATURES.items()
        }
        audio = self._names['audio']
        if audio is None:
            raise DataError(
                f'TFDS dataset {name!r} has no feature {" or ".join(FEATURES["audio"])}; '
                f'it has {", ".join(features)}'
            )
        self._audio: str = audio
        # The Audio feature knows the rate of its samples; encoded bytes bring their own.
        self._rate = getattr(features[audio], 'sample_rate', None)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Entry]:
        seen: set[str] = set()
        for split in self._splits:
            for number, example in enumerate(self._whole(split)):
                entry = self._entry(example, split, number)
                if entry.id in seen:
                    raise DataError(f'{self.source}: id {entry.id!r} is used twice; ids are unique')
                seen.add(entry.id)
                yield entry

    def _whole(self, split: str) -> Iterator[dict[str, Any]]:
        """The examples of a split; DataError when its files are gone, cut or changed."""
        examples = self._examples(split)
        count = 0
        while True:
            try:
                example = next(examples, None)
            except DataError:
                raise
            except Exception as error:  # of TensorFlow, Riegeli, TFDS: each has its own kinds
                reason = ' '.join(str(error).split())[-300:] or type(error).__name__
                raise self._damaged(split, reason) from error
            if example is None:
                break
            count += 1
            yield example
        promised = self._builder.info.splits[split].num_examples
        if count != promised:
            raise self._damaged(split, f'{count} examples, dataset_info.json promises {promised}')

    def _damaged(self, split: str, reason: str) -> DataError:
        return DataError(
            f'{self.source}, split {split!r} in {self._builder.data_path}: cannot be read:'
            f' {reason}; copy its files again, or remove that folder and build the dataset anew'
        )

    def _check_array_records(self, split: str) -> None:
        """Refuses a file that is cut or gone: reading one can also give empty records."""
        from array_record.python import array_record_module

        info = self._builder.info.splits[split]
        for path, promised in zip(info.filepaths, info.shard_lengths, strict=True):
            name = os.path.basename(path)
            if not os.path.exists(path):
                raise self._damaged(split, f'{name} is missing')
            reader = array_record_module.ArrayRecordReader(str(path), 'readahead_buffer_size:0')
            found = reader.num_records() if reader.ok() else 0
            reader.close()
            if found != promised:
                raise self._damaged(split, f'{name} holds {found} records, not {promised}')

    def _examples(self, split: str) -> Iterator[dict[str, Any]]:
        if 'array_record' in str(self._builder.info.file_format.value):
            self._check_array_records(split)
            yield from self._builder.as_data_source(split)
            return
        import tensorflow_datasets as tfds

        read = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        dataset = self._builder.as_dataset(split, shuffle_files=False, read_config=read)
        yield from tfds.as_numpy(dataset)

    def _entry(self, example: dict[str, Any], split: str, number: int) -> Entry:
        values = {
            field: _plain(example[name])
            for field, name in self._names.items()
            if name is not None and field != 'audio'
        }
        audio = example[self._audio]
        if not isinstance(audio, bytes):
            rate = self._rate or values.get('sample_rate')
            if not rate:
                raise DataError(f'{self.source}: samples without a sample rate cannot be used')
            audio, values['sample_rate'] = _int16(np.asarray(audio)), int(rate)
        else:
            values.pop('sample_rate', None)  # the file's header knows
        if values.pop('has_text', True) is False:
            values['text'] = None
        key = f'{values.pop("id", "") or f"{split}-{number:08d}"}'
        values['split'] = values.get('split') or split
        if values.get('encoding'):
            values['encoding'] = '.' + values['encoding'].removeprefix('.')
        return Entry(id=key, audio=audio, **_as_entry_fields(values))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode('utf-8', errors='replace')
    return value.item() if isinstance(value, np.generic | np.ndarray) else value


def _as_entry_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that name something (a speaker) become text; what must not be text stays."""
    keep = ('seen', 'sample_rate', 'text')
    return {
        field: value if field in keep else str(value)
        for field, value in values.items()
        if value is not None
    }


def _int16(samples: np.ndarray) -> np.ndarray:
    """TFDS `Audio` samples: int64 within the range of int16, or float in [-1, 1]."""
    samples = samples.mean(axis=-1) if samples.ndim == 2 else samples
    if np.issubdtype(samples.dtype, np.floating) and np.abs(samples).max(initial=0) <= 1:
        samples = samples * 32768.0
    return np.clip(np.rint(samples), -32768, 32767).astype(np.int16)
