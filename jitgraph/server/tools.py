"""Tools in chat requests: definitions checked, the parser that fits the model, the schema that forces a call.

Pure; event loop's thread. Definitions and choices are OpenAI's, as plain JSON values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from jitgraph.errors import RequestError
from jitgraph.server.tool_forms import (
    FORCED,
    HERMES,
    LLAMA,
    MISTRAL,
    Delta,
    Form,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    collect,
)
from jitgraph.server.tool_parsers import MOST_CALLS, NAME, ToolParser

__all__ = [
    "Choice",
    "Delta",
    "TextDelta",
    "ToolCall",
    "ToolCallDelta",
    "ToolParser",
    "check_choice",
    "check_tools",
    "collect",
    "forced_parser",
    "forced_schema",
    "form_of",
    "parser_for",
]

MAX_TOOLS = 128
MAX_DESCRIPTION_CHARS = 16_384
MAX_SCHEMA_BYTES = 64 * 1024
"""Largest parameters of one tool, as JSON."""
MAX_SCHEMA_DEPTH = 32
"""Deepest nesting of parameters."""
_DATA = ("const", "enum", "default", "examples", "example")
"""Keywords of JSON Schema whose values are data: a ``$ref`` in them refers to nothing."""


# ---------------------------------------------------------------------------------------------------------- the parsers


def form_of(template: str) -> Form | None:
    """How a model with this chat template writes calls; None where it writes none, or in a way not known here."""
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
        return MISTRAL
    tagged = "<tool_call>" in template and "arguments" in template
    if tagged and "<function=" not in template and "<arg_key>" not in template:  # other families under the same tag
        return HERMES
    if "<|python_tag|>" in template or '"parameters": dictionary of argument' in template:
        return LLAMA
    return None


def parser_for(
    template: str,
    names: Collection[str] | None = None,
    most_calls: int = MOST_CALLS,
    make_id: Callable[[], str] | None = None,
) -> ToolParser | None:
    """A parser for one answer of a model with this chat template; None where its calls cannot be told from text.

    Args:
        template: the template's source.
        names: functions of the request; what looks like a call of another is text. None: any.
        most_calls: further calls are text.
        make_id: where ids of calls come from, in place of chance.
    """
    form = form_of(template)
    return None if form is None else ToolParser(form, names, most_calls, make_id)


def forced_parser(
    template: str, names: Collection[str] | None = None, make_id: Callable[[], str] | None = None
) -> ToolParser:
    """A parser for one answer under the grammar of ``forced_schema``. Ids are those that the template accepts."""
    form = form_of(template)
    short = Form(FORCED.markers, FORCED.bare, FORCED.listed, short_ids=form is not None and form.short_ids)
    return ToolParser(short, names, MOST_CALLS, make_id)


# ------------------------------------------------------------------------------------------------------ the definitions


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Tool definitions as chat templates take them, each with a description and parameters.

    Raises:
        RequestError: too many, too large, nested too deeply or malformed; the message names the field.
    """
    if not isinstance(tools, list):
        raise RequestError("tools must be a list of tool definitions")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries; {MAX_TOOLS} are possible")
    checked = [_checked_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    seen: set[str] = set()
    for i, tool in enumerate(checked):
        name = tool["function"]["name"]
        if name in seen:
            raise RequestError(f"tools[{i}].function.name: there are two functions {name}; give each its own name")
        seen.add(name)
    return checked


def _checked_tool(tool: Any, where: str) -> dict[str, Any]:
    _only(tool, ("type", "function"), where)
    if tool.get("type", "function") != "function":
        raise RequestError(f"{where}.type must be function, the only kind of tool")
    function, where = tool.get("function"), f"{where}.function"
    _only(function, ("name", "description", "parameters", "strict"), where)
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(f"{where}.name must be 1 to 64 letters, digits, dots, dashes and underscores")
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise RequestError(f"{where}.description must be a text")
    if len(description) > MAX_DESCRIPTION_CHARS:
        raise RequestError(
            f"{where}.description has {len(description)} characters; {MAX_DESCRIPTION_CHARS} are possible"
        )
    if function.get("strict") not in (None, True, False):
        raise RequestError(f"{where}.strict must be true or false")
    parameters = _checked_parameters(function.get("parameters"), f"{where}.parameters")
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _only(value: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be an object")
    for name in value:
        if name not in names:
            raise RequestError(f"{where}.{name!s:.64} is not a field that a tool has")


def _checked_parameters(parameters: Any, where: str) -> dict[str, Any]:
    if parameters is None:
        return {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise RequestError(f"{where} must be an object, a JSON schema")
    if _deeper_than(parameters, MAX_SCHEMA_DEPTH):
        raise RequestError(f"{where} is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    try:
        size = len(msgspec.json.encode(parameters))
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError) as error:
        raise RequestError(f"{where} is no JSON: {error}") from None
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(f"{where} has {size} bytes; {MAX_SCHEMA_BYTES} are possible")
    return parameters


def _deeper_than(value: Any, most: int) -> bool:
    level: list[Any] = [value]
    for _ in range(most):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return (one for one in inner if isinstance(one, (dict, list, tuple)))


# --------------------------------------------------------------------------------------------------------- forced calls


class Choice(NamedTuple):
    """What ``tool_choice`` asks for."""

    mode: str
    """``none``, ``auto``, ``required`` or ``named``."""
    name: str | None = None
    """The one function to call."""

    @property
    def forced(self) -> bool:
        """Whether the answer must be calls and nothing else."""
        return self.mode in ("required", "named")


def check_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> Choice:
    """``tool_choice`` for these checked tools. Without a choice it is ``auto`` where there are tools, else ``none``.

    Raises:
        RequestError: no choice that there is, a function that is not defined, or a call wanted without tools.
    """
    if choice is None:
        return Choice("auto" if tools else "none")
    if choice == "none":
        return Choice("none")
    if not tools:
        raise RequestError("tool_choice is only possible with tools")
    if choice in ("auto", "required"):
        return Choice(choice)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise RequestError("tool_choice must be none, auto, required, or name a function")
    if all(tool["function"]["name"] != name for tool in tools):
        raise RequestError(f"tool_choice.function.name: {name:.64} is not one of the tools")
    return Choice("named", name)


def forced_schema(tools: Sequence[Mapping[str, Any]], name: str | None = None, parallel: bool = True) -> dict[str, Any]:
    """The JSON schema of an answer that is nothing but calls, for a ``json_schema`` grammar.

    Args:
        tools: checked definitions, at least one.
        name: the one function to call, once; None: any of them.
        parallel: a list of one call or more; False: one call alone.

    Each tool's parameters become a definition of their own, and references inside them are led there.
    """
    chosen = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for i, function in enumerate(chosen):
        place = f"#/$defs/parameters{i}"
        definitions[f"parameters{i}"] = _moved(function["parameters"], place)
        properties = {"name": {"const": function["name"]}, "arguments": {"$ref": place}}
        required = ["name", "arguments"]
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if name is None and parallel:
        call = {"type": "array", "items": call, "minItems": 1, "maxItems": MOST_CALLS}
    return {**call, "$defs": definitions}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references within itself hold where it stands below ``root``."""
    if isinstance(schema, list):
        return [_moved(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = root + value[1:]
        else:
            moved[key] = value if key in _DATA else _moved(value, root)
    return moved
