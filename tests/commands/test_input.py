"""What things are given to send: a number of messages, the lines of standard input, a file that is replayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.aws import Account
from support.failures import Explained
from support.mqtt import Client
from support.program import ROOT
from support.shell import Elf, InProcess, Pair, Running

ONCE = ("--duration", "0.01")
LINES = ("send", "--json-message", "-")


class Typist:
    """A `send` that waits for lines."""

    def __init__(self, pair: Pair, *options: object) -> None:
        self.window: Running = pair.start(*LINES, *pair.to_broker, *options, stdin=subprocess.PIPE)
        self.window.await_line("sending each line of standard input from each of 2 things")

    def type(self, text: str) -> None:
        assert self.window.process.stdin
        self.window.process.stdin.write(text)
        self.window.process.stdin.flush()

    def leave(self) -> None:
        assert self.window.process.stdin
        self.window.process.stdin.close()


def messages_of(client: Client, thing: str = "thing_0") -> list[dict[str, Any]]:
    """What a thing has sent until now, in order and without ts."""
    heard = [json.loads(each.payload) for each in client.hear_all() if each.topic == f"elf/{thing}"]
    for message in heard:
        assert float(message.pop("ts")) > 0
    return heard


def test_a_line_is_sent_as_it_comes_by_every_thing_until_the_end(pair: Pair, ear: Client) -> None:
    typist = Typist(pair)
    for temperature in (20.5, 21.0):
        typist.type(json.dumps({"temperature": temperature}) + "\n")
        heard = [ear.hear(), ear.hear()]  # while standard input is still open
        assert {message.topic for message in heard} == {"elf/thing_0", "elf/thing_1"}
        assert {json.loads(message.payload)["temperature"] for message in heard} == {temperature}
    assert typist.window.process.poll() is None
    typist.leave()
    assert typist.window.end().lines[-1].endswith("ELF sent 4 messages from 2 things: 4 acknowledged, 0 lost")


def test_what_is_no_json_object_is_a_text_message(pair: Pair, ear: Client) -> None:
    feed = 'hello, ELF\r\n\n  \n[1, 2]\n"text"\n{"ts": "1", "whole": "ü"}\nno end'
    pair(*LINES, *pair.to_broker, feed=feed.encode())
    texts = ["hello, ELF", "[1, 2]", '"text"']
    assert messages_of(ear) == [*({"msg": text} for text in texts), {"whole": "ü"}, {"msg": "no end"}]


REFUSED = "is not sent: it looks like a JSON object but is invalid"
REMEDY = "`jq -c`"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps({"t": 20.5, "u": ["C", {"v": [{}, 1]}]}, indent=2), "Expecting property name"),
        ('{"t": NaN}\n[1, 2]\n"text"', "NaN is not JSON"),
        ('{"a": 1} {"b": 2}\n', "Extra data, column 10"),
        ("{half\n\n  {half", "Expecting property name"),
    ],
)
def test_a_line_is_a_message_and_an_object_over_several_is_refused_to_its_end(
    pair: Pair, ear: Client, text: str, why: str
) -> None:
    """Or its other lines would go out as texts; the stream goes on with the next object."""
    result = pair(*LINES, *pair.to_broker, feed=f'text\n{text}\n{{"next": 1}}\nmore\n'.encode(), status=1)
    assert messages_of(ear) == [{"msg": "text"}, {"next": 1}, {"msg": "more"}]
    (told,) = (line for line in result.lines if " is not sent: " in line)
    assert told.startswith(f"line 2 {REFUSED} ({why}")
    assert REMEDY in told
    number = len([line for line in text.splitlines() if line])
    lines = f"{number} line{'s' * (number > 1)} of the input could not be sent; the first, line 2"
    assert result.lines[-2].startswith(f"{lines}: it looks like a JSON object but is invalid ({why}")


@pytest.mark.parametrize("options", [("--interval", "1e10"), ("--duration", "1e300"), ("--interval", "inf")])
def test_numbers_out_of_range_are_wrong_usage(main_of_pair: InProcess, options: tuple[str, str]) -> None:
    result = main_of_pair("send", *options, status=2)
    assert f"argument {options[0]}: must be " in result.err and len(result.lines) == 1


def test_nothing_is_sent_if_the_first_line_can_not_be(pair: Pair, ear: Client, explained: Explained) -> None:
    feed = b"\n" + (ROOT / "example.json").read_bytes() + b'\n{"a": 1}\n'
    result = pair(*LINES, *pair.to_broker, "--output", "json", feed=feed, status=2)
    explained(result, "NotAnObject", "line 2 of the input", "(Expecting", REMEDY)
    assert ear.hear_all() == []


def test_json_that_nests_deeper_than_python_reads_is_refused_in_words(
    pair: Pair, ear: Client, explained: Explained
) -> None:
    deep = '{"a":' * 9999 + "1" + "}" * 9999
    result = pair(*LINES, *pair.to_broker, feed=f"one\n{deep}\ntwo\n".encode(), status=1)
    assert any(line.startswith("line 2 is not sent: ") and "--raw" in line for line in result.lines)
    assert messages_of(ear) == [{"msg": "one"}, {"msg": "two"}]
    (pair.cwd / "deep.json").write_text(deep)
    refused = pair("send", *pair.to_broker, "--json-message", "deep.json", "--output", "json", status=2)
    explained(refused, "JsonTooDeep", "--raw")
    pair("send", *pair.to_broker, "--raw", "--json-message", "deep.json", "--count", 1, "--things", 1)
    assert ear.hear().payload == deep.encode()


def test_a_line_to_a_topic_of_aws_goes_out_as_it_is(pair: Pair) -> None:
    feed = b'{"state": {"reported": {"line": 1}}}\n{"state":{"reported":{"line":2}}}\n'
    topic = "$aws/things/{thing_name}/shadow/update"
    pair(*LINES, *pair.to_broker, "--topic", topic, feed=feed)
    for name in ("thing_0", "thing_1"):
        assert pair.account.shadow(name)["state"]["reported"] == {"line": 2}


def test_lines_that_can_not_be_sent_are_named_and_the_others_go_out(pair: Pair, ear: Client) -> None:
    feed = b"first\nnot \xff UTF-8\n" + 1_000_000 * b"x" + b'\n{"a": "' + 300_000 * b"x" + b'"}\n{"msg": "last"}\n'
    result = pair(*LINES, *pair.to_broker, feed=feed, status=1)
    assert messages_of(ear) == [{"msg": "first"}, {"msg": "last"}]
    assert "line 2 is not sent: the message or topic is not UTF-8; use UTF-8, which MQTT requires" in result.lines
    for number, size in ((3, "1,000,000"), (4, "300,009")):
        assert any(f"line {number} is not sent: the line is too long: {size} bytes" in line for line in result.lines)
    assert result.lines[-2:] == [
        "3 lines of the input could not be sent; the first, line 2: the message or topic is not UTF-8",
        "what to do: use UTF-8, which MQTT requires",
    ]


def test_more_lines_than_aws_takes_wait_for_their_turn(pair: Pair, ear: Client) -> None:
    feed = "".join(f"{number}\n" for number in range(150))
    result = pair(*LINES, *pair.to_broker, "--output", "json", feed=feed.encode())
    assert [message["msg"] for message in messages_of(ear)] == [str(number) for number in range(150)]
    sent = [json.loads(line) for line in result.out.splitlines()]
    times = [each["time"] for each in sent if each["event"] == "sent" and each["thingName"] == "thing_0"]
    assert times[-1] - times[0] >= 138 * 0.01  # 100 a second, after a burst of ten


@pytest.fixture
def endless(pair: Pair) -> Iterator[subprocess.Popen[str]]:
    """Something that never ends to write lines."""
    writer = subprocess.Popen(
        [pair.python, "-c", "while True: print('again', flush=True)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield writer
    writer.kill()
    writer.wait()
    assert writer.stdout
    writer.stdout.close()


@pytest.mark.parametrize(("options", "number"), [(("--count", 5), 10), (("--duration", 0.5), None)])
def test_count_and_duration_end_an_endless_input(
    pair: Pair, endless: subprocess.Popen[str], options: tuple[object, ...], number: int | None
) -> None:
    window = pair.start(*LINES, *pair.to_broker, *options, "--output", "json", stdin=endless.stdout)
    window.end()
    sent = json.loads(window.out.splitlines()[-1])["sent"]
    assert sent == number if number else 2 <= sent <= 2 * (51 + 10 + 8)


def test_ctrl_c_ends_the_wait_for_a_line(pair: Pair) -> None:
    typist = Typist(pair)
    typist.type("one\n")
    typist.window.await_count("posting message", 2)
    typist.window.signal(signal.SIGINT)
    result = typist.window.end(130)
    (told,) = (line for line in result.lines if "ELF sent 2 messages from 2 things: 2 acknowledged, 0 lost" in line)
    assert "not sent" not in told  # of lines that never came


def test_the_interval_paces_lines_where_it_is_given(pair: Pair, ear: Client) -> None:
    result = pair(*LINES, *pair.to_broker, "--interval", "0.3", "--output", "json", feed=b"1\n2\n3\n")
    sent = [json.loads(line) for line in result.out.splitlines()]
    times = [each["time"] for each in sent if each["event"] == "sent" and each["thingName"] == "thing_1"]
    first_line = datetime.strptime(result.err[:23] + "+0000", "%Y-%m-%d %H:%M:%S,%f%z")  # before the first is due
    assert "ELF sending" in result.err.splitlines()[0]
    assert times[2] - first_line.timestamp() >= 0.6
    assert messages_of(ear, "thing_1") == [{"msg": "1"}, {"msg": "2"}, {"msg": "3"}]


def test_raw_lines_go_out_as_their_bytes(pair: Pair, ear: Client) -> None:
    pair(*LINES, "--raw", *pair.to_broker, "--things", 1, feed=b'{"a":\r\n\n\xff,1\n[]')
    assert [heard.payload for heard in ear.hear_all()] == [b'{"a":', b"", b"\xff,1", b"[]"]


def test_piped_input_that_nothing_reads_is_wrong_usage(pair: Pair) -> None:
    """But not what a shell's loop reads on, nor a pipe into which nobody writes."""
    refused = pair("send", feed=b"1\n", status=2)
    assert "did you mean --json-message -" in refused.err
    (pair.cwd / "words").write_text("one\ntwo\n")
    with (pair.cwd / "words").open() as file:
        pair.start("send", stdin=file).end(2)
    loop = pair.in_shell("while read -r word; do $ELF send $BROKER -n 1 $word; done < words")
    assert [loop.err.count(f'"msg": "{word}"') for word in ("one", "two")] == [2, 2]
    reader, writer = os.pipe()
    pair.start("send", *pair.to_broker, "-n", 1, stdin=reader).end()
    os.close(reader)
    os.close(writer)


