"""Output that must follow a grammar: always valid, whoever runs beside it, and no trace of it in anybody else's."""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import llguidance
import pytest
import tokenizers
import torch
from engine_cases import (
    answer,
    assert_nothing_left,
    bits,
    decode_paths,
    finish,
    make_engine,
    prompt,
    steps_until,
    with_changes,
)
from hypothesis import given
from hypothesis import strategies as st

from jitgraph import LLM
from jitgraph.engine import grammar as grammars
from jitgraph.engine.engine import Engine
from jitgraph.engine.grammar import KEPT_GRAMMARS, MAX_DEPTH, GrammarCompiler
from jitgraph.errors import RequestError
from jitgraph.graphs.key import Path
from jitgraph.text.tokenizer import Tokenizer, find_tokenizer
from jitgraph.types import MAX_GRAMMAR_BYTES, FinishReason, Grammar, Request, SamplingParams, TokenChunk

EOS = 1
SPEC = with_changes(vocab_size=2051, eos_token_ids=(EOS,))
"""The bundled tokenizer's entries and three that it does not know."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
WORD = Grammar("regex", "[a-f]{3,5}")
HOT = {"max_tokens": 200, "temperature": 1.0}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = find_tokenizer(None)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def engine(device: torch.device) -> Iterator[Engine]:
    made = make_engine(device, SPEC, loop_steps=4, max_model_len=300)
    yield made
    assert_nothing_left(made)
    made.close()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        used = request.getfixturevalue("engine")
        assert not used.constraints.active and not used.constraints._held


def run(engine: Engine, requests: list[Request]) -> dict[int, list[TokenChunk]]:
    for request in requests:
        engine.submit(request)
    chunks: dict[int, list[TokenChunk]] = {}
    finish(engine, chunks)
    assert_nothing_left(engine)
    return chunks


def text_of(tokenizer: Tokenizer, chunks: list[TokenChunk]) -> str:
    return tokenizer.decode([chunk.token_id for chunk in chunks if chunk.token_id is not None])


def say(engine: Engine, tokenizer: Tokenizer, grammar: Grammar, **params: Any) -> tuple[str, FinishReason | None]:
    """What one request says under a grammar, and why it ended."""
    request = Request(0, prompt(5), SamplingParams(**{**HOT, "seed": 1, **params}), grammar=grammar)
    chunks = run(engine, [request])[0]
    return text_of(tokenizer, chunks), chunks[-1].finish_reason


def check_person(text: str) -> None:
    """What ``SCHEMA`` says, said again."""
    value = json.loads(text)
    assert sorted(value) == ["age", "kind", "name", "tags"]
    assert isinstance(value["name"], str) and len(value["name"]) <= 8
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert value["kind"] in ("cat", "dog", None)
    assert len(value["tags"]) <= 3 and all(type(tag) is bool for tag in value["tags"])


# --------------------------------------------------------------------------------------------------------- what it says


def test_a_schema_always_gives_valid_json(engine: Engine, tokenizer: Tokenizer) -> None:
    """Forty seeds, eight at a time, the others waiting."""
    requests = [Request(i, prompt(3 + i % 9, i), SamplingParams(**HOT, seed=i), grammar=JSON) for i in range(40)]
    chunks = run(engine, requests)
    texts = {text_of(tokenizer, chunks[i]) for i in range(40)}
    for i, text in enumerate(texts):
        check_person(text)
        assert chunks[i][-1].finish_reason is FinishReason.STOP
    assert len(texts) > 30, "seeds say different things"


@pytest.mark.parametrize(
    "settings",
    [{"graphs": False}, {"fused_sampling": False}, {"batch_invariant": True}, {"kv_window": 40, "kv_sinks": 4},
     {"graph_scope": "static"}, {"device_loop": False}],
    ids=str,
)  # fmt: skip
def test_under_every_setting(device: torch.device, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    made = make_engine(device, SPEC, **settings)
    requests = [Request(i, prompt(5, i), SamplingParams(**HOT, seed=i), grammar=JSON) for i in range(4)]
    requests.append(Request(4, prompt(5), SamplingParams(max_tokens=9), grammar=WORD))
    chunks = run(made, requests)
    for i in range(4):
        check_person(text_of(tokenizer, chunks[i]))
    assert re.fullmatch("[a-f]{3,5}", text_of(tokenizer, chunks[4])), "greedy, in the kind of step that is not lean"


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (WORD, "[a-f]{3,5}"),
        (Grammar("regex", "(yes|no)( really){0,2}"), "(yes|no)( really){0,2}"),
        (Grammar("lark", 'start: item ("," item){1,3}\nitem: "<" /[0-9]{1,2}/ ">"'), r"<\d\d?>(,<\d\d?>){1,3}"),
        (Grammar("json_schema", '{"enum": ["a", 7]}'), '"a"|7'),
    ],
    ids=str,
)
def test_kinds_of_grammar(engine: Engine, tokenizer: Tokenizer, grammar: Grammar, pattern: str) -> None:
    for seed in range(6):
        for params in ({"seed": seed}, {"temperature": 0.0}, {"seed": seed, "top_k": 3, "logprobs": 2}):
            text, reason = say(engine, tokenizer, grammar, **params)
            assert re.fullmatch(pattern, text), text
            assert reason is FinishReason.STOP


def test_any_json_object(engine: Engine, tokenizer: Tokenizer) -> None:
    """It may be long: what does not come to its end in time is the beginning of one."""
    ended = 0
    for seed in range(8):
        text, reason = say(engine, tokenizer, Grammar("json_object"), seed=seed)
        assert text.startswith("{")
        if reason is FinishReason.STOP:
            ended += 1
            assert isinstance(json.loads(text), dict)
    assert ended


def test_an_output_ends_when_nothing_can_follow(engine: Engine) -> None:
    """Without another step for an EOS; also where the last token is the last that there is room for."""
    request = Request(0, prompt(5), SamplingParams(max_tokens=50), grammar=Grammar("regex", "ab|cd"))
    chunks = run(engine, [request])[0]
    assert chunks[-1].finish_reason is FinishReason.STOP and chunks[-1].token_id != EOS
    exact = Request(0, prompt(5), SamplingParams(max_tokens=len(chunks)), grammar=Grammar("regex", "ab|cd"))
    assert run(engine, [exact])[0][-1].finish_reason is FinishReason.STOP
    longer = Request(0, prompt(5), SamplingParams(max_tokens=3), grammar=Grammar("regex", "[a-c]{30}"))
    assert run(engine, [longer])[0][-1].finish_reason is FinishReason.LENGTH


def test_eos_ends_an_output_that_may_end(engine: Engine, tokenizer: Tokenizer) -> None:
    """And only there: before three letters EOS is not allowed, whatever a bias says."""
    bias = {"logit_bias": {EOS: 100.0}, "temperature": 0.0}
    text, reason = say(engine, tokenizer, Grammar("regex", "[a-c]{3,90}"), **bias)
    assert re.fullmatch("[a-c]{3,5}", text) and reason is FinishReason.STOP


def test_min_tokens_and_ignore_eos_hold_the_end_back(engine: Engine, tokenizer: Tokenizer) -> None:
    """As long as the grammar leaves anything else: it has the last word."""
    bias = {"logit_bias": {EOS: 100.0}, "temperature": 0.0, "max_tokens": 12}
    free = Grammar("regex", "[a-c]+")
    request = Request(0, prompt(5), SamplingParams(**bias, min_tokens=7), grammar=free)
    chunks = run(engine, [request])[0]
    assert len(chunks) == 8 and chunks[-1].token_id == EOS
    request = Request(0, prompt(5), SamplingParams(**bias, ignore_eos=True), grammar=free)
    chunks = run(engine, [request])[0]
    assert len(chunks) == 12 and chunks[-1].finish_reason is FinishReason.LENGTH
    assert EOS not in [chunk.token_id for chunk in chunks]
    for params in ({"min_tokens": 12}, {"ignore_eos": True}):
        text, reason = say(engine, tokenizer, Grammar("regex", "ab|cd"), **{**bias, **params})
        assert text in ("ab", "cd") and reason is FinishReason.STOP


def test_stop_ids_still_stop(engine: Engine, tokenizer: Tokenizer) -> None:
    comma = tokenizer.encode(",", add_special_tokens=False)[-1]
    grammar = Grammar("regex", "[a-c](,[a-c]){9}")
    text, reason = say(engine, tokenizer, grammar, stop_token_ids=(comma,), logit_bias={comma: 100.0})
    assert re.fullmatch("[a-c],", text) and reason is FinishReason.STOP
    text, reason = say(engine, tokenizer, Grammar("regex", "a,a,a"), stop_token_ids=(comma,), min_tokens=4)
    assert text == "a," and reason is FinishReason.STOP, "too early, but there is nothing else to say"


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    """The grammar takes ids away, it does not change how likely the model finds them."""
    params = SamplingParams(max_tokens=1, logprobs=20)
    free = run(engine, [Request(0, prompt(5), params)])[0][0].logprobs
    bound = run(engine, [Request(0, prompt(5), params, grammar=WORD)])[0][0].logprobs
    assert free is not None and bound is not None
    assert [i for i, _ in bound.top] == [i for i, _ in free.top]
    assert bound.logprob < free.logprob


def test_a_model_without_eos_ends_with_the_tokenizers(device: torch.device, tokenizer: Tokenizer) -> None:
    made = make_engine(device, with_changes(SPEC, eos_token_ids=()))
    assert tokenizer.eos_id is not None
    bias = {"logit_bias": {tokenizer.eos_id: 100.0}, "temperature": 0.0}
    text, reason = say(made, tokenizer, Grammar("regex", "[a-c]{3,90}"), **bias)
    assert re.match("[a-c]{3,5}", text) and reason is FinishReason.STOP


def test_a_cached_prompt_says_the_same(engine: Engine) -> None:
    request = Request(0, prompt(70), SamplingParams(**HOT, seed=4), grammar=JSON)
    first, second = run(engine, [request])[0], run(engine, [request])[0]
    assert second[0].cached_tokens > 0
    assert [c.token_id for c in first] == [c.token_id for c in second]


# ------------------------------------------------------------------------------------------------------- its neighbours


@pytest.mark.parametrize("order", ["in front", "behind"])
def test_others_say_what_they_say_alone(device: torch.device, tokenizer: Tokenizer, order: str) -> None:
    """Eight streams, three of them constrained: bit for bit, log-probabilities and greedy ones included."""
    made = make_engine(device, SPEC, batch_invariant=True, ops="jit" if device.type == "cuda" else "torch")
    kinds = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "logprobs": 3}, {"presence_penalty": 1.0},
             {"temperature": 1.2, "top_k": 9}]  # fmt: skip
    free = [Request(i, prompt(4 + i, i), SamplingParams(max_tokens=30, seed=i, **k)) for i, k in enumerate(kinds)]
    bound = [Request(9 + i, prompt(6, 9 + i), SamplingParams(**HOT, seed=i), grammar=JSON) for i in range(3)]
    alone = [answer(made, request.prompt_token_ids, request.params) for request in free]
    chunks = run(made, [*bound, *free] if order == "in front" else [*free, *bound])
    for request, expected in zip(free, alone, strict=True):
        assert bits(chunks[request.request_id]) == expected
    for request in bound:
        check_person(text_of(tokenizer, chunks[request.request_id]))


def test_loops_go_on_once_the_constrained_one_is_gone(engine: Engine) -> None:
    """A lone stream loops; beside a constrained one every step is the host's; then it loops again."""
    loops, chunks = engine.runner.loops, dict[int, list[TokenChunk]]()
    engine.submit(Request(0, prompt(4), SamplingParams(max_tokens=120, ignore_eos=True)))
    steps_until(engine, chunks, 0, 10)
    before = loops.launched
    assert before > 0
    engine.submit(Request(1, prompt(6), SamplingParams(**HOT, seed=3), grammar=JSON))
    steps_until(engine, chunks, 1, 1)
    during = loops.launched
    assert engine.constraints.active
    while not chunks[1][-1].finish_reason:
        assert loops.launched == during
        for chunk in engine.step():
            chunks.setdefault(chunk.request_id, []).append(chunk)
    left = 120 - len(chunks[0])
    assert left > 8, "the constrained one was to end first"
    finish(engine, chunks)
    assert loops.launched > during and len(chunks[0]) == 120


