"""The record of a run: percentiles, rates, clocks that differ, what was not sent."""

from __future__ import annotations

import collections
import math
import random
import tracemalloc
from typing import Any

import pytest
from support.program import Limits

from iot_elf import metrics
from iot_elf.metrics import (
    Interval,
    LatencyHistogram,
    RunRecord,
    SparseHistogram,
    Timeline,
    about_clock,
    object_in,
    time_of_sending,
)

from .stand_ins import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, metrics)


# Latencies


def histogram(*took_ms: float) -> LatencyHistogram:
    its = LatencyHistogram()
    for each in took_ms:
        its.add(each / 1000)
    return its


@pytest.mark.parametrize(
    ("took_ms", "p50", "p95", "p99", "longest"),
    [
        ([7], 7, 7, 7, 7),
        ([1, 2], 1, 2, 2, 2),
        ([1, 2, 3], 2, 3, 3, 3),
        ([*range(1, 21)], 10, 19, 20, 20),
        ([*range(20, 0, -1)], 10, 19, 20, 20),
        ([*range(1, 101)], 50, 95, 99, 100),
        ([*range(1, 1001)], 500, 950, 990, 1000),
        ([1] * 94 + [2] * 5 + [3], 1, 2, 2, 3),
        ([1] * 95 + [2] * 5, 1, 1, 2, 2),
        ([0.04, 0.16, 12.34], 0.2, 12.3, 12.3, 12.3),  # in steps of 0.1 ms
        ([2.047, 2.048, 4.095, 4.096, 8.191], 4.1, 8.2, 8.2, 8.2),
        ([99.94, 100.04, 1234.56], 100.0, 1230.0, 1230.0, 1234.6),  # in steps of three digits, but for the longest
        ([-5.0, -1.0], 0.0, 0.0, 0.0, 0.0),
        ([3.6e6] * 9 + [7.2e6], 3.6e6, 7.2e6, 7.2e6, 7.2e6),
        ([1e11, 2e11], 8.79e9, 8.79e9, 8.79e9, 2e11),  # longer than a hundred days
    ],
)
def test_a_percentile_is_the_shortest_time_that_so_many_do_not_exceed(
    took_ms: list[float], p50: float, p95: float, p99: float, longest: float
) -> None:
    assert histogram(*took_ms).in_ms() == {"p50": p50, "p95": p95, "p99": p99, "max": longest}


def test_a_percentile_has_three_digits_whatever_the_times_are() -> None:
    chance = random.Random(9)
    took_ms = sorted(10 ** chance.uniform(-1, 8) for _ in range(20_000))
    shown = histogram(*took_ms).in_ms()
    for percent in (50, 95, 99):
        assert shown[f"p{percent}"] == pytest.approx(took_ms[200 * percent - 1], rel=0.0055)
    assert shown["max"] == pytest.approx(took_ms[-1])


def test_a_histogram_does_not_grow_with_what_is_in_it() -> None:
    its = LatencyHistogram()
    tracemalloc.start()
    try:
        for number in range(10_000):
            its.add(number**3 / 1e4)
        assert tracemalloc.get_traced_memory()[0] < 20_000
    finally:
        tracemalloc.stop()
    assert its.count == 10_000


def test_without_messages_there_are_no_percentiles() -> None:
    assert histogram().in_ms() == {}


def test_percentiles_are_shown_with_a_tenth_of_a_millisecond() -> None:
    assert str(histogram(1, 2, 30.25, 1000)) == "p50 2.0, p95 1000.0, p99 1000.0, max 1000.0 ms"


@pytest.mark.parametrize(
    ("took_ms", "recent_ms"),
    [
        ([], 0),
        ([5], 5),
        ([9, 5, 7], 7),
        ([1] * 100 + [2] * 49, 1),
        ([1] * 100 + [2] * 50, 2),
        ([9] * 1000 + [*range(100)], 50),
    ],
)
def test_the_live_line_has_the_median_of_the_last_hundred_latencies(took_ms: list[float], recent_ms: float) -> None:
    assert histogram(*took_ms).recent_ms == recent_ms


