"""Server-sent events in OpenAI's form, put together from byte templates: what is the same in all chunks of a stream is
encoded once. Pure.

Every chunk has ``id``, ``object``, ``created``, ``model`` and ``choices``. With ``include_usage`` all carry ``usage``,
which is null but in the one chunk without choices that comes before ``[DONE]``; with ``continuous_usage_stats`` every
chunk tells what its own answer has taken so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from jitgraph.server.openai.errors import ApiError
from jitgraph.server.openai.replies import ToolCallChunk, Usage

DONE = b"data: [DONE]\n\n"
"""The end of a stream that did not fail."""

_PART = 256
"""Entries of a list that are encoded at once."""
_ENCODER = msgspec.json.Encoder()
_LINE_ENDS = (("\u2028", b"\\u2028"), ("\u2029", b"\\u2029"), ("\x85", b"\\u0085"))
_ESCAPES = tuple((char.encode(), escape) for char, escape in _LINE_ENDS)


def json_bytes(value: Any) -> bytes:
    """JSON on one line for every client: some take U+2028, U+2029 and U+0085 for ends of lines too."""
    data = _ENCODER.encode(value)
    if not data.isascii():
        for char, escape in _ESCAPES:
            data = data.replace(char, escape)
    return data


def json_of_any_length(value: Any) -> bytes:
    """The same in parts: the interpreter's lock is free in between, so a thread that makes much of it holds up none."""
    parts: list[bytes] = []
    _add_json(value, parts)
    return b"".join(parts)


def _add_json(value: Any, parts: list[bytes]) -> None:
    if isinstance(value, msgspec.Struct) and not value.__struct_config__.omit_defaults:
        fields = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        before = b"{"
        for name, field in fields:
            inner = getattr(value, field)
            if inner is not msgspec.UNSET:
                parts.append(before + json_bytes(name) + b":")
                _add_json(inner, parts)
                before = b","
        parts.append(b"}" if before == b"," else b"{}")
    elif isinstance(value, list) and value:
        several = 1 if isinstance(value[0], msgspec.Struct) and len(value) < _PART else _PART
        for i in range(0, len(value), several):
            parts.append(b"," if i else b"[")
            if several == 1:
                _add_json(value[i], parts)
            else:
                parts.append(json_bytes(value[i : i + several])[1:-1])
        parts.append(b"]")
    else:
        parts.append(json_bytes(value))


def error_event(error: ApiError) -> bytes:
    """A failure in the middle of a stream; nothing follows it."""
    return b"data: " + error.encode() + b"\n\n"


class Chunks:
    """Makes the chunks of one stream.

    Args:
        kind: ``chat.completion.chunk`` or ``text_completion``.
        with_usage: whether the stream ends with a chunk of usage.
        usage_of: tells an answer's usage so far, for every chunk to carry it; None leaves it null until the end.
    """

    def __init__(
        self, kind: str, identity: str, created: int, model: str, fingerprint: str, choices: int, with_usage: bool,
        usage_of: Callable[[int], Usage] | None = None,
    ) -> None:  # fmt: skip
        fixed = {
            "id": identity,
            "object": kind,
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._head = b"data: " + json_bytes(fixed)[:-1] + b',"choices":['
        self._heads = [self._head + b'{"index":%d,' % index for index in range(choices)]
        self._tail = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"
        self._usage_of = usage_of

    def _chunk(self, index: int, what: bytes, logprobs: bytes, ids: bytes, reason: bytes = b"null") -> bytes:
        tail = self._tail
        if self._usage_of is not None:
            tail = b'}],"usage":' + json_bytes(self._usage_of(index)) + b"}\n\n"
        return b"".join((self._heads[index], what, b',"logprobs":', logprobs, b',"finish_reason":', reason, ids, tail))

    def role(self, index: int, extra: bytes = b"") -> bytes:
        """What opens a chat answer; goes out together with the first content, never before."""
        return self._chunk(index, b'"delta":{"role":"assistant","content":""}', b"null", extra)

    def content(self, index: int, text: str, logprobs: bytes = b"null", ids: bytes = b"") -> bytes:
        """Text of a chat answer."""
        return self._chunk(index, b'"delta":{"content":' + json_bytes(text) + b"}", logprobs, ids)

    def tool_calls(self, index: int, calls: list[ToolCallChunk]) -> bytes:
        """Parts of tool calls of a chat answer."""
        return self._chunk(index, b'"delta":{"tool_calls":' + json_bytes(calls) + b"}", b"null", b"")

    def finish(self, index: int, reason: str, logprobs: bytes = b"null", ids: bytes = b"") -> bytes:
        """The end of a chat answer."""
        return self._chunk(index, b'"delta":{}', logprobs, ids, json_bytes(reason))

    def text(
        self, index: int, text: str, logprobs: bytes = b"null", ids: bytes = b"", reason: str | None = None
    ) -> bytes:
        """Text of a plain completion, with the reason where it is its end."""
        return self._chunk(index, b'"text":' + json_bytes(text), logprobs, ids, json_bytes(reason))

    def usage(self, usage: Usage) -> bytes:
        """The last chunk, without choices."""
        return self._head + b'],"usage":' + json_bytes(usage) + b"}\n\n"


def token_ids_field(ids: Sequence[int], name: bytes = b"token_ids") -> bytes:
    """A choice's field with token ids."""
    return b',"' + name + b'":' + json_bytes(list(ids))
