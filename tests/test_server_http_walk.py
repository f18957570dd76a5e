"""What real clients rely on and nothing else tests: by the real ``openai`` package, and over plain connections."""

from __future__ import annotations

import base64
import json
from typing import Any

import openai
import pytest
from server_fakes import (
    EOS,
    MODEL,
    TOKENIZER,
    FakeEngine,
    Reply,
    Served,
    ask,
    call,
    chat,
    complete,
    http_bytes,
    ids_of,
    make_site,
    read_all,
    run,
    served,
)

from jitgraph.errors import ConfigError
from jitgraph.server.client_errors import RequestRefused
from jitgraph.server.settings import ServerSettings

TEXT = "Hello there, friend!"
CHAT = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
GOOD = {"messages": HELLO}
TEMPLATE = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<tool_call> arguments{{ messages[0].content }}"
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CLOSE = "Connection: close"


@pytest.fixture(scope="module")
def site() -> Any:
    with served(FakeEngine(max_model_len=4096), chat_template=None) as found:
        yield found


@pytest.fixture(scope="module")
def tooled() -> Any:
    with served(FakeEngine(max_model_len=4096), chat_template=TEMPLATE) as found:
        yield found


def says(of: Served, *texts: str) -> None:
    """What the model writes from now on, a text for each answer."""
    left = list(texts)
    of.site.engine.answer = lambda asked: [*ids_of(left.pop(0) if len(left) > 1 else left[0]), EOS]


# ------------------------------------------------------------------------------------------------------ the real client


def test_several_answers_in_one_stream(site: Served) -> None:
    says(site, "one", "two words", "three more words")
    stream = site.openai().chat.completions.create(
        model=MODEL, messages=HELLO, n=3, seed=5, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, usage = ["", "", ""], {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == ["one", "two words", "three more words"]
    assert reasons == dict.fromkeys(range(3), "stop")
    assert usage is not None
    assert usage.completion_tokens == sum(len(ids_of(text)) + 1 for text in texts)
    seeds = [asked.params.seed for asked in site.site.engine.asked[-3:]]
    assert seeds[0] == 5 and len(set(seeds)) == 3


def test_usage_with_every_chunk(site: Served) -> None:
    says(site, TEXT)
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    for create, fields in (
        (site.openai().chat.completions.create, {"messages": HELLO}),
        (site.openai().completions.create, {"prompt": "Once", "max_tokens": 64}),
    ):
        chunks = list(create(model=MODEL, stream=True, stream_options=options, **fields))
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts) and counts[0] >= 1
        assert counts[-1] == counts[-2] == len(ids_of(TEXT)) + 1
        assert len(set(counts)) > 3  # it counts as it goes
        prompt = len(site.site.engine.asked[-1].ids)
        assert {chunk.usage.prompt_tokens for chunk in chunks} == {prompt}
        assert all(chunk.usage.total_tokens == prompt + chunk.usage.completion_tokens for chunk in chunks)
        assert chunks[-1].choices == []
    reply = chat(site.site, stream=True, n=2, stream_options=options).chunks
    assert (
        reply[-1]["usage"]["completion_tokens"] == 2 * reply[-2]["usage"]["completion_tokens"]
    )  # an answer's, then all
    with pytest.raises(openai.BadRequestError) as caught:
        site.openai().chat.completions.create(
            model=MODEL,
            messages=HELLO,
            stream=True,
            stream_options={"continuous_usage_stats": True},  # type: ignore
        )
    assert caught.value.param == "stream_options.continuous_usage_stats"


def test_a_prompt_is_scored(site: Served) -> None:
    found = site.openai().completions.create(model=MODEL, prompt="Once", echo=True, logprobs=2, max_tokens=0)
    [choice] = found.choices
    assert choice.text == "Once" and choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["<|begin|>", "O", "n", "ce"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 0, 1, 2]
    assert found.usage is not None and found.usage.completion_tokens == 0
    chunks = list(
        site.openai().completions.create(model=MODEL, prompt="Once", echo=True, logprobs=2, max_tokens=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Once"
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == choice.logprobs.tokens


def test_log_probabilities_of_a_stream(site: Served) -> None:
    says(site, TEXT)
    chunks = site.openai().chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3, stream=True, stop=["friend"]
    )
    tokens, text = [], ""
    for chunk in chunks:
        [choice] = chunk.choices
        text += choice.delta.content or ""
        tokens += (choice.logprobs.content or []) if choice.logprobs else []
    assert text == "Hello there, "
    assert "".join(one.token for one in tokens).startswith("Hello there, ")
    assert all(len(one.top_logprobs) == 3 and one.bytes is not None for one in tokens)


def test_fields_beyond_openais_own(site: Served) -> None:
    says(site, TEXT)
    comma = ids_of(",")
    client = site.openai()
    reply = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stop=["there", "re,"],
        extra_body={"include_stop_str_in_output": True, "stop_token_ids": comma, "min_tokens": 1, "top_k": 5},
    )
    assert reply.choices[0].message.content == "Hello there"
    params = site.site.engine.asked[-1].params
    assert (params.stop_token_ids, params.min_tokens, params.top_k) == (tuple(comma), 1, 5)
    client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"structured_outputs": {"choice": ["yes", 'n"o', "\n"]}}
    )
    grammar = site.site.engine.asked[-1].grammar
    assert grammar is not None
    assert (grammar.kind, grammar.source) == ("regex", 'yes|n"o|\n')
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"beam_width": 3})
    assert (caught.value.param, caught.value.code) == ("beam_width", "unknown_parameter")