# What a message says


@pytest.mark.parametrize(
    ("payload", "content"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b"[1]", {}),
        (b"{", {}),
        (b"\xff", {}),
        (b"", {}),
        (b'{"a": ' * 100_000, {}),
    ],
)
def test_what_is_no_json_object_has_no_members(payload: bytes, content: dict[str, Any]) -> None:
    assert object_in(payload) == content


ODD_TIMES: list[Any] = [-1700000000, "now", "nan", "inf", None, True, [1], {}]


@pytest.mark.parametrize(
    ("ts", "sent_at"),
    [
        ("1700000000.123", 1700000000.123),
        (1700000000, 1700000000.0),
        (1e9, None),  # it may count something else
        (1e9 + 1, 1e9 + 1),
        (1e11, None),  # milliseconds
        (1e11 - 1, 1e11 - 1),
        (10**400, None),
        *((odd, None) for odd in ODD_TIMES),
    ],
)
def test_a_message_was_sent_when_its_ts_says_if_that_is_a_time(ts: object, sent_at: float | None) -> None:
    assert time_of_sending({"ts": ts}) == sent_at


def test_a_message_without_ts_does_not_say_when_it_was_sent() -> None:
    assert time_of_sending({}) is None


# Totals


def test_a_run_begins_with_nothing_counted() -> None:
    record = RunRecord()
    assert (record.online, record.in_flight, record.things, record.qos, record.rounds) == (0, 0, 0, 0, None)
    assert (record.began_at, record.ended_at, record.acknowledged_at) == (0.0, 0.0, 0.0)
    assert (record.ends_at, record.in_flight_since) == (math.inf, math.inf)
    assert (record.late_s, record.lost, record.unanswered) == ({"": 0.0}, 0, 0)
    assert (record.latency.in_ms(), record.latency_from_due.in_ms(), record.failures.things) == ({}, {}, {})
    assert (record.checks_sequence, record.sequence.is_exact, {*record.sequence.counts.values()}) == (False, True, {0})
    assert (record.connects, record.offline_s, record.clock_ahead_s, record.without_latency) == (0, {}, 0.0, 0)
    assert (record.latest, record.rejection) == ((0.0, ""), "")


def test_what_a_thing_does_is_counted_for_it_and_for_all() -> None:
    record = RunRecord()
    for what, thing, more in (
        ("sent", "a", {}),
        ("sent", "b", {}),
        ("sent", "a", {}),
        ("not_sent", "b", {"number": 5}),
    ):
        record.count(what, thing, **more)
    assert record.totals == {"sent": 3, "not_sent": 5}
    assert record.by_thing == {"a": {"sent": 2}, "b": {"sent": 1, "not_sent": 5}}


def test_what_is_lost_was_dropped_or_never_acknowledged() -> None:
    record = RunRecord()
    record.totals = collections.Counter(dropped=3, sent=9)
    record.unacknowledged = [("thing_0", "elf/thing_0", 1, b"")] * 2
    assert record.lost == 5


def test_things_whose_messages_were_lost_or_not_sent_are_known() -> None:
    record = RunRecord()
    for what, thing in (("sent", "a"), ("dropped", "b"), ("not_sent", "c"), ("sent", "d"), ("not_sent", "e")):
        record.count(what, thing)
    record.count("invalid", "e")  # which is told
    record.unacknowledged = [("d", "elf/d", 1, b"")]
    assert record.losers == {"b", "c", "d"}


def test_what_a_shadow_neither_accepted_nor_rejected_is_not_answered() -> None:
    record = RunRecord()
    record.totals = collections.Counter(requests=9, accepted=4, rejected=2)
    assert record.unanswered == 3


def test_the_rate_is_that_of_the_last_three_seconds(clock: Clock) -> None:
    record = RunRecord()
    rates = [record.rate("sent")]
    for per_s in (10, 20, 30, 40, 50, 0):
        record.take_snapshot()
        record.count("sent", "thing_0", per_s)
        clock.now += 1.0
        rates.append(record.rate("sent"))
    assert rates == [None, 10, 15, 20, 30, 40, 30]
    assert record.rate("acknowledged") == 0


