"""What elf.py decides: what is its own, how long it waits, how many there are, and how it ends."""

from __future__ import annotations

import errno
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.program import constant

import elf
from elf import Cli
from iot_elf import defaults, messages
from iot_elf.console import EventWriter, OutputWriter
from iot_elf.errors import ElfError, UsageError
from iot_elf.events import EventQueue, Interrupted
from iot_elf.messages import Line
from iot_elf.metrics import RunRecord
from iot_elf.network import Endpoint
from iot_elf.places import Place
from iot_elf.state import CLEANING, CREATING, READY, Thing

from .stand_ins import Clock, logged

HERE = "arn:aws:iot:us-west-2:123456789012"
ARN, OTHER = f"{HERE}:cert/c0", f"{HERE}:cert/other"


# A thing's policy


def test_a_thing_may_connect_under_its_name_and_use_the_topics_of_its_account() -> None:
    assert elf.policy_document("thing_0", ARN) == {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": "iot:Connect",
                "Resource": [f"{HERE}:client/thing_0", f"{HERE}:client/thing_0-*"],
                "Condition": {
                    "ForAllValues:StringEquals": {"iot:ConnectAttributes": ["PersistentConnect", "LastWill"]}
                },
            },
            {
                "Effect": "Allow",
                "Action": ["iot:Publish", "iot:RetainPublish", "iot:Receive"],
                "Resource": f"{HERE}:topic/*",
            },
            {"Effect": "Allow", "Action": "iot:Subscribe", "Resource": f"{HERE}:topicfilter/*"},
        ],
    }


# How many, and how long


def cli(**options: Any) -> Cli:
    it = Cli()
    its = {"count": None, "duration": None, "interval": 1.0, "region": None, "profile": None, "endpoint_url": None}
    for name, value in {**its, "local": False, "proxy": None, **options}.items():
        setattr(it, name, value)
    return it


@pytest.mark.parametrize(
    ("count", "duration", "interval", "messages_each"),
    [
        (None, None, 1.0, 10),
        (7, None, 1.0, 7),
        (None, 3.0, 1.0, 3),
        (None, 3.1, 1.0, 4),
        (None, 0.14, 0.02, 7),  # 7.000000000000001 in floating point
        (None, 0.3, 0.1, 3),
        (None, 0.01, 1.0, 1),
        (None, 1e-9, 1.0, 1),
        (None, None, 31622400.0, 1),
        (None, 5.0, 0.0, 5),  # without an interval: the usual one
        (None, 0, 1.0, None),
    ],
)
def test_as_many_messages_are_sent_as_fit_in_the_time(
    count: int | None, duration: float | None, interval: float, messages_each: int | None
) -> None:
    assert elf.messages_per_thing(cli(count=count, duration=duration, interval=interval)) == messages_each


class Backlog:
    """The things of a send that has ended, whose acknowledgements arrive at some times after it."""

    awaited = "acknowledgement"

    def __init__(self, clock: Clock, *arrivals: float) -> None:
        self._clock, self._arrivals, self._ended = clock, list(arrivals), clock.now
        self.record = SimpleNamespace(acknowledged_at=0.0, outage_until=0.0)

    @property
    def backlog(self) -> int:
        return len(self._arrivals)

    def wait(self, is_over: Callable[[], object], deadline: float, look_s: float, *, reading: bool) -> bool:
        assert (look_s, reading) == (defaults.MIN_INTERVAL_S, True)
        while self._arrivals and self._ended + self._arrivals[0] < deadline:
            self._clock.now = self.record.acknowledged_at = self._ended + self._arrivals.pop(0)
            if is_over():
                return True
        if not is_over():
            self._clock.now = max(self._clock.now, deadline)
        return bool(is_over())


