"""Tool calls come out of a model's text the same way however it is cut; what is no call stays the text it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from jitgraph.errors import RequestError
from jitgraph.server.tool_forms import FORCED, HERMES, LLAMA, MISTRAL, Form
from jitgraph.server.tool_parsers import MOST_CALLS, MOST_HELD_CHARS
from jitgraph.server.tools import (
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    MAX_TOOLS,
    Choice,
    Delta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    ToolParser,
    check_choice,
    check_tools,
    collect,
    forced_parser,
    forced_schema,
    form_of,
    parser_for,
)

FORMS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "forced": FORCED}
CALL = '{"name": "f", "arguments": {"a": 1}}'


def numbered() -> Callable[[], str]:
    """Ids in the order of calls."""
    numbers = count()
    return lambda: f"id{next(numbers)}"


def parser(form: Form, **options: Any) -> ToolParser:
    return ToolParser(form, make_id=numbered(), **options)


def pieces(form: Form, parts: list[str], **options: Any) -> list[list[Delta]]:
    """What each part gives, and the end."""
    one = parser(form, **options)
    return [*(one.feed(part) for part in parts), one.finish()]


def parsed(form: Form, text: str, **options: Any) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls (name, arguments) of a whole answer."""
    content, calls = collect([delta for deltas in pieces(form, [text], **options) for delta in deltas])
    assert [call.id for call in calls] == [f"id{i}" for i in range(len(calls))]
    return content, [(call.name, call.arguments) for call in calls]


# ------------------------------------------------------------------------------------------------------- whole answers

