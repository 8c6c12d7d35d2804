"""The tone recipe for all tests of stages (see tones.py)."""

from tones import finished, recipe  # noqa: F401
