"""What the endpoints share: the engine, the model's texts and names, and how each request is begun and ended.

Event loop's thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jitgraph.errors import CheckpointError
from jitgraph.ipc.messages import EngineFacts
from jitgraph.server.auth import Caller
from jitgraph.server.backend import Backend, EngineLink
from jitgraph.server.exchange import ClientGone, Exchange, Receive, Scope, Send
from jitgraph.server.openai.errors import ApiError, engine_lost, from_user_error, internal, unavailable
from jitgraph.server.records import RequestRecord
from jitgraph.server.settings import ServerSettings
from jitgraph.server.texts import Texts, TextSource

LOGGER = logging.getLogger("jitgraph.server")

_WHY = {
    "starting": "the engine is starting",
    "restarting": "the engine is being restarted",
    "draining": "the server is shutting down and takes no more requests",
    "stopped": "the server has been shut down",
    "failed": "the engine has failed for good: the server must be started again",
}


@dataclass
class Passage:
    """What the gate knows of a request; in its scope as ``jitgraph``."""

    record: RequestRecord
    caller: Caller
    headers: dict[bytes, bytes]
    left: bool = False
    """The client did not wait for the end."""


@dataclass(frozen=True)
class Serving:
    """All that one request needs."""

    link: EngineLink
    texts: Texts
    model: str
    """The name that answers carry."""

    @property
    def facts(self) -> EngineFacts:
        """What the engine says of itself."""
        return self.link.facts


class Service:
    """The server's state; endpoints keep nothing."""

    def __init__(self, backend: Backend, settings: ServerSettings, texts: TextSource) -> None:
        self.backend = backend
        self.settings = settings
        self.texts = texts
        self.started = int(time.time())
        self.open_requests = 0
        self._open_answers = 0
        self.start_s = 0.0
        """What the first start of an engine took, as it was seen from here; 0 until then."""
        self._lost_at_s = -math.inf
        self._engine_name = ""

    def link(self) -> EngineLink:
        """The engine that takes requests.

        Raises:
            ApiError: 503 with Retry-After; there is none now.
        """
        state, client = self.backend.state, self.backend.client
        if state != "ready" or client is None:
            raise unavailable(self._retry_after_s, _WHY.get(state, "no engine is ready"))
        return client

    @property
    def _retry_after_s(self) -> float:
        """When an engine may be there: just after a crash nothing has been started that could be measured, and it will
        take what it took before."""
        left_s = self._lost_at_s + self.start_s - time.monotonic()
        return max(self.backend.retry_after_s, left_s)

    def lost(self) -> ApiError:
        """An engine ended while it worked on a request."""
        backend = self.backend
        if backend.state in ("draining", "stopped", "failed"):
            return engine_lost(backend.retry_after_s, comes_back=False)
        if backend.client is None and time.monotonic() > self._lost_at_s + self.start_s:
            self._lost_at_s = time.monotonic()
        return engine_lost(backend.retry_after_s if backend.client is not None else self._retry_after_s)

    def names(self, facts: EngineFacts) -> tuple[str, ...]:
        """Names under which the model can be asked for."""
        self._engine_name = facts.model
        return self.settings.served_names or (facts.model,)

    @property
    def model(self) -> str:
        """What a request that names no model asks for; empty before the first engine, where it has no name of ours."""
        client = self.backend.client
        names = self.settings.served_names or ((self._engine_name,) if client is None else self.names(client.facts))
        return names[0]

    async def serving(self, model: str | None) -> Serving:
        """The engine and the texts for a model.

        Raises:
            ApiError: 503 no engine, 404 another model, 500 a checkpoint without a usable tokenizer.
        """
        link = self.link()
        names = self.names(link.facts)
        if model is not None and model not in names:
            raise no_such_model(model, names)
        try:
            return Serving(link, await self.texts.of(link.facts), names[0])
        except CheckpointError as error:
            raise from_user_error(error) from error

    @contextmanager
    def room_for(self, answers: int) -> Iterator[None]:
        """Counts the answers of a request while they are made. Several are let in together or not at all: an engine
        that refuses one of them would have worked on the others for nothing.

        Raises:
            ApiError: 429; there is no room for all of them now.
        """
        most, taken = self.settings.max_answers, self._open_answers
        if answers > 1 and most is not None and taken + answers > most:
            why = f"there is no room for {answers} more answers: {taken} of {most} are being made or wait already"
            raise ApiError(429, why, None, "rate_limit_exceeded", 1.0)
        self._open_answers += answers
        try:
            yield
        finally:
            self._open_answers -= answers

    def endpoint(self, route: str, answer: Callable[[Exchange], Awaitable[None]], work: bool = True) -> Endpoint:
        """An ASGI endpoint; ``work`` counts towards ``max_open_requests``."""
        return Endpoint(self, route, answer, work)


def no_such_model(model: str, names: tuple[str, ...]) -> ApiError:
    """404 for another model than the one there is."""
    served = " or ".join(names)
    return ApiError(404, f"the model {model!r:.200} does not exist here: ask for {served}", "model", "model_not_found")


class Endpoint:
    """One route: whatever happens to a request, it gets an answer and its record an end."""

    def __init__(self, service: Service, route: str, answer: Callable[[Exchange], Awaitable[None]], work: bool) -> None:
        self._service = service
        self._route = route
        self._answer = answer
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        service = self._service
        passage: Passage = scope["jitgraph"]
        record = passage.record
        record.route = self._route
        exchange = Exchange(receive, send, passage.headers, service.settings, passage.caller, record)
        exchange.path_params = scope.get("path_params", {})
        service.open_requests += self._work
        try:
            if self._work and service.open_requests > service.settings.max_open_requests:
                most = service.settings.max_open_requests
                raise ApiError(429, f"{most} requests are being answered already", None, "rate_limit_exceeded", 1.0)
            await self._answer(exchange)
        except ClientGone:
            passage.left = True
        except ApiError as error:
            await self._fail(exchange, error)
        except Exception:
            LOGGER.exception("request %s to %s failed", record.request_id, self._route)
            await self._fail(exchange, internal())
        finally:
            service.open_requests -= self._work
            if self._work and not record.model:
                record.model = service.model
            record.error_kind = exchange.error

    async def _fail(self, exchange: Exchange, error: ApiError) -> None:
        if error.body.code == "engine_lost":
            error = self._service.lost()
        await exchange.send_error(error)