F, G = ("f", '{"a": 1}'), ("g", '{"b": [1, {"c": "}"}]}')
CALL_G = '{"name":"g","arguments":{"b": [1, {"c": "}"}]}}'
WHOLE = [
    (HERMES, "Hello there.", "Hello there.", []),
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [F]),
    (HERMES, f"\n\n<tool_call>{CALL}</tool_call>\n", "", [F]),
    (HERMES, f"Let me see.\n<tool_call>{CALL}</tool_call>", "Let me see.\n", [F]),
    (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL_G}</tool_call>", "", [F, G]),
    (HERMES, f"<tool_call>{CALL}\n{CALL_G}</tool_call>", "", [F, G]),
    (HERMES, f"<tool_call>{CALL}</tool_call> and text", " and text", [F]),
    (HERMES, f"a <tool_call>{CALL}</tool_call> b <tool_call>{CALL_G}</tool_call> c", "a  b  c", [F, G]),
    (HERMES, f"<tool_call>{CALL}", "", [F]),  # the closing tag forgotten
    (HERMES, f"<tool_call>{CALL} text", " text", [F]),
    (HERMES, f"<tool_call> <tool_call>{CALL}</tool_call>", "<tool_call> ", [F]),
    (HERMES, f"<<tool_call>{CALL}</tool_call>", "<", [F]),
    (HERMES, f"<tool_<tool_call>{CALL}</tool_call>", "<tool_", [F]),
    (HERMES, CALL, CALL, []),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"type": "function", "x": [1, {"y": null}], "name": "f", "arguments": {"a": 1}}', "", [F]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}, "id": "x", "n": -1.5e3}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"name": "\\u0066", "arguments": {"a": 1}}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\\"}<tool_call>"}}</tool_call>', "",
     [("f", '{"a": "\\"}<tool_call>"}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> b', " b", [("f", '{"a": 1')]),  # cut short
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> b', " b", [F]),  # one brace too few
    (HERMES, f"<tool_call>{CALL}}}</tool_call>", "}</tool_call>", [F]),  # one too many
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a"', "", [("f", '{"a"')]),  # the end of the tokens
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [F]),
    (LLAMA, '  {"name": "f", "parameters": {"a": 1}}\n', "", [F]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [F]),
    (LLAMA, '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [F]),
    (LLAMA, f"{CALL}; {CALL_G}", "", [F, G]),
    (LLAMA, f"{CALL} {CALL_G}", f" {CALL_G}", [F]),
    (LLAMA, f"text {CALL}", f"text {CALL}", []),
    (LLAMA, f"text <|python_tag|>{CALL}", "text ", [F]),
    (LLAMA, '<|python_tag|>search.call(query="x")', '<|python_tag|>search.call(query="x")', []),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA, '{"name": "Alice"}', '{"name": "Alice"}', []),
    (LLAMA, '{"name": "Alice Smith", "parameters": {}}', '{"name": "Alice Smith", "parameters": {}}', []),
    (LLAMA, f"{CALL}; then", "; then", [F]),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}, {CALL_G}]", "", [F, G]),
    (MISTRAL, f"[TOOL_CALLS][{CALL}]</s>", "</s>", [F]),
    (MISTRAL, f"[TOOL_CALLS] {CALL}", "", [F]),
    (MISTRAL, f" [{CALL}]", "", [F]),  # the marker, a special token, skipped
    (MISTRAL, f"Well. [TOOL_CALLS] [{CALL}]", "Well. ", [F]),
    (MISTRAL, "[link](url) and [1, 2]", "[link](url) and [1, 2]", []),
    (MISTRAL, "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    (MISTRAL, "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}, 5]", ", 5]", [F]),
    (FORCED, f"[{CALL},{CALL_G}]", "", [F, G]),
    (FORCED, CALL, "", [F]),
    (FORCED, f"[{CALL}", "", [F]),
]  # fmt: skip
MALFORMED = [
    "<tool_call>",
    "<tool_call>\n</tool_call>",
    "<tool_call>f(1)</tool_call>",
    "<tool_call>{}</tool_call>",
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "a b", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "no object"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "{\\ud800}"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
    '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
    '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {"a": 1}}</tool_call>',
    '<tool_call>{"a": ], "name": "f", "arguments": {}}</tool_call>',
    '<tool_call>{"a": , "name": "f", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f',
    '<tool_call>{"name": "f", "argu',
    '<tool_call>{"name": "f", "arguments": "{',
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), WHOLE)
def test_whole_answers(form: Form, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parsed(form, text) == (content, calls)


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_malformed_is_text(text: str) -> None:
    assert parsed(HERMES, text) == (text, [])
    assert parsed(HERMES, f"a{text} <tool_call>{CALL}</tool_call>") in (
        (f"a{text} ", [F]),
        (f"a{text} <tool_call>{CALL}</tool_call>", []),  # the malformed one's text has no end
    )


# ----------------------------------------------------------------------------------------------------------- properties

FRAGMENTS = [
    *(text for _, text, _, _ in WHOLE),
    *MALFORMED,
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<tool_", "[TOOL", "<|py", ";", ",", "]", "["),
    *("{", "}", '"', "\\", " ", "\n", "text", "🙂", '{"name": "f", "arguments": {', '"arguments":', "null", "1"),
]
ANSWERS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=8).map("".join)
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@FORM
@settings(max_examples=120, deadline=None)
@given(text=ANSWERS, data=st.data())
def test_cuts_do_not_matter(form: Form, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    parts = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
    whole = collect([delta for deltas in pieces(form, [text]) for delta in deltas])
    assert collect([delta for deltas in pieces(form, parts) for delta in deltas]) == whole
    assert collect([delta for deltas in pieces(form, list(text)) for delta in deltas]) == whole


@FORM
@settings(max_examples=120, deadline=None)
@given(text=ANSWERS)
def test_nothing_is_lost(form: Form, text: str) -> None:
    """Without calls the text is what the model wrote; with calls each character of theirs stands in the answer."""
    content, calls = parsed(form, text)
    if not calls:
        assert content == text
    rest = text
    for _, arguments in calls:
        if arguments != "{}" and '\\"' not in text:
            assert arguments in rest
            rest = rest[rest.index(arguments) + len(arguments) :]
    letters = iter(text)
    assert all(char in letters for char in content)  # in the same order


@FORM
@settings(max_examples=80, deadline=None)
@given(text=ANSWERS)
def test_what_cannot_be_a_call_passes_at_once(form: Form, text: str) -> None:
    one = parser(form)
    given_out: list[Delta] = []
    for i, char in enumerate(text):
        given_out += one.feed(char)
        content, calls = collect(given_out)
        if calls:
            return
        assert text.startswith(content)
        held = text[len(content) : i + 1].lstrip(" \t\r\n")
        openings = (*form.markers, *(form.bare if not content else ""))
        assert not held or any(held.startswith(opening) or opening.startswith(held) for opening in openings)
        assert text[len(content) : i + 1] == held or not content.strip(" \t\r\n")  # white space waits only at the start


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.from_regex(r"[a-zA-Z0-9_.-]{1,64}", fullmatch=True), st.dictionaries(st.text(max_size=5), JSON)),
    min_size=1,
    max_size=3,
)
RENDERED: dict[str, Callable[[list[str]], str]] = {
    "hermes": lambda calls: "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls),
    "llama": "; ".join,
    "mistral": lambda calls: f"[TOOL_CALLS] [{', '.join(calls)}]",
    "forced": lambda calls: f"[{','.join(calls)}]",
}


