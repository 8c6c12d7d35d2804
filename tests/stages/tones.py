"""Tone speech: a made-up language that a model of some thousand parameters learns in seconds.

    letter   120 ms of a tone with overtones   a e i steady, o rises, u falls
    word     2 or 3 letters, then 60 ms of rest
    speaker  a factor of every frequency, 0.9 to 1.1
    split    speakers of dev and test do not occur in train

The recipe over it (`tone_experiment.py`) runs once per test session, in a process of its own, the
way a user runs it; tests of stages and of faults look at what it left behind.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import soundfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
RATE = 16000
LETTERS = {'a': (400, 400), 'e': (800, 800), 'i': (1600, 1600), 'o': (500, 1500), 'u': (2600, 1000)}
WORDS = ('ae', 'ia', 'uo', 'oi', 'eu', 'aio', 'uea', 'iou', 'oae', 'eio', 'aua', 'iei')
SPLITS = {'train': (140, 5), 'dev': (8, 2), 'test': (12, 2)}  # utterances, speakers


def tone_speech(text: str, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """What a speaker of that pitch factor says: float [S] at 16 kHz, quiet noise beneath."""
    pieces = [np.zeros(int(0.05 * RATE))]
    for word in text.split():
        for letter in word:
            count = int(0.12 * RATE * rng.uniform(0.9, 1.1))
            low, high = LETTERS[letter]
            frequency = pitch * np.linspace(low, high, count)
            fade = np.minimum(1, np.minimum(np.arange(count), np.arange(count)[::-1]) / 160)
            phase = 2 * np.pi * np.cumsum(frequency) / RATE
            overtones = np.arange(1, 7600 // frequency.max() + 1)[:, None]
            pieces.append(0.2 * fade * np.sum(np.sin(overtones * phase) / overtones, axis=0))
        pieces.append(np.zeros(int(0.06 * RATE)))
    sound = np.concatenate(pieces)
    # Rest up to one of two lengths: few shapes, so few programs to compile.
    length = int((1.5 if len(text.split()) == 3 else 1.9) * RATE)
    sound = np.concatenate([sound, np.zeros(length - sound.size)])
    return sound + 0.003 * rng.standard_normal(length)


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
    """Writes 160 wav files and their manifest; returns the manifest."""
    rng = np.random.default_rng(0)
    (folder / 'wav').mkdir(parents=True)
    lines = []
    for split, (count, speakers) in SPLITS.items():
        for number in range(count):
            speaker = number % speakers
            pitch = 0.9 + 0.2 * (speaker + 0.5) / speakers
            text = ' '.join(rng.choice(WORDS, rng.integers(3, 5)))
            name = f'{split}-{number:02d}'
            path = folder / 'wav' / f'{name}.wav'
            soundfile.write(path, tone_speech(text, pitch, rng), RATE, subtype='PCM_16')
            lines.append(
                {
                    'id': name,
                    'audio': f'wav/{name}.wav',
                    'text': text,
                    'speaker': f'{split}-{speaker}',
                    'group': f'scene-{number // 4}',
                    'split': split,
                }
            )
    manifest = folder / 'manifest.jsonl'
    manifest.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return manifest


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The tone experiment as a command, and a place for workdirs."""

    manifest: pathlib.Path
    cache: pathlib.Path
    # Words before the command: `bigssl` then runs where these take it.
    inside: tuple[str, ...] = ()
    patience: float = 280.0  # seconds that `run` waits

    def command(
        self, workdir: pathlib.Path, *words: str, config: str | None = None, verb: str = 'run'
    ) -> list[str]:
        """The words of `bigssl run` (or `label`) on this experiment."""
        config = config or f'{HERE / "tone_experiment.py"}:{self.manifest}'
        return [*self.inside, sys.executable, '-m', 'bigssl_jax', verb,
                '--config', config, '--workdir', str(workdir), *words]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Two devices, and one compilation cache for all runs."""
        return {
            **os.environ,
            'JAX_COMPILATION_CACHE_DIR': str(self.cache),
            'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
        }

    def start(self, workdir: pathlib.Path, *words: str, **given: str) -> subprocess.Popen:
        """Starts the command; output goes to pipes as text."""
        return subprocess.Popen(
            self.command(workdir, *words, **given),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self.environment(),
        )

    def run(self, workdir: pathlib.Path, *words: str, **given: str) -> subprocess.CompletedProcess:
        """Runs the command to its end."""
        process = self.start(workdir, *words, **given)
        try:
            out, err = process.communicate(timeout=self.patience)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def done_files(workdir: pathlib.Path) -> dict[str, dict]:
    """Every finished stage's done.json."""
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(workdir.glob('*/done.json'))}


@contextlib.contextmanager
def shared_by_workers(tmp_path_factory) -> Iterator[pathlib.Path]:
    """A folder that all workers of pytest-xdist have in common, while no other one uses it."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
    with (folder / 'tones.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture(scope='session')
def recipe(tmp_path_factory) -> Recipe:
    """The tone experiment over a corpus written for this session."""
    with shared_by_workers(tmp_path_factory) as folder:
        manifest = folder / 'tones' / 'manifest.jsonl'
        if not manifest.exists():
            write_corpus(folder / 'tones')
    return Recipe(manifest, pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR']) / 'tones')


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that nothing interrupted: its workdir, what it printed, its done.json files."""

    workdir: pathlib.Path
    out: str
    err: str
    done: dict[str, dict]


@pytest.fixture(scope='session')
def finished(recipe, tmp_path_factory) -> Finished:
    """The whole recipe, run once in a process of its own; each worker has a copy of its workdir."""
    workdir = tmp_path_factory.mktemp('runs') / 'unbroken'
    with shared_by_workers(tmp_path_factory) as folder:
        said = folder / 'unbroken.json'
        if not said.exists():
            ended = recipe.run(folder / 'unbroken')
            assert ended.returncode == 0, ended.stderr
            said.write_text(json.dumps([ended.stdout, ended.stderr]))
    shutil.copytree(folder / 'unbroken', workdir)
    out, err = json.loads(said.read_text())
    out = out.replace(str(folder / 'unbroken'), str(workdir))
    return Finished(workdir, out, err, done_files(workdir))


def with_teacher(finished, workdir: pathlib.Path) -> pathlib.Path:
    """A copy of the finished run without its labels and what was made from them."""
    ignored = shutil.ignore_patterns('labels', 'student', 'evaluate', 'report.html')
    return shutil.copytree(finished.workdir, workdir, ignore=ignored)
