"""What begins with { means the same as MESSAGE, as FILE and as a line, with --template and without."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import elf
from elf import Cli
from iot_elf.errors import UsageError
from iot_elf.messages import Line
from iot_elf.state import READY, Thing

from .stand_ins import logged

WAYS = ("MESSAGE", "FILE", "line")
OBJECT, TEXT, ERROR = "object", "text", "error"
VARIES = '{%% if number == %d %%}x{%% else %%}{"t": {{ number }}}{%% endif %%}'


def kinds(given: str, way: str, tmp_path: Path, *options: str) -> tuple[str, str]:
    """What thing_0 sends as its messages 1 to 3, and the warnings before."""
    path = tmp_path / ("message.jsonl" if way == "line" else "message.json")
    path.write_bytes(given.encode())
    what = ["-m", given] if way == "MESSAGE" else ["--json-message", str(path)]
    cli: Any = elf.build_parser().parse_args(["send", *options, *what], Cli())
    cli.events = elf.EventQueue()
    thing = Thing("thing_0", stage=READY)
    cli.fleet = SimpleNamespace(things={thing.name: thing}, ready=[thing])
    found: list[str] = []
    with logged() as said:
        try:
            line = next(elf.load_messages(cli)[1])
        except UsageError:
            return ERROR, ""
        for number in (1, 2, 3):
            found.append(kind(line, number))
    return " ".join(dict.fromkeys(found)), " ".join(text for text in said if text.startswith("WARNING"))


def kind(line: Line, number: int) -> str:
    assert line.message
    try:
        sent = json.loads(line.message.payload("elf/thing_0", "thing_0", number))
    except (UsageError, ValueError):
        return ERROR
    del sent["ts"]
    return TEXT if "msg" in sent else OBJECT


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("given", "as_message", "as_file", "as_line", "hint"),
    [
        ('{"t": 20}', OBJECT, OBJECT, OBJECT, ""),
        (' {"t": 20}\r\n', OBJECT, OBJECT, OBJECT, ""),
        ('\ufeff{"t": 20}', OBJECT, OBJECT, OBJECT, ""),
        ('\ufeff {"t": 20}\r\n', OBJECT, OBJECT, OBJECT, ""),
        ('{"t": 20', TEXT, ERROR, ERROR, "looks like a JSON object but is invalid"),
        ('\ufeff{"t": 20', TEXT, ERROR, ERROR, "looks like a JSON object but is invalid"),
        ('{"t": NaN}', TEXT, ERROR, ERROR, "NaN is not JSON"),
        ("{thing-name}", TEXT, ERROR, ERROR, "--template"),
        ('{"t": {{ number }}}', TEXT, ERROR, ERROR, "--template"),
        ('{"t": "{{ number }}"}', OBJECT, OBJECT, OBJECT, "--template"),
        ("hello", TEXT, ERROR, TEXT, ""),
        ("[1]", TEXT, ERROR, TEXT, ""),
    ],
)
def test_what_is_an_object_is_sent_as_that_object(
    given: str, as_message: str, as_file: str, as_line: str, hint: str, way: str, tmp_path: Path
) -> None:
    found, said = kinds(given, way, tmp_path)
    assert found == dict(zip(WAYS, (as_message, as_file, as_line), strict=True))[way]
    assert (hint in said and bool(said) == bool(hint)) if way == "MESSAGE" else not said


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("given", "as_message", "as_file_or_line", "hint"),
    [
        ('{"t": {{ number }}}', OBJECT, OBJECT, ""),
        ('{"t": {{ number }}}\r\n', OBJECT, OBJECT, ""),
        ('\ufeff{"t": {{ number }}}', OBJECT, OBJECT, ""),
        ('{"t": {{ choice(true, false) }}, "u": {{ none }}, "v": {{ [thing_name] }}}', OBJECT, OBJECT, ""),
        ('{{ {"t": number} | tojson }}', OBJECT, OBJECT, ""),
        ('{{ {"t": number} }}', OBJECT, OBJECT, ""),
        ('{"t": {{ number }}', TEXT, ERROR, "looks like a JSON object but is invalid (once rendered)"),
        ("{{ number }}", TEXT, TEXT, ""),
        ("hello {{ number }}", TEXT, TEXT, ""),
        (VARIES % 2, f"{OBJECT} {ERROR}", f"{OBJECT} {ERROR}", ""),
        (VARIES % 1, f"{TEXT} {ERROR}", f"{TEXT} {ERROR}", ""),
    ],
)
def test_the_first_result_of_a_template_decides_what_all_are(
    given: str, as_message: str, as_file_or_line: str, hint: str, way: str, tmp_path: Path
) -> None:
    found, said = kinds(given, way, tmp_path, "--template")
    assert found == (as_message if way == "MESSAGE" else as_file_or_line)
    assert (hint in said and bool(said) == bool(hint)) if way == "MESSAGE" else not said
