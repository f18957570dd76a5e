"""Signs of life from an engine process whose main thread is at one thing for long: a step of a large model on a CPU
takes seconds, and is no hang.

A thread of its own sleeps in the kernel while the main thread's beats put its timer off, so that it costs nothing on
the token path. Where they stay away it beats in their place, and says for how long the main thread has been away: who
listens can tell a long step from a dead process, and decides itself how long is too long. Silence is then left to what
nothing inside a process can tell: that it is stopped, or holds the interpreter.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

from jitgraph.ipc.messages import BEAT_S

LATE_S = 2 * BEAT_S
"""So long after the last beat the thread wakes up, and from then on after each ``BEAT_S``."""
_CLOCK_MONOTONIC = 1
_CLOSE_ON_EXEC = os.O_CLOEXEC


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    @classmethod
    def of(cls, seconds: float) -> _Timespec:
        return cls(int(seconds), int(seconds % 1 * 1e9))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Vigil:
    """One service's. ``beat`` is called in the thread, again and again while nobody calls ``put_off``."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = self._libc.timerfd_create(_CLOCK_MONOTONIC, _CLOSE_ON_EXEC)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "no timer can be made")
        self._next = _Itimerspec(_Timespec.of(BEAT_S), _Timespec.of(LATE_S))
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="jitgraph-vigil", daemon=True)
        self._thread.start()

    def put_off(self) -> None:
        """The main thread lives. A call of the kernel's, about a microsecond."""
        self._libc.timerfd_settime(self._timer, 0, ctypes.byref(self._next), None)

    def _run(self) -> None:
        while True:
            os.read(self._timer, 8)  # in the kernel, without the interpreter's lock
            if self._closed:
                return
            self._beat()

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        soon = _Itimerspec(_Timespec(0, 0), _Timespec(0, 1))
        self._libc.timerfd_settime(self._timer, 0, ctypes.byref(soon), None)
        self._thread.join()
        os.close(self._timer)
