"""The requests of OpenAI's interface as msgspec records: what may be in them, and of which type.

A field that is not here is refused by its name. ``Unsupported`` marks fields of OpenAI's own interface that this
server does not do: null, which many clients send for what they leave out, is all they may be. Fields under *without
meaning here* are taken because they ask nothing of a server that stores nothing and bills nobody.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Unsupported: TypeAlias = None


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of everything that clients send."""


class StreamOptions(Record, frozen=True, kw_only=True):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Record, frozen=True, kw_only=True):
    """A schema under a name."""

    name: str
    schema: msgspec.Raw
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Record, frozen=True, kw_only=True):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Record, frozen=True, kw_only=True):
    """The same in other servers' words: exactly one of these."""

    json: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    """A schema."""
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    """One of these texts."""
    grammar: str | None = None
    """In Lark's notation."""


class FunctionCall(Record, frozen=True, kw_only=True):
    """Which function the model called, and its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(Record, frozen=True, kw_only=True):
    """A call in an earlier answer."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class Part(Record, frozen=True, kw_only=True):
    """A part of a message's content; only text has a meaning for these models."""

    type: str
    text: str | None = None
    refusal: str | None = None
    cache_control: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    image_url: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    input_audio: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    file: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    video_url: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class ChatMessage(Record, frozen=True, kw_only=True):
    """One message, also as an earlier answer of this server or another is sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    audio: Unsupported = None
    function_call: Unsupported = None


class FunctionDefinition(Record, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    strict: bool | None = None


class Tool(Record, frozen=True, kw_only=True):
    """A tool; functions are the only kind."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class NamedFunction(Record, frozen=True, kw_only=True):
    """A function by name."""

    name: str


class NamedTool(Record, frozen=True, kw_only=True):
    """The tool that must be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


class Sampled(Record, frozen=True, kw_only=True):
    """What chat and plain completions share."""

    model: str | None = None
    """None takes the one model there is."""
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Beyond OpenAI's interface, as other open servers name them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None
    """Requests share cached prompts only with requests of the same salt."""
    include_stop_str_in_output: bool | None = None

    # Without meaning here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class ChatRequest(Sampled, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """Given to the chat template, where it reads it."""
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    add_generation_prompt: bool | None = None

    chat_template: Unsupported = None
    documents: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    verbosity: Unsupported = None


class CompletionRequest(Sampled, frozen=True, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[int | str | list[int]]
    """A text, token ids, or a list of either."""
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    suffix: Unsupported = None


class TokenizeRequest(Record, frozen=True, kw_only=True):
    """``POST /tokenize``: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Record, frozen=True, kw_only=True):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool | None = None
