"""Cached prompts through the whole engine: what is found is not computed again, and nobody can tell by the answer."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    Bits,
    answer,
    assert_nothing_left,
    bits,
    finish,
    make_engine,
    prompt,
    run_ahead,
    steps_until,
    take,
    tokens,
    with_changes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jitgraph import LLM, SamplingParams
from jitgraph.engine.engine import Engine
from jitgraph.engine.scheduler import MAX_NOTED_CHUNKS, PrefillPlan
from jitgraph.model.spec import RopeSpec
from jitgraph.types import Request, TokenChunk

SPEC = with_changes(vocab_size=211, num_layers=2, layer_windows=(0, 0))
G = 8
BUCKETS = (4, 16, 48)
GREEDY = SamplingParams(max_tokens=6, logprobs=1)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 2**63 + 5, "logprobs": 2},
    "penalised": {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.2, "logprobs": 1},
    "stopped": {"stop_token_ids": tuple(range(0, 200, 7)), "min_tokens": 2},
    "biased": {"logit_bias": {7: 2.0}},
}


def make(device: torch.device, **changes: Any) -> Engine:
    """An engine with short pages, whose steps have the same bits on any path."""
    fixed: dict[str, Any] = {"page_size": G, "prefill_buckets": BUCKETS, "batch_invariant": True, "max_model_len": 256}
    return make_engine(device, SPEC, **{**fixed, **changes})


def ids(length: int, salt: int = 0) -> tuple[int, ...]:
    """A prompt; longer ones of the same ``salt`` begin with the shorter ones."""
    return prompt(250, salt, SPEC.vocab_size)[:length]


@pytest.fixture(scope="module")
def plain(device: torch.device) -> Engine:
    """One that keeps nothing."""
    return make(device, prefix_cache=False)


class Watched:
    """What an engine computes: (start, tokens) of each chunk of a prompt, in order of launch."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks: list[tuple[int, int]] = []
        launch, book = engine.runner.launch, engine.runner.book

        def launched(plan: Any) -> Any:
            if isinstance(plan, PrefillPlan):
                self.chunks.append((plan.start, plan.count))
            return launch(plan)

        def booked(*args: Any) -> Any:
            flight = book(*args)
            assert isinstance(flight.plan, PrefillPlan)
            self.chunks.append((flight.plan.start, flight.plan.count))
            return flight

        monkeypatch.setattr(engine.runner, "launch", launched)
        monkeypatch.setattr(engine.runner, "book", booked)

    def __call__(self) -> list[tuple[int, int]]:
        """Those since the last call."""
        chunks, self.chunks = self.chunks, []
        return chunks


def serve(engine: Engine, request: Request, express: bool = False) -> tuple[Bits, int]:
    """What a request gets alone, and how much of its prompt was cached; ``express``: by the shortest way."""
    chunks: dict[int, list[TokenChunk]] = {}
    shot = None
    if express:
        while engine.idle_work:
            engine.work_while_idle()
        shot = engine.fire(request.prompt_token_ids, request.params, request.salt)
        assert shot is not None
        engine.book(request, shot)
    else:
        engine.submit(request)
    finish(engine, chunks)
    assert_nothing_left(engine)
    found = chunks[request.request_id]
    assert all(chunk.cached_tokens == 0 for chunk in found[1:])
    return bits(found), found[0].cached_tokens


