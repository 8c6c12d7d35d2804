"""How the processes of one run notice that one of them has ended, and end with its reason.

    process 1 ---+
    process 2 ---+--- process 0        one TCP connection each, silent until somebody ends
    process 3 ---+

A killed process leaves its siblings in a collective that never returns, or in an abort whose text
names an RPC.  The operating system closes the connections of a process that dies, however it dies,
so process 0 knows within milliseconds who it was and tells the others; the death of process 0 is
seen by all at once.  A machine that loses its power or its network closes nothing: the kernel's
keep-alive probes give it up after 40 seconds.  A process that ends for a reason of its own (a bad
shard, a full disk) sends that reason first.
"""

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

EXIT_PEER_LOST = 76

# A process that sees another one end waits this long before it ends itself: it may be about to end
# in good order for the same reason, and what JAX has to say about it stands above our last line.
GRACE_SECONDS = 2.0
# Idle seconds, seconds between probes, probes: a silent machine is given up after 15 + 5 x 5 s.
_KEEP_ALIVE = (('TCP_KEEPIDLE', 15), ('TCP_KEEPINTVL', 5), ('TCP_KEEPCNT', 5))

Message = dict[str, Any]


class Peers:
    """The connections of one process; made by `listen` (process 0) and `join` (the others).

    Args:
      process: of this process.
      count: of all processes.
      links: a connection for every process that this one is connected with.
      end: called with an exit code and a line when another process has ended; does not return.
    """

    def __init__(
        self,
        process: int,
        count: int,
        links: dict[int, socket.socket],
        end: Callable[[int, str], None] | None = None,
        grace_seconds: float = GRACE_SECONDS,
    ):
        self.process, self.count = process, count
        self._links, self._end, self._grace = links, end or end_process, grace_seconds
        self._finished = False
        self._verdict, self._all_closed = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name='bigssl-peers', daemon=True).start()

    def tell(self, code: int, reason: str) -> None:
        """Tells the others why this process is about to end, and with which exit code."""
        self._send({'process': self.process, 'code': code, 'reason': reason})
        self._see_off()

    def _see_off(self) -> None:
        """Process 0 ends last: JAX's service is in it, without which the others would abort."""
        if self.process == 0:
            self._all_closed.wait(2 * self._grace)

    def finish(self) -> None:
        """All processes have come to the end: that a connection closes is no news any more."""
        self._finished = True
        self._send({'process': self.process, 'code': 0, 'reason': ''})

    def others_ended(self, seconds: float) -> bool:
        """Waits until it is known that another process has ended; False: not within `seconds`."""
        return self._verdict.wait(seconds)

    def _send(self, message: Message, leave_out: int | None = None) -> None:
        line = json.dumps(message).encode() + b'\n'
        for process, link in self._links.items():
            if process != leave_out:
                try:
                    link.sendall(line)
                except OSError:
                    pass  # it is gone, and `_watch` will say so

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, (process, bytearray()))
            while selector.get_map():
                for key, _ in selector.select():
                    process, received = key.data
                    try:
                        data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    except OSError:
                        data = b''
                    if not data:
                        selector.unregister(key.fileobj)
                        self._ended(process, _lost(process))
                        continue
                    received += data
                    while b'\n' in received:
                        line, _, rest = bytes(received).partition(b'\n')
                        received[:] = rest
                        self._ended(process, json.loads(line))
        self._all_closed.set()

    def _ended(self, sender: int, message: Message) -> None:
        if message['code'] == 0:
            self._finished = True
        if self._finished or self._verdict.is_set():
            return
        self._verdict.set()
        self._send(message, leave_out=sender)
        threading.Thread(target=self._conclude, args=(message,), daemon=True).start()

    def _conclude(self, message: Message) -> None:
        time.sleep(self._grace)
        self._see_off()
        who = f'process {message["process"]} of {self.count}'
        self._end(message['code'], f'{who}{message["reason"]}')


def _lost(process: int) -> Message:
    return {
        'process': process,
        'code': EXIT_PEER_LOST,
        'reason': ' stopped answering (its own log may say why);'
        ' restart with the same command, on any number of processes',
    }


def end_process(code: int, line: str) -> None:
    """Says why on standard error, and ends this process whatever its other threads are doing."""
    print('bigssl: ' + ' '.join(line.split()), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def open_listener(port: int) -> socket.socket:
    """A socket that the other processes can reach on any address of this machine; port 0: any."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(('', port))


def listen(
    listener: socket.socket, count: int, token: str, timeout_seconds: float, **given: Any
) -> Peers:
    """Process 0: waits for the others on `listener`.

    Raises:
      TimeoutError: names the processes that did not come.
    """
    deadline = time.monotonic() + timeout_seconds
    links: dict[int, socket.socket] = {}
    while len(links) < count - 1:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            link, _ = listener.accept()
            link.settimeout(max(0.01, deadline - time.monotonic()))
            hello = json.loads(_read_line(link))
        except TimeoutError:
            absent = [str(i) for i in range(1, count) if i not in links]
            raise TimeoutError(
                f'of {count} processes, {", ".join(absent)} did not come'
                f' within {timeout_seconds:.0f} s'
            ) from None
        except (OSError, ValueError):
            continue  # not one of ours
        if hello.get('token') == token:
            links[hello['process']] = _prepared(link)
    listener.close()
    return Peers(0, count, links, **given)


def join(
    process: int,
    count: int,
    address: tuple[str, int],
    token: str,
    timeout_seconds: float,
    **given: Any,
) -> Peers:
    """Any other process: connects to process 0.

    Raises:
      OSError: it cannot be reached.
    """
    link = socket.create_connection(address, timeout=timeout_seconds)
    link.sendall(json.dumps({'process': process, 'token': token}).encode() + b'\n')
    return Peers(process, count, {0: _prepared(link)}, **given)


def _read_line(link: socket.socket) -> bytes:
    line = b''
    while not line.endswith(b'\n'):
        data = link.recv(1)
        if not data or len(line) > 200:
            raise OSError('not a hello')
        line += data
    return line


def _prepared(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return link
