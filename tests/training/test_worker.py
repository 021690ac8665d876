"""Whoever asks the training thread gets an answer, also where the thread has ended."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nvflare_llm_components.training.worker import TrainingStoppedError, Worker

WAIT_S = 10


def test_what_waits_while_the_thread_ends_is_refused():
    going_on, may_end = threading.Event(), threading.Event()

    def body() -> None:
        worker.park()
        going_on.set()
        may_end.wait(WAIT_S)
        raise KeyError("broken")

    worker = Worker(body)
    worker.start()
    with ThreadPoolExecutor() as others:
        advance = others.submit(worker.advance)
        going_on.wait(WAIT_S)
        call = others.submit(worker.call, bool)
        while worker._requests.empty():
            pass
        may_end.set()
        with pytest.raises(KeyError, match="broken"):
            advance.result(WAIT_S)
        with pytest.raises(TrainingStoppedError):
            call.result(WAIT_S)


@pytest.mark.parametrize("name", ["call", "submit"])
def test_a_thread_that_has_ended_refuses(name):
    worker = Worker(lambda: worker.park())
    worker.start()
    assert worker.stop(WAIT_S)
    with pytest.raises(TrainingStoppedError):
        getattr(worker, name)(bool)
    with pytest.raises(TrainingStoppedError):
        worker.advance()
    assert worker.stop(WAIT_S)