@pytest.mark.parametrize("family", RENDERED)
@settings(max_examples=60, deadline=None)
@given(calls=CALLS, ascii_only=st.booleans(), indent=st.sampled_from([None, 2]))
def test_every_call_comes_through(family: str, calls: Any, ascii_only: bool, indent: int | None) -> None:
    """Arguments are, to the letter, what the model wrote."""
    texts = [json.dumps(arguments, ensure_ascii=ascii_only, indent=indent) for _, arguments in calls]
    key = "parameters" if family == "llama" else "arguments"
    expected = [(name, text) for (name, _), text in zip(calls, texts, strict=True)]
    answer = RENDERED[family]([f'{{"name": "{name}", "{key}": {text}}}' for name, text in expected])
    assert parsed(FORMS[family], answer) == ("", expected)


@FORM
@settings(max_examples=60, deadline=None)
@given(text=ANSWERS)
def test_what_was_given_out_stands(form: Form, text: str) -> None:
    """A stream can only grow: what a client has at any moment begins what it has in the end."""
    one = parser(form)
    so_far: list[Delta] = []
    snapshots = []
    for char in text:
        so_far += one.feed(char)
        snapshots.append(collect(so_far))
    so_far += one.finish()
    content, calls = collect(so_far)
    for early, early_calls in snapshots:
        assert content.startswith(early)
        for before, after in zip(early_calls, calls, strict=False):
            assert (before.id, before.name) == (after.id, after.name)
            assert after.arguments.startswith(before.arguments)


# ---------------------------------------------------------------------------------------------------- the streamed form


def test_the_form_of_a_stream() -> None:
    """As OpenAI does: id and name first, then the arguments as they come."""
    one = parser(HERMES)
    assert one.feed("Wait <to") == [TextDelta("Wait ")]
    assert one.feed('ol_call>{"name": "f", "argu') == []
    assert one.feed('ments": {"a"') == [ToolCallDelta(0, "", "id0", "f"), ToolCallDelta(0, '{"a"')]
    assert one.feed(": 1") == [ToolCallDelta(0, ": 1")]
    assert one.feed("}}\n</tool_call>\n<tool_call>") == [ToolCallDelta(0, "}")]
    assert one.feed('{"name": "g", "arguments": {}}') == [ToolCallDelta(1, "", "id1", "g"), ToolCallDelta(1, "{}")]
    assert one.feed("</tool_call>") == []
    assert one.finish() == []
    assert one.calls == 2


def test_plain_text_is_one_piece() -> None:
    one = parser(HERMES)
    assert one.feed("") == []
    assert one.feed("a b") == [TextDelta("a b")]
    assert one.feed("c < d") == [TextDelta("c < d")]
    assert one.feed("e <") == [TextDelta("e ")]
    assert one.feed("=") == [TextDelta("<=")]
    assert one.finish() == []


def test_ids() -> None:
    def ids(template: str) -> list[str]:
        one = parser_for(template)
        assert one is not None
        opening = {"T": "[TOOL_CALLS]", "t": "<tool_call>"}[re.sub(r"[^Tt]", "", template)[0]]
        deltas = [*one.feed(f"{opening}{CALL}"), *one.finish()]
        return [call.id for call in collect(deltas)[1]]

    (first,), (second,) = ids(QWEN), ids(QWEN)
    assert re.fullmatch(r"call_[0-9a-f]{24}", first)
    assert first != second
    (short,) = ids(MISTRAL_TEMPLATE)
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", short)  # the family's templates refuse any other in the next turn
    deltas = forced_parser(MISTRAL_TEMPLATE).feed(CALL)
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", collect(deltas)[1][0].id)


def test_functions_that_are_not_there_are_text() -> None:
    assert parsed(LLAMA, CALL, names=["f"]) == ("", [F])
    assert parsed(LLAMA, CALL, names=["g"]) == (CALL, [])
    assert parsed(LLAMA, CALL, names=[]) == (CALL, [])


def test_calls_have_an_end() -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    assert parsed(HERMES, text * 3, most_calls=2) == (text, [F, F])
    content, calls = parsed(HERMES, text * (MOST_CALLS + 2))
    assert (content, len(calls)) == (text * 2, MOST_CALLS)


