"""What every part shares: the model, known answers, a server, a client, the GPU's memory, and how progress is told."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from jitgraph.server.runtime_folder import RuntimeFolder
from reliability_parts.answers import CONTEXT_TOKENS, Known, known_answers
from reliability_parts.served import Served

KNOWN = 48
CONNECTIONS = 64
FREED_S = 5.0


class Part(NamedTuple):
    """What a part found."""

    figures: dict[str, Any]
    about: dict[str, Any]
    """Conditions, and what the figures leave out."""


class Lab:
    """One run's model, device and scale."""

    def __init__(
        self,
        model: str,
        weights: str,
        device: str,
        say: Callable[[str], None],
        minutes: float,
        frames: int,
        cancels: int,
        quick: bool,
        ipc_record: Path,
    ) -> None:
        self.model = model
        self.weights = weights
        self.device = device
        self.say = say
        self.minutes = minutes
        self.frames = frames
        self.cancels = cancels
        self.quick = quick
        self.ipc_record = ipc_record
        self._known: tuple[Known, list[Known]] | None = None

    def answers(self) -> list[Known]:
        """Requests with known answers, worked out at the first call."""
        return self._all_known()[1]

    def probe(self) -> Known:
        """A small greedy request with a known answer, to be asked again and again."""
        return self._all_known()[0]

    def _all_known(self) -> tuple[Known, list[Known]]:
        if self._known is None:
            count = 12 if self.quick else KNOWN
            self.say(f"  {count} answers of LLM({self.model!r}) to compare with")
            self._known = known_answers(self.model, self.weights, self.device, count)
            gc.collect()  # the engine's parts know each other
        return self._known

    def gpu_used_mib(self) -> float | None:
        """Memory in use on the GPU, whoever uses it, but for what this process could give back; None on the CPU."""
        if not self.device.startswith("cuda"):
            return None
        import torch

        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free) / 2**20

    def gpu_held(self, before_mib: float | None) -> dict[str, float]:
        """What a server that is gone has left in use on the GPU since ``before_mib``, as a figure; none on the CPU. The
        driver takes memory back a moment after a process is gone."""
        if before_mib is None:
            return {}
        deadline = time.monotonic() + FREED_S
        while (held := (self.gpu_used_mib() or 0.0) - before_mib) > 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        return {"gpu_held_mib": held}

    def serve(self, *options: str) -> Served:
        """A server that is being started; answers to compare with are there before it has anything to do."""
        self.answers()
        return Served(self.model, *self.engine_options, "--batch-invariant", "--request-log", "none", *options)

    def serve_fast(self) -> Served:
        """A server whose answers are not compared: sums may come out in any order."""
        return Served(self.model, *self.engine_options, "--request-log", "none")

    @property
    def engine_options(self) -> tuple[str, ...]:
        """What `jitgraph serve` and `jitgraph engine` are both given."""
        return ("--device", self.device, "--weights", self.weights, "--max-model-len", str(CONTEXT_TOKENS))

    def with_client(self, url: str, act: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        """Runs ``act`` with a client of the server."""

        async def main() -> None:
            limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
            async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(120.0), limits=limits) as client:
                await act(client)

        asyncio.run(main())

    @staticmethod
    def next_start_cleans(folder: Path) -> list[str]:
        """What the next server's start leaves of a dead one's files."""
        RuntimeFolder(folder).remove()
        return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def quantile(values: Sequence[float], share: float) -> float:
    """Between the nearest two values; infinite where there are none."""
    return float(np.quantile(np.asarray(values), share)) if values else float("inf")