@pytest.mark.parametrize(
    ("arrivals", "waited_s", "left", "is_said"),
    [
        ((), 0.0, 0, False),
        ((1.0,), 1.0, 0, False),
        ((3.0,), 3.0, 0, True),
        ((74.0,), 74.0, 0, True),
        ((76.0,), 75.0, 1, True),  # an outage of more than a minute
        ((70.0, 84.0), 84.0, 0, True),  # they still arrive
        ((70.0, 86.0), 85.0, 1, True),
        ((70.0, 84.0, 98.0, 112.0), 112.0, 0, True),
        ((70.0, 84.0, 98.0, 114.0), 113.0, 1, True),
        ((10.0, 74.0), 74.0, 0, True),
    ],
)
def test_send_waits_for_acknowledgements_and_longer_while_they_arrive(
    monkeypatch: pytest.MonkeyPatch, arrivals: tuple[float, ...], waited_s: float, left: int, is_said: bool
) -> None:
    assert [constant(name) for name in ("ACK_GRACE_S", "ACK_PAUSE_S")] == [75.0, 15.0]
    clock = Clock(monkeypatch, elf)
    runner: Any = Backlog(clock, *arrivals)
    with logged() as lines:
        elf.await_acknowledgements(runner)
    assert (clock.now - 1000.0, runner.backlog) == (waited_s, left)
    acknowledgements = f"{len(arrivals)} acknowledgement{'s' if len(arrivals) > 1 else ''}"
    assert lines == [f"INFO [send_messages] waiting for {acknowledgements}, up to 73 s"] * is_said


@pytest.mark.parametrize(
    ("options", "needs_it"),
    [
        ({}, False),
        ({"client_id": "{thing_name}-x"}, False),
        ({"client_id": "{thing_name}"}, True),
        ({"client_id": "{thing_name}-x", "session": True}, True),
    ],
)
def test_the_policy_of_an_earlier_elf_is_not_enough_for_a_session_or_the_name_alone(
    options: dict[str, Any], needs_it: bool
) -> None:
    assert cli(**options).needs_current_policy == needs_it


def test_at_the_end_time_counts_from_when_an_outage_of_the_runs_own_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, elf)
    sending, receiving = Backlog(clock, 150.0), Missing(clock, (130.0,), 0, has_failed=False)
    sending.record.outage_until = receiving.record.outage_until = clock.now + 100.0
    elf.await_missing(receiving, has_session=True)  # type: ignore[arg-type]
    elf.await_acknowledgements(sending)  # type: ignore[arg-type]
    assert (sending.backlog, receiving.counts["missing"]) == (0, 0)


class Missing:
    """The things of a subscribe that has ended, at which missing messages arrive at some times after it; one never."""

    def __init__(self, clock: Clock, arrivals: Sequence[float], never: int, has_failed: bool) -> None:
        self._clock, self._arrivals, self._ended, self.has_failed = clock, list(arrivals), clock.now, has_failed
        self.counts = {"missing": len(arrivals) + never}
        self.record = SimpleNamespace(sequence=self, outage_until=0.0)

    def wait(self, is_over: Callable[[], object], deadline: float, *, reading: bool) -> bool:
        assert reading
        while not is_over() and self._arrivals and self._ended + self._arrivals[0] < deadline:
            self._clock.now = self._ended + self._arrivals.pop(0)
            self.counts["missing"] -= 1
        if not (is_over() or self.has_failed):
            self._clock.now = max(self._clock.now, deadline)
        return bool(is_over()) or self.has_failed


