"""What recordings are: CSV, and events of received messages; which thing sends a row, where to, and when it is due."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.program import Limits

from iot_elf import replay
from iot_elf.errors import ElfError, UsageError
from iot_elf.messages import Line, PayloadBuilder
from iot_elf.replay import Plan
from iot_elf.runners import Pace

from .stand_ins import logged

TOPICS = {"thing_0": "elf/thing_0", "thing_1": "elf/thing_1"}


def briefly(value: str | bytes) -> str:
    """How a value is called in the name of a test."""
    return repr(value[-40:])


def compose(content: bytes) -> PayloadBuilder:
    PayloadBuilder.of_object(content)
    return PayloadBuilder(content)


def read(directory: Path, content: bytes | str, **plan: object) -> list[Line]:
    path = directory / "recording"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    *lines, end = replay.read(path, Plan(**{"topics": TOPICS, "compose": compose, **plan}))  # type: ignore[arg-type]
    assert end in (Line(), lines[-1:] and lines[-1])
    return lines


def facts(line: Line) -> tuple[int, str]:
    """The number of a line, and its payload or why it has none."""
    if isinstance(line.error, ElfError):
        return line.number, line.error.cause
    assert line.message
    return line.number, line.message.payload("", line.thing, 1).decode("utf-8", "backslashreplace")


# CSV


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("a,b\n1,x\n", [(2, '{"a": 1, "b": "x"}')]),
        ("a;b\n1,5;x\n", [(2, '{"a": "1,5", "b": "x"}')]),
        ("a\tb\n1\tx, y; z\n", [(2, '{"a": 1, "b": "x, y; z"}')]),
        ("a\tb, c\n1\t2,5\n", [(2, '{"a": 1, "b, c": "2,5"}')]),  # as often as a comma
        ('"a,b,c";d\n1;2\n', [(2, '{"a,b,c": 1, "d": 2}')]),
        ("a\n20.50\n", [(2, '{"a": 20.50}')]),
        ("\ufeffa,b\r\n1,2\r\n", [(2, '{"a": 1, "b": 2}')]),
        ("\n\n a , b\n 1 , x \n", [(4, '{"a": 1, "b": " x "}')]),
        ("a,b\n1,\n,\n\n,2", [(2, '{"a": 1}'), (5, '{"b": 2}')]),  # what is empty is left out
        ('a,b\n"x\ny",1\n"say ""hi""",2\n', [(2, '{"a": "x\\ny", "b": 1}'), (4, '{"a": "say \\"hi\\"", "b": 2}')]),
        ("a,ü\n°C,ß\n", [(2, '{"a": "°C", "ü": "ß"}')]),
        ('a,b\n"007","1"\n', [(2, '{"a": "007", "b": 1}')]),
    ],
)
def test_a_row_of_csv_is_an_object_of_its_columns(tmp_path: Path, content: str, rows: list[tuple[int, str]]) -> None:
    assert [facts(line) for line in read(tmp_path, content)] == rows


@pytest.mark.parametrize(
    ("cell", "is_number"),
    [
        *((number, True) for number in ("0", "-1", "1e5", "2.5E-3", "-0.0", "12345678901234567890", "1e999")),
        *((text, False) for text in ("007", ".5", "5.", "+1", "NaN", "Infinity", "0x1", "1_000", "true", "٣", "1 2")),
    ],
)
def test_what_is_a_number_in_json_is_one_with_its_text(tmp_path: Path, cell: str, is_number: bool) -> None:
    (line,) = read(tmp_path, f"a\n{cell}\n")
    assert facts(line)[1] == f'{{"a": {cell if is_number else json.dumps(cell, ensure_ascii=False)}}}'


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"1,2,3", "it has 3 cells, and the heading 2"),
        (b"1", "it has 1 cell, and the heading 2"),
        (b'1,"x"y', "it is not CSV: "),
        (b"1,2\r3,4", "it is not CSV: new-line character seen in unquoted field"),
        (b"1,caf\xe9", "it is not UTF-8"),
        (b"1," + b"x" * 140_000, "the message is too long: 140,017 bytes"),
        (b"1," + b"x" * 1_100_000, "the line is too long: 1,100,002 bytes, and ELF reads 1,048,576"),
    ],
    ids=briefly,
)
def test_a_row_that_can_not_be_sent_is_said_by_its_line_and_the_next_is_read(
    tmp_path: Path, row: bytes, why: str
) -> None:
    before, refused, after = read(tmp_path, b'a,b\n"x\ny",1\n' + row + b"\n2,3\n")
    assert [line.number for line in (before, refused, after)] == [2, 4, 5]
    assert facts(refused)[1].startswith(why) and "newline" not in facts(refused)[1]
    assert isinstance(refused.error, UsageError)
    assert facts(after) == (5, '{"a": 2, "b": 3}')


