"""What a broker and a network can do to a connection, byte by byte: it is lost and comes back, and nothing else is."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import random
import re
import shutil
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.aws import Account, AwsService
from support.chaos import ChaosBroker
from support.failures import Explained
from support.machine import PATIENCE_S
from support.mqtt import (
    CONNACK,
    CONNECT,
    DISCONNECT,
    PINGREQ,
    PINGRESP,
    PUBACK,
    PUBLISH,
    SUBACK,
    SUBSCRIBE,
    Broker,
    Packet,
    Peer,
    Script,
    answer_to,
    behave,
    packet,
    publish,
)
from support.networks import Relay, SlowRelay
from support.program import Limits
from support.shell import Elf, InProcess, Result

# A thread's traceback on the terminal is no way to lose a connection.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

ENDS = ("FIN", "RST", "TLS")  # of Peer.end()


@pytest.fixture(scope="module")
def twenty_things(service: AwsService, tmp_path_factory: pytest.TempPathFactory) -> Elf:
    """Twenty things that have sent already."""
    account = Account(service)
    environment = account.credentials | {"AWS_ENDPOINT_URL": service.url}
    twenty_things = Elf(tmp_path_factory.mktemp("twenty_things"), environment, service)
    twenty_things("create", 20, "--rate", 200)
    twenty_things("send", *twenty_things.to_broker, "--duration", "0.01", "--rate", 200)
    return twenty_things


@pytest.fixture
def fleet_of(twenty_things: Elf, service: AwsService, tmp_path: Path) -> Iterator[Callable[[int], Elf]]:
    """The first of twenty things, as a fleet of their own."""
    fleets = []

    def fleet_of(number: int) -> Elf:
        elf = Elf(tmp_path, {**twenty_things.environment, "ELF_MISC_DIR": str(tmp_path / "misc")}, service)
        shutil.copytree(twenty_things.misc, elf.misc)
        things_json = elf.misc / "things.json"
        things_json.write_text(json.dumps(json.loads(things_json.read_text())[:number]))
        fleets.append(elf)
        return elf

    yield fleet_of
    for fleet in fleets:
        fleet.close_windows()


@pytest.fixture
def main_of(
    fleet_of: Callable[[int], Elf],
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limits: Limits,
) -> Callable[..., InProcess]:
    """elf.main() for so many things, which waits little before it connects again.

    Unless `asking`, AWS can't be asked about a refusal: it would say that these brokers are not its own.
    """
    limits(MAX_RECONNECT_PAUSE_S=0.05, CHECK_INTERVAL_S=0.1, PROPAGATION_S=0.0)

    def main_of(number: int, asking: bool = False) -> InProcess:
        main = InProcess(module, fleet_of(number), monkeypatch, capsys)
        if not asking:
            main.forget("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        return main

    return main_of


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Make brokers, by their scripts."""
    with contextlib.ExitStack() as stack:
        yield lambda resets=0, **scripts: stack.enter_context(
            contextlib.closing(Broker(tmp_path, scripts, resets=resets))
        )


def assert_quiet(result: Result) -> None:
    """No bug came to light: nothing unexpected, no thread's end."""
    assert not re.search("unexpected|Traceback|Error\\b", result.err), result.err


def numbered(directory: Path, messages: int) -> Path:
    """A file of messages that can be told apart."""
    path = directory / "messages.jsonl"
    path.write_text("".join(json.dumps({"n": number}) + "\n" for number in range(messages)))
    return path


def numbers(packets: list[Packet]) -> Counter[int]:
    return Counter(json.loads(each.payload)["n"] for each in packets)


def cut(kind: int, after: int, end: str) -> Script:
    """Behave until an answer of that kind is due, and hang up after so many bytes of it."""

    def script(peer: Peer) -> None:
        asked = peer.packets[0]
        while (answer := answer_to(asked))[:1] != packet(kind, b"")[:1]:
            peer.send(answer)
            asked = next(iter(peer))
        peer.end(answer[:after], end)

    return script


def let_subscribe(peer: Peer) -> None:
    """Behave until the thing has subscribed."""
    peer.send(answer_to(peer.packets[0]))
    for asked in peer:
        peer.send(answer_to(asked))
        if asked.kind == SUBSCRIBE:
            break


