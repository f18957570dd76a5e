"""An engine process without a model: the real service, its sockets and its books, around an engine that computes
nothing.

``python benchmarks/ipc_parts/echo.py --socket PATH [--token-us N]``. The first token of a request is there as soon as
the engine is asked for it, each further one ``--token-us`` later. What is measured around it is the channel alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = str(Path(__file__).resolve().parents[2])
VOCABULARY = 2048


class Load(NamedTuple):
    """How busy it is."""

    running: int
    waiting: int
    free_pages: int
    total_pages: int
    steps: int


class Echo:
    """Engine and report in one: gives the prompt's ids back, over and over, to one request after the other."""

    def __init__(self, token_ns: int) -> None:
        self._token_ns = token_ns
        self._waiting: deque[Any] = deque()
        self._done = self._due_ns = self.steps = 0

    busy = property(lambda self: bool(self._waiting))
    idle_work = capturing = False

    def work_while_idle(self) -> bool:
        return False

    def fire(self, ids: tuple[int, ...], params: Any, *_: Any) -> object:
        return None if self._waiting else self

    def rehearse(self) -> None:
        pass

    def book(self, request: Any, shot: object) -> None:
        self.enqueue(request)

    def validate(self, request: Any) -> None:
        pass

    def enqueue(self, request: Any) -> None:
        self._waiting.append(request)

    def cancel(self, request_id: int) -> None:
        if self._waiting and self._waiting[0].request_id == request_id:
            self._done = 0
        self._waiting = deque(one for one in self._waiting if one.request_id != request_id)

    def launch(self) -> None:
        pass

    def early_token(self, rehearse: Any = None) -> None:
        """Its books take no time: nothing goes ahead of them."""

    def step(self) -> list[Any]:
        from jitgraph.types import FinishReason, TokenChunk

        request, done = self._waiting[0], self._done
        while done and time.perf_counter_ns() < self._due_ns:
            pass  # as an engine that polls for the device's tokens
        now = time.perf_counter_ns()
        self.steps += 1
        self._done, self._due_ns = done + 1, now + self._token_ns
        ids, last = request.prompt_token_ids, done + 1 == request.params.max_tokens
        if last:
            self._waiting.popleft()
            self._done = 0
        reason = FinishReason.LENGTH if last else None
        return [TokenChunk(request.request_id, ids[done % len(ids)], now, None, reason)]

    def load(self) -> Load:
        return Load(min(1, len(self._waiting)), max(0, len(self._waiting) - 1), 1, 1, self.steps)

    def begun(self) -> set[int]:
        return {one.request_id for one in self._waiting}

    def counters(self) -> dict[str, Any]:
        return {"steps": self.steps}


def main() -> int:
    """Serves until SIGTERM."""
    sys.path.insert(0, ROOT)
    from jitgraph.engine.service import Service, ServiceOptions
    from jitgraph.engine.service_hub import Hub
    from jitgraph.ipc.listener import Listener
    from jitgraph.ipc.messages import EngineFacts, Ready
    from jitgraph.types import SamplingParams

    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--token-us", type=float, default=0.0)
    parser.add_argument("--spin-us", type=float, default=0.0)
    options = parser.parse_args()
    plain = SamplingParams()
    facts = EngineFacts(
        os.getpid(), "echo", None, VOCABULARY, 4096, 8, (1,), plain, "cpu", "float32", "echo", emulated=True
    )
    echo = Echo(int(options.token_us * 1e3))
    how = ServiceOptions(spin_s=options.spin_us / 1e6)
    service = Service(echo, echo, Hub(Listener(options.socket)), Ready(facts, {"start": 0.0}, {}), how, None)

    def end(_: int, __: FrameType | None) -> None:
        service.drain(0.0)

    signal.signal(signal.SIGTERM, end)
    gc.collect()
    gc.freeze()
    gc.disable()
    service.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
