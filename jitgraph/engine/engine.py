"""The engine: one model on one device, and the loop schedule - launch - read - record.

Owned by one thread at a time; all its work goes to one stream. Before ready it compiles, warms up and captures; after
ready ``step`` only stages, replays and reads. It knows token ids, never text.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from jitgraph.config import EngineConfig
from jitgraph.engine.runner import InFlight, Runner
from jitgraph.engine.scheduler import DecodePlan, Scheduler, Sequence
from jitgraph.engine.sizing import Sizing, resolve_sizing
from jitgraph.errors import CapacityError, ConfigError, RequestError
from jitgraph.graphs.buffers import Buffers, BufferSizes
from jitgraph.graphs.capture import Capturer
from jitgraph.graphs.dispatch import Dispatcher
from jitgraph.graphs.key import GraphKey, Phase, Sampling, precapture_keys
from jitgraph.graphs.step import StepProgram
from jitgraph.jit.monitor import MONITOR
from jitgraph.model.cache import KVCache, PageAllocator
from jitgraph.model.decoder import Decoder
from jitgraph.model.rope import build_rope
from jitgraph.model.spec import ModelSpec
from jitgraph.model.weights import ModelWeights
from jitgraph.ops.select import kernel_workspace, select_ops
from jitgraph.ops.slots import SlotTable
from jitgraph.types import MAX_STOP_TOKEN_IDS, FinishReason, Request, TokenChunk, TokenLogprobs

Progress = Callable[[str, int, int], None]
"""(phase, done, total): told about everything that takes long before ready."""


@dataclass(frozen=True)
class ReadyReport:
    """What getting ready took: milliseconds by phase, and what ``max_graphs`` left out."""

    phases_ms: dict[str, float]
    captured: tuple[GraphKey, ...]
    left_out: tuple[GraphKey, ...]
    pool_bytes: int
    """Growth of the allocator's reserve while the first and largest graph was captured: the shared pool."""
    reserved_growth_bytes: int
    """Growth of the allocator's reserve while all the others were captured."""