@pytest.mark.parametrize("choices", [[], [""], ["a", ""], ["x" * 70_000], "a", [1]])
def test_choices_that_are_refused(choices: Any) -> None:
    error = chat(make_site(), structured_outputs={"choice": choices}).error
    assert error["param"].startswith("structured_outputs.choice")


def test_the_choices_make_a_grammar_that_is_one() -> None:
    """As the engine's own compiler reads it, whatever characters stand in the texts."""
    from jitgraph.engine.grammar import GrammarCompiler
    from jitgraph.types import Grammar

    site = make_site()
    texts = [
        "yes",
        'n"o',
        "a\\b",
        "tab\there",
        "línea 🙂",
        "/x/",
        "$d",
        "\u2028",
        "\x7f\x01",
        "<a>",
        "^(.*)[a-z]+{2}?|x&y~z#-",
        "\n",
    ]
    assert chat(site, structured_outputs={"choice": texts}).status == 200
    wire = site.engine.asked[-1].grammar
    assert wire is not None
    compiler = GrammarCompiler(lambda: TOKENIZER, 2048, (EOS,))
    compiled = compiler.start(Grammar(wire.kind, wire.source)).result()
    for text in texts:
        matcher = compiled.matcher.deep_copy()
        for token in ids_of(text):
            matcher.consume_token(token)
            assert not matcher.is_error(), (text, matcher.get_error())
        assert matcher.is_accepting() or matcher.is_stopped(), text


def test_calls_of_tools_come_in_parts(tooled: Served) -> None:
    two = [json.dumps({"name": "weather", "arguments": {"city": city}}) for city in ("Rome", "Oslo")]
    says(tooled, "Let me see. " + "".join(f"<tool_call>\n{one}\n</tool_call>" for one in two))
    client = tooled.openai()
    with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert [json.loads(one.function.arguments) for one in message.tool_calls or []] == [
        {"city": "Rome"},
        {"city": "Oslo"},
    ]
    assert len({one.id for one in message.tool_calls or []}) == 2
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], stream=True))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [part.index for part in parts if part.id] == [0, 1]  # opened once each
    assert all(part.function and not part.function.name for part in parts if not part.id)
    one = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls or []) == 1


