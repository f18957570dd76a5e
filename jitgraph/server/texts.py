"""Text to token ids for the HTTP server: the checkpoint's tokenizer and chat template, never long on the loop.

Event loop's thread; long texts and all chat templates go to threads, a few at a time, each with a time limit. The
tokenizer is loaded once for each checkpoint, in a thread.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.ipc.messages import EngineFacts
from jitgraph.server.bounded import TookTooLong, Workers
from jitgraph.server.settings import ServerSettings
from jitgraph.text.template import ChatTemplate
from jitgraph.text.tokenizer import Tokenizer, find_tokenizer

T = TypeVar("T")

_INLINE_IDS = 4096
"""Up to this many ids become text on the event loop."""
_MUCH_CHARS = 2**16
"""From so many characters on, what tokenising a text took is given back to the system: some hundred bytes for each
token, which the C library would else keep for every thread."""


class TextTooLong(RequestError):
    """A text of more bytes than could be of use; it was not tokenised."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    """Those that the tokenizer puts around every text besides; templates write their own."""
    variables: Mapping[str, Any] | None = None


class Texts:
    """The tokenizer and the template of one model."""

    def __init__(self, tokenizer: Tokenizer, settings: ServerSettings) -> None:
        self.tokenizer = tokenizer
        self._settings = settings
        self._own = None if settings.chat_template is None else ChatTemplate(settings.chat_template)
        self._free = asyncio.Semaphore(settings.text_threads)
        self._workers = Workers()

    @property
    def template(self) -> str | None:
        """Source of the chat template in use; None where there is none."""
        return self.tokenizer.chat_template if self._own is None else self._own.source

    @property
    def tool_template(self) -> str | None:
        """The same for conversations with tools; some checkpoints have one of their own."""
        return self.tokenizer.tool_template if self._own is None else self._own.source

    def reads(self, name: str) -> bool:
        """Whether the chat template mentions a name."""
        return name in (self.template or "")

    def most_bytes(self, tokens: int | None) -> int | None:
        """Most bytes that a text of so many tokens can have; None where there is no such number."""
        each = self.tokenizer.bytes_per_token
        return None if tokens is None or each is None else tokens * each

    async def encode(self, text: str, add_special_tokens: bool = True, most_bytes: int | None = None) -> list[int]:
        """Token ids of a text.

        Raises:
            TextTooLong: it has more than ``most_bytes``.
            RequestError: a text that has none, or that takes too long.
        """
        _check_length(text, most_bytes)
        if len(text) <= self._settings.inline_chars:
            return self.tokenizer.encode(text, add_special_tokens)
        encode = self.tokenizer.encode

        def work() -> list[int]:
            try:
                return encode(text, add_special_tokens)
            finally:
                if len(text) > _MUCH_CHARS:
                    _give_back()

        return await self.in_thread(work, self._settings.tokenize_timeout_s)

    async def encode_chat(self, conversation: Conversation, most_bytes: int | None = None) -> list[int]:
        """Token ids of a conversation under the chat template. A long one's ids are worked out after its text, with
        their own time limit.

        Raises:
            TextTooLong: the text of it has more than ``most_bytes``.
            RequestError: messages that the template refuses, or that take it too long.
            CheckpointError: a template that cannot be compiled, or breaks the sandbox's rules.
        """

        special = conversation.add_special_tokens

        def prepare() -> tuple[str, list[int] | None]:
            text = self._render(conversation)
            _check_length(text, most_bytes)
            short = len(text) <= self._settings.inline_chars
            return text, self.tokenizer.encode(text, special) if short else None

        text, ids = await self.in_thread(prepare, self._settings.render_timeout_s)
        return await self.encode(text, special) if ids is None else ids

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids.

        Raises:
            RequestError: it takes too long.
        """
        decode = self.tokenizer.decode
        if len(ids) <= _INLINE_IDS:
            return decode(ids, skip_special_tokens)
        return await self.in_thread(lambda: decode(ids, skip_special_tokens), self._settings.tokenize_timeout_s)

    def _render(self, conversation: Conversation) -> str:
        if self._own is None:
            return self.tokenizer.render_chat(
                conversation.messages,
                add_generation_prompt=conversation.add_generation_prompt,
                tools=conversation.tools,
                variables=conversation.variables,
            )
        return self._own.render(
            conversation.messages,
            add_generation_prompt=conversation.add_generation_prompt,
            tools=conversation.tools,
            variables={**self.tokenizer.special_tokens, **(conversation.variables or {})},
        )

    async def in_thread(self, work: Callable[[], T], timeout_s: float) -> T:
        """The result of a call made beside the event loop.

        Raises:
            RequestError: it took longer than ``timeout_s``.
        """
        async with self._free:
            try:
                return await self._workers.run(work, timeout_s)
            except TookTooLong:
                raise RequestError(
                    f"preparing the prompt took more than {timeout_s:g} s: send less, or give the server more time"
                ) from None

    async def warm_up(self) -> None:
        """Does once what the first request would else be the first to do. A template may refuse this conversation and
        serve others, so nothing of it is an error."""

        def work() -> None:
            self.tokenizer.encode("warm-up")
            if self.template is not None:
                self._render(Conversation([{"role": "user", "content": "warm-up"}]))

        with suppress(RequestError, CheckpointError, TookTooLong):
            await self._workers.run(work, self._settings.render_timeout_s)


def _check_length(text: str, most_bytes: int | None) -> None:
    if most_bytes is None or 4 * len(text) <= most_bytes:
        return
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > most_bytes:
        raise TextTooLong(f"the text has {size} bytes; {most_bytes} are possible")


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Only glibc has it, and only glibc needs it."""


def _give_back() -> None:
    if _TRIM is not None:
        _TRIM(0)


class TextSource:
    """Loads a model's tokenizer once and hands it out."""

    def __init__(self, settings: ServerSettings, load: Callable[[EngineFacts], Tokenizer] | None = None) -> None:
        self._settings = settings
        self._load = load or load_tokenizer
        self._folder: str | None = None
        self._texts: Texts | None = None
        self._loading: asyncio.Future[Texts] | None = None

    def loaded(self, facts: EngineFacts) -> Texts | None:
        """The texts of the engine's model, where they are there already."""
        return self._texts if self._texts is not None and self._folder == facts.folder else None

    async def of(self, facts: EngineFacts) -> Texts:
        """The texts of the engine's model, loaded at the first call.

        Raises:
            CheckpointError: the checkpoint has no usable tokenizer.
        """
        texts = self.loaded(facts)
        if texts is not None:
            return texts
        if self._loading is None or self._loading.done():
            self._loading = asyncio.ensure_future(self._fetch(facts))
        await asyncio.shield(self._loading)
        return await self.of(facts)

    async def _fetch(self, facts: EngineFacts) -> Texts:
        texts = Texts(await asyncio.to_thread(self._load, facts), self._settings)
        await texts.warm_up()
        self._folder, self._texts = facts.folder, texts
        return texts


def load_tokenizer(facts: EngineFacts) -> Tokenizer:
    """The tokenizer in the checkpoint's folder; the bundled one for presets.

    Raises:
        CheckpointError: none there, or a damaged one.
    """
    found = find_tokenizer(None if facts.folder is None else Path(facts.folder))
    if found is None:
        raise CheckpointError(f"{facts.folder} has no tokenizer.json, and this interface speaks text: add one")
    return found
