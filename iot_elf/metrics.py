# SPDX-License-Identifier: Apache-2.0
"""The record of a run: totals, per thing, per second; latencies."""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import json
import math
import time
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from iot_elf.errors import FailureReport
from iot_elf.sequences import SequenceChecker

MAX_SNAPSHOTS = 3600  # an hour: about 2 MB
MAX_INTERVALS = 480  # of a timeline, an even number: an hour is 450 of 8 s
RATE_S = 3  # seconds over which the live line's rate is taken
MIN_RATE_S = 1.0  # from a shorter time no rate is told: it would be invented
MAX_LATENCY_US = 2**43 - 1  # a hundred days: longer times count as this one
CLOCKS_DIFFER_S = 0.1  # a message that is sent so long after it arrives has another clock
MAX_DELIVERY_S = 600.0  # and so has one that was sent longer ago: ELF sends again for little more than a minute
MAX_LATEST, MAX_LATEST_BYTES = 16, 512  # of a thing's messages, and of each, what a view can show


class LatencyHistogram:
    """How long something took each time, with three significant digits, in 280 KB whatever the times are.

    As in HdrHistogram, times of less than 2,048 µs are counted in steps of 1 µs, up to twice that in steps of 2 µs, and
    so on. (Its Python package takes as long, and a C compiler where there is no wheel.)
    """

    def __init__(self) -> None:
        self.count = 0
        self._max_s = 0.0
        self._counts = array("Q", bytes(8 * (_step_of(MAX_LATENCY_US) + 1)))
        self._recent: collections.deque[float] = collections.deque([0.0], maxlen=100)

    def add(self, took_s: float) -> None:
        self._counts[_step_of(_in_us(took_s))] += 1
        self.count += 1
        self._max_s = max(self._max_s, took_s)
        self._recent.append(1000 * took_s)

    @property
    def max_ms(self) -> float:
        return 1000 * self._max_s

    @property
    def recent_ms(self) -> float:
        return sorted(self._recent)[len(self._recent) // 2]

    def in_ms(self) -> dict[str, float]:
        """Return the percentiles: the shortest time that this percentage does not exceed; {} if nothing was added."""
        if not self.count:
            return {}
        reached, max_ms = list(itertools.accumulate(self._counts)), round(1000 * self._max_s, 1)
        percentiles = {
            f"p{percent}": min(_time_in_ms(bisect.bisect_left(reached, percent * reached[-1] / 100)), max_ms)
            for percent in (50, 95, 99)
        }
        return {**percentiles, "max": max_ms}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in self.in_ms().items()) + " ms"


class SparseHistogram:
    """The same with two significant digits, in 100 bytes for each time that differs; several add up without loss."""

    def __init__(self) -> None:
        self._counts = collections.Counter[int]()

    def add(self, took_s: float) -> None:
        self._counts[_step_of(_in_us(took_s)) >> 4] += 1

    def update(self, other: SparseHistogram) -> None:
        self._counts.update(other._counts)

    def percentile_ms(self, percent: float) -> float | None:
        """Return the shortest time that this percentage does not exceed; None if nothing was added."""
        steps = sorted(self._counts)
        reached = list(itertools.accumulate(map(self._counts.__getitem__, steps)))
        if not steps:
            return None
        return _time_in_ms((steps[bisect.bisect_left(reached, percent * reached[-1] / 100)] << 4) + 8)


def _in_us(took_s: float) -> int:
    return min(max(0, round(took_s * 1_000_000)), MAX_LATENCY_US)


def _step_of(time_us: int) -> int:
    coarser = max(0, time_us.bit_length() - 11)
    return (coarser << 10) + (time_us >> coarser)


