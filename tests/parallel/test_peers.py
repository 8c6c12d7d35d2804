"""Processes that notice each other's end, over real connections, some of them real processes."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading

import pytest

from bigssl_jax.parallel import peers

MEMBER = """
import sys, threading, time
from bigssl_jax.parallel import peers
process, count, port = map(int, sys.argv[1:])
link = peers.join(process, count, ('127.0.0.1', port), 'token', 20, grace_seconds=0.2)
print('joined', flush=True)
sys.stdin.readline()
link.tell(2, ': the disk is full')
peers.end_process(2, 'mine')
"""


@pytest.fixture
def team():
    """Process 0 in this process, two more of their own; what each one is ended with."""
    ended: queue.Queue = queue.Queue()
    listener = peers.open_listener(0)
    port = listener.getsockname()[1]
    members = [
        subprocess.Popen(
            [sys.executable, '-c', MEMBER, str(i), '3', str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in (1, 2)
    ]  # fmt: skip
    first = peers.listen(
        listener, 3, 'token', 60, end=lambda *what: ended.put(what), grace_seconds=0.2
    )
    yield first, members, ended
    for member in members:
        member.kill()
        member.communicate()


def last_line(member: subprocess.Popen) -> str:
    return member.communicate(timeout=20)[1].strip().splitlines()[-1]


def test_a_killed_process_ends_the_others_with_one_reason(team):
    first, (killed, other), ended = team
    os.kill(killed.pid, signal.SIGKILL)
    code, line = ended.get(timeout=20)
    assert code == peers.EXIT_PEER_LOST == 76
    assert line.startswith('process 1 of 3 stopped answering')
    assert 'restart with the same command, on any number of processes' in line
    assert last_line(other) == f'bigssl: {line}'
    assert other.returncode == 76
    assert first.others_ended(0)


def test_a_reason_that_is_told_arrives_with_its_exit_code(team):
    _, (one, other), ended = team
    other.stdin.write('\n')
    other.stdin.flush()
    assert ended.get(timeout=20) == (2, 'process 2 of 3: the disk is full')
    assert last_line(one) == 'bigssl: process 2 of 3: the disk is full'
    assert last_line(other) == 'bigssl: mine'
    assert one.returncode == other.returncode == 2


def test_after_the_common_end_a_closed_connection_is_no_news(team):
    first, members, ended = team
    first.finish()
    for member in members:
        member.kill()
        member.wait()
    assert not first.others_ended(0.5)
    assert ended.empty()


def test_strangers_are_not_let_in_and_who_did_not_come_is_named():
    listener = peers.open_listener(0)
    port = listener.getsockname()[1]

    def knock():
        for hello in (b'GET / HTTP/1.1\r\n\n', b'{"process": 1, "token": "wrong"}\n'):
            with socket.create_connection(('127.0.0.1', port), timeout=5) as link:
                link.sendall(hello)
        with socket.create_connection(('127.0.0.1', port), timeout=5) as link:
            link.sendall(b'{"process": 2, "token": "right"}\n')

    threading.Thread(target=knock).start()
    with pytest.raises(TimeoutError, match=r'of 4 processes, 1, 3 did not come within 1 s'):
        peers.listen(listener, 4, 'right', 1.0)
