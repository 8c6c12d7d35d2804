"""Writes the resolved text of every experiment: `python tests/golden/regenerate.py`

What an experiment will run follows from its file and from every default. The texts are committed,
so that a change of either shows in the diff, and tests/test_config.py compares.
"""

import json
import pathlib

from bigssl_jax import config as config_lib
from bigssl_jax.stages import schema

HERE = pathlib.Path(__file__).parent
EXPERIMENTS = HERE.parent.parent / 'experiments'


def resolved(path: pathlib.Path) -> str:
    """The canonical text of an experiment file's config without an argument."""
    text = config_lib.to_json(schema.resolve(config_lib.load(str(path))))
    return json.dumps(json.loads(text), indent=1, sort_keys=True) + '\n'


if __name__ == '__main__':
    for experiment in sorted(EXPERIMENTS.glob('*.py')):
        golden = HERE / f'{experiment.stem}.json'
        golden.write_text(resolved(experiment))
        print(f'wrote {golden}')
