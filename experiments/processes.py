"""A pool of processes of one thread each, which Ctrl-C ends at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from typing import Any

import torch
from tqdm import tqdm


@contextlib.contextmanager
def pool_of(
    workers: int, prepare: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[Pool]:
    """While entered, a pool; at the exit, for whatever reason, its processes end.

    Ctrl-C reaches every process of a command. The workers ignore it: one that died of it would
    take its job along, and the pool would wait for that for ever. The parent's exception ends them.

    Args:
        workers: processes.
        prepare: called once in each, before any job.
        arguments: of `prepare`.

    Yields:
        The pool.
    """
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes are born with what holds here
    try:
        pool = multiprocessing.get_context("spawn").Pool(workers, _begin, (prepare, arguments))
    finally:
        signal.signal(signal.SIGINT, former)
    with pool:
        yield pool


def _begin(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a worker that is ended leaves
    if prepare is not None:
        prepare(*arguments)
