"""Chat templates: a conversation to the prompt text that a model was trained on.

No torch. A template is code that came with a checkpoint, so it runs in jinja2's immutable sandbox: no attributes
that start with an underscore, no changes to what it is given, bounded operations, a bounded source and result.
Always holds: the text equals what transformers renders from the same template and messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.text.sandbox import MAX_TEXT_CHARS, Sandbox

MAX_TEMPLATE_CHARS = 1_000_000
"""Longest template source; the largest published ones have some ten thousand characters."""
MAX_PROMPT_CHARS = MAX_TEXT_CHARS
"""Longest rendered conversation, far above any model's context."""


class _Refusal(Exception):
    """The template called ``raise_exception``."""


class _TooLong(Exception):
    """The rendered text passed the cap."""


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks the assistant's text for training: shown as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> Sandbox:
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.bound_filters()
    return environment


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain dictionaries.

    Raises:
        RequestError: none at all, or one that is not a mapping with a role.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of objects with role and content, not {type(messages).__name__}")
    if not messages:
        raise RequestError("a conversation needs at least one message with role and content")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {i} must be an object with a role (a text) and content, not {message!r:.80}")
    return [dict(message) for message in messages]


class ChatTemplate:
    """One template, compiled at its first use and kept.

    Args:
        source: jinja2 source as found in a checkpoint.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if len(self.source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"the chat template has {len(self.source)} characters, above the limit of {MAX_TEMPLATE_CHARS}; "
                f"shorten it"
            )
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is not valid in line {error.lineno} ({error.message}); correct it"
            ) from error
        except Exception as error:  # whatever else a damaged source drives the compiler into
            raise CheckpointError(f"the chat template cannot be compiled ({error}); correct it") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: objects with ``role`` and, as the template wants, ``content``, ``tool_calls`` and so on.
            add_generation_prompt: end with what opens the assistant's turn.
            tools: JSON schemas of callable functions, or None.
            variables: more names for the template, such as ``bos_token`` or ``enable_thinking``.

        Raises:
            CheckpointError: a template that cannot be compiled or that breaks the sandbox's rules.
            RequestError: messages that the template refuses or cannot render, or too long a result.
        """
        context = {
            **(variables or {}),
            "messages": _checked(messages),
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        compiled = self._compiled
        try:
            return _collect(compiled, context)
        except _Refusal as error:
            raise RequestError(f"the chat template refuses these messages ({error}); change them") from error
        except _TooLong as error:
            raise RequestError(
                f"the rendered conversation is over {MAX_PROMPT_CHARS} characters; shorten the messages"
            ) from error
        except SecurityError as error:
            raise CheckpointError(f"the chat template does what the sandbox forbids ({error}); correct it") from error
        except Exception as error:  # the template is foreign code: an undefined name, a wrong type, anything
            raise RequestError(
                f"the chat template cannot render these messages ({error}); check each one's role and content"
            ) from error


def _collect(compiled: jinja2.Template, context: Mapping[str, Any]) -> str:
    parts: list[str] = []
    length = 0
    for part in compiled.generate(**context):
        length += len(part)
        if length > MAX_PROMPT_CHARS:
            raise _TooLong
        parts.append(part)
    return "".join(parts)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Render a conversation with a template given as text; see ``ChatTemplate.render`` for meaning and errors.

    A token given as None is undefined in the template, as it is for a tokenizer without it.
    """
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    return ChatTemplate(template).render(
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        variables={name: text for name, text in tokens.items() if text is not None},
    )
