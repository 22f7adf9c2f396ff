"""Which topics things publish to and subscribe to."""

from __future__ import annotations

import pytest
from harness import Client, InProcess, Pair

ONCE = ("--duration", "0.01")


@pytest.mark.parametrize(
    ("options", "topics"),
    [
        ((), ["elf/thing_0", "elf/thing_1"]),
        (("--append-thing-name",), ["elf/thing_0", "elf/thing_1"]),
        (("--topic", "some/where"), ["some/where", "some/where"]),
        (("--topic", "some/where", "--append-thing-name"), ["some/where/thing_0", "some/where/thing_1"]),
        (("--topic", "a/{thing_name}/b"), ["a/thing_0/b", "a/thing_1/b"]),
        (("--topic", "{thing_name}", "--append-thing-name"), ["thing_0/thing_0", "thing_1/thing_1"]),
        (("--topic", "{other} {}"), ["{other} {}", "{other} {}"]),
    ],
)
def test_send_publishes_to(
    main_of_pair: InProcess, pair: Pair, ear: Client, options: tuple[str, ...], topics: list[str]
) -> None:
    main_of_pair("send", *pair.broker, *ONCE, *options)
    assert sorted(heard.topic for heard in ear.hear_all()) == topics


@pytest.mark.parametrize(
    ("options", "filters"),
    [
        ((), ["elf/#", "elf/#"]),
        (("--append-thing-name",), ["elf/thing_0", "elf/thing_1"]),
        (("--topic", "some/+/where"), ["some/+/where", "some/+/where"]),
        (("--topic", "some/#"), ["some/#", "some/#"]),
        (("--topic", "some", "--append-thing-name"), ["some/thing_0", "some/thing_1"]),
        (("--topic", "$aws/things/{thing_name}/#"), ["$aws/things/thing_0/#", "$aws/things/thing_1/#"]),
    ],
)
def test_subscribe_listens_on(
    main_of_pair: InProcess, pair: Pair, options: tuple[str, ...], filters: list[str]
) -> None:
    lines = main_of_pair("subscribe", *pair.broker, *ONCE, *options).lines
    assert sorted(line for line in lines if " subscribed to " in line) == [
        f"ELF thing_{number} subscribed to topic: {topic_filter}" for number, topic_filter in enumerate(filters)
    ]


def test_subscribe_hears_only_its_topic(pair: Pair, ear: Client) -> None:
    window = pair.subscribe("--topic", "some/+/{thing_name}", "--count", 2)
    for topic in ("some/thing_0", "some/x/y", "elf/thing_0", "some/x/thing_0", "some/x/thing_1"):
        ear.publish(topic, "x")
    assert sorted(window.end().received) == [("some/x/thing_0", "x"), ("some/x/thing_1", "x")]


SEVEN_SLASHES = "1/2/3/4/5/6/7/8"


@pytest.mark.parametrize("topic", [SEVEN_SLASHES, "x" * 256, "ü" * 128, "/", "with space/ü"])
def test_an_unusual_topic_that_aws_takes_is_used(main_of_pair: InProcess, pair: Pair, ear: Client, topic: str) -> None:
    main_of_pair("send", *pair.broker, *ONCE, "--topic", topic)
    assert [heard.topic for heard in ear.hear_all()] == [topic, topic]


@pytest.mark.parametrize(
    ("command", "topic", "problem"),
    [
        ("send", "a/+/b", "without + and #"),
        ("send", "a/#", "without + and #"),
        ("send", SEVEN_SLASHES + "/9", "more than AWS IoT's 7 slashes"),
        ("send", "x" * 257, "longer than AWS IoT's 256 bytes"),
        ("send", "ü" * 129, "longer than AWS IoT's 256 bytes"),
        ("send", "{thing_name}" * 40, "longer than AWS IoT's 256 bytes"),
        ("send", "a\0b", "null character"),
        ("send", "$SYS/broker/uptime", "lets nobody publish"),
        ("send", "$aws/events/presence/connected/x", "lets nobody publish"),
        ("send", "$aws/things/{thing_name}/shadow/update/accepted", "lets nobody publish"),
        ("subscribe", "a/#/b", "at the end"),
        ("subscribe", "a#", "at the end"),
        ("subscribe", "a+/b", "one whole level"),
        ("subscribe", SEVEN_SLASHES + "/#", "more than AWS IoT's 7 slashes"),
        ("subscribe", "x" * 257, "longer than AWS IoT's 256 bytes"),
    ],
)
def test_a_topic_that_aws_does_not_take_is_refused(
    main_of_pair: InProcess, pair: Pair, command: str, topic: str, problem: str
) -> None:
    result = main_of_pair(command, *pair.broker, *ONCE, "--topic", topic, status=1)
    assert problem in result.err
    assert "posting" not in result.err
    assert "subscribed" not in result.err


@pytest.mark.parametrize("command", ["send", "subscribe"])
def test_an_empty_topic_is_refused(main_of_pair: InProcess, pair: Pair, command: str) -> None:
    result = main_of_pair(command, *pair.broker, *ONCE, "--topic", "", status=1)
    assert "the topic is empty" in result.err