@pytest.mark.parametrize("express", [False, True], ids=["ordinary", "express"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_hit_has_the_bits_of_a_miss(
    device: torch.device, plain: Engine, monkeypatch: pytest.MonkeyPatch, kind: str, express: bool
) -> None:
    """For lengths around the borders of pages and chunks: the same bits, and only the rest is computed."""
    engine, params = make(device), SamplingParams(**{"max_tokens": 6, **KINDS[kind]})
    watched = Watched(engine, monkeypatch)
    for length in (1, 7, 8, 9, 16, 17, 31, 40, 41, 48):
        expected = answer(plain, ids(length, salt=length), params)
        found, cached = serve(engine, Request(0, ids(length, salt=length), params), express)
        assert (found, cached) == (expected, 0) and watched() == [(0, length)]
        for _ in range(2):
            found, cached = serve(engine, Request(0, ids(length, salt=length), params), express)
            assert cached == (length - 1) // G * G and watched() == [(cached, length - cached)]
            assert found == expected


@pytest.mark.parametrize("express", [False, True], ids=["ordinary", "express"])
def test_the_next_turn_of_a_chat(
    device: torch.device, plain: Engine, monkeypatch: pytest.MonkeyPatch, express: bool
) -> None:
    """A prompt of many chunks, what was answered, and a little more: one short chunk, by the shortest way as well."""
    engine, params = make(device), SamplingParams(max_tokens=20, ignore_eos=True)
    watched = Watched(engine, monkeypatch)
    said, _ = serve(engine, Request(0, ids(150), params))
    assert [count for _, count in watched()] == [48, 48, 48, 6]
    turn = (*ids(150), *(token for token in tokens(said) if token is not None), *ids(10, salt=3))
    expected = answer(plain, turn, params)
    found, cached = serve(engine, Request(1, turn, params), express)
    assert cached == 150 // G * G == 144 and watched() == [(144, 36)] and found == expected
    found, cached = serve(engine, Request(2, (*turn, *ids(5, salt=4)), params), express)
    assert cached == len(turn) // G * G and found == answer(plain, (*turn, *ids(5, salt=4)), params)


def test_answers_are_cached_as_well(device: torch.device) -> None:
    """Without the batch-invariant mode pages of generated tokens count too; then a hit is a miss within rounding."""
    engine = make(device, batch_invariant=False)
    plain = make(device, batch_invariant=False, prefix_cache=False)
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=0)
    said, _ = serve(engine, Request(0, ids(20), params))
    turn = (*ids(20), *(token for token in tokens(said) if token is not None), 5, 6, 7)
    expected = answer(plain, turn, params)
    found, cached = serve(engine, Request(1, turn, params))
    assert cached == (20 + 30 - 1) // G * G == 48
    assert tokens(found) == tokens(expected)
    for (_, a, _, _), (_, b, _, _) in zip(found, expected, strict=True):
        assert a is not None and b is not None and abs(a - b) < (1e-4 if device.type == "cpu" else 5e-2)


def test_what_is_cached_is_read(device: torch.device) -> None:
    """The pages are really those: spoilt behind the engine's back, they spoil the answer."""
    engine = make(device)
    expected, _ = serve(engine, Request(0, ids(40), GREEDY))
    engine.cache.data.fill_(float("nan"))
    spoilt: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(1, ids(40), SamplingParams(max_tokens=6)))
    finish(engine, spoilt)
    assert spoilt[1][0].cached_tokens == 32
    assert [chunk.token_id for chunk in spoilt[1]] != tokens(expected)


