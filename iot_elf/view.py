# SPDX-License-Identifier: Apache-2.0
"""The things of a run as a table that lives, drawn with Rich: only with --view."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from iot_elf import console, defaults, metrics, results
from iot_elf.device import Device
from iot_elf.events import EventQueue
from iot_elf.metrics import LatestMessages, RunRecord
from iot_elf.runners import Runner
from iot_elf.text import decoded, on_one_line, printable, redacted

STATES = {
    "failed": "red",
    "offline": "red",
    "outage": "yellow",
    "connecting": "yellow",
    "late": "yellow",
    "online": "green",
}  # worst first
MAX_LOAD = 0.05  # of a core's time to draw: more things are drawn less often
WIDE = 100  # columns, from which there is room for more of everything
# Of JSON, or of any other text: a string, which may be a name, or a number.
_TOKEN = re.compile(rb'"((?:[^"\\]|\\.)*)"(\s*:)?|(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.])')


class Number(NamedTuple):
    """The first number in a message that is not its time or ELF's own count: its value, and where it is."""

    value: float
    start: int
    end: int


def first_number(payload: bytes) -> Number | None:
    name = b""
    for token in _TOKEN.finditer(payload):
        if token[2]:
            name = token[1]
        elif token[1] is None and name not in (b"ts", b"seq") and token.end() < metrics.MAX_LATEST_BYTES:
            return Number(min(max(float(token[0]), -1e300), 1e300), *token.span())
    return None


def sparkline(values: Sequence[float], is_utf: bool) -> str:
    """Draw each value as high as it is between the lowest and the highest of them."""
    levels = "▁▂▃▄▅▆▇█" if is_utf else "_.,-~=+#"
    low = min(values, default=0.0)
    span = max(values, default=0.0) - low
    return "".join(levels[round((value - low) / span * 7) if span else 3] for value in values)


def rate_of(times: Sequence[float], now: float) -> float | None:
    """Return how many messages a second there were lately; less if none has come for longer than that."""
    if len(times) < 2 or times[0] == times[-1]:
        return None
    return min((len(times) - 1) / (times[-1] - times[0]), len(times) / (now - times[0]))


def latency_text(time_s: float) -> str:
    """Return a time in at most seven characters."""
    if time_s >= 1:
        return age_text(time_s)
    return f"{1000 * time_s:.1f} ms" if time_s < 0.1 else f"{1000 * time_s:.0f} ms"


def age_text(time_s: float) -> str:
    """Return a time in at most five characters."""
    for limit_s, unit_s, unit in ((100, 1, "s"), (6000, 60, "m")):
        if time_s < limit_s:
            return f"{time_s:.1f} s" if time_s < 10 else f"{time_s / unit_s:.0f} {unit}"
    return f"{time_s / 3600:.0f} h"


class Row(NamedTuple):
    """What is so of a thing at a moment."""

    thing: str
    state: str  # one of STATES
    waits_s: float  # since when a message is not sent, or not acknowledged

    @classmethod
    def of(cls, thing: str, device: Device | None, record: RunRecord, now: float) -> Row:
        if thing in record.failed or not device:
            return cls(thing, "failed", 0.0)
        since = [message.taken_at for message in list(device.outbox.in_flight.values())[:1]]
        with contextlib.suppress(IndexError):
            since.append(device.outbox.queued[0][0])
        waits_s = now - min(since, default=now)
        if not device.is_online:
            without = "outage" if device.in_outage else "offline" if device.was_connected else "connecting"
            return cls(thing, without, waits_s)
        latest = (record.latest_of or {}).get(thing)
        return cls(
            thing, "late" if max(waits_s, (latest and latest.took_s) or 0.0) > results.STALL_S else "online", waits_s
        )


