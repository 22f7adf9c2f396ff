# SPDX-License-Identifier: Apache-2.0
"""The record of a run: totals, per thing, per second; latencies, missing numbers."""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from iot_elf import defaults
from iot_elf.errors import FailureReport
from iot_elf.text import by_number

MAX_SNAPSHOTS = 3600  # an hour: about 2 MB
RATE_S = 3  # seconds over which the live line's rate is taken
MAX_GAPS = 50  # that are remembered in the numbers of a sender: 6 KB


class LatencyHistogram:
    """How long something took each time, in steps of 0.1 ms, so that its size does not grow without limit."""

    def __init__(self) -> None:
        self._counts: collections.Counter[int] = collections.Counter()
        self._recent: collections.deque[float] = collections.deque([0.0], maxlen=100)

    def add(self, took_s: float) -> None:
        self._counts[round(took_s * 10_000)] += 1
        self._recent.append(1000 * took_s)

    @property
    def recent_ms(self) -> float:
        return sorted(self._recent)[len(self._recent) // 2]

    def in_ms(self) -> dict[str, float]:
        """Return the percentiles: the shortest time that this percentage does not exceed."""
        steps = sorted(self._counts)
        reached = list(itertools.accumulate(self._counts[step] for step in steps))
        percents = {"p50": 50, "p95": 95, "p99": 99, "max": 100} if steps else {}
        return {
            name: steps[bisect.bisect_left(reached, percent * reached[-1] / 100)] / 10
            for name, percent in percents.items()
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in self.in_ms().items()) + " ms"


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


class SequenceChecker:
    """Counts messages that are missing, arrived twice or out of order, of those that have `thing`, `seq` and `run`.

    For each thing that receives a run of a sender, `_gaps` has the numbers that have not arrived: ranges [start, stop),
    in order, apart, none empty. The first ends at the lowest number that arrived, the last begins after the highest;
    nobody knows whether the messages in these two were sent while the thing was listening. Those between are missing.
    """

    def __init__(self) -> None:
        self.counts = collections.Counter(missing=0, repeated=0, outOfOrder=0)
        self.by_thing: dict[str, collections.Counter[str]] = {}
        self.forgotten = 0  # runs that were dropped because there were more than MAX_SENDERS, the least recent first
        self._gaps: collections.OrderedDict[tuple[str, str, str], list[tuple[int, float]]] = collections.OrderedDict()

    def add(self, hearer: str, content: Mapping[str, Any], is_over: bool) -> None:
        """Count a message that a thing received; once it `is_over`, only if it was missing."""
        thing, number, run = content.get("thing"), content.get("seq"), content.get("run", "")
        if type(number) is not int or not 0 < number < 2**53:  # a whole number for every program
            return
        if not isinstance(thing, str) or not isinstance(run, str):
            return
        if max(len(thing), len(run)) > defaults.MAX_CLIENT_ID_BYTES:
            return
        key = hearer, thing, run
        gaps = self._gaps.setdefault(key, [(0, number), (number, math.inf)])
        self._gaps.move_to_end(key)
        if len(self._gaps) > defaults.MAX_SENDERS:
            self._gaps.popitem(last=False)
            self.forgotten += 1
        if number == gaps[-1][0] and not is_over:
            gaps[-1] = (number + 1, math.inf)
            return
        at = bisect.bisect_right(gaps, (number, math.inf)) - 1
        start, stop = gaps[at]
        if number >= stop:
            more = {"repeated": 1}
        elif stop == math.inf:
            more = {"missing": number - start}
        else:
            more = {"missing": -1 if at else int(stop) - number - 1, "outOfOrder": 1}
        if is_over and more.get("missing") != -1:
            return
        if number < stop:
            gaps[at : at + 1] = [gap for gap in ((start, number), (number + 1, stop)) if gap[0] < gap[1]]
        if len(gaps) > MAX_GAPS:
            del gaps[1]  # it stays missing
        self.counts.update(more)
        if thing in self.by_thing or len(self.by_thing) < defaults.MAX_SENDERS:
            self.by_thing.setdefault(thing, collections.Counter()).update(more)

    def senders(self) -> dict[str, collections.Counter[str]]:
        """Return the counts, those that are not 0, of each sender that has any, in order."""
        by_sender = sorted(self.by_thing.items(), key=lambda item: by_number(item[0]))
        return {thing: +counts for thing, counts in by_sender if any(counts.values())}

    def __str__(self) -> str:
        """Return the counts, to follow others; "" if no message was numbered."""
        return f", {format_counts(self.counts)}" if self._gaps else ""


def format_counts(counts: Mapping[str, int]) -> str:
    return f"{counts['missing']} missing, {counts['repeated']} repeated, {counts['outOfOrder']} out of order"


class RunRecord:
    """What happened in a run of things that publish or subscribe, for whoever shows it: totals, per thing, per second.

    The loop's thread writes it; others may read it at any time. What is counted has the names sent, acknowledged,
    retransmitted, not_sent, invalid (could not be made, and so not sent), dropped (lost while offline, QoS 0), requests
    (to shadows), accepted, rejected, received and unreadable.
    """

    def __init__(self) -> None:
        self.totals: collections.Counter[str] = collections.Counter()
        self.by_thing: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        # The totals at a time.monotonic(), once a second.
        self.snapshots: collections.deque[tuple[float, Mapping[str, int]]] = collections.deque(maxlen=MAX_SNAPSHOTS)
        self.latency = LatencyHistogram()  # until a message was acknowledged, or arrived
        self.sequence = SequenceChecker()
        self.failures = FailureReport()
        # The things by name, and how many there are.
        self.connected: set[str] = set()
        self.delayed: dict[str, str] = {}  # those whose first connect is tried again, and why
        self.failed: set[str] = set()
        self.things = 0
        self.paused_s = 0.0  # in which nothing was sent or received, for the reader of the output
        self.offline_s: dict[str, float] = {}  # those that lost their connection, in the end
        # A time.monotonic() each; 0.0: not yet.
        self.began_at = self.ended_at = 0.0  # when all were connected, and when they were stopped
        self.ends_at = math.inf  # if that is known
        self.acknowledged_at = 0.0  # the last acknowledgement
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
        # What is received.
        self.checks_sequence = False

    def count(self, what: str, thing: str, number: int = 1) -> None:
        self.totals[what] += number
        self.by_thing[thing][what] += number

    def take_snapshot(self) -> None:
        self.snapshots.append((time.monotonic(), dict(self.totals)))

    def rate(self, what: str) -> float:
        """Return how many per second there were in about the last RATE_S seconds."""
        if not self.snapshots:
            return 0.0
        since, totals = self.snapshots[-min(RATE_S, len(self.snapshots))]
        return (self.totals[what] - totals.get(what, 0)) / max(time.monotonic() - since, defaults.REDRAW_INTERVAL_S)

    @property
    def lost(self) -> int:
        """How many messages were sent and not acknowledged, or at QoS 0 not sent, for want of a connection."""
        return self.totals["dropped"] + len(self.unacknowledged)

    @property
    def unanswered(self) -> int:
        """How many messages to shadows AWS has not answered."""
        return self.totals["requests"] - self.totals["accepted"] - self.totals["rejected"]
