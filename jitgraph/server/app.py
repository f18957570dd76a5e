"""The HTTP application: routes, and what wraps them. The front-end process's event loop.

``create_app`` makes it; ``listen.make_server`` runs it under uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from jitgraph.errors import JitgraphError
from jitgraph.ipc.messages import EngineFacts
from jitgraph.server import page
from jitgraph.server.backend import Backend
from jitgraph.server.exchange import Exchange
from jitgraph.server.gate import Gate
from jitgraph.server.openai.chat import Chat
from jitgraph.server.openai.completions import Completions
from jitgraph.server.openai.errors import ApiError, internal
from jitgraph.server.openai.sse import json_bytes
from jitgraph.server.openapi import description
from jitgraph.server.service import Service
from jitgraph.server.settings import ServerSettings
from jitgraph.server.status_api import StatusApi
from jitgraph.server.texts import TextSource
from jitgraph.server.tokens_api import Detokenize, Tokenize
from jitgraph.text.tokenizer import Tokenizer

LOGGER = logging.getLogger("jitgraph.server")

_LOOK_FOR_ENGINE_S = 0.05


def create_app(
    backend: Backend,
    settings: ServerSettings,
    *,
    load_tokenizer: Callable[[EngineFacts], Tokenizer] | None = None,
    routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """The application.

    Args:
        backend: whoever runs the engine.
        settings: names, keys, caps, hooks.
        load_tokenizer: how the tokenizer of an engine's model is found; by default in the checkpoint's folder.
        routes: more of them, which stand behind the API key too.
    """
    service = Service(backend, settings, TextSource(settings, load_tokenizer))
    app = Starlette(
        routes=[*_routes(service), *routes],
        middleware=[Middleware(Gate, settings=settings, browser_paths=_page_paths(routes))],
        exception_handlers={HTTPException: _http_error, Exception: _defect},
        lifespan=_lifespan(service),
    )
    app.router.redirect_slashes = False
    return app


def _page_paths(routes: Sequence[BaseRoute]) -> list[str]:
    return [route.path for route in routes if isinstance(route, Route) and route.path in page.FILE_PATHS]


def _routes(service: Service) -> list[Route]:
    status = StatusApi(service)
    document = json_bytes(description())

    async def openapi(exchange: Exchange) -> None:
        await exchange.send_json(document)

    def get(path: str, answer: Any) -> Route:
        shown = path.replace("{model:path}", "{id}")
        return Route(path, service.endpoint(shown, answer, work=False), methods=["GET"])

    routes = [
        Route(one.route, service.endpoint(one.route, one), methods=["POST"])
        for one in (Chat(service), Completions(service), Tokenize(service), Detokenize(service))
    ]
    routes += [
        get("/v1/models", status.models),
        get("/v1/models/{model:path}", status.model),
        get("/health", status.health),
        get("/ready", status.ready),
        get("/version", status.version),
        get("/openapi.json", openapi),
    ]
    if service.settings.scrape is not None:
        routes.append(get("/metrics", status.metrics))
    return routes


def _http_error(request: Request, error: Exception) -> Response:
    """A path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    messages = {404: "there is no such route", 405: "this route does not take that method"}
    api = ApiError(error.status_code, messages.get(error.status_code, error.detail), None, None)
    request.scope["jitgraph"].record.error_kind = api.name
    return Response(api.encode(), error.status_code, dict(error.headers or {}), "application/json")


def _defect(_: Request, __: Exception) -> Response:
    """A defect outside the endpoints, which see to their own."""
    api = internal()
    return Response(api.encode(), api.status, media_type="application/json")


def _lifespan(service: Service) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.ensure_future(_prepare(service))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    return lifespan


async def _prepare(service: Service) -> None:
    """Loads the tokenizer as soon as an engine is there, so that the first request finds it."""
    begun_s = time.monotonic()
    while service.backend.client is None:
        await asyncio.sleep(_LOOK_FOR_ENGINE_S)
    service.start_s = time.monotonic() - begun_s
    client = service.backend.client
    if client is not None:
        try:
            await service.texts.of(client.facts)
        except JitgraphError as error:
            LOGGER.error("the tokenizer cannot be used: %s", error)
