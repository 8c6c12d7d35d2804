"""A file's lock: one holder at a time, who waits when asked to, also across processes."""

import os
import subprocess
import sys

import pytest

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.folder import file_lock


def test_a_second_holder_is_refused_and_the_first_one_named(tmp_path):
    path = str(tmp_path / '.lock')
    with (
        file_lock(path),
        pytest.raises(DataError, match=f'{tmp_path}: .*process {os.getpid()} on'),
        file_lock(path),
    ):
        pass
    with file_lock(path):  # free again
        pass


def test_who_waits_gets_it_when_the_holder_ends(tmp_path):
    path = str(tmp_path / '.lock')
    code = (
        'import sys\nfrom bigssl_jax.data.folder import file_lock\n'
        f'with file_lock({path!r}):\n    print("held", flush=True)\n    sys.stdin.read()\n'
    )
    holder = subprocess.Popen(
        [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == 'held\n'
    asked = []

    def wait(name: str) -> bool:
        asked.append(name)
        holder.communicate()  # it ends
        return True

    with file_lock(path, wait):
        pass
    assert [f'process {holder.pid} ' in name for name in asked] == [True]


def test_who_gives_up_waiting_is_told_why(tmp_path):
    path = str(tmp_path / '.lock')
    answers = [True, True, False]
    with (
        file_lock(path),
        pytest.raises(DataError, match='another process is at work'),
        file_lock(path, lambda name: answers.pop(0)),
    ):
        pass
    assert answers == []


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    with pytest.raises(DataError, match='cannot be written to'), file_lock(str(tmp_path / 'a/b')):
        pass
