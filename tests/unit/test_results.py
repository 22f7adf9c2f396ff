"""What the record of a run looks like: the live line, the report, the summary."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from support.program import Limits

from iot_elf import results, text
from iot_elf.metrics import RunRecord
from iot_elf.results import MessageWriter, PublishReport, RunReport, SubscribeReport, message_fields

from .stand_ins import Clock, logged


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, results)


Make = Callable[..., RunRecord]


@pytest.fixture
def run(clock: Clock) -> Make:
    """Make the record of a run of two of three things that began 12.5 s ago."""

    def make(totals: Mapping[str, int] | None = None, **attributes: Any) -> RunRecord:
        record = RunRecord()
        record.things, record.online, record.connected = 3, 2, {"thing_0", "thing_1"}
        record.began_at, record.ended_at = clock.now - 12.5, clock.now
        record.totals.update(totals or {})
        for name, value in attributes.items():
            assert hasattr(record, name)
            setattr(record, name, value)
        return record

    return make


def report(kind: type[RunReport], record: RunRecord) -> list[str]:
    with logged() as lines:
        kind(record, "[it]").log_report()
    return lines


def miss(record: RunRecord, *numbers: int, thing: str = "x") -> RunRecord:
    """Have a thing receive numbered messages."""
    for number in numbers:
        record.sequence.add("thing_0", {"thing": thing, "seq": number}, is_over=False)
    return record


# The live line


@pytest.mark.parametrize(
    ("began_s", "left_s", "situation"),
    [
        (0.0, math.inf, "2/3 up | 0 s"),
        (12.4, math.inf, "2/3 up | 12 s"),
        (12.6, 7.6, "2/3 up | 13 s, 8 s left"),
        (12.4, 0.0, "2/3 up | 12 s"),
        (12.4, -5.0, "2/3 up | 12 s"),
    ],
)
def test_the_live_line_tells_the_time_elapsed_and_left(
    clock: Clock, run: Make, began_s: float, left_s: float, situation: str
) -> None:
    record = run(began_at=clock.now - began_s, ends_at=clock.now + left_s)
    assert RunReport(record, "").situation() == situation


@pytest.mark.parametrize(
    ("totals", "oldest_s", "line"),
    [
        ({}, None, "sent 0, acknowledged 0 | 0.0 ms"),
        ({"sent": 7, "acknowledged": 5}, None, "sent 7, acknowledged 5 | 0.0 ms"),
        ({"sent": 7, "acknowledged": 5}, 1.0, "sent 7, acknowledged 5 | 0.0 ms"),
        ({"sent": 7, "acknowledged": 5}, 1.25, "sent 7, acknowledged 5 | 4 waiting, up to 1.2 s"),
        ({"sent": 7, "dropped": 2}, None, "sent 7, acknowledged 0, lost 2 | 0.0 ms"),
        (
            {"sent": 7, "requests": 7, "accepted": 4, "rejected": 3},
            None,
            "sent 7, acknowledged 0, 4 accepted, 3 rejected | 0.0 ms",
        ),
        (
            {"sent": 7, "requests": 7, "accepted": 4, "rejected": 1},
            None,
            "sent 7, acknowledged 0, 4 accepted, 1 rejected, 2 not answered | 0.0 ms",
        ),
    ],
)
def test_the_live_line_of_send_has_its_pace_or_how_long_it_has_waited(
    clock: Clock, run: Make, totals: dict[str, int], oldest_s: float | None, line: str
) -> None:
    since = math.inf if oldest_s is None else clock.now - oldest_s
    record = run(totals, in_flight=4, in_flight_since=since)
    assert PublishReport(record, "").live_line() == f"{line} | 2/3 up | 12 s"


@pytest.mark.parametrize(
    ("delayed", "line"),
    [
        ({}, "connecting: 2/3 up"),
        ({"thing_2": "it does not answer"}, "connecting: 2/3 up | thing_2: it does not answer, trying again"),
        (dict.fromkeys("abc", "it resets"), "connecting: 2/3 up | a: it resets, trying again (and 2 more)"),
    ],
)
def test_the_live_line_says_what_is_not_connected_yet(run: Make, delayed: dict[str, str], line: str) -> None:
    assert RunReport(run(delayed=delayed), "").connecting_line() == line


def test_the_live_line_of_subscribe_has_the_latency_and_what_is_missing_once_that_is_known(run: Make) -> None:
    record = run({"received": 3})
    assert SubscribeReport(record, "").live_line() == "received 3 | 2/3 up | 12 s"
    record.latency.add(0.0254)
    miss(record, 1, 4)
    expected = "received 3, 2 missing, 0 repeated, 0 out of order | 25 ms | 2/3 up | 12 s"
    assert SubscribeReport(record, "").live_line() == expected


@pytest.mark.parametrize(("kind", "counted"), [(PublishReport, "sent"), (SubscribeReport, "received")])
def test_the_live_line_has_a_rate_after_a_second(
    run: Make, monkeypatch: pytest.MonkeyPatch, kind: type[RunReport], counted: str
) -> None:
    record = run()
    monkeypatch.setattr(record, "rate", {"sent": 2.5, "received": 3.5}.__getitem__)
    assert f" | {record.rate(counted)}/s | " in kind(record, "").live_line()


# The report


@pytest.mark.parametrize(
    ("took_s", "messages", "words"),
    [(12.5, 50, "12.5 s, 4.0 messages/s"), (1.0, 5, "1.0 s, 5.0 messages/s"), (0.97, 5, "1.0 s"), (0.0, 1, "0.0 s")],
)
def test_the_rate_of_a_run_is_over_its_whole_time_and_a_short_one_has_none(
    clock: Clock, run: Make, took_s: float, messages: int, words: str
) -> None:
    its = PublishReport(run({"sent": messages}, began_at=clock.now - took_s), "")
    assert its.duration_and_rate() == words


def test_the_thing_that_was_offline_longest_is_named(run: Make) -> None:
    record = run(offline_s={"thing_0": 3.0, "thing_1": 7.25, "thing_2": 5.0})
    with logged() as lines:
        RunReport(record, "[it]").log_outages("they missed it")
        RunReport(run(), "[it]").log_outages("they missed it")
    assert lines == ["WARNING [it] offline: 3 things, longest thing_1 (7.2 s); they missed it"]


def test_send_reports_what_became_of_its_messages(run: Make) -> None:
    record = run({"sent": 50, "acknowledged": 48, "retransmitted": 1, "not_sent": 3}, qos=1)
    record.offline_s = {"thing_0": 3.0}
    record.latency.add(0.025)
    record.latency_from_due.add(3.025)
    record.unacknowledged = [("thing_0", "elf/thing_0", number, b"x\xff") for number in (4, 9)]
    record.late_s = {"": 0.05, "there was no connection": 3.0, "other": 2.0}
    assert report(PublishReport, record) == [
        "WARNING [it] offline: 1 thing, longest thing_0 (3.0 s); 1 message sent again",
        "INFO [it] 12.5 s, 4.0 messages/s, at most 3000.0 ms behind schedule (there was no connection)",
        "INFO [it] ack latency: p50 25.0, p95 25.0, p99 25.0, max 25.0 ms",
        "INFO [it] ack since due: p50 3025.0, p95 3025.0, p99 3025.0, max 3025.0 ms",
        "WARNING not acknowledged: message 4 of thing_0 on elf/thing_0: 'x\\xff'",
        "WARNING not acknowledged: message 9 of thing_0 on elf/thing_0: 'x\\xff'",
        "INFO [it] ELF sent 50 messages from 2 things: 48 acknowledged, 2 lost, 3 not sent",
    ]


def test_at_qos_0_nothing_is_acknowledged(run: Make) -> None:
    record = run({"sent": 1, "dropped": 1}, connected={"thing_0"}, dropped=[("thing_0", 1)])
    assert report(PublishReport, record) == [
        "INFO [it] 12.5 s, 0.1 messages/s, at most 0.0 ms behind schedule",
        "WARNING lost while offline: message 1 of thing_0",
        "INFO [it] ELF sent 1 message from 1 thing: none acknowledged (QoS 0), 1 lost",
    ]


@pytest.mark.parametrize(
    ("late_s", "words"),
    [
        ({"": 3.0}, "at most 3000.0 ms behind schedule"),
        ({"": 0.0, "the network": 0.1}, "at most 100.0 ms behind schedule"),  # not worth a word
        ({"": 0.0, "the network": 0.11}, "at most 110.0 ms behind schedule (the network)"),
        ({"": 0.5, "the network": 0.11}, "at most 500.0 ms behind schedule"),
    ],
)
def test_why_messages_were_late_is_said_if_they_were(run: Make, late_s: dict[str, float], words: str) -> None:
    (line, _) = report(PublishReport, run(late_s=late_s))
    assert line == f"INFO [it] 12.5 s, 0.0 messages/s, {words}"


@pytest.mark.parametrize(
    ("unacknowledged", "dropped", "lines", "more"),
    [(3, 0, 3, ""), (4, 0, 3, "1 more"), (10, 0, 3, "7 more"), (0, 5, 3, "2 more"), (4, 4, 6, "2 more")],
)
def test_of_very_many_lost_messages_the_first_are_named(
    run: Make, limits: Limits, unacknowledged: int, dropped: int, lines: int, more: str
) -> None:
    limits(MAX_LISTED=3)
    record = run({"sent": 20, "dropped": dropped}, qos=1)
    record.unacknowledged = [("thing_0", "elf/thing_0", number, b"") for number in range(1, 1 + unacknowledged)]
    record.dropped = [("thing_1", number) for number in range(1, 1 + min(dropped, 3))]
    warnings = [line for line in report(PublishReport, record) if line.startswith("WARNING")]
    last = [f"WARNING {more} not acknowledged, or lost while offline"] if more else []
    assert [line.partition(" message ")[2][:1] for line in warnings[:lines]] == [
        *(str(number) for number in range(1, 1 + min(unacknowledged, 3))),
        *(str(number) for number in range(1, 1 + min(dropped, 3))),
    ]
    assert warnings[lines:] == last


def test_subscribe_reports_what_it_received_and_who_missed_what(run: Make, limits: Limits) -> None:
    limits(MAX_LISTED=2, MAX_SENDERS=3)
    record = run({"received": 50, "retained": 3, "unreadable": 1}, offline_s={"thing_0": 3.0})
    record.latency.add(0.025)
    for thing, numbers in {"x_1": (1, 2), "x_10": (1, 3), "x_9": (1, 4), "x_11": (1, 3)}.items():
        miss(record, *numbers, thing=thing)
    missing = "4 missing, 0 repeated, 0 out of order"
    assert report(SubscribeReport, record) == [
        "WARNING [it] offline: 1 thing, longest thing_0 (3.0 s); they may have missed messages",
        "INFO [it] 12.5 s, 4.0 messages/s",
        "INFO [it] latency (from ts, ±1 ms): p50 25.0, p95 25.0, p99 25.0, max 25.0 ms",
        "WARNING [it] could not read 1 message",
        "INFO [it] from x_9: 2 missing, 0 repeated, 0 out of order",
        "INFO [it] from x_10: 1 missing, 0 repeated, 0 out of order",
        "WARNING [it] too many senders, or gaps: the number of missing messages is not exact",
        f"INFO [it] ELF received 50 messages (3 retained) on 2 things, {missing}",
    ]


def test_subscribe_reports_on_its_sessions(run: Make) -> None:
    record = run({"received": 50, "waited": 40}, offline_s={"thing_0": 3.0}, keeps_sessions=True)
    record.session_present = {"thing_0"}
    lines = [
        "WARNING [it] offline: 1 thing, longest thing_0 (3.0 s); what came meanwhile waited",
        "INFO [it] 12.5 s, 4.0 messages/s",
        "INFO [it] session present: 1 of 2 things; 40 messages older than the connection (from ts)",
    ]
    assert report(SubscribeReport, record)[:-1] == lines
    record.session_lost = {"thing_1"}
    assert report(SubscribeReport, record)[:-1] == [
        lines[0].replace("what came meanwhile waited", "they may have missed messages"),
        *lines[1:],
        "WARNING [it] session gone on reconnecting, and what waited in it: thing_1",
    ]
    summary = SubscribeReport(record, "").summary()
    assert (summary["sessionPresent"], summary["sessionLost"], summary["waited"]) == (1, 1, 40)


def test_subscribe_that_received_nothing_has_little_to_say(run: Make) -> None:
    assert report(SubscribeReport, run()) == [
        "INFO [it] 12.5 s, 0.0 messages/s",
        "INFO [it] ELF received 0 messages on 2 things",
    ]


@pytest.mark.parametrize(
    ("ahead_s", "words"),
    [
        (3600.0, "the sender's clock is 3,600 s ahead"),
        (0.25, "the sender's clock is 0.2 s ahead"),
        (1.0, "the sender's clock is 1 s ahead"),
        (-86_400.0, "ts is 86,400 s old, or the sender's clock behind"),
    ],
)
def test_a_clock_that_differs_is_said_once(run: Make, ahead_s: float, words: str) -> None:
    record = run(clock_ahead_s=ahead_s, without_latency=2)
    assert report(SubscribeReport, record)[1:-1] == [f"WARNING [it] {words}: no latency of 2 messages"]
    assert SubscribeReport(record, "").summary()["senderClockAheadS"] == round(ahead_s, 1)


# The summary


def test_the_summary_of_send_has_each_count(run: Make) -> None:
    record = run({"sent": 9, "acknowledged": 6, "dropped": 1, "not_sent": 2, "retransmitted": 3})
    record.totals.update(requests=8, accepted=4, rejected=1)
    record.unacknowledged = [("thing_0", "elf/thing_0", 1, b"")]
    record.connects, record.offline_s = 4, {"thing_0": 3.04}
    record.late_s["there was no connection"] = 3.0004
    record.latency.add(0.025)
    record.latency_from_due.add(3.0)
    assert PublishReport(record, "").summary() == {
        **{"sent": 9, "acknowledged": 6, "lost": 2, "notSent": 2, "sentAgain": 3},
        **{"durationS": 12.5, "messagesPerS": 0.7, "connects": 4, "offlineS": {"thing_0": 3.0}},
        "latencyMs": dict.fromkeys(("p50", "p95", "p99", "max"), 25.0),
        "latencyFromDueMs": dict.fromkeys(("p50", "p95", "p99", "max"), 3000.0),
        **{"lateMs": 3000.4, "lateCause": "there was no connection"},
        **{"accepted": 4, "rejected": 1, "notAnswered": 3},
    }


def test_what_is_not_known_is_null_or_empty_in_the_summary(clock: Clock, run: Make) -> None:
    summary = PublishReport(run({"sent": 1}, began_at=clock.now - 0.25), "").summary()
    assert (summary["durationS"], summary["messagesPerS"], summary["lateCause"]) == (0.2, None, None)
    assert (summary["latencyMs"], summary["latencyFromDueMs"], summary["offlineS"]) == ({}, {}, {})


@pytest.mark.parametrize("checks_sequence", [True, False])
def test_the_summary_of_subscribe_has_what_is_missing_if_that_is_known(run: Make, checks_sequence: bool) -> None:
    record = miss(run({"received": 9, "retained": 2}, checks_sequence=checks_sequence), 1, 4)
    counted = {"missing": 2, "repeated": 0, "outOfOrder": 0, "senders": {"x": {"missing": 2}}, "exact": True}
    assert SubscribeReport(record, "").summary() == {
        **{
            "received": 9,
            "retained": 2,
            "unreadable": 0,
            "durationS": 12.5,
            "messagesPerS": 0.7,
            "connects": 0,
            "offlineS": {},
        },
        **{"latencyMs": {}, "senderClockAheadS": 0.0},
        **(counted if checks_sequence else {}),
    }


# Each message


@pytest.mark.parametrize("payload", ["Hé".encode(), b"\xff\x00", b""])
def test_a_payload_is_text_or_in_base64(clock: Clock, payload: bytes) -> None:
    clock.time = lambda: 1_700_000_000.12345  # type: ignore[method-assign]
    fields = message_fields("thing_0", "elf/thing_0", payload)
    assert {**fields, "payload": 0, "payloadBase64": 0} == {
        **{"thingName": "thing_0", "topic": "elf/thing_0", "time": 1_700_000_000.123, "payload": 0, "payloadBase64": 0}
    }
    if fields["payload"] is None:
        assert base64.b64decode(fields["payloadBase64"]) == payload
    else:
        assert (fields["payload"].encode(), "payloadBase64" in fields) == (payload, False)


class Output:
    """In place of an EventWriter."""

    def __init__(self, is_on: bool) -> None:
        self.is_on, self.events, self.payloads = is_on, list[dict[str, Any]](), list[bytes]()

    def put(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def put_payload(self, payload: bytes) -> None:
        self.payloads.append(payload)


THING: Any = SimpleNamespace(thing="thing_0", topic="elf/thing_0", options=SimpleNamespace(retain=True))


def show(is_on: bool, clock: Clock) -> tuple[list[str], Output]:
    output = Output(is_on)
    with logged() as lines:
        writer = MessageWriter(output, 1)  # type: ignore[arg-type]
        writer.on_publish(THING, 3, "elf/thing_0", b"a")
        writer.on_dropped(THING, 4, "elf/thing_0", b"b")
        writer.on_puback(THING, 3, 0.02345)
        writer.on_message(THING, SimpleNamespace(topic="b", qos=0, retain=1), b"c")
        writer.on_rejected(THING, "elf/thing_0", {"code": 400, "message": "no"})
    return lines, output


def test_an_event_says_if_a_credential_in_the_message_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset({"s3cret"}))
    output = Output(True)
    for payload in (b"a s3cret", b"none"):
        MessageWriter(output, 1).on_message(  # type: ignore[arg-type]
            THING, SimpleNamespace(topic="b", qos=0, retain=0), payload
        )
    assert [event.get("redacted") for event in output.events] == [True, None]


def test_each_message_is_a_line_and_an_event(clock: Clock) -> None:
    lines, output = show(True, clock)
    assert lines == [
        "INFO ELF thing_0 posting message:'a' on topic: elf/thing_0",
        "INFO Received retained message: c from topic: b by thing_0",
        "WARNING AWS rejected a message of thing_0 on elf/thing_0: 400 no",
    ]
    usual, sent = {"thingName": "thing_0", "time": 1000.0}, {"qos": 1, "retain": True}
    assert output.events == [
        {**usual, "event": "sent", "number": 3, "topic": "elf/thing_0", "payload": "a", **sent},
        {**usual, "event": "lost", "number": 4, "topic": "elf/thing_0", "payload": "b", **sent},
        {"event": "acknowledged", "thingName": "thing_0", "number": 3, "latencyMs": 23.4},
        {**usual, "event": "received", "topic": "b", "payload": "c", "qos": 0, "retain": True},
        {"event": "rejected", "thingName": "thing_0", "topic": "elf/thing_0", "code": 400, "message": "no"},
    ]
    assert output.payloads == [b"c"]


def test_what_nobody_sees_is_not_put_together(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "shows_details", lambda: False)
    lines, output = show(False, clock)
    assert [line.partition(" ")[0] for line in lines] == ["WARNING"]  # what AWS rejected
    assert [event["event"] for event in output.events] == ["rejected"]
    assert output.payloads == [b"c"]
