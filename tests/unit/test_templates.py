"""Messages from templates: what their names give from message to message, and where one failed."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
import uuid
from typing import Any

import pytest
from support.program import ROOT, Limits

from iot_elf import templates
from iot_elf.errors import UsageError
from iot_elf.messages import PayloadBuilder
from iot_elf.templates import Template, TemplateContext

from .stand_ins import Clock


def rendered(
    text: str, *numbers: int, seed: int | None = 1, interval_s: float = 1.0, thing: str = "thing_7"
) -> list[str]:
    """What a template gives for some messages of a thing."""
    context = TemplateContext(thing, seed, interval_s)
    template = Template(text.encode(), PayloadBuilder, lambda thing: context)
    return [template.payload("elf/x", thing, number).decode() for number in numbers or (1,)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", "Hello"),
        ("a\n", "a\n"),
        ("{{ thing_name }} {{ thing_number }} {{ number }}", "thing_7 7 1"),
        ("{{ now }} {{ now_ms }}", "1700000000.1255 1700000000125"),
        ("{{ choice([5, 5]) }} {{ choice('a', 'a') }} {{ choice('bb') }}", "5 a b"),
        ("{{ randint(3, 3) }} {{ uniform(2, 2) }} {{ gauss(2, 0) }}", "3 2.0 2.0"),
        ("{% for n in range(3) %}{{ n }}{% endfor %}", "012"),
    ],
)
def test_a_template_has_these_names(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    clock = Clock(monkeypatch, templates)
    clock.time_ns = lambda: 1_700_000_000_125_500_000  # type: ignore[attr-defined]
    assert rendered(text) == [expected]


def test_the_example_gives_a_field_one_type_and_each_thing_another_value() -> None:
    """As rules need that infer a field's type from its first value."""
    text = (ROOT / "example-template.json").read_text(encoding="utf-8")
    series = [[json.loads(each) for each in rendered(text, *range(1, 50), thing=f"thing_{n}")] for n in range(3)]
    types = {tuple(map(type, message.values())) for messages in series for message in messages}
    assert types == {(str, float, int, str)}
    assert len({messages[0]["temperature"] for messages in series}) == 3


def test_a_uuid_is_one() -> None:
    found = [uuid.UUID(text) for text in rendered("{{ uuid() }}", 1, 2)]
    assert [each.version for each in found] == [4, 4]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ ramp(10, 2) }}", ["10", "12", "14"]),
        ("{{ ramp(10, 2) }} {{ ramp(0, -1) }}", ["10 0", "12 -1", "14 -2"]),
        ("{{ walk(5, 0) }} {{ ramp(1, 1) }}", ["5.0 1", "5.0 2", "5.0 3"]),
        ("{% if number != 2 %}{{ ramp(1, 1) }}{% endif %}", ["1", "", "2"]),
    ],
)
def test_a_ramp_goes_on_from_message_to_message_each_of_its_calls_for_itself(text: str, expected: list[str]) -> None:
    assert rendered(text, 1, 2, 3) == expected


def test_a_walk_takes_steps_and_stays_between_its_bounds() -> None:
    values = [float(text) for text in rendered("{{ walk(20, 3, 18, 22) }}", *range(1, 501))]
    assert values[0] == 20
    steps = [abs(b - a) for a, b in itertools.pairwise(values)]
    assert 2.5 < max(steps) <= 3
    assert (min(values), max(values)) == (18, 22)
    free = [float(text) for text in rendered("{{ walk(20, 3) }}", *range(1, 501))]
    assert min(free) < 18
    assert max(free) > 22


def test_two_walks_of_a_message_go_their_own_ways() -> None:
    first, second = zip(
        *(text.split() for text in rendered("{{ walk(0, 1) }} {{ walk(100, 1) }}", 1, 2, 3)), strict=True
    )
    assert max(map(float, first)) < 10 < 90 < min(map(float, second))


@pytest.mark.parametrize("interval_s", [0.5, 2.0])
def test_a_wave_is_that_of_the_schedule(interval_s: float) -> None:
    context = TemplateContext("thing_7", 1, interval_s)
    phase = context._phase
    texts = rendered("{{ sine(10, 18, 22) }}", *range(1, 42), interval_s=interval_s)
    expected = [20 + 2 * math.sin(math.tau * (number * interval_s / 10 + phase)) for number in range(1, 42)]
    assert [float(text) for text in texts] == pytest.approx(expected)
    period = int(10 / interval_s)
    assert float(texts[0]) == pytest.approx(float(texts[period]))


def test_lines_as_they_come_are_a_second_apart_for_a_wave() -> None:
    text = "{{ sine(10, 18, 22) }}"
    assert rendered(text, 1, 2, 3, interval_s=0.0) == rendered(text, 1, 2, 3, interval_s=1.0)


