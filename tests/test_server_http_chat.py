"""Chat templates within limits, and tools: shown to the template, called, parsed, forced."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import time
from typing import Any

import pytest
from server_fakes import (
    EOS,
    TOKENIZER,
    FakeEngine,
    Reply,
    Site,
    ask,
    chat,
    complete,
    ids_of,
    make_site,
    run,
    served,
    wait_until,
)

from jitgraph.server.bounded import TookTooLong, Workers
from jitgraph.server.texts import Texts, TextSource
from jitgraph.text.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------------ templates

LOOP = "{% for a in range(99999) %}"
RUNAWAY = LOOP * 3 + "{% endfor %}" * 3


def text_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jitgraph-text"]


def test_a_runaway_template_is_ended_and_blocks_nobody() -> None:
    site = make_site(chat_template=RUNAWAY, render_timeout_s=0.3)
    before = len(text_threads())

    async def work() -> tuple[Any, int]:
        from server_fakes import call

        document = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
        headers = [("content-type", "application/json")]
        slow = asyncio.ensure_future(call(site.app, "POST", "/v1/chat/completions", document, headers))
        turns = 0
        while not slow.done():
            await asyncio.sleep(0.005)
            turns += 1
        return await slow, turns

    reply, turns = run(work())
    assert reply.status == 400 and "0.3 s" in reply.error["message"] and reply.error["param"] == "messages"
    assert turns > 3  # the loop went on turning meanwhile
    wait_until(lambda: len(text_threads()) <= before)  # and the threads have ended, not only been forgotten
    assert complete(site).status == 200


def test_bounded_calls() -> None:
    def swallow() -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.001)

    def fail() -> None:
        raise ValueError("x")

    async def work() -> None:
        workers = Workers()
        assert await workers.run(lambda: 5, 1.0) == 5
        first = await workers.run(threading.get_ident, 1.0)
        with pytest.raises(ValueError, match="x"):
            await workers.run(fail, 1.0)
        assert await workers.run(threading.get_ident, 1.0) == first  # threads are kept
        with pytest.raises(TookTooLong):
            await workers.run(swallow, 0.05)
        assert await workers.run(lambda: 6, 1.0) == 6
        task = asyncio.ensure_future(workers.run(swallow, 60.0))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = len(text_threads())
    run(work())
    gc.collect()
    wait_until(lambda: len(text_threads()) <= before)  # the ended, and those that nobody can give work any more


@pytest.mark.parametrize(
    ("template", "status"),
    [
        ("{{ messages.__class__.__mro__ }}", 500),
        ("{{ ''.__class__.__base__.__subclasses__() }}", 500),
        ("{% set x = messages.append(1) %}", 500),
        ("{{ 'x' * 10**9 }}", 500),
        ("{{ raise_exception('no') }}", 400),
        ("{{ nothing.at.all }}", 400),
        ("{% for", 500),
        ("{% include '/etc/passwd' %}", 400),
        ("", 400),
    ],
)
def test_hostile_and_broken_templates(template: str, status: int) -> None:
    site = make_site(chat_template=template)
    reply = chat(site)
    assert reply.status == status, reply.body
    if status != 200:
        assert reply.error["param"] == "messages"
    assert complete(site).status == 200


def test_a_template_never_comes_from_a_request() -> None:
    site = make_site()
    assert chat(site, chat_template="{{ 1 }}").error["param"] == "chat_template"
    for name in ("chat_template", "messages", "tools", "add_generation_prompt", "tokenize"):
        assert chat(site, chat_template_kwargs={name: "{{ 1 }}"}).error["code"] == "unsupported"
    text = "{{ 7 * 7 }}{% for x in range(9) %}"
    chat(site, text)
    assert text in TOKENIZER.decode(site.engine.asked[-1].ids)


def test_long_texts_become_the_same_ids_within_their_time() -> None:
    site = make_site(FakeEngine(max_model_len=None), inline_chars=10, max_body_bytes=2**24)
    text = "the quick brown fox " * 2_000
    assert complete(site, prompt=text).status == 200
    assert site.engine.asked[-1].ids == tuple(TOKENIZER.encode(text))
    assert chat(site, text).status == 200
    assert TOKENIZER.decode(site.engine.asked[-1].ids).count("fox") == 2_000
    slow = make_site(inline_chars=10, tokenize_timeout_s=1e-6)
    assert complete(slow, prompt=text).error["param"] == "prompt"


def test_the_tokenizer_is_loaded_once_and_before_the_first_request() -> None:
    loads = []

    def load(facts: Any) -> Any:
        loads.append(facts.folder)
        return TOKENIZER

    site = make_site()
    source = TextSource(site.settings, load)

    async def work() -> list[Texts]:
        return await asyncio.gather(*(source.of(site.engine.facts) for _ in range(5)))

    assert len({id(texts) for texts in run(work())}) == 1
    assert loads == [None]
    with served(load=load):
        wait_until(lambda: len(loads) == 2)  # without any request


# ---------------------------------------------------------------------------------------------------------------- tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TEMPLATE = """{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}
{% for message in messages %}{{ message.role }}:{{ message.content }}
{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.city }})
{% endfor %}{% endfor %}"""
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def tooled() -> Site:
    return make_site(FakeEngine(max_model_len=8192), chat_template=TEMPLATE)


def says(site: Site, text: str, *, ended: bool = True) -> None:
    """What the model writes."""
    site.engine.answer = lambda asked: [*ids_of(text), *([EOS] if ended else [])]


def message_of(reply: Reply) -> Any:
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["message"]


def calls_of(chunks: list[Any]) -> list[tuple[str, str]]:
    """Name and arguments of the calls of a stream, put together as clients do it."""
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for part in chunk["choices"][0]["delta"].get("tool_calls", []):
            function = part["function"]
            if "id" in part:
                assert part["type"] == "function" and part["index"] not in calls
                calls[part["index"]] = {"name": function["name"], "arguments": ""}
            calls[part["index"]]["arguments"] += function.get("arguments") or ""
    return [(call["name"], call["arguments"]) for _, call in sorted(calls.items())]


def test_tools_are_shown_to_the_template_and_calls_are_parsed(tooled: Site) -> None:
    says(tooled, CALL)
    reply = chat(tooled, tools=[WEATHER, CLOCK])
    prompt = TOKENIZER.decode(tooled.engine.asked[-1].ids)
    assert '"name": "weather"' in prompt and '"name": "clock"' in prompt
    message = message_of(reply)
    assert message["content"] is None
    [call] = message["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert reply.json["choices"][0]["finish_reason"] == "tool_calls"
    chunks = chat(tooled, tools=[WEATHER], stream=True).chunks
    [(name, arguments)] = calls_of(chunks)
    assert (name, json.loads(arguments)) == ("weather", {"city": "Rome"})
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert "tool_call>" not in "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_a_whole_turn_with_a_tool_by_the_real_client() -> None:
    with served(FakeEngine(max_model_len=8192), chat_template=TEMPLATE) as running:
        says(running.site, CALL)
        client = running.openai()
        messages: list[Any] = [{"role": "user", "content": "How is it in Rome?"}]
        first = client.chat.completions.create(model="org/fake-model", messages=messages, tools=[WEATHER])
        [call] = first.choices[0].message.tool_calls
        messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        says(running.site, "It is sunny.")
        second = client.chat.completions.create(model="org/fake-model", messages=messages, tools=[WEATHER])
        assert second.choices[0].message.content == "It is sunny."
        assert second.choices[0].finish_reason == "stop"
        prompt = TOKENIZER.decode(running.site.engine.asked[-1].ids)
        assert "weather(Rome)" in prompt and "tool:sunny" in prompt  # arguments came to the template as an object


def test_text_without_a_call_stays_text(tooled: Site) -> None:
    for text in ("Just words.", "a < b and <tool", '{"name": "weather"}', "<tool_call> no call"):
        says(tooled, text)
        reply = chat(tooled, tools=[WEATHER])
        assert message_of(reply)["content"] == text
        assert reply.json["choices"][0]["finish_reason"] == "stop"
        assert "tool_calls" not in message_of(reply)


def test_several_calls_or_only_one(tooled: Site) -> None:
    says(tooled, f"Well. {CALL}\n{CALL}")
    assert len(message_of(chat(tooled, tools=[WEATHER]))["tool_calls"]) == 2
    for fields in ({}, {"stream": True}):
        reply = chat(tooled, tools=[WEATHER], parallel_tool_calls=False, **fields)
        calls = calls_of(reply.chunks) if fields else message_of(reply)["tool_calls"]
        assert len(calls) == 1
    assert message_of(chat(tooled, tools=[WEATHER], parallel_tool_calls=False))["content"] == "Well. "


def test_a_call_that_was_cut_off_ends_with_length(tooled: Site) -> None:
    says(tooled, CALL[:45], ended=False)
    assert chat(tooled, tools=[WEATHER]).json["choices"][0]["finish_reason"] == "length"


def test_tool_choice_none_shows_and_parses_nothing(tooled: Site) -> None:
    says(tooled, CALL)
    message = message_of(chat(tooled, tools=[WEATHER], tool_choice="none"))
    assert message["content"] == CALL and "tool_calls" not in message
    assert "weather" not in TOKENIZER.decode(tooled.engine.asked[-1].ids)


def test_forced_calls_are_shaped_by_a_grammar(tooled: Site) -> None:
    says(tooled, '{"name": "weather", "arguments": {"city": "Rome"}}')
    named = {"type": "function", "function": {"name": "weather"}}
    for fields in ({}, {"stream": True}):
        reply = chat(tooled, tools=[WEATHER, CLOCK], tool_choice=named, **fields)
        grammar = tooled.engine.asked[-1].grammar
        assert grammar is not None and grammar.kind == "json_schema"
        assert "clock" not in grammar.source and '"city"' in grammar.source
        if fields:
            [(name, arguments)] = calls_of(reply.chunks)
            assert (
                reply.chunks[-1]["choices"][0]["finish_reason"] == "stop"
            )  # as OpenAI ends a call it was told to make
        else:
            function = message_of(reply)["tool_calls"][0]["function"]
            name, arguments = function["name"], function["arguments"]
        assert (name, json.loads(arguments)) == ("weather", {"city": "Rome"})
    says(tooled, '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "clock", "arguments": {}}]')
    reply = chat(tooled, tools=[WEATHER, CLOCK], tool_choice="required")
    schema = json.loads(tooled.engine.asked[-1].grammar.source)  # type: ignore[union-attr]
    assert schema["type"] == "array" and "clock" in json.dumps(schema)
    assert [call["function"]["name"] for call in message_of(reply)["tool_calls"]] == ["weather", "clock"]
    assert reply.json["choices"][0]["finish_reason"] == "tool_calls"


def refused(site: Site, param: str, **fields: Any) -> dict[str, Any]:
    reply = chat(site, **fields)
    assert (reply.status, reply.error["param"]) == (400, param), reply.body
    return reply.error


def test_tools_that_are_refused(tooled: Site) -> None:
    def of(**function: Any) -> list[Any]:
        return [{"type": "function", "function": function}]

    refused(tooled, "tools", tools=[WEATHER] * 129)
    refused(tooled, "tools[1].function.name", tools=[WEATHER, WEATHER])
    refused(tooled, "tools[0].function.name", tools=of(name="a b"))
    refused(tooled, "tools[0].function.name", tools=of(name=""))
    refused(tooled, "tools[0].function.name", tools=of(description="x"))
    refused(tooled, "tools[0].type", tools=[{"type": "retrieval", "function": {"name": "x"}}])
    refused(tooled, "tools[0].function.parameters", tools=of(name="x", parameters=[1]))
    refused(tooled, "tools[0].function.parameters", tools=of(name="x", parameters={"d": "x" * 70_000}))
    deep: Any = {}
    for _ in range(50):
        deep = {"properties": {"a": deep}}
    refused(tooled, "tools[0].function.parameters", tools=of(name="x", parameters=deep))
    refused(tooled, "tool_choice", tools=[WEATHER], tool_choice="sometimes")
    refused(tooled, "tool_choice", tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "nothing"}})
    refused(tooled, "tool_choice", tool_choice="required")
    both = {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}
    refused(tooled, "tool_choice", **both)
    odd = {"type": "object", "$defs": 5, "definitions": ["x"], "$ref": "#/nowhere"}
    assert (
        chat(tooled, tools=of(name="x", parameters=odd), tool_choice="required").status == 200
    )  # the engine's to judge
    assert len(tooled.engine.asked) == 1


def test_a_template_of_its_own_for_tools() -> None:
    templates = {"default": "{% for m in messages %}{{ m.content }}{% endfor %}", "tool_use": TEMPLATE}
    tokenizer = Tokenizer(TOKENIZER._backend, TOKENIZER.special_tokens, templates, "somewhere/tokenizer.json")
    site = make_site(FakeEngine(max_model_len=8192), tokenizer=tokenizer)
    says(site, CALL)
    assert message_of(chat(site, tools=[WEATHER]))["tool_calls"][0]["function"]["name"] == "weather"
    assert '"name": "weather"' in TOKENIZER.decode(site.engine.asked[-1].ids)
    assert message_of(chat(site))["content"] == CALL


def test_models_whose_template_knows_no_tools(tooled: Site) -> None:
    assert refused(make_site(), "tools", tools=[WEATHER])["code"] == "unsupported"
    unknown = make_site(
        chat_template="{{ tools | tojson }}{{ messages[0].content }}", engine=FakeEngine(max_model_len=4096)
    )
    assert "not known" in refused(unknown, "tools", tools=[WEATHER])["message"]
    says(unknown, '{"name": "weather", "arguments": {"city": "Rome"}}')
    forced = chat(unknown, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    assert message_of(forced)["tool_calls"][0]["function"]["name"] == "weather"
    assert chat(make_site(), tools=[]).status == 200
    says(tooled, "x")
    assert (
        ask(tooled, "/tokenize", {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER]}).json["count"]
        > 30
    )
