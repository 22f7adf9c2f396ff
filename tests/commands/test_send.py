"""What things send: texts, objects, raw bytes, shadows; how often, and how large."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.aws import Account, AwsService
from support.failures import Explained
from support.mqtt import Client, Heard, mqtt_client_of
from support.program import ROOT
from support.shell import Elf, InProcess, Pair

from iot_elf.messages import PayloadBuilder

ONCE = ("--duration", "0.01")


def payload_of(heard: Heard) -> dict[str, object]:
    return dict(json.loads(heard.payload))


def test_an_independent_client_with_a_things_files_hears_what_send_sends(pair: Pair, service: AwsService) -> None:
    client = mqtt_client_of(pair, service, "thing_1", "thing_1-paho")
    assert client.connect() == "Success"
    client.subscribe("elf/thing_0")
    before = time.time()
    pair("send", *pair.to_broker, *ONCE)
    topic, payload, qos, _ = client.hear()
    client.close()
    message = json.loads(payload)
    assert (topic, qos, list(message), message["msg"]) == ("elf/thing_0", 1, ["msg", "ts"], "IoT ELF Hello")
    assert re.fullmatch(r"[0-9]{10}\.[0-9]{3}", message["ts"])
    assert before - 0.01 <= float(message["ts"]) <= time.time() + 0.01


@pytest.mark.parametrize(
    ("duration", "interval", "number"), [("0.3", "0.1", 3), ("1.1", "0.1", 11), ("0.01", "1", 1), ("0.14", "0.02", 7)]
)
def test_each_thing_sends_duration_divided_by_interval_messages(
    main_of_pair: InProcess, pair: Pair, ear: Client, duration: str, interval: str, number: int
) -> None:
    result = main_of_pair("send", *pair.to_broker, "--duration", duration, "--interval", interval)
    assert Counter(heard.topic for heard in ear.hear_all()) == {"elf/thing_0": number, "elf/thing_1": number}
    assert result.lines[-1] == (
        f"[send_messages] ELF sent {2 * number} messages from 2 things: {2 * number} acknowledged, 0 lost"
    )


def test_qos_0_is_sent_without_acknowledgement(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    result = main_of_pair("send", *pair.to_broker, *ONCE, "--qos", 0)
    assert [ear.hear().qos, ear.hear().qos] == [0, 0]
    assert "none acknowledged (QoS 0), 0 lost" in result.lines[-1]


def test_every_message_has_the_time_of_its_publishing(main_of_pair: InProcess, pair: Pair, ear: Client) -> None:
    before = time.time()
    main_of_pair("send", *pair.to_broker, "--duration", "0.6", "--interval", "0.2")
    after = time.time()
    stamps = [float(str(payload_of(heard)["ts"])) for heard in ear.hear_all() if heard.topic == "elf/thing_0"]
    assert stamps == sorted(stamps)
    assert len(set(stamps)) > 1
    assert before - 0.01 <= stamps[0] < stamps[-1] <= after + 0.01


@pytest.mark.parametrize("message", ["Hello again", "Grüße \N{ELF}", '{"half', "", "-"])
def test_the_message_given_is_the_one_sent(main_of_pair: InProcess, pair: Pair, ear: Client, message: str) -> None:
    main_of_pair("send", *pair.to_broker, *ONCE, message)
    assert [payload_of(heard)["msg"] for heard in ear.hear_all()] == [message] * 2


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ((ROOT / "example.json").read_text(), json.loads((ROOT / "example.json").read_text())),
        ("{}", {}),
        ('\ufeff{"from": "Windows"}', {"from": "Windows"}),
        ('{"deep": {"ts": [1, null, "ü"]}}', {"deep": {"ts": [1, None, "ü"]}}),
    ],
)
def test_a_json_message_is_the_object_in_the_file_plus_ts(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path, text: str, sent: object
) -> None:
    file = tmp_path / "message.json"
    file.write_text(text, encoding="utf-8")
    main_of_pair("send", *pair.to_broker, *ONCE, "--json-message", file)
    message = payload_of(ear.hear())
    assert re.fullmatch(r"[0-9]{10}\.[0-9]{3}", str(message.pop("ts")))
    assert message == sent


INVALID = "MessageFileInvalid"


@pytest.mark.parametrize(
    ("content", "failure", "fact"),
    [
        (None, INVALID, "No such file"),
        (b"", INVALID, "message.json: Expecting value"),
        (b"{'python': 1}", INVALID, "message.json: Expecting property name"),
        (b"\xff\xfe\x00", INVALID, "message.json: 'utf-8' codec"),
        (b'{"number": NaN}', INVALID, "message.json: NaN is not JSON"),
        (b"[" * 100_000, "JsonTooDeep", "--raw"),
        (b"[1, 2]", INVALID, "not a JSON object"),
        (b'"text"', INVALID, "not a JSON object"),
        (b'{"a": 1,]', INVALID, "message.json: Expecting property name"),
    ],
)
def test_a_bad_json_message_is_refused_before_anything_is_sent(
    main_of_pair: InProcess,
    pair: Pair,
    tmp_path: Path,
    content: bytes | None,
    failure: str,
    fact: str,
    explained: Explained,
) -> None:
    file = tmp_path / "message.json"
    if content is not None:
        file.write_bytes(content)
    result = main_of_pair("send", *pair.to_broker, *ONCE, "--json-message", file, status=2)
    explained(result, failure, fact)
    assert "posting" not in result.err


GIVEN = [
    (
        '{"lat": 51.507351234567890123, "price": 10.00, "e": 1E+2, "big": 1e400, "i": 1%s}' % ("0" * 5000),
        ', "ts": "{}"',
    ),
    ('{ "b" : 1,\t"a":2, "b":3,\r\n "lone": "\\ud800", "esc": "\\/\\u00fc\x7f}" , "o": {}\n }\n\n', ', "ts": "{}"'),
    ("{ \n}", '"ts": "{}"'),
    ('{"a": 1, "\\u0074s": "2001-01-01"}\n', ""),
    ('{"ts": 7}', ""),
    ('{"a":' * 99 + '["}"]' + "}" * 99, ', "ts": "{}"'),
]


@pytest.mark.parametrize("topic", ["a", "$aws/rules/r/a", "$aws/things/t/shadow/update"])
@pytest.mark.parametrize(("text", "put_in"), GIVEN)
def test_an_object_goes_out_as_its_text_was_with_the_time_before_its_last_brace(
    module: ModuleType, text: str, put_in: str, topic: str
) -> None:
    """What is published is the payload's bytes, as other tests of this page see."""
    before_ms = time.time_ns() // 1_000_000
    payload = PayloadBuilder.of_object(text.encode()).payload(topic, "thing_0", 1).decode()
    after_ms = time.time_ns() // 1_000_000
    head, brace, tail = text.rpartition("}")
    if "things" in topic or not put_in:
        assert payload == text
        return
    (ts,) = re.findall(r'"ts": "([0-9]{10}\.[0-9]{3})"', payload)
    assert payload == head + put_in.format(ts) + brace + tail
    assert before_ms <= int(ts.replace(".", "")) <= after_ms