def test_a_seed_gives_each_thing_its_own_values_and_the_same_again() -> None:
    text = "{{ uniform(0, 1) }} {{ walk(0, 1) }} {{ sine(9, 0, 1) }} {{ uuid() }}"
    assert rendered(text, 1, 2) == rendered(text, 1, 2)
    assert rendered(text, 1) != rendered(text, 1, seed=2)
    assert rendered(text, 1) != rendered(text, 1, thing="thing_8")
    assert rendered(text, 1, seed=None) != rendered(text, 1, seed=None)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a\n{{ b", 2, "unexpected end of template"),
        ("a\n\n{{ nobody }}", 3, "unknown name 'nobody'"),
        ("{{ 1 / 0 }}", 1, "division by zero"),
        ("{{ choice(5) }}", 1, "choice needs values"),
        ("a\n{{ thing_name.nothing }}", 2, "has no attribute 'nothing'"),
        ("{{ thing_name.__class__.__mro__ }}", 1, "unsafe"),
        ("{{ [1]|random }}", 1, "No filter named 'random'"),
        ("{{ lipsum() }}", 1, "unknown name 'lipsum'"),
        ("a\n{% if number %}\n{{ randint(2, 1) }}{% endif %}", 3, "the lower one first"),
        ("{{ raise_it() }}", 1, "unknown name 'raise_it'"),
    ],
)
def test_where_a_template_failed_is_said(text: str, line: int, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        rendered(text)
    assert raised.value.cause.startswith(f"the template failed: line {line}: ")
    assert words in raised.value.cause


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ walk(1) }}", "walk() missing 1 required positional argument: 'step'"),
        ("{{ walk(1, 2, 3, 4, 5) }}", "walk() takes from 2 to 4 positional arguments but 5 were given"),
        ("{{ uniform(1) }}", "uniform() missing 1 required positional argument: 'b'"),
        ("{{ uuid(1) }}", "uuid() takes 0 positional arguments but 1 was given"),
        ("{{ choice() }}", "choice needs values, or a list of them"),
        ("{{ choice(5) }}", "choice needs values, or a list of them"),
        ("{{ walk ~ 1 }}", "walk is a function: write its arguments in parentheses"),
        ("{{ walk }}", "walk is a function: write its arguments in parentheses"),
        ("{{ 1 | batch }}", "batch() missing 1 required positional argument: 'linecount'"),
        ("{{ [1] | map('string') }}", "`| list` makes a list of what map and select give"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "it nests too deep, or is too large"),
    ],
)
def test_why_a_template_failed_is_said_without_names_of_the_program(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        rendered(text)
    assert raised.value.cause == f"the template failed: line 1: {words}" or raised.value.cause.endswith(words)
    assert not re.search("_|<|locals", raised.value.cause)


NS = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "text",
    [
        "{{ 9 ** (9 ** 9) }}",
        "{{ 10 ** 4000 * 10 ** 4000 }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** 9 * [0] }}",
        "{{ range(10 ** 9) }}",
        "{{ " + "1e" * 60000 + " }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ '	'.expandtabs(tabsize=10 ** 9) }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{{ 'x' | indent(width='x' * 9999) }}",
        "{{ [1] | batch(10 ** 9, 0) | list }}",
        "{{ 1 | round(-10 ** 9) }}",
        "{{ [1] | tojson(indent=10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
        "{{ '%.1000000000f' | format(1) }}",
        "{{ ('%(a)s' * 20000) % {'a': 'x' * 100000} }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
        "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
        "{{ ('{0}' * 20000).format('x' * 100000) }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999).join('b' * 9999) }}",
        "{{ range(9999) | map('string') | join('a' * 9999) }}",
        "{{ 1 | attr('to_bytes')(10 ** 9, 'big') }}",
        "{{ 'a'.translate({97: 'b' * 9999}) }}",
        *(
            NS.replace("START", start).replace("STEP", step)
            for start, step in (
                ("'x'", "ns.x ~ ns.x"),
                ("'x'", "ns.x + ns.x"),
                ("2", "ns.x * ns.x"),
                ("[1]", "[ns.x, ns.x]"),
                ("1", "(ns.x, ns.x)"),
                ("1", "{'a': ns.x, 'b': ns.x}"),
                ("1", "namespace(a=ns.x, b=ns.x)"),
            )
        ),
        NS.replace("START", "'x'").replace("= STEP %}", "%}{{ ns.x }}{{ ns.x }}{% endset %}"),
        "{% macro m() %}{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}{% endmacro %}{{ m() }}",
    ],
)
def test_no_step_of_a_template_makes_what_is_much_larger_than_a_message(text: str) -> None:
    """Or it would hold the interpreter, and Ctrl-C would not get through."""
    began = time.process_time()
    with pytest.raises(UsageError, match="the template failed: line 1: "):
        rendered(text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ '%03d' % 5 }} {{ '%5.1f|%-4s|%%' % (2.25, 'a') }} {{ '%(a)s' % {'a': 1} }}", "005   2.2|a   |% 1"),
        ("{{ '{0:>6.2f} {a} {0!r}'.format(3.14159, a='b') }} {{ '{a}'.format_map({'a': 1}) }}", "  3.14 b 3.14159 1"),
        (
            "{{ '7'.zfill(3) }} {{ 'a' ~ 1 ~ [2] }} {{ [1] + [2] }} {{ 'ab' * 2 }} {{ 2 ** 10 }}",
            "007 a1[2] [1, 2] abab 1024",
        ),
        ("{{ ','.join(['a', 'b']) }} {{ range(3) | join('-') }} {{ 'x-y'.replace('-', '+') }}", "a,b 0-1-2 x+y"),
        ("{{ true }} {{ none }} {{ ['é', none] }} {{ {'a': (1, 2.5)} }}", 'true null ["é", null] {"a": [1, 2.5]}'),
        ("{% for a, b in [(1, 2)] %}{{ a }}{{ b }}{% endfor %}{% set c, d = 3, 4 %}{{ c }}{{ d }}", "1234"),
        ("{% set x %}{{ 1 }}2{% endset %}{{ x }}{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(3) }}", "12<3>"),
        ("{{ [3, 1] | sort | first }} {{ 2.567 | round(1) }} {{ [1, 2] | map('string') | list }}", '1 2.6 ["1", "2"]'),
    ],
)
def test_what_templates_do_every_day_has_room(text: str, expected: str) -> None:
    assert rendered(text) == [expected]