@pytest.mark.parametrize(
    ("arrivals", "never", "has_failed", "waited_s", "waited_in_a_session_s"),
    [
        ((), 0, False, 0.0, 0.0),
        ((), 1, False, 2.0, 37.0),
        ((1.9,), 0, False, 1.9, 1.9),
        ((1.9,), 1, False, 2.0, 37.0),
        ((3.0,), 0, False, 2.0, 3.0),
        ((30.0, 60.0, 90.0), 0, False, 2.0, 90.0),  # they still arrive
        ((30.0, 60.0, 90.0), 1, False, 2.0, 125.0),
        ((30.0, 60.0, 96.0), 0, False, 2.0, 95.0),
        ((), 1, True, 0.0, 0.0),  # nothing is connected any more
    ],
)
def test_subscribe_waits_for_missing_messages_and_in_a_session_longer_while_they_arrive(
    monkeypatch: pytest.MonkeyPatch,
    arrivals: Sequence[float],
    never: int,
    has_failed: bool,
    waited_s: float,
    waited_in_a_session_s: float,
) -> None:
    assert [constant(name) for name in ("LATE_ARRIVALS_S", "REDELIVERY_S")] == [2.0, 35.0]
    clock = Clock(monkeypatch, elf)
    for has_session, expected_s in ((False, waited_s), (True, waited_in_a_session_s)):
        began, runner = clock.now, Missing(clock, arrivals, never, has_failed)
        with logged() as lines:
            elf.await_missing(runner, has_session)  # type: ignore[arg-type]
        assert clock.now - began == pytest.approx(expected_s)
        assert len(lines) == (has_session and expected_s > 2.0)


class Lines:
    """A runner that gets lines at times, and publishes; `late_s` after each it has room for the next."""

    def __init__(self, clock: Clock, lines: Iterator[Line], late_s: float = 0.0) -> None:
        self.clock, self.lines, self.late_s, self.published = clock, lines, late_s, list[tuple[float, float]]()
        self.devices, self.record = {"thing_0": None, "thing_1": None}, SimpleNamespace(rounds=0)

    def has_room(self, thing: str) -> bool:
        return True

    def next_line(self, deadline: float) -> Line | None:
        if (line := next(self.lines, None)) is None:
            return Line(None)
        self.clock.now = max(self.clock.now, line.at)
        return line if self.clock.now < deadline else None

    def publish_on_schedule(self, message: object, due: float, interval_s: float, thing: str) -> None:
        self.published.append((round(due - 1000.0, 6), interval_s))

    def wait(self, is_over: Callable[[], object], deadline: float, look_s: float) -> None:
        assert is_over()
        self.clock.now += self.late_s


def line(number: int, at: float = 0.0, error: Exception | None = None) -> Line:
    return Line(None if error else messages.PayloadBuilder(b"x"), error, number, at)


REFUSED = UsageError("Name", "it is not JSON", "mend it")
OTHER = UsageError("Name", "a", "b")


@pytest.mark.parametrize(
    ("options", "lines", "due", "counts"),
    [
        ({"interval": 1.0}, [line(1), line(2), line(3)], [0, 1, 2], (3, 0)),
        ({"interval": 1.0}, [line(1, 1000.0), line(2, 1005.0), line(3)], [0, 5, 6], (3, 0)),
        ({"interval": 0.0}, [line(1, 1000.5), line(2, 1005.0)], [0.5, 5], (2, 0)),
        ({"interval": 1.0, "count": 2}, [line(1), line(2), line(3)], [0, 1], (2, 0)),
        ({"interval": 1.0, "duration": 2.0}, [line(1), line(2), line(3)], [0, 1], (2, 0)),
        ({"interval": 1.0, "duration": 2.1}, [line(1), line(2), line(3)], [0, 1, 2], (3, 0)),
        ({"interval": 0.1, "duration": 0.3}, [line(n) for n in range(9)], [0, 0.1, 0.2], (3, 0)),
        ({"interval": 1.0}, [line(1), line(2, error=REFUSED), line(3)], [0, 1], (2, 1)),
        ({"interval": 1.0}, [], [], (0, 0)),
    ],
)
def test_lines_are_sent_an_interval_apart_or_as_they_arrive(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    lines: list[Line],
    due: list[float],
    counts: tuple[int, int],
) -> None:
    clock = Clock(monkeypatch, elf)
    monkeypatch.setattr(messages, "read_ahead", lambda *_: None)
    runner: Any = Lines(clock, iter(lines))
    with logged():
        refusal = elf.publish_lines(cli(events=EventQueue(), **options), runner, iter(()))
    assert (runner.record.rounds, int(refusal.cause[0]) if refusal else 0) == counts
    assert runner.published == [(at, options["interval"]) for at in due]


