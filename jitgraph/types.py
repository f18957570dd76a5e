"""The vocabulary shared by every floor: what a user asks for and what comes back. No torch.

All records are frozen and validate themselves, so that whatever crosses a floor (or a process) is known good.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

from jitgraph.errors import RequestError

MAX_STOP_TOKEN_IDS = 32
"""Stop token ids per request, EOS ids included: the width of a slot's stop list on the device."""
MAX_LOGPROBS = 20
"""Most alternatives per token whose log-probabilities can be asked for (OpenAI's own limit)."""
MAX_LOGIT_BIAS = 300
"""Biased ids per request (OpenAI's own limit): the width of a slot's bias list on the device."""
MAX_SEED = 2**64 - 1
MAX_TOKENS = 2**31 - 1
MIN_TEMPERATURE = 1e-5
"""Below this, dividing logits by the temperature loses them to rounding or overflow, and the choice is argmax
anyway."""
MIN_REPETITION_PENALTY = 0.01
"""Below this a divided logit comes near the end of float32."""
MAX_REPETITION_PENALTY = 10.0
MAX_PENALTY = 2.0
"""Presence and frequency penalties lie between minus this and this (OpenAI's own limits)."""
MAX_BIAS = 100.0
"""A bias lies between minus this and this: either end as good as bars an id or forces it."""
GRAMMAR_KINDS = ("json_object", "json_schema", "regex", "lark")
MAX_GRAMMAR_BYTES = 64 * 1024
"""Longest source of a grammar, in UTF-8: what compiling one may cost grows with it."""


