"""Recordings that are played: CSV, and what `subscribe --output json` wrote."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from support.failures import Explained
from support.mqtt import Client
from support.shell import InProcess, Pair

FAST = ("--interval", "0.01")
DAY = """at,device,kind,value,note
1700000000,b,temp,20.50,
1700000000.3,a,temp,007,|say ||hi|||
1700000000.1,b,door,1e5,|two
lines|
2023-11-14T22:13:21Z,a,temp,-3,|a;b, c|
""".replace("|", '"')


def without_ts(payload: bytes) -> str:
    """The text of an object without the ts that ELF put at its end."""
    text = payload.decode()
    before, found, _ = text.rpartition(', "ts": "')
    return f"{before}}}" if found else text


def test_each_row_of_csv_is_sent_by_the_thing_of_its_device_where_its_columns_say_and_when(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path
) -> None:
    (tmp_path / "day.csv").write_text(DAY)
    columns = ("--by", "device", "--time", "at", "--topic", "fleet/{device}/{kind}/{thing_name}")
    result = main_of_pair("send", "--replay", tmp_path / "day.csv", *columns, *pair.to_broker, "--output", "json")
    heard = ear.hear_all()
    assert {(each.topic, without_ts(each.payload)) for each in heard} == {
        ("fleet/b/temp/thing_0", '{"at": 1700000000, "device": "b", "kind": "temp", "value": 20.50}'),
        (
            "fleet/a/temp/thing_1",
            '{"at": 1700000000.3, "device": "a", "kind": "temp", "value": "007", "note": "say \\"hi\\""}',
        ),
        (
            "fleet/b/door/thing_0",
            '{"at": 1700000000.1, "device": "b", "kind": "door", "value": 1e5, "note": "two\\nlines"}',
        ),
        (
            "fleet/a/temp/thing_1",
            '{"at": "2023-11-14T22:13:21Z", "device": "a", "kind": "temp", "value": -3, "note": "a;b, c"}',
        ),
    }
    assert all(float(json.loads(each.payload)["ts"]) > 1.7e9 for each in heard)
    sent = [json.loads(line) for line in result.out.splitlines() if line.startswith('{"event": "sent"')]
    assert {(each["topic"], each["payload"]) for each in sent} == {(it.topic, it.payload.decode()) for it in heard}
    times = [each["time"] - sent[0]["time"] for each in sent]
    assert 0.1 < times[1] <= times[2] < times[3] and times[3] > 0.6  # at 0, 0.3 and 1 s: the first may be late
    assert times[2] - times[1] < times[3] - times[2]  # whose time runs backwards
    assert "[send_messages] ELF sending each line of" in result.err
    assert result.lines[-1].endswith("ELF sent 4 messages from 2 things: 4 acknowledged, 0 lost")
    assert "only {thing_name} is replaced" not in result.err


def test_things_take_rows_in_turn_from_a_pipe_as_they_come(pair: Pair, ear: Client) -> None:
    window = pair.start("send", "--replay", "-", *pair.to_broker, stdin=subprocess.PIPE)
    window.await_line("sending each line of standard input from 2 things")
    assert window.process.stdin
    window.process.stdin.write("n;t\n")
    for number in range(3):
        window.process.stdin.write(f"{number};2{number}.0\n")
        window.process.stdin.flush()
        heard = ear.hear()  # while the pipe is open
        assert (heard.topic, without_ts(heard.payload)) == (
            f"elf/thing_{number % 2}",
            f'{{"n": {number}, "t": 2{number}.0}}',
        )
    window.signal(signal.SIGINT)
    assert any("ELF sent 3 messages from 2 things: 3 acknowledged" in line for line in window.end(130).lines)


def test_ctrl_c_ends_the_wait_for_a_time_and_duration_does_not_wait_for_it(pair: Pair, ear: Client) -> None:
    (pair.cwd / "slow.csv").write_text("at,n\n2023-11-14,1\n2023-11-15,2\n")
    played = "send", "--replay", "slow.csv", "--time", "at", *pair.to_broker
    result = pair(*played, "--duration", "0.5")
    assert result.lines[-1].endswith("ELF sent 1 message from 2 things: 1 acknowledged, 0 lost")
    window = pair.start(*played)
    window.await_line("posting message")
    window.signal(signal.SIGINT)
    window.end(130)
    pair(*played, *FAST, "--sequence")
    last = [json.loads(each.payload) for each in ear.hear_all()][-2:]
    assert {(each["n"], each["thing"], each["seq"]) for each in last} == {(1, "thing_0", 1), (2, "thing_1", 1)}


def test_rows_that_can_not_be_sent_are_said_by_line_and_the_others_go_out(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path, explained: Explained
) -> None:
    (tmp_path / "bad.csv").write_bytes(b"kind,n\na/b,1\n\xff,2\nx,3\nx,4,5\n+,6\ny,7\n")
    result = main_of_pair(
        *("send", "--replay", tmp_path / "bad.csv", "-t", "k/{kind}", "--raw", *FAST, *pair.to_broker), status=1
    )
    assert sorted((each.topic, each.payload) for each in ear.hear_all()) == [
        ("k/x", b'{"kind": "x", "n": 3}'),
        ("k/y", b'{"kind": "y", "n": 7}'),
    ]
    for number, why in ((2, "'a/b' of 'kind'"), (3, "not UTF-8"), (5, "3 cells, and the heading 2"), (6, "'+'")):
        assert any(line.startswith(f"line {number} is not sent: ") and why in line for line in result.lines)
    explained(result, "LinesRefused", "4 lines of the input", "the first, line 2: ", "'a/b'")


def test_one_device_too_many_ends_the_run_and_what_was_sent_is_reported(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path, explained: Explained
) -> None:
    (tmp_path / "many.csv").write_text("d,n\na,1\nb,2\na,3\nc,4\na,5\n")
    options = "send", "--replay", tmp_path / "many.csv", *FAST, *pair.to_broker
    result = main_of_pair(*options, "--by", "d", status=1)
    heard = [json.loads(each.payload) for each in ear.hear_all()]
    assert [[row["n"] for row in heard if row["d"] == device] for device in "ab"] == [[1, 3], [2]]
    assert any("ELF sent 3 messages from 2 things: 3 acknowledged, 0 lost" in line for line in result.lines)
    explained(result, "TooManyDevices", "line 5: 'c' is one device too many for 2 things", "elf.py")
    main_of_pair(*options, "--count", 3, "--by", "d")


@pytest.mark.parametrize(
    ("content", "options", "failure"),
    [
        ("n,d\n1,a\n", ("--by", "device"), "NoSuchColumn"),
        ("n,d\n1,a\n", ("--topic", "x/{device}"), "NoSuchColumn"),
        ("n,d\n1,a\n", ("--topic", "x/#"), "BadTopic"),
        ("1,2\n3,4\n", (), "RecordingInvalid"),
        ('{"temperature": 20.5}\n', (), "RecordingInvalid"),
        ('{"event": "received"}\n', ("--topic", "x/{topic}"), "RecordingFixed"),
        ("n,d\n", (), "MessageFileInvalid"),
    ],
)
def test_a_file_that_is_no_recording_and_a_column_that_it_lacks_are_wrong_usage(
    main_of_pair: InProcess,
    pair: Pair,
    tmp_path: Path,
    content: str,
    options: tuple[str, ...],
    failure: str,
    explained: Explained,
) -> None:
    (tmp_path / "given").write_text(content)
    result = main_of_pair("send", "--replay", tmp_path / "given", *options, *pair.to_broker, status=2)
    explained(result, failure, "x/#" if failure == "BadTopic" else tmp_path / "given")
    assert "ELF sending" not in result.err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--by", "d"), "--by and --time need --replay"),
        (("--replay", "a", "--template"), "--replay does not work with --template, --verify or --retain"),
        (("--replay", "a", "--verify"), "--replay does not work with --template, --verify or --retain"),
        (("--replay", "a", "--retain"), "--replay does not work with --template, --verify or --retain"),
        (("--replay", "a", "--seed", 1), "--seed needs --template"),
        (("--replay", "a", "Hello"), "not allowed with argument"),
        (("--replay", "a", "--json-message", "b"), "not allowed with argument"),
    ],
)
def test_what_does_not_work_with_a_recording_is_wrong_usage(
    main_of_pair: InProcess, options: tuple[object, ...], why: str
) -> None:
    assert why in main_of_pair("send", *options, status=2).err


# What `subscribe --output json` wrote

PLAYED = [
    ("rec/1", b'{"a":  20.50,\n "b": "\xc3\xbc \\u00fc"}\r\n'),
    ("rec/ü x", b""),
    ("rec/1", b"\xff\x00 binary"),
    ("rec/ü x", b"\xef\xbb\xbf[1.0, 1e5]"),
    ("rec/1", b'{"ts": "1", "n": 12345678901234567890}'),
]


def test_what_was_received_is_played_byte_for_byte(pair: Pair, ear: Client) -> None:
    """Two things record it, each all of it."""
    options = "subscribe", *pair.to_broker, "-t", "rec/#", "--count", 2 * len(PLAYED), "--output", "json"
    with (pair.cwd / "recorded").open("wb") as file:
        window = pair.start(*options, stdout=file)
        window.await_line("ELF listening on")
        for topic, payload in PLAYED:
            ear.publish(topic, payload)
        window.end()
    assert [(each.topic, each.payload) for each in ear.hear_all()] == PLAYED
    result = pair("send", "--replay", "recorded", "--by", "topic", *pair.to_broker, "--output", "json")
    heard = ear.hear_all()
    for topic in ("rec/1", "rec/ü x"):
        assert [it.payload for it in heard if it.topic == topic] == [its for where, its in PLAYED if where == topic]
    assert len(heard) == len(PLAYED)
    sent = [json.loads(line) for line in result.out.splitlines() if line.startswith('{"event": "sent"')]
    assert {(each["topic"], each["thingName"]) for each in sent} == {("rec/1", "thing_0"), ("rec/ü x", "thing_1")}
    assert "ELF sending each line of recorded from 2 things" in result.err
