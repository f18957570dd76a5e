"""Tool calls in a chat answer: whether the model may or must call, and how its text is read for it. Pure.

``server/tools.py`` knows the families and their forms; here its words become those of OpenAI's interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from jitgraph.errors import RequestError
from jitgraph.ipc.messages import Grammar
from jitgraph.server.openai.decode import decode_raw, is_null
from jitgraph.server.openai.errors import bad_request, unsupported
from jitgraph.server.openai.limits import at_most
from jitgraph.server.openai.replies import FunctionChunk, ToolCallChunk
from jitgraph.server.openai.schema import ChatRequest, NamedTool, Tool
from jitgraph.server.settings import ServerSettings
from jitgraph.server.tools import (
    Choice,
    Delta,
    TextDelta,
    ToolParser,
    check_choice,
    check_tools,
    forced_parser,
    forced_schema,
    parser_for,
)

Parts = list[str | ToolCallChunk]

_NO_CALLS = Choice("none")


class Reader(Protocol):
    """Takes one answer's text as it comes, gives texts and parts of calls."""

    @property
    def called(self) -> bool:
        """Whether an answer that ended by itself ended in order to call."""

    def feed(self, text: str) -> Parts:
        """What more text adds."""

    def finish(self) -> Parts:
        """What was held back."""


class PlainText:
    """No tools: all of it is text."""

    called = False

    def feed(self, text: str) -> Parts:
        """The text."""
        return [text]

    def finish(self) -> Parts:
        """Nothing is held back."""
        return []


class CallReader:
    """Reads calls out of the text.

    Args:
        parser: finds them.
        several: False lets only the first call pass, and no text after it.
        named: the one function was named by the request; OpenAI ends such an answer with ``stop``.
    """

    def __init__(self, parser: ToolParser, several: bool, named: bool) -> None:
        self._parser = parser
        self._several = several
        self._named = named
        self._calls = 0

    @property
    def called(self) -> bool:
        """Whether there was a call, and it was the model's own wish."""
        return self._calls > 0 and not self._named

    def feed(self, text: str) -> Parts:
        """What more text adds."""
        return self._parts(self._parser.feed(text))

    def finish(self) -> Parts:
        """What was held back."""
        return self._parts(self._parser.finish())

    def _parts(self, deltas: Sequence[Delta]) -> Parts:
        found: Parts = []
        for delta in deltas:
            if isinstance(delta, TextDelta):
                if self._several or not self._calls:
                    found.append(delta.text)
                continue
            self._calls = max(self._calls, delta.index + 1)
            if delta.index > 0 and not self._several:
                continue
            opens = delta.id is not None
            function = FunctionChunk(name=delta.name, arguments=delta.arguments)
            kind = "function" if opens else None
            found.append(ToolCallChunk(index=delta.index, id=delta.id, type=kind, function=function))
        return found


@dataclass(frozen=True)
class CallMode:
    """What one request says about tools."""

    tools: list[dict[str, Any]] | None = None
    """The definitions as the template is given them; None where it is not."""
    template: str = ""
    choice: Choice = _NO_CALLS
    parallel: bool = True
    grammar: Grammar | None = None
    """Shapes the text where the model must call."""

    def reader(self) -> Reader:
        """Makes the reader of one answer."""
        if self.tools is None:
            return PlainText()
        names = [tool["function"]["name"] for tool in self.tools]
        if self.choice.forced:
            only = names if self.choice.name is None else [self.choice.name]
            return CallReader(forced_parser(self.template, only), True, self.choice.name is not None)
        parser = parser_for(self.template, names)
        assert parser is not None  # ``call_mode`` has looked
        return CallReader(parser, self.parallel, False)


def call_mode(request: ChatRequest, template: str | None, caps: ServerSettings) -> CallMode:
    """What the request's ``tools``, ``tool_choice`` and ``parallel_tool_calls`` mean.

    Raises:
        ApiError: 400; tools that this model cannot be shown, or a choice that is not among them.
    """
    tools = as_tools(request.tools, caps)
    given = request.tool_choice
    plain = {"type": "function", "function": {"name": given.function.name}} if isinstance(given, NamedTool) else given
    try:
        choice = check_choice(plain, tools)
    except RequestError as error:
        raise bad_request(str(error), "tool_choice", "invalid_value") from None
    if choice.mode == "none":
        return CallMode()
    if "tools" not in (template or ""):
        raise unsupported("tools", "this model's chat template does not know tools")
    source, parallel = template or "", request.parallel_tool_calls is not False
    if not choice.forced:
        if parser_for(source) is None:
            why = "this model's way of calling them is not known; a tool_choice can still force a call"
            raise unsupported("tools", why)
        return CallMode(tools, source, choice, parallel)
    if request.response_format is not None or request.structured_outputs is not None:
        raise bad_request("a forced tool_choice excludes other forms of the answer", "tool_choice", "invalid_value")
    schema = msgspec.json.encode(forced_schema(tools, choice.name, parallel)).decode()
    at_most("tools", schema, caps.max_schema_bytes, "characters of schema together")
    return CallMode(tools, source, choice, parallel, Grammar("json_schema", schema))


def as_tools(tools: Sequence[Tool] | None, caps: ServerSettings) -> list[dict[str, Any]]:
    """The tool definitions as chat templates take them.

    Raises:
        ApiError: 400; parameters that are no object, too large or nested too deeply, a name that stands twice.
    """
    plain = []
    for i, tool in enumerate(tools or ()):
        function: dict[str, Any] = {"name": tool.function.name, "description": tool.function.description}
        if not is_null(tool.function.parameters):
            where = f"tools[{i}].function.parameters"
            function["parameters"] = decode_raw(
                tool.function.parameters, where, caps.max_schema_bytes, caps.max_schema_depth
            )
        plain.append({"type": "function", "function": function})
    try:
        return check_tools(plain)
    except RequestError as error:
        named = str(error).split(" ", 1)[0].rstrip(":")
        raise bad_request(str(error), named, "invalid_value") from None
