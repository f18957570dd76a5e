"""Runs pieces of Python beside the event loop, in threads that are ended when they take too long.

Made for chat templates: they are code of whoever made the checkpoint. A thread is ended by an exception raised in it
from outside, which pure Python cannot escape; the sandbox sees to it that no single operation of a template is long. A
thread that had to be ended is never used again, so the exception can hit nothing else.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

_AGAIN_S = 0.1
"""Between two attempts to end a thread: one may fall into a place that swallows it."""
_ATTEMPTS = 50


class TookTooLong(Exception):
    """The time was up."""


class _Ended(BaseException):
    """Raised inside a thread; no ``except Exception`` of the code there stops it."""


class Workers:
    """Threads for short calls, kept for the next one. Used from one event loop at a time."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        weakref.finalize(self, _dismiss, self._idle)

    async def run(self, function: Callable[[], T], timeout_s: float) -> T:
        """The function's result, worked out in a thread.

        Raises:
            TookTooLong: it had not ended after ``timeout_s``; its thread is being ended.
        """
        loop = asyncio.get_running_loop()
        worker = self._idle.pop() if self._idle else _Worker()
        future: asyncio.Future[T] = loop.create_future()
        timer = loop.call_later(timeout_s, _expire, future)
        worker.start_on(function, loop, future)
        try:
            return await future
        finally:
            timer.cancel()
            if worker.busy:
                worker.end(loop)
            else:
                self._idle.append(worker)


def _expire(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TookTooLong())


def _dismiss(idle: list[_Worker]) -> None:
    for worker in idle:
        worker.dismiss()


class _Worker:
    """One thread. ``busy`` belongs to the event loop."""

    def __init__(self) -> None:
        self.busy = False
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="jitgraph-text", daemon=True)
        self._thread.start()

    def start_on(self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop, future: Any) -> None:
        """Gives it a call to make."""
        self.busy = True

        def deliver(result: Any, failed: bool) -> None:
            self.busy = False
            if future.done():
                return
            if failed:
                future.set_exception(result)
            else:
                future.set_result(result)

        self._jobs.put((function, loop, deliver))

    def dismiss(self) -> None:
        """Ends it after what it does now."""
        self._jobs.put(None)

    def end(self, loop: asyncio.AbstractEventLoop, attempts: int = _ATTEMPTS) -> None:
        """Ends it wherever it is, now or as soon as it runs Python again."""
        self.dismiss()
        ident = self._thread.ident
        if attempts <= 0 or ident is None or not self._thread.is_alive():
            return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(_Ended))
        loop.call_later(_AGAIN_S, self.end, loop, attempts - 1)


def _work(jobs: SimpleQueue[Any]) -> None:
    """The thread's own: it keeps nothing of a call once that is over, and no reference to its worker."""
    try:
        while (job := jobs.get()) is not None:
            function, loop, deliver = job
            try:
                result, failed = function(), False
            except BaseException as error:
                result, failed = error, True
            loop.call_soon_threadsafe(deliver, result, failed)
            del job, function, loop, deliver, result
    except (_Ended, RuntimeError):  # ended between two calls, or the loop is closed: nobody waits any more
        return
