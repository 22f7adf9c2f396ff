"""What things send: payloads and what is added to them, lines of a file, and topics that AWS takes."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.program import Limits

from iot_elf import messages
from iot_elf.errors import ElfError, UsageError
from iot_elf.events import EventQueue
from iot_elf.messages import Line, PayloadBuilder

from .stand_ins import Clock, logged

MAX_PAYLOAD = 128 * 1024  # bytes, AWS IoT's limit
TS = '"ts": "1700000000.000"'


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(monkeypatch, messages)
    clock.time_ns = lambda: 1_700_000_000_000_000_000  # type: ignore[attr-defined]
    return clock


# Payloads


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        (b'{"a": 1}', b'{"a": 1, %s}'),
        (b"{}", b"{%s}"),
        (b'  {"a": {"b": "}"}} \n', b'  {"a": {"b": "}"}, %s} \n'),
        (b'\xef\xbb\xbf{"a": 1}', b'{"a": 1, %s}'),  # Windows' editors begin a file so
        (b'{"ts": 5}', b'{"ts": 5}'),
        (
            b'{"a": 1e999, "b": ' + b"9" * 5000 + b"}",
            b'{"a": 1e999, "b": ' + b"9" * 5000 + b", %s}",
        ),  # JSON has no limits
    ],
)
def test_an_object_is_sent_as_it_was_written_and_with_the_time(clock: Clock, text: bytes, payload: bytes) -> None:
    expected = payload.replace(b"%s", TS.encode())
    assert PayloadBuilder.of_object(text).payload("elf/thing_0", "thing_0", 1) == expected
    assert PayloadBuilder.of_any(text).payload("elf/thing_0", "thing_0", 1) == expected


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        (b"Hello", b'{"msg": "Hello", %s}'),
        (b"", b'{"msg": "", %s}'),
        (b'say "\xc3\xa9"\x00', b'{"msg": "say \\"\xc3\xa9\\"\\u0000", %s}'),
        (b"[1]", b'{"msg": "[1]", %s}'),
        (b'{"a": NaN}', b'{"msg": "{\\"a\\": NaN}", %s}'),
    ],
)
def test_another_text_is_sent_as_the_msg_of_an_object(clock: Clock, text: bytes, payload: bytes) -> None:
    expected = payload.replace(b"%s", TS.encode())
    assert PayloadBuilder.of_any(text).payload("elf/thing_0", "thing_0", 1) == expected
    assert PayloadBuilder.of_text(text).payload("elf/thing_0", "thing_0", 1) == expected


def test_an_object_as_a_text_is_a_text(clock: Clock) -> None:
    payload = PayloadBuilder.of_text(b'{"a": 1}').payload("elf/thing_0", "thing_0", 1)
    assert json.loads(payload)["msg"] == '{"a": 1}'


@pytest.mark.parametrize(
    "text", [b"[1]", b"[{}]", b"3", b"", b"{", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": "\xff"}', b"{}{}"]
)
def test_what_is_no_object_is_refused_where_one_is_needed(text: bytes) -> None:
    with pytest.raises(ValueError):
        PayloadBuilder.of_object(text)


def test_what_is_not_utf_8_is_refused_as_mqtt_asks() -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        PayloadBuilder.of_any(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        messages.utf8("\ud800")
    assert messages.utf8("é") == b"\xc3\xa9"


def test_what_nests_too_deep_for_python_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="nests too deep"):
        messages.parse_json('{"a": ' * 100_000)


@pytest.mark.parametrize(
    ("wall_ns", "ts"),
    [
        (1_700_000_000_123_999_999, "1700000000.123"),  # not later than now
        (1_700_000_000_005_000_000, "1700000000.005"),
        (1_700_000_000_000_999_999, "1700000000.000"),
        (1_700_000_000_999_000_001, "1700000000.999"),
    ],
)
def test_the_time_in_a_message_is_in_seconds_with_three_digits(clock: Clock, wall_ns: int, ts: str) -> None:
    clock.time_ns = lambda: wall_ns  # type: ignore[attr-defined]
    assert json.loads(PayloadBuilder.of_any(b"{}").payload("elf/thing_0", "thing_0", 1)) == {"ts": ts}


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        (b'{"a": 1}', b'{"a": 1, "ts": "1700000000.000", "thing": "thing_3", "seq": 7, "run": "0a1b"}'),
        (b'{"ts": 1}', b'{"ts": 1, "thing": "thing_3", "seq": 7, "run": "0a1b"}'),
        (b"{}", b'{"ts": "1700000000.000", "thing": "thing_3", "seq": 7, "run": "0a1b"}'),
    ],
)
def test_a_numbered_message_says_which_thing_sent_it_and_in_which_run(
    clock: Clock, text: bytes, payload: bytes
) -> None:
    numbered = PayloadBuilder.of_object(text)._replace(run="0a1b")
    assert numbered.payload("elf/thing_3", "thing_3", 7) == payload


@pytest.mark.parametrize(
    ("text", "members"),
    [(b'{"ts": 1, "a": 2}', {"ts"}), (b'{"thing": 1, "seq": 1, "run": 1}', {"thing", "seq", "run"}), (b"x", set())],
)
def test_a_message_knows_which_members_it_has_already(text: bytes, members: set[str]) -> None:
    assert PayloadBuilder.of_any(text).has == members


@pytest.mark.parametrize(
    ("topic", "is_reserved"),
    [
        ("elf/thing_0", False),
        ("$aws/rules/some/thing_0", False),  # Basic Ingest leads to the user's own rules
        ("$aws/things/thing_0/shadow/update", True),
        ("$other", True),
        ("aws/things", False),
    ],
)
def test_what_is_sent_to_aws_itself_is_sent_as_it_is(clock: Clock, topic: str, is_reserved: bool) -> None:
    assert messages.is_reserved_topic(topic) == is_reserved
    payload = PayloadBuilder.of_any(b'{"a": 1}')._replace(run="0a1b").payload(topic, "thing_0", 1)
    assert (payload == b'{"a": 1}') == is_reserved
    assert (PayloadBuilder.of_any(b"Hello").payload(topic, "thing_0", 1) == b"Hello") == is_reserved


def test_raw_bytes_are_sent_as_they_are() -> None:
    assert PayloadBuilder(b"\xff\x00").payload("elf/thing_0", "thing_0", 1) == b"\xff\x00"


@pytest.mark.parametrize(("size", "is_sent"), [(MAX_PAYLOAD, True), (MAX_PAYLOAD + 1, False)])
def test_a_payload_has_up_to_128_kib(size: int, is_sent: bool) -> None:
    raw = PayloadBuilder(bytes(size))
    if is_sent:
        assert len(raw.payload("elf/thing_0", "thing_0", 1)) == size
    else:
        with pytest.raises(UsageError, match=f"{size:,} bytes"):
            raw.payload("elf/thing_0", "thing_0", 1)


def test_what_is_added_counts_for_the_length() -> None:
    frame = b'{"a": "%s"}'
    added = len(TS) + 2
    fits = MAX_PAYLOAD - added - len(frame % b"")
    assert len(PayloadBuilder.of_object(frame % (b"x" * fits)).payload("elf/x", "thing_0", 1)) == MAX_PAYLOAD
    with pytest.raises(UsageError):
        PayloadBuilder.of_object(frame % (b"x" * (fits + 1))).payload("elf/x", "thing_0", 1)


# Files of messages


@pytest.mark.parametrize(
    ("name", "is_lines"),
    [
        (None, False),
        ("-", True),
        ("a.jsonl", True),
        ("a.NDJSON", True),
        ("a.json", False),
        ("jsonl", False),
        ("./-.json", False),
    ],
)
def test_a_file_of_lines_is_known_by_its_name(name: str | None, is_lines: bool) -> None:
    assert messages.is_line_file(Path(name) if name else None) == is_lines


@pytest.mark.parametrize(
    ("line", "begins"),
    [(b"{", True), (b' \t{"a', True), (b"x {", False), (b"", False), (b"[{}]", False)],
)
def test_a_line_that_begins_with_a_brace_is_meant_as_an_object(line: bytes, begins: bool) -> None:
    assert messages.begins_object(line) == begins


def compose(text: bytes) -> PayloadBuilder:
    """What an object is, or else a text; what only begins as an object is refused."""
    return PayloadBuilder.of_object(text) if messages.begins_object(text) else PayloadBuilder.of_any(text)


@pytest.mark.parametrize(("size", "is_read"), [(7, True), (8, True), (9, False)])
def test_a_message_file_is_read_up_to_its_limit(tmp_path: Path, limits: Limits, size: int, is_read: bool) -> None:
    limits(MAX_FILE_BYTES=8)
    path = tmp_path / "message"
    path.write_bytes(b"x" * size)
    (line,) = messages.read_message_file(path, compose)
    if is_read:
        assert (line.message, line.error) == (compose(b"x" * size), None)
    else:
        assert isinstance(line.error, OSError)
        assert (line.error.errno, line.message) == (errno.EFBIG, None)


def test_a_file_that_is_too_large_is_refused_in_mebibytes(tmp_path: Path, limits: Limits) -> None:
    limits(MAX_FILE_BYTES=2 * 1024 * 1024)
    path = tmp_path / "message"
    path.write_bytes(bytes(2 * 1024 * 1024 + 1))
    (line,) = messages.read_message_file(path, compose)
    assert "it is larger than 2 MiB" in str(line.error)


@pytest.mark.parametrize(("content", "kind"), [(None, FileNotFoundError), (b"{", json.JSONDecodeError)])
def test_a_message_file_that_is_none_says_why(tmp_path: Path, content: bytes | None, kind: type[Exception]) -> None:
    path = tmp_path / "message"
    if content:
        path.write_bytes(content)
    (line,) = messages.read_message_file(path, compose)
    assert isinstance(line.error, kind)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\n\nb", [b"a", b"", b"b"]),
        (b"a\r\nb\r\n", [b"a", b"b"]),
        (b"a\rb\r\r\n", [b"a\rb\r"]),
        (b"12345678\n1\n", [b"12345678", b"1"]),
        (b"12345678\r\n1\n", [b"12345678", b"1"]),
        (b"123456789\n1\n", [9, b"1"]),
        (b"123456789\r\n1\n", [9, b"1"]),
        (b"1234567890\n1\n", [10, b"1"]),
        (b"1" * 100 + b"\n1\n", [100, b"1"]),
        (b"1" * 2000 + b"\r\n1\n", [2000, b"1"]),
        (b"1" * 100, [100]),
    ],
)
def test_lines_are_read_one_by_one_and_of_one_that_is_too_long_its_real_length_is_told(
    tmp_path: Path, limits: Limits, content: bytes, lines: list[bytes | int]
) -> None:
    limits(MAX_PAYLOAD_BYTES=8)
    path = tmp_path / "lines"
    path.write_bytes(content)
    for number, (found, line) in enumerate(zip(messages.read_lines(path), lines, strict=True), 1):
        if isinstance(found, bytes):
            assert found == line
        else:
            assert f" {line:,} bytes" in found.cause
            (refused, _) = messages.parse_lines([found], PayloadBuilder, raw=True)
            assert (refused.error, refused.number) == (found, 1), number


def test_lines_of_standard_input_are_read_and_it_stays_open(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"a\nb")
    kept = os.dup(0)
    given = os.open(tmp_path / "lines", os.O_RDONLY)
    try:
        os.dup2(given, 0)
        assert [*messages.read_lines(Path("-"))] == [b"a", b"b"]
        os.fstat(0)  # else the next file that is opened would be it
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(given)


def parsed(*lines: bytes, raw: bool = False, failure: OSError | None = None) -> list[tuple[int, str]]:
    """The number of each message or error, and the one or the other in short."""

    def read() -> Iterator[bytes]:
        yield from lines
        if failure:
            raise failure

    make: Callable[[bytes], PayloadBuilder] = PayloadBuilder if raw else compose
    found = []
    for line in messages.parse_lines(read(), make, raw):
        message: Any = line.message
        found.append((line.number, message.text.decode() if message else type(line.error).__name__))
    return found


END = (0, "NoneType")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], [END]),
        ([b"a", b"b"], [(1, "a"), (2, "b"), END]),
        ([b"", b"a", b" \t", b"b"], [(2, "a"), (4, "b"), END]),  # numbered as an editor does it
        ([b'\xef\xbb\xbf{"a": 1}', b"b"], [(1, '{"a": 1}'), (2, "b"), END]),
        (
            [b"{", b'  "a": 1', b"}", b'{"b": 2}', b"c"],
            [*((n, "UsageError") for n in (1, 2, 3)), (4, '{"b": 2}'), (5, "c"), END],
        ),
        ([b"{", b"{", b"x"], [(1, "UsageError"), (2, "UsageError"), (3, "UsageError"), END]),
        ([b"caf\xe9", b"a"], [(1, "UsageError"), (2, "a"), END]),  # which refuses no line after it
    ],
)
def test_a_line_is_a_message_unless_it_belongs_to_a_broken_object(
    lines: list[bytes], expected: list[tuple[int, str]]
) -> None:
    assert parsed(*lines) == expected


def test_only_the_first_line_may_have_a_mark_of_the_byte_order() -> None:
    found = [*messages.parse_lines([b"\xef\xbb\xbfa", b"\xef\xbb\xbfb"], PayloadBuilder, raw=False)]
    assert [line.message and line.message.payload("x", "x", 1) for line in found] == [b"a", b"\xef\xbb\xbfb", None]


def test_raw_lines_are_messages_also_if_they_are_empty() -> None:
    found = [*messages.parse_lines([b"\xef\xbb\xbfa", b"", b"{"], PayloadBuilder, raw=True)]
    assert [line.message and line.message.payload("x", "x", 1) for line in found] == [b"\xef\xbb\xbfa", b"", b"{", None]


def test_the_lines_of_a_broken_object_have_one_error_that_says_where_it_is_broken() -> None:
    first, second, following, third, _ = messages.parse_lines(
        [b'{"a": x}', b"more", b'{"b": 2}', b'{"c": '], compose, raw=False
    )
    assert isinstance(first.error, UsageError)
    assert "Expecting value, column 7" in first.error.cause
    assert second.error is first.error
    assert following.error is None
    assert third.error not in (None, first.error)


def test_an_object_that_python_calls_wrong_in_other_words_has_no_column() -> None:
    def refuse(_: bytes) -> PayloadBuilder:
        raise ValueError("it is odd")

    line, _ = messages.parse_lines([b"{"], refuse, raw=False)
    assert isinstance(line.error, UsageError)
    assert "(it is odd)" in line.error.cause


def test_an_input_that_fails_ends_with_that() -> None:
    assert parsed(b"a", failure=OSError(errno.EIO, "gone")) == [(1, "a"), (0, "OSError")]


def test_a_line_has_the_time_at_which_it_came(clock: Clock) -> None:
    def read() -> Iterator[bytes]:
        for _ in range(2):
            clock.now += 5.0
            yield b"a"

    assert [line.at for line in messages.parse_lines(read(), compose, raw=False)] == [1005.0, 1010.0, 0.0]


@pytest.mark.parametrize(
    ("line", "cause", "remedy"),
    [
        (Line(), "it contains no message", "use a UTF-8 file"),
        (Line(error=OSError(errno.ENOENT, "No such file")), "No such file", "use a UTF-8 file"),
        (Line(error=ValueError("odd")), ": odd", "use a UTF-8 file"),
        (
            Line(None, UsageError("Name", "it is wrong", "mend it"), 7),
            "line 7 is not a message: it is wrong",
            "mend it",
        ),
    ],
)
def test_a_file_without_a_message_is_wrong_usage_and_refused_with_its_name(line: Line, cause: str, remedy: str) -> None:
    with pytest.raises(UsageError) as raised:
        messages.first_message(Path("some.jsonl"), iter([line]))
    assert raised.value.cause.startswith("could not read the message file some.jsonl: ")
    assert raised.value.cause.endswith(cause)
    assert raised.value.remedy.startswith(remedy)


def test_the_first_message_of_a_file_leaves_the_others_there() -> None:
    lines = iter([Line(compose(b"a"), number=1), Line(compose(b"b"), number=2)])
    assert messages.first_message(Path("some.jsonl"), lines).number == 1
    assert [line.number for line in lines] == [2]


def test_lines_are_read_only_as_they_are_wanted_and_in_order() -> None:
    events, wanted, read = EventQueue(), threading.Semaphore(0), list[int]()

    def lines() -> Iterator[Line]:
        for number in range(1, 4):
            read.append(number)
            yield Line(number=number)

    thread = threading.Thread(target=messages.read_ahead, args=(lines(), events, wanted), daemon=True)
    thread.start()
    for number in range(1, 4):
        assert [*events.drain()] == []
        assert read == [*range(1, len(read) + 1)]
        assert len(read) <= number
        wanted.release()
        assert events.get(time.monotonic() + 5.0) == Line(number=number)
    thread.join(5.0)
    assert not thread.is_alive()


def test_an_error_that_nobody_expected_ends_the_lines() -> None:
    """Or the main thread would wait for the next one for ever."""

    def lines() -> Iterator[Line]:
        yield Line(number=1)
        raise RuntimeError("odd")

    events = EventQueue()
    messages.read_ahead(lines(), events, threading.Semaphore(9))
    first, last = events.drain()
    assert first == Line(number=1)
    assert isinstance(last.error, RuntimeError)


# Topics


@pytest.mark.parametrize(
    ("given", "append", "topics"),
    [
        ([None], False, ["elf/#"]),
        ([None], True, ["elf/thing_7"]),
        (["a"], False, ["a"]),
        (["a"], True, ["a/thing_7"]),
        (["b", "a", "c", "b"], False, ["b", "a", "c"]),
        (["a/{thing_name}/{thing_name}"], False, ["a/thing_7/thing_7"]),
        ([""], False, [""]),
        ([], True, []),
    ],
)
def test_a_thing_has_the_topics_that_were_given_each_once(
    given: list[str | None], append: bool, topics: list[str]
) -> None:
    assert messages.expand_topics(given, append, "thing_7", "elf/#") == topics


@pytest.mark.parametrize(
    ("topic", "to_publish", "to_subscribe"),
    [
        ("a", True, True),
        ("", False, False),
        ("a\0b", False, False),
        ("x" * 256, True, True),
        ("x" * 257, False, False),
        ("é" * 128, True, True),  # bytes count
        ("é" * 129, False, False),
        ("/" * 7, True, True),
        ("/" * 8, False, False),
        ("a/+/b", False, True),
        ("a/#", False, True),
        ("#", False, True),
        ("+", False, True),
        ("a+", False, False),
        ("a/b#", False, False),
        ("#/a", False, False),
        ("#/", False, False),
        ("a/+b/#", False, False),
        ("a/##", False, False),
        ("$share/group/a/#", False, True),
        ("$share/group/" + "/" * 7, False, True),
        ("$share/group/" + "/" * 8, False, False),
        ("$share/group/" + "x" * 256, False, True),
        ("$share/group/" + "x" * 257, False, False),
        ("$share/group/", False, False),
        ("$share/group", False, False),
        ("$share//a", False, False),
        ("$share/group/a\nb", False, True),
        ("$aws/rules/some/" + "x" * 256, True, False),
        ("$aws/rules/some/" + "x" * 257, False, False),
        ("$aws/rules/some/" + "/" * 7, True, False),
        ("$aws/rules/some/" + "/" * 8, False, False),
        ("$aws/rules/some/$aws/rules/some/" + "/" * 4, True, False),  # once
        ("$aws/rules/some/$aws/rules/some/" + "/" * 5, False, False),
        ("$x/$share/g/" + "/" * 4, False, True),  # and only where the topic begins
        ("$x/$share/g/" + "/" * 5, False, False),
        ("a/$aws/rules/" + "/" * 4, True, True),
        ("a/$aws/rules/" + "/" * 5, False, False),
        ("$aws/things/t/shadow/update", True, True),
        ("$aws/things/t/shadow/update/accepted", False, True),
        ("$aws/things/t/shadow/name/n/get", True, True),
        ("$aws/things/t/jobs/start-next", True, True),
        ("$aws/commands/things/t/executions/e/response/json", True, True),
        ("$SYS/broker", False, True),
        ("$aws/events/x", False, True),
    ],
)
def test_a_topic_is_taken_as_aws_takes_it(topic: str, to_publish: bool, to_subscribe: bool) -> None:
    for wildcards, is_taken in ((False, to_publish), (True, to_subscribe)):
        assert (messages.topic_problem(topic, wildcards) is None) == is_taken
        if is_taken:
            messages.refuse_bad_topics({"thing_0": ["fine", topic]}, wildcards)
        else:
            with pytest.raises(UsageError):
                messages.refuse_bad_topics({"thing_0": ["fine", topic]}, wildcards)


def test_a_name_in_braces_that_is_not_replaced_is_told_once() -> None:
    topics = {f"thing_{n}": [f"a/thing_{n}/{{thing-name}}/{{thing_nam}}/{{thing-name}}"] for n in range(3)}
    with logged() as said:
        messages.refuse_bad_topics(topics)
        messages.refuse_bad_topics(topics)
        messages.refuse_bad_topics({"thing_0": ["a/{", "}/b"]})
    (line,) = said
    assert line.endswith(": {thing-name}, {thing_nam}")


@pytest.mark.parametrize(
    ("error", "name", "cause"),
    [
        (UsageError("Name", "it is wrong", "mend it"), "Name", "it is wrong (2 messages not sent)"),
        (
            ValueError("odd"),
            "NotAnObject",
            "the template's result looks like a JSON object but is invalid: odd (2 messages not sent)",
        ),
    ],
)
def test_messages_that_can_not_be_made_end_with_their_own_reason(error: Exception, name: str, cause: str) -> None:
    failure = messages.not_made(2, error)
    assert (failure.name, failure.cause, type(failure)) == (name, cause, ElfError)


def test_wildcards_are_refused_unless_somebody_subscribes() -> None:
    with pytest.raises(UsageError, match=r"to publish to: 'a/#'"):
        messages.refuse_bad_topics({"thing_0": ["a/#"]})


def test_the_first_bad_topic_is_named() -> None:
    with pytest.raises(UsageError, match=r": 'a/#/b'"):
        messages.refuse_bad_topics({"thing_0": ["a", "a/#/b", "b+"], "thing_1": ["c+"]})


def test_a_bad_topic_of_any_thing_is_named_but_not_at_any_length() -> None:
    with pytest.raises(UsageError) as raised:
        messages.refuse_bad_topics({"thing_0": ["a"], "thing_1": ["x" * 301]})
    assert raised.value.cause == f"the topic is longer than AWS IoT's 256 bytes: '{'x' * 300}'"


@pytest.mark.parametrize(
    ("topic", "problem"),
    [
        ("", "the topic is empty or contains a null character"),
        ("x" * 257, "the topic is longer than AWS IoT's 256 bytes"),
        ("/" * 8, "the topic has more than AWS IoT's 7 slashes"),
        ("a+", "in a topic filter, + must be a whole level, and # the last level"),
        ("$share/a", "a shared topic filter has a group and a topic filter: $share/GROUP/FILTER"),
        ("$aws/rules/x", "messages on this topic go to a rule, not to subscribers"),
    ],
)
def test_what_is_wrong_with_a_topic_filter_is_said(topic: str, problem: str) -> None:
    assert messages.topic_problem(topic, wildcards=True) == problem


@pytest.mark.parametrize(("count", "is_taken"), [(50, True), (51, False)])
def test_a_connection_may_have_fifty_subscriptions(count: int, is_taken: bool) -> None:
    topics = {"thing_0": ["a"], "thing_1": ["a"] * count}
    if is_taken:
        messages.refuse_bad_topics(topics)
    else:
        with pytest.raises(UsageError, match="50 subscriptions per connection, not 51"):
            messages.refuse_bad_topics(topics)


@pytest.mark.parametrize(
    ("topic", "answers"),
    [
        ("$aws/things/t.1/shadow/get", True),
        ("$aws/things/t.1/shadow/name/n/delete", True),
        ("$aws/things/t.1/shadow/name/{kind}/delete", True),  # a column of a recording
        ("$aws/things/t21/shadow/get", False),  # another's
        ("$aws/things/t.1/shadow/get/accepted", False),
        ("$aws/things/t.1/jobs/get", False),
        ("elf/t.1", False),
    ],
)
def test_aws_answers_what_a_thing_sends_to_its_own_shadow(topic: str, answers: bool) -> None:
    expected = [f"{topic}/accepted", f"{topic}/rejected"] if answers else []
    expected = [each.replace("{kind}", "+") for each in expected]
    assert messages.answer_topics(topic, "t.1") == expected
