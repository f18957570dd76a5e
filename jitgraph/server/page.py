"""The page at ``/`` to try the model in a browser, and ``/page/state``, the engine as it shows it. Event loop's thread.

Where a key is wanted the browser asks its user for it as a password, and sends it with all that the page asks for; the
page itself asks where the browser has none that fits. All of it comes from this server: the policy that goes with every
file lets the browser fetch nothing else, and run no script that stands in a page.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jitgraph.ipc.messages import Beat, EngineFacts
from jitgraph.server.backend import Backend, EngineLink
from jitgraph.server.settings import ServerSettings
from jitgraph.text.prose import ASSETS

STATE_PATH = "/page/state"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/page/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("main", "figures", "sse", "store")
    },
}
FILE_PATHS = tuple(_FILES)
"""What a browser opens: without a key it is told to ask for one."""
FRESH_S = 0.5
"""The engine is asked for its counters at most this often, however many pages look."""
_STATS_TIMEOUT_S = 2.0
_STATS = (
    *("captures", "captures_abandoned", "recaptures", "evictions", "compiles_after_ready"),
    *("graphs", "graph_bytes", "paths"),
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageState(msgspec.Struct, frozen=True):
    """The answer of ``/page/state``; what there is no engine for is null."""

    state: str
    """As ``Backend.state``."""
    model: str | None = None
    """The name under which the model is asked for."""
    chat: bool = False
    """Whether the model has a chat template; without one the page uses ``/v1/completions``."""
    facts: dict[str, Any] | None = None
    beat: Beat | None = None
    stats: dict[str, Any] | None = None
    """Counters of the graph store and of steps, as the engine names them."""


def page_routes(backend: Backend, settings: ServerSettings | None = None) -> list[Route]:
    """The routes of the page, for ``create_app``.

    Args:
        backend: whoever runs the engine.
        settings: the server's; for the model's name and a chat template in place of the checkpoint's.
    """
    folder = ASSETS / "page"
    routes = [Route(path, _file(folder / name, kind), methods=["GET"]) for path, (name, kind) in _FILES.items()]
    return [*routes, Route(STATE_PATH, _Engine(backend, settings or ServerSettings()).answer, methods=["GET"])]


def _file(path: Path, kind: str) -> Any:
    content = path.read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, headers={**_HEADERS, "Content-Type": kind})

    return answer


class _Engine:
    """The engine as the page shows it."""

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._link: EngineLink | None = None
        self._asking: asyncio.Future[dict[str, Any] | None] | None = None
        self._stats: dict[str, Any] | None = None
        self._asked_s = float("-inf")
        self._folders: dict[str | None, bool] = {}

    async def answer(self, _: Request) -> Response:
        """``GET /page/state``."""
        body = msgspec.json.encode(await self._page_state())
        return Response(body, headers={**_HEADERS, "Content-Type": "application/json", "Cache-Control": "no-store"})

    async def _page_state(self) -> PageState:
        state, link = self._backend.state, self._current()
        if link is None:
            return PageState(state)
        facts = link.facts
        names = self._settings.served_names or (facts.model,)
        shown = {name: getattr(facts, name) for name in ("device", "dtype", "emulated", "max_model_len", "max_streams")}
        return PageState(state, names[0], await self._chat(facts), shown, link.last_beat, await self._counters(link))

    def _current(self) -> EngineLink | None:
        """The engine that is shown: of several always the same, as long as it is there."""
        client = self._backend.client
        if client is None or self._link is None or self._link.gone is not None:
            self._link = client
            self._stats, self._asked_s = None, float("-inf")
        return self._link

    async def _counters(self, link: EngineLink) -> dict[str, Any] | None:
        """What the engine counted, not older than ``FRESH_S``; None where it does not answer."""
        if self._asking is None and time.monotonic() - self._asked_s < FRESH_S:
            return self._stats
        if self._asking is None:
            self._asking = asyncio.ensure_future(_ask(link))
            self._asking.add_done_callback(self._answered)
        return await asyncio.shield(self._asking)

    def _answered(self, asking: asyncio.Future[dict[str, Any] | None]) -> None:
        self._asking = None
        self._asked_s = time.monotonic()
        self._stats = None if asking.cancelled() else asking.result()

    async def _chat(self, facts: EngineFacts) -> bool:
        if self._settings.chat_template is not None:
            return True
        if facts.folder not in self._folders:
            self._folders = {facts.folder: await asyncio.to_thread(_has_template, facts.folder)}
        return self._folders[facts.folder]


async def _ask(link: EngineLink) -> dict[str, Any] | None:
    try:
        values = await asyncio.wait_for(link.stats(), _STATS_TIMEOUT_S)
    except Exception:  # the engine ended, or is silent: the page shows the state alone
        return None
    return {name: values[name] for name in _STATS if name in values}


def _has_template(folder: str | None) -> bool:
    """Whether a checkpoint's folder (None: the tokenizer that ships with the package) has a chat template."""
    place = ASSETS / "tokenizer" if folder is None else Path(folder)
    if (place / "chat_template.jinja").is_file() or any((place / "additional_chat_templates").glob("*.jinja")):
        return True
    try:
        return bool(json.loads((place / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
