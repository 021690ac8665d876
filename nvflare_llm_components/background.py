"""Work that is begun before its result is asked for."""

import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from nvflare_llm_components.memory import give_back

T = TypeVar("T")


def begin(make: Callable[[], T]) -> Future[T]:
    """Call ``make`` in a thread; the future returns what it returns, and raises what it raises.

    Nobody may ask for a long time, so that an exception keeps its traceback, but nothing in memory.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="nvflare-llm-background")
    future = pool.submit(_run, make)
    pool.shutdown(wait=False)
    return future


def _run(make: Callable[[], T]) -> T:
    try:
        return make()
    except Exception as error:
        _clear_frames(error)
        give_back()
        raise


def _clear_frames(error: BaseException | None) -> None:
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
