"""What a load run is to ask and when: lengths, arrivals, cancellations, all drawn from one seed. Pure, owns nothing.

Each request has generators of its own, made from the seed and its number. So request 7 is the same whether 10 or 1,000
are sent, and another distribution of one thing leaves the draws of the others as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jitgraph.errors import ConfigError

MOST_STREAMS = 8
"""Streams that the engines of this project serve at a time."""
MOST_TOKENS = 1_000_000
ARRIVALS = ("poisson", "fixed")
_GAPS, _SHAPE = 0, 1
"""First words of the seeds of arrival times and of requests."""


@dataclass(frozen=True)
class Fixed:
    """Always the same number of tokens."""

    tokens: int

    def draw(self, random: np.random.Generator) -> int:
        """The number."""
        return self.tokens


@dataclass(frozen=True)
class Uniform:
    """Each number from ``low`` to ``high``, both included, equally likely."""

    low: int
    high: int

    def draw(self, random: np.random.Generator) -> int:
        """One number."""
        return int(random.integers(self.low, self.high + 1))


@dataclass(frozen=True)
class Normal:
    """Rounded to whole tokens; what falls below 1 becomes 1."""

    mean: float
    sd: float

    def draw(self, random: np.random.Generator) -> int:
        """One number."""
        return min(MOST_TOKENS, max(1, round(random.normal(self.mean, self.sd))))


Lengths = Fixed | Uniform | Normal


@dataclass(frozen=True)
class Ask:
    """One request of the plan."""

    index: int
    due_s: float | None
    """When it arrives, from the start of the run; None where it follows on the end of another (closed loop)."""
    prompt: tuple[int, ...]
    """Token ids."""
    output_tokens: int
    cancel_after: int | None
    """Tokens after which the client goes away; None where it stays."""


@dataclass(frozen=True)
class Plan:
    """What decides every request of a run."""

    requests: int = 100
    rate: float | None = None
    """Requests a second; None is a closed loop, where each stream sends its next request when it has its answer."""
    arrivals: str = "poisson"
    prompt: Lengths = Fixed(128)
    output: Lengths = Fixed(128)
    pairs: tuple[tuple[int, int], ...] = ()
    """(prompt, output) tokens of real requests, used in turn in place of both distributions."""
    cancel: float = 0.0
    """Share of requests whose client goes away in the middle of the answer."""
    seed: int = 0
    token_ids: tuple[int, int] = (100, 999)
    """Smallest and largest id in prompts."""

    def __post_init__(self) -> None:
        _require(self.requests >= 1, "--requests must be at least 1")
        _require(self.rate is None or 0 < self.rate < math.inf, "--rate must be over 0 requests a second")
        _require(self.arrivals in ARRIVALS, f"--arrivals must be {' or '.join(ARRIVALS)}")
        _require(0 <= self.cancel <= 1, "--cancel is a share: from 0 to 1")
        _require(self.seed >= 0, "--seed must not be below 0")
        low, high = self.token_ids
        _require(0 <= low <= high, "--token-ids must be LOW:HIGH with 0 <= LOW <= HIGH")


def arrival_times(plan: Plan) -> Iterator[float | None]:
    """When each request arrives, in seconds from the start: the first at once, then after exponential gaps (a Poisson
    process) or equal ones. Nones in a closed loop."""
    random = np.random.default_rng((plan.seed, _GAPS))
    due = 0.0
    for index in range(plan.requests):
        if plan.rate is None:
            yield None
            continue
        # The product and not a sum, so that no rounding error grows over a long run.
        yield index / plan.rate if plan.arrivals == "fixed" else due
        due += float(random.exponential(1 / plan.rate))


def asks(plan: Plan) -> Iterator[Ask]:
    """The requests of a plan in the order of their arrival."""
    for index, due_s in enumerate(arrival_times(plan)):
        yield _ask(plan, index, due_s)


def warmup_ask(plan: Plan, index: int) -> Ask:
    """A request like those of the plan, but outside it: other ids, and nobody goes away."""
    return _ask(replace(plan, cancel=0.0, seed=plan.seed + 1), index, None)


def _ask(plan: Plan, index: int, due_s: float | None) -> Ask:
    # A generator for each thing drawn: lengths take different numbers of draws.
    lengths, ids, leaving = (np.random.default_rng((plan.seed, _SHAPE, index, part)) for part in range(3))
    if plan.pairs:
        prompt_tokens, output_tokens = plan.pairs[index % len(plan.pairs)]
    else:
        prompt_tokens, output_tokens = plan.prompt.draw(lengths), plan.output.draw(lengths)
    low, high = plan.token_ids
    prompt = tuple(int(i) for i in ids.integers(low, high + 1, size=prompt_tokens))
    leaves = float(leaving.random()) < plan.cancel and output_tokens > 1
    after = int(leaving.integers(1, output_tokens)) if leaves else None
    return Ask(index, due_s, prompt, output_tokens, after)


def parse_lengths(text: str, option: str) -> Lengths:
    """A distribution of lengths: ``N``, ``A:B`` (uniform) or ``normal:MEAN,SD``.

    Raises:
        ConfigError: it is none of these, or has lengths under 1.
    """
    problem = f"{option} {text} is no distribution of lengths: give N, A:B or normal:MEAN,SD, in tokens"
    try:
        if text.startswith("normal:"):
            mean, sd = (float(part) for part in text.removeprefix("normal:").split(","))
            _require(1 <= mean <= MOST_TOKENS and 0 <= sd <= MOST_TOKENS, problem)
            return Normal(mean, sd)
        first, colon, last = text.partition(":")
        low = int(first)
        high = int(last) if colon else low
    except ValueError:
        raise ConfigError(problem) from None
    _require(1 <= low <= high <= MOST_TOKENS, problem)
    return Uniform(low, high) if colon else Fixed(low)


def parse_token_ids(text: str) -> tuple[int, int]:
    """``LOW:HIGH``, both included.

    Raises:
        ConfigError: it is not that.
    """
    low, colon, high = text.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal()):
        raise ConfigError(f"--token-ids {text} must be LOW:HIGH, such as 100:999")
    return int(low), int(high)


def read_pairs(path: Path) -> tuple[tuple[int, int], ...]:
    """Lengths of real requests: lines of JSON with ``prompt_tokens`` and ``output_tokens``; further keys are not read.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line has no such lengths.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--lengths {path} cannot be read ({error}): give a JSONL file") from None
    pairs = [_pair(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    _require(bool(pairs), f"--lengths {path} is empty: give a line of JSON for each request")
    return tuple(pairs)


def _pair(path: Path, number: int, line: str) -> tuple[int, int]:
    try:
        found = json.loads(line)
        pair = (found["prompt_tokens"], found["output_tokens"])
    except (ValueError, TypeError, KeyError):
        pair = (None, None)
    if not _are_lengths(pair):
        raise ConfigError(
            f'--lengths {path}, line {number}: give {{"prompt_tokens": N, "output_tokens": N}}, whole numbers over 0'
        )
    return pair


def _are_lengths(values: Sequence[object]) -> bool:
    return all(type(value) is int and 1 <= value <= MOST_TOKENS for value in values)


def _require(true: bool, problem: str) -> None:
    if not true:
        raise ConfigError(problem)
