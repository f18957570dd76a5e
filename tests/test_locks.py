"""The fair lock: exclusion, order, and no lost turn where a waiting thread is interrupted."""

from __future__ import annotations

import threading
import time

import pytest

from jitgraph.locks import FairLock


def test_exclusion_under_contention() -> None:
    lock, total, inside = FairLock(), 0, 0

    def work() -> None:
        nonlocal total, inside
        for _ in range(300):
            with lock:
                inside += 1
                assert inside == 1
                total += 1
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert total == 2400


def test_first_come_first_served() -> None:
    """Waiters get it in the order in which they came, and whoever releases it goes to the end of the queue."""
    lock, order = FairLock(), []

    def wait(name: int) -> None:
        with lock:
            order.append(name)

    with lock:
        threads = []
        for name in range(6):
            threads.append(threading.Thread(target=wait, args=(name,)))
            threads[-1].start()
            while len(lock._waiting) <= name:
                time.sleep(0.001)
    with lock:
        order.append(99)
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4, 5, 99]


def test_an_interrupted_waiter_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FairLock()

    class Interrupted:
        """A turn whose second acquisition is interrupted, as by Ctrl-C."""

        def __init__(self) -> None:
            self.taken = False

        def acquire(self) -> None:
            if self.taken:
                raise KeyboardInterrupt
            self.taken = True

    with lock:
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Lock", Interrupted)
            with pytest.raises(KeyboardInterrupt), lock:
                pass
        assert not lock._waiting
    with lock:
        pass
