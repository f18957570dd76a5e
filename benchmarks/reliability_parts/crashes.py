"""What must happen when a process is killed or stopped: the engine under eight streams, the engine by SIGSTOP, and the
front-end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import httpx

from reliability_parts.answers import Known, Outcome, ask
from reliability_parts.lab import Lab, Part
from reliability_parts.served import Served, as_json, is_there, wait_for

STREAMS = 8
LONG_TOKENS = 1900
"""Tokens that keep a stream busy for longer than anything here takes."""
RECOVERY_S = 300.0
POLL_S = 0.01


def kill(lab: Lab) -> Part:
    """SIGKILL of the engine under eight streams, and again once it is back."""
    faults: list[str] = []
    errors_s: list[float] = []
    recoveries_s: list[float] = []
    rounds = 1 if lab.quick else 2
    with lab.serve() as server:

        async def act(client: httpx.AsyncClient) -> None:
            for number in range(rounds):
                lab.say(f"  round {number + 1} of {rounds}")
                await _kill_once(lab, server, client, faults, errors_s, recoveries_s)

        lab.with_client(server.url(), act)
        if server.process.poll() is not None:
            faults.append("the front-end has ended")
        pids = server.engine_pids
    if len(pids) != rounds + 1:
        faults.append(f"{len(pids)} engines instead of {rounds + 1}")
    figures = {
        "kill_error_s": max(errors_s, default=float("inf")),
        "recovery_s": max(recoveries_s, default=float("inf")),
        "kill_rounds": rounds,
        "kill_faults": len(faults),
    }
    return Part(figures, {"faults": faults, "errors_s": errors_s, "recoveries_s": recoveries_s})


async def _kill_once(
    lab: Lab, server: Served, client: httpx.AsyncClient, faults: list[str], errors_s: list[float],
    recoveries_s: list[float],
) -> None:  # fmt: skip
    streams = await _long_streams(lab, client)
    server.kill_engine()
    killed_s = time.monotonic()
    refused = await _first_refusal(lab, client)
    if refused is None or not refused.well_formed_error or not refused.retry_after_s:
        faults.append(f"a new request got {refused}, not a 503 with Retry-After")
    for outcome in await asyncio.gather(*streams, return_exceptions=True):
        if isinstance(outcome, BaseException):
            faults.append(f"a stream ended with {outcome!r}, not with an error event")
        elif not outcome.well_formed_error:
            faults.append(f"a stream ended without an error event: {outcome.error}, done {outcome.done}")
        else:
            errors_s.append(outcome.ended_s - killed_s)
    await _ready_again(client)
    recoveries_s.append(time.monotonic() - killed_s)
    faults += await _wrong_answers(lab, client)


async def _long_streams(lab: Lab, client: httpx.AsyncClient) -> list[asyncio.Task[Outcome]]:
    """Eight streams, each with a few tokens."""
    begun: list[asyncio.Event] = []
    tasks = []
    for number in range(STREAMS):
        body = {"model": lab.model, "prompt": [number + 5] * 6, "max_tokens": LONG_TOKENS, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        begun.append(asyncio.Event())
        tasks.append(asyncio.create_task(_watched(client, body, begun[-1])))
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), RECOVERY_S)
    return tasks


async def _watched(client: httpx.AsyncClient, body: dict[str, Any], begun: asyncio.Event) -> Outcome:
    """``ask``, and a sign when the first token is there."""
    outcome = Outcome()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        outcome.status = response.status_code
        async for line in response.aiter_lines():
            begun.set()
            if "error" in line:
                outcome.error = (as_json(line) or {}).get("error", outcome.error)
                outcome.ended_s = time.monotonic()
            outcome.done |= line == "data: [DONE]"
    return outcome


async def _first_refusal(lab: Lab, client: httpx.AsyncClient) -> Outcome | None:
    """What new requests get while there is no engine; None where none was refused within the second."""
    body = {"model": lab.model, "prompt": [5], "max_tokens": 1, "stream": False}
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        outcome = await ask(client, body)
        if outcome.status == 503:
            return outcome
    return None


async def _ready_again(client: httpx.AsyncClient) -> None:
    async def poll() -> None:
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(POLL_S)

    await asyncio.wait_for(poll(), RECOVERY_S)


async def _wrong_answers(lab: Lab, client: httpx.AsyncClient) -> list[str]:
    """Asks some known requests, all at once; the answers that are not right."""
    chosen: list[Known] = lab.answers()[:STREAMS]
    outcomes = await asyncio.gather(*(ask(client, one.body(lab.model, True)) for one in chosen))
    pairs = zip(chosen, outcomes, strict=True)
    return [f"wrong: {found.text!r} for {known.text!r}, {found.error}" for known, found in pairs
            if not (found.complete and found.right(known))]  # fmt: skip


def stop(lab: Lab) -> Part:
    """SIGSTOP of the engine: ``/health`` says so, and it is replaced."""
    faults: list[str] = []
    seen_s = replaced_s = float("inf")
    with lab.serve() as server:

        async def act(client: httpx.AsyncClient) -> None:
            nonlocal seen_s, replaced_s
            pid = server.kill_engine(signal.SIGSTOP)
            stopped_s = time.monotonic()
            while (await client.get("/health")).status_code == 200:
                await asyncio.sleep(POLL_S)
            seen_s = time.monotonic() - stopped_s
            lab.say(f"  /health fails after {seen_s:.1f} s")
            while len(server.engine_pids) < 2:
                await asyncio.sleep(POLL_S)
            await _ready_again(client)
            replaced_s = time.monotonic() - stopped_s
            if is_there(pid):
                faults.append("the stopped engine is still there")
            faults.extend(await _wrong_answers(lab, client))

        lab.with_client(server.url(), act)
    figures = {"hang_seen_s": seen_s, "hang_replaced_s": replaced_s, "hang_faults": len(faults)}
    return Part(figures, {"faults": faults})


def frontend_kill(lab: Lab) -> Part:
    """SIGKILL of the front-end under load: the engine goes too, and the next server starts in the same folder."""
    faults: list[str] = []
    killed_s = 0.0
    lab.answers()
    before_mib = lab.gpu_used_mib()
    with lab.serve() as server:

        async def act(client: httpx.AsyncClient) -> None:
            nonlocal killed_s
            streams = await _long_streams(lab, client)
            killed_s = time.monotonic()
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.gather(*streams, return_exceptions=True)

        lab.with_client(server.url(), act)
        engine = server.engine_pids[-1]
        wait_for(lambda: not is_there(engine), 60.0, f"engine process {engine} outlives its front-end")
        orphan_s = time.monotonic() - killed_s
        server.process.wait()
        faults += [f"left over: {one}" for one in lab.next_start_cleans(server.folder)]
    held = {f"frontend_kill_{name}": value for name, value in lab.gpu_held(before_mib).items()}
    return Part({"orphan_s": orphan_s, "frontend_kill_faults": len(faults), **held}, {"faults": faults})
