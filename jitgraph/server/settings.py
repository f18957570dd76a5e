"""Settings of the HTTP server: what it serves, to whom, and the most it accepts. Nothing runs here.

Every cap is checked before any work is done for the request that it concerns.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from jitgraph.errors import ConfigError
from jitgraph.ipc.messages import MAX_TIMEOUT_S
from jitgraph.server.cors import Cors
from jitgraph.server.records import RequestRecord

SALT_CHARS = 256
"""Longest ``cache_salt`` of a request."""


@dataclass(frozen=True)
class ServerSettings:
    """What the server does and how much of it.

    Raises:
        ConfigError: a cap below 1, an empty key or name, or what is no origin.
    """

    served_names: tuple[str, ...] = ()
    """Names under which clients find the model; the first is the one that answers carry. Empty: the engine's name."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of them opens every route; empty: no key is wanted."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the server may be asked where no key is wanted, besides this machine's own; ``*`` is any, and
    empty too."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (``https://host:port``) whose pages may use the server from a browser; ``*`` is any."""
    chat_template: str | None = None
    """Jinja source that takes the place of the checkpoint's own template; never comes from a request."""
    template_variables: frozenset[str] = frozenset({"enable_thinking", "thinking", "reasoning_effort"})
    """Names that ``chat_template_kwargs`` may set, where the template reads them."""
    max_tokens_rolling: int = 4096
    """Tokens that a chat answer may have by default where the context has no end (rolling KV window)."""

    max_body_bytes: int = 4 * 2**20
    """Largest body of a request."""
    max_headers: int = 100
    """Most header lines."""
    max_header_bytes: int = 32 * 1024
    """Most bytes of request line and headers together."""
    max_open_requests: int = 256
    """Requests that are being answered at once; one more is turned away with 429 before its body is read."""
    max_messages: int = 2048
    """Most messages of a conversation."""
    max_content_parts: int = 1024
    """Most parts of one message."""
    max_n: int = 8
    """Most answers to one prompt."""
    max_prompts: int = 32
    """Most prompts of one completions request."""
    max_streams_per_request: int = 64
    """Most prompts times answers."""
    max_answers: int | None = None
    """Answers that all engines together make or let wait, as they were told; None leaves it to them to refuse."""
    max_stops: int = 16
    """Most stop strings."""
    max_stop_chars: int = 1024
    """Longest stop string."""
    max_logprobs: int = 20
    """Most alternatives reported for a token."""
    max_tools: int = 128
    """Most tool definitions."""
    max_tool_calls: int = 1024
    """Most tool calls in one message."""
    max_schema_bytes: int = 64 * 1024
    """Largest JSON schema, regular expression or grammar."""
    max_schema_depth: int = 32
    """Deepest nesting of a JSON schema."""
    max_tokenize_bytes: int = 2**19
    """Longest text of one ``/tokenize``, in UTF-8; every byte may be a token."""
    max_detokenize_ids: int = 2**19
    """Most ids of one ``/detokenize``."""

    request_timeout_s: float | None = None
    """What the engine may take for one answer, its wait in the queue included; None is any time."""
    body_timeout_s: float = 30.0
    """How long a body may take to arrive."""
    head_timeout_s: float = 15.0
    """How long request line and headers may take to arrive."""
    send_timeout_s: float = 60.0
    """How long a client may leave what it was sent unread before its request is cancelled."""
    render_timeout_s: float = 2.0
    """How long the chat template may take."""
    tokenize_timeout_s: float = 60.0
    """How long a prompt may take to become token ids."""
    text_threads: int = 4
    """Prompts that are rendered and tokenised at once."""
    inline_chars: int = 4096
    """Up to this many characters a text is tokenised on the event loop; longer ones go to a thread."""
    silence_s: float = 2.0
    """``/health`` fails once the engine has said nothing for this long; a live one speaks four times a second."""

    on_request_done: Callable[[RequestRecord], None] | None = None
    """Gets one record for each request that reached a model route, when it has ended however it did."""
    scrape: Callable[[str], Awaitable[tuple[bytes, str]]] | None = None
    """Body and content type of ``/metrics`` for the value of an ``Accept`` header; None: there is no such route."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and value <= 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
        if self.request_timeout_s is not None and self.request_timeout_s > MAX_TIMEOUT_S:
            raise ConfigError(f"request_timeout_s must be at most {MAX_TIMEOUT_S:g}, not {self.request_timeout_s}")
        Cors(self.allowed_origins)
        if any(not key for key in self.api_keys):
            raise ConfigError("an API key is empty: give one with characters, or none at all")
        if any(not name for name in self.served_names):
            raise ConfigError("a served model name is empty: give one with characters, or none at all")