def deliver(data: bytes, end: str = "") -> Script:
    """Behave until the thing has subscribed, send it something, and hang up, or go on."""

    def script(peer: Peer) -> None:
        let_subscribe(peer)
        if end:
            peer.end(data, end)
        else:
            peer.send(data)
            peer.answer()

    return script


THE_END = deliver(publish(b"elf/x", b"the end") * 2)


@pytest.mark.parametrize("end", ENDS)
def test_send_loses_nothing_at_whichever_byte_a_connection_ends(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], tmp_path: Path, end: str
) -> None:
    scripts = [cut(kind, after, end) for kind in (CONNACK, PUBACK) for after in range(5)]
    between = make_broker(thing_0=scripts)
    messages = numbered(tmp_path, 8)
    result = main_of(1)("send", *between.to_broker, "--json-message", messages, "--interval", "0.01")
    assert_quiet(result)
    assert "ELF sent 8 messages from 1 thing: 8 acknowledged, 0 lost" in result.err
    assert set(numbers(between.of("thing_0", PUBLISH))) == set(range(8))
    assert len(between.peers) == len(scripts) + 1
    assert result.err.count(" reconnected to ") == result.err.count("lost its connection") >= 5


@pytest.mark.parametrize("end", ENDS)
def test_subscribe_comes_back_at_whichever_byte_a_connection_ends(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], limits: Limits, end: str
) -> None:
    main = main_of(1)
    limits(KEEP_ALIVE_S=1)
    message = publish(b"elf/x", b"cut", qos=1)
    scripts = [cut(kind, after, end) for kind, size in ((CONNACK, 4), (SUBACK, 5)) for after in range(size + 1)]
    scripts += [deliver(message[:after], end) for after in range(len(message) + 1)]
    scripts += [cut(PINGRESP, after, end) for after in range(3)]
    between = make_broker(thing_0=[*scripts, THE_END])
    result = main("subscribe", *between.to_broker, "--count", 3, "--duration", 60)
    assert_quiet(result)
    assert result.received == [("elf/x", "cut"), *[("elf/x", "the end")] * 2]
    assert len(between.peers) == len(scripts) + 1
    assert result.err.count(" reconnected to ") == result.err.count("lost its connection") >= len(message) + 3


def test_acknowledgements_that_come_with_the_end_of_a_connection_count(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    def acknowledge_and_hang_up(peer: Peer) -> None:
        """Let the window fill, with more waiting, and acknowledge half of it, with the end right behind."""
        peer.send(answer_to(peer.packets[0]))
        for _ in peer:
            if len(peer.of(PUBLISH)) == 100:
                break
        time.sleep(0.3)  # so that more messages are due: nothing comes of it that could be awaited
        peer.end(b"".join(answer_to(each) for each in peer.of(PUBLISH)[:50]))

    between = make_broker(thing_0=[acknowledge_and_hang_up] * 2)
    messages = numbered(tmp_path, 250)
    result = main_of(1)("send", *between.to_broker, "--json-message", messages, "--interval", "0.01")
    assert_quiet(result)
    assert "250 acknowledged, 0 lost" in result.err
    once = Counter(range(250))  # what was acknowledged is not repeated
    assert numbers(between.of("thing_0", PUBLISH)) - once == Counter(range(50, 150))


def test_the_last_acknowledgement_and_the_goodbye_reach_a_broker_that_still_sends(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker]
) -> None:
    """If a client closes a TCP connection with anything unread, the broker's next write fails, and it reads no more."""

    def send_on(peer: Peer) -> None:
        let_subscribe(peer)
        peer.send(publish(b"elf/x", b"first", qos=1))
        for asked in peer:
            if asked.kind == PUBACK:
                peer.send(publish(b"elf/x", bytes(100_000)) * 200)

    between = make_broker(thing_0=[send_on])
    result = main_of(1)("subscribe", *between.to_broker, "--count", 1)
    assert result.received == [("elf/x", "first")]
    (peer,) = between.peers
    assert [each.kind for each in peer.packets] == [CONNECT, SUBSCRIBE, PUBACK, DISCONNECT]