class View:
    """A run on one screen: the totals, a row a thing, those that matter first, and the last warnings."""

    def __init__(self, runner: Runner, counted: str, head: Callable[[], str]) -> None:
        """View a runner's things, of whose totals `counted` is one; `head` returns the totals, with " | " between."""
        self._runner, self._counted, self._head = runner, counted, head
        runner.record.keep_latest()
        self._encoding, self._is_utf = sys.stderr.encoding or "ascii", console.is_utf(sys.stderr)
        plain = bool(os.environ.get("NO_COLOR"))  # https://no-color.org
        settings: dict[str, Any] = {"force_terminal": True, "legacy_windows": False, "highlight": False}
        self._rich = Console(file=io.StringIO(), color_system=None if plain else "standard", **settings)

    @contextlib.contextmanager
    def shown(self, events: EventQueue, output: console.OutputWriter) -> Iterator[None]:
        """Show it while the block runs, in place of the log."""
        from iot_elf.screen import DeferredLog, Screen

        due = 0.0

        def draw() -> None:
            nonlocal due
            if (now := time.monotonic()) >= due:
                began = time.thread_time()  # on a busy machine, much less of it passes
                screen.draw(lambda width, height: self.frame(width, height, kept.warnings))
                due = now + max(defaults.REDRAW_INTERVAL_S, (time.thread_time() - began) / MAX_LOAD)

        with DeferredLog(output) as kept, Screen(events, output) as screen:
            events.on_idle = draw
            try:
                yield
            finally:
                events.on_idle = None

    def frame(self, width: int, height: int, warnings: Sequence[tuple[str, str]] = ()) -> str:
        """Return what draws the view in a terminal of that size, over what is there."""
        now, head = time.monotonic(), self._head_lines(width)
        rows = self.rows(now)
        warned = [Text(self._fit(line, width), style) for line, style in [*warnings][-max(1, height // 4) :]]
        room = max(1, height - len(head) - 1 - len(warned))
        shown, more = (rows, []) if len(rows) <= room else (rows[: room - 1], rows[room - 1 :])
        lines = [*head, *self._table(shown, width, now)]
        if more:
            states = collections.Counter(row.state for row in more)
            which = ", ".join(
                f"{states[state]} {state}" if len(states) > 1 else state for state in STATES if states[state]
            )
            lines.append(Text(self._fit(f"and {len(more)} more: {which}", width), "dim"))
        lines += [Text(" " * width)] * (height - len(lines) - len(warned))
        with self._rich.capture() as drawn:
            body = Text("\n").join([*lines, *warned][:height])
            self._rich.print(body, no_wrap=True, overflow="ignore", crop=False, end="")
        return "".join(f"\x1b[{number};1H{line}" for number, line in enumerate(drawn.get().split("\n"), 1))

    def rows(self, now: float) -> list[Row]:
        """Return the things, those that matter first, and the others in their order."""
        record, devices = self._runner.record, self._runner.devices
        things = [*devices, *sorted(record.failed - devices.keys())]
        order = list(STATES)
        return sorted(
            (Row.of(it, devices.get(it), record, now) for it in things), key=lambda row: order.index(row.state)
        )

    def _fit(self, text: str, width: int) -> str:
        """Return a text in what the terminal can show, cut or filled up to a width."""
        text = text.encode(self._encoding, "backslashreplace").decode(self._encoding)
        if cell_len(text) > width:
            text = set_cell_size(text, max(0, width - 1)) + ("…" if self._is_utf else "~")
        return text + " " * (width - cell_len(text))

    def _head_lines(self, width: int) -> list[Text]:
        latency = self._runner.record.latency
        parts = printable(redacted(self._head())).split(" | ")
        if latency.count:
            parts.append(f"worst latency {latency_text(latency.max_ms / 1000)}")
        lines = parts[:1]
        for part in parts[1:]:
            if len(lines[-1]) + len(part) + 3 <= width:
                lines[-1] += f" | {part}"
            else:
                lines.append(part)
        return [Text(self._fit(line, width), "bold") for line in lines]

    def _table(self, rows: Sequence[Row], width: int, now: float) -> Iterator[Text]:
        """Yield the lines of the table: the messages get the room that the other columns leave."""
        gap, longest = " " * (1 if width < WIDE else 2), max(8, width // 6)
        cells = [("thing", "state", self._counted, "per s", "latency", "ago"), *(self._cells(row, now) for row in rows)]
        cells = [(name if len(name) <= longest else f"..{name[2 - longest :]}", *others) for name, *others in cells]
        name, state, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
        room = max(8, width - name - state - sum(others) - len(gap) * 6)

        def numbers(texts: Sequence[str]) -> str:
            return gap + gap.join(map(str.rjust, texts, others))

        head, *cells = cells
        title = f"{head[0]:{name}}{gap}{head[1]:{state}}{gap}{'last message':{room}}{numbers(head[2:])}"
        yield Text(self._fit(title, width), "reverse")
        for row, texts in zip(rows, cells, strict=True):
            line = Text(f"{texts[0]:{name}}{gap}").append(f"{row.state:{state}}", STATES[row.state]).append(gap)
            line.append_text(self._message(row.thing, room))
            line.append(numbers(texts[2:]))
            line.truncate(width)
            yield line

    def _cells(self, row: Row, now: float) -> tuple[str, ...]:
        """Return the texts of a row, but for its message."""
        counts, latest = self._runner.record.by_thing.get(row.thing), self._latest_of(row.thing)
        times = [at for at, _ in latest.messages.copy()]
        rate = rate_of(times, now)
        took_s = row.waits_s if row.waits_s > results.STALL_S else latest.took_s
        return (
            *(row.thing, row.state, str(counts[self._counted] if counts else 0)),
            "" if rate is None else f"{rate:.{0 if rate >= 100 else 1 if rate >= 0.1 else 2}f}",
            "" if took_s is None else latency_text(took_s),
            age_text(now - times[-1]) if times else "",
        )

    def _latest_of(self, thing: str) -> LatestMessages:
        return (self._runner.record.latest_of or {}).get(thing) or LatestMessages()

    def _message(self, thing: str, room: int) -> Text:
        """Return the cell of a thing's last message: its number's course, and its text or, if there is no room, it."""
        record = self._runner.record
        if cause := record.failures.cause_of(thing):
            return Text(self._fit(printable(redacted(cause)), room), "red")
        if reason := record.delayed.get(thing):
            return Text(self._fit(reason, room), "yellow")
        payloads = [payload for _, payload in self._latest_of(thing).messages.copy()]
        if not payloads:
            return Text(" " * room)
        last = printable(redacted(on_one_line(decoded(payloads[-1]))))
        if not (number := first_number(payloads[-1])):
            return Text(self._fit(last, room))
        most = metrics.MAX_LATEST if room >= 4 * metrics.MAX_LATEST else min(metrics.MAX_LATEST // 2, max(1, room - 5))
        values = [its.value for its in map(first_number, payloads[-most:]) if its]
        left = max(0, room - most - 1)
        course = f"{sparkline(values, self._is_utf):{min(most, room)}}"
        text = last if number.end <= left else redacted(decoded(payloads[-1][number.start : number.end]))
        return Text().append(course, "cyan").append(f" {self._fit(text, left)}" if left else "")
