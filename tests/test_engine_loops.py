"""A lone stream decodes in loops: the bits of ordinary steps, whatever comes between, and nothing left behind.

On the CPU the loops are emulated and run while the host polls; on a GPU they run by themselves. Most tests use loops of
few steps, so that every moment in them can be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_cases import (
    answer,
    assert_nothing_left,
    bits,
    decode_paths,
    finish,
    make_engine,
    prompt,
    run_ahead,
    steps_until,
    take,
    tokens,
)

from jitgraph import LLM, SamplingParams
from jitgraph.engine.engine import Engine
from jitgraph.graphs.key import Path, Sampling
from jitgraph.graphs.loop_control import LOOP_STEPS, LoopReason
from jitgraph.types import FinishReason, Request, TokenChunk

IDS = prompt(16)
"""Exactly a bucket, so that its graph and its eager step have one shape."""
TEXT = "The train leaves at nine."
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.001, "seed": 3, "logprobs": 2},
    "logprobs": {"logprobs": 5},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logprobs": 0},
    "everything": {
        "temperature": 1.1,
        "top_p": 0.9,
        "seed": 2**63 + 11,
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.2,
        "logit_bias": {7: 1.5, 9: -100.0},
        "logprobs": 20,
    },
}
SHORT = 4
"""Steps of a short loop."""
LONG = 3 * SHORT + 2
"""Tokens of a stream with short loops: one from the prompt, three loops, one more."""


@pytest.fixture(scope="module")
def looping(device: torch.device) -> Engine:
    return make_engine(device, loop_steps=SHORT)


@pytest.fixture(scope="module")
def stepping(device: torch.device) -> Engine:
    return make_engine(device, device_loop=False)


def params(kind: str, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": LONG, **KINDS[kind], **more})


# ------------------------------------------------------------------------------------------------------- the same bits


@pytest.fixture(scope="module")
def long_loops(device: torch.device) -> Engine:
    return make_engine(device)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "everything"])
def test_every_length(long_loops: Engine, stepping: Engine, kind: str) -> None:
    """Tokens, log-probabilities and the reason for the end equal those of ordinary steps, and all steps but the
    prompt's run in loops."""
    for most in (1, 2, LOOP_STEPS - 1, LOOP_STEPS, LOOP_STEPS + 1, 2 * LOOP_STEPS + 2):
        long_loops.reset_counters()
        stepping.reset_counters()
        one = params(kind, max_tokens=most)
        expected = answer(stepping, IDS, one)
        assert answer(long_loops, IDS, one) == expected
        assert len(expected) == most and expected[-1][-1] is FinishReason.LENGTH
        assert [entry[-1] for entry in expected[:-1]] == [None] * (most - 1)
        assert Path.LOOP not in decode_paths(stepping)
        assert decode_paths(long_loops) == ({Path.LOOP: most - 1} if most > 1 else {})
        assert long_loops.runner.steps == stepping.runner.steps == most


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_path(looping: Engine, stepping: Engine, device: torch.device, kind: str) -> None:
    """Loops, single replays and eager steps give the same bits."""
    eager = make_engine(device, graphs=False)
    expected = answer(eager, IDS, params(kind))
    assert answer(looping, IDS, params(kind)) == answer(stepping, IDS, params(kind)) == expected
    assert set(decode_paths(eager)) == {Path.EAGER}


@pytest.mark.parametrize("kind", ["greedy", "everything"])
def test_stop_ids_end_a_loop_wherever_they_come(looping: Engine, stepping: Engine, kind: str) -> None:
    """In the prompt's step and at every step of the loops, the queued one too; with ``min_tokens`` on either side of
    it. What runs next is not disturbed by the rest of the loops."""
    free = tokens(answer(stepping, IDS, params(kind)))
    for token in dict.fromkeys(free):
        first = free.index(token)
        for least in (0, first, first + 1, first + 2):
            one = params(kind, stop_token_ids=(token, 500), min_tokens=min(least, LONG))
            expected = answer(stepping, IDS, one)
            assert answer(looping, IDS, one) == expected
            if least <= first:
                assert tokens(expected) == free[: first + 1] and expected[-1][-1] is FinishReason.STOP
            else:
                assert token not in tokens(expected)[:least]
    assert tokens(answer(looping, IDS, params(kind))) == free