def test_calls_that_are_forced(tooled: Served) -> None:
    client, named = tooled.openai(), {"type": "function", "function": {"name": "weather"}}
    says(tooled, '[{"name": "weather", "arguments": {"city": "Rome"}}]')
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="required")
    assert reply.choices[0].finish_reason == "tool_calls"
    says(tooled, '{"name": "weather", "arguments": {"city": "Rome"}}')
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice=named)  # type: ignore
    [made] = reply.choices[0].message.tool_calls or []
    assert json.loads(made.function.arguments) == {"city": "Rome"}  # type: ignore[union-attr]
    assert tooled.site.engine.asked[-1].grammar is not None
    says(tooled, "Plain.")
    for choice in ("none", "auto"):
        reply = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice=choice)  # type: ignore
        assert (reply.choices[0].message.content, reply.choices[0].message.tool_calls) == ("Plain.", None)
        assert tooled.site.engine.asked[-1].grammar is None


# ------------------------------------------------------------------------------------------------------------ deadlines


def test_an_answer_may_have_a_time_limit() -> None:
    site = make_site(request_timeout_s=12.5)
    assert chat(site, n=2).status == 200
    assert [asked.timeout_s for asked in site.engine.asked] == [12.5, 12.5]
    site.engine.refuse = RequestRefused("deadline", "this request was not done within the 12.5 s", 0.0)
    for reply in (chat(site), complete(site, stream=True)):
        assert (reply.status, reply.error["code"], reply.error["type"]) == (422, "deadline_exceeded", "timeout_error")
    plain = make_site()
    chat(plain)
    assert plain.engine.asked[0].timeout_s == 0.0
    for wrong in (0.0, -1.0, 1e9):
        with pytest.raises(ConfigError):
            ServerSettings(request_timeout_s=wrong)


# ---------------------------------------------------------------------------------------------------- plain connections