def test_a_line_that_is_refused_is_an_error_if_it_is_the_first_and_said_once_for_an_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, elf)
    monkeypatch.setattr(messages, "read_ahead", lambda *_: None)
    bad, again = line(2, error=REFUSED), line(3, error=REFUSED)
    with pytest.raises(UsageError, match="line 2 of the input"):
        elf.publish_lines(cli(events=EventQueue()), Lines(clock, iter([bad])), iter(()))  # type: ignore[arg-type]
    runner: Any = Lines(clock, iter([line(1), bad, again, line(4, error=OTHER)]))
    with logged() as said:
        refusal = elf.publish_lines(cli(events=EventQueue()), runner, iter(()))
    assert refusal and refusal.facts == {
        "name": "LinesRefused",
        "cause": "3 lines of the input could not be sent; the first, line 2: it is not JSON",
        "remedy": "mend it",
    }
    assert [text.partition(":")[0] for text in said] == ["ERROR line 2 is not sent", "ERROR line 4 is not sent"]
    with pytest.raises(OSError, match="gone"):
        elf.publish_lines(
            cli(events=EventQueue()),
            Lines(clock, iter([line(1), line(2, error=OSError("gone"))])),  # type: ignore[arg-type]
            iter(()),
        )


def test_a_line_counts_from_when_it_is_begun_also_if_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted(2)

    clock = Clock(monkeypatch, elf)
    monkeypatch.setattr(messages, "read_ahead", lambda *_: None)
    runner: Any = Lines(clock, iter([line(1), line(2)]))
    monkeypatch.setattr(runner, "publish_on_schedule", interrupt)
    with pytest.raises(Interrupted):
        elf.publish_lines(cli(events=EventQueue()), runner, iter(()))
    assert runner.record.rounds == 1


@pytest.mark.parametrize(
    ("counts", "failed", "name"),
    [
        ([{"not_sent": 2, "invalid": 2}, {"sent": 3}], set(), "TemplateFails"),
        ([{"not_sent": 2, "invalid": 2}, {"not_sent": 3}], {"thing_1"}, "TemplateFails"),  # whose cause is told
        ([{"not_sent": 2, "invalid": 2}, {"not_sent": 3}], set(), "MessagesLost"),
        ([{"not_sent": 2, "invalid": 1}, {"sent": 3}], set(), "MessagesLost"),
    ],
)
def test_messages_that_could_not_be_made_are_not_the_networks_fault(
    counts: list[dict[str, int]], failed: set[str], name: str
) -> None:
    record = RunRecord()
    record.invalid, record.failed = UsageError("TemplateFails", "it fails", "mend it"), failed
    for number, its in enumerate(counts):
        for what, count in its.items():
            record.count(what, f"thing_{number}", count)
    with pytest.raises(ElfError) as raised:
        elf.refuse_losses(record, None)
    assert raised.value.name == name


@pytest.mark.parametrize(("filters", "connects_per_s"), [(0, 400.0), (1, 400.0), (2, 225.0), (9, 50.0)])
def test_things_connect_no_faster_than_the_account_may_connect_and_subscribe(
    monkeypatch: pytest.MonkeyPatch, filters: int, connects_per_s: float
) -> None:
    assert [constant(name) for name in ("CONNECTS_PER_S", "SUBSCRIPTIONS_PER_S")] == [400.0, 450.0]
    rates = []
    monkeypatch.setattr(elf, "prepare_devices", lambda cli, things: ([], Endpoint("host"), {}))
    monkeypatch.setattr(elf, "EventLoop", lambda put, rate: rates.append(rate))
    runner: Any = SimpleNamespace(devices={}, record=SimpleNamespace(failed=set()))
    things = [Thing("a"), Thing("b")]
    it = cli(events=EventQueue(), output_writer=OutputWriter(EventQueue()))
    elf.make_devices(it, things, runner, Path("root"), {}, {"a": ["f"] * filters, "b": []})
    assert rates == [connects_per_s]
    assert runner.record.failed == {"a", "b"}


