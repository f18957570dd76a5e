"""How model families write tool calls, and what a parser makes of them. Plain values, no state."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a call: first its id and name, then pieces of its arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class ToolCall(NamedTuple):
    """A whole call; ``arguments`` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


Delta = TextDelta | ToolCallDelta


@dataclass(frozen=True)
class Form:
    """How a family of models writes calls: an opening, a call or a list of them, what may follow."""

    markers: tuple[str, ...] = ()
    """What opens a call wherever it stands."""
    bare: str = ""
    """Characters that open a call without a marker where they are the first of the answer."""
    listed: bool = False
    """Several calls stand in a JSON list."""
    separator: str = ""
    """What stands between two calls outside a list; empty: nothing does."""
    closing: str = ""
    """What ends a call after its marker."""
    several: bool = False
    """Outside a list a call may be followed by another."""
    short_ids: bool = False
    """Ids have nine letters and digits: the family's templates refuse all others."""


LLAMA = Form(markers=("<|python_tag|>",), bare="{", separator=";", several=True)
"""``{"name": ..., "parameters": {...}}``, alone or behind ``<|python_tag|>``."""
HERMES = Form(markers=("<tool_call>",), closing="</tool_call>", several=True)
"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen2.5, Qwen3."""
MISTRAL = Form(markers=("[TOOL_CALLS]",), bare="[", listed=True, short_ids=True)
"""``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``; the marker is lost where special tokens are skipped."""
FORCED = Form(bare="{[", listed=True)
"""A call or a list of calls and nothing else, as the schema of ``forced_schema`` wants it."""


def new_id(short: bool = False) -> str:
    """An id for a call."""
    if short:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


def collect(deltas: Iterable[Delta]) -> tuple[str, list[ToolCall]]:
    """The whole text and the whole calls of all of an answer's pieces."""
    text: list[str] = []
    calls: list[tuple[str, str, list[str]]] = []
    for delta in deltas:
        if isinstance(delta, TextDelta):
            text.append(delta.text)
            continue
        if delta.id is not None and delta.name is not None:
            calls.append((delta.id, delta.name, []))
        calls[delta.index][2].append(delta.arguments)
    return "".join(text), [ToolCall(call_id, name, "".join(parts)) for call_id, name, parts in calls]