def raw(site: Served, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the last answer on a connection that the server then closes."""
    with site.connect() as connection:
        connection.sendall(data)
        head, _, body = read_all(connection).rpartition(b"\r\n\r\n")
    first, *lines = head[head.rindex(b"HTTP/1.1") :].decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, body


def test_heads_without_bodies(site: Served) -> None:
    for path in ("/v1/models", "/health", "/version", "/openapi.json"):
        status, headers, body = raw(site, http_bytes(path, b"", CLOSE, method="HEAD"))
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) > 10
    for method in ("OPTIONS", "GET", "DELETE"):
        with site.connect() as connection:
            connection.sendall(http_bytes(CHAT, b"", CLOSE, method=method))
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 405 ")
        assert b"\r\nallow: POST\r\n" in answer
        assert sorted(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == ["code", "message", "param", "type"]


def test_bodies_in_parts_and_on_request(site: Served) -> None:
    says(site, TEXT)
    body = json.dumps(GOOD).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{CLOSE}\r\n".encode()
    parts = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:30], body[30:])) + b"0\r\n\r\n"
    with site.connect() as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + parts)
        assert json.loads(read_all(connection).partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == TEXT
    with site.connect() as connection:
        connection.sendall(head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(64).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.sendall(body)
        assert b'"content":"Hello there, friend!"' in read_all(connection)


def test_a_connection_lives_on_after_an_error_and_a_stream(site: Served) -> None:
    says(site, "ok")
    wrong, stream = {**GOOD, "temperature": -1}, {**GOOD, "stream": True}
    with site.connect() as connection:
        for document, last, status in (
            (wrong, b"}}", b" 400 "),
            (stream, b"0\r\n\r\n", b" 200 "),
            (GOOD, b"}}", b" 200 "),
        ):
            connection.sendall(http_bytes(CHAT, document))
            answer = b""
            while not answer.endswith(last):
                part = connection.recv(65536)
                assert part, "the connection was closed"
                answer += part
            assert status in answer.partition(b"\r\n")[0]


def test_the_key_as_a_browser_sends_it() -> None:
    word = base64.b64encode(b"me:secret").decode()
    with served(api_keys=("secret",)) as site:
        for header, status in ((f"Authorization: Basic {word}", 200), (f"authorization: BASIC  {word}", 200),
                               ("Authorization: Bearer secret", 200), ("Authorization: Basic bWU6c2VjcmU=", 401),
                               ("X-Nothing: 1", 401)):  # fmt: skip
            found, headers, body = raw(site, http_bytes(CHAT, GOOD, header, CLOSE))
            assert found == status, (header, body)
            assert ("www-authenticate" in headers) == (status == 401)
        cross = (f"Authorization: Basic {word}", "Sec-Fetch-Site: cross-site", CLOSE)
        status, _, body = raw(site, http_bytes(CHAT, GOOD, *cross))
        assert (status, json.loads(body)["error"]["code"]) == (403, "cross_site")


# -------------------------------------------------------------------------------------------------------- other origins

ORIGIN = "https://app.example"


def preflight(of: Any, origin: str = ORIGIN, **more: str) -> Reply:
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization, content-type"}
    headers = [(name.replace("_", "-"), value) for name, value in {"origin": origin, **asked, **more}.items() if value]
    return run(call(of.app, "OPTIONS", CHAT, b"", headers))


def test_pages_of_other_origins_are_only_let_in_where_they_are_named() -> None:
    closed = make_site()
    assert preflight(closed).status == 405
    assert not any(name.startswith("access-control") for name in ask(closed, CHAT, GOOD, origin=ORIGIN).headers)
    named = make_site(allowed_origins=(ORIGIN, "http://localhost:3000"), api_keys=("secret",))
    reply = preflight(named)
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert reply.headers["access-control-allow-headers"] == "authorization, content-type"
    assert reply.headers["access-control-allow-methods"] == "GET, POST"
    assert "access-control-allow-credentials" not in reply.headers
    assert preflight(named, "https://evil.example").status == 401
    assert preflight(named, access_control_request_method="").status == 401  # not what browsers ask
    assert "access-control-allow-headers" not in preflight(named, access_control_request_headers="a\x00b").headers
    for key, status in (("secret", 200), ("wrong", 401)):  # a page can read why it is refused
        reply = ask(named, CHAT, GOOD, origin=ORIGIN, authorization=f"Bearer {key}")
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (status, ORIGIN)
        assert reply.headers["vary"] == "origin"
    other = ask(named, CHAT, GOOD, origin="https://evil.example", authorization="Bearer secret")
    assert "access-control-allow-origin" not in other.headers and other.headers["vary"] == "origin"
    streamed = ask(named, CHAT, {**GOOD, "stream": True}, origin=ORIGIN, authorization="Bearer secret")
    assert streamed.headers["access-control-allow-origin"] == ORIGIN
    anybody = make_site(allowed_origins=("*",))
    assert preflight(anybody, "https://any.example").headers["access-control-allow-origin"] == "*"
    for wrong in ("app.example", "https://", "https://a.example/path", "null", ""):
        with pytest.raises(ConfigError):
            ServerSettings(allowed_origins=(wrong,))


# ------------------------------------------------------------------------------------------------------------ /tokenize


def test_tokenize_takes_no_field_that_it_would_not_use() -> None:
    site = make_site()
    for field, value in (("tools", []), ("add_generation_prompt", True), ("chat_template_kwargs", {})):
        error = ask(site, "/tokenize", {"prompt": "x", field: value}).error
        assert (error["param"], error["code"]) == (field, "invalid_value")
    plain = ask(site, "/tokenize", {"messages": HELLO}).json["tokens"]
    assert ask(site, "/tokenize", {"messages": HELLO, "add_special_tokens": False}).json["tokens"] == plain
    special = ask(site, "/tokenize", {"messages": HELLO, "add_special_tokens": True}).json["tokens"]
    assert special != plain and special[-len(plain) :] == plain
    long: list[Any] = [{"role": "user", "content": "word " * 2000}]  # worked out beside the loop
    counts = [
        ask(site, "/tokenize", {"messages": long, "add_special_tokens": wanted}).json["count"]
        for wanted in (False, True)
    ]
    assert counts[1] == counts[0] + len(special) - len(plain)