def test_a_broker_that_does_not_hang_up_is_not_waited_for(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], limits: Limits
) -> None:
    limits(FAREWELL_S=0.1)
    has_ended = threading.Event()

    def stay(peer: Peer) -> None:
        behave(peer)
        assert has_ended.wait(PATIENCE_S)

    between, main = make_broker(thing_0=[stay]), main_of(1)
    began_at = time.monotonic()
    main("send", *between.to_broker, "--count", 1)
    has_ended.set()
    assert time.monotonic() - began_at < 5


def test_half_a_packet_uses_no_processor_time(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker]
) -> None:
    halves = [
        (SUBSCRIBE, packet(SUBACK, b"\0\1\1")[:3], b""),
        (SUBSCRIBE, packet(SUBACK, b"\0\1\1"), publish(b"elf/x", b"half")[:1]),
        (SUBSCRIBE, packet(SUBACK, b"\0\1\1"), publish(b"elf/x", b"half" * 9999)[:2]),
        (SUBSCRIBE, packet(SUBACK, b"\0\1\1"), publish(b"elf/x", b"half")[:8]),
    ]
    all_halved = threading.Barrier(len(halves))
    used_s: list[float] = []

    def half(answer: bytes, more: bytes) -> Script:
        def script(peer: Peer) -> None:
            peer.send(answer_to(peer.packets[0]))
            next(iter(peer))
            peer.send(answer + more)
            if not all_halved.wait(10):
                before = time.process_time()
                time.sleep(1.0)  # in which there is nothing to do
                used_s.append(time.process_time() - before)
            all_halved.wait(10)

        return script

    scripts = {f"thing_{number}": [half(*each[1:])] for number, each in enumerate(halves)}
    between = make_broker(**{thing: [*its, THE_END] for thing, its in scripts.items()})
    result = main_of(4)("subscribe", *between.to_broker, "--count", 8, "--duration", 60)
    assert_quiet(result)
    assert used_s[0] < 0.6  # of a second


RUBBISH = {
    "a topic that is not UTF-8": publish(b"elf/\xff\xfe", b"x"),
    "no topic": publish(b"", b"x"),
    "a topic longer than its packet": packet(PUBLISH, b"\xff\xffelf"),
    "a PUBLISH of 1 byte": packet(PUBLISH, b"\0"),
    "a PUBLISH of QoS 1 without an identifier": packet(PUBLISH, b"\0\1x", 2),
    "a PUBLISH of QoS 3": packet(PUBLISH, b"\0\1x\0\1y", 6),
    "the head of a packet of 64 MB": b"\x30\x80\x80\x80\x20",
    "more than AWS IoT delivers": publish(b"elf/x", bytes(140_000)),
    "a remaining length of 5 bytes": b"\x30\xff\xff\xff\xff\x7f",
    "a PUBACK of 1 byte": packet(PUBACK, b"\1"),
    "a PUBREL of 1 byte": packet(6, b"\1", 2),
    "an UNSUBACK of 1 byte": packet(11, b"\1"),
    "a SUBACK of 1 byte": packet(SUBACK, b"\1"),
    "an unknown type of packet": packet(15, b"\0\0"),
    "no type of packet": packet(0, b""),
    "a CONNECT": packet(CONNECT, b"\0\4MQTT\4\2\0\0\0\0"),
    "another CONNACK, which refuses": packet(CONNACK, b"\0\5"),
    "a CONNACK of a code that there is not": packet(CONNACK, b"\0\x4d"),
    "a CONNACK of 1 byte": packet(CONNACK, b"\0"),
    **{f"random bytes {seed}": random.Random(seed).randbytes(2000) for seed in range(5)},
}


def test_bytes_that_are_no_mqtt_cost_a_connection_and_no_more(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker]
) -> None:
    waited_for_more = set()

    def then_wait(name: str) -> Script:
        def script(peer: Peer) -> None:
            peer.connection.settimeout(1.0 if name.startswith("random") else 10.0)
            deliver(RUBBISH[name])(peer)
            if peer.is_patient:
                waited_for_more.add(name)

        return script

    between = make_broker(thing_0=[*map(then_wait, RUBBISH), THE_END])
    result = main_of(1)("subscribe", *between.to_broker, "--count", 2, "--duration", 60)
    assert_quiet(result)
    assert ("elf/x", "the end") in result.received
    assert len(between.peers) == len(RUBBISH) + 1
    assert all(name.startswith("random") for name in waited_for_more)  # ELF hung up on all others


