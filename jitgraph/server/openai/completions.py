"""``POST /v1/completions``: prompts as texts or token ids, with echo and log-probabilities. Event loop's thread."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from jitgraph.errors import RequestError
from jitgraph.ipc.messages import WireLogprobs
from jitgraph.server.answers import Answer, Answers, Delta, Plan
from jitgraph.server.exchange import Exchange
from jitgraph.server.openai.convert import check_ids, grammar_of, room_for, sampling_params
from jitgraph.server.openai.decode import decode, decoder_of
from jitgraph.server.openai.errors import ApiError, bad_request, from_user_error
from jitgraph.server.openai.limits import at_most, check_completion
from jitgraph.server.openai.logprobs import CompletionLogprobWriter
from jitgraph.server.openai.replies import CompletionChoice, CompletionLogprobs, CompletionReply
from jitgraph.server.openai.schema import CompletionRequest
from jitgraph.server.openai.sse import DONE, Chunks, json_bytes, token_ids_field
from jitgraph.server.service import Service, Serving
from jitgraph.server.settings import ServerSettings

DEFAULT_MAX_TOKENS = 16
"""As with OpenAI, where ``max_tokens`` is left out."""

_DECODER = decoder_of(CompletionRequest)


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    ids: Sequence[int]
    text: str
    """What ``echo`` shows."""


class Completions:
    """The endpoint."""

    route = "/v1/completions"

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request.

        Raises:
            ApiError, ClientGone: instead of an answer, or in the middle of a stream.
        """
        request = decode(_DECODER, await exchange.body())
        exchange.record.model = request.model or ""
        exchange.record.streamed = bool(request.stream)
        caps = self._service.settings
        check_completion(request, caps)
        grammar_of(request, caps)
        given = prompts_of(request.prompt, request.n or 1, caps)
        await exchange.while_connected(self._answer(exchange, request, given))

    async def _answer(self, exchange: Exchange, request: CompletionRequest, given: list[str | list[int]]) -> None:
        serving = await self._service.serving(request.model)
        prompts = [await _encoded(prompt, request, serving) for prompt in given]
        plan = _plan(exchange, request, prompts, serving, self._service.settings)
        answers = Answers(plan, serving.link, serving.texts.tokenizer, exchange.record)
        try:
            writer = _Writer(request, prompts, plan, answers, serving)
            await (writer.stream(exchange) if request.stream else writer.whole(exchange))
        finally:
            answers.close()


def prompts_of(prompt: str | list[int | str | list[int]], n: int, caps: ServerSettings) -> list[str | list[int]]:
    """The prompts, each a text or token ids.

    Raises:
        ApiError: 400; none, too many, or a mixture of texts and numbers.
    """
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids and len(ids) == len(prompt):
        return [ids]
    found = [item for item in prompt if not isinstance(item, int)]
    if ids or not found:
        what = "a mixture of token ids and prompts" if ids else "empty: give a text or token ids"
        raise bad_request(f"prompt is {what}", "prompt", "invalid_value")
    at_most("prompt", found, caps.max_prompts, "prompts")
    if len(found) * n > caps.max_streams_per_request:
        most = caps.max_streams_per_request
        raise bad_request(f"prompts times n must be at most {most}", "n", "too_large")
    return found


async def _encoded(prompt: str | list[int], request: CompletionRequest, serving: Serving) -> Prompt:
    texts = serving.texts
    try:
        if isinstance(prompt, str):
            text, ids = prompt, await texts.encode(prompt, request.add_special_tokens is not False)
        else:
            check_ids("prompt", prompt, serving.facts.vocab_size)
            ids = prompt
            text = texts.tokenizer.decode(prompt, request.skip_special_tokens is not False) if request.echo else ""
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
    except RequestError as error:
        raise from_user_error(error, "prompt") from error
    return Prompt(ids, text)


def _plan(
    exchange: Exchange, request: CompletionRequest, prompts: list[Prompt], serving: Serving, caps: ServerSettings
) -> Plan:
    facts = serving.facts
    no_tokens = request.max_tokens == 0
    params = []
    for prompt in prompts:
        asked = 1 if no_tokens else request.max_tokens
        room = room_for(len(prompt.ids), asked, DEFAULT_MAX_TOKENS, facts, caps, "prompt")
        params.append(sampling_params(request, facts, room, request.logprobs))
    return Plan(
        prompts=[prompt.ids for prompt in prompts],
        n=request.n or 1,
        params=params,
        salt=exchange.salt(request.cache_salt),
        prompt_logprobs=request.logprobs if request.echo else None,
        grammar=grammar_of(request, caps),
        skip_special_tokens=request.skip_special_tokens is not False,
        no_tokens=no_tokens,
    )


