"""`send --verify`: which messages come back to the thing that sent them, as a broker and another client see it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from support.aws import AwsService
from support.failures import Explained
from support.mqtt import Client
from support.mqtt_proxy import DROP, REPEAT, REPEAT_LATER, SWAP, MqttProxy
from support.program import Limits
from support.shell import InProcess, Pair, Result

VERIFY = ("send", "--verify", "--interval", "0.02", "--output", "json")
RUN = 20  # messages of a thing


def summary_of(result: Result) -> dict[str, object]:
    return dict(json.loads(result.out.splitlines()[-1]))


@pytest.mark.parametrize("qos", [0, 1])
def test_all_messages_come_back(main_of_pair: InProcess, pair: Pair, ear: Client, qos: int) -> None:
    result = main_of_pair(*VERIFY, *pair.to_broker, "--count", 5, "--qos", qos)
    heard = [json.loads(message.payload) for message in ear.hear_all()]
    assert sorted((each["thing"], each["seq"]) for each in heard) == [
        (thing, number) for thing in ("thing_0", "thing_1") for number in range(1, 6)
    ]
    summary = summary_of(result)
    assert (summary["sent"], summary["returned"]) == (10, 10)
    assert {*summary["roundTripMs"]} == {"p50", "p95", "p99", "max"}  # type: ignore[misc]
    assert "[send_messages] came back: 10 of 10 messages" in result.lines


@pytest.mark.parametrize("seed", [1, 2])
def test_what_does_not_come_back_is_named_and_fails(
    main_of_pair: InProcess,
    pair: Pair,
    service: AwsService,
    tmp_path: Path,
    seed: int,
    explained: Explained,
    limits: Limits,
) -> None:
    limits(ACK_GRACE_S=1.0, ACK_PAUSE_S=0.5)
    kinds = [DROP, REPEAT, REPEAT_LATER, SWAP]
    with contextlib.closing(MqttProxy(tmp_path, pair, service, seed, RUN, kinds)) as proxy:
        result = main_of_pair(*VERIFY, *proxy.to_broker, "--count", RUN, status=1)
        dropped = {
            thing: [number for number, (what, _) in proxy.plan(thing, thing).items() if what == DROP]
            for thing in pair.recorded()
        }
    count = sum(map(len, dropped.values()))
    assert count
    explained(result, "MessagesNotReturned", f"{count} message")
    assert summary_of(result)["returned"] == 2 * RUN - count
    for thing, numbers in dropped.items():
        told = [line for line in result.lines if line.startswith(f"did not come back to {thing}: ")]
        assert [line.rpartition("message")[2].lstrip("s ") for line in told] == (
            [", ".join(map(str, numbers))] if numbers else []
        )


def test_a_message_of_others_on_the_topic_does_not_count(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    for content in ("text", '{"thing": "thing_0", "seq": 1}', '{"thing": "thing_0", "seq": [1], "run": ""}'):
        ear.publish("elf/thing_0", content, retain=True)
    result = main_of_pair(*VERIFY, *pair.to_broker, "--count", 2)
    ear.publish("elf/thing_0", "", retain=True)
    assert summary_of(result)["returned"] == 4


@pytest.mark.parametrize(
    ("options", "name", "fact"),
    [
        (("--topic", "one"), "TopicShared", "--append-thing-name"),
        (("--raw", "text"), "SequenceUseless", "--verify"),
        (("--topic", "$aws/rules/x/{thing_name}"), "SequenceUseless", "--verify"),
        (("--topic", "$aws/things/{thing_name}/shadow/update"), "SequenceUseless", "--verify"),
        (('{"seq": 1}',), "SequenceTaken", "seq"),
    ],
)
def test_what_nobody_could_count_is_wrong_usage(
    main_of_pair: InProcess, options: tuple[str, ...], name: str, fact: str, explained: Explained
) -> None:
    explained(main_of_pair(*VERIFY, *options, status=2), name, fact)
