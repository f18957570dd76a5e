"""``LLM(..., isolated=True)``: the same interface, with the engine in a process of its own.

The engine process has its own CUDA context and its own interpreter lock, and ends with this process, however this one
ends. This process makes the text; any thread may call.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import jitgraph
from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.engine.isolated_worker import arguments
from jitgraph.errors import ConfigError
from jitgraph.llm import LLM
from jitgraph.model.default import DEFAULT_MODEL
from jitgraph.server.api_client import Client
from jitgraph.server.client_errors import EngineGone
from jitgraph.server.client_records import nobody_there
from jitgraph.server.runtime_folder import RuntimeFolder
from jitgraph.server.spawn import EngineProcess, spawn_engine
from jitgraph.stream import Live, Stream
from jitgraph.text.prompts import Prompt
from jitgraph.text.tokenizer import Tokenizer
from jitgraph.types import Grammar, RequestOutput, SamplingParams

_ROOT = str(Path(jitgraph.__file__).resolve().parents[1])
_ENTRY = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); "
    "from jitgraph.engine.isolated_worker import run_isolated; sys.exit(run_isolated(sys.argv[1:]))"
)
"""The interpreter need not have this package installed: it is told where it lies."""
_READY_S = 86400.0
"""Longest start. A start that fails is noticed at once, so this is for nothing but an engine that hangs."""
_LOOK_S = 0.05
_GRACE_S = 2.0


class OnlyInProcess(ConfigError, AttributeError):
    """Something of an ``LLM`` that the process of the engine alone has."""


class IsolatedLLM(LLM):
    """What ``LLM(..., isolated=True)`` gives. Arguments, results and errors are those of ``LLM``, but that a request
    which the engine refuses is refused by the first ``next`` of its stream, not by ``stream`` itself, and that
    ``generate`` may have begun others of its prompts by then. An engine process that dies ends what runs with
    ``EngineGone``.

    Raises:
        ConfigError: settings that cannot work.
        EngineGone: the engine process could not start; the message has its reason.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        isolated: bool = True,
        weights: str = "checkpoint",
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
        **settings: Any,
    ) -> None:
        EngineConfig(**settings)  # what is wrong with them is said here and at once
        started = time.perf_counter()
        folder = RuntimeFolder()
        socket = folder.path / "engine.sock"
        command = [sys.executable, "-c", _ENTRY, arguments(str(model), weights, seed, settings)]
        try:
            process = spawn_engine(command, socket)
        except BaseException:
            folder.remove()
            raise
        self._finish = weakref.finalize(self, _end, process, folder)  # also where nobody calls ``close``
        try:
            self._client = _connect(socket, process, progress)
        except BaseException:
            self._finish()
            raise
        self._started_ms = (time.perf_counter() - started) * 1e3
        facts = self._client.facts
        self.name = facts.model
        self.device = torch.device(facts.device)
        self.unsupported_defaults = tuple(facts.about["unsupported_defaults"])
        self.notices = tuple(facts.about["notices"])
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """See ``LLM.tokenizer``."""
        return self._client.tokenizer

    def default_params(self) -> SamplingParams:
        """See ``LLM.default_params``."""
        return self._client.default_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
    ) -> list[RequestOutput]:
        """See ``LLM.generate``."""
        return self._open_client.generate(prompts, params, grammar=grammar, prompt_logprobs=prompt_logprobs)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
    ) -> Stream:
        """See ``LLM.stream``."""
        stream = self._open_client.stream(prompt, params, grammar=grammar, prompt_logprobs=prompt_logprobs)
        stream.keeps = self  # the engine process ends with its owner
        return stream

    @property
    def _open_client(self) -> Client:
        if self._closed:
            raise ConfigError(f"this LLM ({self.name}) has been closed: make a new one")
        return self._client

    def describe(self) -> dict[str, Any]:
        """See ``LLM.describe``; ``isolated`` is the engine's process id."""
        facts = self._open_client.facts
        besides = ("unsupported_defaults", "graphs_left_out")
        return {**{name: value for name, value in facts.about.items() if name not in besides}, "isolated": facts.pid}

    def stats(self) -> dict[str, Any]:
        """See ``LLM.stats``; figures of the engine process, since ready. ``ready_ms`` has all phases of its start."""
        client = self._open_client
        phases = {name: seconds * 1e3 for name, seconds in client.ready.phases_s.items()}
        left_out = client.facts.about["graphs_left_out"]
        return {**client.stats(), "graphs_left_out": left_out, "ready_ms": phases or {"start": self._started_ms}}

    def close(self) -> None:
        """Ends what is running (as cancelled) and the engine process, which gives its memory back. May be called more
        than once."""
        self._closed = True
        self._client.close()
        self._finish()

    # -------------------------------------------------------------------------------------- the engine's process alone

    def __getattr__(self, name: str) -> NoReturn:
        raise OnlyInProcess(f"an isolated LLM has no {name!r}: what needs the engine itself needs isolated=False")

    @property
    def _engine(self) -> Engine:
        self._not_here("the engine itself")

    def settle(self, timeout_s: float = 60.0) -> bool:
        """Not there: an engine process captures whenever it is idle."""
        self._not_here("settle()")

    def reset_stats(self) -> None:
        """Not there: other clients may read the same counters; take differences."""
        self._not_here("reset_stats()")

    def step(self) -> None:
        """Not there: the engine process steps by itself."""
        self._not_here("step()")

    def forget(self, live: list[Live]) -> None:
        """Not there: close the streams."""
        self._not_here("forget()")

    def _not_here(self, what: str) -> NoReturn:
        raise OnlyInProcess(f"an isolated LLM has no {what}: what needs the engine itself needs isolated=False")


def _connect(socket: Path, process: EngineProcess, progress: Callable[[str, int, int], None] | None) -> Client:
    """A client of the process, once it is ready.

    Raises:
        EngineGone: it ended before.
    """
    while True:
        try:
            return Client(socket, progress=progress, timeout_s=_READY_S, appear_s=_LOOK_S)
        except EngineGone as error:
            nobody = error.reason == nobody_there(socket)
            code = process.wait(0.0 if nobody else _GRACE_S)
            if code is None and nobody:
                continue  # it is not so far yet
            last = f" Its last words: {process.tail}" if code is not None and process.tail else ""
            raise EngineGone(f"the engine process (exit status {code}) did not start: {error.reason}.{last}") from None


def _end(process: EngineProcess, folder: RuntimeFolder) -> None:
    process.end(_GRACE_S)
    folder.remove()
