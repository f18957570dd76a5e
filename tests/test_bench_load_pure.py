"""The parts of the load generator without a network: plans, limits, events of a stream, figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgraph.bench.load.figures import figures, goodput, meets, spread
from jitgraph.bench.load.limits import METRICS, PRESETS, Limit, parse_limits
from jitgraph.bench.load.plan import Fixed, Normal, Plan, Uniform, arrival_times, asks, parse_lengths, read_pairs
from jitgraph.bench.load.prompt import chat_text
from jitgraph.bench.load.records import CANCELLED, ERROR, OK, Record, Writer, from_json, read_records
from jitgraph.bench.load.show import progress_line, remarks
from jitgraph.bench.load.sse import DONE, Answer, Events, Failed
from jitgraph.errors import ConfigError, OutputError

LENGTHS = st.one_of(
    st.builds(Fixed, st.integers(1, 50)),
    st.builds(lambda low, more: Uniform(low, low + more), st.integers(1, 50), st.integers(0, 50)),
    st.builds(Normal, st.floats(1, 50), st.floats(0, 30)),
)
PLANS = st.builds(
    Plan,
    requests=st.integers(1, 20),
    rate=st.one_of(st.none(), st.floats(0.1, 1000)),
    arrivals=st.sampled_from(["poisson", "fixed"]),
    prompt=LENGTHS,
    output=LENGTHS,
    cancel=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
TIMES = st.lists(st.floats(0.01, 1e5), min_size=1, max_size=20).map(lambda times: tuple(sorted(times)))


def record(token_ms: tuple[float, ...] = (100.0, 120.0), outcome: str = OK, **more: Any) -> Record:
    """A record with these token times, sent at 0 unless told otherwise."""
    base = Record(0, outcome, None, 0.0, token_ms[-1] if token_ms else 1.0, 8, len(token_ms), len(token_ms), token_ms)
    return replace(base, **more)


# ---------------------------------------------------------------------------------------------------------------- plans


@given(PLANS)
def test_a_plan_is_the_same_each_time_and_keeps_its_word(plan: Plan) -> None:
    found = list(asks(plan))
    assert found == list(asks(plan)) and [ask.index for ask in found] == list(range(plan.requests))
    low, high = plan.token_ids
    for ask in found:
        assert len(ask.prompt) >= 1 and ask.output_tokens >= 1 and all(low <= i <= high for i in ask.prompt)
        assert ask.cancel_after is None or 1 <= ask.cancel_after < ask.output_tokens
        assert (ask.due_s is None) == (plan.rate is None)
        if isinstance(plan.prompt, Uniform):
            assert plan.prompt.low <= len(ask.prompt) <= plan.prompt.high
    due = [ask.due_s for ask in found if ask.due_s is not None]
    assert due == sorted(due) and due[:1] in ([], [0.0])


@given(PLANS, st.integers(1, 20), LENGTHS)
def test_requests_do_not_depend_on_their_number_nor_on_what_else_is_drawn(plan: Plan, more: int, other: Any) -> None:
    longer = list(asks(replace(plan, requests=plan.requests + more)))
    assert longer[: plan.requests] == list(asks(plan))
    same = list(asks(replace(plan, cancel=0.0, rate=None)))
    assert [(a.prompt, a.output_tokens) for a in same] == [(a.prompt, a.output_tokens) for a in asks(plan)]
    assert all(ask.cancel_after is None for ask in same)


def test_seeds_differ() -> None:
    prompts = {next(asks(Plan(seed=seed))).prompt for seed in range(20)}
    assert len(prompts) == 20
    assert len({ask.prompt for ask in asks(Plan(requests=20))}) == 20, "no prompt twice: a prefix cache would help"


def test_arrivals_have_their_rate_and_their_law() -> None:
    fixed = list(arrival_times(Plan(requests=5, rate=4.0, arrivals="fixed")))
    assert fixed == [0.0, 0.25, 0.5, 0.75, 1.0]
    times = [t for t in arrival_times(Plan(requests=20_001, rate=50.0)) if t is not None]
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05), "exponential gaps: as wide as their mean"
    assert (gaps > 1 / 50).mean() == pytest.approx(math.exp(-1), abs=0.01)


def test_lengths_have_their_law() -> None:
    many = list(asks(Plan(requests=2000, prompt=Uniform(3, 6), output=Normal(200, 20), cancel=0.25)))
    counts = {n: sum(len(ask.prompt) == n for ask in many) / 2000 for n in range(3, 7)}
    assert all(share == pytest.approx(0.25, abs=0.04) for share in counts.values())
    outputs = [ask.output_tokens for ask in many]
    assert np.mean(outputs) == pytest.approx(200, abs=2) and np.std(outputs) == pytest.approx(20, rel=0.1)
    left = [ask.cancel_after for ask in many if ask.cancel_after is not None]
    assert len(left) / 2000 == pytest.approx(0.25, abs=0.04)
    assert np.mean(left) == pytest.approx(100, rel=0.1), "anywhere in the answer"


@given(st.integers(1, 10**6), st.integers(0, 1000))
def test_lengths_are_read(low: int, more: int) -> None:
    assert parse_lengths(f"{low}", "--x") == Fixed(low)
    high = min(low + more, 10**6)
    assert parse_lengths(f"{low}:{high}", "--x") == Uniform(low, high)
    assert parse_lengths(f"normal:{low},{more}", "--x") == Normal(low, more)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "x", "5:3", "0:3", "1:2:3", "normal:1", "normal:0,1", "normal:nan,1", "1e9"]
)
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--prompt-tokens"):
        parse_lengths(text, "--prompt-tokens")


def test_pairs_are_used_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "lengths.jsonl"
    file.write_text('{"prompt_tokens": 3, "output_tokens": 4, "id": 1}\n\n{"prompt_tokens": 5, "output_tokens": 6}\n')
    found = asks(Plan(requests=3, pairs=read_pairs(file)))
    assert [(len(ask.prompt), ask.output_tokens) for ask in found] == [(3, 4), (5, 6), (3, 4)]


@pytest.mark.parametrize(
    "line", ["{", "[]", "1", '{"prompt_tokens": 3}', '{"prompt_tokens": 0, "output_tokens": 1}',
             '{"prompt_tokens": 1.5, "output_tokens": 1}', '{"prompt_tokens": true, "output_tokens": 1}']
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "lengths.jsonl"
    file.write_text(f'{{"prompt_tokens": 3, "output_tokens": 4}}\n{line}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_pairs(file)


def test_chat_messages_have_a_word_for_each_id() -> None:
    assert len(chat_text(range(100, 300)).split()) == 200


# --------------------------------------------------------------------------------------------------------------- limits


@given(st.dictionaries(st.sampled_from(METRICS), st.integers(1, 10**6), min_size=1))
def test_limits_are_read_in_every_unit(values: dict[str, int]) -> None:
    for unit, factor in (("us", 1e-3), ("ms", 1.0), ("s", 1e3)):
        found = parse_limits(" , ".join(f"{name} <= {value}{unit}" for name, value in values.items()))
        assert found == tuple(Limit(name, value * factor) for name, value in values.items())
        assert [limit.most_ms for limit in parse_limits(",".join(map(str, found)))] == pytest.approx(
            [limit.most_ms for limit in found], rel=1e-5
        )


def test_presets_are_the_published_limits() -> None:
    assert parse_limits("mlperf-llama2-70b-interactive") == (Limit("ttft", 450.0), Limit("tpot", 40.0))
    assert parse_limits("mlperf-llama3.1-8b-interactive") == (Limit("ttft", 500.0), Limit("tpot", 30.0))
    assert len(PRESETS) == 2
    assert parse_limits("ttft<=0.45s,tpot<=40ms") == parse_limits("mlperf-llama2-70b-interactive")


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft<=1", "ttft<=0ms", "ttft<1s", "x<=1s", "ttft<=-1s", "ttft<=1s,ttft<=2s"]
)
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--limit"):
        parse_limits(text)


# --------------------------------------------------------------------------------------------------------------- events


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1), max_size=5),
    st.sampled_from(["\n", "\r\n"]),
    st.data(),
)
def test_events_do_not_depend_on_how_bytes_are_cut(datas: list[str], end: str, cuts: st.DataObject) -> None:
    stream = "".join(f": ping{end}:{end}{end}id: 7{end}data: {data}{end}{end}" for data in datas).encode()
    places = sorted(cuts.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    events = Events()
    found = [data for a, b in pairwise([0, *places, len(stream)]) for data in events.feed(stream[a:b])]
    assert found == datas


def test_an_event_is_there_when_its_last_byte_is() -> None:
    events = Events()
    assert events.feed(b"data: a\ndata: b\n") == []
    assert events.feed(b"\n") == ["a\nb"]


def chunk(text: str = "", usage: int | None = None, *, choices: bool = True, reason: str | None = None) -> str:
    """One event of a completion."""
    found: dict[str, Any] = {"choices": [{"text": text, "finish_reason": reason}] if choices else []}
    if usage is not None:
        found["usage"] = {"prompt_tokens": 5, "completion_tokens": usage}
    return json.dumps(found)


@given(st.lists(st.integers(0, 4), max_size=10))
def test_tokens_come_with_the_events_that_count_them(bursts: list[int]) -> None:
    answer = Answer()
    total, wanted = 0, []
    for turn, burst in enumerate(bursts):
        total += burst
        wanted += [float(turn)] * burst
        answer.take(chunk("x" if turn % 2 else "", total), float(turn))
    answer.take(chunk(usage=total + 1, choices=False), 99.0)
    answer.take(DONE, 100.0)
    assert answer.token_ms == wanted and answer.tokens == total + 1 and answer.prompt_tokens == 5 and answer.done


def test_without_a_count_an_event_with_text_is_a_token() -> None:
    answer = Answer()
    for at, data in enumerate([chunk(""), chunk("a"), chunk("b", reason="length"), chunk("")]):
        answer.take(data, float(at))
    answer.take(json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None}), 8.0)
    answer.take(json.dumps({"choices": [{"delta": {"content": "c"}}]}), 9.0)
    assert answer.token_ms == [1.0, 2.0, 9.0] and answer.tokens == 3 and answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ('{"error": {"message": "gone"}}', "stream error"),
        ("{", "bad event"),
        ("[]", "bad event"),
        ('{"choices": [1]}', "bad event"),
        ('{"choices": [], "usage": {}} ', None),
        ('{"choices": [], "usage": {"x": 1}}', "bad event"),
    ],
)
def test_events_that_are_none(data: str, kind: str | None) -> None:
    if kind is None:
        Answer().take(data, 0.0)
        return
    with pytest.raises(Failed) as caught:
        Answer().take(data, 0.0)
    assert caught.value.kind == kind


# -------------------------------------------------------------------------------------------------------------- figures


@given(TIMES, st.integers(0, 3))
def test_metrics_of_a_request(times: tuple[float, ...], unseen: int) -> None:
    found = record(times, tokens=len(times) + unseen, due_ms=10.0, send_ms=12.5)
    assert found.ttft_ms == times[0] and found.e2e_ms == times[-1] and found.queue_ms == 2.5
    if found.tokens == 1:
        assert found.tpot_ms is None
    else:
        assert found.tpot_ms == (times[-1] - times[0]) / (len(times) + unseen - 1)
    assert from_json(json.loads(json.dumps(found.as_json()))) == found


@given(st.lists(st.tuples(TIMES, st.sampled_from([OK, CANCELLED, ERROR])), max_size=12))
def test_only_whole_answers_are_latency(parts: list[tuple[tuple[float, ...], str]]) -> None:
    records = [record(times, outcome, error="timeout" if outcome == ERROR else None) for times, outcome in parts]
    found = figures(records, (Limit("ttft", 1e3),))
    whole = [one for one in records if one.outcome == OK]
    counts = found["requests"]
    assert counts["sent"] == len(records) == counts["ok"] + counts["cancelled"] + counts["errors"]
    assert sum(found["errors_by_kind"].values()) == counts["errors"]
    assert found["output_tokens"] == sum(len(one.token_ms) for one in whole)
    if whole:
        assert found["ttft_ms"]["p50"] == pytest.approx(float(np.median([one.token_ms[0] for one in whole])))
        assert found["ttft_ms"]["n"] == len(whole) and found["requests_per_s"] > 0
        assert len(found["ttft_ms"]["p99_ci"]) == 2
    else:
        assert found["ttft_ms"] is None
    assert remarks(found) is not None and "done" in progress_line(2.0, 9, 1, records)
    json.dumps(found, allow_nan=False)


def test_goodput_counts_failures_as_misses_and_leaves_cancellations_out() -> None:
    limits = parse_limits("ttft<=100ms,tpot<=20ms")
    good, edge = record((50.0, 60.0)), record((100.0, 120.0))
    slow_first, slow_rest, one = record((101.0, 102.0)), record((50.0, 90.0)), record((99.0,))
    failed, left = record((50.0, 60.0), ERROR), record((50.0, 60.0), CANCELLED)
    assert [meets(r, limits) for r in (good, edge, slow_first, slow_rest, one, failed, left)] == [
        *(True, True, False, False, True, False, False)
    ]
    found = goodput([good, edge, slow_first, slow_rest, one, failed, left], limits)
    assert found["good"] == 3 and found["share"] == 0.5
    assert found["requests_per_s"] == pytest.approx(3 / 0.12), "over the whole run, 120 ms"
    assert found["p99_within"] == {"ttft<=100ms": False, "tpot<=20ms": False}
    assert goodput([good, edge], limits)["p99_within"] == {"ttft<=100ms": True, "tpot<=20ms": True}
    assert goodput([failed], limits)["p99_within"] == {"ttft<=100ms": False, "tpot<=20ms": False}


def test_many_values_have_no_interval() -> None:
    assert spread([]) is None and spread([None]) is None
    few, many = spread([1.0, 2.0, None]), spread(map(float, range(10_001)))
    assert few is not None and "p99_ci" in few and few["n"] == 2
    assert many is not None and "p99_ci" not in many and many["p50"] == 5000.0


def test_records_are_kept_one_on_a_line_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with Writer(folder) as writer:
        writer.add(record())
        assert read_records(folder / "requests.jsonl") == [record()], "on disk at once"
        writer.add(record((1.0,), ERROR, error="timeout"))
    assert len(read_records(folder / "requests.jsonl")) == 2
    with pytest.raises(OutputError, match="already"):
        Writer(folder)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        Writer(tmp_path / "file")