# The packet identifier of a thing's first packet on a connection is 1.
ANSWERS_TO_SUBSCRIBE = {
    "a SUBACK of no topic filter": packet(SUBACK, b"\0\1"),
    "an UNSUBACK": packet(11, b"\0\1"),
    "a SUBACK of 1 byte": packet(SUBACK, b"\0"),
    "a TLS record of nothing": None,
}
ANSWERS_TO_PUBLISH = {
    "a SUBACK": packet(SUBACK, b"\0\1\1"),
    "a SUBACK of no topic filter": packet(SUBACK, b"\0\1"),
    "a PUBACK of 1 byte": packet(PUBACK, b"\0"),
    "a PUBACK of 3 bytes": packet(PUBACK, b"\0\1\1"),
    "a PUBREC of 1 byte": packet(5, b"\0"),
}


def answer_oddly(kind: int, answer: bytes | None) -> Script:
    def script(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        for asked in peer:
            if asked.kind == kind and answer is None:
                peer.connection.unwrap().sendall(b"this is no TLS")
            elif asked.kind == kind:
                peer.send(answer or b"")
                return

    return script


@pytest.mark.parametrize(
    ("command", "kind", "answers"),
    [("subscribe", SUBSCRIBE, ANSWERS_TO_SUBSCRIBE), ("send", PUBLISH, ANSWERS_TO_PUBLISH)],
)
def test_an_answer_that_does_not_fit_costs_a_connection_and_no_more(
    main_of: Callable[..., InProcess],
    make_broker: Callable[..., Broker],
    command: str,
    kind: int,
    answers: dict[str, bytes | None],
) -> None:
    scripts = [answer_oddly(kind, answer) for answer in answers.values()]
    between = make_broker(thing_0=[*scripts, THE_END if command == "subscribe" else behave])
    options = ("--count", 2, "--duration", 60) if command == "subscribe" else ("--count", 10, "--interval", "0.01")
    result = main_of(1)(command, *between.to_broker, *options)
    assert_quiet(result)
    assert len(between.peers) == len(scripts) + 1


SHADOW = "$aws/things/thing_0/shadow/update"
# What a broker answers to a SUBSCRIBE, and to the second PUBLISH; how often the thing connects then.
ODD_ANSWERS: dict[str, tuple[Callable[[Packet], bytes], Callable[[Packet], bytes], int]] = {
    "a CONNACK that refuses": (answer_to, lambda asked: packet(CONNACK, b"\0\3"), 2),
    "a CONNACK that refuses, and a PUBACK": (answer_to, lambda asked: packet(CONNACK, b"\0\5") + answer_to(asked), 2),
    "a second CONNACK": (answer_to, lambda asked: packet(CONNACK, b"\0\0") + answer_to(asked), 1),
    "a second SUBACK": (lambda asked: answer_to(asked) * 2, answer_to, 1),
    "a second PUBACK": (answer_to, lambda asked: answer_to(asked) * 2, 1),
    "nothing": (answer_to, lambda asked: b"", 2),
}


@pytest.mark.parametrize("answer", ODD_ANSWERS)
def test_an_answer_that_does_not_come_or_comes_twice_costs_no_message(
    main_of: Callable[..., InProcess],
    make_broker: Callable[..., Broker],
    tmp_path: Path,
    limits: Limits,
    answer: str,
) -> None:
    on_subscribe, on_publish, connects = ODD_ANSWERS[answer]

    def script(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        for asked in peer:
            is_second = asked.kind == PUBLISH and len(peer.of(PUBLISH)) == 2
            answer = on_subscribe if asked.kind == SUBSCRIBE else on_publish if is_second else answer_to
            peer.send(answer(asked))

    main = main_of(1)
    limits(ACK_TIMEOUT_S=0.5, ANSWER_GRACE_S=0.0)
    between = make_broker(thing_0=[script])
    messages = numbered(tmp_path, 5)
    options = ("--json-message", messages, "--interval", "0.05", "--topic", SHADOW, "--output", "json")
    result = main("send", *between.to_broker, *options, status=1)  # as no shadow answers
    assert_quiet(result)
    summary = json.loads(result.out.splitlines()[-1])
    assert [summary[key] for key in ("sent", "acknowledged", "lost")] == [5, 5, 0]
    heard = numbers(between.of("thing_0", PUBLISH))
    assert set(heard) == set(range(5))
    assert summary["sentAgain"] == sum(times > 1 for times in heard.values())
    assert len(between.peers) == connects
    goodbyes = [len(peer.of(DISCONNECT)) for peer in between.peers]
    assert goodbyes == [0] * (connects - 1) + [1]  # what is given up ends as with a dead network: wills go out
    assert result.err.count(" reconnected to ") == connects - 1


def test_a_first_connect_that_is_reset_or_closed_is_tried_again(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker]
) -> None:
    between = make_broker(resets=2)
    result = main_of(1)("send", *between.to_broker, "--count", 1)
    assert_quiet(result)
    assert (
        f"thing_0 can't connect to localhost:{between.port} yet: it resets the connection; trying again" in result.err
    )
    assert "1 acknowledged, 0 lost" in result.err


@pytest.mark.parametrize("things", [1, 2])
def test_messages_of_a_thing_that_never_connects_are_not_sent(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], tmp_path: Path, things: int
) -> None:
    main = main_of(things)
    (tmp_path / "misc" / f"thing_{things - 1}.prv").write_text("")
    result = main("send", *make_broker().to_broker, "--count", 3, "--interval", "0.01", "--output", "json", status=1)
    summary = json.loads(result.out.splitlines()[-1])
    assert [summary[key] for key in ("sent", "acknowledged", "lost", "notSent")] == [
        *((things - 1) * 3, (things - 1) * 3, 0, 3)
    ]
    assert summary["failed"] == [f"thing_{things - 1}"]


