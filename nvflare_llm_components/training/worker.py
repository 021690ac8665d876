"""A thread that lives inside one ``trainer.train()`` call and serves requests wherever it is parked."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class TrainingStoppedError(Exception):
    """Unwinds the training thread: the job is over, or its task was aborted."""


class _Leave:
    """Asks the parked thread to go on; the future is done when it parks again, or fails."""

    def __init__(self) -> None:
        self.arrived: Future[None] = Future()


_Request = tuple[Callable[[], Any], Future[Any]] | _Leave


class Worker:
    """Runs ``body`` in a thread of its own, which calls :meth:`park` where it may be interrupted.

    While it is parked, :meth:`call` runs functions in that thread, and :meth:`advance` lets it go on to its
    next park. What is asked of a thread that has ended, or ends before it gets there, fails with
    ``TrainingStoppedError``.
    """

    def __init__(self, body: Callable[[], None]):
        self._body = body
        self._requests: queue.Queue[_Request | None] = queue.Queue()
        self._pending: _Leave | None = None
        self._ended = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="nvflare-llm-training", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs or is parked."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread and wait until it parks for the first time. Raises what ``body`` raised."""
        self._pending = arrival = _Leave()
        self._thread.start()
        arrival.arrived.result()

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the parked thread and return its result, or raise its exception."""
        future: Future[T] = Future()
        self._ask((function, future))
        return future.result()

    def submit(self, function: Callable[[], None]) -> None:
        """Run ``function`` in the parked thread without waiting; later requests wait for it."""
        self._ask((function, Future()))

    def advance(self) -> None:
        """Let the thread go on until it parks again. Raises what ended it, if it ended."""
        request = _Leave()
        self._ask(request)
        request.arrived.result()

    def stop(self, timeout_s: float) -> bool:
        """Unwind the parked thread; returns whether it ended in time."""
        self._requests.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def park(self) -> None:
        """Called by ``body`` in its own thread: serve requests until told to go on.

        Raises:
            TrainingStoppedError: :meth:`stop` was called.
        """
        self._arrive(None)
        while True:
            request = self._requests.get()
            if request is None:
                raise TrainingStoppedError
            if isinstance(request, _Leave):
                self._pending = request
                return
            _answer(*request)

    def _ask(self, request: _Request) -> None:
        with self._lock:
            if self._ended:
                raise TrainingStoppedError
            self._requests.put(request)

    def _refuse_the_rest(self) -> None:
        """Nobody serves the queue any more: whoever waits for an answer would wait for ever."""
        with self._lock:
            self._ended = True
        while not self._requests.empty():
            request = self._requests.get()
            if request:
                future = request.arrived if isinstance(request, _Leave) else request[1]
                future.set_exception(TrainingStoppedError())

    def _arrive(self, error: BaseException | None) -> None:
        pending, self._pending = self._pending, None
        if pending and error:
            pending.arrived.set_exception(error)
        elif pending:
            pending.arrived.set_result(None)

    def _run(self) -> None:
        try:
            self._body()
            self._arrive(RuntimeError("The training ended before its round was complete."))
        except TrainingStoppedError as stopped:
            self._arrive(stopped)
        except BaseException as error:
            # Whatever ended the thread is raised where its result is awaited.
            self._arrive(error)
        finally:
            self._refuse_the_rest()


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
