"""Runs of operations side by side: each on one core, in order, and nothing about torch is different after."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch

from nvflare_llm_components.tensors import threads
from nvflare_llm_components.tensors.threads import in_order, side_by_side, undivided


@pytest.mark.parametrize("run", [side_by_side, lambda call, items: list(in_order(call, items))])
def test_results_come_in_the_order_of_the_items(run: Callable):
    def late_first(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return number * number

    assert run(late_first, range(20)) == [number * number for number in range(20)]


def test_a_worker_uses_one_core_and_all_other_threads_as_many_as_before():
    before, seen = torch.get_num_threads(), []
    assert set(side_by_side(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert undivided(torch.get_num_threads) == 1
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert [torch.get_num_threads(), *seen] == [before, before]


def test_the_first_error_is_raised_when_all_others_have_ended():
    ended = []

    def fails(number: int) -> None:
        if number % 2:
            raise ValueError(f"number {number}")
        time.sleep(0.02)
        ended.append(number)

    with pytest.raises(ValueError, match="number 1"):
        side_by_side(fails, range(6))
    assert sorted(ended) == [0, 2, 4]


def test_a_call_within_a_call_waits_for_no_other_worker():
    nested = lambda number: sum(side_by_side(lambda item: item, range(number)))  # noqa: E731
    assert side_by_side(nested, range(10)) == [sum(range(number)) for number in range(10)]
    assert side_by_side(lambda n: list(in_order(lambda item: item, range(n))), [3]) == [[0, 1, 2]]


def test_few_results_are_made_ahead():
    begun = []
    for number, _ in enumerate(in_order(begun.append, range(50))):
        assert len(begun) <= number + threads.num_workers() + 1


def test_a_forked_process_gets_workers_of_its_own():
    assert undivided(os.getpid) == os.getpid()
    child = os.fork()
    if not child:
        os._exit(0 if undivided(os.getpid) == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_first_users_at_once_get_all_workers_and_leave_torch_as_it_was():
    """In a process of its own: pools are made once."""
    code = """if True:
        import threading, torch
        from nvflare_llm_components.tensors.threads import side_by_side
        torch.set_num_threads(3)
        together, seen = threading.Barrier(8), []
        def use():
            together.wait()
            seen.append(tuple(side_by_side(lambda _: torch.get_num_threads(), range(3))))
        users = [threading.Thread(target=use) for _ in range(8)]
        [user.start() for user in users]; [user.join() for user in users]
        fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        fresh.start(); fresh.join()
        assert seen == [(1, 1, 1)] * 8 + [3], seen
        assert sum(thread.name.startswith("blocks") for thread in threading.enumerate()) == 3
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_thread_that_cannot_be_started_is_an_error_and_no_hang():
    code = """if True:
        import threading, torch
        from nvflare_llm_components.tensors.threads import undivided
        torch.set_num_threads(2)
        start, count = threading.Thread.start, []
        def fails(thread):
            count.append(thread)
            if len(count) == 2:
                raise RuntimeError("can't start new thread")
            start(thread)
        threading.Thread.start = fails
        try:
            undivided(int)
        except RuntimeError:
            threading.Thread.start = start
        assert undivided(lambda: 5) == 5 and torch.get_num_threads() == 2
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_a_failed_call_held_is_free_at_once():
    class Data:
        pass

    data = Data()
    held = weakref.ref(data)

    def fails(data: Data) -> None:
        raise ValueError("refused")

    gc.disable()
    try:
        with pytest.raises(ValueError, match="refused") as caught:
            side_by_side(fails, [data])
        del data, caught
        undivided(int)  # the worker lets go of its last call with the next one
        assert held() is None
    finally:
        gc.enable()


def test_inference_mode_is_that_of_the_caller():
    with torch.inference_mode():
        made = undivided(lambda: torch.zeros(3))
        undivided(lambda: made.add_(1))
    assert made.is_inference()
    assert not undivided(lambda: torch.zeros(3)).is_inference()
