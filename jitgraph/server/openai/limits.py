"""The caps on what one request may hold, checked before any work is done for it. Pure."""

from __future__ import annotations

from collections.abc import Sequence, Sized

from jitgraph.server.openai.errors import bad_request, unsupported
from jitgraph.server.openai.schema import ChatMessage, ChatRequest, CompletionRequest, Sampled, Tool
from jitgraph.server.settings import SALT_CHARS, ServerSettings
from jitgraph.types import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS


def at_most(param: str, items: Sized | None, most: int, what: str) -> None:
    """Refuses more than ``most`` of something.

    Raises:
        ApiError: 400, naming ``param``.
    """
    if items is not None and len(items) > most:
        raise bad_request(f"{param} has {len(items)} {what}; {most} are possible", param, "too_large")


def between(param: str, value: int | None, least: int, most: int) -> None:
    """Refuses a number outside a range.

    Raises:
        ApiError: 400, naming ``param``.
    """
    if value is not None and not least <= value <= most:
        raise bad_request(f"{param} must be from {least} to {most}, not {value}", param, "invalid_value")


def check_answers(prompts: int, n: int, caps: ServerSettings) -> None:
    """Refuses more answers than may ever be made at once: to try again later would not help.

    Raises:
        ApiError: 400, naming ``n`` or ``prompt``.
    """
    most = min(caps.max_streams_per_request, caps.max_answers or caps.max_streams_per_request)
    if prompts * n > most:
        what = f"prompts times n is {prompts * n}" if prompts > 1 else f"n is {n}"
        raise bad_request(f"{what}; {most} answers are possible at once", "n" if n > 1 else "prompt", "too_large")


def stops_of(request: Sampled) -> tuple[str, ...]:
    """The stop strings as a tuple."""
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def check_sampled(request: Sampled, caps: ServerSettings) -> None:
    """What chat and plain completions share.

    Raises:
        ApiError: 400, naming the field.
    """
    between("n", request.n, 1, caps.max_n)
    stops = stops_of(request)
    at_most("stop", stops, caps.max_stops, "entries")
    for stop in stops:
        at_most("stop", stop, caps.max_stop_chars, "characters in an entry")
        if not stop:
            raise bad_request("stop: a stop string must not be empty", "stop", "invalid_value")
    at_most("logit_bias", request.logit_bias, MAX_LOGIT_BIAS, "entries")
    at_most("stop_token_ids", request.stop_token_ids, MAX_STOP_TOKEN_IDS, "entries")
    at_most("cache_salt", request.cache_salt, SALT_CHARS, "characters")
    options = request.stream_options
    if options is not None:
        if not request.stream:
            raise bad_request("stream_options is only possible with stream: true", "stream_options", "invalid_value")
        if options.include_obfuscation:
            raise unsupported("stream_options.include_obfuscation")
        if options.continuous_usage_stats and not options.include_usage:
            where = "stream_options.continuous_usage_stats"
            raise bad_request(f"{where} is only possible with include_usage: true", where, "invalid_value")


def check_chat(request: ChatRequest, caps: ServerSettings) -> None:
    """All of a chat request.

    Raises:
        ApiError: 400, naming the field.
    """
    check_sampled(request, caps)
    check_answers(1, request.n or 1, caps)
    check_conversation(request.messages, request.tools, caps)
    between("top_logprobs", request.top_logprobs, 0, caps.max_logprobs)
    if request.top_logprobs and not request.logprobs:  # 0 asks for nothing
        raise bad_request("top_logprobs is only possible with logprobs: true", "top_logprobs", "invalid_value")


def check_conversation(messages: Sequence[ChatMessage], tools: Sequence[Tool] | None, caps: ServerSettings) -> None:
    """Messages and tool definitions.

    Raises:
        ApiError: 400, naming the field.
    """
    if not messages:
        raise bad_request("messages is empty: give at least one", "messages", "invalid_value")
    at_most("messages", messages, caps.max_messages, "entries")
    for i, message in enumerate(messages):
        if isinstance(message.content, list):
            at_most(f"messages[{i}].content", message.content, caps.max_content_parts, "parts")
        at_most(f"messages[{i}].tool_calls", message.tool_calls, caps.max_tool_calls, "entries")
    at_most("tools", tools, caps.max_tools, "entries")


def check_completion(request: CompletionRequest, caps: ServerSettings) -> None:
    """All of a plain completion request but the prompt's own form.

    Raises:
        ApiError: 400, naming the field.
    """
    check_sampled(request, caps)
    between("logprobs", request.logprobs, 0, caps.max_logprobs)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "only the value of n is possible")
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens must be at least 1, or 0 with echo", "max_tokens", "invalid_value")