@pytest.mark.parametrize("qos", [0, 1])
def test_what_was_half_written_in_the_end_was_not_sent(
    main_of: Callable[..., InProcess],
    make_broker: Callable[..., Broker],
    tmp_path: Path,
    limits: Limits,
    qos: int,
) -> None:
    ended = threading.Event()

    def read_late(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        ended.wait(60)
        for _ in peer:
            pass

    main = main_of(1)
    limits(ACK_GRACE_S=0.5, ACK_PAUSE_S=0.5)
    between = make_broker(thing_0=[read_late])
    message = tmp_path / "large.json"
    message.write_text(json.dumps({"large": "x" * 120_000}))
    options = ("--json-message", message, "--interval", "0.01", "--count", 60, "--qos", qos, "--output", "json")
    result = main("send", *between.to_broker, *options, status=1)
    ended.set()
    assert_quiet(result)
    summary = json.loads(result.out.splitlines()[-1])
    (peer,) = between.peers
    between.await_that(lambda: peer.is_over)
    whole = [each for each in peer.of(PUBLISH) if each.payload.endswith(b"}")]
    assert 0 < len(whole) == summary["sent"] < 60
    assert summary["sent"] + summary["notSent"] == 60
    assert summary["lost"] == (len(whole) if qos else 0)


def test_a_broker_that_does_at_random_all_that_it_may_counts_what_send_counts(
    main_of: Callable[..., InProcess], tmp_path: Path, limits: Limits
) -> None:
    """benchmarks/chaos.py does it for ten minutes."""
    main = main_of(5)
    limits(ACK_TIMEOUT_S=1.0)
    with contextlib.closing(ChaosBroker(tmp_path, seed=2, restart_s=1.5, down_s=0.2)) as between:
        options = ("--sequence", "--count", 100, "--interval", "0.04", "--output", "json")
        result = main("send", *between.to_broker, *options)
    assert_quiet(result)
    summary = json.loads(result.out.splitlines()[-1])
    assert [summary[key] for key in ("sent", "acknowledged", "lost", "notSent")] == [500, 500, 0, 0]
    assert len(between.heard) == len(between.acknowledged) == 500
    assert summary["sentAgain"] >= sum(times > 1 for times in between.heard.values())
    assert between.done["restart"] > 0


def test_what_no_policy_forbids_is_said_to_be_the_brokers_and_soon(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], explained: Explained
) -> None:
    def limit(peer: Peer) -> None:
        """Take no message, as a broker does that has another limit of packets, or of topics, than AWS IoT."""
        peer.send(answer_to(peer.packets[0]))
        for asked in peer:
            if asked.kind == PUBLISH:
                return

    between = make_broker(thing_0=[limit] * 99)
    result = main_of(1, asking=True)("send", *between.to_broker, "--raw", "--count", 1, "x" * 999, status=1)
    explained(result, "PublishRefused", "(999 bytes)", "AWS says that its policy allows that", "broker's settings")
    assert len(between.peers) < 10


