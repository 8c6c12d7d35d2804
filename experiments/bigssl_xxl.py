"""TBD"""

import pathlib

import ml_collections

from bigssl_jax import config as config_lib


def get_config(argument: str = '') -> ml_collections.ConfigDict:
    """The config; `argument`: variant=supervised|p|ps|nst, objective=wav2vec2|best_rq."""
    shared = pathlib.Path(__file__).with_name('bigssl.py')
    return config_lib.load(f'{shared}:size=xxl' + (f',{argument}' if argument else ''))