@pytest.mark.parametrize(
    "opening",
    [
        '<tool_call>{"name": "',
        '<tool_call>{"a',
        '<tool_call>{"a": [',
        '<tool_call>{"arguments": {"a": "',
        "<tool_call> ",
    ],
)
@pytest.mark.parametrize("filler", ["x", " ", "[", "1", '\\"'])
def test_what_is_held_back_has_an_end(opening: str, filler: str) -> None:
    one = parser(HERMES)
    deltas = one.feed(opening)
    fed = len(opening)
    for _ in range(100):
        deltas += one.feed(filler * 1000)
        fed += 1000 * len(filler)
        assert fed - len(collect(deltas)[0]) <= MOST_HELD_CHARS + 64
    deltas += one.finish()
    assert collect(deltas) == (opening + filler * 100_000, [])


def test_long_arguments_are_not_held_back() -> None:
    one = parser(HERMES)
    one.feed('<tool_call>{"name": "f", "arguments": {"a": "')
    text = "\\\\" + "x" * 2000
    for _ in range(100):
        assert one.feed(text) == [ToolCallDelta(0, text)]
    one.feed('", "b": ')
    assert one.feed("[" * 100_000) == [ToolCallDelta(0, "[" * 100_000)]


# ------------------------------------------------------------------------------------------------------------ templates

QWEN = (
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>'
)
LLAMA_TEMPLATE = (
    """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument """
    """name and its value}.' }}"""
)
MISTRAL_TEMPLATE = '{{- "[TOOL_CALLS] [" }}{%- for tool_call in message.tool_calls %}'


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (QWEN, HERMES),
        (LLAMA_TEMPLATE, LLAMA),
        ("{{- '<|python_tag|>' + tool_call.name + '.call(' }}", LLAMA),
        (MISTRAL_TEMPLATE, MISTRAL),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}", None),
        ("<tool_call>\n<function=name>\n<parameter=x> arguments", None),
        ("<tool_call>{name}\n<arg_key>{arguments}</arg_key>", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("", None),
    ],
)
def test_the_template_says_how_calls_are_written(template: str, form: Form | None) -> None:
    assert form_of(template) == form
    assert (parser_for(template) is None) == (form is None)


# ---------------------------------------------------------------------------------------------------------- definitions


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_good_definitions() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert check_tools([]) == []
    given_tools = [tool("f", description="d", parameters=schema, strict=True), {"function": {"name": "g-1.x_"}}]
    assert check_tools(given_tools) == [
        tool("f", description="d", parameters=schema),
        tool("g-1.x_", description="", parameters={"type": "object", "properties": {}}),
    ]
    assert check_tools([tool(parameters=nested(MAX_SCHEMA_DEPTH))])
    assert check_tools([tool(f"f{i}") for i in range(MAX_TOOLS)])


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        (None, "tools must"),
        ({}, "tools must"),
        ([tool(f"f{i}") for i in range(MAX_TOOLS + 1)], f"tools has {MAX_TOOLS + 1}"),
        ([tool("a"), 5], r"tools\[1\] must be an object"),
        ([{"type": "retrieval", "function": {"name": "f"}}], r"tools\[0\].type"),
        ([{"type": "function"}], r"tools\[0\].function must"),
        ([{"type": "function", "function": {}}], r"tools\[0\].function.name"),
        ([{**tool(), "more": 1}], r"tools\[0\].more"),
        ([tool(more=1)], r"tools\[0\].function.more"),
        ([tool("")], r"tools\[0\].function.name"),
        ([tool("a b")], r"tools\[0\].function.name"),
        ([tool("ä")], r"tools\[0\].function.name"),
        ([tool("a\n")], r"tools\[0\].function.name"),
        ([tool("a" * 65)], r"tools\[0\].function.name"),
        ([tool("a"), tool("a")], r"tools\[1\].function.name: there are two"),
        ([tool(description=5)], r"tools\[0\].function.description"),
        ([tool(description="x" * 20_000)], r"tools\[0\].function.description has 20000"),
        ([tool(strict="yes")], r"tools\[0\].function.strict"),
        ([tool(parameters=[])], r"tools\[0\].function.parameters must be an object"),
        ([tool(parameters=nested(MAX_SCHEMA_DEPTH + 1))], r"tools\[0\].function.parameters is nested more"),
        ([tool(parameters=nested(100_000))], r"tools\[0\].function.parameters is nested more"),
        ([tool(parameters={"a": "x" * MAX_SCHEMA_BYTES})], r"tools\[0\].function.parameters has \d+ bytes"),
        ([tool(parameters={"a": "\ud800"})], r"tools\[0\].function.parameters is no JSON"),
    ],
    ids=lambda value: f"{value!r:.30}" if isinstance(value, str) else None,
)
def test_bad_definitions(tools: Any, field: str) -> None:
    with pytest.raises(RequestError, match=field):
        check_tools(tools)


