"""Ten thousand requests, taken back at every moment of their lives: the pool of pages must be exactly full after.

Most go straight to the engine's socket, as a front-end's would; some are HTTP clients that hang up.
"""

from __future__ import annotations

import asyncio
import random
import time

import httpx

from jitgraph.server.client import EngineClient, EngineStream
from jitgraph.types import SamplingParams
from reliability_parts.lab import Lab, Part

AT_ONCE = 12
HANG_UPS = 300
QUIET_S = 60.0


class Tally:
    """What became of the requests."""

    def __init__(self) -> None:
        self.cancelled = self.finished = self.hang_ups = 0
        self.late: list[int] = []
        """For each: tokens that the engine made after the cancel was sent."""


def cancels(lab: Lab) -> Part:
    """Cancels, hang-ups, and the pages after them."""
    tally, leaked = Tally(), -1
    with lab.serve_fast() as server:
        url = server.url()

        async def act(client: httpx.AsyncClient) -> None:
            nonlocal leaked
            engine = await EngineClient.connect(server.socket_path)
            workers = [_cancel_many(lab, engine, tally, seed) for seed in range(AT_ONCE)]
            await asyncio.gather(*workers, _hang_up_many(lab, client, tally))
            leaked = await pages_missing(engine)
            await engine.close()

        lab.with_client(url, act)
    figures = {
        "cancels": tally.cancelled,
        "cancels_by_hanging_up": tally.hang_ups,
        "pages_leaked": leaked,
        "tokens_after_cancel_most": max(tally.late, default=-1),
    }
    return Part(figures, {"finished_before_their_cancel": tally.finished})


async def _cancel_many(lab: Lab, engine: EngineClient, tally: Tally, seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = engine.facts.vocab_size
    while tally.cancelled < lab.cancels:
        ids = [rng.randrange(3, vocabulary) for _ in range(rng.choice((1, 4, 20, 90, 300)))]
        params = SamplingParams(max_tokens=rng.choice((8, 64, 500)), ignore_eos=True)
        stream = engine.submit(ids, params)
        await _cancel_one(stream, rng, tally)
        if tally.cancelled % 2000 == 0:
            lab.say(f"  {tally.cancelled} of {lab.cancels} cancelled")


async def _cancel_one(stream: EngineStream, rng: random.Random, tally: Tally) -> None:
    """At once, after a moment, or after some tokens."""
    after = rng.choice((0, 0, 1, 2, 7))
    if rng.random() < 0.3:
        await asyncio.sleep(rng.random() * 0.02)
    sent_ns, seen, late = 0, 0, 0
    if after == 0:
        stream.cancel()
        sent_ns = time.perf_counter_ns()
    async for record in stream:
        seen += len(record.token_ids)
        late += sum(1 for at_ns in record.times_ns if sent_ns and at_ns > sent_ns)
        if record.finish_reason is not None:
            if record.finish_reason == "cancelled":
                tally.cancelled += 1
                tally.late.append(late)
            else:
                tally.finished += 1
        elif not sent_ns and seen >= after:
            stream.cancel()
            sent_ns = time.perf_counter_ns()


async def _hang_up_many(lab: Lab, client: httpx.AsyncClient, tally: Tally) -> None:
    rng = random.Random(99)
    for _ in range(10 if lab.quick else HANG_UPS):
        body = {"model": lab.model, "prompt": [rng.randrange(3, 200)] * 30, "max_tokens": 800, "stream": True}
        async with client.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as response:
            lines = 0
            async for _ in response.aiter_lines():
                lines += 1
                if lines > rng.choice((0, 1, 6)):
                    break  # and the connection is closed
        tally.hang_ups += 1


async def pages_missing(engine: EngineClient) -> int:
    """Pages that are not in the pool although nothing runs; -1 where something still runs after a minute."""
    deadline, since_ns = time.monotonic() + QUIET_S, time.perf_counter_ns()
    while time.monotonic() < deadline:
        beat = engine.last_beat
        if beat is not None and beat.now_ns > since_ns and beat.running + beat.waiting == 0:
            return beat.total_pages - beat.free_pages
        await asyncio.sleep(0.05)
    return -1
