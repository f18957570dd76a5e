"""``POST /tokenize`` and ``POST /detokenize``: text and conversations to token ids, and back. Event loop's thread."""

from __future__ import annotations

import asyncio

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.server.exchange import Exchange
from jitgraph.server.openai.calls import as_tools
from jitgraph.server.openai.convert import check_ids
from jitgraph.server.openai.decode import decode, decoder_of
from jitgraph.server.openai.errors import bad_request, from_user_error
from jitgraph.server.openai.limits import at_most, check_conversation
from jitgraph.server.openai.messages import as_messages, template_variables
from jitgraph.server.openai.replies import Detokenized, Tokenized
from jitgraph.server.openai.schema import DetokenizeRequest, TokenizeRequest
from jitgraph.server.openai.sse import json_bytes, json_of_any_length
from jitgraph.server.service import Service, Serving
from jitgraph.server.texts import Conversation, Texts, TextTooLong
from jitgraph.text.pieces import TokenPieces

_TOKENIZE = decoder_of(TokenizeRequest)
_DETOKENIZE = decoder_of(DetokenizeRequest)
_INLINE_IDS = 4096
"""Up to this many ids an answer is made on the event loop."""


class Tokenize:
    """``/tokenize``: ``prompt`` as ``/v1/completions`` would read it, or ``messages`` as chat would."""

    route = "/tokenize"

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request.

        Raises:
            ApiError: instead of an answer.
        """
        request = decode(_TOKENIZE, await exchange.body())
        exchange.record.model = request.model or ""
        if (request.prompt is None) == (request.messages is None):
            raise bad_request("give either prompt or messages", "prompt", "invalid_value")
        if request.messages is None:
            _refuse_chat_fields(request)
        else:
            check_conversation(request.messages, request.tools, self._service.settings)
        await exchange.while_connected(self._answer(exchange, request))

    async def _answer(self, exchange: Exchange, request: TokenizeRequest) -> None:
        serving = await self._service.serving(request.model)
        ids = await self._ids(exchange, request, serving)
        names, limit = bool(request.return_token_strs), serving.facts.max_model_len

        def work() -> bytes:
            strings = _strings(ids, serving.texts.tokenizer.pieces) if names else None
            reply = Tokenized(count=len(ids), max_model_len=limit, tokens=ids, token_strs=strings)
            return json_of_any_length(reply)

        await exchange.send_json(await asyncio.to_thread(work) if len(ids) > _INLINE_IDS else work())

    async def _ids(self, exchange: Exchange, request: TokenizeRequest, serving: Serving) -> list[int]:
        texts, most = serving.texts, self._service.settings.max_tokenize_bytes
        param = "prompt" if request.messages is None else "messages"
        try:
            if request.messages is None:
                return await texts.encode(request.prompt or "", request.add_special_tokens is not False, most)
            return await texts.encode_chat(await exchange.beside_the_loop(lambda: self._read(request, texts)), most)
        except TextTooLong as error:
            raise bad_request(f"{param}: {error}", param, "too_large") from error
        except (RequestError, CheckpointError) as error:
            raise from_user_error(error, param) from error

    def _read(self, request: TokenizeRequest, texts: Texts) -> Conversation:
        caps = self._service.settings
        tools = as_tools(request.tools, caps) or None
        variables = template_variables(request.chat_template_kwargs, None, texts.reads, caps)
        messages = as_messages(request.messages or [], texts.reads)
        prompted, special = request.add_generation_prompt is not False, bool(request.add_special_tokens)
        return Conversation(messages, tools, prompted, special, variables)


def _strings(ids: list[int], pieces: TokenPieces) -> list[str]:
    texts = {i: pieces.bytes_of(i, False).decode("utf-8", "replace") for i in set(ids)}
    return [texts[i] for i in ids]


def _refuse_chat_fields(request: TokenizeRequest) -> None:
    for name in ("tools", "add_generation_prompt", "chat_template_kwargs"):
        if getattr(request, name) is not None:
            raise bad_request(f"{name} is only possible with messages", name, "invalid_value")


class Detokenize:
    """``/detokenize``: special tokens are shown unless ``skip_special_tokens`` is true."""

    route = "/detokenize"

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request.

        Raises:
            ApiError: instead of an answer.
        """
        request = decode(_DETOKENIZE, await exchange.body())
        exchange.record.model = request.model or ""
        at_most("tokens", request.tokens, self._service.settings.max_detokenize_ids, "ids")
        await exchange.while_connected(self._answer(exchange, request))

    async def _answer(self, exchange: Exchange, request: DetokenizeRequest) -> None:
        serving = await self._service.serving(request.model)
        check_ids("tokens", request.tokens, serving.facts.vocab_size)
        try:
            text = await serving.texts.decode(request.tokens, bool(request.skip_special_tokens))
        except RequestError as error:
            raise from_user_error(error, "tokens") from error
        await exchange.send_json(json_bytes(Detokenized(prompt=text)))
