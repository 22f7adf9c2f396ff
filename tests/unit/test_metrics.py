"""The record of a run: percentiles, rates, and which numbers of a sender are missing."""

from __future__ import annotations

import collections
import math
import random
from typing import Any

import pytest
from support.program import Limits

from iot_elf import metrics
from iot_elf.metrics import LatencyHistogram, RunRecord, SequenceChecker, object_in, time_of_sending

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
    ],
)
def test_a_percentile_is_the_shortest_time_that_so_many_do_not_exceed(
    took_ms: list[float], p50: float, p95: float, p99: float, longest: float
) -> None:
    assert histogram(*took_ms).in_ms() == {"p50": p50, "p95": p95, "p99": p99, "max": longest}


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


# Missing numbers


def hear(numbers: list[int], checker: SequenceChecker | None = None, over_from: int = 10**9, **more: Any) -> Any:
    """Have a thing receive a sender's messages; those from the place `over_from` on come after the end."""
    checker = checker or SequenceChecker()
    content = {"thing": "sensor", "run": "a", **more}
    for place, number in enumerate(numbers):
        checker.add("thing_0", {**content, "seq": number}, is_over=place >= over_from)
    return checker


def figures(missing: int = 0, repeated: int = 0, out_of_order: int = 0) -> dict[str, int]:
    return {"missing": missing, "repeated": repeated, "outOfOrder": out_of_order}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([1, 2, 3], figures()),
        ([7, 8, 9], figures()),  # it began to listen later
        ([4], figures()),
        ([1, 4], figures(missing=2)),
        ([1, 3, 5], figures(missing=2)),
        ([1, 4, 2, 3], figures(out_of_order=2)),
        ([1, 5, 2], figures(missing=2, out_of_order=1)),
        ([1, 5, 3], figures(missing=2, out_of_order=1)),
        ([1, 5, 4], figures(missing=2, out_of_order=1)),
        ([1, 5, 3, 2, 4], figures(out_of_order=3)),
        ([2, 1, 3], figures(out_of_order=1)),
        ([5, 3, 6], figures(missing=1, out_of_order=1)),
        ([9, 5], figures(missing=3, out_of_order=1)),
        ([9, 5, 7], figures(missing=2, out_of_order=2)),
        ([1, 1, 2, 2, 2], figures(repeated=3)),
        ([1, 3, 2, 2], figures(repeated=1, out_of_order=1)),
        ([1, 2, 3, 1], figures(repeated=1)),
        ([1, 2, 5, 5], figures(missing=2, repeated=1)),
        ([3, 6, 3, 6], figures(missing=2, repeated=2)),
        ([2**53 - 1, 2**53], figures()),  # not a whole number for every program
    ],
)
def test_a_number_is_missing_between_two_that_arrived(numbers: list[int], expected: dict[str, int]) -> None:
    assert hear(numbers).counts == expected


@pytest.mark.parametrize(
    ("numbers", "over_from", "expected"),
    [
        ([1, 2, 3], 2, figures()),
        ([1, 2, 5], 2, figures()),  # that it is missing may be because this came too late
        ([1, 5, 3], 2, figures(missing=2, out_of_order=1)),
        ([1, 5, 3, 3], 2, figures(missing=2, out_of_order=1)),
        ([1, 5, 1], 2, figures(missing=3)),
        ([5, 7, 4], 2, figures(missing=1)),  # before the first: nobody knows whether it should have arrived
        ([5, 7, 3], 2, figures(missing=1)),
        ([5, 7, 6], 2, figures(out_of_order=1)),
        ([1, 2, 3, 4], 1, figures()),
    ],
)
def test_after_the_end_only_what_was_missing_still_counts(
    numbers: list[int], over_from: int, expected: dict[str, int]
) -> None:
    checker = hear(numbers, over_from=over_from)
    assert checker.counts == expected


def test_what_came_after_the_end_is_not_remembered() -> None:
    assert hear([6], hear([1, 5], over_from=1)).counts == figures(missing=4)


