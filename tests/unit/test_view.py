"""The table of --view: which things come first, what a message's number is, how it is drawn."""

from __future__ import annotations

import logging
import re
import time
from types import SimpleNamespace
from typing import Any

import pyte
import pytest

from iot_elf import screen, text
from iot_elf.errors import ElfError
from iot_elf.metrics import RunRecord
from iot_elf.text import log
from iot_elf.view import View, age_text, first_number, latency_text, rate_of, sparkline


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b'{"temperature": 20.40, "humidity": 4}', b"20.40"),
        (b'{"msg": "5 hellos", "ts": "1764500000.123"}', None),
        (b'{"ts": 1764500000, "seq": 7, "at": {"x": -1.5e-3}}', b"-1.5e-3"),
        (b'{"name": "7", "a \\" 8": [9, 10]}', b"9"),
        (b"20.5, 21.0", b"20.5"),
        (b"thing_0 v1.2.3 4x", None),
        (b"\xff\x00 12\n", b"12"),
        (b"", None),
        (b'{"cut": "' + b"x" * 500 + b'", 1234567890'[:512], None),
    ],
)
def test_the_first_number_of_a_message_is_neither_its_time_nor_its_count(payload: bytes, text: bytes | None) -> None:
    number = first_number(payload[:512])
    assert (number and payload[number.start : number.end]) == text
    assert number is None or number.value == float(text or 0)


@pytest.mark.parametrize(
    ("values", "drawn", "plain"),
    [
        ([], "", ""),
        ([3], "▄", "-"),
        ([2, 2, 2], "▄▄▄", "---"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█", "_.,-~=+#"),
        ([1e300, -1e300, 0], "█▁▅", "#_~"),
    ],
)
def test_a_sparkline_is_as_high_as_its_values(values: list[float], drawn: str, plain: str) -> None:
    assert (sparkline(values, is_utf=True), sparkline(values, is_utf=False)) == (drawn, plain)


def test_the_rate_falls_when_nothing_comes() -> None:
    times = [0.0, 0.5, 1.0, 1.5]
    assert [rate_of(times, now) for now in (1.5, 1.9, 4.0, 40.0)] == [2.0, 2.0, 1.0, 0.1]
    assert rate_of([1.0], 2.0) is rate_of([], 2.0) is rate_of([1.0, 1.0], 2.0) is None


def test_times_are_short() -> None:
    times = (0.0, 0.00123, 0.0999, 0.5, 0.9994, 1.0, 9.94, 10.0, 99.4, 100.0, 5999.0, 6000.0, 360_000.0)
    latencies = "0.0 ms, 1.2 ms, 99.9 ms, 500 ms, 999 ms, 1.0 s, 9.9 s, 10 s, 99 s, 2 m, 100 m, 2 h, 100 h"
    assert [latency_text(each) for each in times] == latencies.split(", ")
    assert [age_text(each) for each in times[:5]] == ["0.0 s", "0.0 s", "0.1 s", "0.5 s", "1.0 s"]


class Fleet:
    """Things as a runner has them, each in a state of --view, and what they have sent."""

    def __init__(self, states: dict[str, str]) -> None:
        self.record, self.devices = RunRecord(), dict[str, Any]()
        self.view: Any = View(self, "sent", lambda: "sent 5 | 1.0/s | 5 s left")  # type: ignore[arg-type]
        now = time.monotonic()
        for thing, state in states.items():
            outbox = SimpleNamespace(in_flight={}, queued=[(now - 5, None)] if state == "queued" else [])
            online = state not in ("offline", "connecting", "failed")
            if state != "without policy":
                was_connected = state != "connecting"
                self.devices[thing] = SimpleNamespace(
                    is_online=online, was_connected=was_connected, in_outage=False, outbox=outbox
                )
            if state in ("failed", "without policy"):
                self.record.failed.add(thing)
            self.record.note_latency(thing, 1.5 if state == "late" else 0.025)

    def send(self, thing: str, *payloads: bytes) -> None:
        for payload in payloads:
            self.record.count("sent", thing)
            self.record.note_message(thing, payload)

    def shown(self, columns: int = 80, rows: int = 24, *warnings: str) -> list[str]:
        frame = self.view.frame(columns, rows, [(line, "yellow") for line in warnings])
        assert "\n" not in frame
        screen = pyte.Screen(columns, rows)
        pyte.Stream(screen).feed(frame)
        return [line.rstrip() for line in screen.display]


def test_those_that_matter_come_first_and_the_others_in_their_order() -> None:
    states = ("online", "late", "online", "offline", "connecting", "failed", "queued", "without policy", "offline")
    fleet = Fleet({f"thing_{number}": state for number, state in enumerate(states)})
    rows = [(row.thing[-1], row.state) for row in fleet.view.rows(time.monotonic())]
    expected = "5 failed, 7 failed, 3 offline, 8 offline, 4 connecting, 1 late, 6 late, 0 online, 2 online"
    assert ", ".join(map(" ".join, rows)) == expected


def test_of_more_things_than_rows_the_rest_is_counted() -> None:
    fleet = Fleet({f"thing_{number}": "offline" if number in (7, 98) else "online" for number in range(100)})
    lines = fleet.shown(80, 24, "one", "two")
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["thing_7", "offline"],
        ["thing_98", "offline"],
        ["thing_0", "online"],
    ]
    assert lines[-3:] == ["and 81 more: online", "one", "two"]
    assert fleet.shown(80, 3)[2] == "and 100 more: 2 offline, 98 online"
    assert fleet.shown(80, 104)[-1] == ""
    assert not any("more" in line for line in fleet.shown(80, 102))