def _time_in_ms(step: int) -> float:
    """Return the middle of a step, with the digits that are known, and a tenth of a millisecond at most."""
    coarser = max(0, (step >> 10) - 1)
    middle_ms = (((step - (coarser << 10)) << coarser) + (1 << coarser) // 2) / 1000
    return round(middle_ms, 1) if middle_ms < 100 else float(f"{middle_ms:.3g}")


def object_in(payload: bytes) -> dict[str, Any]:
    """Return the JSON object in a message, or an empty one."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(content := json.loads(payload), dict):
            return content
    return {}


def time_of_sending(content: Mapping[str, Any]) -> float | None:
    """Return the time.time() in a message's `ts`, if it has one."""
    try:
        sent_at = float(content["ts"])
    except (ValueError, ArithmeticError, TypeError, KeyError):
        return None
    return sent_at if 1e9 < sent_at < 1e11 else None


class Interval:
    """What happened in some seconds of a run, and `add` what happened in the next ones."""

    def __init__(self, began_at: float) -> None:
        self.began_at = self.ended_at = began_at  # time.monotonic()
        self.counts = collections.Counter[str]()  # as RunRecord's totals
        self.latency, self.latency_from_due = SparseHistogram(), SparseHistogram()
        self.offline = 0  # how many things at most were, of those that lost their connection
        self.offline_from, self.offline_until = math.inf, 0.0  # time.monotonic()

    @property
    def lasted_s(self) -> float:
        return self.ended_at - self.began_at

    def add(self, later: Interval) -> None:
        self.ended_at = later.ended_at
        self.counts.update(later.counts)
        self.latency.update(later.latency)
        self.latency_from_due.update(later.latency_from_due)
        self.mark_offline(later.offline_from, later.offline)
        self.mark_offline(later.offline_until, later.offline)

    def mark_offline(self, at: float, things: int) -> None:
        if things:
            self.offline = max(self.offline, things)
            self.offline_from, self.offline_until = min(self.offline_from, at), max(self.offline_until, at)


class Timeline:
    """A run in at most MAX_INTERVALS parts of equal length, each of a second or, in a long run, of 2, 4, 8 and so on.

    When there would be more, each two become one, in which nothing is averaged: counts and histograms add up. It begins
    with the first snapshot, and takes some 10 MB at most.
    """

    def __init__(self) -> None:
        self.longest_s: dict[str, float] = {}  # by thing
        self._intervals: list[Interval] = []  # the last one is not over
        self._per_interval, self._taken = 1, 0  # snapshots
        self._offline = 0  # things, now
        self._totals = collections.Counter[str]()  # at the last snapshot

    def add(self, thing: str, took_s: float, since_due_s: float | None = None) -> None:
        """Count a message of a thing that took so long."""
        if took_s > self.longest_s.get(thing, -1.0):
            self.longest_s[thing] = took_s
        if self._intervals:
            self._intervals[-1].latency.add(took_s)
            if since_due_s is not None:
                self._intervals[-1].latency_from_due.add(since_due_s)

    def set_offline(self, things: int) -> None:
        """Take note of how many things have lost their connection, and have none."""
        if self._intervals:
            self._intervals[-1].mark_offline(time.monotonic(), max(self._offline, things))
        self._offline = things

    def take_snapshot(self, totals: collections.Counter[str]) -> None:
        now = time.monotonic()
        if self._intervals:
            interval = self._intervals[-1]
            interval.ended_at = now
            interval.counts.update(totals - self._totals)
            interval.mark_offline(now, self._offline)
            self._taken += 1
        self._totals = totals.copy()
        if self._taken == self._per_interval or not self._intervals:
            if len(self._intervals) == MAX_INTERVALS:
                for earlier, later in zip(self._intervals[::2], self._intervals[1::2], strict=True):
                    earlier.add(later)
                del self._intervals[1::2]
                self._per_interval *= 2
            self._taken = 0
            self._intervals.append(Interval(now))
            self._intervals[-1].mark_offline(now, self._offline)

    def intervals(self) -> list[Interval]:
        """Return them, once the run has ended; a last one that is too short for a rate is part of the one before."""
        its = self._intervals
        while len(its) > 1 and its[-1].lasted_s < its[0].lasted_s / 2:
            last = its.pop()
            its[-1].add(last)
        return its if its and its[0].lasted_s else []


def clocks_differ(took_s: float) -> bool:
    """Return whether the time since a message was sent, by its sender's clock, can't be that of its delivery."""
    return not -CLOCKS_DIFFER_S <= took_s <= MAX_DELIVERY_S


def about_clock(ahead_s: float) -> str:
    """Say how far a sender's clock is ahead of this machine's; behind, it may be another reason."""
    by_s = f"{abs(ahead_s):,.0f}" if abs(ahead_s) >= 1 else f"{abs(ahead_s):.1f}"
    return (
        f"the sender's clock is {by_s} s ahead" if ahead_s > 0 else f"ts is {by_s} s old, or the sender's clock behind"
    )


class LatestMessages:
    """What a view shows of a thing: its latest messages, each with the time.monotonic() when it was sent or arrived."""

    def __init__(self) -> None:
        self.messages: collections.deque[tuple[float, bytes]] = collections.deque(maxlen=MAX_LATEST)  # their beginnings
        self.took_s: float | None = None  # until one was acknowledged, or arrived


class RunRecord:
    """What happened in a run of things that publish or subscribe, for whoever shows it: totals, per thing, per second.

    The loop's thread writes it; others may read it at any time. What is counted has the names sent, acknowledged,
    retransmitted, returned, not_sent, invalid (could not be made, so not sent), dropped (lost while offline, QoS 0),
    requests (to shadows), accepted, rejected, received, retained (of these), waited (of these: sent before the
    connection was made, so kept in a session) and unreadable.
    """

    def __init__(self) -> None:
        self.totals: collections.Counter[str] = collections.Counter()
        self.by_thing: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.latest_of: dict[str, LatestMessages] | None = None  # by thing; None: no view asks for it
        # The totals at a time.monotonic(), once a second.
        self.snapshots: collections.deque[tuple[float, Mapping[str, int]]] = collections.deque(maxlen=MAX_SNAPSHOTS)
        self.timeline: Timeline | None = None  # only if somebody shows it
        self.latency = LatencyHistogram()  # from when a message was sent until it was acknowledged, or arrived
        self.latency_from_due = LatencyHistogram()  # the same, from when it was due to be sent
        self.sequence = SequenceChecker()
        self.failures = FailureReport()
        # The things by name, and how many there are.
        self.connected: set[str] = set()
        self.delayed: dict[str, str] = {}  # those whose first connect is tried again, and why
        self.failed: set[str] = set()
        self.offline: set[str] = set()  # those that lost their connection, and have none
        self.things = 0
        self.paused_s = 0.0  # in which nothing was sent or received, for the reader of the output
        self.connects = 0  # of all things, their first and later ones
        self.offline_s: dict[str, float] = {}  # those that lost their connection, in the end
        self.planned_outages: int | None = None  # that the run made itself; None: it was not to
        self.planned_offline_s: dict[str, float] = {}  # the same as offline_s, where one of these was the cause
        # A time.monotonic() each; 0.0: not yet.
        self.began_at = self.ended_at = 0.0  # when all were connected, and when they were stopped
        self.ends_at = math.inf  # if that is known
        self.acknowledged_at = 0.0  # the last acknowledgement
        self.outage_until = 0.0  # when the last outage that the run has begun is over
        # What is so when Runner.observe() looks.
        self.online = self.in_flight = 0
        self.in_flight_since = math.inf  # time.monotonic() of the oldest
        # What is published.
        self.qos = 0
        self.rounds: int | None = None  # how many messages of each thing were due in all, in the end; None: unknown
        self.late_s: dict[str, float] = {"": 0.0}  # the maximum, by what delayed a message
        self.dropped: list[tuple[str, int]] = []  # the first of them: thing, number
        self.invalid: Exception | None = None  # why the first message that could not be made was not
        self.unacknowledged: list[tuple[str, str, int, bytes]] = []  # in the end: thing, topic, number, payload
        self.rejection = ""  # AWS's reason for the first that it rejected
        # With --verify: the name of the run in its messages; from sending to coming back; what has not, by thing: the
        # numbers, and when each was sent.
        self.run, self.checks_return = "", False
        self.round_trip = LatencyHistogram()
        self.not_returned: dict[str, dict[int, float]] = collections.defaultdict(dict)
        # What is received.
        self.checks_sequence = False
        # With persistent sessions, the things that had one when they connected, and had none when they reconnected.
        self.keeps_sessions, self.session_present, self.session_lost = False, set[str](), set[str]()
        self.clock_ahead_s = 0.0  # how far a sender's clock is ahead of this machine's at most; less than 0: behind
        self.without_latency = 0  # messages of such senders

    def count(self, what: str, thing: str, number: int = 1) -> None:
        self.totals[what] += number
        self.by_thing[thing][what] += number

    def keep_latest(self) -> None:
        """From now on keep what a view shows of each thing."""
        self.latest_of = collections.defaultdict(LatestMessages)

    def note_message(self, thing: str, payload: bytes) -> None:
        """Take note that a message was sent, or arrived."""
        if self.latest_of is not None:
            self.latest_of[thing].messages.append((time.monotonic(), payload[:MAX_LATEST_BYTES]))

    def note_latency(self, thing: str, took_s: float) -> None:
        """Take note how long a message took."""
        if self.latest_of is not None:
            self.latest_of[thing].took_s = took_s

    def take_snapshot(self) -> None:
        self.snapshots.append((time.monotonic(), dict(self.totals)))
        if self.timeline:
            self.timeline.take_snapshot(self.totals)

    def set_offline(self, thing: str, is_offline: bool) -> None:
        """Take note that a thing lost its connection, or has one again."""
        (self.offline.add if is_offline else self.offline.discard)(thing)
        if self.timeline:
            self.timeline.set_offline(len(self.offline))

    def add_acknowledgement(self, thing: str, after_s: float, after_due_s: float) -> None:
        """Count how long a thing's message took."""
        self.latency_from_due.add(after_due_s)
        self._add_latency(thing, after_s, after_due_s)

    def add_delivery(self, thing: str, took_s: float) -> None:
        """Count how long ago a message that arrives was sent, unless it shows that the sender's clock differs."""
        if not clocks_differ(took_s):
            self._add_latency(thing, max(0.0, took_s))
            return
        self.without_latency += 1
        if abs(took_s) > abs(self.clock_ahead_s):
            self.clock_ahead_s = -took_s

    def _add_latency(self, thing: str, took_s: float, since_due_s: float | None = None) -> None:
        self.latency.add(took_s)
        self.note_latency(thing, took_s)
        if self.timeline:
            self.timeline.add(thing, took_s, since_due_s)

    def rate(self, what: str) -> float | None:
        """Return how many per second there were in about the last RATE_S seconds; None in the first moment."""
        if not self.snapshots:
            return None
        since, totals = self.snapshots[-min(RATE_S, len(self.snapshots))]
        took_s = time.monotonic() - since
        return (self.totals[what] - totals.get(what, 0)) / took_s if took_s >= MIN_RATE_S else None

    @property
    def duration_s(self) -> float:
        """How long the run took, once it has ended; 0 if it never began, as nothing connected."""
        return self.ended_at - self.began_at if self.began_at else 0.0

    def mean_rate(self, what: str) -> float | None:
        """Return how many per second there were in the whole run; None if it was too short to say."""
        return self.totals[what] / self.duration_s if self.duration_s >= MIN_RATE_S else None

    @property
    def latest(self) -> tuple[float, str]:
        """By how many seconds a message was sent late at most, and what delayed it; "": this machine."""
        cause, late_s = max(self.late_s.items(), key=lambda pair: pair[1])
        return late_s, cause

    def settle_not_sent(self, things: Iterable[str]) -> None:
        """Count as not sent, for each thing, what was due in all `rounds` and was not sent."""
        if self.rounds is not None:
            for thing in things:
                counts = self.by_thing[thing]
                self.count("not_sent", thing, self.rounds - counts["sent"] - counts["dropped"] - counts["not_sent"])

    @property
    def lost(self) -> int:
        """How many messages were sent and not acknowledged, or at QoS 0 not sent, for want of a connection."""
        return self.totals["dropped"] + len(self.unacknowledged)

    @property
    def losers(self) -> set[str]:
        """The things of which messages were lost, or could be made and were not sent."""
        has_lost = {t for t, its in self.by_thing.items() if its["dropped"] or its["not_sent"] > its["invalid"]}
        return has_lost | {thing for thing, *_ in self.unacknowledged}

    @property
    def unanswered(self) -> int:
        """How many messages to shadows AWS has not answered."""
        return self.totals["requests"] - self.totals["accepted"] - self.totals["rejected"]