@pytest.mark.parametrize("seed", range(20))
def test_the_figures_are_those_of_sets_of_all_numbers(seed: int) -> None:
    chance = random.Random(seed)
    numbers = sorted(chance.choices(range(1, 60), k=60), key=lambda number: number + chance.gauss(0, seed % 7))
    expected, seen = figures(), set[int]()
    for number in numbers:
        expected["repeated"] += number in seen
        expected["outOfOrder"] += number not in seen and number < max(seen, default=0)
        seen.add(number)
    expected["missing"] = max(seen) - min(seen) + 1 - len(seen)
    assert hear(numbers).counts == expected


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        ([8], figures(missing=3, out_of_order=1)),  # the last gap
        ([6], figures(missing=3, out_of_order=1)),
        ([4], figures(missing=4, repeated=1)),  # forgotten: it stays missing
        ([2], figures(missing=4, repeated=1)),
        ([9, 10, 11], figures(missing=4, repeated=1)),
    ],
)
def test_of_too_many_gaps_the_oldest_is_forgotten(limits: Limits, late: list[int], expected: dict[str, int]) -> None:
    limits(MAX_GAPS=4)
    assert hear(late, hear([1, 3, 5, 7, 9])).counts == expected


def test_gaps_that_are_filled_make_no_other_forgotten(limits: Limits) -> None:
    limits(MAX_GAPS=4)
    filled = [*(1, 3, 2), 5, *(7, 6), *(9, 8), *(11, 10), *(13, 12)]
    assert hear([4], hear(filled)).counts == figures(out_of_order=6)


def test_what_was_sent_before_a_sender_was_first_heard_is_never_forgotten(limits: Limits) -> None:
    limits(MAX_GAPS=3)
    assert hear([5], hear([10, 12, 14, 16])).counts == figures(missing=3 + 4, out_of_order=1)


def test_fifty_gaps_of_a_sender_are_remembered() -> None:
    odd = hear([*range(1, 99, 2)])  # with the ones before the first and after the last
    assert hear([2], odd).counts == figures(missing=47, out_of_order=1)
    odd = hear([*range(1, 101, 2)])
    assert hear([2], odd).counts == figures(missing=49, repeated=1)


def test_things_senders_and_runs_are_counted_each_for_itself() -> None:
    checker = SequenceChecker()
    for hearer, thing, run in (
        ("thing_0", "x", "a"),
        ("thing_1", "x", "a"),
        ("thing_0", "y", "a"),
        ("thing_0", "x", "b"),
    ):
        checker.add(hearer, {"thing": thing, "seq": 1, "run": run}, is_over=False)
    assert checker.counts == figures()
    checker.add("thing_1", {"thing": "x", "seq": 4, "run": "a"}, is_over=False)
    checker.add("thing_0", {"thing": "x", "seq": 3, "run": "b"}, is_over=False)
    checker.add("thing_0", {"thing": "y", "seq": 1, "run": "a"}, is_over=False)
    assert checker.senders() == {"x": {"missing": 3}, "y": {"repeated": 1}}


def test_a_sender_without_a_run_is_counted() -> None:
    checker = SequenceChecker()
    for number in (1, 3):
        checker.add("thing_0", {"thing": "x", "seq": number}, is_over=False)
    assert checker.senders() == {"x": {"missing": 1}}


def test_senders_are_listed_by_their_numbers_and_only_if_something_was_wrong() -> None:
    checker = SequenceChecker()
    for thing, numbers in {"thing_10": [1, 3], "thing_9": [1, 3, 2], "thing_1": [1, 2]}.items():
        hear(numbers, checker, thing=thing)
    assert [*checker.senders().items()] == [("thing_9", {"outOfOrder": 1}), ("thing_10", {"missing": 1})]


ODD_NUMBERS: list[Any] = [0, -1, 1.5, 2.0, True, None, "3", [], 2**53, 10**400]
ODD_THINGS: list[Any] = [7, None, {}, "x" * 129]


