"""Mixed load for a long time: known requests, hang-ups, nonsense, readers that dawdle, and engines that are killed.

Each answer that claims to be whole must be the right one. An error is explained by an engine that was killed during the
request; any other is not. Memory, pages and latency at the end must be those of the beginning.
"""

from __future__ import annotations

import asyncio
import random
import socket
import statistics
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from jitgraph.server.client import EngineClient
from reliability_parts.answers import Outcome, ask
from reliability_parts.cancels import pages_missing
from reliability_parts.lab import Lab, Part, quantile
from reliability_parts.served import Served, rss_mib

ASKERS = 6
LEAST_BETWEEN_KILLS_S = 210.0
"""The supervisor's budget is three restarts in ten minutes."""
SETTLED_S = 3.0
"""After an engine is ready again, what may still go wrong because of the one before."""
SAMPLE_S = 2.0
PROBE_S = 0.25
LEAST_LIFE_SAMPLES = 20
SPOIL = (
    b"{", b"[]", b'{"model": "x"}', b'{"prompt": [1], "max_tokens": -1}', b'{"prompt": "a", "temperature": 1e9}',
    b'{"prompt": [99999999]}', b'{"prompt": "a", "n": 100000}', b'{"prompt": "a", "logprobs": 1000000000}',
)  # fmt: skip


@dataclass
class Findings:
    """What happened."""

    requests: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    explained: int = 0
    """Errors while an engine was being replaced."""
    unexplained: list[str] = field(default_factory=list)
    hang_ups: int = 0
    nonsense: int = 0
    slow: int = 0
    troubles: list[list[float]] = field(default_factory=list)
    """From each kill to a moment after the next engine was ready; open while that has not come."""
    probes: list[tuple[float, float]] = field(default_factory=list)
    """Time, and seconds to the first token."""
    memory: dict[int, list[float]] = field(default_factory=dict)
    """MiB by process, in the order of time."""
    gpu: list[float] = field(default_factory=list)
    """MiB in use on the GPU, in the order of time."""

    def in_trouble(self, begun_s: float, ended_s: float) -> bool:
        """Whether an engine was being replaced at that time."""
        return any(begun_s <= last and ended_s >= first for first, last in self.troubles)


class Soak:
    """One soak."""

    def __init__(self, lab: Lab, server: Served, client: httpx.AsyncClient) -> None:
        self.lab = lab
        self.server = server
        self.client = client
        self.found = Findings()
        self.begun_s = time.monotonic()
        self.seconds = lab.minutes * 60
        self.url = urlsplit(server.url())

    @property
    def left_s(self) -> float:
        """Time that remains."""
        return self.begun_s + self.seconds - time.monotonic()

    async def run(self) -> int:
        """Everything at once until the time is up; pages that are missing then."""
        askers = [self._ask_on(seed) for seed in range(ASKERS)]
        others = (self._hang_up_on(), self._spoil_on(), self._dawdle_on(), self._kill_on(), self._probe_on())
        await asyncio.gather(*askers, *others, self._sample_on())
        while self.server.process.poll() is None and (await self.client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.1)
        engine = await EngineClient.connect(self.server.socket_path)
        missing = await pages_missing(engine)
        await engine.close()
        return missing

    def _judge(self, outcome: Outcome | str, begun_s: float, right: bool) -> None:
        found = self.found
        found.requests += 1
        if isinstance(outcome, Outcome) and outcome.complete:
            if right:
                found.right += 1
            else:
                found.wrong.append(f"{outcome.text!r:.200}")
        elif found.in_trouble(begun_s, time.monotonic()):
            found.explained += 1
        else:
            found.unexplained.append(str(outcome)[:300])

    async def _ask_on(self, seed: int) -> None:
        rng = random.Random(seed)
        known = self.lab.answers()
        while self.left_s > 0:
            one, begun_s = rng.choice(known), time.monotonic()
            try:
                outcome = await ask(self.client, one.body(self.lab.model, rng.random() < 0.7))
            except httpx.HTTPError as error:
                self._judge(repr(error), begun_s, False)
                continue
            self._judge(outcome, begun_s, outcome.right(one))
            if outcome.error is not None:
                await asyncio.sleep(0.1)

    async def _probe_on(self) -> None:
        """The same small request again and again, for its time to the first token."""
        probe = self.lab.probe()
        body = probe.body(self.lab.model, True)
        while self.left_s > 0:
            begun_s = time.monotonic()
            try:
                outcome = await ask(self.client, body)
            except httpx.HTTPError as error:
                self._judge(repr(error), begun_s, False)
                continue
            self._judge(outcome, begun_s, outcome.right(probe))
            if outcome.ttft_s is not None and not self.found.in_trouble(begun_s, time.monotonic()):
                self.found.probes.append((begun_s, outcome.ttft_s))
            await asyncio.sleep(PROBE_S)

    async def _hang_up_on(self) -> None:
        rng = random.Random(1)
        body = {"model": self.lab.model, "prompt": [7] * 40, "max_tokens": 500, "stream": True, "ignore_eos": True}
        while self.left_s > 0:
            try:
                async with self.client.stream("POST", "/v1/completions", json=body) as response:
                    count = rng.choice((0, 1, 5, 40))
                    async for _ in response.aiter_lines():
                        count -= 1
                        if count < 0:
                            break
            except httpx.HTTPError as error:
                self._judge(repr(error), time.monotonic(), False)
            self.found.hang_ups += 1
            await asyncio.sleep(rng.random() * 0.2)

    async def _spoil_on(self) -> None:
        rng = random.Random(2)
        headers = {"content-type": "application/json"}
        while self.left_s > 0:
            begun_s = time.monotonic()
            response = await self.client.post("/v1/completions", content=rng.choice(SPOIL), headers=headers)
            self.found.nonsense += 1
            if not 400 <= response.status_code < 500 and not self.found.in_trouble(begun_s, time.monotonic()):
                self.found.unexplained.append(f"nonsense got {response.status_code}")
            await asyncio.sleep(0.05)

    async def _dawdle_on(self) -> None:
        """Reads a long answer a few bytes at a time, through a small window, and gives up."""
        body = b'{"model": "%s", "prompt": [9, 9], "max_tokens": 1500, "stream": true, "ignore_eos": true}'
        body = body % self.lab.model.encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        while self.left_s > 0:
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                slow.setblocking(False)
                await loop.sock_connect(slow, (self.url.hostname, self.url.port))
                await loop.sock_sendall(slow, head + body)
                for _ in range(40):
                    if self.left_s <= 0 or not await loop.sock_recv(slow, 64):
                        break
                    await asyncio.sleep(0.2)
            self.found.slow += 1

    async def _kill_on(self) -> None:
        between_s = max(LEAST_BETWEEN_KILLS_S, self.seconds / 7) if self.seconds > 300 else self.seconds / 2
        while self.left_s > between_s * 0.9:
            await asyncio.sleep(min(between_s, self.left_s))
            if self.left_s < between_s * 0.3:
                return
            trouble = [time.monotonic() - 0.5, float("inf")]
            self.found.troubles.append(trouble)
            lives = len(self.server.engine_pids)
            self.server.kill_engine()
            while len(self.server.engine_pids) == lives and self.server.process.poll() is None:
                await asyncio.sleep(0.05)
            trouble[1] = time.monotonic() + SETTLED_S

    async def _sample_on(self) -> None:
        told_s = time.monotonic()
        while self.left_s > 0:
            for pid in (self.server.pid, *self.server.engine_pids[-1:]):
                mib = rss_mib(pid)
                if mib:
                    self.found.memory.setdefault(pid, []).append(mib)
            used = self.lab.gpu_used_mib()
            if used is not None:
                self.found.gpu.append(used)
            if time.monotonic() - told_s > 30:
                told_s, found = time.monotonic(), self.found
                self.lab.say(
                    f"  {self.left_s / 60:.1f} min left: {found.requests} requests, {len(found.wrong)} wrong, "
                    f"{len(found.unexplained)} unexplained, {len(found.troubles)} kills"
                )
            await asyncio.sleep(SAMPLE_S)


