"""Which numbers of a sender have arrived, and which are missing."""

from __future__ import annotations

import collections
import random
from typing import Any

import pytest
from support.program import Limits, constant

from iot_elf.sequences import SequenceChecker


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


class Sets:
    """The same with sets of all numbers, to compare."""

    def __init__(self) -> None:
        self.seen = collections.defaultdict[tuple[str, str], set[int]](set)
        self.counts = figures()

    def add(self, hearer: str, thing: str, number: int, is_over: bool) -> None:
        seen = self.seen[hearer, thing]
        is_missing = min(seen, default=number) < number < max(seen, default=number) and number not in seen
        if not is_over or is_missing:
            self.counts["missing"] -= max(seen, default=0) - min(seen, default=0) + bool(seen) - len(seen)
            self.counts["repeated"] += number in seen
            self.counts["outOfOrder"] += number not in seen and number < max(seen, default=0)
            seen.add(number)
            self.counts["missing"] += max(seen) - min(seen) + 1 - len(seen)


@pytest.mark.parametrize("seed", range(30))
def test_the_figures_are_those_of_sets_of_all_numbers(seed: int) -> None:
    """Of things that hear senders in any order, with gaps that open, shrink, split and close, also after the end."""
    chance, checker, sets = random.Random(seed), SequenceChecker(), Sets()
    pairs = [(f"thing_{number}", sender) for number in range(1 + seed % 4) for sender in "ab"]
    arrivals = [
        (*pair, number + chance.gauss(0, seed % 7), number)
        for pair in pairs
        for number in chance.choices(range(1, 60), k=60)
    ]
    arrivals.sort(key=lambda arrival: arrival[2])
    for place, (hearer, thing, _, number) in enumerate(arrivals):
        is_over = place > 100 + 3 * seed
        checker.add(hearer, {"thing": thing, "seq": number}, is_over)
        sets.add(hearer, thing, number, is_over)
        assert checker.counts == sets.counts
    assert checker.is_exact


@pytest.mark.parametrize("things", [1, 60])
def test_where_all_hear_all_each_pair_has_its_own_numbers(things: int) -> None:
    checker = SequenceChecker()
    names = [f"thing_{number}" for number in range(things)]
    for number in (1, 3, 4, 6):
        for hearer in reversed(names):
            for thing in names:
                checker.add(hearer, {"thing": thing, "seq": number, "run": "a"}, is_over=False)
    assert checker.counts == figures(missing=2 * things * things)
    assert checker.senders() == {name: {"missing": 2 * things} for name in names}


@pytest.mark.parametrize("numbers", [[5, 4, 8], [1, 5, 2], [1, 5, 4], [1, 5, 2, 4, 3, 9], [9, 5, 6, 8, 7]])
def test_a_gap_that_shrinks_is_one_gap_or_none(limits: Limits, numbers: list[int]) -> None:
    limits(MAX_GAPS=1)
    assert hear(numbers).is_exact


def test_each_thing_that_hears_a_sender_takes_room(limits: Limits) -> None:
    limits(MAX_BYTES=2 * constant("RUN_BYTES") + 3 * constant("RANGE_BYTES"))
    checker = SequenceChecker()
    for sender, hearer, is_exact in (("a", "x", True), ("a", "y", True), ("b", "x", True), ("b", "y", False)):
        checker.add(hearer, {"thing": sender, "seq": 1}, is_over=False)
        assert checker.is_exact is is_exact


def test_without_room_for_the_first_gap_it_stays_missing(limits: Limits) -> None:
    limits(MAX_BYTES=1)
    checker = hear([1, 3])
    assert (checker.counts, checker.is_exact) == (figures(missing=1), False)
    assert hear([2], checker).counts == figures(missing=1, repeated=1)


def test_without_room_a_new_gap_takes_the_place_of_the_oldest_and_a_new_run_of_another(limits: Limits) -> None:
    run_bytes, range_bytes, gap_bytes = (constant(f"{name}_BYTES") for name in ("RUN", "RANGE", "GAP"))
    limits(MAX_BYTES=run_bytes + 2 * range_bytes + gap_bytes)
    checker = hear([1, 3, 5, 7])
    assert (checker.counts, checker.is_exact) == (figures(missing=3), True)
    hear([9, 11], checker)
    assert (checker.counts, checker.is_exact) == (figures(missing=5), False)
    hear([2], checker)
    assert checker.counts == figures(missing=5, repeated=1)
    hear([10], checker)
    assert checker.counts == figures(missing=4, repeated=1, out_of_order=1)
    hear([1, 3], checker, thing="other")
    assert checker.counts == figures(missing=5, repeated=1, out_of_order=1)
    hear([20], checker)  # as if it were heard for the first time
    assert checker.counts == figures(missing=5, repeated=1, out_of_order=1)


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
    limits(MAX_GAPS=2)
    checker = hear([1, 3, 5])
    assert checker.is_exact
    assert not hear([7, 9], checker).is_exact
    assert hear(late, checker).counts == expected


def test_gaps_that_are_filled_make_no_other_forgotten(limits: Limits) -> None:
    limits(MAX_GAPS=2)
    filled = [*(1, 3, 2), 5, *(7, 6), *(9, 8), *(11, 10), *(13, 12)]
    checker = hear([4], hear(filled))
    assert (checker.counts, checker.is_exact) == (figures(out_of_order=6), True)


def test_what_was_sent_before_a_sender_was_first_heard_is_never_forgotten(limits: Limits) -> None:
    limits(MAX_GAPS=1)
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
        assert checker.is_exact == (thing != "c")
    assert checker.counts == figures(repeated=1)  # a
    hear([3], checker, thing="a")
    hear([3], checker, thing="c")
    assert checker.counts == figures(missing=2, repeated=1)
    hear([3], checker, thing="b")  # as if it were heard for the first time
    assert checker.counts == figures(missing=2, repeated=1)


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
