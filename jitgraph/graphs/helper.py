"""One helper thread for what takes a GPU driver long and needs no Python: instantiating and destroying graphs.

Jobs run one after the other, in the order in which they came. They must be calls that release the GIL, or short: the
engine's thread polls for tokens meanwhile. The thread starts with the first job and is a daemon: it never keeps a
process alive.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Helper(Protocol):
    """Runs jobs elsewhere. A job's exception is a result like any other."""

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Takes a job and returns at once."""

    def close(self) -> None:
        """Runs what was submitted, then ends. May be called more than once."""


class HelperThread:
    """The thread; see the module."""

    def __init__(self, name: str = "jitgraph-graphs") -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Takes a job and returns at once.

        Raises:
            RuntimeError: the helper is closed, or the system gives no thread.
        """
        if self._closed:
            raise RuntimeError("the helper thread is closed")
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            _settle(*item)
            del item  # a waiting thread keeps no graph alive

    def close(self) -> None:
        """Runs what was submitted, then ends the thread. May be called more than once."""
        self._closed = True
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


def _settle(future: Future[T], job: Callable[[], T]) -> None:
    """Runs a job; what comes of it, exceptions of any kind included, goes to its future."""
    try:
        result = job()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