TOOLS = check_tools([tool("f"), tool("g")])


@pytest.mark.parametrize(
    ("choice", "tools", "expected"),
    [
        (None, TOOLS, Choice("auto")),
        (None, [], Choice("none")),
        ("none", TOOLS, Choice("none")),
        ("none", [], Choice("none")),
        ("auto", TOOLS, Choice("auto")),
        ("required", TOOLS, Choice("required")),
        (tool("g"), TOOLS, Choice("named", "g")),
        ({"function": {"name": "f"}}, TOOLS, Choice("named", "f")),
    ],
)
def test_choices(choice: Any, tools: list[dict[str, Any]], expected: Choice) -> None:
    assert check_choice(choice, tools) == expected
    assert expected.forced == (expected.mode in ("required", "named"))


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        ("required", [], "only possible with tools"),
        ("auto", [], "only possible with tools"),
        (tool("f"), [], "only possible with tools"),
        (tool("h"), TOOLS, "function.name: h is not one"),
        ("any", TOOLS, "must be none, auto, required"),
        (5, TOOLS, "must be none"),
        ({"type": "function"}, TOOLS, "must be none"),
        ({"type": "custom", "function": {"name": "f"}}, TOOLS, "must be none"),
        ({"function": {"name": 5}}, TOOLS, "must be none"),
    ],
)
def test_bad_choices(choice: Any, tools: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_choice(choice, tools)


# --------------------------------------------------------------------------------------------------------- forced calls

POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/point"}},
         "required": ["x"], "additionalProperties": False}  # fmt: skip
GET = tool(
    "get",
    parameters={
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}, "how": {"enum": [{"$ref": "#/no/reference"}, "b"]}},
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {"point": POINT},
    },
)
OTHER = tool(
    "other",
    parameters={
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}},
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {"point": {"type": "string"}},
    },
)
BYTES = LLTokenizer("byte")


def accepts(schema: dict[str, Any], text: str) -> bool:
    """Whether the grammar that the engine makes of the schema allows this answer, and no more is needed."""
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    ids = BYTES.tokenize_str(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


POINTS = '{"name": "get", "arguments": {"at": {"x": 1, "next": {"x": 2}}}}'
WORDS = '{"name": "other", "arguments": {"at": "here"}}'


@pytest.mark.parametrize(
    ("name", "parallel", "text", "good"),
    [
        (None, True, f"[{POINTS}]", True),
        (None, True, f"[{POINTS}, {WORDS}]", True),
        (None, True, "[]", False),
        (None, True, POINTS, False),
        (None, True, f"[{POINTS}", False),
        (None, True, '[{"name": "get", "arguments": {"at": "here"}}]', False),  # the other tool's definition
        (None, True, '[{"name": "other", "arguments": {"at": {"x": 1}}}]', False),
        (None, True, '[{"name": "get", "arguments": {"at": {"x": 1, "next": {"x": "a"}}}}]', False),
        (None, True, '[{"name": "get", "arguments": {"at": {"x": 1}, "how": {"$ref": "#/no/reference"}}}]', True),
        (None, True, '[{"name": "get"}]', False),
        (None, True, '[{"name": "else", "arguments": {}}]', False),
        (None, False, POINTS, True),
        (None, False, WORDS, True),
        (None, False, f"[{POINTS}]", False),
        ("get", True, POINTS, True),
        ("get", True, WORDS, False),
        ("other", True, WORDS, True),
    ],
)
def test_forced_answers(name: str | None, parallel: bool, text: str, good: bool) -> None:
    schema = forced_schema(check_tools([GET, OTHER]), name, parallel)
    assert accepts(schema, text) == good
    if good:
        one = forced_parser("", names=["get", "other"])
        content, calls = collect([*one.feed(text), *one.finish()])
        assert content == ""
        assert all(isinstance(call, ToolCall) and json.loads(call.arguments) for call in calls)
        assert [call.name for call in calls] == re.findall(r'"name": "(\w+)"', text)


def test_what_a_reference_to_the_root_means() -> None:
    tree = tool(
        "tree", parameters={"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False}
    )
    schema = forced_schema(check_tools([tree]), "tree")
    assert accepts(schema, '{"name": "tree", "arguments": {"child": {"child": {}}}}')
    assert not accepts(schema, '{"name": "tree", "arguments": {"child": {"name": "tree", "arguments": {}}}}')
