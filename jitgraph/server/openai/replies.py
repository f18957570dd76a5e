"""What the server answers, as msgspec records: the description of the interface and the answers are made from them."""

from __future__ import annotations

from typing import Literal

import msgspec


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all answers."""


class PromptDetails(Reply, frozen=True, kw_only=True):
    """More about the prompt's tokens."""

    cached_tokens: int = 0
    """Those whose keys and values an earlier request had left."""


class Usage(Reply, frozen=True, kw_only=True):
    """Tokens of a request; prompts count once whatever ``n`` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Alternative(Reply, frozen=True, kw_only=True):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Reply, frozen=True, kw_only=True):
    """A token of a chat answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(Reply, frozen=True, kw_only=True):
    """Log-probabilities of a chat answer or of a part of it."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Reply, frozen=True, kw_only=True):
    """Log-probabilities of a plain completion or of a part of it; lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CalledFunction(Reply, frozen=True, kw_only=True):
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


class CalledTool(Reply, frozen=True, kw_only=True):
    """A tool call of an answer."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class FunctionChunk(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a function call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallChunk(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a tool call; id, type and name come with its first part."""

    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionChunk


class AnswerMessage(Reply, frozen=True, kw_only=True):
    """The message of a chat answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[CalledTool] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(Reply, frozen=True, kw_only=True):
    """One chat answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatReply(Reply, frozen=True, kw_only=True):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(Reply, frozen=True, kw_only=True):
    """One plain completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class CompletionReply(Reply, frozen=True, kw_only=True):
    """The answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(Reply, frozen=True, kw_only=True):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jitgraph"
    max_model_len: int | None = None
    """Tokens of prompt and answer together; null where there is no limit."""


class ModelList(Reply, frozen=True, kw_only=True):
    """The answer of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]


class Tokenized(Reply, frozen=True, kw_only=True):
    """The answer of ``/tokenize``."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Reply, frozen=True, kw_only=True):
    """The answer of ``/detokenize``."""

    prompt: str


class Status(Reply, frozen=True, kw_only=True):
    """The answer of ``/health`` and ``/ready`` where all is well."""

    status: str


class Version(Reply, frozen=True, kw_only=True):
    """The answer of ``/version``."""

    version: str
    protocol: int
    """Of the records between this process and the engine's."""
