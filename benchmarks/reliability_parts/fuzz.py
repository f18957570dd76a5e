"""Broken bytes everywhere: frames to the readers of the protocol, frames to a live engine, requests to a live server.

A crash is an exception that is not the documented one, an engine that ends, an answer that turns wrong, a page that is
lost, or a status of 500.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from contextlib import suppress
from typing import Any

import httpx

from jitgraph.ipc.frames import encode
from jitgraph.ipc.messages import PROTOCOL, Hello
from jitgraph.server.client import EngineClient
from reliability_parts.answers import CONTEXT_TOKENS, ask
from reliability_parts.cancels import pages_missing
from reliability_parts.frames import broken_stream, fuzz_frames
from reliability_parts.lab import Lab, Part
from reliability_parts.wire_values import loose_value

CHUNK = 20_000
LIVE_SHARE = 100
"""One in so many frames goes to a live engine."""
HTTP_REQUESTS = 2000
SIZED_SHARE = 0.05
"""That part of the requests is of unusual size."""
_FIELDS = (
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stream", "stop", "seed", "echo",
    "logprobs", "logit_bias", "presence_penalty", "frequency_penalty", "stream_options", "ignore_eos", "min_tokens",
    "stop_token_ids", "response_format", "suffix", "best_of", "unknown",
)  # fmt: skip


def fuzz(lab: Lab) -> Part:
    """All three."""
    faults: list[str] = []
    seed = int.from_bytes(os.urandom(4), "little")
    crashes, frames, slowest_ms = 0, 0, 0.0
    while frames < lab.frames:
        found = fuzz_frames(min(CHUNK, lab.frames - frames), seed + frames)
        frames += found.frames
        crashes += found.crash_count
        faults += found.crashes[: max(0, 20 - len(faults))]
        slowest_ms = max(slowest_ms, found.slowest_ms)
        lab.say(f"  {frames} of {lab.frames} frames, {crashes} crashes")
    live, requests = 0, 0
    with lab.serve() as server:

        async def act(client: httpx.AsyncClient) -> None:
            nonlocal live, requests
            engine = await EngineClient.connect(server.socket_path)
            live = await _fuzz_engine(lab, server.socket_path, client, seed, faults)
            lab.say(f"  {live} frames to a live engine, {len(faults)} faults")
            requests = await _fuzz_http(lab, client, seed, faults)
            lab.say(f"  {requests} requests to a live server, {len(faults)} faults")
            missing = await pages_missing(engine)
            if missing:
                faults.append(f"{missing} pages are missing")
            await engine.close()

        lab.with_client(server.url(), act)
        if len(server.engine_pids) != 1:
            faults.append(f"{len(server.engine_pids) - 1} engines have ended")
    figures = {
        "ipc_frames_fuzzed": frames + live,
        "http_requests_fuzzed": requests,
        "fuzz_crashes": max(crashes, len(faults)),
        "fuzz_slowest_ms": slowest_ms,
    }
    return Part(figures, {"seed": seed, "faults": faults})


async def _fuzz_engine(lab: Lab, path: Any, client: httpx.AsyncClient, seed: int, faults: list[str]) -> int:
    """Broken streams on connections of their own, some after a proper greeting; answers of others stay right."""
    rng = random.Random(seed)
    count = lab.frames // LIVE_SHARE
    known = lab.answers()
    for number in range(count):
        reader, writer = await asyncio.open_unix_connection(str(path))
        greeting = encode(Hello(PROTOCOL, "fuzz")) if rng.random() < 0.7 else b""
        writer.write(greeting + broken_stream(rng))
        if rng.random() < 0.3:
            writer.write_eof()
        with suppress(asyncio.TimeoutError, ConnectionError):
            await asyncio.wait_for(reader.read(100), rng.choice((0.001, 0.02)))
        writer.transport.abort()
        if number % 50 == 0:
            one = known[number // 50 % len(known)]
            outcome = await ask(client, one.body(lab.model, True))
            if not (outcome.complete and outcome.right(one)):
                faults.append(f"after {number} broken streams: {outcome.text!r}, {outcome.error}")
    return count


async def _fuzz_http(lab: Lab, client: httpx.AsyncClient, seed: int, faults: list[str]) -> int:
    rng = random.Random(seed)
    count = 100 if lab.quick else HTTP_REQUESTS
    for _ in range(count):
        body = _broken_body(rng, lab.model)
        route = rng.choice(("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"))
        response = await client.post(route, content=body, headers={"content-type": "application/json"})
        if response.status_code >= 500:
            faults.append(f"{response.status_code} for {route} {body[:300]!r}")
    return count


def _broken_body(rng: random.Random, model: str) -> bytes:
    body: dict[str, Any] = {"model": model, "prompt": [5, 6], "max_tokens": 2, "tokens": [5]}
    body["messages"] = [{"role": "user", "content": "Hi"}]
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice((*_FIELDS, "messages", "tokens", "tools", "tool_choice"))
        body[name] = loose_value(rng)
    if rng.random() < SIZED_SHARE:
        body |= _sized(rng)
    try:
        text = json.dumps(body, default=repr).encode("utf-8", "replace")
    except ValueError:
        text = b"{"
    if rng.random() < 0.3:
        at = rng.randrange(len(text))
        text = text[:at] + rng.randbytes(rng.randrange(4)) + text[at + rng.randrange(3) :]
    return text


def _sized(rng: random.Random) -> dict[str, Any]:
    """Much of what may be much: a long text or prompt, many prompts, log-probabilities of all their tokens."""
    ids = [5] * rng.choice((100, CONTEXT_TOKENS - 1, CONTEXT_TOKENS, 50_000))
    many = [[5] * rng.randrange(1, 300) for _ in range(rng.choice((2, 32, 33)))]
    prompt = rng.choice(("a b " * rng.choice((1000, 100_000)), ids, many))
    scores = {"echo": True, "logprobs": rng.randrange(21)} if rng.random() < 0.5 else {}
    return {"prompt": prompt, "max_tokens": 1, **scores}