def test_the_first_unknown_name_is_told_with_those_that_are_known() -> None:
    with pytest.raises(UsageError) as raised:
        rendered("{{ number }}\n{{ first }}\n{{ second }}")
    assert "line 2: unknown name 'first'" in raised.value.cause
    names = raised.value.remedy.removeprefix("use one of ").split(", ")
    assert {"choice", "gauss", "now", "now_ms", "number", "ramp", "range", "sine", "thing_name", "walk"} <= {*names}
    assert names == sorted(names)


def test_a_template_that_is_not_utf_8_or_very_long_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the template is too long: 600,000 bytes"):
        Template(b" " * 600_000, PayloadBuilder, lambda thing: TemplateContext(thing, 1, 1.0))
    with pytest.raises(UsageError, match=r"the template failed: line 1: .*utf-8"):
        Template(b"\xff", PayloadBuilder, lambda thing: TemplateContext(thing, 1, 1.0))


@pytest.mark.parametrize("text", ["{{ 'x' * 100 }}", "{% for n in range(100) %}x{% endfor %}"])
def test_what_a_template_gives_may_be_as_long_as_a_message(limits: Limits, text: str) -> None:
    limits(MAX_PAYLOAD_BYTES=100)
    assert rendered(text) == ["x" * 100]


def test_what_gets_too_long_is_not_made_to_its_end(limits: Limits) -> None:
    limits(MAX_PAYLOAD_BYTES=100)
    with pytest.raises(UsageError, match="the message is too long: over 100 bytes"):
        rendered("{% for n in range(10000) %}{% for m in range(10000) %}x{% endfor %}{% endfor %}")


def test_what_a_template_gives_is_sent_as_its_builder_makes_it() -> None:
    numbers: list[int] = []

    class Context(TemplateContext):
        def names(self, number: int) -> dict[str, Any]:
            numbers.append(number)
            return super().names(number)

    contexts = {thing: Context(thing, 1, 1.0) for thing in ("", "thing_1", "thing_2")}
    template = Template(b'{"n": {{ ramp(1, 1) }}}', PayloadBuilder.of_object, contexts.__getitem__)
    payloads = [template.payload("elf/x", thing, 5) for thing in ("thing_1", "thing_2", "thing_1")]
    assert [json.loads(payload)["n"] for payload in payloads] == [1, 1, 2]
    assert all("ts" in json.loads(payload) for payload in payloads)
    assert numbers == [1, 5, 5, 5]


def test_what_a_template_gives_may_be_refused() -> None:
    template = Template(b"[]", PayloadBuilder.of_object, lambda thing: TemplateContext(thing, 1, 1.0))
    with pytest.raises(ValueError, match="not a JSON object"):
        template.payload("elf/x", "thing_0", 1)