class FinishReason(str, enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """An EOS id, a stop token id or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the end of the context."""
    CANCELLED = "cancelled"
    """The caller withdrew the request, or its deadline passed before it could begin."""
    FAILED = "failed"
    """The output could not be kept to its grammar any longer: following it went over the limits set to it."""


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RequestError(message)


def _as_tuple(value: object, name: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"{name} must be a list, not {value!r}")
    return tuple(value)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _bias_entries(value: object) -> tuple[tuple[int, float], ...]:
    """A mapping, or pairs, of ids and biases as pairs ascending by id."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"logit_bias must map token ids to numbers, not be {value!r}")
    _check(len(value) <= MAX_LOGIT_BIAS, f"logit_bias has {len(value)} entries; {MAX_LOGIT_BIAS} are possible")
    for entry in value:
        pair = isinstance(entry, (list, tuple)) and len(entry) == 2
        _check(pair, f"each entry of logit_bias must be a token id and a number, not {entry!r}")
        token, bias = entry
        ok = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31
        _check(ok, f"each token id of logit_bias must be a whole number from 0 up, not {token!r}")
        ok = _is_finite(bias) and -MAX_BIAS <= bias <= MAX_BIAS
        _check(ok, f"the logit_bias of token {token} must be between {-MAX_BIAS:g} and {MAX_BIAS:g}, not {bias!r}")
    entries = tuple(sorted((token, float(bias)) for token, bias in value))
    for (token, _), (following, _) in itertools.pairwise(entries):
        _check(token != following, f"logit_bias has token {token} twice")
    return entries


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens, and when to stop.

    The order, on float32 logits: repetition penalty, frequency penalty, presence penalty, bias, stop ids barred below
    ``min_tokens``; then temperature, top-k, top-p (over what top-k left), min-p; values tied with a threshold are
    kept. Log-probabilities are those of the logits before all of this. The defaults are greedy decoding.

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
    repetition_penalty: float = 1.0
    """Logits of ids in the prompt or the output: divided by this where above 0, else multiplied; 0.01 to 10, 1 is
    off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of ids in the output; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from an id's logit for each time it stands in the output; -2 to 2."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Added to the logits of these ids; -100 to 100, at most ``MAX_LOGIT_BIAS`` ids. Kept as pairs ascending by id."""
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
        object.__setattr__(self, "logit_bias", _bias_entries(self.logit_bias))
        _check(isinstance(self.ignore_eos, bool), f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        for name in ("max_tokens", "min_tokens", "top_k"):
            value = getattr(self, name)
            _check(
                isinstance(value, int) and not isinstance(value, bool), f"{name} must be a whole number, not {value!r}"
            )
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in ("temperature", "top_p", "min_p", *penalties):
            value = getattr(self, name)
            _check(_is_finite(value), f"{name} must be a finite number, not {value!r}")
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
        _check(
            MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"repetition_penalty must be between {MIN_REPETITION_PENALTY:g} and {MAX_REPETITION_PENALTY:g} "
            f"(1 is off), not {self.repetition_penalty}",
        )
        for name in penalties[1:]:
            value = getattr(self, name)
            ok = -MAX_PENALTY <= value <= MAX_PENALTY
            _check(ok, f"{name} must be between {-MAX_PENALTY:g} and {MAX_PENALTY:g}, not {value}")
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
        _ = self.kernel_ints, self.kernel_floats  # worked out here, not on the path to a first token

    @cached_property
    def kernel_ints(self) -> tuple[int, int]:
        """Top-k and the number of alternatives to report (-1: no report), as kernels read them."""
        return self.top_k, -1 if self.logprobs is None else self.logprobs

    @cached_property
    def kernel_floats(self) -> tuple[float, float, float, float, float, float]:
        """Temperature (0 is greedy), top-p, min-p, and repetition, presence and frequency penalty, as kernels read
        them."""
        temperature = 0.0 if self.coldest else self.temperature
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return temperature, self.top_p, self.min_p, *penalties

    @property
    def greedy(self) -> bool:
        """True where the lean greedy graph serves: no randomness, penalties, bias or log-probabilities wanted."""
        return self.coldest and self.logprobs is None and not self.penalised and not self.logit_bias

    @property
    def penalised(self) -> bool:
        """True where the choice depends on the ids seen before, so that the device must keep a history of them."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def bias_entries(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as it is kept: (id, bias), ascending by id."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def coldest(self) -> bool:
        """True where the most likely token is taken."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True)
class Grammar:
    """What an output must look like. It ends as soon as nothing can follow; where it may end or go on, EOS ends it.

    Raises:
        RequestError: an unknown kind, or a source that is no text, is too long, or is missing.
    """

    kind: str
    """``json_object`` (any JSON object), ``json_schema``, ``regex`` (in Rust's syntax, for the whole output) or
    ``lark`` (llguidance's dialect of Lark)."""
    source: str = ""
    """The schema, expression or grammar; nothing for ``json_object``."""

    def __post_init__(self) -> None:
        _check(self.kind in GRAMMAR_KINDS, f"a grammar's kind must be one of {', '.join(GRAMMAR_KINDS)}")
        _check(isinstance(self.source, str), f"a grammar's source must be a text, not {type(self.source).__name__}")
        size = len(self.source.encode("utf-8", "surrogatepass"))
        _check(size <= MAX_GRAMMAR_BYTES, f"the grammar has {size} bytes; {MAX_GRAMMAR_BYTES} are possible: shorten it")
        if self.kind == "json_object":
            _check(not self.source, "a grammar of kind json_object has no source: use json_schema for a schema")
        else:
            _check(bool(self.source), f"a grammar of kind {self.kind} needs a source")


@dataclass(frozen=True)
class Request:
    """What the engine is asked to do. Token ids only: text belongs to the floor of ``text/``."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    salt: str = ""
    """Prompts share cached beginnings only with prompts of the same salt."""
    deadline_s: float | None = None
    """``time.monotonic`` after which it is not begun any more: if it still waits then, it ends as cancelled."""
    grammar: Grammar | None = None
    """What the output must look like; None lets the model say anything."""
    prompt_logprobs: int | None = None
    """Report the log-probability of each prompt token given those before it, and of this many alternatives (0 to 20).
    A request with it runs its prompt on a slower path, and takes nothing of it from the cache."""

    def __post_init__(self) -> None:
        _check(isinstance(self.salt, str), f"salt must be a text, not {type(self.salt).__name__}")
        if self.deadline_s is not None:
            _check(_is_finite(self.deadline_s), f"deadline_s must be a time in seconds, not {self.deadline_s!r}")
        if self.grammar is not None:
            _check(isinstance(self.grammar, Grammar), f"grammar must be a Grammar, not {self.grammar!r}")
        if self.prompt_logprobs is not None:
            given: object = self.prompt_logprobs
            ok = isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= MAX_LOGPROBS
            _check(ok, f"prompt_logprobs must be between 0 and {MAX_LOGPROBS}, not {given!r}")

    @property
    def greedy(self) -> bool:
        """True where the lean greedy graph serves: greedy parameters, and no grammar."""
        return self.grammar is None and self.params.greedy

    @property
    def plain(self) -> bool:
        """True where prompt and parameters are all there is, so that the shortest way to a first token is open."""
        return self.grammar is None and self.prompt_logprobs is None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one token under the model's raw distribution (before temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first, as many as were asked for."""


PromptLogprobs = tuple[TokenLogprobs | None, ...]
"""One for each token of a prompt, given those before it; None for the first."""


class TokenChunk(NamedTuple):
    """One engine step's news about one request. Times are ``time.perf_counter_ns`` of the engine's process."""

    request_id: int
    token_id: int | None
    """The new token; None where a request ends without one (cancelled)."""
    time_ns: int
    """When the host read the token."""
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    """With the first token: prompt tokens that were in the cache already."""
    prompt_logprobs: PromptLogprobs | None = None
    """With the first token, if asked for."""


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
    cached_tokens: int = 0
    """Prompt tokens that were in the cache already."""
    prompt_logprobs: PromptLogprobs | None = None