def test_salts_share_nothing(device: torch.device) -> None:
    engine = make(device)
    expected, _ = serve(engine, Request(0, ids(40), GREEDY, salt="a"))
    for identity, (salt, cached) in enumerate([("", 0), ("b", 0), ("a", 32), ("b", 32), ("", 32)], start=1):
        assert serve(engine, Request(identity, ids(40), GREEDY, salt), identity % 2 == 0) == (expected, cached)


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting(device: torch.device, plain: Engine, kind: str) -> None:
    """Penalties above all, which depend on ids that no chunk brings: also of a prompt of several chunks."""
    engine, params = make(device), SamplingParams(**{"max_tokens": 12, "seed": 4, **KINDS[kind]})
    for length in (60, 61, 130, 200):
        expected = answer(plain, ids(length), params)
        # Another slot's history is full of other ids.
        answer(engine, ids(length, salt=9), SamplingParams(**{"max_tokens": 30, "repetition_penalty": 2.0}))
        for attempt in range(2):
            found, cached = serve(engine, Request(0, ids(length), params))
            assert found == expected and (attempt == 0 or cached == (length - 1) // G * G)


def test_on_the_kernels(device: torch.device) -> None:
    """Triton's kernels, in their interpreter where there is no GPU: a slot that begins in the middle of a sequence, in
    pages of another one, and a history that is noted without a step."""
    small = with_changes(
        SPEC, vocab_size=48, intermediate_size=40, num_layers=1, layer_windows=(0,), num_heads=2, num_kv_heads=1
    )
    fixed: dict[str, Any] = {"max_model_len": 24, "max_streams": 1, "prefill_buckets": (8,), "batch_invariant": True}
    engine = make_engine(device, small, ops="jit", page_size=G, dtype="float32", **fixed)
    asked = prompt(13, vocabulary=48)
    sampled, penalised = (SamplingParams(**{**KINDS[kind], "max_tokens": 2}) for kind in ("sampled", "penalised"))
    expected, _ = serve(engine, Request(0, asked, penalised))
    assert serve(engine, Request(1, asked, penalised)) == (expected, G)
    expected, _ = serve(engine, Request(2, asked, sampled, salt="other"))
    assert serve(engine, Request(3, asked, sampled), express=True) == (expected, G)


def test_penalties_note_no_more_than_the_inbox_takes(device: torch.device, plain: Engine) -> None:
    """With tiny chunks a long cached beginning is used in part."""
    engine = make(device, prefill_buckets=(4,))
    params = SamplingParams(max_tokens=6, repetition_penalty=1.5, logprobs=0)
    expected = answer(plain, ids(100), params)
    assert serve(engine, Request(0, ids(100), params)) == (expected, 0)
    launches = engine.runner.launches
    assert serve(engine, Request(0, ids(100), params)) == (expected, MAX_NOTED_CHUNKS * 4)
    assert engine.runner.launches - launches >= MAX_NOTED_CHUNKS + (100 - MAX_NOTED_CHUNKS * 4) // 4
    assert serve(engine, Request(0, ids(100), GREEDY))[1] == 96


def test_the_logits_of_a_whole_prompt_are_computed(device: torch.device) -> None:
    """Who asks for the log-probabilities of a prompt has it computed, and leaves it to the others."""
    engine = make(device)
    chunks: dict[int, list[TokenChunk]] = {}
    for identity, wanted in enumerate((1, 1, None)):
        engine.submit(Request(identity, ids(40), GREEDY, prompt_logprobs=wanted))
        finish(engine, chunks)
    assert [chunks[identity][0].cached_tokens for identity in range(3)] == [0, 0, 32]


def test_running_sequences_share(device: torch.device, plain: Engine) -> None:
    """The second of two that run at once begins with the first one's prompt, as far as it has been computed."""
    engine, params = make(device), SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0)
    expected = [answer(plain, ids(length), params) for length in (100, 80)]
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, ids(100), params))
    steps_until(engine, chunks, 0, 3)
    used = engine.pages.total - engine.pages.free
    engine.submit(Request(1, ids(80), params))
    steps_until(engine, chunks, 1, 1)
    assert chunks[1][0].cached_tokens == 72
    assert engine.pages.total - engine.pages.free == used + -(-119 // G) - 72 // G
    engine.cancel(0)  # the other one still reads its pages
    finish(engine, chunks)
    assert_nothing_left(engine)
    assert bits(chunks[1]) == expected[1] and bits(chunks[0]) == expected[0][: len(chunks[0])]


def test_a_prompt_withdrawn_half_way(device: torch.device, plain: Engine) -> None:
    """What has been computed of it is found, and no more; nothing that its steps in flight write is shared."""
    engine = make(device)
    for read in range(1, 5):
        chunks: dict[int, list[TokenChunk]] = {}
        engine.submit(Request(0, ids(200, salt=read), GREEDY))
        for _ in range(read):
            take(engine, chunks)
        engine.launch()
        engine.cancel(0)
        engine.submit(Request(1, ids(200, salt=50), GREEDY))
        finish(engine, chunks)
        found, cached = serve(engine, Request(2, ids(200, salt=read), GREEDY))
        assert cached == 48 * read and found == answer(plain, ids(200, salt=read), GREEDY)
        assert bits(chunks[1]) == answer(plain, ids(200, salt=50), GREEDY)


@pytest.mark.parametrize("ahead", [0, 3, 30])
def test_a_stream_cancelled_in_a_loop(device: torch.device, ahead: int) -> None:
    """The device was ahead of the host, and wrote into pages that are not kept."""
    engine = make(device, batch_invariant=False, loop_steps=16)
    plain = make(device, batch_invariant=False, prefix_cache=False)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    expected = answer(plain, ids(20), params)
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, ids(20), params))
    steps_until(engine, chunks, 0, 9)
    run_ahead(engine, ahead)
    engine.cancel(0)
    said = [chunk.token_id for chunk in chunks[0] if chunk.token_id is not None]
    assert said == tokens(expected)[: len(said)]
    turn = (*ids(20), *(token for token in tokens(expected) if token is not None))
    found, cached = serve(engine, Request(1, turn, params))
    assert cached == (20 + len(said) - 1) // G * G
    assert tokens(found) == tokens(answer(plain, turn, params))


