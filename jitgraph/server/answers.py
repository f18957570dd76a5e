"""The answers to one HTTP request while they are generated: engine's records in, text out.

Event loop's thread. One ``Answer`` for each prompt times ``n``, each its own request at the engine. Always holds: the
texts of an answer's deltas, joined, are the text that the same ids give at once, cut before the first stop string.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jitgraph.errors import RequestError
from jitgraph.ipc.messages import Grammar, Tokens, WireLogprobs
from jitgraph.server.backend import EngineLink, TokenSource
from jitgraph.server.client_errors import EngineGone, RequestRefused
from jitgraph.server.openai.convert import seed_of_answer
from jitgraph.server.openai.errors import ApiError, engine_lost, from_user_error, refused
from jitgraph.server.openai.replies import PromptDetails, Usage
from jitgraph.server.records import RequestRecord, SequenceRecord
from jitgraph.text.detokenize import IncrementalDetokenizer
from jitgraph.text.tokenizer import Tokenizer
from jitgraph.types import FinishReason, SamplingParams

PROMPT_TAIL = 64
"""Last prompt ids shown to the detokenizer: it needs the last 8 visible ones to know how the text continues."""


@dataclass(frozen=True)
class Plan:
    """What the engine is asked for."""

    prompts: Sequence[Sequence[int]]
    n: int
    params: Sequence[SamplingParams]
    """One for each prompt."""
    salt: str = ""
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    skip_special_tokens: bool = True
    include_stop: bool = False
    """The stop string that ends an answer is part of its text."""
    timeout_s: float = 0.0
    """What the engine may take for it; 0 is any time."""
    no_tokens: bool = False
    """The prompt alone is wanted: the one token that the engine generates is not shown."""

    @property
    def answers(self) -> int:
        """How many there will be."""
        return len(self.prompts) * self.n


@dataclass
class Delta:
    """What one record of the engine adds to an answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[WireLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[WireLogprobs | None, ...] | None = None
    finish_reason: str | None = None
    """``stop`` or ``length``; nothing follows."""


class Answer:
    """One answer."""

    def __init__(
        self, index: int, prompt: Sequence[int], plan: Plan, params: SamplingParams, tokenizer: Tokenizer,
        eos: frozenset[int], source: TokenSource, record: SequenceRecord,
    ) -> None:  # fmt: skip
        self.index = index
        self.prompt = prompt
        self.source = source
        self.record = record
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        self._no_tokens = plan.no_tokens
        self._silent = eos if not plan.skip_special_tokens and not params.ignore_eos else frozenset[int]()
        self._text = IncrementalDetokenizer(
            tokenizer,
            prompt[-PROMPT_TAIL:],
            params.stop,
            params.min_tokens,
            plan.skip_special_tokens,
            plan.include_stop,
        )

    def take(self, news: Tokens, now_ns: int) -> Delta:
        """Adds what the engine says.

        Raises:
            ApiError: 500; the answer could not be kept to its form. 503; the engine ended the request without a reason
                of the request's own.
        """
        self.record.take(news, now_ns)
        delta = Delta(prompt_logprobs=news.prompt_logprobs)
        reason = news.finish_reason
        if self._no_tokens:
            delta.finish_reason = reason and FinishReason.LENGTH.value
        else:
            self._add(news, delta)
            if self._text.stopped:
                delta.finish_reason = FinishReason.STOP.value
            elif reason is not None:
                delta.text += self._text.finish()
                delta.finish_reason = FinishReason.STOP.value if self._text.stopped else reason
        if delta.finish_reason is not None:
            self._end(delta.finish_reason, reason)
        return delta

    def _add(self, news: Tokens, delta: Delta) -> None:
        texts = []
        for i, token_id in enumerate(news.token_ids):
            self.completion_tokens += 1
            delta.token_ids.append(token_id)
            if news.logprobs:
                delta.logprobs.append(news.logprobs[i])
            if token_id not in self._silent:
                texts.append(self._text.push(token_id))
            if self._text.stopped:
                break
        delta.text = texts[0] if len(texts) == 1 else "".join(texts)

    def _end(self, reason: str, of_engine: str | None) -> None:
        if reason == FinishReason.FAILED.value:
            raise _form_lost()
        if reason not in (FinishReason.STOP.value, FinishReason.LENGTH.value):
            raise ApiError(503, "the engine has withdrawn this request", None, f"request_{reason}", 1.0)
        self.finish_reason = self.record.finish_reason = reason
        if of_engine is None:
            self.source.cancel()  # a stop string: the engine does not know of it


class Answers:
    """All answers of one request."""

    def __init__(self, plan: Plan, link: EngineLink, tokenizer: Tokenizer, record: RequestRecord) -> None:
        """Hands all of them to the engine.

        Raises:
            ApiError: the engine is gone, or cannot be sent these ids.
        """
        self.plan = plan
        record.n = plan.n
        self.all: list[Answer] = []
        self._open = 0
        self._queue: asyncio.Queue[tuple[int, Tokens | Exception]] | None = None
        self._pumps: list[asyncio.Task[None]] = []
        eos = frozenset(link.facts.eos_token_ids)
        try:
            for i, ids in enumerate(plan.prompts):
                for answer in range(plan.n):
                    self._submit(i * plan.n + answer, ids, plan.params[i], answer, link, tokenizer, eos, record)
        except (EngineGone, RequestRefused, RequestError) as error:
            self.close()
            raise _as_api_error(error) from error
        self._open = len(self.all)
        if self._open > 1:
            # One record of each: what the client does not read stays where ``MAX_UNREAD`` counts it.
            self._queue = asyncio.Queue(self._open)
            self._pumps = [asyncio.ensure_future(self._pump(answer)) for answer in self.all]

    def _submit(
        self, index: int, ids: Sequence[int], params: SamplingParams, nth: int, link: EngineLink,
        tokenizer: Tokenizer, eos: frozenset[int], record: RequestRecord,
    ) -> None:  # fmt: skip
        wire = replace(params, stop=(), seed=seed_of_answer(params.seed, nth)) if params.stop or nth else params
        noted = record.begin(len(ids))
        source = link.submit(
            ids, wire, salt=self.plan.salt, prompt_logprobs=self.plan.prompt_logprobs, grammar=self.plan.grammar,
            timeout_s=self.plan.timeout_s,
        )  # fmt: skip
        self.all.append(Answer(index, ids, self.plan, params, tokenizer, eos, source, noted))

    async def _pump(self, answer: Answer) -> None:
        assert self._queue is not None
        try:
            async for news in answer.source:
                await self._queue.put((answer.index, news))
                if news.finish_reason is not None:
                    return
            raise _no_end()
        except Exception as error:
            if answer.finish_reason is None:
                await self._queue.put((answer.index, error))

    async def next(self) -> tuple[Answer, Delta] | None:
        """What comes next of any answer; None once all have ended.

        Raises:
            ApiError: the engine refused one of them, ended, or withdrew one.
        """
        while self._open:
            answer, news = await self._news()
            if answer.finish_reason is not None:
                continue  # said after a stop string
            delta = answer.take(news, time.perf_counter_ns())
            if delta.finish_reason is not None:
                self._open -= 1
            return answer, delta
        return None

    async def _news(self) -> tuple[Answer, Tokens]:
        try:
            if self._queue is None:
                try:
                    return self.all[0], await self.all[0].source.__anext__()
                except StopAsyncIteration:
                    raise _no_end() from None
            index, news = await self._queue.get()
            if isinstance(news, Exception):
                raise news
        except (EngineGone, RequestRefused, RequestError) as error:
            raise _as_api_error(error) from error
        return self.all[index], news

    def close(self) -> None:
        """Ends what still runs, at the engine too. To be called at the end, however it came; also more than once."""
        for answer in self.all:
            if answer.finish_reason is None:
                answer.source.cancel()
        for pump in self._pumps:
            pump.cancel()

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt = sum(len(ids) for ids in self.plan.prompts)
        completion = sum(answer.completion_tokens for answer in self.all)
        return _usage(prompt, completion, sum(answer.record.cached_tokens for answer in self.all[:: self.plan.n]))

    def usage_of(self, index: int) -> Usage:
        """Tokens of one answer and its prompt so far."""
        answer = self.all[index]
        return _usage(len(answer.prompt), answer.completion_tokens, answer.record.cached_tokens)


def _usage(prompt: int, completion: int, cached: int) -> Usage:
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
    )


def _form_lost() -> ApiError:
    why = "following the schema or grammar went over the engine's limits in the middle of the answer: use a simpler one"
    return ApiError(500, why, None, "grammar_failed")


def _no_end() -> ApiError:
    return ApiError(500, "the engine ended this request without a reason", None, "engine_error")


def _as_api_error(error: EngineGone | RequestRefused | RequestError) -> ApiError:
    if isinstance(error, RequestRefused):
        return refused(error.kind, error.message, error.retry_after_s)
    return engine_lost(1.0) if isinstance(error, EngineGone) else from_user_error(error)