# Which things


def fleet_of(*stages: str) -> Any:
    things = {f"thing_{number}": Thing(f"thing_{number}", stage=stage) for number, stage in enumerate(stages)}
    return SimpleNamespace(things=things, ready=[it for it in things.values() if it.stage == READY])


@pytest.mark.parametrize(
    ("stages", "count", "missing"),
    [
        ([], 2, ["thing_0", "thing_1"]),
        ([READY], 2, ["thing_1"]),
        ([READY, READY], 2, []),
        ([CREATING, READY], 2, ["thing_0"]),
        ([CLEANING, READY], 2, ["thing_0"]),
        ([READY, READY, CLEANING], 2, []),
        ([READY, READY, READY], 2, None),
        ([READY, READY, CREATING], 2, None),
    ],
)
def test_create_makes_what_is_missing_and_refuses_to_have_fewer(
    stages: list[str], count: int, missing: list[str] | None
) -> None:
    names = [f"thing_{number}" for number in range(count)]
    if missing is not None:
        assert elf.missing_things(fleet_of(*stages), "thing", names) == missing
    else:
        with pytest.raises(ElfError, match="things beyond the 2 requested: thing_2") as raised:
            elf.missing_things(fleet_of(*stages), "thing", names)
        assert "elf.py clean thing_2`" in raised.value.remedy


def test_things_of_another_prefix_are_not_counted() -> None:
    assert elf.missing_things(fleet_of(READY, READY), "other", ["other_0"]) == ["other_0"]
    assert elf.missing_things(fleet_of(READY, READY), "thin.", ["thin._0"]) == ["thin._0"]


@pytest.mark.parametrize(
    ("stages", "wanted", "names", "remedy"),
    [
        ([READY, READY], None, ["thing_0", "thing_1"], None),
        ([READY, READY], [1], ["thing_0"], None),
        ([READY, READY], [2], ["thing_0", "thing_1"], None),
        ([READY, READY], [3], None, "create 3"),
        ([READY, READY], ["thing_1"], ["thing_1"], None),
        ([READY, READY], ["thing_2"], None, "thing_0, thing_1"),
        ([READY, CREATING], None, ["thing_0"], None),
        ([READY, CREATING], ["thing_*"], ["thing_0"], None),
        ([READY, CREATING], ["thing_1"], None, "its things: thing_0"),
        ([CLEANING, CREATING], None, None, "create 2"),
        ([], None, None, "elf.py create"),
    ],
)
def test_the_things_that_are_complete_are_used_or_those_of_them_that_are_wanted(
    stages: list[str], wanted: list[int | str] | None, names: list[str] | None, remedy: str | None
) -> None:
    with logged() as lines:
        if names is not None:
            assert [it.name for it in elf.ready_things(fleet_of(*stages), wanted)] == names
        else:
            with pytest.raises(ElfError) as raised:
                elf.ready_things(fleet_of(*stages), wanted)
            assert remedy in raised.value.remedy  # type: ignore[operator]
    assert len(lines) == (CREATING in stages) + (CLEANING in stages)


@pytest.mark.parametrize(
    ("names", "commands"),
    [
        (["thing_2"], "`elf.py create 4`"),
        (["lamp_0"], "`elf.py create 11 --prefix lamp`"),
        (["lamp_0", "thing_3"], "`elf.py create 11 --prefix lamp` and `elf.py create 4`"),
    ],
)
def test_what_is_not_complete_is_finished_by_a_create_of_each_prefix(names: list[str], commands: str) -> None:
    fleet: Any = SimpleNamespace(things=dict.fromkeys(["lamp_0", "lamp_10", "lamp_9", "thing_2", "thing_3"]))
    assert elf.finish_creating(fleet, names) == commands
    assert elf.finish_cleaning(fleet, names) == f"`elf.py clean {' '.join(names)}`"
    assert elf.finish_cleaning(fleet, list(fleet.things)) == "`elf.py clean`"


