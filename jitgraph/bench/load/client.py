"""One streaming request over HTTP, with the time of each token. Lives on the load generator's event loop.

The body is made before the clock starts, and connections are opened before the first request, so that a latency holds
neither. A connection that a cancelled answer has closed is opened again within the next request's latency.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from jitgraph.bench.load.plan import Ask
from jitgraph.bench.load.prompt import chat_text
from jitgraph.bench.load.records import CANCELLED, ERROR, OK, Record
from jitgraph.bench.load.sse import Answer, Events, Failed, error_message
from jitgraph.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """The server and how it is asked."""

    url: str
    """Without a path."""
    model: str
    chat: bool = False
    timeout_s: float = 600.0
    """For a whole request."""
    running_count: bool = True
    """Ask for the count of tokens in each event."""


def base_url(text: str) -> str:
    """The server's address without ``/v1``.

    Raises:
        ConfigError: it is no address over HTTP.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{text} is no address ({error}): give one like http://127.0.0.1:8000") from None
    if url.scheme not in ("http", "https") or not url.host or url.query:
        raise ConfigError(f"{text} is no address of a server: give one like http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1")


def make_client(concurrency: int, key: str | None) -> httpx.AsyncClient:
    """A client with a connection for each stream. Proxies that the environment names are not used."""
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency, keepalive_expiry=None)
    return httpx.AsyncClient(headers=headers, limits=limits, timeout=None, trust_env=False)


async def open_connections(client: httpx.AsyncClient, url: str, concurrency: int) -> str:
    """Opens all connections and returns the first model that the server names.

    Raises:
        ConfigError: the server does not answer or names no model.
    """
    try:
        replies = await asyncio.gather(*(client.get(f"{url}/v1/models", timeout=30.0) for _ in range(concurrency)))
    except httpx.HTTPError as error:
        raise ConfigError(f"{url} does not answer ({error or type(error).__name__}): is the server there?") from None
    try:
        if replies[0].status_code == 200:
            return str(replies[0].json()["data"][0]["id"])
        problem = f"with {replies[0].status_code}: {error_message(_json(replies[0]))}"
    except (ValueError, LookupError, TypeError):
        problem = "without a model"
    raise ConfigError(f"{url}/v1/models answers {problem}; is it ready, and does it speak OpenAI's interface?")


def body_of(ask: Ask, target: Target) -> dict[str, Any]:
    """The request's JSON: as many tokens as asked, whatever the model would stop at."""
    usage = {"include_usage": True, **({"continuous_usage_stats": True} if target.running_count else {})}
    body: dict[str, Any] = {"model": target.model, "max_tokens": ask.output_tokens, "ignore_eos": True}
    body |= {"stream": True, "stream_options": usage}
    if target.chat:
        return {**body, "messages": [{"role": "user", "content": chat_text(ask.prompt)}]}
    return {**body, "prompt": list(ask.prompt)}


async def send(client: httpx.AsyncClient, target: Target, ask: Ask, begun_ns: int) -> Record:
    """Sends one request and reads its answer; ``begun_ns``: the start of the run. Failures are in the record."""
    path = "/v1/chat/completions" if target.chat else "/v1/completions"
    request = client.build_request("POST", target.url + path, content=json.dumps(body_of(ask, target)))
    answer = Answer()
    kind = message = None
    outcome = OK
    sent_ns = time.perf_counter_ns()

    async def exchange() -> None:
        # Stamped here: between wait_for and its task other streams may have their turn.
        nonlocal sent_ns
        sent_ns = time.perf_counter_ns()
        await _read(client, request, answer, sent_ns, ask.cancel_after)

    try:
        await asyncio.wait_for(exchange(), target.timeout_s)
        if not answer.done:
            outcome = CANCELLED
    except Failed as failure:
        outcome, kind, message = ERROR, failure.kind, str(failure)
    except (asyncio.TimeoutError, httpx.TimeoutException):
        outcome, kind, message = ERROR, "timeout", f"no whole answer within {target.timeout_s:g} s"
    except httpx.ConnectError as error:
        outcome, kind, message = ERROR, "not connected", str(error)
    except httpx.HTTPError as error:
        outcome, kind, message = ERROR, "connection lost", str(error) or type(error).__name__
    return Record(
        index=ask.index,
        outcome=outcome,
        due_ms=None if ask.due_s is None else ask.due_s * 1e3,
        send_ms=(sent_ns - begun_ns) / 1e6,
        end_ms=(time.perf_counter_ns() - begun_ns) / 1e6,
        prompt_tokens=len(ask.prompt) if answer.prompt_tokens is None else answer.prompt_tokens,
        asked_tokens=ask.output_tokens,
        tokens=answer.tokens,
        token_ms=tuple(answer.token_ms),
        finish_reason=answer.finish_reason,
        cancel_after=ask.cancel_after,
        error=kind,
        message=message,
    )


async def _read(
    client: httpx.AsyncClient, request: httpx.Request, answer: Answer, sent_ns: int, cancel_after: int | None
) -> None:
    """Reads the stream to its end, or until ``cancel_after`` tokens have come.

    Raises:
        Failed: the server refused, broke off or sent no token.
    """
    events = Events()
    response = await client.send(request, stream=True)
    try:
        if response.status_code != 200:
            await response.aread()
            raise Failed(f"http {response.status_code}", error_message(_json(response)))
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise Failed("not a stream", f"content type {response.headers.get('content-type')}")
        async for piece in response.aiter_raw():
            at_ms = (time.perf_counter_ns() - sent_ns) / 1e6
            for data in events.feed(piece):
                answer.take(data, at_ms)
            if cancel_after is not None and len(answer.token_ms) >= cancel_after and not answer.done:
                return
    finally:
        await response.aclose()
    if not answer.done:
        raise Failed("cut off", f"the stream ended without [DONE] after {len(answer.token_ms)} tokens")
    if not answer.token_ms:
        raise Failed("no tokens", "the answer is empty")


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text