class _Voice:
    """One completion while it is written."""

    def __init__(self, answer: Answer, prompt: Prompt, request: CompletionRequest, serving: Serving) -> None:
        self.answer = answer
        self.unsent = prompt.text if request.echo else ""
        """Text that belongs before the next delta's."""
        self._echo = bool(request.echo)
        self._prompt = prompt
        self._logprobs: CompletionLogprobWriter | None = None
        if request.logprobs is not None:
            skip = request.skip_special_tokens is not False
            self._logprobs = CompletionLogprobWriter(serving.texts.tokenizer.pieces, request.logprobs, skip)
            if not request.echo:
                self._logprobs.skip_prompt(prompt.ids)
        self.pending: list[tuple[int, WireLogprobs | None]] = []
        self.ids: list[int] = []

    def take(self, delta: Delta) -> str:
        """The text that a delta adds, with the echo before the first; notes its ids and log-probabilities."""
        if self._echo and self._logprobs is not None:
            self._echo = False
            if delta.prompt_logprobs is None or len(delta.prompt_logprobs) != len(self._prompt.ids):
                raise ApiError(500, "the engine did not report on the prompt", None, "engine_error")
            self.pending.extend(zip(self._prompt.ids, delta.prompt_logprobs, strict=True))
        self.pending.extend((one.token_id, one) for one in delta.logprobs)
        self.ids.extend(delta.token_ids)
        text, self.unsent = self.unsent + delta.text, ""
        return text

    def logprobs(self) -> CompletionLogprobs | None:
        """Those that were noted since the last call."""
        if self._logprobs is None:
            return None
        pending, self.pending = self.pending, []
        return self._logprobs.add(pending)


class _Writer:
    """Writes the answer of one request."""

    def __init__(
        self, request: CompletionRequest, prompts: list[Prompt], plan: Plan, answers: Answers, serving: Serving
    ) -> None:
        self._request = request
        self._answers = answers
        self._serving = serving
        self._voices = [_Voice(one, prompts[one.index // plan.n], request, serving) for one in answers.all]
        self._identity = f"cmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())

    async def whole(self, exchange: Exchange) -> None:
        """One JSON answer."""
        texts: list[list[str]] = [[] for _ in self._voices]
        while (news := await self._answers.next()) is not None:
            answer, delta = news
            texts[answer.index].append(self._voices[answer.index].take(delta))
        reply = CompletionReply(
            id=self._identity,
            created=self._created,
            model=self._serving.model,
            system_fingerprint=self._serving.facts.fingerprint,
            choices=[self._choice(voice, "".join(texts[voice.answer.index])) for voice in self._voices],
            usage=self._answers.usage,
        )
        await exchange.send_json(json_bytes(reply))

    def _choice(self, voice: _Voice, text: str) -> CompletionChoice:
        wanted = bool(self._request.return_token_ids)
        return CompletionChoice(
            index=voice.answer.index,
            text=text,
            logprobs=voice.logprobs(),
            finish_reason="stop" if voice.answer.finish_reason == "stop" else "length",
            token_ids=voice.ids if wanted else msgspec.UNSET,
            prompt_token_ids=list(voice.answer.prompt) if wanted else msgspec.UNSET,
        )

    async def stream(self, exchange: Exchange) -> None:
        """A stream of events."""
        options = self._request.stream_options
        usage = bool(options and options.include_usage)
        facts = self._serving.facts
        chunks = Chunks(
            "text_completion", self._identity, self._created, self._serving.model, facts.fingerprint,
            len(self._voices), usage,
        )  # fmt: skip
        while (news := await self._answers.next()) is not None:
            answer, delta = news
            voice = self._voices[answer.index]
            text = voice.take(delta)
            if not text and delta.finish_reason is None:
                continue
            await exchange.send_event(self._chunk(chunks, voice, text, delta.finish_reason))
        await exchange.send_event((chunks.usage(self._answers.usage) if usage else b"") + DONE, last=True)

    def _chunk(self, chunks: Chunks, voice: _Voice, text: str, reason: str | None) -> bytes:
        ids = b""
        if self._request.return_token_ids:
            first = len(voice.ids) == voice.answer.completion_tokens
            ids = token_ids_field(voice.ids)
            ids += token_ids_field(voice.answer.prompt, b"prompt_token_ids") if first else b""
            voice.ids = []
        logprobs = voice.logprobs()
        return chunks.text(voice.answer.index, text, b"null" if logprobs is None else json_bytes(logprobs), ids, reason)
