"""Chat templates: the same text as transformers, and clear refusals."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.text import template as template_module
from jitgraph.text.template import ChatTemplate, render_chat

CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {% endif %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""

LLAMA_2 = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate') -}}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + turn['content'] | trim + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + turn['content'] | trim + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""

LLAMA_3 = """{{- bos_token }}
{%- if tools is not none %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is mapping or not message.content %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- generation %}{{ message['content'] | trim }}{% endgeneration %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
{#- a comment -#}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}{% set ns.count = ns.count + 1 %}{% if ns.count > 1 %}{% break %}{% endif %}{% endfor %}
{{ ns.count }} {{ messages | tojson }} {{ '<b>' }} {{ "é🙂'" | tojson }} {{ pad_token is defined }}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello\n  there <b>&</b>"}],
    [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "你好 🙂"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " two "},
        {"role": "user", "content": "{{ three }} {% x %}"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "time", "description": "what <time> é", "parameters": {}}}]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("source", [CHATML, LLAMA_2, LLAMA_3], ids=["chatml", "llama2", "llama3"])
def test_rendering_equals_transformers(
    source: str, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: list[dict[str, Any]] | None
) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": tools}
    (expected,), _ = render_jinja_template([messages], chat_template=source, **options, **tokens)
    assert render_chat(source, messages, **options, **tokens) == expected


def test_more_variables_reach_the_template_but_cannot_replace_the_messages() -> None:
    rendered = ChatTemplate("{{ enable_thinking }} {{ messages | length }}").render(
        CHATS[0], variables={"enable_thinking": False, "messages": []}
    )
    assert rendered == "False 1"


def test_tokens_that_a_tokenizer_lacks_are_undefined() -> None:
    assert render_chat("{{ bos_token is defined }}[{{ eos_token }}]", CHATS[0]) == "False[]"


def test_the_date_is_today() -> None:
    before = datetime.now().strftime("%d %b %Y")
    rendered = render_chat("{{ strftime_now('%d %b %Y') }}", CHATS[0])
    assert rendered in (before, datetime.now().strftime("%d %b %Y"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if x %}", "not valid in line 1"),
        ("a\n{{ 1 +* }}", "not valid in line 2"),
        ("{{ messages | nonsense }}", "nonsense"),
        ("{% generation %}never closed", "not valid"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_the_checkpoint_s_fault(source: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        render_chat(source, CHATS[0])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ 'x' * 10000000 }}",
        "{{ ([0] * n) | length }}",
        "{{ n * 'x' }}",
        "{{ 9 ** 2000 }}",
    ],
)
def test_what_the_sandbox_forbids_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="sandbox forbids"):
        ChatTemplate(source).render(CHATS[0], variables={"n": 10**7})


def test_ordinary_products_and_powers_still_work() -> None:
    assert render_chat("{{ '-' * 3 }}{{ 3 * 4 }}{{ 2 ** 10 }}{{ 2.0 ** 0.5 > 1 }}", CHATS[0]) == "---121024True"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('only one message') }}", "refuses these messages \\(only one message\\)"),
        ("{{ messages[5].content.name }}", "cannot render"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ messages[0].absent | tojson }}", "cannot render"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot render"),
    ],
)
def test_messages_that_a_template_refuses_are_the_request_s_fault(source: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        render_chat(source, CHATS[0])


@pytest.mark.parametrize("messages", [[], "hello", {"role": "user"}, [3], [{"content": "x"}], [{"role": 1}], None])
def test_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match="role"):
        render_chat(CHATML, messages)


def test_source_and_result_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_TEMPLATE_CHARS", 20)
    monkeypatch.setattr(template_module, "MAX_PROMPT_CHARS", 30)
    with pytest.raises(CheckpointError, match="limit of 20"):
        render_chat("x" * 21, CHATS[0])
    endless = [{"role": "user", "content": "x" * 31}]
    with pytest.raises(RequestError, match="over 30 characters"):
        render_chat("{{ messages }}", endless)
    assert render_chat("x" * 20, endless) == "x" * 20


def test_messages_are_left_as_they_were() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(CheckpointError, match="sandbox forbids"):
        render_chat("{% set _ = messages[0].update({'role': 'y'}) %}", messages)
    assert messages == [{"role": "user", "content": "x"}]
