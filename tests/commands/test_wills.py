"""A last will: what the broker publishes when a thing is lost, and only then."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.aws import Account, AwsService
from support.failures import Explained
from support.mosquitto import mosquitto
from support.mqtt import Client, Heard, mqtt_client_of
from support.shell import InProcess, Pair

WILL = ("--will-topic", "gone/{thing_name}")
SUBSCRIBE = ("subscribe", "--append-thing-name", "--duration", 30)


@pytest.fixture(params=["MiniStack", "Mosquitto"])
def broker(request: pytest.FixtureRequest, service: AwsService, tmp_path: Path) -> Iterator[AwsService]:
    with contextlib.nullcontext(service) if request.param == "MiniStack" else mosquitto(tmp_path) as running:
        yield running


@pytest.mark.skipif(os.name != "posix", reason="no signals like these")
@pytest.mark.parametrize(
    ("options", "signum", "payload", "qos"),
    [
        (("send", "--duration", 0, *WILL), signal.SIGKILL, b'{"msg": "%s disconnected"}', 1),
        ((*SUBSCRIBE, *WILL, "--will-message", "{thing_name} ü", "--will-qos", 0), signal.SIGKILL, "%s ü".encode(), 0),
        ((*SUBSCRIBE, *WILL), signal.SIGINT, None, 1),
        ((*SUBSCRIBE, *WILL), signal.SIGTERM, None, 1),
    ],
)
def test_the_broker_publishes_the_wills_of_what_is_killed_and_not_of_what_ends(
    pair: Pair, broker: AwsService, options: tuple[object, ...], signum: signal.Signals, payload: bytes | None, qos: int
) -> None:
    to_broker = "--mqtt-endpoint", f"localhost:{broker.mqtt_port}", "--root-cert", broker.root_cert
    with contextlib.closing(mqtt_client_of(pair, broker, "thing_1", "thing_1-paho")) as client:
        assert client.connect() == "Success"
        client.subscribe("end-of-test")
        client.subscribe("gone/#")
        window = pair.start(*options, *to_broker)
        window.await_line("ELF listening on|posting message")
        window.signal(signum)
        window.process.wait()
        if payload:
            heard = sorted(client.hear() for _ in range(2))
            assert heard == [
                Heard(f"gone/{thing}", payload.replace(b"%s", thing.encode()), qos) for thing in ("thing_0", "thing_1")
            ]
        assert client.hear_all() == []


def test_an_outage_that_elf_makes_sends_the_wills(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    options = ("--count", 2, "--interval", "0.6", "--outage", "0.2/1", "--append-thing-name", *WILL)
    assert "4 acknowledged, 0 lost" in main_of_pair("send", *pair.to_broker, *options).err
    gone = [each.topic for each in ear.hear_all() if each.topic.startswith("gone/")]
    assert sorted(gone) == ["gone/thing_0", "gone/thing_1"]


def test_a_will_can_be_retained(pair: Pair, connect: Callable[[Account], Client]) -> None:
    options = ("--things", 1, *WILL, "--will-retain", "--will-message", "lost")
    window = pair.start(*SUBSCRIBE, *pair.to_broker, *options)
    window.await_line("ELF listening on")
    ear = connect(pair.account)
    ear.subscribe("gone/#")
    window.signal(signal.SIGKILL)
    assert ear.hear() == Heard("gone/thing_0", b"lost", 1)
    late = connect(pair.account)
    late.subscribe("gone/thing_0")
    assert late.hear() == Heard("gone/thing_0", b"lost", 1, retain=True)
    late.publish("gone/thing_0", b"", retain=True)


@pytest.mark.parametrize(
    ("options", "name", "facts"),
    [
        (("--will-topic", "a/#"), "BadTopic", ("'a/#'", "choose another with --will-topic")),
        (("--will-topic", ""), "BadTopic", ("is empty",)),
        (("--will-topic", "$SYS/{thing_name}"), "BadTopic", ("lets no client publish",)),
        (("--will-topic", "$aws/things/{thing_name}/shadow/update"), "WillIgnored", ("'$aws/things/thing_0/", "rule")),
        (("--will-topic", "one", "--will-retain"), "TopicShared", ("{thing_name} into --will-topic", "--things 1")),
        (("--will-topic", "$aws/rules/a/{thing_name}", "--will-retain"), "RetainReserved", ("--will-retain",)),
        ((*WILL, "--will-message", "ü" * 32_768), "WillTooLong", ("65,536", "65,535")),
        ((*WILL, "--will-message", "\udcff"), "NotUtf8", ("UTF-8",)),
    ],
)
def test_a_will_that_would_have_no_effect_is_wrong_usage(
    main_of_pair: InProcess,
    pair: Pair,
    options: tuple[str, ...],
    name: str,
    facts: tuple[str, ...],
    explained: Explained,
) -> None:
    for command in ("send", "subscribe"):
        explained(main_of_pair(command, *pair.to_broker, "--duration", "0.01", *options, status=2), name, *facts)