class Engine:
    """Runs requests of token ids, several at once.

    Raises:
        ConfigError, CapacityError, DeviceError: settings that cannot work on this model and device.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        config: EngineConfig,
        eos_token_ids: tuple[int, ...],
        progress: Progress | None = None,
    ) -> None:
        device, dtype = weights.embedding.device, weights.embedding.dtype
        if device.type == "cuda" and config.ops == "torch" and config.graphs and config.fused_sampling:
            raise ConfigError("ops='torch' cannot publish tokens from inside a CUDA graph: set fused_sampling=False")
        self.spec = spec
        self.config = config
        self.device = device
        self.dtype = dtype
        self.sizing: Sizing = resolve_sizing(config, spec, dtype.itemsize)
        self._eos = eos_token_ids
        self._progress = progress or (lambda phase, done, total: None)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        started = time.perf_counter()
        ops = select_ops(config.ops, device)
        self.ops = ops
        rope = build_rope(spec, self.sizing.max_model_len, device)
        cache = KVCache.allocate(spec, self.sizing.pages, config.page_size, dtype, device)
        slots = SlotTable.allocate(config.max_streams, self.sizing.pages_per_slot, device)
        splits, scratch = kernel_workspace(ops, self.sizing.max_model_len, spec.num_kv_heads, spec.vocab_size)
        sizes = BufferSizes(self.sizing.arena_tokens, config.max_streams, splits, scratch)
        self.buffers = Buffers(spec, sizes, slots, dtype, device)
        self.cache = cache
        self.pages = PageAllocator(self.sizing.pages)
        program = StepProgram(Decoder(spec, weights, rope, ops), self.buffers, cache)
        self.dispatcher = Dispatcher(config.graphs)
        self._capturer = Capturer(device, self._stream)
        self.runner = Runner(program, self.dispatcher, self._capturer, self._stream, config.fused_sampling)
        self.scheduler = Scheduler(config.max_streams, self.sizing.chunk_tokens, self.pages)
        self._sequences: dict[int, Sequence] = {}
        self._flights: deque[InFlight] = deque()
        self._news: list[TokenChunk] = []
        self.compiles_after_ready = 0
        """Kernel specialisations compiled by a step; each one was a pause for somebody."""
        self.ready = self._get_ready((time.perf_counter() - started) * 1e3)

    # ------------------------------------------------------------------------------------------------ before ready

    def _get_ready(self, allocate_ms: float) -> ReadyReport:
        config = self.config
        phases = {"allocate": allocate_ms}
        keys, left_out = precapture_keys(
            config.max_streams,
            self.sizing.buckets,
            config.precapture_lengths,
            config.fused_sampling,
            config.max_graphs if config.graphs else 0,
        )
        with torch.inference_mode():
            if self._stream is not None:
                # Weights, cache and buffers were filled on the caller's stream; the engine's own must not overtake it.
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
                everything = list(dict.fromkeys(keys + left_out + self._eager_classes()))
                phases["warm up"] = self._timed("warm up", everything, self.runner.warm_up)
                self._stream.synchronize()
            # The largest graph first: what a library wants from the shared pool it gets then, and the rest reuse it.
            before = torch.cuda.memory_reserved(self.device) if self._stream is not None else 0
            largest_first = sorted(keys, key=lambda key: key.tokens, reverse=True)
            reserved: list[int] = []

            def capture(keys: list[GraphKey], report: Callable[[GraphKey], None]) -> None:
                for key in keys:
                    self.runner.capture(key)
                    reserved.append(torch.cuda.memory_reserved(self.device) if self._stream is not None else 0)
                    report(key)

            phases["capture"] = self._timed("capture", largest_first, capture)
            growth = (reserved[0] - before, reserved[-1] - reserved[0]) if reserved else (0, 0)
        self.reset_counters()
        return ReadyReport(phases, tuple(keys), tuple(left_out) if config.graphs else (), *growth)

    def _eager_classes(self) -> list[GraphKey]:
        """Prompt sizes that stand for all others: kernels are specialised for T = 1, multiples of 16, and the rest."""
        kinds = [Sampling.GREEDY, Sampling.FULL] if self.config.fused_sampling else [Sampling.OUTSIDE]
        sizes = [size for size in (1, 5, 17) if size <= self.sizing.chunk_tokens]
        return [GraphKey(Phase.PREFILL, size, kind) for kind in kinds for size in sizes]

    def _timed(
        self, phase: str, keys: list[GraphKey], work: Callable[[list[GraphKey], Callable[[GraphKey], None]], None]
    ) -> float:
        done = 0

        def report(_: GraphKey) -> None:
            nonlocal done
            done += 1
            self._progress(phase, done, len(keys))

        started = time.perf_counter()
        work(keys, report)
        return (time.perf_counter() - started) * 1e3

    # ---------------------------------------------------------------------------------------------------- requests

    def validate(self, request: Request) -> None:
        """Checks a request against the model and the cache.

        Raises:
            RequestError: empty prompt, ids out of the vocabulary, prompt over the context, too many stop ids.
            CapacityError: it can never fit into the KV cache; the message has the budget that would do.
        """
        ids, vocabulary, limit = request.prompt_token_ids, self.spec.vocab_size, self.sizing.max_model_len
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise RequestError(
                f"token id {wrong} is not in the vocabulary of {vocabulary} entries (0 to {vocabulary - 1})"
            )
        if len(ids) >= limit:
            raise RequestError(
                f"the prompt has {len(ids)} tokens but the context holds {limit} and must leave room for a new one: "
                "shorten the prompt or raise max_model_len"
            )
        stop_ids = self._stop_ids(request)
        if len(stop_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"{len(stop_ids)} stop ids (with the model's EOS ids) are more than the {MAX_STOP_TOKEN_IDS} possible"
            )
        wrong_stop = [i for i in request.params.stop_token_ids if i >= vocabulary]
        if wrong_stop:
            raise RequestError(f"stop token id {wrong_stop[0]} is not in the vocabulary of {vocabulary} entries")
        needed = self.sizing.pages_for(self._max_length(request))
        if needed > self.pages.total:
            raise CapacityError(
                f"the request needs {needed} KV pages for {self._max_length(request)} tokens but the cache has "
                f"{self.pages.total}: set kv_cache_memory to at least {(needed + 1) * self.sizing.page_bytes} bytes, "
                "or lower max_tokens"
            )

    def _max_length(self, request: Request) -> int:
        return min(len(request.prompt_token_ids) + request.params.max_tokens, self.sizing.max_model_len)

    def _stop_ids(self, request: Request) -> frozenset[int]:
        own = frozenset(request.params.stop_token_ids)
        return own if request.params.ignore_eos else own | frozenset(self._eos)

    def submit(self, request: Request) -> None:
        """Queues a request; its tokens come out of ``step``. Raises as ``validate`` does."""
        self.validate(request)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Queues a request that ``validate`` has passed."""
        assert request.request_id not in self._sequences, "request ids must not repeat while in use"
        max_length = self._max_length(request)
        sequence = Sequence(request, max_length, self._stop_ids(request), self.sizing.pages_for(max_length))
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends a request now; steps already in flight are read and dropped. Unknown or finished ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.finish(sequence, reason)

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._flights) or bool(self._news) or not self.scheduler.idle

    def step(self) -> list[TokenChunk]:
        """Admits, launches (one step ahead where that is free), reads the oldest step and returns its tokens.

        An interrupt while it waits for tokens changes nothing: the next call goes on. One in the middle of a launch
        ends all requests as cancelled (the next call says so) and leaves the engine ready for new ones.
        """
        with torch.inference_mode():
            try:
                self._launch()
            except BaseException:
                self._recover()
                raise
            news, self._news = self._news, []
            if news or not self._flights:
                return news
            tokens, now = self.runner.read(self._flights[0])
            return self._record(self._flights.popleft(), tokens, now)

    def _launch(self) -> None:
        before = MONITOR.count
        while (sequence := self.scheduler.admit()) is not None:
            seed = sequence.request.params.seed
            self.runner.admit(sequence, secrets.randbits(64) if seed is None else seed)
        depth = 2 if self.runner.can_run_ahead() else 1
        while len(self._flights) < depth and (plan := self.scheduler.next_plan()) is not None:
            self._flights.append(self.runner.launch(plan))
        self.compiles_after_ready += MONITOR.count - before

    def _recover(self) -> None:
        """After a launch that did not complete: ends every request and brings host and device back in step."""
        self._flights.clear()
        now = time.perf_counter_ns()
        for identity in list(self._sequences):
            self.cancel(identity)
            self._news.append(TokenChunk(identity, None, now, finish_reason=FinishReason.CANCELLED))
        self.runner.resynchronise()

    def _record(self, flight: InFlight, tokens: list[int], now: int) -> list[TokenChunk]:
        plan = flight.plan
        sequences = plan.sequences if isinstance(plan, DecodePlan) else (plan.sequence,) * plan.emit
        chunks = []
        for row, sequence in enumerate(sequences):
            if self.scheduler.record(sequence, tokens[row]):
                identity = sequence.request.request_id
                chunks.append(
                    TokenChunk(identity, tokens[row], now, self._logprobs(flight, row, sequence), sequence.finished)
                )
                if sequence.finished is not None:
                    del self._sequences[identity]
        return chunks

    def _logprobs(self, flight: InFlight, row: int, sequence: Sequence) -> TokenLogprobs | None:
        count = sequence.request.params.logprobs
        if count is None:
            return None
        return self.runner.read_logprobs(flight, row, min(count, self.spec.vocab_size))

    def drain(self) -> None:
        """Reads and drops every step in flight; call it when idle, before measuring memory or closing."""
        while self._flights:
            self._record(self._flights[0], *self.runner.read(self._flights[0]))
            self._flights.popleft()

    # ------------------------------------------------------------------------------------------------------- report

    @property
    def emulated(self) -> bool:
        """Whether graphs are the CPU's emulation and kernels plain PyTorch."""
        return self.device.type != "cuda"

    def reset_counters(self) -> None:
        """Counts steps, paths and compiles from here on."""
        self.dispatcher.reset()
        self.runner.steps = 0
        self.compiles_after_ready = 0

    @property
    def captures(self) -> int:
        """Graphs captured since the start."""
        return self._capturer.captures
