"""A chat request's messages as chat templates expect them. Pure.

Templates are written for plain dictionaries: a content that is one text, arguments of tool calls that are objects, and
nothing under names that a message does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from jitgraph.server.openai.errors import bad_request, unsupported
from jitgraph.server.openai.schema import ChatMessage, Part, ToolCall
from jitgraph.server.settings import ServerSettings


def as_messages(messages: Sequence[ChatMessage], reads: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The messages for a template; ``reads`` says whether it mentions a name.

    Raises:
        ApiError: 400; a part that is no text, or a tool's message without its call's id.
    """
    return [_as_message(message, f"messages[{i}]", reads) for i, message in enumerate(messages)]


def _as_message(message: ChatMessage, where: str, reads: Callable[[str], bool]) -> dict[str, Any]:
    role: str = message.role
    if role == "developer" and not reads("developer"):
        role = "system"  # the newer name of the same, which most templates do not know
    found: dict[str, Any] = {"role": role, "content": _content(message.content, f"{where}.content")}
    if message.tool_calls is not None and role != "assistant":
        raise bad_request(f"{where}.tool_calls belongs to the assistant", f"{where}.tool_calls", "invalid_value")
    if role == "tool" and message.tool_call_id is None:
        raise bad_request(f"{where}.tool_call_id is missing", f"{where}.tool_call_id", "missing_required_parameter")
    if message.content is None and role != "assistant":
        raise bad_request(f"{where}.content is missing", f"{where}.content", "missing_required_parameter")
    if message.tool_calls:
        found["tool_calls"] = [_as_call(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            found[name] = value
    return found


def _content(content: str | list[Part] | None, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join([_text_of(part, f"{where}[{i}]") for i, part in enumerate(content)])


def _text_of(part: Part, where: str) -> str:
    if part.type == "text" and part.text is not None:
        return part.text
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type in ("text", "refusal"):
        raise bad_request(f"{where}.{part.type} is missing", f"{where}.{part.type}", "missing_required_parameter")
    raise unsupported(f"{where}.type", "text is the only kind of content")


def _as_call(call: ToolCall) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates write out; as they are where they are none."""
    arguments: Any = call.function.arguments
    try:
        decoded = msgspec.json.decode(arguments)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        decoded = None  # a model's mistake, sent back to it
    if isinstance(decoded, dict):
        arguments = decoded
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def template_variables(
    given: Mapping[str, Any] | None, effort: str | None, reads: Callable[[str], bool], caps: ServerSettings
) -> dict[str, Any]:
    """What ``chat_template_kwargs`` and ``reasoning_effort`` set.

    Raises:
        ApiError: 400; a name that may not be set, or that the template does not read.
    """
    found: dict[str, Any] = {}
    for name, value in (given or {}).items():
        where = f"chat_template_kwargs.{name:.64}"
        if name not in caps.template_variables:
            allowed = ", ".join(sorted(caps.template_variables))
            raise unsupported(where, f"only {allowed} can be set")
        if not reads(name):
            raise unsupported(where, "this model's chat template does not read it")
        found[name] = value
    if effort is not None:
        if not reads("reasoning_effort"):
            raise unsupported("reasoning_effort", "this model's chat template does not read it")
        found["reasoning_effort"] = effort
    return found