def test_the_end_of_the_context_ends_a_loop(looping: Engine, stepping: Engine) -> None:
    for length in range(255 - 2 * SHORT, 256):
        ids, one = prompt(length), params("sampled", max_tokens=250)
        expected = answer(stepping, ids, one)
        assert answer(looping, ids, one) == expected
        assert len(expected) == 256 - length and expected[-1][-1] is FinishReason.LENGTH


def test_one_launch_serves_a_whole_loop(looping: Engine) -> None:
    looping.reset_counters()
    before = looping.runner.loops.launched
    answer(looping, IDS, params("greedy", max_tokens=1 + 5 * SHORT))
    assert looping.runner.loops.launched - before == 5
    assert looping.runner.launches == 6 and looping.runner.steps == 1 + 5 * SHORT


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"device_loop": False}, LoopReason.SWITCHED_OFF),
        ({"graphs": False}, LoopReason.STEPS_OUTSIDE_GRAPHS),
        ({"fused_sampling": False}, LoopReason.STEPS_OUTSIDE_GRAPHS),
        ({"graph_scope": "static"}, LoopReason.STEPS_OUTSIDE_GRAPHS),
    ],
)
def test_without_loops_there_is_a_reason(device: torch.device, settings: dict[str, Any], reason: LoopReason) -> None:
    engine = make_engine(device, **settings)
    assert dict(engine.runner.loops.reasons) == {reason: 1}
    assert all(kind not in engine.runner.loops for kind in Sampling)


# ----------------------------------------------------------------------------------------------- what comes in between

MOMENTS = range(1, 2 * SHORT + 3)
"""Tokens read when something happens: after the prompt, and at every step of the first loops."""
AHEAD = (0, 1, SHORT, SHORT + 1, 2 * SHORT, 10**6)
"""Pieces that an emulated device does before it hears of it."""


@pytest.mark.parametrize("kind", ["greedy", "everything"])
@pytest.mark.parametrize("ahead", AHEAD)
def test_another_request_arrives_in_the_middle(looping: Engine, stepping: Engine, kind: str, ahead: int) -> None:
    """Both streams get the tokens they get alone, and what is left afterwards decodes in loops again."""
    other, own = prompt(21, salt=1), params(kind, max_tokens=5, seed=5)
    alone, others = (tokens(answer(stepping, ids, one)) for ids, one in ((IDS, params(kind)), (other, own)))
    for moment in MOMENTS:
        looping.reset_counters()
        chunks: dict[int, list[TokenChunk]] = {}
        looping.submit(Request(0, IDS, params(kind)))
        steps_until(looping, chunks, 0, moment)
        run_ahead(looping, ahead)
        looping.submit(Request(1, other, own))
        finish(looping, chunks)
        assert tokens(bits(chunks[0])) == alone and tokens(bits(chunks[1])) == others, f"after {moment} tokens"
        assert_nothing_left(looping)
        if moment <= 4 and looping.runner.emulated is not None and ahead <= 1:
            assert decode_paths(looping)[Path.EXACT] >= 3, "two rows at once"
            assert decode_paths(looping)[Path.LOOP] >= moment, "alone before and after"


@pytest.mark.parametrize("ahead", AHEAD)
def test_one_that_is_cancelled_in_the_middle(looping: Engine, stepping: Engine, ahead: int) -> None:
    """Its tokens up to then are those of an undisturbed run, and the next request, at once, gets its own."""
    alone = answer(stepping, IDS, params("everything"))
    ids, one = prompt(17, salt=2), params("sampled", max_tokens=SHORT + 3)
    following = answer(stepping, ids, one)
    for moment in MOMENTS:
        chunks: dict[int, list[TokenChunk]] = {}
        looping.submit(Request(0, IDS, params("everything")))
        steps_until(looping, chunks, 0, moment)
        run_ahead(looping, ahead)
        looping.cancel(0)
        looping.submit(Request(1, ids, one))
        finish(looping, chunks)
        assert bits(chunks[0]) == alone[:moment], "what came after the cancellation is nobody's"
        assert bits(chunks[1]) == following
        assert_nothing_left(looping)


