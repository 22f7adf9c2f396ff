# SPDX-License-Identifier: Apache-2.0
"""Which numbers of a sender have arrived, and which are missing."""

from __future__ import annotations

import bisect
import collections
from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

from iot_elf import defaults
from iot_elf.text import by_number

MAX_SENDERS = 50_000  # runs of senders that are remembered: 45 MB
MAX_BYTES = 96 << 20  # for all of them, and the things that hear them
MAX_GAPS = 48  # in what a thing has heard of a sender
RUN_BYTES, RANGE_BYTES, GAP_BYTES = 900, 30, 26  # measured
NONE = -1  # in place of an index


class Change(NamedTuple):
    """How the counts change with a message."""

    missing: int = 0
    repeated: int = 0
    out_of_order: int = 0
    is_exact: bool = True  # False: a gap was forgotten, so that what arrives late stays missing


NO_CHANGE = Change()


class HeardNumbers:
    """Which numbers of a sender's run have arrived at each thing: a range, but for the gaps in it.

    Nobody knows whether what was sent before the range, or after it, was sent while the thing was listening. What is in
    the gaps is missing. Where 1,000 things all hear 1,000 things there are a million ranges, so that all is in arrays.
    """

    __slots__ = ("_free", "_gaps", "_ranges", "_things", "size")

    def __init__(self) -> None:
        self.size = RUN_BYTES  # how much memory this takes
        self._things = array("l")  # in order, by their index
        self._ranges = array("q")  # for each: the first number, the one after the last, and its newest gap
        self._gaps = array("q")  # of each: the first number, the one after the last, and the thing's next older gap
        self._free = NONE  # the first of those that are not in use

    def add(self, thing: int, number: int, is_over: bool, has_room: bool) -> Change:
        """Take note of a number that arrived at a thing; once it `is_over`, only if it was missing.

        Without `has_room` for more gaps, an older one is forgotten for each.
        """
        ranges, at = self._ranges, bisect.bisect_left(self._things, thing)
        base = 3 * at
        if at == len(self._things) or self._things[at] != thing:
            if not is_over:
                self._things.insert(at, thing)
                ranges[base:base] = array("q", (number, number + 1, NONE))
                self.size += RANGE_BYTES
            return NO_CHANGE
        first, stop = ranges[base], ranges[base + 1]
        if first <= number < stop:
            if not (filled := self._fill(base, number, has_room)):
                return NO_CHANGE if is_over else Change(repeated=1)
            return filled
        if is_over:
            return NO_CHANGE
        if number >= stop:
            ranges[base + 1] = number + 1
            if number == stop:
                return NO_CHANGE
            return Change(number - stop, is_exact=self._add_gap(base, stop, number, has_room))
        ranges[base] = number
        if number == first - 1:
            return Change(out_of_order=1)
        return Change(first - number - 1, 0, 1, self._add_gap(base, number + 1, first, has_room))

    def _fill(self, base: int, number: int, has_room: bool) -> Change | None:
        """Take a number out of the gap that it is in; return None if it is in none."""
        gaps, before, gap = self._gaps, NONE, self._ranges[base + 2]
        while gap != NONE and not gaps[gap] <= number < gaps[gap + 1]:
            before, gap = gap, gaps[gap + 2]
        if gap == NONE:
            return None
        start, stop, is_exact = gaps[gap], gaps[gap + 1], True
        if start == stop - 1:
            self._unlink(base, before, gap)
        elif number == stop - 1:
            gaps[gap + 1] = number
        else:
            gaps[gap] = number + 1
            if start < number:
                is_exact = self._add_gap(base, start, number, has_room)
        return Change(-1, 0, 1, is_exact)

    def _add_gap(self, base: int, start: int, stop: int, has_room: bool) -> bool:
        """Remember a gap, and return True; or return False if this or the oldest one had to be forgotten."""
        gaps, before, oldest, number = self._gaps, NONE, NONE, 0
        gap = newest = self._ranges[base + 2]
        while gap != NONE:
            before, oldest, gap, number = oldest, gap, gaps[gap + 2], number + 1
        is_full = number == MAX_GAPS or (self._free == NONE and not has_room)
        if is_full and number:
            self._unlink(base, before, oldest)
            newest = self._ranges[base + 2]
        if (gap := self._free) != NONE:
            self._free = gaps[gap + 2]
        elif has_room:
            gap = len(gaps)
            gaps.extend((0, 0, 0))
            self.size += GAP_BYTES
        else:
            return False
        gaps[gap], gaps[gap + 1], gaps[gap + 2] = start, stop, newest
        self._ranges[base + 2] = gap
        return not is_full

    def _unlink(self, base: int, before: int, gap: int) -> None:
        """Take a gap out of those of a thing, where it is after `before`."""
        gaps = self._gaps
        if before == NONE:
            self._ranges[base + 2] = gaps[gap + 2]
        else:
            gaps[before + 2] = gaps[gap + 2]
        gaps[gap + 2], self._free = self._free, gap


