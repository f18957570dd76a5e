"""What arrives in a stream of server-sent events: events out of pieces of bytes, tokens out of events. Pure.

One ``Answer`` belongs to one request of the load generator's event loop.
"""

from __future__ import annotations

import json
from typing import Any

DONE = "[DONE]"


class Failed(Exception):
    """A request that failed: ``kind`` is what errors are counted by, the message is what the server or library said."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Events:
    """Cuts bytes into events, wherever the network cut them. Lines may end with CR LF or LF."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of all events that ``piece`` completes; comments and other fields are dropped."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found = []
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", "replace")
            if text.startswith("data:"):
                self._data.append(text.removeprefix("data:").removeprefix(" "))
            elif not text and self._data:
                found.append("\n".join(self._data))
                self._data = []
        return found


class Answer:
    """What a request has got so far."""

    def __init__(self) -> None:
        self.token_ms: list[float] = []
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        """As the server counts them; None while it has not said."""
        self.finish_reason: str | None = None
        self.done = False

    @property
    def tokens(self) -> int:
        """Output tokens as the server counted them, else those that came."""
        return len(self.token_ms) if self.output_tokens is None else self.output_tokens

    def take(self, data: str, at_ms: float) -> None:
        """Takes the data of one event that came at ``at_ms``.

        An event brings the tokens by which the server's running count has grown. Where it does not count in each event,
        one with text brings one token.

        Raises:
            Failed: the event reports an error, or is none of OpenAI's interface.
        """
        if data == DONE:
            self.done = True
            return
        try:
            document = json.loads(data)
            if document.get("error"):
                raise Failed("stream error", error_message(document))
            choices = document.get("choices") or []
            usage = document.get("usage")
            if usage:
                self.prompt_tokens = int(usage["prompt_tokens"])
                self.output_tokens = int(usage["completion_tokens"])
            text = any(_has_text(choice) for choice in choices)
            reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Failed("bad event", f"not an event of OpenAI's interface: {data[:200]}") from None
        self.finish_reason = (reasons or [self.finish_reason])[0]
        # Counts without choices are the last event's, and say nothing about when their tokens came.
        new = (self.output_tokens or 0) - len(self.token_ms) if choices and usage else int(text)
        self.token_ms += [at_ms] * new


def error_message(document: Any) -> str:
    """What an error of OpenAI's interface says, or all of it where it has another shape."""
    error = document.get("error", document) if isinstance(document, dict) else document
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    parts = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
    return any(parts) or bool(delta.get("tool_calls"))