def test_a_quote_that_is_not_closed_takes_a_mebibyte_at_most(tmp_path: Path, limits: Limits) -> None:
    limits(MAX_ROW_BYTES=40)
    lines = read(tmp_path, 'a,b\n1,"x\n' + "2,y\n" * 20)
    assert facts(lines[0]) == (2, "the row does not end within 1 MiB")
    assert {facts(line)[1] for line in lines[1:]} == {'{"a": 2, "b": "y"}'}
    (line,) = read(tmp_path, 'a,b\n1,"x\n')
    assert facts(line)[1].startswith("it is not CSV: unexpected end of data")


@pytest.mark.parametrize(
    ("content", "plan", "name", "why"),
    [
        ("", {}, "MessageFileInvalid", "it contains no row, and no received message"),
        ("a,b\n", {}, "MessageFileInvalid", "it contains no row, and no received message"),
        ("\n20.5,21\n", {}, "RecordingInvalid", "line 2 of .*column 1 of the heading has the name '20.5'"),
        ("a,b,a\n1,2,3\n", {}, "RecordingInvalid", "line 1 of .*column 3 of the heading has the name 'a'"),
        ("a,b,\n1,2,3\n", {}, "RecordingInvalid", "column 3 of the heading has the name ''"),
        ('"a\n', {}, "RecordingInvalid", "unexpected end of data"),
        (b"\xff\xfea\0,\0b\0\n\0", {}, "RecordingInvalid", "line 1 of .*it is not UTF-8"),
        ("a,b\n1,2\n", {"by": "c"}, "NoSuchColumn", "there is no column 'c'"),
        ("a,b\n1,2\n", {"topics": {"thing_0": "x/{km/h}"}}, "NoSuchColumn", "there is no column 'km/h'"),
        ("a,b\n1,2\n", {"time": "at"}, "NoSuchColumn", "there is no column 'at'"),
        ("a,b\n1,2\n", {"topics": {"thing_0": "x/{a}/{c}"}}, "NoSuchColumn", "there is no column 'c'"),
        ('{"temperature": 20}\n', {}, "RecordingInvalid", "it is not an event"),
        ("{}\n", {"by": "a"}, "RecordingInvalid", "it is not an event"),
        ('{"event": "summary"}\n', {"by": "a"}, "RecordingFixed", "--by does not work"),
        ('{"event": "summary"}\n', {"fixed": ["--topic"]}, "RecordingFixed", "--topic does not work"),
        (
            '{"event": "summary"}\n',
            {"by": "topic"},
            "MessageFileInvalid",
            "it contains no row, and no received message",
        ),
    ],
)
def test_a_file_that_is_no_recording_is_refused(
    tmp_path: Path, content: str | bytes, plan: dict[str, object], name: str, why: str
) -> None:
    with pytest.raises(UsageError, match=why) as raised:
        read(tmp_path, content, **plan)
    assert raised.value.name == name
    with pytest.raises(UsageError, match=r"could not read .*none: No such file"):
        next(replay.read(tmp_path / "none", Plan(TOPICS, compose)))


