"""A server of OpenAI's interface that sends tokens on a fixed schedule: a known truth for load generators.

Token *i* of an answer leaves ``ttft_s + i * gap_s`` after its request was read, each at an absolute time, so that
lateness does not add up. HTTP is written by hand on asyncio: between the timer and the socket there is nothing.
Everything is owned by one event loop, in a thread of its own (``running``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MODEL = "fixed-schedule"
TOKEN = " the"
"""One token in the vocabularies that load generators count with."""


@dataclass
class Schedule:
    """When tokens leave, and what goes wrong on the way."""

    ttft_s: float = 0.1
    gap_s: float = 0.02
    burst: int = 1
    """Tokens in an event; the event leaves when its first token would."""
    status: int = 200
    die_after: int | None = None
    """Tokens after which the connection is closed without an end."""
    fail_after: int | None = None
    """Tokens after which the stream reports an error."""
    counts: bool = True
    """Tell the number of tokens: in each event where that was asked for, else at the end."""
    content_type: str = "text/event-stream"
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests so far."""
    headers: list[dict[str, str]] = field(default_factory=list)
    left: int = 0
    """Answers whose reader went away."""


class FixedServer:
    """The server; ``url`` once it runs."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.url = ""

    async def start(self) -> asyncio.Server:
        """Listens at a free port of the loopback interface."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._request(reader, writer):
                pass
        writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; False ends the connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        begun = time.perf_counter()
        path = head[0].split()[1]
        if not path.endswith("/completions"):
            # Whatever else is asked (models, health, metrics) is answered with the model.
            _write_json(writer, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
            return True
        document = json.loads(body)
        self.schedule.asked.append(document)
        self.schedule.headers.append(headers)
        if self.schedule.status != 200:
            _write_json(writer, self.schedule.status, {"error": {"message": "as the schedule wants it", "code": None}})
            return True
        try:
            return await self._answer(writer, document, "chat" in path, begun)
        except ConnectionError:
            self.schedule.left += 1
            return False

    async def _answer(self, writer: asyncio.StreamWriter, asked: dict[str, Any], chat: bool, begun: float) -> bool:
        schedule = self.schedule
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {schedule.content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        wanted = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        options = asked.get("stream_options") or {}
        prompt = asked.get("prompt")
        usage = {"prompt_tokens": len(prompt) if isinstance(prompt, list) else 8}
        for done in range(0, wanted, schedule.burst):
            count = min(schedule.burst, wanted - done)
            await asyncio.sleep(max(0.0, begun + schedule.ttft_s + done * schedule.gap_s - time.perf_counter()))
            if schedule.die_after is not None and done >= schedule.die_after:
                return False
            if schedule.fail_after is not None and done >= schedule.fail_after:
                _write_event(writer, {"error": {"message": "the engine is gone", "code": "engine_error"}})
                writer.write(b"0\r\n\r\n")
                return True
            text = TOKEN * count
            last = "length" if done + count == wanted else None
            part: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            event: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": last, **part}]}
            if schedule.counts and options.get("continuous_usage_stats"):
                event["usage"] = {**usage, "completion_tokens": done + count}
            _write_event(writer, _named(event, chat))
            await writer.drain()
        if schedule.counts and options.get("include_usage"):
            total = usage["prompt_tokens"] + wanted
            end = {"choices": [], "usage": {**usage, "completion_tokens": wanted, "total_tokens": total}}
            _write_event(writer, _named(end, chat))
        _write_event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


@contextlib.contextmanager
def running(schedule: Schedule) -> Iterator[FixedServer]:
    """The server in a thread, until the block ends."""
    fixed = FixedServer(schedule)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(fixed.start(), loop).result(10)
    try:
        yield fixed
    finally:
        loop.call_soon_threadsafe(server.close)
        asyncio.run_coroutine_threadsafe(_end_all(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _end_all() -> None:
    """Ends the connections that clients keep open."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _named(event: dict[str, Any], chat: bool) -> dict[str, Any]:
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": "1", "object": kind, "created": 0, "model": MODEL, **event}


def _write_event(writer: asyncio.StreamWriter, document: dict[str, Any] | str) -> None:
    data = document if isinstance(document, str) else json.dumps(document)
    piece = f"data: {data}\n\n".encode()
    writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")


def _write_json(writer: asyncio.StreamWriter, status: int, document: Any) -> None:
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 {status} As Wanted\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