# Where the fleet is


LOCAL = Place(region="us-west-2", local=True)
ON_AWS = Place(region="us-west-2", endpoint_url="https://iot/")


@pytest.mark.parametrize(
    ("recorded", "options", "place"),
    [
        (None, {}, Place()),
        (None, {"region": "r", "local": True}, Place("r", local=True)),
        (ON_AWS, {}, ON_AWS),
        (ON_AWS, {"region": "us-west-2", "endpoint_url": "https://iot"}, ON_AWS),
        (ON_AWS, {"profile": "p"}, ON_AWS),
        (ON_AWS._replace(profile="p"), {"profile": "p"}, ON_AWS._replace(profile="p")),
        (ON_AWS._replace(profile="p"), {"profile": "q"}, ON_AWS._replace(profile="p")),
        (ON_AWS, {"region": "r"}, "--region r"),
        (ON_AWS, {"region": "r", "endpoint_url": "https://other"}, "--region r --endpoint-url https://other"),
        (ON_AWS, {"local": True}, "--local"),
        (ON_AWS, {"proxy": "http://p"}, ON_AWS),
        (LOCAL, {"local": True}, LOCAL),
        (LOCAL, {"region": "us-west-2"}, LOCAL),
        (LOCAL, {"proxy": "http://p"}, "--proxy"),
        (LOCAL, {"profile": "p"}, "--profile p"),
        (LOCAL, {"endpoint_url": "https://iot"}, "--endpoint-url https://iot"),
    ],
)
def test_options_may_say_what_is_recorded_and_nothing_else(
    recorded: Place | None, options: dict[str, Any], place: Place | str
) -> None:
    if isinstance(place, Place):
        assert elf.find_place(cli(**options), recorded) == place
    else:
        with pytest.raises(ElfError) as raised:
            elf.find_place(cli(**options), recorded)
        assert raised.value.cause.partition(" does not match")[0] == place


# How it ends


class Stream:
    """Standard output on a disk that is full, from some write on."""

    def __init__(self, fails_at: float) -> None:
        self._writes, self._fails_at = itertools.count(1), fails_at
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        if next(self._writes) >= self._fails_at:
            raise OSError(errno.ENOSPC, "full")

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise ValueError("it has no descriptor")


@pytest.mark.parametrize(
    ("fails_at", "status", "ended"),
    [(math.inf, 0, 0), (math.inf, 1, 1), (2, 0, 1), (2, 1, 1), (2, 130, 130), (1, 0, 1), (1, 2, 2)],
)
def test_a_command_whose_last_output_is_lost_has_not_succeeded(
    monkeypatch: pytest.MonkeyPatch, fails_at: float, status: int, ended: int
) -> None:
    """The first write is an event, the second the summary, which nothing follows that could notice."""
    stream, events = Stream(fails_at), EventQueue()
    monkeypatch.setattr("sys.stdout", stream)
    writer = OutputWriter(events)
    it = cli(command="send", events=events, summary={"things": 2}, output_writer=writer)
    it.event_writer = EventWriter("json", writer)
    it.event_writer.put("created")
    writer.flush()
    with logged() as lines:
        assert elf.report_end(it, status) == ended
    summary = {"event": "summary", "command": "send", "exitStatus": status, "things": 2}
    written = [json.loads(text) for text in stream.text.splitlines()]
    assert written == [{"event": "created"}, *([summary] if fails_at > 1 else [])]
    is_said = fails_at < math.inf
    assert ["the disk is full" in text for text in lines[:1]] == [True] * is_said


def test_a_command_whose_reader_is_too_slow_after_ctrl_c_ends_as_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    events = EventQueue()
    writer = OutputWriter(events)
    it = cli(command="send", events=events, summary={}, output_writer=writer, event_writer=EventWriter(None, writer))
    events.interrupt(2, None)
    monkeypatch.setattr(writer, "flush", lambda: False)
    assert elf.report_end(it, 0) == 130
    assert elf.report_end(it, 1) == 1
