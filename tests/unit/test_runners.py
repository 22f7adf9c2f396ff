"""The things of a run: when each message is due, what is waited for, and what is counted."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support.program import Limits

from iot_elf import outbox, runners
from iot_elf.device import DeviceOptions
from iot_elf.errors import ElfError, Refusal
from iot_elf.events import EventQueue, Interrupted
from iot_elf.messages import Line
from iot_elf.outbox import Outbox, OutgoingMessage
from iot_elf.runners import MessageObserver, PublishRunner, Runner, StateChanged, SubscribeRunner, VerifyRunner

from .fake_loop import Loop
from .stand_ins import Clock, logged


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, runners)


class FakeDevice:
    """In place of a Device: what it is asked to publish, and when."""

    def __init__(self, clock: Clock, thing: str) -> None:
        self.clock, self.thing, self.topic_filters = clock, thing, tuple[str, ...]()
        self.topic, self.endpoint, self.client_id = f"elf/{thing}", "broker", f"{thing}-id"
        self.was_connected = self.is_online = True
        self.blocked_by, self.offline_s, self.brief_connections = "", 0.0, 0
        self.options, self.outage_s, self.lost_in_outage = DeviceOptions(1), 0.0, False
        self.accepted_at, self.session_present = 0.0, False
        self.outbox = Outbox(thing, self.topic, 1)
        self.published: list[tuple[float, float]] = []  # due, and when it was asked
        self.backlog = 0
        self.explained: list[Refusal] = []
        self.refusals, self.unresolved = SimpleNamespace(explain=self.explained.append), None
        self.ended: list[Any] = []

    def publish(self, message: Any, due: float) -> None:
        self.published.append((due, self.clock.now))

    def have_in_flight(self, number: int, at: float, payload: bytes = b"") -> None:
        self.outbox.in_flight[number] = OutgoingMessage(number, self.topic, payload, at, at)

    def connect(self) -> None:
        self.on_connect()

    def on_connect(self) -> None:
        pass

    def end(self, failure: Any = None) -> None:
        self.ended.append(failure)


class WaitingLoop(Loop):
    """Runs when the main thread waits: time passes until something was put there for it."""

    def attend(self, events: EventQueue) -> None:
        def get(deadline: float) -> Any:
            events.check()
            while not (found := next(events.drain(), None)):
                if not self.waiting or self.waiting[0][0] > deadline:
                    self.clock.now = max(self.clock.now, deadline)
                    return None
                self.run(max(0.0, self.waiting[0][0] - self.clock.now))
            return found

        events.get = get  # type: ignore[method-assign]


class Observer(MessageObserver):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_publish(self, device: Any, number: int, topic: str, payload: bytes) -> None:
        self.seen.append(f"published {number}")

    def on_dropped(self, device: Any, number: int, topic: str, payload: bytes) -> None:
        self.seen.append(f"lost {number}")

    def on_puback(self, device: Any, number: int, after_s: float) -> None:
        self.seen.append(f"acknowledged {number} after {after_s:g}")

    def on_message(self, device: Any, message: Any, payload: bytes) -> None:
        self.seen.append(f"received {payload.decode()}")

    def on_rejected(self, device: Any, _topic: str, answer: Any) -> None:
        self.seen.append(f"rejected {answer}")


class Bench:
    """A runner, its things, and a loop that runs while somebody waits."""

    def __init__(self, clock: Clock, kind: Any, things: int, **options: Any) -> None:
        self.clock, self.events, self.observer = clock, EventQueue(), Observer()
        self.loop = WaitingLoop(clock)
        self.loop.attend(self.events)
        self.diagnosed: list[str] = []
        options = {"qos": 1, "interval_s": 1.0} | options if kind is PublishRunner else options
        self.runner: Any = kind(self.events, **{"diagnose": self.diagnose, "observer": self.observer} | options)
        self.runner.loop = self.loop
        self.devices = [FakeDevice(clock, f"thing_{number}") for number in range(things)]
        self.runner.devices = {device.thing: device for device in self.devices}
        self.record = self.runner.record

    def diagnose(self, thing: str, refusal: Refusal) -> ElfError:
        self.diagnosed.append(thing)
        return refusal


@pytest.fixture
def bench(clock: Clock) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(kind: type[Runner] = PublishRunner, things: int = 2, **options: Any) -> Bench:
        made.append(Bench(clock, kind, things, **options))
        return made[-1]

    yield make
    for each in made:
        each.runner._diagnosing.shutdown()


# What comes back


def test_a_message_that_came_back_was_taken_by_the_broker(bench: Callable[..., Bench]) -> None:
    """Which is the only proof at QoS 0, and forgets an earlier refusal."""
    its = bench(VerifyRunner, 1, qos=0, interval_s=1.0)
    (device,), its.record.run = its.devices, "abc"
    device.topic_filters, taken = (device.topic,), list[str]()
    device.refusals.on_success = lambda: taken.append("taken")
    its.runner.on_publish(device, 1, "t", b"{}", 0.0)
    for content in ({"seq": 1, "thing": "thing_1"}, {"seq": 1}, {"seq": 2}, {}):
        message = {"thing": "thing_0", "run": "abc", **content}
        its.runner.on_message(device, SimpleNamespace(payload=json.dumps(message).encode()))
    assert (taken, its.record.totals["returned"], its.runner.backlog) == (["taken"], 1, 0)


def test_what_a_lost_connection_had_yet_to_bring_back_is_not_awaited(bench: Callable[..., Bench]) -> None:
    """Without a session a broker delivers it no more; what it did not acknowledge is sent again, and can come back."""
    its = bench(VerifyRunner, 1, qos=1, interval_s=1.0)
    (device,) = its.devices
    device.topic_filters = (device.topic,)
    for number in (1, 2):
        its.runner.on_publish(device, number, "t", b"{}", 0.0)
    device.have_in_flight(2, at=1000.0)
    its.runner.on_connection_interrupted(device, ConnectionResetError(), False)
    assert its.runner.backlog - device.backlog == 1


# The schedule


@pytest.mark.parametrize(
    ("things", "spread", "rounds", "expected"),
    [
        (1, 1.0, 3, [[0, 2, 4]]),
        (2, 1.0, 2, [[0, 2], [1, 3]]),
        (4, 1.0, 1, [[0], [0.5], [1], [1.5]]),
        (4, 0.5, 2, [[0, 2], [0.25, 2.25], [0.5, 2.5], [0.75, 2.75]]),
        (2, 0.0, 1, [[0], [0]]),
    ],
)
def test_things_take_turns_and_each_publishes_once_an_interval(
    bench: Callable[..., Bench], things: int, spread: float, rounds: int, expected: list[list[float]]
) -> None:
    its = bench(things=things)
    due = its.clock.now + 5.0
    its.runner.publish_on_schedule(None, due, 2.0, spread, rounds)
    assert [[at - due for at, _ in device.published] for device in its.devices] == expected
    assert all(asked == at for device in its.devices for at, asked in device.published)
    assert its.clock.now == due + max(max(each) for each in expected)


def test_without_more_words_each_thing_publishes_once(bench: Callable[..., Bench]) -> None:
    its = bench(things=4)
    its.runner.publish_on_schedule(None, its.clock.now, 2.0)
    assert [device.published[0][0] - 1000.0 for device in its.devices] == [0.0, 0.5, 1.0, 1.5]
    assert {len(device.published) for device in its.devices} == {1}


def test_what_is_late_is_published_at_once_and_still_due_when_it_was(bench: Callable[..., Bench]) -> None:
    its = bench(things=1)
    its.runner.publish_on_schedule(None, its.clock.now - 2.5, 1.0, rounds=4)
    assert its.devices[0].published == [(997.5, 1000.0), (998.5, 1000.0), (999.5, 1000.0), (1000.5, 1000.5)]


def test_a_thing_that_has_not_been_connected_yet_publishes_nothing(bench: Callable[..., Bench]) -> None:
    its = bench(things=2)
    its.devices[1].was_connected = False
    its.devices[0].is_online = False
    its.runner.publish_on_schedule(None, its.clock.now, 1.0, rounds=3)
    assert [len(device.published) for device in its.devices] == [3, 0]
    assert its.record.by_thing == {"thing_1": {"not_sent": 3}}


def test_the_loop_has_other_work_to_do_between_many_messages(bench: Callable[..., Bench], limits: Limits) -> None:
    limits(MAX_PER_TURN=3)
    its = bench(things=8)
    counts: list[int] = []
    usual = its.loop.call_at

    def call_at(*call: Any) -> None:
        counts.append(sum(len(device.published) for device in its.devices))
        usual(*call)

    its.loop.call_at = call_at  # type: ignore
    its.runner.publish_on_schedule(None, its.clock.now - 10.0, 1.0)
    assert counts == [0, 3, 6]
    assert [len(device.published) for device in its.devices] == [1] * 8


def test_a_schedule_without_end_ends_with_the_run(bench: Callable[..., Bench]) -> None:
    its = bench(things=1)

    def end() -> None:
        its.record.ended_at = its.clock.now
        its.record.failed.add("thing_0")  # so that nobody waits any more
        its.events.put(StateChanged())

    its.loop.call_at(its.clock.now + 2.5, end)
    its.runner.publish_on_schedule(None, its.clock.now, 1.0, rounds=None)
    its.loop.run(10.0)
    assert len(its.devices[0].published) == 3


# Waiting


def test_a_wait_ends_when_it_is_over_or_at_its_deadline(bench: Callable[..., Bench]) -> None:
    its = bench()
    assert its.runner.wait(lambda: True, its.clock.now - 1.0)
    assert not its.runner.wait(lambda: False, its.clock.now)
    assert its.clock.now == 1000.0
    assert not its.runner.wait(lambda: False, its.clock.now + 5.0)
    assert its.clock.now == 1005.0
    its.loop.call_at(1007.0, its.events.put, StateChanged())
    assert its.runner.wait(lambda: its.clock.now >= 1006.0, 1010.0)
    assert its.clock.now == 1007.0  # nobody looked before


def test_a_wait_looks_as_often_as_it_was_asked(bench: Callable[..., Bench]) -> None:
    its = bench()
    looked: list[float] = []
    its.runner.wait(lambda: looked.append(its.clock.now - 1000.0), 1005.0, look_s=2.0)
    assert looked == [0.0, 2.0, 4.0, 5.0]


def test_nobody_waits_when_all_things_have_failed(bench: Callable[..., Bench]) -> None:
    its = bench(things=2)
    its.record.failed.add("thing_0")
    assert not its.runner.has_failed
    assert not its.runner.wait(lambda: False, 1001.0)
    its.record.failed.add("thing_1")
    assert its.runner.has_failed
    assert its.runner.wait(lambda: False)


def test_a_loss_is_told_to_who_asked_and_a_bug_of_the_loop_is_raised(bench: Callable[..., Bench]) -> None:
    losses: list[float] = []
    its: Bench = bench(on_loss=lambda: losses.append(its.clock.now))
    its.events.put(StateChanged())
    its.events.put(StateChanged(is_loss=True))
    its.runner.wait(lambda: False, 1001.0)
    assert losses == [1000.0]
    its.events.put(LookupError("a bug"))
    with pytest.raises(LookupError):
        its.runner.wait(lambda: False, 1002.0)


def test_lines_that_come_early_are_kept_in_order(bench: Callable[..., Bench]) -> None:
    its = bench()
    for number in (1, 2, 3):
        its.events.put(Line(number=number))
    its.runner.wait(lambda: False, 1001.0)
    assert [its.runner.next_line(1001.0).number for _ in range(3)] == [1, 2, 3]
    assert its.runner.next_line(1005.0) is None
    assert its.clock.now == 1005.0


def test_diagnoses_are_awaited_for_two_calls_of_aws(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.runner._under_diagnosis.add("thing_0")
    its.runner.await_diagnoses()
    assert its.clock.now == 1040.0


# Connecting


def test_a_run_begins_when_each_thing_is_connected_or_has_failed(bench: Callable[..., Bench]) -> None:
    its = bench(things=3)
    runner: Any = its.runner
    for after_s, device in enumerate(its.devices, 1):
        act = runner.on_failed if device.thing == "thing_1" else runner.on_connected
        rest = (ElfError("Name", "it is broken", "mend it"),) if device.thing == "thing_1" else ()
        device.on_connect = lambda call=(act, device, *rest), at=after_s: its.loop.call_at(1000.0 + at, *call)  # type: ignore
    runner.connect_all()
    assert (its.clock.now, its.record.began_at, its.record.things) == (1003.0, 1003.0, 3)
    assert (its.record.connected, its.record.failed) == ({"thing_0", "thing_2"}, {"thing_1"})
    assert [*its.record.failures.things] == ["thing_1"]
    its.loop.run(2.5)
    assert len(its.record.snapshots) == 3  # at 1003, 1004 and 1005


def test_a_thing_that_may_take_minutes_is_awaited_only_while_no_other_is_there(bench: Callable[..., Bench]) -> None:
    its = bench(things=2)
    runner: Any = its.runner
    refusal = Refusal("thing_0", "broker", "iot:Connect", "thing_0-*")
    its.devices[0].on_connect = lambda: its.loop.call_at(1001.0, runner.on_refused, its.devices[0], refusal)  # type: ignore
    its.devices[1].on_connect = lambda: its.loop.call_at(1050.0, runner.on_connected, its.devices[1])  # type: ignore
    runner.connect_all()
    assert its.record.began_at == 1050.0
    assert its.diagnosed == ["thing_0"]


@pytest.mark.parametrize("what", ["connected", "failed", "refused"])
def test_whatever_becomes_of_a_thing_ends_the_wait_for_it(bench: Callable[..., Bench], what: str) -> None:
    its = bench(things=1)
    runner: Any = its.runner
    device = its.devices[0]
    rest = {
        "failed": (ElfError("Name", "it is broken", "mend it"),),
        "refused": (Refusal("thing_0", "b", "iot:Connect", "x"),),
    }
    getattr(runner, f"on_{what}")(device, *rest.get(what, ()))
    runner._diagnosing.shutdown()
    assert len([*its.events.drain()]) == (2 if what == "refused" else 1)  # it is refused, and AWS has answered


def test_what_aws_is_being_asked_about_is_known(bench: Callable[..., Bench]) -> None:
    answers = threading.Event()

    def diagnose(thing: str, refusal: Refusal) -> ElfError:
        answers.wait(10.0)
        return refusal

    its = bench(things=1, diagnose=diagnose)
    with logged() as lines:
        its.runner.on_refused(its.devices[0], Refusal("thing_0", "broker", "iot:Connect", "x"))
        its.runner.await_diagnoses()
        assert its.clock.now == 1040.0
        answers.set()
        its.runner._diagnosing.shutdown()
    its.runner.await_diagnoses()
    assert its.clock.now == 1040.0
    words = "thing_0: the broker refuses iot:Connect, and AWS gives no reason; trying again for up to 8 minutes"
    assert lines == [f"WARNING {words}"]


def test_what_happens_to_a_thing_is_said(bench: Callable[..., Bench]) -> None:
    its = bench(things=1)
    its.devices[0].topic_filters = ("a", "b")
    with logged() as lines:
        its.runner.on_connected(its.devices[0])
        its.runner.on_connection_resumed(its.devices[0], 2.25)
        assert its.record.connects == 2
        its.runner.on_invalid_message(its.devices[0], 3, ElfError("Name", "it is odd", "mend it"))
    assert lines == [
        "INFO ELF thing_0 subscribed to topic: a",
        "INFO ELF thing_0 subscribed to topic: b",
        "WARNING thing_0 reconnected to broker after 2.2 s",
        "ERROR message 3 of thing_0 is not sent: it is odd",
    ]


def test_things_begin_to_connect_in_their_order(bench: Callable[..., Bench]) -> None:
    its = bench(things=3)
    begun: list[str] = []
    for device in its.devices:

        def connect(device: Any = device) -> None:
            begun.append(device.thing)
            its.runner.on_connected(device)

        device.on_connect = connect  # type: ignore[method-assign]
    its.runner.connect_all()
    assert begun == ["thing_0", "thing_1", "thing_2"]


def test_the_end_does_not_wait_for_what_aws_is_asked_and_asks_no_more(bench: Callable[..., Bench]) -> None:
    asked, answers = threading.Semaphore(0), threading.Event()

    def diagnose(thing: str, refusal: Refusal) -> ElfError:
        asked.release()
        answers.wait(10.0)
        return refusal

    its = bench(things=9, diagnose=diagnose)
    for device in its.devices:
        its.runner.on_refused(device, Refusal(device.thing, "broker", "iot:Connect", "x"))
    for _ in range(4):  # at a time
        assert asked.acquire(timeout=10.0)
    began = time.monotonic()
    its.runner.stop()
    assert time.monotonic() < began + 5.0
    answers.set()
    its.runner._diagnosing.shutdown()
    assert not asked.acquire(blocking=False)


def test_a_run_without_any_connection_fails(bench: Callable[..., Bench]) -> None:
    its = bench(things=1)
    error = ElfError("Name", "it is broken", "mend it")
    its.devices[0].on_connect = lambda: its.runner.on_failed(its.devices[0], error)  # type: ignore[method-assign]
    with pytest.raises(ElfError) as raised:
        its.runner.connect_all()
    assert (raised.value, its.record.began_at) == (error, 0.0)


@pytest.mark.parametrize("has_reason", [True, False])
def test_a_refused_thing_ends_if_aws_has_a_reason(bench: Callable[..., Bench], has_reason: bool) -> None:
    reason = ElfError("Name", "the policy forbids it", "change it")
    its = bench(things=1, diagnose=lambda thing, refusal: reason if has_reason else refusal)
    its.runner.on_refused(its.devices[0], Refusal("thing_0", "broker", "iot:Connect", "thing_0-*"))
    until = time.monotonic() + 10.0
    while its.runner._under_diagnosis and time.monotonic() < until:
        time.sleep(0.001)
    its.loop.run()
    assert (its.devices[0].ended, len(its.devices[0].explained)) == (([reason], 0) if has_reason else ([], 1))
    assert not its.runner._under_diagnosis


# The end


@pytest.mark.parametrize(
    ("is_hurried", "acknowledged_after_s", "took_s"),
    [(False, 1.0, 0.0), (True, 1.0, 1.0), (True, None, 2.0)],
)
def test_after_ctrl_c_what_was_sent_may_be_acknowledged_for_two_seconds(
    bench: Callable[..., Bench], is_hurried: bool, acknowledged_after_s: float | None, took_s: float
) -> None:
    its = bench(things=2)
    its.devices[0].have_in_flight(1, 990.0, b"payload")
    its.devices[1].offline_s = 3.5
    if is_hurried:
        its.events.signum = 2
    if acknowledged_after_s is not None:
        its.loop.call_at(its.clock.now + acknowledged_after_s, its.devices[0].outbox.finish, 1, 1001.0)
    ended: list[float] = []
    usual = its.loop.close
    its.loop.close = lambda: (ended.append(its.clock.now), usual())  # type: ignore
    its.runner.stop()
    assert ended == [pytest.approx(1000.0 + took_s, abs=0.011)]
    assert its.record.ended_at == 1000.0
    assert [device.ended for device in its.devices] == [[None], [None]]
    assert its.record.offline_s == {"thing_1": 3.5}
    is_unacknowledged = not (is_hurried and acknowledged_after_s)
    assert its.record.unacknowledged == ([("thing_0", "elf/thing_0", 1, b"payload")] if is_unacknowledged else [])
    assert its.record.in_flight == len(its.record.unacknowledged)
    its.runner.stop()
    assert len(ended) == 1
    assert its.loop.joins_s == [4.0 if is_hurried else 10.0]


def test_what_a_second_ctrl_c_leaves_is_counted(bench: Callable[..., Bench]) -> None:
    its = bench(things=2)
    its.devices[1].have_in_flight(3, 990.0)
    its.record.rounds = 2
    its.record.count("sent", "thing_1")

    def join(patience_s: float) -> None:
        raise KeyboardInterrupt

    its.loop.join = join  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        its.runner.stop()
    assert (its.record.lost, its.record.totals["not_sent"]) == (1, 3)


def test_what_was_not_acknowledged_is_listed_by_thing_and_in_order(bench: Callable[..., Bench]) -> None:
    its = bench(things=2)
    for device, number in ((1, 1), (0, 2), (0, 1)):
        its.devices[device].have_in_flight(number, 990.0)
    its.runner.stop()
    assert [(thing, number) for thing, _, number, _ in its.record.unacknowledged] == [
        *(("thing_0", 2), ("thing_0", 1), ("thing_1", 1))
    ]


def test_a_thing_that_is_refused_at_the_end_has_failed_for_that(bench: Callable[..., Bench]) -> None:
    its = bench(things=1)
    its.devices[0].unresolved = refusal = Refusal("thing_0", "broker", "iot:Publish", "elf/thing_0")
    its.runner.stop()
    assert its.devices[0].ended == [refusal]


def test_what_happened_just_before_the_end_counts(bench: Callable[..., Bench]) -> None:
    losses: list[int] = []
    its = bench(on_loss=lambda: losses.append(1))
    its.events.put(StateChanged(is_loss=True))
    its.runner.stop()
    assert losses == [1]


def test_what_is_so_at_a_moment_is_in_the_record(bench: Callable[..., Bench]) -> None:
    its = bench(things=3)
    assert its.runner.observe().in_flight_since == math.inf
    its.devices[1].is_online = False
    for device, number, at in ((0, 1, 995.0), (0, 2, 990.0), (2, 1, 999.0)):
        its.devices[device].have_in_flight(number, at)
    record = its.runner.observe()
    assert (record.online, record.in_flight, record.in_flight_since) == (2, 3, 990.0)


A_LOSS, A_REFUSAL, NO_ACKNOWLEDGEMENT = (
    (ConnectionResetError(), False),
    (ConnectionResetError(), True),
    (TimeoutError(), False),
)


@pytest.mark.parametrize(
    ("losses", "others_stay", "said"),
    [
        ([(0, 0.0, A_REFUSAL), (0, 1.0, NO_ACKNOWLEDGEMENT)], True, []),
        ([(0, 0.0, A_LOSS), (1, 0.1, A_LOSS), (0, 5.0, A_LOSS), (1, 5.1, A_LOSS)], True, ["the network"]),  # a restart
        ([(0, 0.0, A_LOSS), (0, 1.0, A_LOSS)], True, ["the network"]),
        ([(0, 0.0, A_LOSS), (0, 1.0, A_LOSS), (0, 2.0, A_LOSS), (0, 3.0, A_LOSS)], True, ["the network", "thing_0"]),
        ([(0, 0.0, A_LOSS), (0, 1.0, A_LOSS), (0, 2.0, A_LOSS)], False, ["the network"]),
        ([(0, 0.0, A_LOSS), (0, 50.0, A_LOSS), (0, 100.0, A_LOSS)], True, ["the network"]),  # not again and again
    ],
)
def test_another_client_is_suspected_if_one_thing_is_thrown_out_again_and_again_and_others_stay(
    bench: Callable[..., Bench], losses: list[Any], others_stay: bool, said: list[str]
) -> None:
    its = bench(things=2)
    with logged() as lines:
        for thing, at, (error, rejected) in losses:
            its.clock.now = 1000.0 + at
            for device in its.devices:
                device.is_online = others_stay and device is not its.devices[thing]
            its.runner.on_connection_interrupted(its.devices[thing], error, rejected)
    advice = [line for line in lines if line.startswith("WARNING what to do: ")]
    assert len(advice) == len(said)
    assert all(what in line for what, line in zip(said, advice, strict=True))
    assert [event.is_loss for event in its.events.drain()] == [True] * len(losses)


def test_why_a_thing_is_not_connected_yet_is_said_once_and_shown(bench: Callable[..., Bench]) -> None:
    its = bench(things=2)
    with logged() as lines:
        for reason in ("it resets the connection", "it does not answer"):
            its.runner.on_connect_delayed(its.devices[0], reason)
    assert lines == [
        "WARNING thing_0 can't connect to broker yet: it resets the connection; trying again for up to 60 s"
    ]
    assert its.record.delayed == {"thing_0": "it does not answer"}
    its.runner.on_connected(its.devices[0])
    assert its.record.delayed == {}


def test_a_refusal_after_a_hurried_end_is_no_ones_business(bench: Callable[..., Bench]) -> None:
    its = bench(things=1)
    its.runner.stop()
    its.runner.on_refused(its.devices[0], Refusal("thing_0", "broker", "iot:Publish", "a"))
    assert (its.diagnosed, its.runner._under_diagnosis) == ([], set())


# What is sent


def sent(its: Bench, number: int = 1, late_s: float = 0.0, payload: bytes = b"") -> None:
    its.runner.on_publish(its.devices[0], number, "t", payload, late_s)


def lost(its: Bench, number: int = 1) -> None:
    its.runner.on_dropped(its.devices[0], number, "t", b"{}")


def test_what_is_sent_acknowledged_and_sent_again_is_counted(bench: Callable[..., Bench], clock: Clock) -> None:
    its = bench()
    sent(its)
    lost(its, 2)
    clock.now += 3.0
    its.runner.on_puback(its.devices[0], 1, 0.25, 0.5)
    its.runner.on_retransmit(its.devices[0], 1)
    its.runner.on_not_sent(its.devices[0], 5)
    its.runner.on_invalid_message(its.devices[0], 3, ValueError("odd"))
    assert its.record.totals == {
        "sent": 1,
        "dropped": 1,
        "acknowledged": 1,
        "retransmitted": 1,
        "not_sent": 6,
        "invalid": 1,
    }
    assert its.record.by_thing["thing_0"] == its.record.totals
    assert (its.record.latency.in_ms()["max"], its.record.latency_from_due.in_ms()["max"]) == (250.0, 500.0)
    assert its.record.acknowledged_at == 1003.0
    assert its.observer.seen == ["published 1", "lost 2", "acknowledged 1 after 0.25"]


def test_what_was_lost_is_named_but_not_all_of_very_many(bench: Callable[..., Bench]) -> None:
    its = bench()
    for number in range(1, 31):
        lost(its, number)
    assert its.record.dropped == [("thing_0", number) for number in range(1, 21)]
    assert its.record.totals["dropped"] == 30


@pytest.mark.parametrize(("rounds", "not_sent"), [(None, 0), (5, 10)])
def test_what_was_due_and_did_not_happen_was_not_sent(
    bench: Callable[..., Bench], rounds: int | None, not_sent: int
) -> None:
    """Also of a thing that never connected, and of one that got no policy."""
    its = bench(things=2)
    its.record.connected |= {"thing_0"}
    its.record.failed |= {"thing_1", "thing_2"}
    its.record.rounds = rounds
    its.record.count("sent", "thing_0", 4)
    its.record.count("dropped", "thing_0")
    for _ in range(2):
        its.runner.stop()
    assert its.record.totals["not_sent"] == not_sent


def test_all_is_counted_if_a_loss_ends_the_run_as_it_is_stopped(bench: Callable[..., Bench]) -> None:
    def on_loss() -> None:
        raise ElfError("LocalStopped", "it stopped", "start it")

    its = bench(things=1, on_loss=on_loss)
    its.record.rounds = 5
    sent(its)
    its.devices[0].have_in_flight(1, at=1000.0)
    its.events.put(StateChanged(is_loss=True))
    with pytest.raises(ElfError, match="it stopped"):
        its.runner.stop()
    assert (its.record.lost, its.record.totals["not_sent"]) == (1, 4)


def test_nothing_comes_back_to_a_thing_that_failed(bench: Callable[..., Bench]) -> None:
    its = bench(VerifyRunner, qos=1, interval_s=1.0)
    its.devices[0].topic_filters = ("elf/thing_0",)
    sent(its, 1)
    assert its.runner.backlog == 1
    its.record.failed.add("thing_0")
    assert its.runner.backlog == 0


def test_the_longest_delay_is_kept_for_each_reason(bench: Callable[..., Bench]) -> None:
    its = bench()
    for blocked_by, late_s in (
        ("", 0.5),
        ("", 0.25),
        (outbox.OFFLINE, 3.0),
        (outbox.OFFLINE, 2.0),
        (outbox.OFFLINE, 4.0),
    ):
        its.devices[0].blocked_by = blocked_by
        sent(its, late_s=late_s)
    assert its.record.late_s == {"": 0.5, outbox.OFFLINE: 4.0}


@pytest.mark.parametrize(
    ("interval_s", "late_s", "blocked_by", "words"),
    [
        (0.5, [1.0], "", []),
        (0.5, [1.25, 1.5], "", ["asked for 6 messages/s, this machine manages 4"]),
        (0, [1.25], "", ["asked for more messages/s, this machine manages 4"]),
        (0.5, [5.0], outbox.OFFLINE, []),
    ],
)
def test_a_machine_that_is_too_slow_is_named_once(
    bench: Callable[..., Bench],
    interval_s: float,
    late_s: list[float],
    blocked_by: str,
    words: list[str],
) -> None:
    its = bench(interval_s=interval_s)
    its.record.connected |= {"thing_0", "thing_1", "thing_2"}
    its.record.began_at = its.clock.now - 10.0
    its.record.totals["sent"] = 39
    its.devices[0].blocked_by = blocked_by
    with logged() as lines:
        for each in late_s:
            sent(its, late_s=each)
    assert lines == [f"WARNING {line}" for line in words]


def answer(its: Bench, token: str | None, verb: str = "accepted", payload: bytes | None = None) -> None:
    content = {} if token is None else {"clientToken": token}
    message = SimpleNamespace(topic=f"a/{verb}", payload=payload or json.dumps(content).encode())
    its.runner.on_message(its.devices[0], message)


def test_an_answer_of_a_shadow_counts_for_who_asked_and_as_often(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.devices[0].topic_filters = ("a/accepted",)
    for token in ("x", "x", "y"):
        sent(its, payload=json.dumps({"clientToken": token}).encode())
    sent(its, payload=b"{}")
    lost(its)  # and so without an answer
    assert (its.record.totals["requests"], its.record.unanswered) == (4, 4)
    for token in ("x", "other", "y", "y", "x", "x"):
        answer(its, token)
    assert (its.record.totals["accepted"], its.record.unanswered) == (3, 1)
    answer(its, None, "rejected")
    answer(its, None, "rejected")
    assert (its.record.totals["rejected"], its.record.unanswered, its.record.rejection) == (1, 0, "None None")
    assert its.observer.seen[-1] == "rejected {}"


def test_a_thing_that_does_not_listen_to_its_shadow_asks_nothing(bench: Callable[..., Bench]) -> None:
    its = bench()
    sent(its, payload=b"{}")
    assert its.record.unanswered == 0


@pytest.mark.parametrize(("queued", "is_online", "has_room"), [(7, True, True), (8, True, False), (8, False, True)])
def test_lines_are_read_a_few_ahead_of_the_slowest_thing(
    bench: Callable[..., Bench], queued: int, is_online: bool, has_room: bool
) -> None:
    its = bench()
    for _ in range(queued):
        its.devices[1].outbox.add(None, 0.0)  # type: ignore[arg-type]
    its.devices[1].is_online = is_online
    assert its.runner.has_room() == has_room


def test_of_one_thing_fewer_lines_wait_while_it_is_online(bench: Callable[..., Bench], limits: Limits) -> None:
    limits(LINES_AHEAD=1, LINES_OFFLINE=2)
    its = bench()
    its.devices[0].outbox.add(None, 0.0)  # type: ignore[arg-type]
    assert [its.runner.has_room(thing) for thing in ("thing_0", "thing_1", "without_policy")] == [False, True, True]
    its.devices[0].is_online = False
    assert its.runner.has_room("thing_0")
    its.devices[0].outbox.add(None, 0.0)  # type: ignore[arg-type]
    assert not its.runner.has_room("thing_0")


def test_a_message_may_be_of_one_thing_which_may_have_no_policy(bench: Callable[..., Bench]) -> None:
    its = bench()
    for thing in ("thing_1", "without_policy"):
        its.runner.publish_on_schedule(None, its.clock.now + 2.0, 1.0, thing=thing)
    assert [len(device.published) for device in its.devices] == [0, 1]
    assert its.record.by_thing["without_policy"]["not_sent"] == 1


def test_the_backlog_is_that_of_all_things(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.devices[0].backlog, its.devices[1].backlog = 3, 4
    assert its.runner.backlog == 7


# What is received


def receive(its: Bench, content: dict[str, Any] | bytes, retain: bool = False) -> bool:
    payload = content if isinstance(content, bytes) else json.dumps(content).encode()
    return its.runner.on_message(its.devices[0], SimpleNamespace(payload=payload, retain=retain, topic="a"))


def test_subscribe_counts_up_to_the_number_that_was_asked_for(bench: Callable[..., Bench]) -> None:
    its = bench(SubscribeRunner, count=2, checks_sequence=False)
    found = []
    for text in (b"a", b"b", b"c"):
        receive(its, text)
        found.append((its.record.totals["received"], its.runner.has_enough, len([*its.events.drain()])))
    assert found == [(1, False, 0), (2, True, 1), (2, True, 1)]
    assert its.observer.seen == ["received a", "received b"]


def test_subscribe_without_a_number_never_has_enough(bench: Callable[..., Bench]) -> None:
    its = bench(SubscribeRunner, count=None, checks_sequence=False)
    for _ in range(1000):
        receive(its, b"")
    assert (its.record.totals["received"], its.runner.has_enough) == (1000, False)


@pytest.mark.parametrize(("after_s", "received"), [(0.0, 1), (0.1, 0)])
def test_what_comes_after_the_end_is_not_counted(bench: Callable[..., Bench], after_s: float, received: int) -> None:
    its = bench(SubscribeRunner, count=None, checks_sequence=False)
    its.record.ends_at = its.clock.now
    its.clock.now += after_s
    receive(its, b"a")
    assert its.record.totals["received"] == received


@pytest.mark.parametrize(("checks", "missing"), [(True, 2), (False, 0)])
def test_missing_numbers_are_counted_where_that_makes_sense(
    bench: Callable[..., Bench], checks: bool, missing: int
) -> None:
    its = bench(SubscribeRunner, count=2, checks_sequence=checks)
    assert its.record.checks_sequence == checks
    receive(its, {"thing": "x", "seq": 9}, retain=True)  # from long ago
    its.record.totals.clear()
    for number in (1, 5, 3):  # the last after the end
        receive(its, {"thing": "x", "seq": number})
    assert its.record.sequence.counts["missing"] == missing


@pytest.mark.parametrize(
    ("keeps_sessions", "count", "taken", "received"),
    [
        (True, None, [None, None, True, True, False], 4),  # after the time's end, as long as numbers are missing
        (True, 2, [None, None, True, True, False], 4),
        (False, 2, [None, None, True, True, True], 2),
    ],
)
def test_at_the_end_a_session_takes_all_until_nothing_is_missing_and_leaves_the_rest(
    bench: Callable[..., Bench], keeps_sessions: bool, count: int | None, taken: list[bool | None], received: int
) -> None:
    its = bench(SubscribeRunner, count=count, checks_sequence=True, keeps_sessions=keeps_sessions)
    found = [receive(its, {"thing": "x", "seq": number}) and None for number in (1, 3)]
    its.record.ends_at, its.clock.now = its.clock.now, its.clock.now + 1.0
    found += [receive(its, {"thing": "x", "seq": number}) for number in (4, 2, 5)]
    assert (found, its.record.totals["received"]) == (taken, received)
    assert its.record.sequence.counts == {"missing": 0, "repeated": 0, "outOfOrder": 1}


def test_what_waited_in_a_session_has_no_latency(bench: Callable[..., Bench], clock: Clock) -> None:
    its = bench(SubscribeRunner, count=None, checks_sequence=False, keeps_sessions=True)
    clock.time = lambda: 1_700_000_000.0  # type: ignore[method-assign]
    its.devices[0].accepted_at = 1_700_000_000.0 - 10.0
    for age_s in (3600.0, 10.5, 0.5):
        receive(its, {"ts": 1_700_000_000.0 - age_s})
    assert (its.record.totals["waited"], its.record.latency.in_ms()["max"]) == (2, 500.0)


def test_whether_a_broker_had_a_session_is_recorded_and_said_where_it_is_gone(bench: Callable[..., Bench]) -> None:
    its = bench(SubscribeRunner, count=None, checks_sequence=False, keeps_sessions=True)
    its.devices[0].session_present = True
    with logged() as lines:
        for device in its.devices:
            its.runner.on_connected(device)
            its.runner.on_connection_resumed(device, 1.0)
    assert (its.record.session_present, its.record.session_lost) == ({"thing_0"}, {"thing_1"})
    assert lines[-1] == "WARNING thing_1: its session is gone, and what waited in it"


def test_latencies_are_those_of_messages_with_a_time(bench: Callable[..., Bench], clock: Clock) -> None:
    its = bench(SubscribeRunner, count=None, checks_sequence=False)
    clock.time = lambda: 1_700_000_000.0  # type: ignore[method-assign]
    receive(its, {"ts": 1_700_000_000.0 - 0.5})
    receive(its, {"ts": 1_700_000_000.0 - 900.0}, retain=True)
    receive(its, {})
    receive(its, {"ts": 1_700_000_000.0 + 3600.0})
    assert (its.record.latency.in_ms()["max"], its.record.clock_ahead_s) == (500.0, 3600.0)


def test_a_message_without_a_payload_is_a_message(bench: Callable[..., Bench]) -> None:
    its = bench(SubscribeRunner, count=None, checks_sequence=True)
    its.runner.on_message(its.devices[0], SimpleNamespace(payload=None, retain=False, topic="a"))
    assert (its.record.totals["received"], its.observer.seen) == (1, ["received "])


def test_a_message_that_can_not_be_read_is_counted_and_named(bench: Callable[..., Bench]) -> None:
    its = bench(SubscribeRunner, count=None, checks_sequence=True)
    with logged() as lines:
        its.runner.on_unreadable_message(its.devices[0], ValueError("odd"))
    assert its.record.totals == {"unreadable": 1}
    assert lines == ["WARNING thing_0 could not read a message: odd"]


def test_ctrl_c_ends_a_wait(bench: Callable[..., Bench]) -> None:
    its = bench()
    its.events.signum = 2
    with pytest.raises(Interrupted):
        its.runner.wait(lambda: False)


# A reader of the output that is too slow


def test_while_the_loop_reads_nothing_the_wait_for_a_broker_does_not_count(bench: Any) -> None:
    its = bench()
    began = its.clock.now

    def pause() -> None:
        its.loop.paused_s += 4.0

    its.loop.call_at(began + 2.0, pause)
    its.loop.call_at(began + 12.0, pause)
    assert not its.runner.wait(lambda: False, began + 10.0, reading=True)
    assert its.clock.now - began == 18.0
    assert its.runner.wait(lambda: True, 0.0, reading=True)


@pytest.mark.parametrize(("client_id", "others"), [("thing_0", 1), ("", 0)])
def test_another_client_of_a_name_that_stays_is_told_once(
    bench: Callable[..., Bench], client_id: str, others: int
) -> None:
    its = bench()
    device = its.devices[0]
    device.options, device.client_id = DeviceOptions(1, client_id=client_id), "thing_0"
    with logged() as lines:
        for device.brief_connections in (1, 2, 3, 4):
            its.runner.on_connection_interrupted(device, ConnectionResetError(), rejected=device.brief_connections > 3)
    said = [line for line in lines if "another client seems to connect as thing_0, too" in line]
    assert len(said) == others


@pytest.mark.parametrize(
    ("paused_s_ago", "advice"), [(0.0, "the reader of the output"), (60.0, "if it does not reconnect, check")]
)
def test_a_connection_that_is_lost_while_nothing_reads_the_output_is_its_readers_doing(
    bench: Any, paused_s_ago: float, advice: str
) -> None:
    its = bench()
    its.loop.paused_s_ago = paused_s_ago
    with logged() as lines:
        its.runner.on_connection_interrupted(its.devices[0], OSError(), rejected=False)
    assert lines[-1].startswith(f"WARNING what to do: {advice}")
