"""Threads for work on blocks of a tensor, in each of which torch uses one core.

torch splits an operation over all cores, and wakes its threads for each: on a block of a few megabytes that
costs more than the operation. Here whole runs of operations are split instead. A call that takes long, such
as a look at a whole result, holds one of the threads for that time, and those behind it wait.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_MOST_WORKERS = 8  # each has scratch of its own, and memory is no faster with more

_here = threading.local()
_pools: list[ThreadPoolExecutor] = []
_guards = [threading.Lock()]


def side_by_side(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call for each item, as many at once as there are workers; the results are in the items' order.

    The calls are in other threads: what is a thread's own in torch is theirs, but for inference mode.

    Raises:
        Exception: of the first item whose call raised, when all others have ended.
    """
    if getattr(_here, "is_worker", False):
        return [call(item) for item in items]
    futures = deque(_submitted(call, item) for item in items)
    wait(futures)
    results = []
    try:
        while futures:
            results.append(futures.popleft().result())
    finally:
        del futures  # an error's traceback holds this frame: a future in it would hold the error's data
    return results


def in_order(call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results of :func:`side_by_side`, one after the other, as few made ahead as keep all cores busy."""
    if getattr(_here, "is_worker", False):
        yield from map(call, items)
        return
    standing: deque[Future[R]] = deque()
    for item in items:
        standing.append(_submitted(call, item))
        if len(standing) > num_workers():
            yield standing.popleft().result()
    while standing:
        yield standing.popleft().result()


def undivided(call: Callable[[], R]) -> R:
    """What a call returns, made with one core, in another thread; see :func:`side_by_side`."""
    return side_by_side(lambda _: call(), [None])[0]


def num_workers() -> int:
    """Calls that run at once: as many as torch has threads, and no more than eight."""
    return min(torch.get_num_threads(), _MOST_WORKERS)


def _submitted(call: Callable[[T], R], item: T) -> "Future[R]":
    return _workers().submit(_called, call, item, torch.is_inference_mode_enabled())


def _called(call: Callable[[T], R], item: T, is_inference: bool) -> R:
    with torch.inference_mode(is_inference):
        return call(item)


def _workers() -> ThreadPoolExecutor:
    with _guards[0]:
        if not _pools:
            _pools.append(_started())
        return _pools[0]


def _started() -> ThreadPoolExecutor:
    """All workers at once: what one sets for itself, torch takes for all threads that are new after it."""
    before, number = torch.get_num_threads(), num_workers()
    pool = ThreadPoolExecutor(number, "blocks", initializer=_become_worker)
    all_there = threading.Barrier(number + 1)
    try:
        for _ in range(number):
            pool.submit(all_there.wait)
        all_there.wait()
    except BaseException:
        all_there.abort()  # else those that wait there would hold up the end of the process
        pool.shutdown(wait=False)
        raise
    finally:
        torch.set_num_threads(before)
    return pool


def _become_worker() -> None:
    _here.is_worker = True
    torch.get_num_threads()  # until it is asked for, a thread's first operation sets it anew
    torch.set_num_threads(1)


def _forget(*_: Any) -> None:
    """Threads do not survive a fork, nor does a lock that one of them held."""
    _pools.clear()
    _guards[0] = threading.Lock()
    _here.is_worker = False


os.register_at_fork(after_in_child=_forget)