def test_a_lone_constrained_stream_does_not_loop(engine: Engine) -> None:
    engine.reset_counters()
    before = engine.runner.loops.launched
    run(engine, [Request(0, prompt(4), SamplingParams(**HOT, seed=1), grammar=JSON)])
    assert engine.runner.loops.launched == before
    assert decode_paths(engine).get(Path.LOOP, 0) == 0 and decode_paths(engine)[Path.EXACT] > 0


def test_nothing_runs_ahead_of_a_grammar(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one step of its is in flight, and none whose mask is still to come."""
    if engine.device.type == "cpu":  # where a launch is the step, nothing would run ahead anyway
        monkeypatch.setattr(engine.runner, "stream", object())
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(4), SamplingParams(max_tokens=60, ignore_eos=True)))
    engine.submit(Request(2, prompt(4), SamplingParams(max_tokens=60, ignore_eos=True)))
    steps_until(engine, chunks, 0, 3)
    assert len(engine._flights) > 0, "steps of unconstrained streams run ahead"
    engine.submit(Request(1, prompt(6), SamplingParams(**HOT, seed=3), grammar=JSON))
    steps_until(engine, chunks, 1, 1)
    while not chunks[1][-1].finish_reason:
        engine.launch()
        assert len(engine._flights) == 1
        for chunk in engine.step():
            chunks.setdefault(chunk.request_id, []).append(chunk)
    finish(engine, chunks)


def test_waiting_for_a_grammar_blocks_nobody(engine: Engine) -> None:
    """A constrained request that waits for a slot does not slow the others down."""
    for i in range(8):
        engine.submit(Request(i, prompt(4, i), SamplingParams(max_tokens=12, ignore_eos=True)))
    engine.submit(Request(8, prompt(4), SamplingParams(**HOT, seed=1), grammar=WORD))
    chunks: dict[int, list[TokenChunk]] = {}
    steps_until(engine, chunks, 0, 2)
    assert not engine.constraints.active
    finish(engine, chunks)
    assert 3 <= len(chunks[8]) <= 6


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_cancelled(engine: Engine, tokens: int) -> None:
    """Waiting, begun, and in the middle."""
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(5), SamplingParams(**HOT, seed=2), grammar=JSON))
    if tokens:
        steps_until(engine, chunks, 0, tokens)
    engine.cancel(0)
    assert not engine.constraints._held and not engine.constraints.active
    finish(engine, chunks)
    assert_nothing_left(engine)


def test_after_a_launch_that_failed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(5), SamplingParams(**HOT, seed=2), grammar=JSON))
    steps_until(engine, chunks, 0, 3)

    def fail(*_: object) -> None:
        raise MemoryError("out of everything")

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "launch", fail)
        with pytest.raises(MemoryError):
            engine.step()
    finish(engine, chunks)
    assert chunks[0][-1].finish_reason is FinishReason.CANCELLED
    check = run(engine, [Request(0, prompt(5), SamplingParams(**HOT, seed=2), grammar=WORD)])
    assert check[0][-1].finish_reason is FinishReason.STOP


# ------------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "no JSON": (Grammar("json_schema", "{"), "no JSON"),
    "no schema": (Grammar("json_schema", "5"), "must be an object"),
    "unknown type": (Grammar("json_schema", '{"type": "objekt"}'), "objekt"),
    "nothing fits": (Grammar("json_schema", "false"), "allows something"),
    "contradiction": (Grammar("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}'), "minLength"),
    "unsupported": (Grammar("json_schema", '{"not": {"const": 1}}'), "not"),
    "elsewhere": (Grammar("json_schema", '{"$ref": "http://example.com/x"}'), "example.com"),
    "surrogate": (Grammar("json_schema", '{"const": "\\ud800"}'), "does not compile"),
    "deep": (Grammar("json_schema", '{"items":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH), "deep"),
    "very deep": (Grammar("json_schema", "[" * 60000), "no JSON"),
    "large multiple": (Grammar("json_schema", '{"type": "integer", "multipleOf": 99991}'), "multipleOf"),
    "multiples": (Grammar("json_schema", '{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}'), "multipleOf"),
    "for ever": (Grammar("json_schema", '{"$ref": "#"}'), "does not compile"),
    "open group": (Grammar("regex", "(a"), "unclosed group"),
    "look-ahead": (Grammar("regex", "a(?=b)"), "look-ahead"),
    "deep group": (Grammar("regex", "(" * 30000 + "a" + ")" * 30000), "invalid regex"),
    "no grammar": (Grammar("lark", "nonsense"), "does not compile"),
    "unknown rule": (Grammar("lark", "start: thing"), "thing"),
    "schema inside": (Grammar("lark", 'start: %json {"type": "object"}'), "%json"),
    "lone surrogate": (Grammar("regex", "a\ud800"), "surrogate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_grammars(engine: Engine, name: str) -> None:
    """Refused twice in one sentence that says why, at once, and without a trace."""
    grammar, reason = REFUSED[name]
    for _ in range(2):
        with pytest.raises(RequestError) as refused:
            engine.submit(Request(0, prompt(5), SamplingParams(), grammar=grammar))
        message = str(refused.value)
        assert reason in message and "\n" not in message and len(message) < 700
    assert not engine.busy and not engine._sequences


@pytest.mark.parametrize(
    ("kind", "source"),
    [("xml", "a"), ("json_object", "{}"), ("regex", ""), ("lark", 5), ("regex", "a" * (MAX_GRAMMAR_BYTES + 1)),
     ("regex", "é" * (MAX_GRAMMAR_BYTES // 2 + 1))],
)  # fmt: skip
def test_no_grammar_at_all(kind: str, source: Any) -> None:
    with pytest.raises(RequestError):
        Grammar(kind, source)
    with pytest.raises(RequestError):
        Request(0, (1,), SamplingParams(), grammar=(kind, source))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rules", "terminals", "references", "lists"])
def test_the_longest_chains_compile(engine: Engine, tokenizer: Tokenizer, name: str) -> None:
    """Thousands deep, as 64 KiB allow: a usual thread's stack would not hold the compiler's calls, and the process with
    it would be gone."""
    letters = [a + b + c for a in "abcdefghijkl" for b in "abcdefghijklmnopqrstuvwxyz" for c in "bcdefghijklmnopqrstu"]
    count = {"rules": 6000, "terminals": 6000, "references": 2000, "lists": 1500}[name]
    links = list(itertools.pairwise(letters[: count + 1]))
    if name in ("rules", "terminals"):
        source = "start:abb\n" + "".join(f"{a}:{b}\n" for a, b in links) + f'{letters[count]}:"q"'
        source = source if name == "rules" else source.upper().replace("START", "start").replace('"Q"', '"q"')
        grammar = Grammar("lark", source)
    else:
        form = '"%s":{"$ref":"#/$defs/%s"}' if name == "references" else '"%s":{"items":{"$ref":"#/$defs/%s"}}'
        links_of = ",".join(form % link for link in links)
        last = f'"{letters[count]}":{{"const":7}}'
        grammar = Grammar("json_schema", f'{{"$ref":"#/$defs/abb","$defs":{{{links_of},{last}}}}}')
    try:
        text, _ = say(engine, tokenizer, grammar, max_tokens=3)
    except RequestError:
        return  # refused is as good
    assert text and (name == "lists" or text in ("q", "7"))


@given(st.text(max_size=60), st.sampled_from(["json_schema", "regex", "lark"]))
def test_any_text_is_compiled_or_refused(source: str, kind: str) -> None:
    compiler = _shared_compiler()
    try:
        grammar = Grammar(kind, source)
        compiled = compiler.start(grammar).result()
    except RequestError as error:
        assert str(error)
    else:
        assert any(compiled.first_mask)


_SCHEMAS = st.recursive(
    st.sampled_from(["string", "integer", "number", "boolean", "null"]).map(lambda t: {"type": t})
    | st.fixed_dictionaries({"enum": st.lists(st.integers(-9, 9) | st.text("ab", max_size=2), min_size=1, max_size=3)}),
    lambda inner: (
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 3)})
        | st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(st.text("ab", min_size=1), inner, max_size=3)}
        )
    ),
    max_leaves=6,
)


@given(_SCHEMAS)
def test_sensible_schemas_compile(schema: dict[str, Any]) -> None:
    assert any(_shared_compiler().start(Grammar("json_schema", json.dumps(schema))).result().first_mask)


_COMPILERS: list[GrammarCompiler] = []


def _shared_compiler() -> GrammarCompiler:
    if not _COMPILERS:
        _COMPILERS.append(GrammarCompiler(lambda: find_tokenizer(None), SPEC.vocab_size, (EOS,)))
    return _COMPILERS[0]


# --------------------------------------------------------------------------------------------- the compiler's own books


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(lambda: find_tokenizer(None), SPEC.vocab_size, (EOS,))
    yield made
    made.close()
    if made._thread is not None:
        made._thread.join(30)
        assert not made._thread.is_alive()


def count_compilations(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> list[Grammar]:
    done: list[Grammar] = []
    compile_one = compiler._compile

    def counted(grammar: Grammar) -> Any:
        done.append(grammar)
        return compile_one(grammar)

    monkeypatch.setattr(compiler, "_compile", counted)
    return done


def test_a_grammar_is_compiled_once_and_few_are_kept(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = count_compilations(compiler, monkeypatch)
    many = [Grammar("regex", f"a{{{n}}}") for n in range(1, KEPT_GRAMMARS + 1)]
    for grammar in [*many, *many]:
        compiler.start(grammar).result()
    assert done == many
    compiler.start(many[0])  # used again, so the second is now the oldest
    compiler.start(Grammar("regex", "new")).result()
    assert len(compiler._kept) == KEPT_GRAMMARS
    compiler.start(many[0]).result()
    compiler.start(many[1]).result()
    assert done[len(many) :] == [Grammar("regex", "new"), many[1]]


def test_a_worn_grammar_is_compiled_anew(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    done = count_compilations(compiler, monkeypatch)
    first = compiler.start(WORD).result()
    first.tokens = grammars.WORN_TOKENS
    assert compiler.start(WORD).result() is not first and len(done) == 2


def test_a_grammar_that_takes_too_long(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request is refused in time; those behind it get their turn, and itself a second chance."""
    monkeypatch.setattr(grammars, "COMPILE_LIMIT_S", 0.2)
    held, compile_one = threading.Event(), compiler._compile

    def slow(grammar: Grammar) -> Any:
        if grammar == WORD:
            held.wait(30)
        return compile_one(grammar)

    monkeypatch.setattr(compiler, "_compile", slow)
    told = threading.Event()
    slow_one, behind = compiler.start(WORD, told.set), compiler.start(JSON)
    assert not slow_one.done
    for late in (slow_one, behind):
        with pytest.raises(RequestError, match=r"within 0\.2 s"):
            late.result()
        assert late.done
    monkeypatch.setattr(grammars, "COMPILE_LIMIT_S", 30.0)
    held.set()
    assert told.wait(30)
    assert compiler.start(WORD).result().first_mask, "it was compiled all the same"
    deadline = time.monotonic() + 30
    while not behind.stale and time.monotonic() < deadline:
        time.sleep(1e-3)
    assert compiler.start(JSON).result().first_mask


def test_a_panic_in_the_library_is_a_refusal(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def panic(_: str) -> str:
        raise Panic("index out of bounds")

    with monkeypatch.context() as patched:
        patched.setattr(grammars, "_checked", panic)
        with pytest.raises(RequestError, match="index out of bounds"):
            compiler.start(WORD).result()
    assert compiler.start(JSON).result().first_mask


def test_no_thread_to_be_had(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    usual = threading.stack_size()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RequestError, match="try again later"):
            compiler.start(WORD)
    assert threading.stack_size() == usual, "other threads keep the stack they had"
    assert compiler.start(WORD).result().first_mask
    assert threading.stack_size() == usual


def test_without_the_library(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'jitgraph\[serve\]'"):
        compiler.start(WORD).result()


def test_without_a_tokenizer() -> None:
    for tokenizer, vocabulary, words in ((None, 2048, "has none"), (find_tokenizer(None), 509, "does not serve")):
        compiler = GrammarCompiler(lambda found=tokenizer: found, vocabulary, (EOS,))
        with pytest.raises(RequestError, match=words):
            compiler.start(WORD).result()
        with pytest.raises(RequestError, match=words):
            compiler.load()
        compiler.close()


def test_a_grammar_that_cannot_be_followed_to_its_end(
    device: torch.device, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the library's limits in the middle of an output: that request fails and says so, its neighbour goes on, and
    the next one with the same grammar is as good as the first."""
    usual, made = llguidance.LLParserLimits, make_engine(device, SPEC)
    monkeypatch.setattr(llguidance, "LLParserLimits", lambda **limits: usual(**{**limits, "max_lexer_states": 150}))
    long = Grammar("json_schema", '{"type": "string", "minLength": 150, "maxLength": 300}')
    for turn in range(2):
        bound = Request(0, prompt(5), SamplingParams(**HOT, seed=2), grammar=long)
        free = Request(1, prompt(5), SamplingParams(max_tokens=60, ignore_eos=True))
        chunks = run(made, [bound, free])
        assert chunks[0][-1].finish_reason is FinishReason.FAILED and len(chunks[0]) > 1
        assert len(chunks[1]) == 60 and chunks[1][-1].finish_reason is FinishReason.LENGTH
        assert made.constraints.failures == turn + 1
    monkeypatch.setattr(llguidance, "LLParserLimits", usual)
    chunks = run(made, [Request(0, prompt(5), SamplingParams(**HOT, seed=2), grammar=long)])
    assert chunks[0][-1].finish_reason is not FinishReason.FAILED


# ------------------------------------------------------------------------------------------------------ kernels and LLM


def letters() -> Tokenizer:
    """One entry for each of some bytes, and EOS: a vocabulary that the interpreter gets through."""
    vocabulary = {c: i for i, c in enumerate(["<eos>", *'{}":,-ab0123456789 '.replace(" ", "Ġ")])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, {"eos_token": "<eos>"}, {}, "letters")


@pytest.mark.parametrize("settings", [{}, {"fused_sampling": False}], ids=str)
def test_on_kernels(device: torch.device, settings: dict[str, Any]) -> None:
    """The whole engine on its Triton kernels: the tokens of plain PyTorch, and a neighbour without a grammar."""
    spec = with_changes(vocab_size=43, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1,
                        eos_token_ids=(0,))  # fmt: skip
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}}
    grammar = Grammar("json_schema", json.dumps({**schema, "required": ["a"], "additionalProperties": False}))
    small = {"max_model_len": 64, "max_streams": 2, "prefill_buckets": (4,), "dtype": "float32"}
    found = []
    for ops in ("torch", "jit"):
        plain = {"fused_sampling": False} if ops == "torch" and device.type == "cuda" else settings
        made = make_engine(device, spec, ops=ops, **{**small, **plain})
        made.constraints.compiler = GrammarCompiler(letters, 43, (0,))
        bias = {19: -100.0}  # no blanks, or it takes long
        bound = SamplingParams(max_tokens=40, temperature=1.0, seed=3, top_p=0.95, logit_bias=bias)
        requests = [
            Request(0, prompt(3, vocabulary=43), bound, grammar=grammar),
            Request(1, prompt(3, vocabulary=43), SamplingParams(max_tokens=4, temperature=1.0, seed=5)),
        ]
        chunks = run(made, requests)
        assert set(json.loads(text_of(letters(), chunks[0]))) == {"a"}
        found.append([[chunk.token_id for chunk in chunks[i]] for i in range(2)])
    assert found[0] == found[1]


def test_llm() -> None:
    """``generate`` and ``stream``, with text; an engine that is idle and armed, too."""
    with LLM("tiny", device="cpu", max_model_len=256) as llm:
        params = SamplingParams(**HOT, seed=5)
        for output in llm.generate(["One person:", "Another:"], params, grammar=JSON):
            check_person(output.text)
            assert output.finish_reason is FinishReason.STOP
        assert llm.settle()
        with llm.stream("A person:", params, grammar=JSON) as stream:
            text = "".join(chunk.text for chunk in stream)
        check_person(text)
        assert llm.generate("A person:", params, grammar=JSON)[0].text == text
        with pytest.raises(RequestError):
            llm.stream("A person:", params, grammar=Grammar("regex", "("))
        assert llm.generate("A person:", SamplingParams(max_tokens=3))[0].finish_reason is FinishReason.LENGTH