@pytest.mark.parametrize(
    "odd",
    [
        *({"seq": number} for number in ODD_NUMBERS),
        *({"thing": thing} for thing in ODD_THINGS),
        *({"run": run} for run in (7, None, "x" * 129)),
    ],
)
def test_what_has_no_sender_and_number_is_not_counted(odd: dict[str, Any]) -> None:
    checker = SequenceChecker()
    checker.add("thing_0", {"thing": "sensor", "seq": 5, "run": "a", **odd}, is_over=False)
    assert str(checker) == ""


@pytest.mark.parametrize(
    "usual", [{"seq": 1}, {"seq": 2**53 - 1}, {"thing": "x" * 128}, {"run": "x" * 128}, {"run": ""}]
)
def test_what_has_a_sender_and_a_number_is_counted(usual: dict[str, Any]) -> None:
    checker = SequenceChecker()
    checker.add("thing_0", {"thing": "sensor", "seq": 5, "run": "a", **usual}, is_over=False)
    assert str(checker) == ", 0 missing, 0 repeated, 0 out of order"


def test_the_counts_follow_the_messages_on_the_live_line() -> None:
    assert str(hear([1, 5, 3, 3])) == ", 2 missing, 1 repeated, 1 out of order"


def test_of_too_many_senders_the_one_that_was_silent_longest_is_forgotten(limits: Limits) -> None:
    limits(MAX_SENDERS=2)
    checker = SequenceChecker()
    for thing in "abac":
        hear([1], checker, thing=thing)
    assert checker.forgotten == 1
    assert checker.counts == figures(repeated=1)  # a
    hear([3], checker, thing="a")
    hear([3], checker, thing="c")
    assert (checker.counts, checker.forgotten) == (figures(missing=2, repeated=1), 1)
    hear([3], checker, thing="b")  # as if it were heard for the first time
    assert (checker.counts, checker.forgotten) == (figures(missing=2, repeated=1), 2)


def test_of_too_many_senders_the_first_have_counts_of_their_own(limits: Limits) -> None:
    limits(MAX_SENDERS=2)
    checker = SequenceChecker()
    for thing in ("a", "b", "c", "b"):
        hear([1, 3], checker, thing=thing, run=thing)
    assert checker.senders() == {"a": {"missing": 1}, "b": {"missing": 1, "repeated": 2}}
    assert checker.counts == figures(missing=3, repeated=2)


def test_senders_that_miss_nothing_take_no_room_from_others(limits: Limits) -> None:
    limits(MAX_SENDERS=2)
    checker = SequenceChecker()
    for thing, numbers in {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 3, 5]}.items():
        hear(numbers, checker, thing=thing)
    assert checker.senders() == {"c": {"missing": 1}}


# Totals


def test_a_run_begins_with_nothing_counted() -> None:
    record = RunRecord()
    assert (record.online, record.in_flight, record.things, record.qos, record.rounds) == (0, 0, 0, 0, None)
    assert (record.began_at, record.ended_at, record.acknowledged_at) == (0.0, 0.0, 0.0)
    assert (record.ends_at, record.in_flight_since) == (math.inf, math.inf)
    assert (record.late_s, record.lost, record.unanswered) == ({"": 0.0}, 0, 0)
    assert (record.latency.in_ms(), record.failures.things, record.offline_s) == ({}, {}, {})
    assert (record.checks_sequence, record.sequence.counts, record.sequence.forgotten) == (False, figures(), 0)


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
    assert rates == [0, 10, 15, 20, 30, 40, 30]
    assert record.rate("acknowledged") == 0


def test_the_rate_of_the_first_moment_is_no_division_by_zero(clock: Clock) -> None:
    record = RunRecord()
    record.take_snapshot()
    record.count("sent", "thing_0", 3)
    assert record.rate("sent") == pytest.approx(15.0)  # as if 0.2 s had passed


def test_a_record_keeps_the_totals_of_the_last_hour(clock: Clock, limits: Limits) -> None:
    record = RunRecord()
    for _ in range(3700):
        record.take_snapshot()
        record.count("sent", "thing_0")
        clock.now += 1.0
    assert record.snapshots[0] == (1100.0, {"sent": 100})
    assert (record.snapshots[-1], len(record.snapshots)) == ((4699.0, {"sent": 3699}), 3600)
