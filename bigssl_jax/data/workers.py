"""Running many tasks in several processes, with bounded memory and no orphans."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from bigssl_jax.data.errors import DataError


def run_tasks(
    work: Callable[[Any], Any], tasks: Iterable[Any], jobs: int, done: Callable[[Any], None]
) -> None:
    """Calls `done(work(task))` for every task, in any order, at most 2 x `jobs` tasks held.

    `work` and tasks must pickle. With one job all runs in this process. The first exception, of a
    worker or of `done`, ends everything and is raised here.
    """
    if jobs <= 1:
        for task in tasks:
            done(work(task))
        return
    # spawn, not fork: the parent may have JAX's or TensorFlow's threads, which a fork would break.
    context = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_follow_parent)
    try:
        pending: set = set()
        for task in tasks:
            pending.add(pool.submit(work, task))
            if len(pending) >= 2 * jobs:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(future.result())
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                done(future.result())
    except BrokenProcessPool:
        raise DataError(
            'a worker process was killed, most likely for want of memory; '
            'run again with fewer jobs: finished work is kept'
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """A worker ends with its parent, however that died, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait_for_end() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