def test_the_first_second_has_no_rate(clock: Clock) -> None:
    record = RunRecord()
    record.take_snapshot()
    record.count("sent", "thing_0", 3)
    clock.now += 0.99
    assert record.rate("sent") is None
    clock.now += 0.01
    assert record.rate("sent") == pytest.approx(3.0)


@pytest.mark.parametrize(("took_s", "rate"), [(0.0, None), (0.99, None), (1.0, 5.0), (2.5, 2.0)])
def test_a_run_has_a_rate_if_it_took_a_second(took_s: float, rate: float | None) -> None:
    record = RunRecord()
    record.totals["sent"] = 5
    record.began_at, record.ended_at = 1000.0, 1000.0 + took_s
    assert (record.duration_s, record.mean_rate("sent")) == (pytest.approx(took_s), rate)


def test_what_was_sent_latest_has_its_cause() -> None:
    record = RunRecord()
    record.late_s = {"": 0.05, "there was no connection": 3.0, "other": 2.0}
    assert record.latest == (3.0, "there was no connection")


@pytest.mark.parametrize(("rounds", "not_sent"), [(None, {}), (5, {"a": 2, "b": 5})])
def test_what_was_due_and_not_sent_is_counted_for_each_thing_and_for_all(
    rounds: int | None, not_sent: dict[str, int]
) -> None:
    record = RunRecord()
    record.rounds = rounds
    record.count("sent", "a", 3)
    if rounds:
        record.count("not_sent", "b", 1)  # known already
    for _ in range(2):
        record.settle_not_sent(("a", "b"))
    assert {thing: its["not_sent"] for thing, its in record.by_thing.items() if its["not_sent"]} == not_sent
    assert record.totals["not_sent"] == sum(not_sent.values())


@pytest.mark.parametrize(
    ("ahead_s", "words"),
    [
        (3600.4, "the sender's clock is 3,600 s ahead"),
        (1.0, "the sender's clock is 1 s ahead"),
        (0.96, "the sender's clock is 1.0 s ahead"),
        (0.11, "the sender's clock is 0.1 s ahead"),
        (-1234.5, "ts is 1,234 s old, or the sender's clock behind"),
    ],
)
def test_how_far_a_clock_is_off_is_said_in_seconds(ahead_s: float, words: str) -> None:
    assert about_clock(ahead_s) == words


def test_of_clocks_that_differ_the_most_is_said_and_there_is_no_latency() -> None:
    record = RunRecord()
    for took_s in (0.02, -0.1, 600.0, -0.11, -3599.5, 600.1, -3600.0, -7.0):
        record.add_delivery("a", took_s)
    assert (record.clock_ahead_s, record.without_latency) == (3600.0, 5)
    assert (record.latency.in_ms()["p50"], record.latency.in_ms()["max"]) == (20.0, 600_000.0)
    record.add_delivery("a", 5000.0)
    assert (record.clock_ahead_s, record.without_latency) == (-5000.0, 6)


def test_a_record_keeps_the_totals_of_the_last_hour(clock: Clock, limits: Limits) -> None:
    record = RunRecord()
    for _ in range(3700):
        record.take_snapshot()
        record.count("sent", "thing_0")
        clock.now += 1.0
    assert record.snapshots[0] == (1100.0, {"sent": 100})
    assert (record.snapshots[-1], len(record.snapshots)) == ((4699.0, {"sent": 3699}), 3600)


def test_a_run_that_never_began_took_no_time(clock: Clock) -> None:
    record = RunRecord()
    record.ended_at = clock.now
    assert (record.duration_s, record.mean_rate("sent")) == (0.0, None)