def test_things_take_rows_in_turn_or_each_is_one_device_in_order_of_appearance(tmp_path: Path) -> None:
    rows = "d,n\nb,1\na,2\nb,3\n"
    assert [line.thing for line in read(tmp_path, rows)] == ["thing_0", "thing_1", "thing_0"]
    lines = read(tmp_path, rows + "a,4\n,5\nc,6\na,7\n", by="d")
    assert [line.thing for line in lines] == ["thing_0", "thing_1", "thing_0", "thing_1", "", ""]
    assert facts(lines[4]) == (6, "'d' is empty, and names no device")
    assert facts(lines[5]) == (7, "'c' is one device too many for 2 things")  # and no line comes after it
    assert not isinstance(lines[5].error, UsageError)


def test_columns_can_be_in_the_topic_which_is_checked(tmp_path: Path) -> None:
    rows = ["n,1", "a/b,2", "+,3", "#,4", ",5", "x" * 260 + ",6", "$aws,7", "ü x,8"]
    topics = dict.fromkeys(TOPICS, "{kind}/it/{n}")
    lines = read(tmp_path, "\n".join(["kind,n", *rows]), topics=topics)
    sent = [line.message.topic for line in lines if line.message]
    assert sent == ["n/it/1", "ü x/it/8"]
    why = [facts(line)[1] for line in lines if line.error]
    assert [each.partition(" can't be in a topic")[0] for each in why[:4]] == [
        "the value 'a/b' of 'kind'",
        "the value '+' of 'kind'",
        "the value '#' of 'kind'",
        "the value '' of 'kind'",
    ]
    assert why[4].startswith("the topic is longer than AWS IoT's 256 bytes: 'xxx")
    assert why[5].startswith("this topic is reserved")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        (" 1700000000.25 ", 1700000000.25),
        ("1.7e9", 1.7e9),
        ("-1.5", -1.5),
        ("2023-11-14T22:13:20Z", 1700000000),
        ("2023-11-14 22:13:20", 1700000000),  # UTC
        ("2023-11-14t22:13:20.5z", 1700000000.5),
        ("2023-11-14T22:13:20,123456789Z", 1700000000.123456789),
        ("2023-11-14T23:13:20.5+01:00", 1700000000.5),
        ("2023-11-14 17:43:20 -0430", 1700000000),
        ("2023-11-14T23:13+01", 1699999980),
        ("2023-11-14", 1699920000),
        *((text, None) for text in ("", "now", "1700000000000", "1e999", "NaN", "2023-13-01", "2023-11-14T25:00")),
        *((text, None) for text in ("20231114T221320Z", "2023-W46-2", "22:13:20", "2023-11-14T22:13:20+99")),
    ],
)
def test_times_are_seconds_since_1970_or_iso_8601(tmp_path: Path, text: str, seconds: float | None) -> None:
    (line,) = read(tmp_path, f'at,n\n"{text}",1\n', time="at")
    if seconds is None:
        assert "is not a time in seconds since 1970, or in ISO 8601" in facts(line)[1]
    else:
        assert line.recorded_s == pytest.approx(seconds, abs=1e-6)


# What was received


def event(topic: str | None, payload: str | None, thing: str = "thing_5", **more: object) -> str:
    return json.dumps(
        {"event": "received", "thingName": thing, "topic": topic, "time": 1700000000.5, "payload": payload, **more}
    )


