"""What a program reads: --output json, line by line."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from support.aws import Account, AwsService
from support.machine import PATIENCE_S
from support.mqtt import Client
from support.networks import Relay
from support.program import constant
from support.shell import Elf, Pair, Result

JSON = ("--output", "json")
JQ = shutil.which("jq")


def objects(text: str) -> list[dict[str, Any]]:
    """Read one JSON object a line; the last is the summary, and no other is."""
    found = [json.loads(line) for line in text.splitlines()]
    assert [each["event"] == "summary" for each in found] == [False] * (len(found) - 1) + [True]
    return found


def of_kind(event: str, result: Result) -> list[dict[str, Any]]:
    found = [each for each in objects(result.out) if each["event"] == event]
    for each in found:
        del each["event"]
    return found


def test_create_tells_of_each_thing_what_aws_has(elf: Elf, account: Account) -> None:
    result = elf("create", 2, *JSON)
    created = of_kind("created", result)
    assert {each["thingName"] for each in created} == set(account.things()) == {"thing_0", "thing_1"}
    for each in created:
        name, certificate_id = each["thingName"], each["certificateId"]
        assert certificate_id == account.certificate_of(name)
        assert each["certificateArn"] == elf.recorded()[name]["certificateArn"]
        files = [each[key] for key in ("certificateFile", "publicKeyFile", "privateKeyFile")]
        assert files == [str(elf.misc / f"{name}.{suffix}") for suffix in ("pem", "pub", "prv")]
        assert len(each) == 6
    (summary,) = of_kind("summary", result)
    assert summary == {"command": "create", "exitStatus": 0, "things": 2, "created": 2, "failed": []}
    assert "Thing:'thing_0' associated with cert:" in result.err  # the log is where it was
    assert "PRIVATE" not in result.out + result.err


def test_create_again_has_a_summary_only(elf: Elf) -> None:
    elf("create", 2)
    result = elf("create", 2, *JSON)
    assert objects(result.out) == [
        {"event": "summary", "command": "create", "exitStatus": 0, "things": 2, "created": 0}
    ]


def test_clean_tells_of_each_thing(elf: Elf, account: Account) -> None:
    elf("create", 2)
    result = elf("clean", *JSON)
    assert account.is_empty()
    assert {each["thingName"] for each in of_kind("cleaned", result)} == {"thing_0", "thing_1"}
    assert of_kind("summary", result) == [{"command": "clean", "exitStatus": 0, "cleaned": 2, "left": 0, "failed": []}]


def test_clean_on_disk_alone_tells_of_each_thing(elf: Elf) -> None:
    elf("create", 2)
    result = elf("clean", "--only-local", *JSON)
    assert [each["thingName"] for each in of_kind("cleaned", result)] == ["thing_0", "thing_1"]


def test_send_tells_of_each_message_and_its_acknowledgement(pair: Pair, ear: Client) -> None:
    before = time.time()
    result = pair("send", *pair.to_broker, "--count", 3, "--interval", "0.05", *JSON)
    sent, acknowledged = of_kind("sent", result), of_kind("acknowledged", result)
    heard = [(message.topic, message.payload.decode()) for message in ear.hear_all()]
    assert Counter((each["topic"], each["payload"]) for each in sent) == Counter(heard)
    numbers = {(name, number) for name in ("thing_0", "thing_1") for number in (1, 2, 3)}
    assert {(each["thingName"], each["number"]) for each in sent} == numbers
    assert {(each["thingName"], each["number"]) for each in acknowledged} == numbers
    for each in sent:
        assert set(each) == {"thingName", "number", "topic", "payload", "qos", "retain", "time"}
        assert before - 0.01 <= each["time"] <= time.time()
        assert each["qos"] == 1
    for each in acknowledged:
        assert set(each) == {"thingName", "number", "latencyMs"}
        assert 0 < each["latencyMs"] < 1000 * PATIENCE_S
    (summary,) = of_kind("summary", result)
    latency, from_due = summary.pop("latencyMs"), summary.pop("latencyFromDueMs")
    assert list(latency) == ["p50", "p95", "p99", "max"]
    assert list(latency.values()) == sorted(latency.values())
    assert latency["max"] == max(each["latencyMs"] for each in acknowledged)
    assert all(from_due[name] >= latency[name] for name in latency)
    assert 0 <= summary.pop("lateMs") < 1000 * PATIENCE_S
    assert 0.1 <= summary.pop("durationS") < PATIENCE_S
    assert summary == {
        **{"command": "send", "exitStatus": 0, "things": 2, "failed": []},
        **{"sent": 6, "acknowledged": 6, "lost": 0, "notSent": 0, "sentAgain": 0},
        **{"messagesPerS": None, "connects": 2, "offlineS": {}, "lateCause": None},
        **{"accepted": 0, "rejected": 0, "notAnswered": 0},
    }


def test_subscribe_tells_of_each_message_that_comes(pair: Pair, connect: Callable[[Account], Client]) -> None:
    window = pair.subscribe("--count", 4, "--topic", "elf/thing_0/+", *JSON)
    client = connect(pair.account)
    before = time.time()
    client.publish("elf/thing_0/text", 'ü "quoted"\n', qos=1)
    client.publish("elf/thing_0/bytes", b"\xff\x00", qos=0)
    window.end()
    out = window.out
    received = [each for each in objects(out) if each["event"] == "received"]
    assert {each["thingName"] for each in received} == {"thing_0", "thing_1"}
    text, data = (
        next(each for each in received if each["topic"] == f"elf/thing_0/{kind}") for kind in ("text", "bytes")
    )
    assert (text["payload"], text["qos"], text["retain"]) == ('ü "quoted"\n', 1, False)
    assert before - 0.01 <= text["time"] <= time.time()
    assert set(text) == {"event", "thingName", "topic", "payload", "qos", "retain", "time"}
    assert (data["payload"], data["payloadBase64"], data["qos"]) == (None, "/wA=", 0)
    assert objects(out)[-1]["received"] == 4


def test_a_command_that_fails_has_its_name_cause_and_remedy_in_the_summary(elf: Elf) -> None:
    result = elf("send", *JSON, status=1)
    (summary,) = objects(result.out)
    cause, remedy = (line for line in result.lines if line)
    assert summary == {
        **{"event": "summary", "command": "send", "exitStatus": 1},
        "error": {"name": "NoThings", "cause": cause, "remedy": remedy.removeprefix("what to do: ")},
    }


def test_a_thing_that_fails_is_in_the_summary(elf: Elf) -> None:
    elf("create", 2)
    (elf.misc / "thing_1.prv").unlink()
    result = elf("send", *elf.to_broker, "--count", 1, *JSON, status=1)
    (summary,) = of_kind("summary", result)
    assert (summary["failed"], summary["things"], summary["sent"]) == (["thing_1"], 1, 1)


def test_ctrl_c_still_brings_the_summary(pair: Pair) -> None:
    window = pair.subscribe(*JSON)
    window.signal(signal.SIGINT)
    window.end(130)
    assert objects(window.out)[-1]["exitStatus"] == 130


def test_what_the_sdk_prints_stays_out_of_the_json(pair: Pair, service: AwsService, relay: Relay) -> None:
    window = pair.start("send", *relay.to_broker(service), "--count", 30, "--interval", "0.1", *JSON)
    window.await_line("posting message")
    relay.cut()
    window.await_count(" reconnected to ", 2)
    window.end()
    summary = objects(window.out)[-1]
    assert (summary["acknowledged"], summary["connects"]) == (60, 4)
    assert summary["offlineS"].keys() == {"thing_0", "thing_1"}
    assert summary["latencyFromDueMs"]["max"] >= summary["lateMs"] >= 1000 * min(summary["offlineS"].values()) - 200
    assert summary["lateCause"] == constant("OFFLINE")
    assert summary["durationS"] == pytest.approx(60 / summary["messagesPerS"], abs=0.1)


needs_jq = pytest.mark.skipif(not JQ, reason="jq is not installed")


@needs_jq
def test_jq_reads_what_subscribe_hears(pair: Pair, connect: Callable[[Account], Client]) -> None:
    client = connect(pair.account)
    window = pair.subscribe("--append-thing-name", "--count", 2, *JSON)
    for name in ("thing_0", "thing_1"):
        client.publish(f"elf/{name}", json.dumps({"temperature": 21}))
    window.end()
    (pair.cwd / "heard").write_text(window.out)
    assert pair.in_shell("jq .payload < heard").out.count('"{\\"temperature\\": 21}"') == 2
    result = pair.in_shell("jq 'select(.event == \"received\") | .payload | fromjson | .temperature' < heard")
    assert result.out == "21\n21\n"


@needs_jq
def test_jq_at_the_end_of_a_pipe(pair: Pair) -> None:
    result = pair.in_shell("$ELF send $BROKER --count 2 --interval 0.1 --output json 2>/dev/null | jq -r .topic")
    assert Counter(result.out.split()) == {"elf/thing_0": 2, "elf/thing_1": 2, "null": 5}