def test_an_empty_standard_input_is_a_success_with_a_warning(pair: Pair) -> None:
    result = pair(*LINES, *pair.to_broker)
    assert result.lines[-1].endswith("ELF sent 0 messages from 2 things: 0 acknowledged, 0 lost")
    assert "nothing sent: the input has no message" in result.lines


def test_an_object_as_message_is_sent_as_that_object(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    main_of_pair("send", *pair.to_broker, "--things", 1, "--count", 1, '{"temperature": 20}')
    assert messages_of(ear) == [{"temperature": 20}]
    result = main_of_pair("send", *pair.to_broker, "--count", 1, "-t", "a/{thing-name}", "{thing-name} is up")
    assert {each.topic for each in ear.hear_all()} == {"a/{thing-name}"}
    warned = [line for line in result.lines if "as it is" in line]
    assert len(warned) == 2 and "{thing-name}" in warned[0] and "--template" in warned[1]


def test_a_standard_input_that_can_not_be_read_is_explained(pair: Pair, tmp_path: Path) -> None:
    with (tmp_path / "for-writing-only").open("w") as file:
        window = pair.start(*LINES, *pair.to_broker, stdin=file)
    cause, remedy = window.end(1).lines[-2:]
    assert "Bad file descriptor" in cause
    assert remedy.startswith("what to do: ")


def test_lines_reach_all_things_of_a_larger_fleet(
    elf: Elf, account: Account, connect: Callable[[Account], Client]
) -> None:
    elf("create", 60, "--rate", 300)
    client = connect(account)
    client.subscribe("#")
    result = elf(*LINES, *elf.to_broker, "--rate", 300, feed=b"one\ntwo\nthree\n")
    heard = [(each.topic, json.loads(each.payload)["msg"]) for each in client.hear_all()]
    assert Counter(heard) == {(f"elf/thing_{n}", text): 1 for n in range(60) for text in ("one", "two", "three")}
    assert result.lines[-1].endswith("ELF sent 180 messages from 60 things: 180 acknowledged, 0 lost")


# A file that is replayed


def test_a_jsonl_file_is_replayed_a_line_an_interval(pair: Pair, ear: Client) -> None:
    lines = [{"line": 1}, {"line": 2}, {"msg": "three"}, {"line": 4}]
    (pair.cwd / "readings.jsonl").write_bytes(b'\xef\xbb\xbf{"line": 1}\r\n\n{"line": 2}\nthree\n{"line": 4}')
    result = pair("send", "--json-message", "readings.jsonl", *pair.to_broker, "--interval", "0.2", "--output", "json")
    assert messages_of(ear, "thing_0") == lines
    sent = [json.loads(line) for line in result.out.splitlines()]
    times = [each["time"] for each in sent if each["event"] == "sent" and each["thingName"] == "thing_1"]
    assert len(times) == 4
    assert times[-1] - times[0] > 0.45  # the first may be late
    assert "[send_messages] ELF sending each line of readings.jsonl from each of 2 things" in result.lines


@pytest.mark.parametrize(
    ("options", "number"),
    [((), 3), (("--count", 2), 2), (("--count", 9), 3), (("--duration", 0.1), 2), (("--duration", 9), 3)],
)
def test_a_replay_ends_with_the_file_or_earlier_if_the_user_says_so(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path, options: tuple[object, ...], number: int
) -> None:
    (tmp_path / "three.jsonl").write_text("1\n2\n3\n")
    main_of_pair("send", "--json-message", tmp_path / "three.jsonl", *pair.to_broker, "--interval", "0.05", *options)
    assert [message["msg"] for message in messages_of(ear)] == ["1", "2", "3"][:number]


@pytest.mark.skipif(os.name != "posix", reason="pipes with a name are POSIX's")
def test_a_file_is_read_as_it_is_sent(pair: Pair, ear: Client) -> None:
    """Or what has not been written yet could not go out."""
    os.mkfifo(pair.cwd / "written.jsonl")
    window = pair.start("send", "--json-message", "written.jsonl", "--interval", "0.01", "--things", 1, *pair.to_broker)
    with (pair.cwd / "written.jsonl").open("w") as file:
        for number in range(3):
            file.write(f'{{"n": {number}}}\n')
            file.flush()
            assert json.loads(ear.hear().payload)["n"] == number
    assert window.end().lines[-1].endswith("ELF sent 3 messages from 1 thing: 3 acknowledged, 0 lost")


@pytest.mark.parametrize("name", ["r.ndjson", "r.JSONL", "r.NdJson"])
def test_other_names_of_files_of_lines_are_the_same(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text('{"a": 1}\n\xff\n{"a": 2}\n', encoding="latin-1")
    options = "--json-message", tmp_path / name, "--interval", "0.01"
    result = main_of_pair("send", *options, *pair.to_broker, status=1)
    assert any("line 2 is not sent: the message or topic is not UTF-8" in line for line in result.lines)
    assert messages_of(ear) == [{"a": 1}, {"a": 2}]


def test_a_file_that_has_no_message_in_its_first_line_is_refused_before_anything_connects(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, explained: Explained
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"a": }\n{"a": 1}\n')
    result = main_of_pair("send", "--json-message", tmp_path / "bad.jsonl", *pair.to_broker, status=2)
    explained(result, "NotAnObject", "line 1", "(Expecting value, column 7)", REMEDY)
    assert "sending" not in result.err


def test_a_replay_of_one_line_sends_it_once(main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text("1\n")
    main_of_pair("send", "--json-message", tmp_path / "one.jsonl", *pair.to_broker, "--interval", "0.01")
    assert messages_of(ear) == [{"msg": "1"}]


# A number of messages, and several topics


def test_count_is_the_number_of_messages_of_each_thing(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    main_of_pair("send", *pair.to_broker, "--count", 3, "--interval", "0.05")
    assert Counter(heard.topic for heard in ear.hear_all()) == {"elf/thing_0": 3, "elf/thing_1": 3}


def test_subscribe_takes_several_topics(pair: Pair, ear: Client) -> None:
    window = pair.subscribe("--topic", "a/+", "--topic", "b/{thing_name}", "--count", 3)
    for topic in ("c", "a/1", "b/thing_1"):  # c is for nobody
        ear.publish(topic, topic)
    result = window.end()
    subscribed = {line for line in result.lines if "subscribed to topic" in line}
    assert subscribed == {
        f"ELF {name} subscribed to topic: {topic}" for name in ("thing_0", "thing_1") for topic in ("a/+", f"b/{name}")
    }
    assert Counter(topic for topic, _ in result.received) == {"a/1": 2, "b/thing_1": 1}


def test_topics_that_overlap_bring_a_message_as_often_as_the_broker_sends_it(
    pair: Pair, connect: Callable[[Account], Client]
) -> None:
    other, sender = connect(pair.account), connect(pair.account)
    for topic_filter in ("a/+", "a/#"):
        other.subscribe(topic_filter)
    window = pair.subscribe("--topic", "a/+", "--topic", "a/#", "--topic", "end")
    sender.publish("a/1", "once")
    copies = len(other.hear_all())
    sender.publish("end", "end")
    window.await_count("from topic: end", 2)
    window.signal(signal.SIGINT)
    assert Counter(topic for topic, _ in window.end(130).received) == {"a/1": 2 * copies, "end": 2}


# Files that are none


def put(path: Path, kind: str) -> None:
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        with path.open("wb") as file:
            file.truncate(20 * 2**30)  # which takes no room


@pytest.mark.skipif(os.name != "posix", reason="a pipe with a name, and a file with a hole, are POSIX's")
@pytest.mark.parametrize(
    ("option", "kind", "failure"),
    [
        ("--root-cert", "nothing", "NotARootCertificate"),
        ("--json-message", "nothing", "MessageFileInvalid"),
        ("--root-cert", "a directory", "NotARootCertificate"),
        ("--root-cert", "a pipe", "NotARootCertificate"),
        ("--root-cert", "20 GiB", "NotARootCertificate"),
        ("--json-message", "a directory", "MessageFileInvalid"),
        ("--json-message", "20 GiB", "MessageFileInvalid"),
    ],
)
def test_what_is_no_file_where_the_user_names_one_is_wrong_usage(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, option: str, kind: str, failure: str, explained: Explained
) -> None:
    put(tmp_path / "given", kind)
    refused = main_of_pair("send", *pair.to_broker, option, tmp_path / "given", *ONCE, status=2)
    explained(refused, failure, tmp_path / "given")


@pytest.mark.skipif(os.name != "posix", reason="pipes with a name are POSIX's")
def test_a_message_may_come_through_a_pipe_and_ctrl_c_ends_the_wait_for_it(pair: Pair, ear: Client) -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"temperature": 21}')
    os.close(writer)
    given = pair.start("send", "--json-message", "/dev/fd/0", *pair.to_broker, "--count", 1, stdin=reader)
    given.end()
    os.close(reader)
    assert messages_of(ear) == [{"temperature": 21}]
    os.mkfifo(pair.cwd / "nobody-writes")
    waiting = pair.start("send", "--json-message", "nobody-writes", *pair.to_broker, "--debug")
    waiting.await_line("reading nobody-writes")
    waiting.signal(signal.SIGINT)
    assert "no answer" not in waiting.end(130).err  # nothing has to be waited for
