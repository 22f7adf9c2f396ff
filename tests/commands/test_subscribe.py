"""What `subscribe` hears and passes on; how long it and `send` last, and who takes part."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.aws import Account, AwsService
from support.failures import Explained
from support.machine import PATIENCE_S
from support.mqtt import Client, mqtt_client_of
from support.shell import Elf, InProcess, Pair

ONCE = ("--duration", "0.01")


@pytest.mark.parametrize(
    ("command", "options", "first_line", "last_line"),
    [
        ("subscribe", ("--duration", 0), "listening on 2 things until Ctrl-C", "received 0 messages on 2 things"),
        ("subscribe", ("--count", 3), "listening on 2 things until 3 messages have arrived", "received 0 messages on"),
        ("send", ("--duration", 0), "sending messages from each of 2 things until Ctrl-C", " acknowledged, 0 lost"),
        (
            *("send", ("--duration", 0, "--json-message", "-")),
            *("sending each line of standard input from each of 2 things", "2 acknowledged, 0 lost"),
        ),
    ],
)
def test_an_endless_send_or_subscribe_says_so_and_ends_with_ctrl_c(
    pair: Pair, command: str, options: tuple[object, ...], first_line: str, last_line: str
) -> None:
    stdin = subprocess.PIPE if "-" in options else subprocess.DEVNULL
    window = (
        pair.start(command, *pair.to_broker, "--interval", "0.01", *options, stdin=stdin)
        if command == "send"
        else (pair.start(command, *pair.to_broker, *options))
    )
    assert window.await_line(f"ELF {first_line}").endswith(f"ELF {first_line}\n")
    if window.process.stdin:
        window.process.stdin.write("line\n")
        window.process.stdin.flush()
    if command == "send":
        window.await_count("posting message", 2 if window.process.stdin else 40)
    window.signal(signal.SIGINT)
    result = window.end(130)
    assert last_line in result.lines[-2]
    assert result.lines[-1] == "interrupted (Ctrl-C)"


def test_subscribe_waits_for_as_many_messages_as_it_is_to_count(pair: Pair, ear: Client) -> None:
    window = pair.start("subscribe", *pair.to_broker, "--count", 3)
    window.await_line("ELF listening on 2 things until 3 messages have arrived")
    ear.publish("elf/x", "one")
    window.await_count("one from topic", 2)
    ear.publish("elf/x", "two")
    result = window.end()
    assert sorted(line for line in result.lines if line.startswith("Received"))[:2] == [
        f"Received message: one from topic: elf/x by thing_{number}" for number in (0, 1)
    ]
    assert len(result.received) == 3


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        ((), True),
        (("--topic", "a/{thing_name}", "--topic", "b"), True),
        (("--append-thing-name",), False),
        (("--things", 1), False),
        (("--topic", "$share/one/elf/#"), False),
    ],
)
def test_that_each_thing_hears_the_same_is_said(
    main_of_pair: InProcess, pair: Pair, options: tuple[object, ...], is_said: bool
) -> None:
    lines = main_of_pair("subscribe", *pair.to_broker, *ONCE, *options).lines
    assert any("all things receive every message" in line for line in lines) is is_said


def test_the_first_things_of_a_fleet_can_be_at_work_alone(
    main: InProcess, elf: Elf, account: Account, connect: Callable[[Account], Client], explained: Explained
) -> None:
    main("create", 11)
    ear = connect(account)
    ear.subscribe("elf/#")
    lines = main("send", *elf.to_broker, "--count", 1, "--things", 3).lines
    assert sorted(heard.topic for heard in ear.hear_all()) == ["elf/thing_0", "elf/thing_1", "elf/thing_2"]
    assert account.policies() == ["anything", *(f"policy-thing_{number}" for number in range(3))]
    assert not [line for line in lines if "without a policy" in line]
    assert "ELF listening on 3 things for 0.01 s" in main("subscribe", *elf.to_broker, *ONCE, "--things", 3).err
    some = ("--things", "thing_1?,thing_7", "--things", "thing_0")
    assert "from each of 3 things" in main("send", *elf.to_broker, "--count", 1, *some).err
    heard = sorted(heard.topic for heard in ear.hear_all())
    assert heard == ["elf/thing_0", "elf/thing_10", "elf/thing_7"]
    assert "ELF listening on 3 things for 0.01 s" in main("subscribe", *elf.to_broker, *ONCE, *some).err
    for command in ("send", "subscribe"):
        result = main(command, *elf.to_broker, "--things", "thing_0,thing_99", status=1)
        explained(result, "NoSuchThing", "no thing named thing_99", "thing_0, thing_1, ")
        assert len(result.lines) == 2
        result = main(command, *elf.to_broker, "--things", 12, status=1)
        explained(result, "TooFewThings", "--things 12 ", "11", "elf.py create 12`")
        assert len(result.lines) == 2


def test_payloads_go_to_standard_output_as_they_came(pair: Pair, ear: Client) -> None:
    payloads = [b'{"a": 1.50}', b"\xff\x00\xfe", "Grüße".encode(), b"", b"two\r\nlines"]
    options = ("--things", 1, "--count", 5, "--output", "payload")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with pair.popen("subscribe", *pair.to_broker, *options, **pipes, text=False, encoding=None, errors=None) as process:
        assert process.stdout
        assert process.stderr
        while b"ELF listening" not in process.stderr.readline():
            assert process.poll() is None
        for number, payload in enumerate(payloads):
            ear.publish("elf/x", payload)
            if not number:
                assert process.stdout.readline() == payloads[0] + b"\n"  # at once, though more are to come
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert out == b"".join(payload + b"\n" for payload in payloads[1:])


def test_payloads_and_the_live_line_share_a_terminal(pair: Pair) -> None:
    sender = pair.start("send", *pair.to_broker, "--duration", 0, "--interval", "0.1")
    sender.await_line("posting message")
    options = ("--things", 1, "--count", 10, "--output", "payload")
    terminal = pair.in_terminal("subscribe", *pair.to_broker, *options, columns=300)
    assert any(text.startswith("received ") for text in terminal.drawn)
    assert [json.loads(line)["msg"] for line in terminal.seen if line.startswith("{")] == (["IoT ELF Hello"] * 10)


@pytest.mark.parametrize(("reader", "status", "read"), [("| grep -m 1 two", 141, "two\n"), ("> /dev/full", 1, "")])
def test_payloads_end_with_their_reader(
    pair: Pair, ear: Client, tmp_path: Path, reader: str, status: int, read: str
) -> None:
    command = " ".join([pair.python, str(pair.script), "subscribe", *pair.to_broker, "--duration 0 --output payload"])
    script = f"set -o pipefail; {command} 2> {tmp_path / 'log'} {reader}"
    (tmp_path / "log").touch()
    environment = pair.environment
    with subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            ear.publish("elf/x", "one")
            ear.publish("elf/x", "two")
        assert process.stdout
        assert process.stdout.read() == read
    assert process.returncode == status, (tmp_path / "log").read_text()


def test_subscribe_hears_an_independent_client_with_a_things_files(pair: Pair, service: AwsService) -> None:
    window = pair.subscribe("--count", 2)
    client = mqtt_client_of(pair, service, "thing_1", "thing_1-paho")
    assert client.connect() == "Success"
    client.publish("elf/from/paho", "hello, ELF")
    client.close()
    result = window.end()
    assert result.received == [("elf/from/paho", "hello, ELF")] * 2
    assert result.lines[-1] == "[subscribe] ELF received 2 messages on 2 things"


def test_two_windows_with_append_thing_name_hear_each_other(pair: Pair) -> None:
    window = pair.subscribe("--append-thing-name", "--count", 4)
    pair("send", *pair.to_broker, "--append-thing-name", "--duration", "0.1", "--interval", "0.05")
    received = window.end().received
    assert Counter(topic for topic, _ in received) == {"elf/thing_0": 2, "elf/thing_1": 2}
    assert {json.loads(payload)["msg"] for _, payload in received} == {"IoT ELF Hello"}


def test_the_default_subscribe_hears_every_default_send(pair: Pair) -> None:
    window = pair.subscribe("--count", 4)
    pair("send", *pair.to_broker, *ONCE)
    assert Counter(topic for topic, _ in window.end().received) == {"elf/thing_0": 2, "elf/thing_1": 2}


def test_subscribe_for_its_duration_succeeds_whatever_comes(main_of_pair: InProcess, pair: Pair) -> None:
    result = main_of_pair("subscribe", *pair.to_broker, "--duration", "0.1", "--qos", 0)
    assert result.lines[-1] == "[subscribe] ELF received 0 messages on 2 things"


def test_subscribe_fails_when_fewer_messages_than_its_count_come(
    main_of_pair: InProcess, pair: Pair, explained: Explained
) -> None:
    result = main_of_pair("subscribe", *pair.to_broker, "--duration", "0.1", "--count", 3, status=1)
    explained(result, "TooFewMessages", "0 messages in 0.1 s, not 3")
