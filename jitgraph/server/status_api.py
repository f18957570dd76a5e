"""What operators and clients ask about the server: health, readiness, models, version, metrics. Event loop's thread."""

from __future__ import annotations

import asyncio
import time

from jitgraph.errors import CheckpointError
from jitgraph.ipc.messages import PROTOCOL
from jitgraph.server.backend import EngineLink
from jitgraph.server.exchange import Exchange
from jitgraph.server.openai.errors import ApiError, from_user_error, unavailable
from jitgraph.server.openai.replies import Model, ModelList, Status, Version
from jitgraph.server.openai.sse import json_bytes
from jitgraph.server.service import Service, no_such_model
from jitgraph.server.supervisor_policy import patience_s
from jitgraph.version import VERSION

_ALIVE_WITHOUT_ENGINE = ("starting", "draining")
"""States in which it is right that no engine answers."""
_MOMENT_NS = 300_000_000
_LOOK_S = 0.05


class StatusApi:
    """The endpoints; each method is one."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, exchange: Exchange) -> None:
        """``/health``: 200 while this process and the engine live, a starting engine included.

        Raises:
            ApiError: 503; the engine has died, is being restarted, has said nothing for ``silence_s``, or has been at
                one step for much longer than any before.
        """
        backend = self._service.backend
        state, client = backend.state, backend.client
        if client is not None and state in ("ready", "draining"):
            await self._check_pulse(client)
        elif state not in _ALIVE_WITHOUT_ENGINE:
            self._service.link()  # says why not
            raise unavailable(backend.retry_after_s, "no engine is ready")
        await exchange.send_json(json_bytes(Status(status=state)))

    async def ready(self, exchange: Exchange) -> None:
        """``/ready``: 200 once requests are taken.

        Raises:
            ApiError: 503; not now. 500; never, the tokenizer cannot be used.
        """
        link = self._service.link()
        await self._check_pulse(link)
        if (beat := link.last_beat) is not None and beat.draining:
            raise unavailable(self._service.backend.retry_after_s, "the engine is ending and takes no more requests")
        try:
            await self._service.texts.of(link.facts)
        except CheckpointError as error:
            raise from_user_error(error) from error
        await exchange.send_json(json_bytes(Status(status="ready")))

    async def _check_pulse(self, link: EngineLink) -> None:
        """The engine is heard. Where it seems silent, it has a moment: this process itself may have been held up, and
        what the engine said may lie unread."""
        deadline_ns = time.perf_counter_ns() + _MOMENT_NS
        while (silent_s := (time.perf_counter_ns() - link.last_seen_ns) / 1e9) > self._service.settings.silence_s:
            if time.perf_counter_ns() > deadline_ns:
                why = f"the engine hangs: it has said nothing for {silent_s:.1f} s"
                raise ApiError(503, why, None, "engine_silent", self._service.backend.retry_after_s)
            await asyncio.sleep(_LOOK_S)
        beat = link.last_beat
        if beat is not None and beat.away_s > patience_s(self._service.settings.silence_s, beat):
            why = f"the engine hangs: it has been at one thing for {beat.away_s:.1f} s"
            raise ApiError(503, why, None, "engine_silent", self._service.backend.retry_after_s)
        if link.gone is not None:
            raise unavailable(self._service.backend.retry_after_s, f"the engine has ended: {link.gone}")

    async def models(self, exchange: Exchange) -> None:
        """``/v1/models``: what the engine serves now; 503 where there is none."""
        link = self._service.link()
        names = self._service.names(link.facts)
        await exchange.send_json(json_bytes(ModelList(data=[self._model(name, link) for name in names])))

    async def model(self, exchange: Exchange) -> None:
        """``/v1/models/{id}``."""
        link = self._service.link()
        names = self._service.names(link.facts)
        name = str(exchange.path_params.get("model", ""))
        if name not in names:
            raise no_such_model(name, names)
        await exchange.send_json(json_bytes(self._model(name, link)))

    def _model(self, name: str, link: EngineLink) -> Model:
        return Model(id=name, created=self._service.started, max_model_len=link.facts.max_model_len)

    async def metrics(self, exchange: Exchange) -> None:
        """``/metrics``, for Prometheus."""
        scrape = self._service.settings.scrape
        assert scrape is not None  # the route exists only then
        body, kind = await scrape(exchange.headers.get(b"accept", b"").decode("latin-1"))
        await exchange.send_body(body, kind.encode("latin-1"))

    async def version(self, exchange: Exchange) -> None:
        """``/version``."""
        await exchange.send_json(json_bytes(Version(version=VERSION, protocol=PROTOCOL)))