REFUSALS = {
    1: "unacceptable protocol version",
    2: "client identifier rejected",
    3: "server unavailable",
    4: "bad user name or password",
    5: "not authorized",
}


def test_a_refusal_is_told_in_words_and_needs_no_older_mqtt(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], limits: Limits
) -> None:
    def refuse(code: int) -> Script:
        return lambda peer: peer.send(packet(CONNACK, bytes([0, code])))

    main = main_of(5)
    limits(POLICY_CHANGE_S=0.3)
    between = make_broker(**{f"thing_{code - 1}": [refuse(code)] * 100 for code in REFUSALS})
    result = main("send", *between.to_broker, "--count", 1, status=1)
    assert_quiet(result)
    for code, words in REFUSALS.items():
        told = f"thing_{code - 1} can't connect to localhost:{between.port}, which refuses it: {words} (CONNACK {code})"
        assert told in result.err
    assert {peer.packets[0].body[:7] for peer in between.peers} == {b"\0\4MQTT\4"}


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_certificates_that_the_broker_does_not_take_are_told_as_a_refusal(
    main_of: Callable[..., InProcess],
    tmp_path: Path,
    service: AwsService,
    limits: Limits,
    version: str,
) -> None:
    main = main_of(20)
    limits(POLICY_CHANGE_S=0.5)
    with contextlib.closing(Broker(tmp_path, accepted=tmp_path / "impostor.pem", version=version)) as between:
        result = main("send", *between.to_broker, "--count", 1, status=1)
    assert_quiet(result)
    refused = [line for line in result.lines if f"connect to localhost:{between.port}, which refuses it: " in line]
    assert {*re.findall(r"thing_\d+", " ".join(refused))} == {f"thing_{number}" for number in range(20)}


def test_connect_has_no_user_name(main_of: Callable[..., InProcess], make_broker: Callable[..., Broker]) -> None:
    between = make_broker()
    main_of(1)("send", *between.to_broker, "--count", 1)
    (peer,) = between.peers
    protocol, version, flags, keep_alive = struct.unpack("!6sBBH", peer.packets[0].body[:10])
    assert (protocol, version, flags, keep_alive) == (b"\0\4MQTT", 4, 0x02, 30)  # a clean session, and nothing else
    assert peer.packets[0].body[12:].startswith(b"thing_0-")
    assert len(peer.packets[0].body) == 12 + len("thing_0-") + 8  # the client ID is all there is