@pytest.mark.parametrize("ahead", AHEAD)
def test_a_request_that_comes_and_goes_in_the_middle(looping: Engine, stepping: Engine, ahead: int) -> None:
    """The loops that were called off for its sake go on where they were."""
    alone = tokens(answer(stepping, IDS, params("sampled")))
    for moment in MOMENTS:
        for turns in (0, 3):
            chunks: dict[int, list[TokenChunk]] = {}
            looping.submit(Request(0, IDS, params("sampled")))
            steps_until(looping, chunks, 0, moment)
            looping.submit(Request(1, prompt(60, salt=3), params("greedy")))
            looping.launch()
            run_ahead(looping, ahead)
            for _ in range(turns):
                take(looping, chunks)
            looping.cancel(1)
            finish(looping, chunks)
            assert tokens(bits(chunks[0])) == alone
            assert_nothing_left(looping)


def test_one_that_cannot_run_yet_does_not_end_the_loops(device: torch.device, stepping: Engine) -> None:
    """With one slot the second request waits for the first, which keeps its loops."""
    engine = make_engine(device, max_streams=1, loop_steps=SHORT)
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, IDS, params("greedy")))
    steps_until(engine, chunks, 0, 3)
    engine.submit(Request(1, IDS, params("sampled")))
    finish(engine, chunks)
    assert bits(chunks[0]) == answer(stepping, IDS, params("greedy"))
    assert bits(chunks[1]) == answer(stepping, IDS, params("sampled"))
    assert set(decode_paths(engine)) == {Path.LOOP}
    assert_nothing_left(engine)


def test_changing_between_kinds(looping: Engine, stepping: Engine) -> None:
    """Loops of either kind share their state; one after the other gives what each gives alone."""
    for kind in ["greedy", "everything", "greedy", "penalised", "sampled", "greedy"]:
        assert answer(looping, IDS, params(kind)) == answer(stepping, IDS, params(kind))


# ----------------------------------------------------------------------------------------------------------- interrupts


def _before(body: Callable[[], None]) -> None:
    raise KeyboardInterrupt


def _after(body: Callable[[], None]) -> None:
    body()
    raise KeyboardInterrupt


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host cannot interrupt a GPU's loop")
@pytest.mark.parametrize("interrupt", [_before, _after])
@pytest.mark.parametrize("queued", [0, 1])
def test_an_interrupt_inside_an_emulated_loop(
    device: torch.device,
    stepping: Engine,
    monkeypatch: pytest.MonkeyPatch,
    interrupt: Callable[[Callable[[], None]], None],
    queued: int,
) -> None:
    """Ctrl-C in the middle of the device's work: the request ends as cancelled, and so does one that waits behind it;
    the engine is as good as new."""
    engine = make_engine(device, max_streams=1, loop_steps=SHORT)
    loop: Any = engine.runner.loops._loops[Sampling.GREEDY]
    body, expected = loop._body, answer(stepping, IDS, params("greedy"))
    for steps in range(2 * SHORT + 1):
        left = steps

        def broken() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                interrupt(body)
            body()

        chunks: dict[int, list[TokenChunk]] = {}
        for identity in range(1 + queued):
            engine.submit(Request(identity, IDS, params("greedy")))
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_body", broken)
            with pytest.raises(KeyboardInterrupt):
                finish(engine, chunks)
        finish(engine, chunks)
        for identity in range(1 + queued):
            *given, last = bits(chunks[identity])
            assert last == (None, None, (), FinishReason.CANCELLED)
            assert given == expected[: 0 if identity else 1 + steps]
        assert_nothing_left(engine)
        for kind in ("greedy", "everything"):
            assert answer(engine, IDS, params(kind)) == answer(stepping, IDS, params(kind))