# Over time


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_histograms_add_up_to_that_of_all_times(parts: int) -> None:
    """A p99 of two intervals is neither a mean nor a maximum of theirs: it is that of all their messages."""
    its = random.Random(1)
    took_s = [its.lognormvariate(-4, 1) for _ in range(999)]
    whole, pieces = SparseHistogram(), [SparseHistogram() for _ in range(parts)]
    for number, each in enumerate(took_s):
        whole.add(each)
        pieces[number % parts].add(each)
    for piece in pieces[1:]:
        pieces[0].update(piece)
    for percent in (50, 99):
        exact_ms = 1000 * sorted(took_s)[math.ceil(percent / 100 * len(took_s)) - 1]
        assert pieces[0].percentile_ms(percent) == whole.percentile_ms(percent) == pytest.approx(exact_ms, rel=0.01)
    assert SparseHistogram().percentile_ms(50) is None


@pytest.mark.parametrize(
    ("seconds", "lengths"),
    [
        (0, []),
        (0.3, [0.3]),
        (2, [1, 1]),
        (2.4, [1, 1.4]),
        (2.6, [1, 1, 0.6]),
        (4, [2, 2]),
        (5, [2, 2, 1]),
        (7, [2, 2, 2, 1]),
        (8, [4, 4]),
        (9, [4, 5]),
        (100, [32, 32, 36]),
    ],
)
def test_a_timeline_has_few_intervals_however_long_a_run_is(
    clock: Clock, limits: Limits, seconds: float, lengths: list[float]
) -> None:
    limits(MAX_INTERVALS=4)
    record = RunRecord()
    record.timeline = Timeline()
    ends_at = clock.now + seconds
    while True:
        record.take_snapshot()
        if clock.now >= ends_at:
            break
        record.count("acknowledged", "thing_0", 3)
        record.add_acknowledgement("thing_0", 0.001 * (clock.now - 999), 0.5)
        clock.now = min(clock.now + 1.0, ends_at)
    intervals = record.timeline.intervals()
    assert [each.lasted_s for each in intervals] == pytest.approx(lengths)
    assert sum(each.counts["acknowledged"] for each in intervals) == record.totals["acknowledged"]
    assert record.timeline.intervals() == intervals  # they stay


def test_what_happens_before_the_run_is_in_no_interval(clock: Clock) -> None:
    record = RunRecord()
    record.timeline = Timeline()
    record.count("received", "thing_0", 5)
    record.add_delivery("thing_0", 0.1)
    record.take_snapshot()
    record.count("received", "thing_0", 2)
    record.add_delivery("thing_0", 0.2)
    clock.now += 1
    record.take_snapshot()
    (interval,) = record.timeline.intervals()
    assert (interval.counts, interval.latency.percentile_ms(50)) == ({"received": 2}, pytest.approx(200, rel=0.01))
    assert record.timeline.longest_s == {"thing_0": 0.2}


def test_an_interval_has_when_things_were_offline_and_how_many_at_most(clock: Clock) -> None:
    record = RunRecord()
    record.timeline = Timeline()

    def until(at: float, thing: str = "", is_offline: bool = False) -> None:
        while at > clock.now:
            clock.now = min(at, math.floor(clock.now) + 1)
            if clock.now == math.floor(clock.now):
                record.take_snapshot()
        if thing:
            record.set_offline(thing, is_offline)

    def seen() -> list[tuple[int, float, float]]:
        found = record.timeline.intervals() if record.timeline else []
        return [(each.offline, each.offline_from, each.offline_until) for each in found if each.offline]

    record.take_snapshot()
    until(1000.25, "a", True)
    until(1000.5, "b", True)
    until(1000.75, "a")
    until(1002.5, "b")
    until(1004)
    assert seen() == [(2, 1000.25, 1001), (1, 1001, 1002), (1, 1002, 1002.5)]
    until(1004.25, "a", True)
    until(1006)
    assert (record.offline, seen()[3:]) == ({"a"}, [(1, 1004.25, 1005), (1, 1005, 1006)])
    both = Interval(1000)
    for each in record.timeline.intervals():
        both.add(each)
    assert (both.offline, both.offline_from, both.offline_until, both.ended_at) == (2, 1000.25, 1006, 1006)
