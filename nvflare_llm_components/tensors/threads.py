"""Threads for work on blocks of a tensor, in each of which torch uses one core.

torch splits an operation over all cores, and wakes its threads for each: on a block that fits into a cache
that costs more than the operation. Here whole runs of operations are split instead.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_here = threading.local()


def side_by_side(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call for each item, as many at once as torch has threads; the results are in the items' order.

    Raises:
        Exception: of the first item whose call raised, when all others have ended.
    """
    if getattr(_here, "is_worker", False):
        return [call(item) for item in items]
    futures = [_workers().submit(call, item) for item in items]
    wait(futures)
    return [future.result() for future in futures]


def in_order(call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results of :func:`side_by_side`, one after the other, as few made ahead as keep all cores busy."""
    if getattr(_here, "is_worker", False):
        yield from map(call, items)
        return
    standing: deque[Future[R]] = deque()
    for item in items:
        standing.append(_workers().submit(call, item))
        if len(standing) > num_workers():
            yield standing.popleft().result()
    while standing:
        yield standing.popleft().result()


def undivided(call: Callable[[], R]) -> R:
    """What a call returns, made with one core; see :func:`side_by_side`."""
    return side_by_side(lambda _: call(), [None])[0]


def num_workers() -> int:
    """Calls that run at once: torch's own number of threads."""
    return torch.get_num_threads()


@cache
def _workers() -> ThreadPoolExecutor:
    number = torch.get_num_threads()
    pool = ThreadPoolExecutor(number, "blocks", initializer=_become_worker)
    all_there = threading.Barrier(number + 1)
    for _ in range(number):
        pool.submit(all_there.wait)
    all_there.wait()
    torch.set_num_threads(number)  # what a worker sets for itself, torch takes for all threads to come
    return pool


def _become_worker() -> None:
    _here.is_worker = True
    torch.get_num_threads()  # until it is asked for, a thread's first operation sets it anew
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork
