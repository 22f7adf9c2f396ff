"""One thing on MQTT: when it connects again, what it sends again, when it gives up, and which refusals count."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.program import Limits, constant

from iot_elf import device, outbox, refusals
from iot_elf.device import (
    REJECTED_WITHIN_S,
    Device,
    DeviceListener,
    DeviceOptions,
    refuse_blocking_files,
)
from iot_elf.errors import ElfError, Refusal, UsageError
from iot_elf.messages import Will
from iot_elf.network import Endpoint
from iot_elf.refusals import RefusalTracker
from iot_elf.state import ThingFiles

from .fake_loop import Loop
from .stand_ins import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, device, refusals)


# Refusals in a row

CONNECT, PUBLISH = "iot:Connect", "iot:Publish"


def refusal(action: str) -> Refusal:
    return Refusal("thing_0", "broker", action, "subject")


@pytest.mark.parametrize(
    ("patience_s", "refused_at", "action", "asked_and_given_up"),
    [
        (0, [0, 1, 2], CONNECT, [(True, False), (False, False), (False, False)]),
        (0, [0, 1, 2], PUBLISH, [(False, False), (True, False), (False, False)]),
        (20, [0, 10, 20, 21], CONNECT, [(False, False), (False, False), (True, False), (False, False)]),
        (20, [0, 10, 20, 21], PUBLISH, [(False, False), (False, False), (False, False), (True, False)]),
        (0, [0, 480, 480.1], CONNECT, [(True, False), (False, False), (False, True)]),  # a policy takes 8 minutes
        (0, [100, 580, 580.1], CONNECT, [(True, False), (False, False), (False, True)]),
        (20, [0, 480, 480.1], CONNECT, [(False, False), (True, False), (False, True)]),
    ],
)
def test_refusals_count_after_a_while_and_aws_is_asked_once(
    clock: Clock,
    patience_s: float,
    refused_at: list[float],
    action: str,
    asked_and_given_up: list[tuple[bool, bool]],
) -> None:
    tracker, began = RefusalTracker(patience_s), clock.now
    found = []
    for at in refused_at:
        clock.now = began + at
        found.append(tracker.add(refusal(action)))
    assert found == asked_and_given_up
    assert tracker.last and tracker.last.action == action


@pytest.mark.parametrize(("is_final", "given_up_at"), [(True, 5), (False, 0)])
def test_what_no_policy_forbids_is_given_up_soon_where_no_change_of_it_can_be_on_its_way(
    clock: Clock, is_final: bool, given_up_at: int
) -> None:
    tracker = RefusalTracker(0)
    for number in range(1, 9):
        asked, gives_up = tracker.add(refusal(PUBLISH))
        if asked:
            told = Refusal("thing_0", "broker", PUBLISH, "subject", " (9 bytes)", allowed_by="p", is_final=is_final)
            tracker.explain(told)
        assert gives_up == (is_final and number >= given_up_at)
        tracker.on_online()
    assert tracker.last is told
    assert "(9 bytes)" in told.cause and "its policy allows that (p)" in told.cause
    tracker.on_success()
    tracker.explain(told)
    assert tracker.last is None  # it is not refused any more


@pytest.mark.parametrize("success", ["on_success", "clear"])
def test_after_a_success_refusals_are_counted_anew(clock: Clock, success: str) -> None:
    tracker = RefusalTracker(0)
    assert tracker.add(refusal(CONNECT)) == (True, False)
    clock.now += 480
    getattr(tracker, success)()
    assert tracker.last is None
    clock.now += 1
    assert tracker.add(refusal(CONNECT)) == (True, False)


@pytest.mark.parametrize(("action", "counts_on"), [(CONNECT, False), ("iot:Subscribe", False), (PUBLISH, True)])
def test_a_connection_shows_that_connecting_and_subscribing_are_allowed(
    clock: Clock, action: str, counts_on: bool
) -> None:
    tracker = RefusalTracker(0)
    tracker.add(refusal(action))
    tracker.on_online()
    assert (tracker.last is not None) == counts_on


def test_a_connection_is_on_trial_from_its_first_message_until_the_broker_took_one() -> None:
    tracker = RefusalTracker(0)
    assert not tracker.is_on_trial
    assert [tracker.on_send(), tracker.is_on_trial] == [True, True]
    assert [tracker.on_send(), tracker.is_on_trial] == [False, True]
    tracker.on_success()
    assert not tracker.is_on_trial
    assert [tracker.on_send(), tracker.is_on_trial] == [False, False]
    tracker.on_online()
    assert not tracker.is_on_trial
    assert [tracker.on_send(), tracker.is_on_trial] == [True, True]
    tracker.on_online()
    assert not tracker.is_on_trial


# A thing


class Text(NamedTuple):
    text: str
    topic: str = ""

    def payload(self, topic: str, thing: str, number: int) -> bytes:
        if self.text == "bad":
            raise UsageError("Name", "it can't be sent", "send another")
        return self.text.encode()


class FakeConnection:
    """In place of a Connection: the test decides what the broker answers."""

    def __init__(self, client: Any, loop: Any, on_lost: Callable[[Exception], None]) -> None:
        self.client, self.on_lost = client, on_lost
        loop.connections.append(self)
        self.is_alive, self.is_full, self.may_pause = True, False, False
        self.is_filled = False  # whether the next message is more than it takes
        self.on_writable: Callable[[], None] = lambda: None
        self.published: list[str] = []
        self.retained: list[bool] = []
        self.on_puback: list[Callable[..., None] | None] = []
        self.subscribed: list[tuple[str, int]] = []
        self.on_suback: Callable[..., None] = lambda *_: None
        self.is_written = self.is_reset = self.session_present = False
        self.pubacks: list[Any] = []

    def send_puback(self, message: Any) -> None:
        self.pubacks.append(message)

    def write(self) -> None:
        self.is_written = True

    def allow_pauses(self) -> None:
        self.may_pause = True

    def close(self) -> None:
        self.is_alive = False

    def reset(self) -> None:
        self.is_alive, self.is_reset = False, True

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool, on_puback: Callable[..., None] | None) -> int:
        assert self.is_alive
        assert (topic, qos) == ("elf/thing_0", 0 if on_puback is None else 1)
        self.published.append(payload.decode())
        self.retained.append(retain)
        self.on_puback.append(on_puback)
        self.is_full = self.is_full or self.is_filled
        return len(self.published)

    def subscribe(self, topic_filter: str, qos: int, on_suback: Callable[..., None]) -> int:
        assert self.is_alive
        self.subscribed.append((topic_filter, qos))
        self.on_suback = on_suback
        return len(self.subscribed)

    def acknowledge(self, place: int) -> None:
        on_puback = self.on_puback[place]
        assert on_puback
        on_puback(place + 1)

    def lose(self, error: Exception | None = None) -> None:
        self.is_alive = False
        self.on_lost(error or ConnectionResetError("gone"))


class Recorder(DeviceListener):
    """A listener that has what happened as texts."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.error: Exception | None = None  # that on_message() raises
        self.leaves: list[str] = []  # the messages that are to wait

    def seen(self) -> list[str]:
        """What happened since the last time."""
        events, self.events = self.events, []
        return events

    def on_connected(self, device: Device) -> None:
        self.events.append("connected")

    def on_connect_delayed(self, device: Device, reason: str) -> None:
        self.events.append(f"delayed: {reason}")

    def on_connection_interrupted(self, device: Device, error: Exception, rejected: bool) -> None:
        given_up = f": {error}" if isinstance(error, TimeoutError) else ""
        self.events.append("interrupted by a rejection" if rejected else f"interrupted{given_up}")

    def on_connection_resumed(self, device: Device, after_s: float) -> None:
        self.events.append(f"resumed after {after_s:g}")

    def on_refused(self, device: Device, refusal: Refusal) -> None:
        self.events.append(f"refused {refusal.action} {refusal.subject}")

    def on_failed(self, device: Device, failure: Exception) -> None:
        self.events.append(f"failed {type(failure).__name__}")

    def on_publish(self, device: Device, number: int, topic: str, payload: bytes, late_s: float) -> None:
        self.events.append(f"sent {number} {payload.decode()} late {late_s:g}")

    def on_dropped(self, device: Device, number: int, topic: str, payload: bytes) -> None:
        self.events.append(f"lost {number} {payload.decode()}")

    def on_puback(self, device: Device, number: int, after_s: float, after_due_s: float) -> None:
        late = f", {after_due_s:g} after it was due" if after_due_s != after_s else ""
        self.events.append(f"acknowledged {number} after {after_s:g}{late}")

    def on_retransmit(self, device: Device, number: int) -> None:
        self.events.append(f"sent again {number}")

    def on_not_sent(self, device: Device, count: int) -> None:
        self.events.append(f"not sent {count}")

    def on_invalid_message(self, device: Device, number: int, error: Exception) -> None:
        self.events.append(f"invalid {number}")

    def on_message(self, device: Device, message: Any) -> bool | None:
        if self.error:
            raise self.error
        self.events.append(f"received {message}")
        return False if message in self.leaves else None

    def on_unreadable_message(self, device: Device, error: Exception) -> None:
        self.events.append(f"unreadable {type(error).__name__}")


class Bench:
    """A thing with all that is around it."""

    def __init__(self, clock: Clock, directory: Path, options: DeviceOptions, patience_s: float) -> None:
        self.clock, self.loop, self.listener = clock, Loop(clock), Recorder()
        self.files = ThingFiles(*(directory / f"thing_0.{suffix}" for suffix in ("pem", "pub", "prv")))
        for path in self.files:
            path.write_bytes(b"x")
        self.on_connack: Callable[..., None] = lambda *_: None
        self.client_ids: list[str] = []
        self.error: Exception | None = None  # that open_client() raises
        self.device = Device(
            "thing_0",
            self.files,
            Endpoint("broker.example", 8883),
            directory / "root",
            self.loop,  # type: ignore[arg-type]
            self.listener,
            self.open_client,
            options,
            patience_s,
        )

    def open_client(self, client_id: str, device: Device, *callbacks: Any) -> str:
        assert (str(device.endpoint), device.root_cert.name) == ("broker.example:8883", "root")
        assert device.files == self.files
        self.client_ids.append(client_id)
        self.on_connack, self.on_message = callbacks
        if self.error:
            raise self.error
        return f"client {len(self.client_ids)}"

    @property
    def connection(self) -> FakeConnection:
        """The last one."""
        connection: FakeConnection = self.loop.connections[-1]
        return connection

    @property
    def pauses_s(self) -> list[float]:
        return [after_s for after_s, _ in self.loop.connects]

    def open(self) -> None:
        """Let the loop have its turn, and then the last attempt that it was asked for."""
        self.loop.connects[-1][1]()
        self.loop.run()

    def online(self) -> FakeConnection:
        """Connect, or connect again."""
        if not self.loop.connects:
            self.device.connect()
        self.open()
        self.on_connack(None, 0)
        return self.connection

    def publish(self, *texts: str) -> None:
        for text in texts:
            self.device.publish(Text(text), self.clock.now)

    def pass_time(self, seconds: float) -> None:
        self.loop.run(seconds)


@pytest.fixture
def bench(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """Make one; no pause of a thing is left to chance."""
    monkeypatch.setattr(device, "Connection", FakeConnection)
    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)
    monkeypatch.setattr("iot_elf.diagnosis.server_certificate", lambda _: "made by nobody")
    monkeypatch.setattr("iot_elf.diagnosis.connect_failure", lambda error, *_: error)  # which reads the thing's files

    def make(qos: int = 1, topic_filters: tuple[str, ...] = (), patience_s: float = 0.0, client_id: str = "") -> Bench:
        return Bench(clock, tmp_path, DeviceOptions(qos, "elf/thing_0", topic_filters, client_id), patience_s)

    return make


def test_a_thing_is_connected_once_the_broker_has_said_so(bench: Callable[..., Bench]) -> None:
    its = bench()
    assert (its.device.state, its.device.is_online, its.device.is_offline) == ("connecting", False, False)
    assert (its.device.client_id, its.device.blocked_by, its.device.backlog) == ("", "", 0)
    its.device.connect()
    its.open()
    assert (its.pauses_s, its.listener.seen(), its.connection.is_written) == ([0.0], [], True)
    its.on_connack(None, 0)
    assert (its.listener.seen(), its.device.is_online, its.device.offline_s) == (["connected"], True, 0.0)
    assert its.device.client_id == its.client_ids[0]
    assert re.fullmatch("thing_0-[0-9a-f]{8}", its.device.client_id)
    its.on_connack(None, 0)
    its.on_connack(None, 5)
    assert its.listener.seen() == []  # a second one says nothing


def test_a_thing_subscribes_to_one_topic_filter_after_the_other(bench: Callable[..., Bench]) -> None:
    its = bench(topic_filters=("a", "b"))
    connection = its.online()
    assert connection.subscribed == [("a", 1)]
    connection.on_suback(1, (1,))
    assert (connection.subscribed, its.listener.seen()) == ([("a", 1), ("b", 1)], [])
    connection.on_suback(2, (0,))
    assert (connection.subscribed, its.listener.seen()) == ([("a", 1), ("b", 1)], ["connected"])


@pytest.mark.parametrize("answer", [(128,), (2,), ()])
def test_a_subscription_that_the_broker_refuses_is_a_refusal(bench: Callable[..., Bench], answer: tuple[int]) -> None:
    its = bench(topic_filters=("a", "b"))
    its.online().on_suback(1, answer)
    assert its.listener.seen() == ["refused iot:Subscribe a"]
    assert (len(its.loop.connects), its.device.is_online) == (2, False)


def test_a_connection_that_just_ended_is_not_asked_for_a_subscription(bench: Callable[..., Bench]) -> None:
    its = bench(topic_filters=("a",))
    its.device.connect()
    its.open()
    its.connection.is_alive = False  # and on_lost() comes soon
    its.on_connack(None, 0)
    assert its.connection.subscribed == []


def test_a_connection_that_ends_while_it_subscribes_is_a_refusal_of_that_filter(bench: Callable[..., Bench]) -> None:
    its = bench(topic_filters=("a", "b"))
    connection = its.online()
    connection.on_suback(1, (1,))
    connection.lose()
    assert its.listener.seen() == ["refused iot:Subscribe b"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, "unacceptable protocol version"),
        (2, "client identifier rejected"),
        (3, "server unavailable"),
        (4, "bad user name or password"),
        (5, "not authorized"),
        (77, "unknown"),
    ],
)
def test_a_connect_that_the_broker_refuses_is_a_refusal(bench: Callable[..., Bench], code: int, reason: str) -> None:
    its = bench()
    its.device.connect()
    its.open()
    its.on_connack(None, code)
    assert its.listener.seen() == ["refused iot:Connect thing_0-*"]
    assert its.device.refusals.last and f": {reason} (CONNACK {code})" in its.device.refusals.last.cause
    assert not its.connection.is_alive


def tls_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), "refused iot:Connect thing_0-*"),
        (tls_error("TLSV1_ALERT_UNKNOWN_CA"), "refused iot:Connect thing_0-*"),
    ],
)
def test_a_connection_that_ends_before_the_broker_answers_is_a_refusal(
    bench: Callable[..., Bench], error: Exception, expected: str
) -> None:
    its = bench()
    its.device.connect()
    its.open()
    its.connection.lose(error)
    assert its.listener.seen() == [expected]
    assert its.device.refusals.last
    words = "TLS says TLSV1_ALERT_UNKNOWN_CA" if isinstance(error, ssl.SSLError) else "without an answer"
    assert words in its.device.refusals.last.cause


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(), "failed ConnectionRefusedError"),
        (socket.gaierror(), "failed gaierror"),
        (ssl.SSLCertVerificationError(1, "untrusted"), "failed SSLCertVerificationError"),
        (ssl.SSLError(1, "not TLS"), "failed SSLError"),
        (ElfError("ProxyForbids", "a proxy forbids it", "ask"), "failed ElfError"),
        (ValueError("a bug"), "failed ValueError"),
        (tls_error("SSLV3_ALERT_BAD_CERTIFICATE"), "refused iot:Connect thing_0-*"),
        (TimeoutError(), "delayed: it does not answer"),
        (ElfError("ProxyUnanswered", "it does not answer", "check it"), "delayed: the proxy does not answer"),
        (ConnectionResetError(), "delayed: it resets the connection"),
        (ssl.SSLEOFError(8, "EOF"), "delayed: it closes the connection in the TLS handshake"),
        (ssl.SSLZeroReturnError(6, "closed"), "delayed: it closes the connection in the TLS handshake"),
    ],
)
def test_a_first_connect_is_tried_again_for_a_minute_where_that_may_help(
    bench: Callable[..., Bench], error: Exception, expected: str
) -> None:
    its = bench()
    its.device.connect()
    its.error = error
    its.open()
    assert its.listener.seen() == [expected]
    is_over = "failed" in expected
    assert (its.device.state, len(its.loop.connects)) == (("ended", 1) if is_over else ("connecting", 2))
    if "delayed" in expected:
        its.pass_time(59.9)
        its.open()
        its.pass_time(0.2)
        its.open()
        assert its.listener.seen() == [expected, f"failed {type(error).__name__}"]


