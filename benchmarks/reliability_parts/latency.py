"""What the way between the two processes adds: to a first token, and to every further one. All times are one clock's
(``time.perf_counter_ns`` is the same for all processes of a Linux host).
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

import uvloop

from jitgraph.server.client import EngineClient
from jitgraph.server.runtime_folder import RuntimeFolder
from jitgraph.server.spawn import spawn_engine
from jitgraph.types import SamplingParams
from reliability_parts.lab import Lab, Part, quantile

REQUESTS = 1000
WARM_UP = 50
PAUSE_S = 0.02
PROMPT_TOKENS = 20
TOKENS = 16


def ipc(lab: Lab) -> Part:
    """One request after another straight to an engine process, from a loop like the server's."""
    count = 60 if lab.quick else REQUESTS
    command = (sys.executable, "-m", "jitgraph", "engine", lab.model, *lab.engine_options)
    with RuntimeFolder() as folder:
        process = spawn_engine(command, folder.path / "engine.sock", lambda line: None)
        try:
            first_us, token_us = uvloop.run(_measure(folder.path / "engine.sock", count))
        finally:
            process.end()
    figures = {
        "ipc_ttft_us_p50": quantile(first_us, 0.5),
        "ipc_ttft_us_p99": quantile(first_us, 0.99),
        "ipc_token_us_p50": quantile(token_us, 0.5),
        "ipc_token_us_p99": quantile(token_us, 0.99),
    }
    return Part(figures, {"requests": count, "pause_ms": PAUSE_S * 1e3, "prompt_tokens": PROMPT_TOKENS})


async def _measure(path: Path, count: int) -> tuple[list[float], list[float]]:
    client = await EngineClient.connect(path)
    rng = random.Random(0)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    firsts: list[float] = []
    tokens: list[float] = []
    for number in range(WARM_UP + count):
        ids = [rng.randrange(3, client.facts.vocab_size) for _ in range(PROMPT_TOKENS)]
        await asyncio.sleep(PAUSE_S)
        handed_ns, first = time.perf_counter_ns(), True
        async for record in client.submit(ids, params):
            here_ns = time.perf_counter_ns()
            if number >= WARM_UP and record.token_ids:
                back_us = (here_ns - record.times_ns[-1]) / 1e3
                if first:
                    firsts.append((record.received_ns - handed_ns) / 1e3 + back_us)
                else:
                    tokens.append(back_us)
            first = False
    await client.close()
    return firsts, tokens
