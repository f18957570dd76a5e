"""What the blocking client and the asyncio one have in common: the model, and how prompts become requests.

No torch, no sockets. Belongs to whoever owns the client.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jitgraph.errors import RequestError
from jitgraph.ipc.messages import MAX_TIMEOUT_S, EngineFacts, Ready, StartPhase
from jitgraph.server.client_errors import EngineGone
from jitgraph.server.client_text import ModelText, RemoteLive
from jitgraph.text.prompts import Prompt, as_params, as_prompts
from jitgraph.text.tokenizer import Tokenizer
from jitgraph.types import Grammar, Request, SamplingParams

APPEAR_S = 5.0
"""How long a client waits for an engine to listen at all."""
READY_S = 600.0
"""How long it waits for one that listens to be ready."""
_LEAST_S = 1e-6

Encoded = list[tuple[tuple[int, ...], SamplingParams]]


@dataclass(frozen=True)
class Wishes:
    """What a call asks for besides prompts and sampling.

    Raises:
        RequestError: a timeout that is none.
    """

    grammar: Grammar | None
    prompt_logprobs: int | None
    timeout_s: float | None
    """What is not done so many seconds after the call ends with ``RequestRefused`` of kind ``deadline``."""
    started_ns: int
    """``time.perf_counter_ns`` of the call."""

    def __post_init__(self) -> None:
        given = self.timeout_s
        if given is not None and not 0.0 < given <= MAX_TIMEOUT_S:  # not a number is neither
            raise RequestError(f"timeout_s must be above 0 and at most {MAX_TIMEOUT_S:g} seconds, not {given!r}")

    @property
    def left_s(self) -> float:
        """Seconds that a request which is sent now may take, as ``Submit`` has them: 0 is for ever."""
        if self.timeout_s is None:
            return 0.0
        return max(_LEAST_S, self.timeout_s - (time.perf_counter_ns() - self.started_ns) / 1e9)


class ModelClient(ABC):
    """What does not depend on how its user waits."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)

    @property
    @abstractmethod
    def ready(self) -> Ready:
        """How long the engine's start took, by phase."""

    @property
    @abstractmethod
    def _text(self) -> ModelText: ...

    @property
    def facts(self) -> EngineFacts:
        """What the engine says about itself and its model."""
        return self.ready.facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            CheckpointError: the checkpoint has none; prompts of token ids work all the same.
        """
        return self._text.tokenizer

    def default_params(self) -> SamplingParams:
        """The model's own sampling settings (``generation_config.json``); greedy where it has none."""
        return self.facts.default_params

    @property
    def _at_once(self) -> int:
        """So many requests of one call are with the engine that it always has the next one."""
        return 2 * self.facts.max_streams

    def _encode(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Encoded:
        """Token ids and parameters of each prompt."""
        batch = as_prompts(prompts)
        each = as_params(params, len(batch), self.default_params())
        return [(self._text.encode(prompt), one) for prompt, one in zip(batch, each, strict=True)]

    def _live(self, ids: tuple[int, ...], params: SamplingParams, wishes: Wishes, started_ns: int) -> RemoteLive:
        """The books of a request that is about to be sent; its times count from ``started_ns`` on."""
        number, scores = next(self._ids), wishes.prompt_logprobs
        request = Request(number, ids, params, grammar=wishes.grammar, prompt_logprobs=scores)
        return self._text.live(request, started_ns)


def as_listener(progress: Callable[[str, int, int], None] | None) -> Callable[[StartPhase], None] | None:
    """``progress`` as the connection calls it."""
    if progress is None:
        return None
    return lambda news: progress(news.phase, news.done, news.total)


def check_same_model(path: object, before: EngineFacts, now: EngineFacts, reason: str) -> None:
    """After a connection was made anew: what the client knows of the model still holds.

    Raises:
        EngineGone: another model is served now.
    """
    if (now.model, now.folder, now.vocab_size) != (before.model, before.folder, before.vocab_size):
        raise EngineGone(f"{reason}; now {now.model} is served at {path}: make a new client")