def test_an_interrupt_shares_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it came, all pages are free and nothing of before is trusted."""
    engine = make(device)
    expected, _ = serve(engine, Request(0, ids(40), GREEDY))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for owner, name in (
        (engine.runner, "launch"),
        (engine.pages, "take"),
        (engine.pages.prefixes, "hold"),
        (engine.pages.prefixes, "settle"),
        (engine.scheduler, "record"),
    ):
        chunks: dict[int, list[TokenChunk]] = {}
        assert serve(engine, Request(0, ids(40), GREEDY))[0] == expected
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, interrupted)
            engine.submit(Request(1, ids(40), GREEDY))
            for turn in range(9):
                take(engine, chunks)
                if name == "settle" and turn == 2:
                    engine.cancel(1)
                    engine.submit(Request(2, ids(40), GREEDY))
        finish(engine, chunks)
        assert all(chunk.finish_reason is None for chunk in chunks.get(1, ())[:-1])
        assert_nothing_left(engine)
        assert engine.pages.prefixes is not None and engine.pages.prefixes.kept == 0
        assert serve(engine, Request(3, ids(40), GREEDY)) == (expected, 0)


@pytest.mark.parametrize("express", [False, True], ids=["ordinary", "express"])
def test_memory_is_taken_from_the_oldest(device: torch.device, plain: Engine, express: bool) -> None:
    """A cache of ten pages, of which a request needs five and leaves three: there is always room, and the end of what
    was not used for longest goes first."""
    budget = 11 * SPEC.kv_bytes_per_token(2 if device.type == "cuda" else 4) * G
    engine = make(device, kv_cache_memory=budget)
    assert engine.pages.total == 10
    for salt, cached in ((1, 0), (2, 0), (1, 24), (3, 0), (1, 24), (3, 24), (2, 16)):
        asked = Request(0, ids(30, salt), GREEDY)
        assert serve(engine, asked, express) == (answer(plain, ids(30, salt), GREEDY), cached)
    serve(engine, Request(0, ids(70, 7), GREEDY))
    assert serve(engine, Request(0, ids(30, 1), GREEDY), express)[1] == 0, "it had to make room for a large one"


def test_a_hit_among_the_oldest(device: torch.device, plain: Engine) -> None:
    """The pages that would be taken next are the very ones that are found: others are taken, on either way."""
    budget = 7 * SPEC.kv_bytes_per_token(2 if device.type == "cuda" else 4) * G
    params = dataclasses.replace(GREEDY, max_tokens=12)
    expected = answer(plain, ids(26, 1), params)
    for express in (False, True):
        engine = make(device, kv_cache_memory=budget)
        for salt in (1, 2):
            serve(engine, Request(0, ids(24, salt), GREEDY))
        assert engine.pages.prefixes is not None
        oldest = {page.page for page in engine.pages.prefixes.match("", ids(26, 1))}
        assert oldest & set(engine.pages.upcoming(3)) and len(oldest) == 2
        assert serve(engine, Request(0, ids(26, 1), params), express) == (expected, 16)


def test_where_it_is_off(device: torch.device) -> None:
    dynamic = with_changes(SPEC, rope=RopeSpec("dynamic", factor=2.0, original_max_position=512))
    for engine in (
        make(device, prefix_cache=False),
        make(device, kv_window=40),
        make_engine(device, dynamic, page_size=G),
    ):
        assert engine.pages.prefixes is None
        for identity in range(2):
            assert serve(engine, Request(identity, ids(30), GREEDY))[1] == 0


# ------------------------------------------------------------------------------------------------------ any life at all

FAMILIES = 3
PARAMS = [SamplingParams(**{"max_tokens": 9, "seed": 3, **kind}) for kind in KINDS.values()]

lives = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, FAMILIES - 1), st.integers(1, 90), st.integers(0, len(PARAMS) - 1)),
        st.tuples(st.just("fire"), st.integers(0, FAMILIES - 1), st.integers(1, 90), st.integers(0, len(PARAMS) - 1)),
        st.tuples(st.just("step"), st.integers(1, 8)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("ahead"), st.integers(1, 9)),
        st.tuples(st.just("idle")),
    ),
    min_size=10,
    max_size=40,
)


@pytest.fixture(scope="module")
def known(plain: Engine) -> Iterator[dict[tuple[int, int, int], Bits]]:
    yield {}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=lives)
def test_nobody_can_tell(
    device: torch.device, plain: Engine, known: dict[tuple[int, int, int], Bits], script: list[tuple[Any, ...]]
) -> None:
    """Requests that begin alike, over few pages, together and one after another: each gets its own bits."""
    budget = 31 * SPEC.kv_bytes_per_token(2 if device.type == "cuda" else 4) * G
    engine = make(device, kv_cache_memory=budget, max_streams=3, max_model_len=120, loop_steps=3)
    chunks: dict[int, list[TokenChunk]] = {}
    asked: list[tuple[int, int, int]] = []
    cancelled: set[int] = set()
    for name, *given_ in script:
        if name in ("submit", "fire"):
            family, length, kind = given_
            request = Request(len(asked), ids(length, family), PARAMS[kind], salt=str(family % 2))
            asked.append((family, length, kind))
            shot = engine.fire(request.prompt_token_ids, request.params, request.salt) if name == "fire" else None
            engine.submit(request) if shot is None else engine.book(request, shot)
        elif name == "step":
            for _ in range(given_[0]):
                take(engine, chunks)
        elif name == "cancel" and given_[0] in engine._sequences:
            cancelled.add(given_[0])
            engine.cancel(given_[0])
        elif name == "ahead":
            run_ahead(engine, given_[0])
        elif name == "idle":
            while engine.idle_work:
                engine.work_while_idle()
    finish(engine, chunks)
    assert_nothing_left(engine)
    for identity, (family, length, kind) in enumerate(asked):
        key = (family, length, kind)
        if key not in known:
            known[key] = answer(plain, ids(length, family), PARAMS[kind])
        found = bits(chunks.get(identity, []))
        assert found == known[key][: len(found)] if identity in cancelled else found == known[key]


# --------------------------------------------------------------------------------------------------- as a user meets it


def test_the_benchmark(device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs anywhere; what it calls cached is, and what it calls computed is not."""
    script = Path(__file__).parents[1] / "benchmarks" / "prefix.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_prefixes", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output = tmp_path / "prefix.json"
    size = ["--context", "150", "--turn", "20", "--iterations", "3", "--output", str(output)]
    code = module.main(["--model", "tiny", "--device", str(device), "--weights", "checkpoint", *size])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["cached_tokens"] == {module.SHORT: [0], module.TURN: [(150 - 1) // 16 * 16], module.COMPUTED: [0]}
    assert all(len(values) == 3 and min(values) > 0 for values in found["samples_ms"].values())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[2].startswith(module.TURN) and f"{found['ratio']:.2f}" in lines[4]
    assert code == (1 if found["holds"] is False else 0)
    if device.type == "cpu":
        assert found["holds"] is None and "means nothing" in lines[4]


def test_as_a_user_meets_it(device: torch.device) -> None:
    config: dict[str, Any] = {"max_model_len": 256, "prefill_buckets": (16, 32, 128), "rolling": False}
    with LLM("tiny", device=str(device), max_streams=2, **config) as llm:
        assert llm.describe()["prefix_cache"] is True
        text = "The train leaves at nine, and whoever comes later has to wait for the next one, which leaves at ten. "
        first = llm.generate(text, SamplingParams(max_tokens=4))[0]
        again = llm.generate(text, SamplingParams(max_tokens=4))[0]
        length = len(first.prompt_token_ids)
        assert length > 16 and (first.cached_tokens, again.cached_tokens) == (0, (length - 1) // 16 * 16)
        assert again.token_ids == first.token_ids and again.text == first.text
        stats = llm.stats()
        assert stats["prefix_tokens_asked"] == 2 * length and stats["prefix_tokens_found"] == again.cached_tokens
        assert stats["free_pages"] == llm._engine.pages.total and stats["cached_pages"] >= again.cached_tokens // 16
        llm.reset_stats()
        assert llm.stats()["prefix_tokens_asked"] == llm.stats()["prefix_tokens_found"] == 0
    with LLM("tiny", device=str(device), max_streams=2, prefix_cache=False, **config) as llm:
        assert llm.describe()["prefix_cache"] is False
        assert [llm.generate(text, SamplingParams(max_tokens=4))[0].cached_tokens for _ in range(2)] == [0, 0]
        assert llm.stats()["cached_pages"] == llm.stats()["prefix_tokens_asked"] == 0
