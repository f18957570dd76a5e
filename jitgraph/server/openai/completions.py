"""``POST /v1/completions``: prompts as texts or token ids, with echo and log-probabilities. Event loop's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from jitgraph.errors import RequestError
from jitgraph.ipc.messages import WireLogprobs
from jitgraph.server.answers import Answer, Answers, Delta
from jitgraph.server.exchange import Exchange
from jitgraph.server.openai.convert import check_ids, grammar_of, prompt_error, room_for, sampling_params
from jitgraph.server.openai.decode import decoder_of
from jitgraph.server.openai.errors import ApiError, bad_request, from_user_error
from jitgraph.server.openai.generation import Generation, Prepared, Writer, plan_of
from jitgraph.server.openai.limits import at_most, check_answers, check_completion
from jitgraph.server.openai.logprobs import CompletionLogprobWriter
from jitgraph.server.openai.replies import CompletionChoice, CompletionLogprobs, CompletionReply
from jitgraph.server.openai.schema import CompletionRequest
from jitgraph.server.openai.sse import Chunks, json_of_any_length, token_ids_field
from jitgraph.server.service import Serving
from jitgraph.server.settings import ServerSettings

DEFAULT_MAX_TOKENS = 16
"""As with OpenAI, where ``max_tokens`` is left out."""


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    ids: Sequence[int]
    text: str
    """What ``echo`` shows."""


class Completions(Generation[CompletionRequest]):
    """The endpoint."""

    route = "/v1/completions"
    _decoder = decoder_of(CompletionRequest)

    def check(self, request: CompletionRequest) -> None:
        """Refuses what no engine has to be asked for."""
        check_completion(request, self._caps)
        prompts_of(request.prompt, request.n or 1, self._caps)

    async def prepare(self, exchange: Exchange, request: CompletionRequest, serving: Serving) -> Prepared:
        """The prompts as token ids, with what is asked for."""
        facts, caps = serving.facts, self._caps
        given = prompts_of(request.prompt, request.n or 1, caps)
        no_tokens = request.max_tokens == 0
        asked = 1 if no_tokens else request.max_tokens
        every, rooms = [], []
        for prompt in given:
            ids = await _ids(prompt, request, serving)
            every.append(ids)
            rooms.append(room_for(len(ids), asked, DEFAULT_MAX_TOKENS, facts, caps, "prompt"))
            check_ids("prompt", ids, facts.vocab_size)
            await asyncio.sleep(0)  # one after the other, each of them short: others have their turn in between
        prompts = [Prompt(ids, await _text(prompt, request, serving)) for ids, prompt in zip(every, given, strict=True)]
        plan = plan_of(
            exchange,
            request,
            [prompt.ids for prompt in prompts],
            [sampling_params(request, facts, room, request.logprobs) for room in rooms],
            grammar_of(request, caps),
            prompt_logprobs=request.logprobs if request.echo else None,
            no_tokens=no_tokens,
        )
        return Prepared(plan, lambda answers: _Writer(request, prompts, answers, serving))


def prompts_of(prompt: str | list[int | str | list[int]], n: int, caps: ServerSettings) -> list[str | list[int]]:
    """The prompts, each a text or token ids.

    Raises:
        ApiError: 400; none, too many, or a mixture of texts and numbers.
    """
    kinds: set[type] = set() if isinstance(prompt, str) else set(map(type, prompt))
    if isinstance(prompt, str) or kinds == {int}:
        check_answers(1, n, caps)
        return [prompt]  # type: ignore[list-item] # all of it is one kind
    if not kinds or int in kinds:
        what = "a mixture of token ids and prompts" if kinds else "empty: give a text or token ids"
        raise bad_request(f"prompt is {what}", "prompt", "invalid_value")
    at_most("prompt", prompt, caps.max_prompts, "prompts")
    check_answers(len(prompt), n, caps)
    return list(prompt)  # type: ignore[arg-type] # there is no number in it


async def _ids(prompt: str | list[int], request: CompletionRequest, serving: Serving) -> list[int]:
    texts, facts = serving.texts, serving.facts
    try:
        if isinstance(prompt, str):
            most = texts.most_bytes(facts.max_model_len)
            ids = await texts.encode(prompt, request.add_special_tokens is not False, most)
        else:
            ids = prompt
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
    except RequestError as error:
        raise prompt_error(error, facts, "prompt") from error
    return ids


async def _text(prompt: str | list[int], request: CompletionRequest, serving: Serving) -> str:
    """What ``echo`` shows of a prompt; nothing where it is not asked for."""
    if isinstance(prompt, str) or not request.echo:
        return prompt if isinstance(prompt, str) else ""
    try:
        return await serving.texts.decode(prompt, request.skip_special_tokens is not False)
    except RequestError as error:
        raise from_user_error(error, "prompt") from error


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
        self.texts: list[str] = []

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


class _Writer(Writer):
    """Writes the answer of one request."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, request: CompletionRequest, prompts: list[Prompt], answers: Answers, serving: Serving) -> None:
        self._request = request
        n = answers.plan.n
        self._voices = [_Voice(one, prompts[one.index // n], request, serving) for one in answers.all]

    def keep(self, answer: Answer, delta: Delta) -> None:
        """Notes more of an answer that is sent whole."""
        voice = self._voices[answer.index]
        voice.texts.append(voice.take(delta))

    def reply(self, common: Mapping[str, Any]) -> CompletionReply:
        """The one JSON answer."""
        return CompletionReply(choices=[self._choice(voice) for voice in self._voices], **common)

    def _choice(self, voice: _Voice) -> CompletionChoice:
        wanted = bool(self._request.return_token_ids)
        return CompletionChoice(
            index=voice.answer.index,
            text="".join(voice.texts),
            logprobs=voice.logprobs(),
            finish_reason="stop" if voice.answer.finish_reason == "stop" else "length",
            token_ids=voice.ids if wanted else msgspec.UNSET,
            prompt_token_ids=list(voice.answer.prompt) if wanted else msgspec.UNSET,
        )

    def events(self, chunks: Chunks, answer: Answer, delta: Delta) -> bytes:
        """What goes into the stream; nothing while the text is held back."""
        voice = self._voices[answer.index]
        text = voice.take(delta)
        if not text and delta.finish_reason is None:
            return b""
        ids = b""
        if self._request.return_token_ids:
            first = len(voice.ids) == voice.answer.completion_tokens
            ids = token_ids_field(voice.ids)
            ids += token_ids_field(voice.answer.prompt, b"prompt_token_ids") if first else b""
            voice.ids = []
        logprobs = voice.logprobs()
        told = b"null" if logprobs is None else json_of_any_length(logprobs)
        return chunks.text(answer.index, text, told, ids, delta.finish_reason)
