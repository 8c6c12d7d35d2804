"""Tiny corpora of noise with known lengths and texts, for tests of selections and streams."""

import numpy as np
import pytest

from bigssl_jax.data.corpus import Corpus
from bigssl_jax.data.manifest import Entry
from bigssl_jax.data.prepare import Options, prepare

WORDS = ('time', 'ship', 'queen', 'jungle', 'robot', 'amazon', 'flight', 'pilot', 'rain', 'moon')


@pytest.fixture(scope='session')
def make_corpus(tmp_path_factory):
    """make_corpus(count, name, longest=3.0, **fields) -> directory; equal arguments, equal corpus.

    Row i has id '<name>-i', 0.5 s to `longest` of noise, about a word each half second, speaker
    s0..s3, split train, or test for every tenth row. Fields may override texts by a list.
    """
    made: dict = {}

    def make(count: int, name: str, longest: float = 3.0, texts: tuple = ()) -> str:
        key = (count, name, longest, texts)
        if key not in made:
            random = np.random.default_rng(len(name) + count)
            entries = []
            for i in range(count):
                samples = int(random.uniform(0.5, longest) * 16000)
                words = random.choice(WORDS, max(1, samples // 8000))
                entries.append(
                    Entry(
                        id=f'{name}-{i:04d}',
                        sample_rate=16000,
                        audio=random.integers(-9000, 9000, samples).astype(np.int16),
                        text=texts[i] if i < len(texts) else ' '.join(words),
                        speaker=f's{i % 4}',
                        language='en' if i % 2 else 'nl',
                        split='test' if i % 10 == 9 else 'train',
                        seen=i % 20 == 19,
                    )
                )
            out = tmp_path_factory.mktemp(name) / 'corpus'
            prepare(entries, out, jobs=1, options=Options(shard_size=32), progress=False)
            made[key] = str(out)
        return made[key]

    return make


@pytest.fixture(scope='session')
def corpus(make_corpus) -> Corpus:
    """100 utterances of 0.5 to 3 s in several shards."""
    return Corpus.open(make_corpus(100, 'tiny'))
