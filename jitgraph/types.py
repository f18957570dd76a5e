"""The vocabulary shared by every floor: what a user asks for and what comes back. No torch.

All records are frozen and validate themselves, so that whatever crosses a floor (or a process) is known good.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

from jitgraph.errors import RequestError

MAX_STOP_TOKEN_IDS = 32
"""Stop token ids per request, EOS ids included: the width of a slot's stop list on the device."""
MAX_LOGPROBS = 20
"""Most alternatives per token whose log-probabilities can be asked for (OpenAI's own limit)."""
MAX_SEED = 2**64 - 1
MAX_TOKENS = 2**31 - 1
MIN_TEMPERATURE = 1e-5
"""Below this, dividing logits by the temperature loses them to rounding or overflow, and the choice is argmax
anyway."""


class FinishReason(str, enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """An EOS id, a stop token id or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the end of the context."""
    CANCELLED = "cancelled"
    """The caller withdrew the request."""


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RequestError(message)


def _as_tuple(value: object, name: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"{name} must be a list, not {value!r}")
    return tuple(value)


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens, and when to stop.

    The order is temperature, top-k, top-p (over what top-k left), min-p; values tied with a threshold are kept.
    The defaults are greedy decoding.

    Raises:
        RequestError: a value out of its range, with the range in the message.
    """

    max_tokens: int = 128
    """Most tokens to generate, at least 1."""
    min_tokens: int = 0
    """Stop ids cannot be chosen, and stop strings do not end the text, before this many tokens."""
    temperature: float = 0.0
    """0 is greedy, and so is anything below ``MIN_TEMPERATURE``; larger is more random."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    seed: int | None = None
    """Same seed, same logits: same tokens, in any batch. None draws a fresh seed for the request."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the sequence, besides the model's own EOS ids."""
    ignore_eos: bool = False
    """Do not stop at the model's EOS ids."""
    logprobs: int | None = None
    """Report each token's log-probability and those of this many alternatives (0 to 20); None reports nothing."""

    def __post_init__(self) -> None:
        given: object = self.stop  # callers without a type checker pass one string
        object.__setattr__(self, "stop", (given,) if isinstance(given, str) else _as_tuple(given, "stop"))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids, "stop_token_ids"))
        _check(isinstance(self.ignore_eos, bool), f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        for name in ("max_tokens", "min_tokens", "top_k"):
            value = getattr(self, name)
            _check(
                isinstance(value, int) and not isinstance(value, bool), f"{name} must be a whole number, not {value!r}"
            )
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _check(ok, f"{name} must be a finite number, not {value!r}")
        _check(
            1 <= self.max_tokens <= MAX_TOKENS, f"max_tokens must be at least 1 and below 2**31, not {self.max_tokens}"
        )
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), not {self.min_tokens}",
        )
        _check(0.0 <= self.temperature <= 100.0, f"temperature must be between 0 and 100, not {self.temperature}")
        _check(0 <= self.top_k < 2**31, f"top_k must be 0 (off) or a positive number, not {self.top_k}")
        _check(0.0 < self.top_p <= 1.0, f"top_p must be above 0 and at most 1, not {self.top_p}")
        _check(0.0 <= self.min_p <= 1.0, f"min_p must be between 0 and 1, not {self.min_p}")
        if self.seed is not None:
            ok = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed <= MAX_SEED
            _check(ok, f"seed must be a whole number from 0 to 2**64-1, not {self.seed!r}")
        for text in self.stop:
            _check(isinstance(text, str) and text != "", f"each stop string must be a non-empty text, not {text!r}")
        for token in self.stop_token_ids:
            ok = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31
            _check(ok, f"each stop token id must be a whole number from 0 up, not {token!r}")
        _check(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            f"at most {MAX_STOP_TOKEN_IDS} stop token ids are possible, not {len(self.stop_token_ids)}",
        )
        if self.logprobs is not None:
            ok = isinstance(self.logprobs, int) and not isinstance(self.logprobs, bool)
            _check(
                ok and 0 <= self.logprobs <= MAX_LOGPROBS,
                f"logprobs must be between 0 and {MAX_LOGPROBS}, not {self.logprobs!r}",
            )

    @property
    def greedy(self) -> bool:
        """True where the lean greedy graph serves: no randomness and no log-probabilities wanted."""
        return self.coldest and self.logprobs is None

    @property
    def coldest(self) -> bool:
        """True where the most likely token is taken."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True)
class Request:
    """What the engine is asked to do. Token ids only: text belongs to the floor of ``text/``."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one generated token under the model's raw distribution (before temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first, as many as were asked for."""


@dataclass(frozen=True)
class TokenChunk:
    """One engine step's news about one request. Times are ``time.perf_counter_ns`` of the engine's process."""

    request_id: int
    token_id: int | None
    """The new token; None where a request ends without one (cancelled)."""
    time_ns: int
    """When the host read the token."""
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Timings:
    """When things happened to one request, in milliseconds (MLPerf and AIPerf definitions)."""

    ttft_ms: float
    """From handing over the token ids to the first token id on the host."""
    itl_ms: tuple[float, ...] = ()
    """Gaps between consecutive tokens."""
    latency_ms: float = 0.0
    """From handing over the token ids to the last token id on the host."""

    @property
    def tpot_ms(self) -> float:
        """(latency - TTFT) / (tokens - 1); 0 for a single token."""
        return (self.latency_ms - self.ttft_ms) / len(self.itl_ms) if self.itl_ms else 0.0


@dataclass(frozen=True)
class RequestOutput:
    """What one prompt produced."""

    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = field(default=None)