class SequenceChecker:
    """Counts messages that are missing, arrived twice or out of order, of those that have `thing`, `seq` and `run`.

    Each thing that receives them is counted for itself.
    """

    def __init__(self) -> None:
        self.counts = collections.Counter(missing=0, repeated=0, outOfOrder=0)  # as Change has them
        self.by_thing: dict[str, collections.Counter[str]] = {}
        self.is_exact = True  # until a run is forgotten because there is no room, the least recent first, or a gap
        self._bytes = 0
        self._hearers: dict[str, int] = {}  # the things that receive messages, each with its index
        self._runs: collections.OrderedDict[tuple[str, str], HeardNumbers] = collections.OrderedDict()

    def add(self, hearer: str, content: Mapping[str, Any], is_over: bool) -> None:
        """Count a message that a thing received; once it `is_over`, only if it was missing."""
        thing, number, run = content.get("thing"), content.get("seq"), content.get("run", "")
        if type(number) is not int or not 0 < number < 2**53:  # a whole number for every program
            return
        if not isinstance(thing, str) or not isinstance(run, str):
            return
        if max(len(thing), len(run)) > defaults.MAX_CLIENT_ID_BYTES:
            return
        heard, before = self._runs.get((thing, run)), 0
        if heard:
            self._runs.move_to_end((thing, run))
            before = heard.size
        else:
            heard = self._runs[thing, run] = HeardNumbers()
        index = self._hearers.setdefault(hearer, len(self._hearers))
        change = heard.add(index, number, is_over, has_room=self._bytes < MAX_BYTES)
        if heard.size != before:
            self._bytes += heard.size - before
            self._forget()
        if change is not NO_CHANGE:
            self._count(thing, change)

    def _forget(self) -> None:
        """Forget the runs that were silent longest, if there are too many."""
        while len(self._runs) > 1 and (len(self._runs) > MAX_SENDERS or self._bytes > MAX_BYTES):
            self._bytes -= self._runs.popitem(last=False)[1].size
            self.is_exact = False

    def _count(self, thing: str, change: Change) -> None:
        self.is_exact = self.is_exact and change.is_exact
        if (own := self.by_thing.get(thing)) is None:
            own = collections.Counter()
            if len(self.by_thing) < MAX_SENDERS:
                self.by_thing[thing] = own
        for name, number in zip(self.counts, change, strict=False):
            if number:
                self.counts[name] += number
                own[name] += number

    def senders(self) -> dict[str, collections.Counter[str]]:
        """Return the counts, those that are not 0, of each sender that has any, in order."""
        by_sender = sorted(self.by_thing.items(), key=lambda item: by_number(item[0]))
        return {thing: +counts for thing, counts in by_sender if any(counts.values())}

    def __str__(self) -> str:
        """Return the counts, to follow others; "" if no message was numbered."""
        return f", {format_counts(self.counts)}" if self._runs else ""


def format_counts(counts: Mapping[str, int]) -> str:
    return f"{counts['missing']} missing, {counts['repeated']} repeated, {counts['outOfOrder']} out of order"
