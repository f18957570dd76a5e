"""``POST /v1/chat/completions``: conversations, with tools and shaped answers. Event loop's thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.ipc.messages import WireLogprobs
from jitgraph.server.answers import Answer, Answers, Delta
from jitgraph.server.exchange import Exchange
from jitgraph.server.openai.calls import CallMode, Reader, call_mode
from jitgraph.server.openai.convert import grammar_of, prompt_error, room_for, sampling_params
from jitgraph.server.openai.decode import decoder_of
from jitgraph.server.openai.errors import bad_request
from jitgraph.server.openai.generation import Generation, Prepared, Writer, plan_of
from jitgraph.server.openai.limits import check_chat
from jitgraph.server.openai.logprobs import chat_logprobs
from jitgraph.server.openai.messages import as_messages, template_variables
from jitgraph.server.openai.replies import (
    AnswerMessage,
    CalledFunction,
    CalledTool,
    ChatChoice,
    ChatReply,
    ToolCallChunk,
)
from jitgraph.server.openai.schema import ChatRequest
from jitgraph.server.openai.sse import Chunks, json_bytes, token_ids_field
from jitgraph.server.service import Serving
from jitgraph.server.settings import ServerSettings
from jitgraph.server.texts import Conversation
from jitgraph.text.pieces import TokenPieces


class Chat(Generation[ChatRequest]):
    """The endpoint."""

    route = "/v1/chat/completions"
    _decoder = decoder_of(ChatRequest)

    def check(self, request: ChatRequest) -> None:
        """Refuses what no engine has to be asked for."""
        check_chat(request, self._caps)

    async def prepare(self, exchange: Exchange, request: ChatRequest, serving: Serving) -> Prepared:
        """The conversation as token ids, with what is asked for."""
        facts, caps = serving.facts, self._caps
        mode, conversation = await exchange.beside_the_loop(lambda: _read(request, serving, caps))
        try:
            ids = await serving.texts.encode_chat(conversation, serving.texts.most_bytes(facts.max_model_len))
        except (RequestError, CheckpointError) as error:
            raise prompt_error(error, facts, "messages") from error
        if not ids:
            raise bad_request("the chat template makes an empty prompt of these messages", "messages", "invalid_value")
        room = room_for(len(ids), _asked(request), None, facts, caps, "messages")
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        params = sampling_params(request, facts, room, logprobs)
        plan = plan_of(exchange, request, [ids], [params], mode.grammar or grammar_of(request, caps))
        pieces = serving.texts.tokenizer.pieces
        return Prepared(plan, lambda answers: _Writer(request, mode, answers, pieces))


def _read(request: ChatRequest, serving: Serving, caps: ServerSettings) -> tuple[CallMode, Conversation]:
    mode = call_mode(request, serving.texts.tool_template, caps)
    reads = serving.texts.reads
    return mode, Conversation(
        messages=as_messages(request.messages, reads),
        tools=mode.tools,
        add_generation_prompt=request.add_generation_prompt is not False,
        variables=template_variables(request.chat_template_kwargs, request.reasoning_effort, reads, caps),
    )


def _asked(request: ChatRequest) -> int | None:
    """``max_completion_tokens``, or ``max_tokens`` by its older name."""
    new, old = request.max_completion_tokens, request.max_tokens
    if new is not None and old is not None and new != old:
        raise bad_request("max_tokens and max_completion_tokens differ: send one", "max_tokens", "invalid_value")
    asked = old if new is None else new
    if asked is not None and asked < 1:
        name = "max_tokens" if new is None else "max_completion_tokens"
        raise bad_request(f"{name} must be at least 1, not {asked}", name, "invalid_value")
    return asked


class _Voice:
    """One answer while it is written."""

    def __init__(self, answer: Answer, reader: Reader) -> None:
        self.answer = answer
        self.reader = reader
        self.opened = False
        self.content: list[str] = []
        self.calls: dict[int, list[str]] = {}
        """Id, name, and parts of the arguments by index of the call."""
        self.logprobs: list[WireLogprobs] = []
        self.ids: list[int] = []

    def take(self, delta: Delta) -> list[str | ToolCallChunk]:
        """What a delta adds: texts and parts of calls; notes its ids and log-probabilities."""
        self.logprobs += delta.logprobs
        self.ids += delta.token_ids
        parts = self.reader.feed(delta.text) if delta.text else []
        return parts + self.reader.finish() if delta.finish_reason is not None else parts

    def keep(self, parts: list[str | ToolCallChunk]) -> None:
        """Puts them together for one JSON answer."""
        for part in parts:
            if isinstance(part, str):
                self.content.append(part)
                continue
            call = self.calls.setdefault(part.index, [part.id or "", part.function.name or ""])
            call.append(part.function.arguments or "")

    @property
    def finish_reason(self) -> str:
        """As clients are told."""
        reason = self.answer.finish_reason or ""
        return "tool_calls" if reason == "stop" and self.reader.called else reason


class _Writer(Writer):
    """Writes the answer of one request."""

    kind, prefix = "chat.completion.chunk", "chatcmpl"

    def __init__(self, request: ChatRequest, mode: CallMode, answers: Answers, pieces: TokenPieces) -> None:
        self._request = request
        self._pieces = pieces
        self._voices = [_Voice(answer, mode.reader()) for answer in answers.all]

    def keep(self, answer: Answer, delta: Delta) -> None:
        """Notes more of an answer that is sent whole."""
        voice = self._voices[answer.index]
        voice.keep(voice.take(delta))

    def reply(self, common: Mapping[str, Any]) -> ChatReply:
        """The one JSON answer."""
        return ChatReply(choices=[self._choice(voice) for voice in self._voices], **common)

    def _choice(self, voice: _Voice) -> ChatChoice:
        wanted = bool(self._request.return_token_ids)
        calls = [
            CalledTool(id=call[0], function=CalledFunction(name=call[1], arguments="".join(call[2:])))
            for _, call in sorted(voice.calls.items())
        ]
        text = "".join(voice.content)
        message = AnswerMessage(content=text if text or not calls else None, tool_calls=calls or msgspec.UNSET)
        return ChatChoice(
            index=voice.answer.index,
            message=message,
            logprobs=chat_logprobs(self._pieces, voice.logprobs) if self._request.logprobs else None,
            finish_reason=voice.finish_reason,  # type: ignore[arg-type] # one of them, by construction
            token_ids=voice.ids if wanted else msgspec.UNSET,
            prompt_token_ids=list(voice.answer.prompt) if wanted else msgspec.UNSET,
        )

    def events(self, chunks: Chunks, answer: Answer, delta: Delta) -> bytes:
        """What goes into the stream. An answer's role goes out with its first content: whoever takes the first event
        for the first token is right."""
        voice = self._voices[answer.index]
        parts, last = voice.take(delta), delta.finish_reason is not None
        index = voice.answer.index
        events = []
        for part in parts:
            if isinstance(part, str):
                events.append(chunks.content(index, part, *self._extras(voice)))
            else:
                events.append(chunks.tool_calls(index, [part]))
        if last:
            events.append(chunks.finish(index, voice.finish_reason, *self._extras(voice)))
        if events and not voice.opened:
            voice.opened = True
            ids = self._request.return_token_ids
            events.insert(
                0, chunks.role(index, token_ids_field(voice.answer.prompt, b"prompt_token_ids") if ids else b"")
            )
        return b"".join(events)

    def _extras(self, voice: _Voice) -> tuple[bytes, bytes]:
        """Log-probabilities and ids since the last chunk that had them."""
        logprobs, ids = b"null", b""
        if voice.logprobs:
            logprobs = json_bytes(chat_logprobs(self._pieces, voice.logprobs))
            voice.logprobs = []
        if self._request.return_token_ids and voice.ids:
            ids = token_ids_field(voice.ids)
            voice.ids = []
        return logprobs, ids
