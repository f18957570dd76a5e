"""Every field of a request: what it does, and which ones are refused by name. No network."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_fakes import (
    EOS,
    MODEL,
    TOKENIZER,
    FakeEngine,
    Reply,
    Site,
    ask,
    chat,
    complete,
    http_bytes,
    ids_of,
    logprobs_of,
    make_site,
    read_all,
    served,
    wait_until,
    with_params,
)

from jitgraph.server.openai.convert import seed_of_answer
from jitgraph.types import SamplingParams

TEXT = "Hello there, friend!"


@pytest.fixture
def site() -> Site:
    return make_site()


def params_of(site: Site, **fields: Any) -> SamplingParams:
    """What the engine is given for a chat request with these fields."""
    reply = chat(site, **fields)
    assert reply.status == 200, reply.body
    return site.engine.asked[-1].params


def refusal(reply: Reply, param: str | None, status: int = 400) -> dict[str, Any]:
    """The error of a request that is refused, by the field that it names."""
    assert reply.status == status, reply.body
    assert reply.error["param"] == param
    if param not in (None, "messages", "prompt"):
        assert param.split(".")[-1].split("[")[0] in reply.error["message"]
    return reply.error


# ------------------------------------------------------------------------------------------------------------- sampling

SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.25,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.5,
    "min_tokens": 3,
    "ignore_eos": True,
    "seed": 11,
}


def test_sampling_fields_reach_the_engine(site: Site) -> None:
    params = params_of(site, max_tokens=9, stop_token_ids=[5, 6], logit_bias={"7": -100, "8": 2.5}, **SAMPLING)
    assert {name: getattr(params, name) for name in SAMPLING} == SAMPLING
    assert (params.max_tokens, params.stop_token_ids) == (9, (5, 6))
    assert params.bias_entries == ((7, -100.0), (8, 2.5))


@pytest.mark.parametrize("name", sorted(SAMPLING))
def test_what_is_left_out_or_null_is_the_models_own(name: str) -> None:
    site = make_site(with_params(FakeEngine(), **{**SAMPLING, "ignore_eos": False, "min_tokens": 0}))
    assert getattr(params_of(site, max_tokens=9), name) == {**SAMPLING, "ignore_eos": False, "min_tokens": 0}[name]
    assert params_of(site, max_tokens=9, **{name: None}) == params_of(site, max_tokens=9)


def test_max_tokens_and_its_newer_name(site: Site) -> None:
    assert params_of(site, max_completion_tokens=4).max_tokens == 4
    assert params_of(site, max_tokens=4, max_completion_tokens=4).max_tokens == 4
    refusal(chat(site, max_tokens=4, max_completion_tokens=5), "max_tokens")
    refusal(chat(site, max_completion_tokens=0), "max_completion_tokens")
    refusal(chat(site, max_tokens=0), "max_tokens")
    refusal(complete(site, max_completion_tokens=4), "max_completion_tokens")
    reply = chat(site, max_tokens=3)
    assert reply.json["choices"][0]["finish_reason"] == "length"
    assert reply.json["usage"]["completion_tokens"] == 3


def test_defaults_of_max_tokens(site: Site) -> None:
    room = params_of(site).max_tokens
    assert room + len(site.engine.asked[-1].ids) == 512  # the rest of the context
    complete(site)
    assert site.engine.asked[-1].params.max_tokens == 16
    complete(site, prompt=[5] * 505)
    assert site.engine.asked[-1].params.max_tokens == 7
    rolling = make_site(FakeEngine(max_model_len=None))
    assert params_of(rolling).max_tokens == rolling.settings.max_tokens_rolling


def test_the_context_is_never_cut(site: Site) -> None:
    error = refusal(complete(site, prompt=[5] * 500, max_tokens=13), "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in error["message"] and "513" in error["message"]
    assert complete(site, prompt=[5] * 500, max_tokens=12).status == 200
    assert refusal(complete(site, prompt=[5] * 512), "prompt")["code"] == "context_length_exceeded"
    assert refusal(chat(site, "word " * 1000), "messages")["code"] == "context_length_exceeded"


def test_n_submits_each_answer_with_a_seed_of_its_own(site: Site) -> None:
    reply = chat(site, n=3, seed=5)
    assert [choice["index"] for choice in reply.json["choices"]] == [0, 1, 2]
    seeds = [asked.params.seed for asked in site.engine.asked]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    assert seeds == [seed_of_answer(5, i) for i in range(3)]
    usage = reply.json["usage"]
    assert usage["prompt_tokens"] == len(site.engine.asked[0].ids)  # once, as with OpenAI
    assert usage["completion_tokens"] == 3 * (len(ids_of(TEXT)) + 1)
    chat(site, n=2)
    assert [asked.params.seed for asked in site.engine.asked[3:]] == [None, None]
    refusal(chat(site, n=9), "n")
    refusal(chat(site, n=0), "n")


def test_negative_seeds_are_taken(site: Site) -> None:
    assert params_of(site, seed=-1).seed == 2**64 - 1
    refusal(chat(site, seed=2**64), "seed")


def test_best_of_is_n_or_refused(site: Site) -> None:
    assert complete(site, best_of=1).status == 200
    assert complete(site, n=2, best_of=2).status == 200
    assert refusal(complete(site, best_of=2), "best_of")["code"] == "unsupported"


def test_several_prompts(site: Site) -> None:
    reply = complete(site, prompt=["one", [5, 6], "three"], n=2)
    assert [choice["index"] for choice in reply.json["choices"]] == list(range(6))
    prompts = [asked.ids for asked in site.engine.asked]
    assert prompts == [tuple(TOKENIZER.encode("one"))] * 2 + [(5, 6)] * 2 + [tuple(TOKENIZER.encode("three"))] * 2
    assert reply.json["usage"]["prompt_tokens"] == sum(len(ids) for ids in prompts[::2])
    refusal(complete(site, prompt=["x"] * 33), "prompt")
    refusal(complete(site, prompt=["x"] * 32, n=3), "n")
    refusal(complete(site, prompt=[]), "prompt")
    refusal(complete(site, prompt=[[]]), "prompt")
    refusal(complete(site, prompt=["x", 5]), "prompt")
    refusal(complete(site, prompt=[2048]), "prompt")
    refusal(complete(site, prompt=[-1]), "prompt")
    refusal(complete(site, prompt="", add_special_tokens=False), "prompt")


def test_what_can_never_fit_is_refused_for_good() -> None:
    """To try again later would not help, so it is no 429."""
    site = make_site(max_answers=5)
    for reply, param in (
        (chat(site, n=6), "n"),
        (complete(site, n=6), "n"),
        (complete(site, prompt=["x"] * 6), "prompt"),
        (complete(site, prompt=["x"] * 2, n=3), "n"),
        (complete(site, prompt=[5], n=6), "n"),
    ):
        error = refusal(reply, param)
        assert error["code"] == "too_large" and "5 answers are possible at once" in error["message"]
    assert site.engine.asked == []
    assert chat(site, n=5).status == complete(site, prompt=["x"] * 5).status == 200


def test_answers_are_let_in_together_or_not_at_all() -> None:
    engine = FakeEngine()
    engine.pause_s = 0.05
    with served(engine, max_answers=3) as site, site.connect() as connection:
        connection.sendall(http_bytes("/v1/completions", {"prompt": "x", "n": 2}, "Connection: close"))
        wait_until(lambda: len(engine.asked) == 2)
        reply = site.post("/v1/completions", {"prompt": "x", "n": 2})
        assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
        assert "2 of 3" in reply.json()["error"]["message"] and len(engine.asked) == 2
        assert site.post("/v1/completions", {"prompt": "x"}).status_code == 200  # one alone fits
        assert b"200 OK" in read_all(connection)
        wait_until(lambda: site.post("/v1/completions", {"prompt": "x", "n": 3}).status_code == 200)


def test_stop_strings(site: Site) -> None:
    assert chat(site, stop="re,").json["choices"][0]["message"]["content"] == "Hello the"  # inside tokens
    reply = chat(site, stop=["friend", "there"])
    assert reply.json["choices"][0]["message"]["content"] == "Hello "
    assert reply.json["choices"][0]["finish_reason"] == "stop"
    assert site.engine.asked[-1].cancelled.is_set()  # at once: the engine does not know of the string
    assert site.engine.asked[-1].sent < len(ids_of(TEXT))
    assert chat(site, stop=["Hello"], min_tokens=4).json["choices"][0]["message"]["content"] == TEXT
    assert chat(site, stop=["zz"] * 16).status == 200
    refusal(chat(site, stop=["zz"] * 17), "stop")
    refusal(chat(site, stop=[""]), "stop")
    refusal(chat(site, stop="x" * 1025), "stop")
    whole = {"stop": ["there", "re,"], "include_stop_str_in_output": True}
    assert chat(site, **whole).json["choices"][0]["message"]["content"] == "Hello there"
    streamed = chat(site, stream=True, **whole).chunks
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed) == "Hello there"
    assert complete(site, **whole).json["choices"][0]["text"] == "Hello there"


def test_what_asks_for_nothing_is_taken(site: Site) -> None:
    assert params_of(site, top_k=-1).top_k == params_of(site, top_k=0).top_k == 0
    assert chat(site, top_logprobs=0).json["choices"][0]["logprobs"] is None
    assert chat(site, top_logprobs=0, logprobs=False).status == 200
    assert chat(site, tool_choice="none").status == chat(site, tool_choice="none", tools=[]).status == 200
    for choice in ("auto", "required"):
        for more in ({}, {"tools": []}, {"tools": None}):
            error = refusal(chat(site, tool_choice=choice, **more), "tool_choice")
            assert error["message"] == "tool_choice is only possible with tools"


def test_stop_token_ids_and_ignore_eos(site: Site) -> None:
    comma = ids_of(TEXT).index(ids_of(",")[0])
    site.engine.answer = lambda asked: ids_of(TEXT)[: comma + 1]
    assert chat(site, stop_token_ids=ids_of(",")).json["choices"][0]["finish_reason"] == "stop"
    site.engine.answer = lambda asked: [*ids_of("ab"), EOS]
    reply = chat(site, ignore_eos=True, max_tokens=9).json
    assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (9, "length")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", "0.5"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2**31),
        ("top_k", 0.01),
        ("min_p", 2),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("repetition_penalty", 0),
        ("min_tokens", -1),
        ("max_tokens", -5),
        ("seed", 1.5),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"99999999999": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {str(i): 1 for i in range(301)}),
        ("logit_bias", [5]),
        ("stop_token_ids", list(range(33))),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2048]),
        ("logit_bias", {"2048": 1}),
        ("n", True),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("metadata", [1]),
        ("tool_choice", "required"),
        ("top_logprobs", 5),
        ("cache_salt", "x" * 257),
        ("modalities", ["audio"]),
        ("messages", "x"),
    ],
)
def test_values_out_of_range_are_named(site: Site, field: str, value: Any) -> None:
    error = refusal(chat(site, **{field: value}), field if field != "modalities" else "modalities[0]")
    assert error["type"] == "invalid_request_error"
    assert site.engine.asked == []


@pytest.mark.parametrize(
    "field", ["functions", "function_call", "audio", "prediction", "web_search_options", "verbosity", "chat_template"]
)
def test_unsupported_fields_are_refused_by_name(site: Site, field: str) -> None:
    assert chat(site, **{field: None}).status == 200
    error = refusal(chat(site, **{field: {"a": 1}}), field)
    assert error["code"] == "unsupported"
    refusal(complete(site, suffix="end"), "suffix")


def test_unknown_fields_are_refused_by_name(site: Site) -> None:
    assert refusal(chat(site, tempreature=1), "tempreature")["code"] == "unknown_parameter"
    reply = ask(site, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "colour": 1}]})
    assert reply.error["param"] == "messages[0].colour"
    error = ask(site, "/v1/chat/completions", {"model": MODEL}).error
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


def test_fields_without_a_meaning_here_are_taken(site: Site) -> None:
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"}
    assert chat(site, prompt_cache_key="k", modalities=["text"], **fields).status == 200


# ------------------------------------------------------------------------------------------------- answers' other forms


def test_response_formats(site: Site) -> None:
    def grammar(**fields: Any) -> Any:
        assert chat(site, **fields).status == 200
        return site.engine.asked[-1].grammar

    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert grammar(response_format={"type": "text"}) is None
    assert grammar(response_format={"type": "json_object"}).kind == "json_object"
    found = grammar(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert (found.kind, json.loads(found.source)) == ("json_schema", schema)
    found = grammar(structured_outputs={"json": schema})
    assert (found.kind, json.loads(found.source)) == ("json_schema", schema)
    assert (grammar(structured_outputs={"regex": "a+"}).kind, site.engine.asked[-1].grammar.source) == ("regex", "a+")
    assert grammar(structured_outputs={"grammar": 'start: "a"'}).kind == "lark"
    assert complete(site, response_format={"type": "json_object"}).status == 200
    assert site.engine.asked[-1].grammar.kind == "json_object"


def test_response_formats_that_are_refused(site: Site) -> None:
    def of_schema(schema: Any) -> Reply:
        return chat(site, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})

    where = "response_format.json_schema.schema"
    refusal(of_schema("text"), where)
    deep: Any = {}
    for _ in range(40):
        deep = {"properties": {"a": deep}}
    assert refusal(of_schema(deep), where)["code"] == "too_deep"
    assert refusal(of_schema({"description": "x" * 70_000}), where)["code"] == "too_large"
    assert of_schema({"description": "[" * 100 + '\\"{'}).status == 200  # depth is not counted inside texts
    refusal(chat(site, response_format={"type": "json_schema"}), "response_format.json_schema")
    refusal(chat(site, response_format={"type": "xml"}), "response_format.type")
    refusal(chat(site, structured_outputs={"regex": "a", "json_object": True}), "structured_outputs")
    refusal(chat(site, structured_outputs={"regex": ""}), "structured_outputs.regex")
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    refusal(chat(site, **both), "structured_outputs")
    assert site.engine.asked[1:] == []


def test_echo_with_log_probabilities_of_the_prompt(site: Site) -> None:
    reply = complete(site, prompt="Once", echo=True, logprobs=2, max_tokens=3)
    choice = reply.json["choices"][0]
    assert site.engine.asked[-1].prompt_logprobs == 2
    assert choice["text"] == "OnceHello"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<|begin|>", "O", "n", "ce", "H", "el", "lo"]
    assert logprobs["token_logprobs"] == [None, *[-0.5] * 6]
    assert logprobs["top_logprobs"][0] is None
    assert all(list(top.values()) == [-0.5, -1.5] for top in logprobs["top_logprobs"][1:])
    assert logprobs["text_offset"] == [0, 0, 1, 2, 4, 5, 7]


def test_the_prompt_alone_can_be_scored(site: Site) -> None:
    """As evaluation harnesses ask for it: ``max_tokens`` 0 with ``echo``."""
    reply = complete(site, prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=0).json
    [choice] = reply["choices"]
    assert choice["text"] == TOKENIZER.decode([5, 6, 7])
    assert len(choice["logprobs"]["tokens"]) == 3
    assert (reply["usage"]["completion_tokens"], choice["finish_reason"]) == (0, "length")
    refusal(complete(site, max_tokens=0), "max_tokens")


def test_completion_log_probabilities_without_echo(site: Site) -> None:
    logprobs = complete(site, logprobs=1).json["choices"][0]["logprobs"]
    assert logprobs["tokens"][:3] == ["H", "el", "lo"]
    assert logprobs["text_offset"][:4] == [0, 1, 3, 5]
    assert len({len(logprobs[name]) for name in logprobs}) == 1
    none = complete(site, logprobs=0).json["choices"][0]["logprobs"]
    assert none["top_logprobs"] is None and none["token_logprobs"][0] == -0.5
    refusal(complete(site, logprobs=21), "logprobs")


def test_log_probabilities_that_json_cannot_carry(site: Site) -> None:
    from jitgraph.ipc.messages import WireLogprobs
    from jitgraph.server.openai.logprobs import chat_logprobs

    bad = WireLogprobs(40, float("-inf"), ((41, float("nan")),))
    [one] = chat_logprobs(TOKENIZER.pieces, [bad]).content
    assert (one.logprob, one.top_logprobs[0].logprob) == (-9999.0, -9999.0)
    assert logprobs_of(40, 1).logprob == -0.5


def test_chat_log_probabilities_show_parts_of_characters_as_bytes() -> None:
    site = make_site()
    parts = ids_of("🙂")
    assert len(parts) > 1
    site.engine.answer = lambda asked: [*parts, EOS]
    choice = chat(site, logprobs=True).json["choices"][0]
    content = choice["logprobs"]["content"]
    assert choice["message"]["content"] == "🙂"
    assert bytes(b for one in content[:-1] for b in one["bytes"]).decode() == "🙂"
    assert content[0]["token"].startswith("\\xf0")
    assert content[0]["top_logprobs"] == []
    names = complete(site, logprobs=1, max_tokens=9).json["choices"][0]["logprobs"]["tokens"]
    assert names[0].startswith("bytes:\\xf0")


def test_token_ids_on_request(site: Site) -> None:
    reply = chat(site, return_token_ids=True).json["choices"][0]
    assert reply["token_ids"] == [*ids_of(TEXT), EOS]
    assert tuple(reply["prompt_token_ids"]) == site.engine.asked[-1].ids
    chunks = chat(site, return_token_ids=True, stream=True).chunks
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]
    assert ids == [*ids_of(TEXT), EOS]
    chunks = complete(site, return_token_ids=True, stream=True).chunks
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == [*ids_of(TEXT), EOS]
    assert [len(chunk["choices"][0].get("prompt_token_ids", [])) for chunk in chunks] == [4] + [0] * (len(chunks) - 1)


def test_special_tokens_can_be_shown(site: Site) -> None:
    user = TOKENIZER.encode("<|user|>", add_special_tokens=False)
    site.engine.answer = lambda asked: [*user, *ids_of("Hi"), EOS]
    assert chat(site).json["choices"][0]["message"]["content"] == "Hi"
    shown = chat(site, skip_special_tokens=False).json["choices"][0]["message"]["content"]
    assert shown == "<|user|>Hi"  # what ended the answer is no part of it


def test_cached_tokens_are_reported(site: Site) -> None:
    site.engine.cached_tokens = 6
    assert chat(site).json["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}
    assert site.records[-1].sequences[0].cached_tokens == 6


def test_salts_keep_callers_apart() -> None:
    site = make_site(api_keys=("one", "two"))
    for key, own in (("one", None), ("two", None), ("two", "mine")):
        document = {"messages": [{"role": "user", "content": "x"}], "cache_salt": own}
        assert ask(site, "/v1/chat/completions", document, authorization=f"Bearer {key}").status == 200
    first, second, third = (asked.salt for asked in site.engine.asked)
    assert first and second and first != second and third == f"{second}:mine"
    assert "one" not in first
    assert chat(make_site()).status == 200


# ------------------------------------------------------------------------------------------------------------- messages


def prompt_of(site: Site, *messages: dict[str, Any], **fields: Any) -> str:
    reply = ask(site, "/v1/chat/completions", {"messages": list(messages), **fields})
    assert reply.status == 200, reply.body
    return TOKENIZER.decode(site.engine.asked[-1].ids, skip_special_tokens=False)


def test_messages_reach_the_template(site: Site) -> None:
    assert prompt_of(site, {"role": "user", "content": "Hi"}) == "<|begin|><|user|>\nHi<|end|>\n<|assistant|>\n"
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "\none\ntwo<|end|>" in prompt_of(site, {"role": "user", "content": parts})
    assert "<|system|>\nBe brief" in prompt_of(
        site, {"role": "developer", "content": "Be brief"}, {"role": "user", "content": "x"}
    )
    text = prompt_of(site, {"role": "user", "content": "Hi"}, add_generation_prompt=False)
    assert text.endswith("Hi<|end|>\n")
    again = chat(site).json["choices"][0]["message"]  # an answer can be sent back as it came
    assert TEXT in prompt_of(site, {"role": "user", "content": "x"}, again, {"role": "user", "content": "y"})
    nulls = dict.fromkeys(["refusal", "annotations", "audio", "function_call", "tool_calls"])
    assert "Yes" in prompt_of(site, {"role": "assistant", "content": "Yes", **nulls})


def test_messages_that_are_refused(site: Site) -> None:
    def of(*messages: Any) -> Reply:
        return ask(site, "/v1/chat/completions", {"messages": list(messages)})

    refusal(of(), "messages")
    refusal(of({"role": "robot", "content": "x"}), "messages[0].role")
    refusal(of({"content": "x"}), "messages[0].role")
    refusal(of({"role": "user"}), "messages[0].content")
    image = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    assert refusal(of({"role": "user", "content": image}), "messages[0].content[0].type")["code"] == "unsupported"
    refusal(of({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text")
    refusal(of({"role": "tool", "content": "x"}), "messages[0].tool_call_id")
    assert of(*[{"role": "user", "content": "x"}] * 2049).error["code"] == "too_large"
    error = refusal(of({"role": "tool", "content": "x", "tool_call_id": "1"}), "messages")  # by the template itself
    assert "user, assistant or system" in error["message"]


def test_template_variables_are_a_short_list() -> None:
    template = "{{ messages[0].content }}{% if enable_thinking %} think{% endif %}{{ reasoning_effort }}"
    site = make_site(chat_template=template)
    assert (
        prompt_of(site, {"role": "user", "content": "x"}, chat_template_kwargs={"enable_thinking": True}) == "x think"
    )
    assert prompt_of(site, {"role": "user", "content": "x"}, reasoning_effort="low") == "xlow"
    for name in ("tokenize", "messages", "tools", "bos_token", "__class__"):
        refusal(chat(site, chat_template_kwargs={name: 1}), f"chat_template_kwargs.{name}")
    refusal(chat(site, chat_template_kwargs={"enable_thinking": [1]}), "chat_template_kwargs[...]")
    plain = make_site()
    refusal(chat(plain, chat_template_kwargs={"enable_thinking": True}), "chat_template_kwargs.enable_thinking")
    refusal(chat(plain, reasoning_effort="low"), "reasoning_effort")


def test_a_checkpoint_without_a_chat_template() -> None:
    from jitgraph.text.tokenizer import Tokenizer, bundled_tokenizer_folder

    whole = Tokenizer.from_folder(bundled_tokenizer_folder())
    bare = Tokenizer(whole._backend, whole.special_tokens, {}, "somewhere/tokenizer.json")
    error = refusal(chat(make_site(tokenizer=bare)), "messages")
    assert "chat_template.jinja" in error["message"]
    assert complete(make_site(tokenizer=bare)).status == 200