@pytest.mark.parametrize("content", [b"[1, 2]\n", b"", b"\xef\xbb\xbf\x00\xff\r\n", b'{"ts": NaN}', b"7"])
def test_raw_bytes_go_out_as_they_are(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "given.bin").write_bytes(content)
    main_of_pair("send", *pair.to_broker, *ONCE, "--raw", "--json-message", tmp_path / "given.bin")
    assert [heard.payload for heard in ear.hear_all()] == [content] * 2
    assert json.loads(
        main_of_pair("send", *pair.to_broker, "-n", 1, "--raw", "", "--output", "json").out.splitlines()[-1]
    )
    assert [heard.payload for heard in ear.hear_all()] == [b""] * 2


def test_basic_ingest_gets_what_any_topic_gets(main_of_pair: InProcess, pair: Pair) -> None:
    """The broker gives what is published there to nobody who could tell."""
    topic = "$aws/rules/a_rule/{thing_name}"
    result = main_of_pair("send", *pair.to_broker, "-n", 1, "--topic", topic, "--output", "json", "hello")
    sent = [json.loads(line) for line in result.out.splitlines() if '"sent"' in line]
    assert [event["topic"] for event in sent if event["event"] == "sent"] == [
        f"$aws/rules/a_rule/{name}" for name in pair.recorded()
    ]
    assert [list(json.loads(event["payload"])) for event in sent if event["event"] == "sent"] == [["msg", "ts"]] * 2


def test_the_shadow_example_changes_the_shadow_of_each_thing(main: InProcess, elf: Elf, account: Account) -> None:
    main("create", 2)
    topic = "$aws/things/{thing_name}/shadow/update"
    main("send", *elf.to_broker, *ONCE, "--json-message", ROOT / "example-shadow.json", "--topic", topic)
    for name in ("thing_0", "thing_1"):
        state = account.shadow(name)["state"]
        assert (state["desired"], state["reported"]) == ({"colour": "green"}, {"colour": "red"})


def test_a_reserved_topic_gets_the_bytes_of_the_file(
    main: InProcess, elf: Elf, account: Account, connect: Callable[[Account], Client], tmp_path: Path
) -> None:
    main("create")
    client = connect(account)
    topic = "$aws/things/thing_0/shadow/update"
    client.subscribe(topic)
    content = b'\r\n{ "state" : {"reported":{"n": 1.50,\t"\xc3\xbc":"\\u00fc"}} }\n\n'
    (tmp_path / "shadow.json").write_bytes(content)
    main("send", *elf.to_broker, *ONCE, "--json-message", tmp_path / "shadow.json", "--topic", topic)
    assert client.hear().payload == content


@pytest.mark.parametrize(("extra", "status"), [(0, 0), (1, 2)])
def test_a_message_may_have_128_kib_and_no_more(
    main_of_pair: InProcess, pair: Pair, ear: Client, tmp_path: Path, extra: int, status: int, explained: Explained
) -> None:
    around = len(json.dumps({"msg": "", "ts": f"{time.time():.3f}"}))
    file = tmp_path / "long.json"
    file.write_text(json.dumps({"msg": "x" * (128 * 1024 - around + extra)}))
    result = main_of_pair("send", *pair.to_broker, *ONCE, "--json-message", file, status=status)
    lengths = [len(heard.payload) for heard in ear.hear_all()]
    if status:
        explained(result, "MessageTooLong", "128 KiB")
        assert lengths == []
    else:
        assert lengths == [128 * 1024] * 2
