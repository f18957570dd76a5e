"""What chat and plain completions share: from a request's body to its answers, whole or as a stream of events.

Event loop's thread. ``chat.py`` and ``completions.py`` say what their prompts and their answers look like.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from jitgraph.ipc.messages import Grammar
from jitgraph.server.answers import Answer, Answers, Delta, Plan
from jitgraph.server.exchange import Exchange
from jitgraph.server.openai.convert import grammar_of
from jitgraph.server.openai.decode import decode
from jitgraph.server.openai.schema import Sampled
from jitgraph.server.openai.sse import DONE, Chunks, json_bytes, json_of_any_length
from jitgraph.server.service import Service, Serving
from jitgraph.types import SamplingParams

R = TypeVar("R", bound=Sampled)

_INLINE_ENTRIES = 8192
"""A reply that lists more is made beside the event loop."""
_INLINE_SCORED = 64
"""So is the event that reports on more tokens of a prompt."""


class Writer(ABC):
    """The answers of one request, as they come."""

    kind: ClassVar[str]
    """``object`` of a stream's chunks."""
    prefix: ClassVar[str]
    """Of the answer's id."""

    @abstractmethod
    def keep(self, answer: Answer, delta: Delta) -> None:
        """Notes more of an answer that is sent whole."""

    @abstractmethod
    def reply(self, common: Mapping[str, Any]) -> msgspec.Struct:
        """The one JSON answer; ``common`` has the fields that all answers share."""

    @abstractmethod
    def events(self, chunks: Chunks, answer: Answer, delta: Delta) -> bytes:
        """What more of an answer adds to its stream; mostly one event, sometimes none."""


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine."""

    plan: Plan
    make_writer: Callable[[Answers], Writer]


class Generation(ABC, Generic[R]):
    """An endpoint that generates."""

    route: ClassVar[str]
    _decoder: msgspec.json.Decoder[R]

    def __init__(self, service: Service) -> None:
        self._service = service
        self._caps = service.settings

    @abstractmethod
    def check(self, request: R) -> None:
        """Refuses what no engine has to be asked for.

        Raises:
            ApiError: 400, naming the field.
        """

    @abstractmethod
    async def prepare(self, exchange: Exchange, request: R, serving: Serving) -> Prepared:
        """The request as the engine understands it.

        Raises:
            ApiError: 400, naming the field.
        """

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request.

        Raises:
            ApiError, ClientGone: instead of an answer, or in the middle of a stream.
        """
        request = decode(self._decoder, await exchange.body())
        exchange.record.model = request.model or ""
        exchange.record.streamed = bool(request.stream)
        self.check(request)
        grammar_of(request, self._caps)
        await exchange.while_connected(self._answer(exchange, request))

    async def _answer(self, exchange: Exchange, request: R) -> None:
        serving = await self._service.serving(request.model)
        prepared = await self.prepare(exchange, request, serving)
        with self._service.room_for(prepared.plan.answers):
            answers = Answers(prepared.plan, serving.link, serving.texts.tokenizer, exchange.record)
            try:
                writer = prepared.make_writer(answers)
                identity = f"{writer.prefix}-{secrets.token_hex(16)}"
                await (_stream if request.stream else _whole)(exchange, request, answers, writer, serving, identity)
            finally:
                answers.close()


def plan_of(
    exchange: Exchange, request: Sampled, prompts: list[Any], params: list[SamplingParams], grammar: Grammar | None,
    **more: Any,
) -> Plan:  # fmt: skip
    """The plan, with the fields that both endpoints read in the same way."""
    return Plan(
        prompts=prompts,
        n=request.n or 1,
        params=params,
        salt=exchange.salt(request.cache_salt),
        grammar=grammar,
        skip_special_tokens=request.skip_special_tokens is not False,
        timeout_s=exchange.settings.request_timeout_s or 0.0,
        include_stop=bool(request.include_stop_str_in_output),
        **more,
    )


async def _whole(
    exchange: Exchange, _: Sampled, answers: Answers, writer: Writer, serving: Serving, identity: str
) -> None:
    created = int(time.time())
    while (news := await answers.next()) is not None:
        writer.keep(*news)
    fixed = {"id": identity, "created": created, "model": serving.model, "usage": answers.usage}
    common = {**fixed, "system_fingerprint": serving.facts.fingerprint}
    if _entries(answers) <= _INLINE_ENTRIES:
        body = json_bytes(writer.reply(common))
    else:
        body = await asyncio.to_thread(lambda: json_of_any_length(writer.reply(common)))
    await exchange.send_json(body)


def _entries(answers: Answers) -> int:
    """Tokens of all prompts and answers, and alternatives to them, that a reply may list."""
    plan, usage = answers.plan, answers.usage
    alternatives = max(params.logprobs or 0 for params in plan.params)
    return (1 + alternatives) * usage.completion_tokens + (1 + (plan.prompt_logprobs or 0)) * usage.prompt_tokens


async def _stream(
    exchange: Exchange, request: Sampled, answers: Answers, writer: Writer, serving: Serving, identity: str
) -> None:
    options = request.stream_options
    usage = bool(options and options.include_usage)
    chunks = Chunks(
        writer.kind, identity, int(time.time()), serving.model, serving.facts.fingerprint, len(answers.all), usage,
        answers.usage_of if options and options.continuous_usage_stats else None,
    )  # fmt: skip
    while (news := await answers.next()) is not None:
        scored = news[1].prompt_logprobs
        if scored is not None and len(scored) > _INLINE_SCORED:
            events = await asyncio.to_thread(writer.events, chunks, *news)
        else:
            events = writer.events(chunks, *news)
        if events:
            await exchange.send_event(events)
    await exchange.send_event((chunks.usage(answers.usage) if usage else b"") + DONE, last=True)
