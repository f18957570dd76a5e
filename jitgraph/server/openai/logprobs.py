"""Log-probabilities in the two forms of OpenAI's interface. Pure.

A token may be a part of a character, so texts of tokens show such bytes as escapes; ``bytes`` has them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from jitgraph.ipc.messages import WireLogprobs
from jitgraph.server.openai.replies import Alternative, ChatLogprobs, CompletionLogprobs, TokenLogprob
from jitgraph.text.pieces import TextStream, TokenPieces

LEAST = -9999.0
"""Stands for a probability of 0, as with OpenAI: JSON has no infinity."""


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return logprob if math.isfinite(logprob) else LEAST


def _escaped(data: bytes, prefix: str) -> str:
    """The bytes as text; as escapes where they are no whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(pieces: TokenPieces, tokens: Iterable[WireLogprobs]) -> ChatLogprobs:
    """The form of chat answers."""

    def alternative(token_id: int, logprob: float) -> Alternative:
        data = pieces.bytes_of(token_id, False)
        return Alternative(token=_escaped(data, ""), logprob=finite(logprob), bytes=list(data))

    content = []
    for one in tokens:
        own = alternative(one.token_id, one.logprob)
        top = [alternative(token_id, logprob) for token_id, logprob in one.top]
        content.append(TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


class CompletionLogprobWriter:
    """Makes the form of plain completions, part by part, and knows at which character each token begins.

    Args:
        count: alternatives asked for; 0 reports the chosen tokens alone.
    """

    def __init__(self, pieces: TokenPieces, count: int, skip_special_tokens: bool = True) -> None:
        self._pieces = pieces
        self._count = count
        self._stream = TextStream(pieces, skip_special_tokens)
        self._offset = 0

    def skip_prompt(self, ids: Sequence[int]) -> None:
        """The text continues these ids, which are no part of it."""
        self._stream.prime(ids)

    def add(self, tokens: Sequence[tuple[int, WireLogprobs | None]]) -> CompletionLogprobs:
        """The next tokens; None for the first of a prompt, which has no probability."""
        names, own, tops, offsets = [], [], [], []
        for token_id, logprobs in tokens:
            names.append(self._name(token_id))
            own.append(None if logprobs is None else finite(logprobs.logprob))
            tops.append(None if logprobs is None else self._top(logprobs))
            offsets.append(self._offset)
            self._offset += len(self._stream.push(token_id))
        top_logprobs: list[dict[str, float] | None] | None = tops if self._count else None
        return CompletionLogprobs(tokens=names, token_logprobs=own, top_logprobs=top_logprobs, text_offset=offsets)

    def _top(self, logprobs: WireLogprobs) -> dict[str, float]:
        """The alternatives and the token itself; of two with the same text the likelier one stays."""
        found: dict[str, float] = {}
        for token_id, logprob in (*logprobs.top[: self._count], (logprobs.token_id, logprobs.logprob)):
            found.setdefault(self._name(token_id), finite(logprob))
        return found

    def _name(self, token_id: int) -> str:
        return _escaped(self._pieces.bytes_of(token_id, False), "bytes:")