def test_a_thing_whose_first_connects_are_reset_is_connected_in_the_end(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.device.connect()
    its.error = ConnectionResetError()
    for _ in range(3):
        its.open()
    its.error = None
    its.online()
    assert its.listener.seen() == ["delayed: it resets the connection"] * 3 + ["connected"]
    assert its.pauses_s == [0.0, 1.5, 3.0, 3.0]


def test_a_silent_broker_is_given_up_after_a_minute(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.device.connect()
    attempts = 0
    while its.device.state == "connecting":
        its.open()
        its.pass_time(constant("CONNECT_TIMEOUT_S") + 0.1)
        attempts += 1
        assert not its.connection.is_alive
    assert its.listener.seen() == ["delayed: it does not answer"] * (attempts - 1) + ["failed TimeoutError"]
    assert attempts == 13


def test_a_thing_that_was_connected_keeps_trying(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.online().lose()
    its.error = ConnectionRefusedError()
    for _ in range(100):
        its.open()
    assert its.listener.seen() == ["connected", "interrupted"]
    assert (len(its.loop.connects), its.device.is_offline) == (102, True)


def test_each_answer_is_awaited_for_five_seconds(bench: Callable[..., Bench]) -> None:
    its = bench(topic_filters=("a", "b"))
    its.device.connect()
    its.open()
    its.pass_time(4.9)
    its.on_connack(None, 0)
    its.pass_time(4.9)
    its.connection.on_suback(1, (1,))
    its.pass_time(4.9)
    assert len(its.loop.connects) == 1
    its.pass_time(0.2)
    assert len(its.loop.connects) == 2


def test_an_answer_that_came_is_no_longer_awaited(bench: Callable[..., Bench]) -> None:
    its = bench(topic_filters=("a",))
    its.online().on_suback(1, (1,))
    its.pass_time(100.0)
    assert (its.listener.seen(), len(its.loop.connects)) == (["connected"], 1)


def test_the_pauses_between_attempts_grow_up_to_four_seconds(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.online().lose()
    its.error = OSError()
    for _ in range(5):
        its.open()
    assert its.pauses_s == [0.0, 0.75, 1.5, 3.0, 3.0, 3.0, 3.0]  # three quarters of 1, 2, 4 and 4 s
    its.error = None
    its.online().lose()
    assert its.pauses_s[-1] == 0.75  # after a success they begin anew


def test_a_client_id_that_stays_the_same_connects_once_a_second_at_the_most(bench: Callable[..., Bench]) -> None:
    its = bench(client_id="thing_0")
    its.online().lose()
    its.online()
    its.pass_time(0.2)
    its.connection.lose()
    its.online()
    its.pass_time(1.0)
    its.connection.lose()
    assert its.pauses_s == pytest.approx([0.0, 1.1, 0.9, 0.75])
    assert its.client_ids == ["thing_0"] * 3


def test_only_connections_that_were_ended_soon_in_a_row_are_counted(bench: Callable[..., Bench]) -> None:
    its = bench(client_id="thing_0")
    counts = []
    for lasted_s, fails in ((2.0, 0), (19.9, 0), (2.0, 1), (2.0, 0), (30.0, 0), (2.0, 0), (0.1, 0)):
        its.online()
        its.pass_time(lasted_s)
        its.connection.lose()
        counts.append(its.device.brief_connections)
        if fails:
            its.error = OSError()
            its.open()
            its.error = None
    assert counts == [1, 2, 3, 1, 0, 1, 0]


def test_the_pauses_of_things_differ_so_that_not_all_come_at_once(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = []

    def uniform(*given: float) -> float:
        bounds.append(given)
        return 1.0

    monkeypatch.setattr("random.uniform", uniform)
    its = bench()
    its.online().lose()
    assert bounds == [(0.5, 1.0)]


def test_an_outage_is_measured_until_the_thing_is_connected_again(bench: Callable[..., Bench]) -> None:
    its = bench()
    for outage_s in (7.5, 30.0):
        its.online().lose()
        assert (its.device.is_offline, its.device.is_online) == (True, False)
        its.pass_time(outage_s)
    its.online()
    assert its.listener.seen() == ["connected", "interrupted", "resumed after 7.5", "interrupted", "resumed after 30"]
    assert (its.device.offline_s, its.device.is_offline) == (37.5, False)
    assert len({*its.client_ids}) == 3


def test_in_an_outage_of_the_runs_own_a_thing_has_no_connection_and_attempts_none(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.publish("a")
    connection = its.online()
    its.device.begin_outage()
    assert (connection.is_reset, its.device.is_online, its.device.in_outage) == (True, False, True)
    its.publish("b")
    its.pass_time(10.0)
    assert its.pauses_s == [0.0]
    its.device.end_outage()
    assert (its.pauses_s, its.device.refusals.last) == ([0.0, 0.75], None)
    assert its.online().published == ["a", "b"]
    its.connection.lose()
    its.device.begin_outage()  # while it is offline anyway, as it stays
    its.open()
    its.pass_time(10.0)
    its.device.end_outage()
    its.online()
    assert (its.device.outage_s, its.device.offline_s) == (10.0, 10.0)
    assert not its.device.brief_connections
    its.device.begin_outage()
    its.pass_time(1.0)
    its.device.end()
    its.device.end_outage()
    assert (its.device.outage_s, len(its.client_ids)) == (11.0, 3)


@pytest.mark.parametrize(("is_lost", "offline_s"), [(True, 12.5), (False, 0.0)])
def test_an_outage_that_lasts_to_the_end_counts(bench: Callable[..., Bench], is_lost: bool, offline_s: float) -> None:
    its = bench()
    connection = its.online()
    if is_lost:
        connection.lose()
    its.pass_time(12.5)
    its.device.end()
    its.pass_time(5.0)
    its.device.end()
    assert its.device.offline_s == offline_s


def test_a_thing_that_never_was_connected_was_not_offline(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.device.connect()
    its.pass_time(5.0)
    its.device.end()
    assert its.device.offline_s == 0.0


# Its messages


def test_messages_are_sent_as_they_are_due_and_their_acknowledgements_timed(bench: Callable[..., Bench]) -> None:
    its = bench()
    connection = its.online()
    its.device.publish(Text("a"), its.clock.now - 0.5)
    its.pass_time(1.5)
    its.publish("b")
    its.pass_time(0.25)
    assert its.device.backlog == 2
    connection.acknowledge(1)
    connection.acknowledge(0)
    assert connection.published == ["a", "b"]
    assert its.listener.seen() == [
        "connected",
        "sent 1 a late 0.5",
        "sent 2 b late 0",
        "acknowledged 2 after 0.25",
        "acknowledged 1 after 1.75, 2.25 after it was due",
    ]
    assert its.device.backlog == 0


def test_what_was_due_before_the_connection_goes_out_in_order_once_it_is_there(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.device.connect()
    its.publish("a", "b", "c")
    assert (its.listener.seen(), its.device.blocked_by) == ([], outbox.OFFLINE)
    its.pass_time(2.0)
    its.online()
    assert its.listener.seen() == ["connected", "sent 1 a late 2", "sent 2 b late 2", "sent 3 c late 2"]
    assert its.device.blocked_by == ""


def test_after_a_loss_messages_are_sent_again_in_order_before_new_ones(bench: Callable[..., Bench]) -> None:
    its = bench()
    first = its.online()
    its.publish(*"abcd")
    first.acknowledge(1)
    first.lose()
    its.publish("e")
    its.listener.seen()
    second = its.online()
    assert second.published == ["a", "c", "d", "e"]
    assert its.listener.seen() == ["resumed after 0", "sent again 1", "sent again 3", "sent again 4", "sent 5 e late 0"]
    second.acknowledge(1)
    assert its.listener.seen() == ["acknowledged 3 after 0"]


def test_after_a_loss_with_a_full_window_everything_goes_out(bench: Callable[..., Bench], limits: Limits) -> None:
    limits(MAX_IN_FLIGHT=3)
    its = bench()
    first = its.online()
    its.publish(*"abcde")
    assert first.published == [*"abc"]
    assert its.device.blocked_by == outbox.IN_FLIGHT_LIMIT
    first.lose()
    second = its.online()
    assert second.published == [*"abc"]
    second.acknowledge(0)
    assert second.published == [*"abcd"]
    second.acknowledge(2)
    assert second.published == [*"abcde"]
    assert its.device.blocked_by == ""


def test_a_connection_sends_100_messages_a_second(bench: Callable[..., Bench]) -> None:
    its = bench(qos=0)
    connection = its.online()
    its.publish(*["x"] * 300)
    sent = []
    for _ in range(3):
        sent.append(len(connection.published))
        if len(sent) == 1:
            assert its.device.blocked_by == outbox.RATE_LIMIT
            assert len(its.loop.waiting) == 3  # to look whether CONNACK came, whether it survived, and for the rate
        its.pass_time(1.0)
    assert sent == [11, 111, 211]  # after a burst
    assert its.device.blocked_by == ""
    assert len(connection.published) == 300


def test_what_delays_a_message_first_is_said_to_be_the_reason(bench: Callable[..., Bench], limits: Limits) -> None:
    limits(BURST_S=0.0)
    its = bench(qos=0)
    connection = its.online()
    connection.is_full = True
    its.publish("a", "b")
    assert (its.device.blocked_by, connection.published) == (outbox.SLOW_NETWORK, [])
    connection.is_full = False
    connection.on_writable()
    assert (its.device.blocked_by, connection.published) == (outbox.SLOW_NETWORK, ["a"])  # the rate only adds to it
    its.pass_time(0.02)
    assert (its.device.blocked_by, connection.published) == ("", ["a", "b"])


def test_a_connection_that_just_ended_gets_no_message(bench: Callable[..., Bench]) -> None:
    its = bench()
    connection = its.online()
    connection.is_alive = False  # and on_lost() comes soon
    its.publish("a")
    assert (connection.published, its.device.blocked_by) == ([], outbox.OFFLINE)


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize(
    ("then", "at_qos_0", "at_qos_1"),
    [
        ("written", ["sent 1 a late 0", "sent 2 b late 1"], ["sent 1 a late 0", "sent 2 b late 1"]),
        ("lost", ["lost 1 a", "interrupted by a rejection"], ["interrupted by a rejection"]),
        ("ended", ["not sent 2"], ["not sent 2"]),
        ("ended as it is written", ["sent 1 a late 0", "not sent 1"], ["sent 1 a late 0", "not sent 1"]),
    ],
)
def test_a_message_is_sent_when_the_connection_has_taken_the_last_part_of_it(
    bench: Callable[..., Bench], qos: int, then: str, at_qos_0: list[str], at_qos_1: list[str]
) -> None:
    its = bench(qos=qos)
    connection = its.online()
    connection.is_filled = True
    its.publish("a", "b")
    assert (its.listener.seen(), connection.published) == (["connected"], ["a"])
    assert (its.device.backlog, its.device.blocked_by) == (2, outbox.SLOW_NETWORK)
    its.pass_time(1.0)
    connection.is_filled = False
    if then == "lost":
        connection.lose()
    elif then == "ended":
        its.device.end()
    else:
        connection.is_full = False
        connection.on_writable() if then == "written" else its.device.end()
    assert its.listener.seen() == (at_qos_1 if qos else at_qos_0)
    assert [*its.device.outbox.in_flight] == {"written": [1, 2], "lost": [1], "ended": []}.get(then, [1]) * qos
    if then == "lost":
        its.online()
        again = ["resumed after 0", "sent 1 a late 0", "sent 2 b late 1"]  # it was not sent before
        assert its.listener.seen() == (again if qos else ["resumed after 0", "sent 2 b late 1"])


def test_a_message_counts_once_however_often_it_is_sent_again(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.online()
    its.publish("a")
    for _ in range(3):
        its.pass_time(REJECTED_WITHIN_S + 0.1)
        its.connection.lose()
        its.online()
    assert its.listener.seen().count("sent again 1") == 1


def test_a_message_that_is_not_acknowledged_goes_out_again_on_another_connection(bench: Callable[..., Bench]) -> None:
    its = bench()
    first = its.online()
    its.publish("a", "b")
    for _ in range(9):  # the broker goes on, and has skipped one
        its.pass_time(3.0)
        its.publish("c")
        first.acknowledge(len(first.published) - 1)
    assert first.is_alive
    its.listener.seen()
    its.pass_time(2.9)
    assert its.listener.seen() == []
    its.pass_time(0.2)
    assert its.listener.seen() == ["interrupted: no acknowledgement for 30 s"]
    assert not first.is_alive
    second = its.online()
    assert second.published == ["a", "b"]
    assert its.listener.seen()[1:] == ["sent again 1", "sent again 2"]
    second.acknowledge(0)
    its.pass_time(29.0)
    second.acknowledge(1)
    its.pass_time(1000.0)
    assert second.is_alive


def test_a_slow_connection_that_acknowledges_one_after_the_other_goes_on(bench: Callable[..., Bench]) -> None:
    its = bench()
    connection = its.online()
    its.publish(*"abcdefgh")
    for place in range(8):
        its.pass_time(29.0)
        connection.acknowledge(place)
    its.pass_time(100.0)
    assert (connection.is_alive, its.device.backlog) == (True, 0)


def test_at_qos_0_what_is_due_in_an_outage_is_lost(bench: Callable[..., Bench]) -> None:
    its = bench(qos=0)
    its.online().lose()
    its.publish("a", "bad")
    connection = its.online()
    its.publish("b")
    assert connection.published == ["b"]
    assert its.listener.seen() == [
        *("connected", "interrupted", "lost 1 a", "invalid 2", "resumed after 0", "sent 3 b late 0")
    ]


def test_a_message_that_can_not_be_made_keeps_no_other_from_being_sent(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.device.connect()
    its.publish("a", "bad", "c")
    assert its.online().published == ["a", "c"]
    assert its.listener.seen() == ["connected", "sent 1 a late 0", "invalid 2", "sent 3 c late 0"]


def test_in_an_outage_the_oldest_messages_are_given_up_and_counted(bench: Callable[..., Bench], limits: Limits) -> None:
    limits(MAX_QUEUED=2)
    its = bench()
    its.online().lose()
    its.listener.seen()
    its.publish(*"abcd")
    assert its.listener.seen() == ["not sent 1", "not sent 1"]
    assert its.online().published == ["c", "d"]


@pytest.mark.parametrize("failure", [None, UsageError("Name", "it is over", "begin anew")])
def test_what_is_due_at_the_end_is_not_sent(bench: Callable[..., Bench], failure: Exception | None) -> None:
    its = bench()
    connection = its.online()
    its.publish("a")
    connection.is_full = True
    its.publish("b", "c")
    its.listener.seen()
    its.device.end(failure)
    assert its.listener.seen() == ["not sent 2", *(["failed UsageError"] if failure else [])]
    assert (its.device.state, its.device.backlog, connection.is_alive) == ("ended", 0, False)
    its.publish("d")
    its.device.end(failure)
    assert its.listener.seen() == ["not sent 1"]
    assert [*its.device.outbox.in_flight] == [1]  # which the report names


def test_a_thing_that_ended_does_not_connect(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.device.connect()
    its.device.end()
    its.open()
    assert its.client_ids == []
    its = bench()
    its.device.connect()
    its.loop.connects[-1][1]()
    its.device.end()  # while the pool connects
    its.loop.run()
    assert (its.client_ids != [], its.connection.is_alive, its.connection.is_written) == (True, False, False)


def test_an_acknowledgement_of_nothing_is_not_counted(bench: Callable[..., Bench]) -> None:
    its = bench()
    connection = its.online()
    its.publish("a")
    on_puback = connection.on_puback[0]
    assert on_puback
    on_puback(1, (128,))  # a SUBACK for its ID
    assert (its.device.backlog, its.device.refusals.is_on_trial) == (1, True)
    on_puback(1)
    on_puback(1)
    assert its.listener.seen() == ["connected", "sent 1 a late 0", "acknowledged 1 after 0"]


# Refusals of its messages


def test_a_thing_whose_messages_are_refused_is_asked_about_at_the_second_and_given_up_after_eight_minutes(
    bench: Callable[..., Bench],
) -> None:
    its = bench()
    began = its.clock.now
    for expected in ([], ["refused iot:Publish elf/thing_0"], []):
        connection = its.online()
        its.publish("a")
        its.listener.seen()
        connection.lose()
        assert its.listener.seen() == ["interrupted by a rejection", *expected]
    its.clock.now = began + constant("POLICY_CHANGE_S") + 0.1
    its.online().lose()
    assert its.listener.seen()[-2:] == ["interrupted by a rejection", "failed Refusal"]
    assert len(its.loop.connects) == 4


@pytest.mark.parametrize("qos", [0, 1])
def test_a_connection_that_survives_its_first_message_was_not_refused(bench: Callable[..., Bench], qos: int) -> None:
    its = bench(qos=qos)
    connection = its.online()
    its.publish("a")
    if qos:
        connection.acknowledge(0)
    else:
        its.pass_time(1.9)
        assert its.device.refusals.is_on_trial
        its.pass_time(0.2)
    its.publish("b")
    connection.lose()
    assert its.listener.seen()[-1] == "interrupted"


def test_the_time_of_an_earlier_connection_says_nothing_about_the_next(bench: Callable[..., Bench]) -> None:
    its = bench()
    first = its.online()
    its.publish("a")
    its.pass_time(1.9)
    first.lose()
    its.online()
    its.pass_time(0.2)
    assert its.device.refusals.is_on_trial


def test_a_loss_without_a_message_is_no_refusal(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.device.refusals.add(refusal(PUBLISH))
    its.online().lose()
    assert (its.listener.seen(), its.device.refusals.last) == (["connected", "interrupted"], None)


def test_a_connection_ends_a_row_of_refusals(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.device.connect()
    its.open()
    its.on_connack(None, 5)
    assert its.device.refusals.last
    its.online()
    assert its.device.refusals.last is None


def test_a_network_error_ends_a_row_of_refusals(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.online().lose()
    its.open()
    its.on_connack(None, 5)
    assert its.device.refusals.last
    its.error = ConnectionResetError()
    its.open()
    assert its.device.refusals.last is None


def test_refusals_of_what_was_just_made_do_not_count(bench: Callable[..., Bench]) -> None:
    its = bench(patience_s=20.0)
    its.device.connect()
    for seconds in (19.0, 2.0):
        its.open()
        its.on_connack(None, 5)
        assert its.listener.seen() == []
        its.pass_time(seconds)
    its.open()
    its.on_connack(None, 5)
    assert its.listener.seen() == ["refused iot:Connect thing_0-*"]


def test_a_refusal_while_a_thing_reconnects_is_no_failure_if_nothing_is_left_to_do(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.device.connect()
    its.open()
    its.on_connack(None, 3)
    assert its.device.unresolved  # it has never been there
    its.online()
    its.publish("a")
    its.pass_time(REJECTED_WITHIN_S + 0.1)
    its.connection.lose()
    its.open()
    its.on_connack(None, 3)
    assert its.device.unresolved  # it has a message left
    its.online().acknowledge(0)
    its.connection.lose()
    its.open()
    its.on_connack(None, 3)
    assert its.device.refusals.last and not its.device.unresolved


# What it receives


@pytest.mark.parametrize("kind", [ValueError, ArithmeticError, LookupError, TypeError, RecursionError])
def test_a_message_that_can_not_be_read_ends_no_connection(bench: Callable[..., Bench], kind: type[Exception]) -> None:
    its = bench()
    its.online()
    its.on_message("one")
    its.listener.error = kind()
    its.on_message("two")
    assert its.listener.seen() == ["connected", "received one", f"unreadable {kind.__name__}"]
    assert its.connection.pubacks == ["one", "two"]  # or it would come for ever


def test_a_message_is_acknowledged_once_somebody_has_it_also_before_any_suback(
    bench: Callable[..., Bench], clock: Clock
) -> None:
    its = bench(topic_filters=("a",))
    its.device.connect()
    its.open()
    its.connection.session_present, its.listener.leaves = True, ["two"]
    clock.now += 5.0
    its.on_connack(None, 0)
    for message in ("one", "two", "three"):
        its.on_message(message)
    assert its.listener.seen() == ["received one", "received two", "received three"]
    assert its.connection.pubacks == ["one", "three"]
    assert (its.device.accepted_at, its.device.session_present) == (clock.now, True)


# Its files


def test_a_thing_does_not_wait_for_ever_for_its_files(tmp_path: Path) -> None:
    import os

    files = ThingFiles(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    files.private_key.write_bytes(b"KEY")
    refuse_blocking_files("thing_0", files)  # what is missing is not its business
    files.private_key.write_bytes(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    with pytest.raises(ElfError, match="has a passphrase"):
        refuse_blocking_files("thing_0", files)
    os.mkfifo(files.public_key)
    with pytest.raises(ElfError, match="b: it is not a file"):
        refuse_blocking_files("thing_0", files)


def test_a_thing_whose_key_has_a_passphrase_does_not_connect(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.files.private_key.write_bytes(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    its.device.connect()
    its.open()
    assert (its.client_ids, its.listener.seen()) == ([], ["failed ElfError"])


def test_only_an_error_of_a_certificate_is_told_with_the_servers(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.error = error = ConnectionRefusedError(111, "refused")
    its.device.connect()
    its.open()
    assert error.strerror == "refused"


def test_a_broken_certificate_is_told_with_its_server(bench: Callable[..., Bench]) -> None:
    its = bench()
    error = ssl.SSLCertVerificationError(1, "untrusted")
    error.verify_code = 20
    its.error = error
    its.device.connect()
    its.open()
    assert error.strerror == "untrusted (made by nobody)"
    assert its.listener.seen() == ["failed SSLCertVerificationError"]


# What is retained, and wills


@pytest.mark.parametrize(
    ("retain", "will", "session", "connect", "publish"),
    [
        (False, None, False, [], []),
        (True, None, False, [], ["iot:RetainPublish topic/elf/thing_0"]),
        (False, Will("a", "", 0, False), False, ["iot:Publish topic/a", "iot:ConnectAttributes LastWill"], []),
        (False, None, True, ["iot:ConnectAttributes PersistentConnect"], []),
        (
            *(True, Will("a", "", 0, True), False),
            ["iot:Publish topic/a", "iot:RetainPublish topic/a", "iot:ConnectAttributes LastWill"],
            ["iot:RetainPublish topic/elf/thing_0"],
        ),
    ],
)
def test_a_refusal_says_what_else_the_policy_must_allow(
    bench: Callable[..., Bench], retain: bool, will: Will | None, session: bool, connect: list[str], publish: list[str]
) -> None:
    def needs() -> list[str]:
        assert its.device.refusals.last
        return [" ".join(each) for each in its.device.refusals.last.needs]

    its = bench()
    its.device.options = its.device.options._replace(retain=retain, will=will, session=session)
    its.device.connect()
    its.open()
    its.connection.lose()
    assert needs() == connect
    connection = its.online()
    its.publish("a")
    assert connection.retained == [retain]
    connection.lose()
    assert needs() == publish
    assert its.device.refusals.last
    assert ("iot:RetainPublish" in its.device.refusals.last.remedy) is bool(publish)
