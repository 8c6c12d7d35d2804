"""The tone recipe for all tests of faults (see tests/stages/tones.py), and its labels in parts."""

import dataclasses
import pathlib

import pytest
from told import PARTS
from tones import finished, with_teacher  # noqa: F401
from tones import recipe as tone_recipe  # noqa: F401


@pytest.fixture(scope='session')
def recipe(tone_recipe):  # noqa: F811
    """The recipe, with patience for machines on which all of this runs slowly."""
    return dataclasses.replace(tone_recipe, patience=1500.0)


@pytest.fixture(scope='session')
def labelled(recipe, finished, tmp_path_factory) -> pathlib.Path:  # noqa: F811
    """The workdir of one worker that nothing disturbed: labels in six parts."""
    workdir = with_teacher(finished, tmp_path_factory.mktemp('labels') / 'alone')
    ended = recipe.run(workdir, *PARTS, verb='label')
    assert ended.returncode == 0, ended.stderr
    assert 'labels: part 6/6' in ended.stderr and 'audio/s' in ended.stderr
    return workdir