def test_a_round_trip_of_300_ms_delays_no_message_and_repeats_none(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    between = make_broker()
    with contextlib.closing(SlowRelay(between.port, 0.15)) as far:
        options = ("--mqtt-endpoint", f"localhost:{far.port}", *between.to_broker[2:])
        messages = numbered(tmp_path, 200)
        result = main_of(1)("send", *options, "--json-message", messages, "--interval", "0.01")
    assert "200 acknowledged, 0 lost" in result.err
    (peer,) = between.peers
    published = peer.of(PUBLISH)
    assert [json.loads(each.payload)["n"] for each in published] == list(range(200))
    late_s = sorted(each.at - float(json.loads(each.payload)["ts"]) for each in published)
    assert late_s[0] >= 0.15
    assert late_s[len(late_s) // 2] <= 0.45  # and not a round trip later
    assert "takes a round trip" not in result.err


def test_a_window_of_100_is_kept_and_named_where_it_holds_messages_up(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    most: list[int] = []

    def hold(peer: Peer) -> None:
        """Acknowledge what is 100 messages old alone; the rest once nothing else comes."""
        peer.send(answer_to(peer.packets[0]))
        peer.connection.settimeout(0.5)
        acknowledged = 0
        while acknowledged < 300:
            for _ in peer:
                most.append(len(peer.of(PUBLISH)) - acknowledged)
            for each in peer.of(PUBLISH)[acknowledged:]:
                peer.send(answer_to(each))
                acknowledged += 1

    between = make_broker(thing_0=[hold])
    messages = numbered(tmp_path, 300)
    result = main_of(1)("send", *between.to_broker, "--json-message", messages, "--interval", "0.01")
    assert "300 acknowledged, 0 lost" in result.err
    assert max(most) == 100
    assert "AWS allows 100 unacknowledged messages per connection, and each acknowledgement is" in result.err
    assert numbers(between.of("thing_0", PUBLISH)) == Counter(range(300))


def test_messages_held_up_by_a_stall_leave_no_faster_than_aws_takes_them(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    def stall(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        for asked in peer:
            if len(peer.of(PUBLISH)) == 20:
                time.sleep(3.0)  # it is what a stall is
            peer.send(answer_to(asked))

    between = make_broker(thing_0=[stall])
    messages = numbered(tmp_path, 500)
    main = main_of(1)
    result = main("send", *between.to_broker, "--json-message", messages, "--interval", "0.01")
    assert "500 acknowledged, 0 lost" in result.err
    left = [float(json.loads(each.payload)["ts"]) for each in between.of("thing_0", PUBLISH)]
    assert len(left) == 500
    assert max(sum(at <= other < at + 1.0 for other in left) for at in left) <= 115


@pytest.mark.parametrize("qos", ["0", "1"])
def test_two_quick_losses_of_a_connection_are_not_blamed_on_the_policy(
    main_of: Callable[..., InProcess],
    make_broker: Callable[..., Broker],
    tmp_path: Path,
    limits: Limits,
    qos: str,
) -> None:
    def hang_up(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        for asked in peer:
            if asked.kind == PUBLISH:
                return

    main = main_of(2, asking=True)
    between = make_broker(thing_0=[hang_up] * 2)
    messages = numbered(tmp_path, 60)
    limits(REJECTED_WITHIN_S=0.5)
    status = 0 if qos == "1" else 1
    options = ("--json-message", messages, "--interval", "0.03", "--qos", qos)
    result = main("send", *between.to_broker, *options, status=status)
    assert_quiet(result)
    assert "failed" not in result.err
    assert "may not publish" not in result.err
    (told,) = re.findall(r"ELF sent (\d+) messages from 2 things: (.*), (\d+) lost(?:, (\d+) not sent)?", result.err)
    if qos == "1":
        assert told == ("120", "120 acknowledged", "0", "")
        assert set(numbers(between.of("thing_0", PUBLISH))) == set(range(60))
    else:
        listed = re.findall(r"lost while offline: message (\d+) of thing_0", result.err)
        assert len(listed) == int(told[2]) == 120 - int(told[0]) > 0  # what is lost, was not sent
        heard = numbers(between.of("thing_0", PUBLISH))
        assert not {int(number) - 1 for number in listed} & set(heard)
        assert heard == Counter(set(heard))
    assert numbers(between.of("thing_1", PUBLISH)) == Counter(range(60))


def test_after_an_outage_all_are_back_within_seconds(
    fleet_of: Callable[[int], Elf], relay: Relay, service: AwsService
) -> None:
    elf = fleet_of(5)
    window = elf.start("send", *relay.to_broker(service), "--interval", "0.01", "--duration", 3)
    window.await_line("posting message")
    relay.down()
    for number in range(5):
        window.await_line(f"thing_{number} lost its connection")
    time.sleep(2.0)  # the outage
    relay.up()
    result = window.end()
    assert "ELF sent 1500 messages from 5 things: 1500 acknowledged, 0 lost" in result.err
    ((longest_s,),) = (re.findall(r"offline: 5 things, longest thing_\d \(([\d.]+) s\)", result.err),)
    assert 2.0 <= float(longest_s) < 30.0


def test_a_connection_that_takes_no_data_delays_no_other(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    main = main_of(10)
    others = [f"thing_{number}" for number in range(1, 10)]

    def take_nothing(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        between.await_that(lambda: all(len(between.of(other, PUBLISH)) == 10 for other in others))

    between = make_broker(thing_0=[take_nothing])
    message = tmp_path / "large.json"
    message.write_text(json.dumps({"large": "x" * 100_000}))
    result = main("send", *between.to_broker, "--json-message", message, "--interval", "0.2", "--count", 10)
    assert_quiet(result)
    assert "100 acknowledged, 0 lost" in result.err
    first, second = [peer for peer in between.peers if peer.thing == "thing_0"]
    assert (len(first.of(PUBLISH)), len(second.of(PUBLISH))) == (0, 10)
    (late_ms,) = re.findall(r"at most ([\d.]+) ms behind schedule", result.err)
    assert float(late_ms) > 1000  # it is thing_0's, of which the network took no more


def test_a_thing_that_only_receives_shows_the_broker_that_it_is_alive(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker], limits: Limits
) -> None:
    """A broker gives up a client that sends nothing for 1.5 keep-alives, however much it sends itself."""
    limits(KEEP_ALIVE_S=1)

    def drip(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        peer.send(answer_to(next(iter(peer))))
        peer.connection.settimeout(0.1)
        while not peer.of(PINGREQ):
            peer.send(publish(b"elf/x", b"drip"))
            collections.deque(peer, maxlen=0)  # for so long
        peer.send(publish(b"elf/x", b"the end"))

    between = make_broker(thing_0=[drip])
    main_of(1)("subscribe", *between.to_broker, "--qos", "0", "--duration", 1.6)
    subscribed, pinged = between.peers[0].packets[1], between.of("thing_0", PINGREQ)[0]
    assert pinged.at - subscribed.at < 1.5


def test_a_flood_on_one_connection_delays_no_other(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker]
) -> None:
    is_flooded, is_answered = threading.Event(), threading.Event()
    message = publish(b"elf/x", b"flood" * 10)
    flood = message * 16_384 * 4  # in records of TLS that hardly ever end with a message

    def drown(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        peer.send(answer_to(next(iter(peer))))
        for begin in itertools.cycle(range(0, len(flood), 16_384)):
            if is_answered.is_set():
                break
            peer.send(flood[begin : begin + 16_384])
            if begin > 500_000:
                is_flooded.set()

    def ask(peer: Peer) -> None:
        peer.send(answer_to(peer.packets[0]))
        peer.send(answer_to(next(iter(peer))))
        assert is_flooded.wait(10)
        peer.send(publish(b"elf/x", b"in between", qos=1))
        peer.connection.settimeout(1.0)
        next(iter(peer), None)  # the PUBACK
        is_answered.set()

    between = make_broker(thing_0=[drown], thing_1=[ask])
    main = main_of(2)
    result = main("subscribe", *between.to_broker, "--duration", 2, "--output", "json")
    assert_quiet(result)
    assert "in between" in result.out
    assert len(between.of("thing_1", PUBACK)) == 1


def test_a_wrong_ts_and_a_retained_message_have_no_latency(
    main_of: Callable[..., InProcess], make_broker: Callable[..., Broker]
) -> None:
    now = f"{time.time():.2f}".encode()
    long_ago = b'{"ts": "1500000000.00"}'
    odd = [
        b'{"ts": 1%s}' % (b"0" * 400),
        b'{"ts": 1%s}' % (b"0" * 5000),
        b'{"ts": "1%s"}' % (b"0" * 400),
        b'{"ts": 1e999}',
        b'{"ts": NaN}',
        b'{"ts": true}',
        b'{"ts": []}',
        b"[" * 100_000,
        b'"ts"',
        b"\xff",
        b"",
    ]
    messages = [publish(b"elf/x", long_ago, retain=True), *(publish(b"elf/x", each) for each in odd)]
    messages.append(publish(b"elf/x", b'{"ts": "%s"}' % now))
    messages.append(publish(b"elf/x", b'{"ts": %d}' % (time.time() + 3600.5)))
    between = make_broker(thing_0=[deliver(b"".join(messages))])
    options = ("--count", len(messages), "--duration", 30, "--output", "json")
    result = main_of(1)("subscribe", *between.to_broker, *options)
    assert_quiet(result)
    *heard, summary = map(json.loads, result.out.splitlines())
    assert summary["received"] == len(heard) == len(messages)
    assert summary["latencyMs"]["max"] < 60_000
    assert summary["senderClockAheadS"] == pytest.approx(3600.0, abs=10.0)
    assert len(re.findall(r"the sender's clock is 3,\d{3} s ahead: no latency of 1 message$", result.err, re.M)) == 1
    assert "could not read" not in result.err