def growth_mib(samples: list[float]) -> float:
    """From the second tenth of a process's life, when it has warmed up, to the last tenth."""
    tenth = max(1, len(samples) // 10)
    return statistics.median(samples[-tenth:]) - statistics.median(samples[tenth : 2 * tenth] or samples)


def p99_drift(probes: list[tuple[float, float]]) -> float:
    """By how much the 99th percentile of the last third is above that of the first, as a fraction."""
    third = len(probes) // 3
    if third < 2:
        return float("inf")
    first, last = ([ttft for _, ttft in part] for part in (probes[:third], probes[-third:]))
    return quantile(last, 0.99) / quantile(first, 0.99) - 1


def soak(lab: Lab) -> Part:
    """The whole of it."""
    lab.answers()
    before_mib = lab.gpu_used_mib()
    with lab.serve() as server:
        run: list[Soak] = []
        missing = -1

        async def act(client: httpx.AsyncClient) -> None:
            nonlocal missing
            run.append(Soak(lab, server, client))
            missing = await run[0].run()

        lab.with_client(server.url(), act)
        if server.process.poll() is not None:
            run[0].found.unexplained.append("the front-end has ended")
    found = run[0].found
    grown = {pid: growth_mib(samples) for pid, samples in found.memory.items() if len(samples) >= LEAST_LIFE_SAMPLES}
    figures = {
        "soak_s": run[0].seconds,
        "soak_requests": found.requests + found.hang_ups + found.nonsense + found.slow,
        "soak_right": found.right,
        "soak_wrong": len(found.wrong),
        "soak_unexplained": len(found.unexplained),
        "soak_restarts": len(found.troubles),
        "soak_pages_leaked": missing,
        "soak_rss_growth_mib": max(grown.values(), default=float("inf")),
        "soak_p99_drift": p99_drift(found.probes),
    }
    figures |= {f"soak_{name}": value for name, value in lab.gpu_held(before_mib).items()}
    if found.gpu:
        figures["soak_gpu_growth_mib"] = growth_mib(found.gpu)
    about = {
        "wrong": found.wrong[:20],
        "unexplained": found.unexplained[:20],
        "explained_errors": found.explained,
        "hang_ups": found.hang_ups,
        "nonsense": found.nonsense,
        "slow_readers": found.slow,
        "growth_mib": [round(value, 2) for value in grown.values()],
        "probes": len(found.probes),
        "gpu_used_mib": [round(value) for value in found.gpu[:: max(1, len(found.gpu) // 60)]],
    }
    return Part(figures, about)