def test_what_the_first_receiver_got_is_sent_as_it_was_each_topic_by_one_thing(tmp_path: Path) -> None:
    content = [
        '{"event": "other"}',
        event("a/1", '{"t":  20.50}\n'),
        event("a/1", '{"t":  20.50}\n', thing="thing_0"),  # another receiver
        event("b", "", thing="thing_0"),
        event("b", ""),
        event("a/1", None, payloadBase64="/wA="),
        '{"event": "summary", "received": 4}',
    ]
    with logged() as said:
        lines = read(tmp_path, "\n".join(content))
    assert [line for line in said if "received" in line] == [
        "INFO sending only what thing_5 received, not what other things did"
    ]
    sent = [(line.thing, line.message.topic, line.message.payload("", "", 1)) for line in lines if line.message]
    assert sent == [("thing_0", "a/1", b'{"t":  20.50}\n'), ("thing_1", "b", b""), ("thing_0", "a/1", b"\xff\0")]
    assert [(line.number, line.recorded_s) for line in lines] == [(number, 1700000000.5) for number in (2, 5, 6)]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (event("a", "x")[:-9], "it is not an event"),
        ("text", "it is not an event"),
        ("\n", "it is not an event"),
        (event("a", None), "the event has no topic or no payload"),
        (event(None, "x"), "the event has no topic or no payload"),
        (event("a", None, payloadBase64="%%%"), "the event has no topic or no payload"),
        (event("$aws/things/x/shadow/update/accepted", "x"), "this topic is reserved"),
        (event("a", "***", redacted=True), "a credential in the message was replaced"),
        (event("a", "x", time="soon"), "'soon' is not a time"),
        (event("a", "x" * 140_000), "the message is too long"),
        (event("a", "\ud800"), "the message or topic is not UTF-8"),
    ],
    ids=briefly,
)
def test_an_event_that_can_not_be_sent_is_said_by_its_line(tmp_path: Path, bad: str, why: str) -> None:
    lines = read(tmp_path, "\n".join([event("a", "1"), bad, event("a", "2")]))
    assert [line.number for line in lines if line.message] == [1, lines[-1].number]
    assert facts(lines[1])[0] == 2 and facts(lines[1])[1].startswith(why)


def test_a_payload_of_128_kib_has_room_in_an_event(tmp_path: Path) -> None:
    (line,) = read(tmp_path, event("a", "\x01" * 128 * 1024))
    assert facts(line)[1] == "\x01" * 128 * 1024


# When lines are due


@pytest.mark.parametrize(
    ("interval_s", "keeps_times", "rows", "due"),
    [
        # thing, when it was recorded, when it came
        (
            0.0,
            True,
            [("a", 50, 0), ("b", 52.5, 0), ("a", 51, 0), ("b", 60, 0)],
            [0, 2.5, 2.5, 10],
        ),  # one runs backwards
        (0.0, True, [("a", 50, 0), ("a", 51, 103), ("a", 55, 103)], [0, 3, 5]),  # one comes late
        (2.0, False, [("a", 50, 0), ("b", 99, 0), ("a", 99, 0), ("b", 1, 0), ("a", 1, 0)], [0, 1, 2, 3, 4]),
        (2.0, True, [("a", None, 0), ("b", None, 0), ("a", None, 0), ("b", None, 0)], [0, 1, 2, 3]),
        (2.0, True, [("a", None, 0), ("a", None, 0), ("b", None, 0), ("a", None, 0)], [0, 2, 2, 4]),
        (2.0, True, [("", None, 0), ("", None, 0), ("", None, 107), ("", None, 0)], [0, 2, 7, 9]),  # lines of all
        (0.0, True, [("a", None, 0), ("b", None, 0)], [0, 0]),
    ],
)
def test_lines_are_due_as_they_were_recorded_or_an_interval_apart(
    interval_s: float, keeps_times: bool, rows: list[tuple[str, float | None, float]], due: list[float]
) -> None:
    pace = Pace(interval_s, ["a", "b"], keeps_times)
    found = [pace.due(Line(thing=thing, recorded_s=at, at=came), 100.0) - 100.0 for thing, at, came in rows]
    assert found == due


def test_a_line_for_which_one_waits_long_is_said() -> None:
    pace = Pace(0.0, ["a"], keeps_times=True)
    with logged() as said:
        for number, at in enumerate((0, 60, 3600), 2):
            pace.due(Line(number=number, thing="a", recorded_s=at), 100.0)
    assert said == ["INFO line 4 is due in 3600 s"]
