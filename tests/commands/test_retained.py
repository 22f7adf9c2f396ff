"""Retained messages: who gets them, as AWS's list and an independent client say; what AWS would not retain."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.aws import Account
from support.failures import Explained
from support.mqtt import PUBLISH, Broker, Client, Heard, Peer, answer_to
from support.shell import Elf, InProcess, Pair

ONCE = ("--duration", "0.01")


def retained_topics(account: Account) -> list[str]:
    return sorted(each["topic"] for each in account.client("iot-data").list_retained_messages()["retainedTopics"])


def test_a_retained_message_is_there_for_who_subscribes_later_until_it_is_deleted(
    main_of_pair: InProcess, pair: Pair, ear: Client, connect: Callable[[Account], Client]
) -> None:
    topics = ["elf/thing_0", "elf/thing_1"]
    sent = main_of_pair("send", *pair.to_broker, "-r", "--interval", "0.1", '{"v": 1}', "--output", "json")
    assert "[send_messages] ELF sending 1 retained message from each of 2 things" in sent.lines
    assert [json.loads(line)["retain"] for line in sent.out.splitlines() if '"event": "sent"' in line] == [True, True]
    assert sorted((each.topic, each.retain) for each in ear.hear_all()) == [(topic, False) for topic in topics]  # live
    assert retained_topics(pair.account) == topics

    late = connect(pair.account)
    late.subscribe("elf/+")
    assert late.hear_all() == []
    late.subscribe("elf/thing_0")
    heard = late.hear()
    assert (heard.topic, json.loads(heard.payload)["v"], heard.retain) == ("elf/thing_0", 1, True)

    options = ("-t", "elf/{thing_name}", "-t", "other/#", "--count", 2, "--output", "json")
    result = main_of_pair("subscribe", *pair.to_broker, *options)
    received = [json.loads(line) for line in result.out.splitlines()]
    assert [each["retain"] for each in received[:-1]] == [True, True]
    assert received[-1]["retained"] == 2 and not received[-1]["latencyMs"] and not received[-1]["senders"]
    assert sum(line.startswith('Received retained message: {"v": 1') for line in result.lines) == 2
    assert any(line.endswith("to its exact topic, not to other/#") for line in result.lines)
    assert result.lines[-1].startswith("[subscribe] ELF received 2 messages (2 retained) on 2 things")

    deleted = main_of_pair("send", *pair.to_broker, "--retain", "--interval", "0.1", "--raw", "-m", "")
    assert "an empty message deletes what is retained" in deleted.lines
    assert deleted.lines[-1].endswith("ELF sent 2 messages from 2 things: 2 acknowledged, 0 lost")
    assert sorted(ear.hear_all()) == [Heard(topic, b"", 1) for topic in topics]
    assert retained_topics(pair.account) == []


@pytest.mark.parametrize(
    ("filters", "is_said"),
    [(("nothing/+/here",), True), (("nothing/here",), False), (("nothing/here", "nothing/#"), True)],
)
def test_that_a_wildcard_gets_nothing_retained_is_said_where_it_may_be_why(
    main_of_pair: InProcess, pair: Pair, filters: tuple[str, ...], is_said: bool
) -> None:
    options = [word for topic_filter in filters for word in ("-t", topic_filter)]
    lines = main_of_pair("subscribe", *pair.to_broker, *ONCE, *options).lines
    told = [line for line in lines if "what is retained only to who subscribes to its exact topic" in line]
    assert [line.rpartition("not to ")[2] for line in told] == [filters[-1]] * is_said


def test_an_empty_text_is_not_an_empty_message(main_of_pair: InProcess) -> None:
    lines = main_of_pair("send", "--mqtt-endpoint", "localhost:1", "-r", "", status=1).lines
    assert lines[0] == "an empty message deletes what is retained; this one is not empty: add --raw"


def test_what_is_sent_again_is_still_to_be_retained(main_of_pair: InProcess, tmp_path: Path) -> None:
    def hang_up_at_message(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        next(iter(peer))

    with contextlib.closing(Broker(tmp_path, {"thing_0": [hang_up_at_message]})) as between:
        result = main_of_pair("send", *between.to_broker, "-r", "--things", 1)
        assert "1 message sent again" in result.err and "1 acknowledged, 0 lost" in result.lines[-1]
        assert [each.flags & 1 for each in between.of("thing_0", PUBLISH)] == [1, 1]


@pytest.mark.parametrize(
    ("options", "name", "facts"),
    [
        (("--interval", "0.5", "--count", 2), "RetainTooOften", ("0.5", "--interval 1 ")),
        (("--interval", "0.99", "--duration", 5), "RetainTooOften", ("0.99",)),
        (("--interval", "0.5", "--json-message", "some.jsonl"), "RetainTooOften", ("0.5",)),
        (("-t", "one"), "TopicShared", ("{thing_name}", "--topic", "--things 1")),
        (("-t", "$aws/rules/rule/{thing_name}"), "RetainReserved", ("'$aws/rules/rule/thing_0'", "--retain")),
        (("-t", "$aws/things/{thing_name}/shadow/update"), "RetainReserved", ("--topic",)),
        (("-t", "$share/group/{thing_name}"), "BadTopic", ("--topic",)),
    ],
)
def test_what_aws_would_not_retain_is_wrong_usage(
    main_of_pair: InProcess,
    pair: Pair,
    options: tuple[str, ...],
    name: str,
    facts: tuple[str, ...],
    explained: Explained,
) -> None:
    explained(main_of_pair("send", *pair.to_broker, "-r", *options, status=2), name, *facts)


def test_a_policy_of_an_earlier_elf_gets_what_retaining_needs(main: InProcess, elf: Elf, account: Account) -> None:
    main("create")
    main("send", *elf.to_broker, *ONCE)
    account.use_earlier_policies(elf.misc)
    assert "1 acknowledged, 0 lost" in main("send", *elf.to_broker, "--retain").lines[-1]
    assert retained_topics(account) == ["elf/thing_0"]


@pytest.mark.parametrize(
    ("line", "is_needed"),
    [
        ("send", False),
        ("send --retain", True),
        ("send --will-topic a", True),
        ("subscribe --will-topic a", True),
        ("subscribe", False),
    ],
)
def test_the_current_policy_is_needed_to_retain_and_for_a_will(module: ModuleType, line: str, is_needed: bool) -> None:
    assert module.build_parser().parse_args(line.split(), module.Cli()).needs_current_policy is is_needed