def test_an_interrupt_while_waiting_for_a_loop_changes_nothing(
    looping: Engine, stepping: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    chunks: dict[int, list[TokenChunk]] = {}
    looping.submit(Request(0, IDS, params("sampled")))
    for moment in MOMENTS:
        steps_until(looping, chunks, 0, moment)
        with monkeypatch.context() as patch:
            patch.setattr(looping.runner, "read", interrupt)
            with pytest.raises(KeyboardInterrupt):
                looping.step()
    finish(looping, chunks)
    assert bits(chunks[0]) == answer(stepping, IDS, params("sampled"))
    assert_nothing_left(looping)


# ------------------------------------------------------------------------------------------------- as a user meets them


@pytest.fixture(scope="module")
def llms(device: torch.device) -> Iterator[tuple[LLM, LLM]]:
    """(with loops, without)."""
    settings: dict[str, Any] = {"max_model_len": 256, "prefill_buckets": (8, 32), "max_streams": 2, "rolling": False}
    settings |= {"device": str(device), "max_graphs": 6}
    with LLM("tiny", **settings) as looping, LLM("tiny", device_loop=False, **settings) as stepping:
        yield looping, stepping


def test_stop_strings(llms: tuple[LLM, LLM]) -> None:
    """Found on the host while the device is already further on; then another request at once."""
    looping, stepping = llms
    free = stepping.generate(TEXT, SamplingParams(max_tokens=80))[0]
    for at in (1, 20, LOOP_STEPS + 5):
        text = stepping.tokenizer.decode(free.token_ids[: at + 1])
        one = SamplingParams(max_tokens=80, stop=(text[-3:],), min_tokens=min(at, 20))
        expected, found = (llm.generate(TEXT, one)[0] for llm in (stepping, looping))
        assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
        assert found.finish_reason is expected.finish_reason is FinishReason.STOP
    assert looping.generate(TEXT, SamplingParams(max_tokens=80))[0].token_ids == free.token_ids
    assert looping.stats()["free_pages"] == looping._engine.pages.total


def test_closing_a_stream_and_asking_at_once(llms: tuple[LLM, LLM]) -> None:
    looping, stepping = llms
    sampled = SamplingParams(max_tokens=10, temperature=0.8, seed=4, logprobs=1)
    expected = stepping.generate(TEXT, sampled)[0]
    free = [chunk.token_id for chunk in stepping.stream(TEXT, SamplingParams(max_tokens=140))]
    for read in (0, 1, 2, LOOP_STEPS, LOOP_STEPS + 1, LOOP_STEPS + 20):
        stream = looping.stream(TEXT, SamplingParams(max_tokens=140))
        found = [next(stream).token_id for _ in range(read)]
        stream.close()
        again = looping.generate(TEXT, sampled)[0]
        assert found == free[:read]
        assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)
        assert looping.stats()["free_pages"] == looping._engine.pages.total


def test_the_figures_of_a_lone_stream(llms: tuple[LLM, LLM]) -> None:
    looping, stepping = llms
    assert looping.describe()["device_loop"] == ["greedy", "full"] and stepping.describe()["device_loop"] == []
    assert stepping.stats()["loop_reasons"] == {"switched_off": 1} and looping.stats()["loop_reasons"] == {}
    for llm in llms:
        llm.reset_stats()
    loops = looping.stats()["loops"]
    for llm in llms:
        llm.generate([list(range(5, 13))], SamplingParams(max_tokens=LOOP_STEPS + 3))
    stats, plain = looping.stats(), stepping.stats()
    assert stats["decode_paths"] == {"loop": LOOP_STEPS + 2} and plain["decode_paths"] == {"exact": LOOP_STEPS + 2}
    assert stats["reasons"] == {"captured": 1, "lone_stream": LOOP_STEPS + 2}
    assert stats["loops"] - loops == 2 and plain["loops"] == 0
    assert stats["steps"] == plain["steps"] == plain["launches"] == LOOP_STEPS + 3 and stats["launches"] == 3
