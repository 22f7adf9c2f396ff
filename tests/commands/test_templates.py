"""Templates: what things say differs from thing to thing and from message to message, as real devices' data does."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.failures import Explained
from support.mqtt import Client
from support.program import ROOT
from support.shell import InProcess, Pair

EXAMPLE = ROOT / "example-template.json"
QUICK = ("--interval", "0.01", "--template")


def messages_of(client: Client, thing: str) -> list[dict[str, Any]]:
    """What a thing has sent until now, in order and without ts."""
    heard = [json.loads(each.payload) for each in client.hear_all() if each.topic == f"elf/{thing}"]
    for message in heard:
        assert float(message.pop("ts")) > 0
    return heard


def test_the_example_is_a_device_whose_temperature_walks(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    main_of_pair("send", *pair.to_broker, *QUICK, "-n", 20, "--seed", 1, "--json-message", EXAMPLE)
    messages = messages_of(ear, "thing_1")
    assert [message["count"] for message in messages] == list(range(1, 21))
    assert {message["name"] for message in messages} == {"thing_1"}
    assert {message["state"] for message in messages} <= {"open", "closed"}
    walk = [message["temperature"] for message in messages]
    assert 15 <= walk[0] <= 25 and len(set(walk)) > 10
    assert all(isinstance(value, float) for value in walk)  # a rule may take the type from the first
    assert max(abs(after - before) for before, after in itertools.pairwise(walk)) <= 0.51


EACH = (
    '{"name": "{{ thing_name }}", "n": [{{ thing_number }}, {{ number }}], "now": [{{ now }}, {{ now_ms }}],'
    '"random": [{{ uniform(1, 2) }}, {{ gauss(0, 1) }}, {{ randint(3, 4) }}, {{ choice(5, 6) }}, {{ choice([7]) }}],'
    '"id": "{{ uuid() }}", "ramps": [{{ ramp(1, 2) }}, {{ ramp(5, -1) }}], "walk": {{ walk(1, 5, 0, 2) }},'
    """"text": ["{{ '{:.1f}'.format(now_ms) }}", "{{ '%d-%s' % (now_ms, thing_name.upper() ~ '!') }}"],"""
    '"sine": {{ sine(0.04, 10, 20) }}, "loop": [{% for x in range(3) %}{{ loop.last | int }},{% endfor %}0]}'
)


def test_each_name_has_its_value(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    main_of_pair("send", *pair.to_broker, *QUICK, "-n", 9, EACH)
    messages = messages_of(ear, "thing_1")
    assert [message["n"] for message in messages] == [[1, number] for number in range(1, 10)]
    assert [message["ramps"] for message in messages] == [[1 + 2 * step, 5 - step] for step in range(9)]
    for message in messages:
        a, _, b, c, d = message["random"]
        assert 1 <= a <= 2 and b in (3, 4) and c in (5, 6) and d == 7
        assert message["loop"] == [0, 0, 1, 0]
        assert uuid.UUID(message["id"]).version == 4
        assert 0 <= message["walk"] <= 2
        now_ms = message["now"][1]
        assert message["text"] == [f"{now_ms}.0", f"{now_ms}-THING_1!"]
        assert abs(1000 * message["now"][0] - message["now"][1]) < 2
    assert messages[0]["sine"] == pytest.approx(messages[4]["sine"])  # a period later
    assert messages[0]["sine"] + messages[2]["sine"] == pytest.approx(30)  # half a period later


def test_a_seed_gives_the_same_data_again_whatever_the_timing(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    text = EACH.replace('"now": [{{ now }}, {{ now_ms }}],', "").replace("now_ms", "number")
    said = []
    for options in (("--seed", 7), ("--seed", 7, "--qos", 0), ("--seed", 8)):
        main_of_pair("send", *pair.to_broker, *QUICK, "-n", 3, *options, text)
        heard = [json.loads(each.payload) for each in ear.hear_all()]
        for message in heard:
            del message["ts"]
        said.append({name: [each for each in heard if each["name"] == name] for name in ("thing_0", "thing_1")})
    assert said[0] == said[1] != said[2]
    assert said[0]["thing_0"][0]["sine"] != said[0]["thing_1"][0]["sine"]


def test_lines_are_templates_whose_values_go_on(pair: Pair, ear: Client) -> None:
    feed = b'{"n": {{ ramp(1, 1) }}}\n\nplain {{ number }}\n{{ oops }}\n{"n": {{ ramp(1, 1) }}}\n'
    result = pair("send", *pair.to_broker, "--template", "--json-message", "-", feed=feed, status=1)
    assert messages_of(ear, "thing_0") == [{"n": 1}, {"msg": "plain 2"}, {"n": 2}]
    assert any("line 4 is not sent: the template failed: line 1: unknown name 'oops'" in line for line in result.lines)


def test_raw_results_go_out_as_they_are(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    main_of_pair("send", *pair.to_broker, *QUICK, "--raw", "-n", 1, "{{ number }},\n")
    assert [heard.payload for heard in ear.hear_all()] == [b"1,\n"] * 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\n{{ nme }}", "line 2: unknown name 'nme'"),
        ("{% if number > 5 %}\n{{ nme }}{% endif %}", "line 2: unknown name 'nme'"),
        ("{% if %}", "line 1: Expected an expression"),
        ("\n\n{{ 1 / 0 }}", "line 3: division by zero"),
        ("{% for x in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}", "line 1: "),
        ("{% for x in range(50000) %}{{ 'xxxxxxxx' }}{% endfor %}", "the message is too long"),
        ("{{ [1].extend([2]) }}", "line 1: access to attribute 'extend' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "line 1: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ walk.__globals__ }}", "line 1: access to attribute '__globals__'"),
        ("{% include 'elf.py' %}", "line 1: no loader"),
        ("{{ [1, 2] | random }}", "line 1: No filter named 'random'"),
        ("{{ lipsum() }}", "line 1: unknown name 'lipsum'"),
        ("{{ walk(1) }}", "line 1: walk() missing"),
        ("{{ 9 ** (9 ** 9) }}", "line 1: a number has more than 4,300 digits"),
    ],
)
def test_a_template_that_does_not_work_is_refused_before_anything_connects(
    main_of_pair: InProcess, pair: Pair, text: str, reason: str, explained: Explained
) -> None:
    result = main_of_pair("send", *pair.to_broker, *QUICK, text, status=2)
    explained(result, "MessageTooLong" if "too long" in reason else "TemplateFails", reason)
    assert len(result.lines) == 2


ENDLESS = "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("text", [ENDLESS, f"{{% if number > 1 %}}{ENDLESS}{{% endif %}}one"])
def test_two_ctrl_c_end_a_template_that_does_not_end(pair: Pair, text: str) -> None:
    """Before anything connects, and while things send."""
    window = pair.start("send", *pair.to_broker, *QUICK, "-n", 2, text)
    while psutil.Process(window.process.pid).cpu_times().user < 2:  # more than ELF takes to begin
        assert window.process.poll() is None
        time.sleep(0.1)
    window.signal(signal.SIGINT)
    time.sleep(0.5)
    assert window.process.poll() is None, "the first one only asks"
    window.signal(signal.SIGINT)
    began = time.monotonic()
    assert window.end(130).lines[-1] == "stopped"
    assert time.monotonic() - began < 6


def test_a_message_whose_template_fails_is_counted_and_the_others_go_out(
    main_of_pair: InProcess, pair: Pair, ear: Client, explained: Explained
) -> None:
    text = '{"n": {{ 12 // (number - 2) }}}'
    result = main_of_pair("send", *pair.to_broker, *QUICK, "-n", 3, "--output", "json", text, status=1)
    assert messages_of(ear, "thing_0") == [{"n": -12}, {"n": 12}]
    assert [line for line in result.lines if "message 2 of" in line] == [
        f"message 2 of {name} is not sent: the template failed: line 1: integer division or modulo by zero"
        for name in ("thing_0", "thing_1")
    ]
    summary = json.loads(result.out.splitlines()[-1])
    assert (summary["sent"], summary["acknowledged"], summary["notSent"]) == (4, 4, 2)
    explained(result, "TemplateFails", "the template failed: line 1: integer division")
    assert result.lines[-2].endswith("by zero (2 messages not sent)")
    assert "check the network" not in result.err


def test_an_object_of_a_template_may_take_several_lines_of_a_file_but_not_of_a_stream(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path
) -> None:
    for name, status in (("message.json", 0), ("messages.jsonl", 2)):
        (tmp_path / name).write_text('{"n": {{ number }},\n "b": [1]}\n')
        main_of_pair("send", *pair.to_broker, *QUICK, "-n", 1, "--json-message", tmp_path / name, status=status)
    assert messages_of(ear, "thing_0") == [{"n": 1, "b": [1]}]


def test_an_object_of_a_template_that_is_broken_is_not_sent_as_text(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path, explained: Explained
) -> None:
    file = tmp_path / "message.json"
    file.write_text('{"n": {{ number }}')
    result = main_of_pair("send", *pair.to_broker, *QUICK, "--json-message", file, status=2)
    explained(result, "MessageFileInvalid", file)
    file.write_text('{"n": {{ "" if number == 2 else number }}}')
    result = main_of_pair("send", *pair.to_broker, *QUICK, "-n", 3, "--json-message", file, status=1)
    assert "message 2 of thing_0 is not sent: Expecting value" in result.err
    explained(result, "NotAnObject", "Expecting value, column 7 (2 messages not sent)")
    assert messages_of(ear, "thing_0") == [{"n": 1}, {"n": 3}]
    file.write_text('{% if number == 2 %}{"n": 2}{% else %}text{% endif %}')
    result = main_of_pair("send", *pair.to_broker, *QUICK, "-n", 3, "--json-message", file, status=1)
    explained(result, "TemplateVaries", "this one is a JSON object, and the first was a text")
    assert result.lines[-2].endswith("(2 messages not sent)")
    assert messages_of(ear, "thing_0") == [{"msg": "text"}] * 2


@pytest.mark.parametrize(
    "options", [("--seed", 1, "hello"), ("--template",), ("--template", "--seed", "x", "{{ now }}")]
)
def test_options_of_templates_without_a_template_are_wrong_usage(
    main_of_pair: InProcess, options: tuple[object, ...]
) -> None:
    assert "error: " in main_of_pair("send", *options, status=2).err


def test_jinja2_is_imported_when_a_template_is_given_alone(tmp_path: Path) -> None:
    code = "import elf, sys; elf.main(['--help']); print('jinja2' in sys.modules, file=sys.stderr)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "usage: " in done.stdout
    assert done.stderr.strip() == "False"
