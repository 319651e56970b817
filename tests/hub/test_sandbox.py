"""Templates that would make more than a machine holds, or never end, are refused at once; those in use are untouched."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dovetail.errors import UserError
from dovetail.hub.chat import render

LONG = "{% set x = 'a' * 900000 %}"
NEST = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
BOMBS = [
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.999999999f' % 1.0 }}",
    "{{ '%999999999s'|format('a') }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'|indent(10**9, true) }}",
    "{{ ('\t' * 900000).expandtabs(900000) }}",
    "{{ [[1]]|tojson(indent=10**9) }}",
    "{{ [1]|batch(10**9, 0)|list }}",
    "{{ lipsum(n=10**8) }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=10**9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    NEST + "{{ ns.x }}",
    NEST + "{{ ns.x|tojson }}",
    NEST + "{{ '' ~ ns.x }}",
    NEST + "{{ '%s' % [ns.x] }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ [1] * 999999 * 999 }}",
    "{{ ['x' * 900000] * 900000 }}",
    LONG + "{{ x.replace('a', x) }}",
    LONG + "{{ x|replace('a', x) }}",
    LONG + "{{ x.join(x) }}",
    LONG + "{{ range(99999)|join(x) }}",
    LONG + "{{ ('{0}' * 300000).format(x) }}",
    LONG + "{{ x.translate({97: x}) }}",
    LONG + "{% for i in range(99999) %}{{ x }}{% endfor %}",
    LONG + "{% set y %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}",
    LONG + "{{ range(99999)|map('replace', '1', x)|list|length }}",
]


@pytest.mark.parametrize("template", BOMBS)
def test_bombs(template: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match="chat template failed"):
        render(template, [{"role": "user", "content": "hi"}], True, {})
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ '%-5s|%03d' % ('ab', 7) }}{{ '{:>4}'.format('x') }}", "ab   |007   x"),
        ("{{ messages|map(attribute='content')|join(', ') }}", "hi, there"),
        (
            "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{% if not loop.last %};{% endif %}{% endfor %}",
            "1/2;2/2",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content|upper }}{% else %}none{% endfor %}", "HI"),
        ("{% for a, b in [(1, 2), (3, 4)] %}{{ a ~ '-' ~ b }} {% endfor %}", "1-2 3-4 "),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ ['a', 'b']|length }}", "a12"),
        (
            "{% macro say(m) %}<{{ m.content }}>{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
            "<hi><there>",
        ),
        ("{% set x %}{{ 'a' * 3 }}{% endset %}{{ x.replace('a', 'bc') }}", "bcbcbc"),
        ("{{ [1, 2] + [3] }}{{ {'a': [1]}|tojson(indent=2) }}", '[1, 2, 3]{\n  "a": [\n    1\n  ]\n}'),
        ("{{ 'a\nb'|indent(2) }}{{ messages[::-1][0].content.split('h') }}", "a\n  b['t', 'ere']"),
    ],
)
def test_what_templates_do(template: str, text: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    assert render(template, messages, True, {}) == text


def test_a_long_conversation() -> None:
    """What is passed in may be of any length, and gone through several times."""
    messages = [{"role": "user", "content": "word " * 10_000}] * 60
    loop = "{% for m in messages %}{{ '<' + m.content|trim + '>' }}{% endfor %}"
    assert len(render(loop * 3 + "{{ messages|tojson|length }}", messages, True, {})) > 9 * 10**6
