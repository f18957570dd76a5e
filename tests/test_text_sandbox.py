"""Chat templates that try to take all memory or time in one operation, and ordinary ones that must not notice."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.text.template import render_chat

CHAT = [{"role": "user", "content": "Hello\nthere"}]
BIG = "{% set big = 'x' * 1000000 %}"

BOMBS = [
    "{{ ''.center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.rjust(width) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ ('\\t' * 1000).expandtabs(900000) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ '\\n' | indent(10**9) }}",
    "{{ ('\\n' * 100000) | indent(1000) }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    BIG + "{{ big.replace('x', 'xxxxxxxxxxxxxxxxxxxxxxxx') | length }}",
    BIG + "{{ big | replace('x', 'xxxxxxxxxxxxxxxxxxxxxxxx') | length }}",
    BIG + "{{ big.replace('', big) | length }}",
    BIG + "{{ big.join('y' * 1000) | length }}",
    BIG + "{{ ''.join([big] * 1000) | length }}",
    BIG + "{{ ([big] * 1000) | join | length }}",
    BIG + "{{ (['y'] * 1000) | join(big) | length }}",
    BIG + "{{ big.translate({120: big}) | length }}",
    BIG + "{% set ns = namespace(x=big) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    BIG + "{% set ns = namespace(x=big) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=3**2000) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ lipsum(n=100000) }}",
    "{{ 'x' | urlize }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:{w[0]}}'.format(1, w=[10**9]) }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_one_operation_cannot_take_the_memory_or_the_time(source: str) -> None:
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises((CheckpointError, RequestError)):
            render_chat("{% set width = 10**9 %}" + source, CHAT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 * 2**20
    assert time.process_time() - began < 20  # a bomb would take minutes, or the machine


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{{ 'a' + 'b' }}{{ 1 + 2 }}{{ [1] + [2] }}", "ab3[1, 2]"),
        ("{{ '%s-%03d' % ('x', 7) }} {{ 7 % 4 }} {{ '20260101 %s * %d' | format('x', 1234567890) }}", None),
        ("{{ '{:>5}|{a}'.format('x', a=1) }}", "    x|1"),
        ("{{ ', '.join(['a', 'b']) }} {{ ['a', 'b'] | join('-') }} {{ [1, 2] | join }} {{ 'abc' | join(',') }}", None),
        (
            "{{ 'x'.center(5) }}|{{ 'x' | center(5) }}|{{ 'a.b'.replace('.', '-') }}|{{ 'a.b' | replace('.', '+') }}",
            None,
        ),
        ("{{ messages | map(attribute='content') | join(' ') }}", "Hello\nthere"),
        ("{{ messages[0].content | indent(2) }}|{{ messages[0].content | indent(width=1, first=true) }}", None),
        ("{{ {'a': [1]} | tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ 'a long text' | truncate(5) }}", None),
        ("{{ messages | map(attribute='role') | join(', ', attribute=none) }}", "user"),
    ],
)
def test_ordinary_templates_do_not_notice(source: str, text: str | None) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    rendered = render_chat(source, CHAT)
    plain = ImmutableSandboxedEnvironment().from_string(source)
    assert rendered == (plain.render(messages=CHAT) if text is None else text)