@pytest.mark.parametrize("columns", [60, 80])
def test_a_number_that_is_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset({"12345678"}))
    fleet = Fleet({"thing_0": "online"})
    fleet.send("thing_0", b'{"name": "%s", "x": 12345678}' % (b"x" * 60))
    assert "***" in (shown := "\n".join(fleet.shown(columns)))
    assert "1234" not in shown


@pytest.mark.parametrize("columns", [1, 20, 40, 60, 80, 100, 200])
def test_no_line_is_longer_than_the_window(columns: int) -> None:
    fleet = Fleet({"thing_0": "failed", "x" * 128: "online", "y_1": "connecting", "z_2": "late"})
    fleet.record.failures.add("thing_0", ElfError("Reason", "thing_0 has no certificate " + "温" * 50, "restore it"))
    fleet.send("x" * 128, *(b'{"temperature": %d}' % number for number in range(20)))
    fleet.send("y_1", "{'msg': '温度温度温度温度温度温度温度温度'}\x1b[2J\r\n".encode())
    fleet.send("z_2", b"\xff\xfe" * 300)
    for rows in (1, 2, 8):
        lines = fleet.shown(columns, rows, "a warning " * 30)
        frame = fleet.view.frame(columns, rows)
        assert len(lines) == rows == frame.count(";1H")
        assert "\x1b[2J" not in frame
    shown = "\n".join(fleet.shown(columns, 12))
    if columns >= 60:
        assert {60: "▁▂▃▄▅▆▇█ 19", 200: "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██ {"}.get(columns, "▁▂▃▄▅▆▇█ {") in shown
        assert "thing_0" in shown


def test_a_terminal_without_utf_8_or_with_no_color_gets_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet({"thing_0": "online"})
    assert re.search("\x1b\\[32monline.+\x1b\\[36m▁█ *\x1b\\[0m {", _frame_of(fleet))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stderr", SimpleNamespace(encoding="ascii"))
    frame = _frame_of(Fleet({"thing_0": "online"}))
    assert frame.isascii()
    assert not re.search("\x1b\\[[0-9;]*m", frame)
    assert "_#" in frame
    assert "\\u6e29" in frame


def _frame_of(fleet: Fleet) -> str:
    fleet.send("thing_0", '{"温": 1}'.encode(), '{"温": 20}'.encode())
    return str(fleet.view.frame(120, 24))


def test_the_log_that_waits_is_bounded_and_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "MAX_LINES", 2)
    monkeypatch.setattr(log, "handlers", [logging.Handler()])
    monkeypatch.setattr(log, "level", logging.INFO)
    written: list[str] = []
    output: Any = SimpleNamespace(write=lambda _, line: written.append(line))
    with screen.DeferredLog(output):
        for number in range(5):
            log.warning("%d", number)
        assert not written
    assert written == ["(3 earlier lines of the log are left out)\n", "3\n", "4\n"]
