"""Log lines and JSON come out in order, whatever their reader does; the live line is right to the column."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.program import Limits, constant

from iot_elf import console, defaults, text
from iot_elf.console import EventWriter, LogFormatter, OutputWriter
from iot_elf.events import EventQueue, Interrupted

from .stand_ins import Clock, logged

PATIENCE_S = 10.0


class Stream:
    """A stream that is no terminal, whose reader takes what it is given, waits until it may, or is gone."""

    def __init__(self, error: Exception | None = None) -> None:
        self.written: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self.error, self.began = error, threading.Event()

    def write(self, what: str) -> None:
        self.began.set()
        assert self.may_read.wait(PATIENCE_S)
        if self.error:
            raise self.error
        self.written.append(what)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise ValueError("it has no descriptor")


# Output


def test_output_comes_out_in_order() -> None:
    stream, other, writer = Stream(), Stream(), OutputWriter(EventQueue())
    for number in range(100):
        writer.write((stream, other)[number % 2], str(number))
    assert writer.flush()
    assert [stream.written, other.written] == [[str(number) for number in range(first, 100, 2)] for first in (0, 1)]


def test_a_slow_reader_stops_elf_only_when_megabytes_are_unread(limits: Limits) -> None:
    """Over 10 characters, 15 are unread, and it waits until half of 10 are."""
    assert constant("MAX_UNREAD") == 8 * 1024 * 1024
    limits(MAX_UNREAD=10)
    stream, writer, done = Stream(), OutputWriter(EventQueue()), list[int]()
    stream.may_read.clear()

    def write() -> None:
        for number in range(4):
            writer.write(stream, "five.")
            done.append(number)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    wait_until(lambda: len(done) == 3)  # 10 characters are not more than 10; 15 are
    time.sleep(0.02)
    assert (len(done), writer._data.unread) == (3, 15)
    stream.may_read.set()
    thread.join(PATIENCE_S)
    assert writer.flush()
    assert (len(done), writer._data.unread, stream.written) == (4, 0, ["five."] * 4)


def test_the_live_line_follows_what_was_written_before_it_and_a_slow_reader_gets_its_last_state_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, writer = Stream(), OutputWriter(EventQueue())
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setattr(console, "is_in_background", lambda: False)
    stream.may_read.clear()
    writer.write(stream, "one")
    assert stream.began.wait(PATIENCE_S)
    writer.write(stream, "two")
    for number in range(3):
        writer.draw(f"[{number}]")
    writer.write(stream, "three")
    writer.draw("")
    stream.may_read.set()
    assert writer.flush()
    assert "".join(stream.written).split(console.CLEAR_LINE) == ["", "one", "two[2]", "three[2]", ""]


def wait_until(is_so: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_after_ctrl_c_nobody_waits_for_a_slow_reader(limits: Limits) -> None:
    limits(MAX_UNREAD=10)
    events, stream = EventQueue(), Stream()
    stream.may_read.clear()
    writer = OutputWriter(events)
    events.interrupt(2, None)
    for _ in range(9):
        writer.write(stream, "five.")
    assert writer._data.unread == 45
    stream.may_read.set()


@pytest.mark.parametrize(
    ("error", "signum", "cause", "status"),
    [
        (OSError(errno.EPIPE, "closed"), 13, "the reader of standard output closed it", 141),
        (OSError(errno.EIO, "the terminal is gone"), 13, "the reader of standard output closed it", 141),
        (OSError(errno.ENOSPC, "full"), None, "the disk is full: [Errno 28] full: 'standard output'", 1),
        (
            ValueError("what is this"),
            None,
            "operating system error: [Errno 22] what is this: 'standard output'",
            1,
        ),
    ],
)
def test_a_reader_that_is_gone_ends_elf_and_another_failure_is_remembered(
    error: Exception, signum: int | None, cause: str, status: int
) -> None:
    events, stream = EventQueue(), Stream(error)
    writer = OutputWriter(events)
    for _ in range(2):
        writer.write(stream, "line\n")
    assert writer.flush()
    assert events.signum == signum
    failure = writer.failure_of(stream)
    assert failure
    assert (failure.cause, console.status_of(failure)) == (cause, status)
    assert writer.failure_of(sys.stderr) is None


def test_a_failure_of_standard_error_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(OSError(errno.ENOSPC, "full"))
    monkeypatch.setattr("sys.stderr", stream)
    writer = OutputWriter(EventQueue())
    writer.write(stream, "line\n")
    writer.flush()
    failure = writer.failure_of(stream)
    assert failure
    assert "'standard error'" in failure.cause


def test_output_that_is_read_is_waited_for_and_after_ctrl_c_for_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert defaults.STOP_S == 4.0
    clock = Clock(monkeypatch, console, now=0.0)
    events, stream = EventQueue(), Stream()
    stream.may_read.clear()
    writer = OutputWriter(events)
    writer.write(stream, "line\n")
    assert stream.began.wait(PATIENCE_S)
    interrupted_at = 100.0

    class Condition:
        """Of something unread, whose waits move the clock."""

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self, timeout_s: float) -> None:
            assert timeout_s == defaults.REDRAW_INTERVAL_S
            clock.now += timeout_s
            if clock.now >= interrupted_at and events.signum is None:
                events.interrupt(2, None)

    changed, writer._changed = writer._changed, Condition()  # type: ignore[assignment]
    assert not writer.flush()
    assert clock.now == pytest.approx(interrupted_at + 2.0, abs=0.21)
    writer._changed = changed
    stream.may_read.set()
    clock.now = 0.0
    assert writer.flush()


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("json", ['{"event": "created", "thingName": "t", "key": "***"}\n']),
        ("payload", [b"\x00\xff\n"]),
        (None, []),
        ("text", []),
    ],
)
def test_standard_output_has_events_or_messages(
    monkeypatch: pytest.MonkeyPatch, form: str | None, written: list[Any]
) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset({"a-secret"}))
    stream: Any = Stream()
    stream.buffer = stream
    monkeypatch.setattr("sys.stdout", stream)
    output = OutputWriter(EventQueue())
    writer = EventWriter(form, output)
    writer.put("created", thingName="t", key="a-secret")
    writer.put_payload(b"\x00\xff")
    output.flush()
    assert stream.written == written
    assert writer.is_on is (form == "json")


def test_output_that_failed_is_an_error_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Stream(OSError(errno.ENOSPC, "full")))
    output = OutputWriter(EventQueue())
    writer = EventWriter("json", output)
    writer.put("created")
    output.flush()
    with pytest.raises(OSError, match="full"):
        writer.put("created")
    writer.put("summary")


# The live line


@pytest.mark.parametrize(
    ("done", "total", "took_s", "line"),
    [
        (0, 8, 0.0, "create:   0%|          | 0/8 [00:00<?, ? things/s]"),
        (0, 8, 5.0, "create:   0%|          | 0/8 [00:05<?, ? things/s]"),
        (2, 8, 0.9, "create:  25%|███▌          | 2/8 [00:00<?, ? things/s]"),
        (2, 8, 1.0, "create:  25%|█▊     | 2/8 [00:01<00:03, 2.0 things/s]"),
        (4, 8, 60.0, "create:  50%|███▌   | 4/8 [01:00<01:00, 0.1 things/s]"),
        (8, 8, 4.0, "create: 100%|███████| 8/8 [00:04<00:00, 2.0 things/s]"),
    ],
)
def test_the_progress_bar_is_right_to_an_eighth_of_a_column(done: int, total: int, took_s: float, line: str) -> None:
    assert console.progress_bar("create", done, total, took_s, len(line), in_utf=True) == line


def test_a_plain_terminal_gets_a_plain_bar_and_a_narrow_one_none() -> None:
    assert console.progress_bar("clean", 4, 8, 2.0, 52, in_utf=False) == (
        "clean:  50%|###    | 4/8 [00:02<00:02, 2.0 things/s]"
    )
    assert "||" in console.progress_bar("clean", 4, 8, 2.0, 10, in_utf=True)


@pytest.mark.parametrize(("width", "done"), [*itertools.product((60, 73, 80), (1, 3, 7))])
def test_the_bar_fills_the_line(width: int, done: int) -> None:
    assert len(console.progress_bar("policies", done, 7, 1.0, width, in_utf=True)) == width


@pytest.mark.parametrize(
    ("duration_s", "shown"), [(0.9, "00:00"), (59.9, "00:59"), (60.0, "01:00"), (3599.0, "59:59"), (6000.0, "100:00")]
)
def test_a_clock_shows_minutes_and_seconds(duration_s: float, shown: str) -> None:
    assert console.clock(duration_s) == shown


class Drawing:
    """An output writer that writes down what it is to draw."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def draw(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(
    ("is_terminal", "level", "is_drawn"),
    [
        (True, logging.INFO, True),
        (True, defaults.VERBOSE, True),
        (True, logging.DEBUG, False),
        (True, logging.WARNING, False),
        (False, logging.INFO, False),
    ],
)
def test_the_live_line_is_drawn_on_a_terminal_five_times_a_second_and_cleared(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, level: int, is_drawn: bool
) -> None:
    clock = Clock(monkeypatch, console)
    monkeypatch.setattr(console, "on_terminal", lambda: is_terminal)
    monkeypatch.setattr(console, "terminal_width", lambda stream: 5)
    events, output = EventQueue(), Drawing()
    with logged(level), console.live_line(events, output, lambda: f"{clock.now:.1f} and more"):  # type: ignore[arg-type]
        assert bool(events.on_idle) is is_drawn
        for _ in range(6 if events.on_idle else 0):
            assert events.on_idle
            events.on_idle()
            clock.now += 0.15
    assert output.lines == (["1000", "1000", "1000"] if is_drawn else []) + [""]
    assert events.on_idle is None


@pytest.mark.parametrize(("total", "has_bar"), [(5, False), (6, True)])
def test_few_things_need_no_progress_bar(monkeypatch: pytest.MonkeyPatch, total: int, has_bar: bool) -> None:
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    events, output, drawn = EventQueue(), Drawing(), list[bool]()
    with logged(logging.INFO):
        steps: Iterator[int] = console.with_progress_bar(events, output, "create", range(total), total)  # type: ignore[arg-type]
        for step in steps:
            drawn.append(bool(events.on_idle))
            if events.on_idle:
                events.on_idle()
            assert step == len(drawn) - 1
    assert drawn == [has_bar] * total
    if has_bar:
        assert output.lines[0].startswith("create:   0%|")
        assert f" 0/{total} " in output.lines[0]


# Log lines


def record(message: str, *arguments: object, level: int = logging.INFO) -> logging.LogRecord:
    made = logging.LogRecord("iot-elf", level, "file", 1, message, arguments, None)
    made.created, made.msecs = 1_700_000_000.0, 123.0
    return made


def test_a_log_line_has_its_time_in_utc_and_neither_secrets_nor_control_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset({"a-secret"}))
    line = LogFormatter().format(record("%s said\n%s", "a-secret", "\x1b[2J"))
    assert line == "2023-11-14 22:13:20,123:iot-elf:INFO - *** said\\n\\x1b[2J"


@pytest.mark.parametrize("columns", range(20, 60))
def test_a_line_that_is_cut_for_the_terminal_shows_no_half_of_a_secret(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset({"s3cret-password"}))
    monkeypatch.setattr(console, "terminal_width", lambda stream: columns)
    made = record("posting '%s' to %s", "begin s3cret-password end", "a-topic")
    made.name = text.detail_log.name
    assert "s3" not in console.TerminalFormatter(coloured=False).format(made)


@pytest.mark.parametrize(
    ("level", "logs_from", "may_be_cut", "is_cut"),
    [
        (logging.WARNING, logging.INFO, True, True),
        (logging.WARNING, logging.INFO, False, False),  # it may have a command
        (logging.WARNING, defaults.VERBOSE, True, False),
        (logging.INFO, logging.INFO, False, False),
    ],
)
def test_of_other_lines_only_those_that_end_in_a_message_are_cut(
    monkeypatch: pytest.MonkeyPatch, level: int, logs_from: int, may_be_cut: bool, is_cut: bool
) -> None:
    monkeypatch.setattr(console, "terminal_width", lambda stream: 40)
    made = record("not acknowledged: message 1 of thing_0 on a-topic: 'text'", level=level)
    made.may_be_cut = may_be_cut
    with logged(logs_from):
        shown = console.TerminalFormatter(coloured=True).format(made)
    assert shown.endswith(("…\x1b[0m" if is_cut else "'text'\x1b[0m") if level == logging.WARNING else "'text'")


class Piped(Stream):
    """A stream with a descriptor, which is no other's."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(error)
        self._pipe = os.pipe()

    def fileno(self) -> int:
        return self._pipe[1]


def test_a_reader_of_one_stream_that_stalls_holds_up_the_other_only_if_they_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error in (Piped(), Stream()):
        out: Any = Piped()
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", error)
        out.may_read.clear()
        writer = OutputWriter(EventQueue())
        writer.write(out, "data")
        assert out.began.wait(PATIENCE_S)
        writer.write(error, "line")
        if isinstance(error, Piped):
            wait_until(lambda error=error: error.written)
        else:  # nobody knows
            time.sleep(0.02)
            assert error.written == []
        out.may_read.set()
        assert writer.flush()
        assert error.written == ["line"]


class Pausing:
    """An event loop whose thread is this one."""

    is_current: Any = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.resume = lambda: self.calls.append("resume")

    def pause(self, unread: str) -> None:
        self.calls.append(f"pause: {unread}")

    def call_soon_threadsafe(self, function: Any) -> None:
        function()


def test_an_event_loop_never_waits_for_a_reader_and_is_told_when_to_stop_and_to_go_on(limits: Limits) -> None:
    limits(MAX_UNREAD=10)
    stream, loop, writer = Stream(), Pausing(), OutputWriter(EventQueue())
    writer.pause_instead(loop)  # type: ignore[arg-type]
    stream.may_read.clear()
    for _ in range(4):
        writer.write(stream, "five.")
    assert loop.calls == ["pause: standard output"] * 2  # over 10 characters, at each
    stream.may_read.set()
    assert writer.flush()
    assert loop.calls == ["pause: standard output"] * 2 + ["resume"]


def test_an_event_loop_does_not_wait_for_a_thread_that_logs_and_waits_for_a_reader(
    monkeypatch: pytest.MonkeyPatch, limits: Limits
) -> None:
    limits(MAX_UNREAD=10)
    stream: Any = Stream()
    monkeypatch.setattr("sys.stderr", stream)
    writer, loop_thread = OutputWriter(EventQueue()), threading.current_thread()

    class Loop(Pausing):
        @property
        def is_current(self) -> bool:
            return threading.current_thread() is loop_thread

    writer.pause_instead(Loop())  # type: ignore[arg-type]
    with logged():
        console.start_logging(logging.INFO, writer)
        stream.may_read.clear()
        text.log.info("more than ten characters")
        other = threading.Thread(target=text.log.info, args=["of another thread"], daemon=True)
        other.start()
        time.sleep(0.02)
        text.log.info("of the loop's")
        assert other.is_alive()
        stream.may_read.set()
        other.join(PATIENCE_S)
    assert writer.flush()
    lines = [line.partition(" - ")[2] for line in stream.written]
    assert lines == ["more than ten characters\n", "of the loop's\n", "of another thread\n"]


def test_of_many_things_only_totals_are_shown_and_the_first_twenty_failures() -> None:
    assert constant("MAX_LISTED") == 20
    try:
        with logged(logging.INFO) as lines:
            console.hide_details_above(20)
            assert console.shows_details()
            console.hide_details_above(21)
            assert not console.shows_details()
            console.hide_details_above(21)
            text.detail_log.info("a message")
            for number in range(25):
                text.detail_log.warning("failure %d", number)
            text.log.info("a total")
        failures = [f"WARNING failure {number}" for number in range(20)]
        more = "WARNING more lines like these are not shown (--verbose shows them)"
        assert lines == ["INFO 21 things: showing totals only (--verbose shows each)", *failures, more, "INFO a total"]
    finally:
        text.detail_log.filters.clear()


def test_all_is_shown_if_asked_for() -> None:
    with logged(defaults.VERBOSE) as lines:
        console.hide_details_above(1000)
        text.detail_log.info("a message")
    assert lines == ["INFO a message"]


# A code


class Terminal:
    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self._lines.pop(0) if self._lines else ""

    def fileno(self) -> int:
        raise OSError


@pytest.mark.parametrize(
    ("typed", "code"),
    [("123456\n", "123456"), (" 123456 \n", "123456"), ("12345\n", None), ("1234567\n", None), ("12345x\n", None)],
)
def test_an_mfa_code_has_six_digits(monkeypatch: pytest.MonkeyPatch, typed: str, code: str | None) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    monkeypatch.setattr("sys.stderr", Terminal())
    with logged() as lines:
        if code:
            assert console.ask_for_code(EventQueue(), "Enter MFA code for me: ") == code
        else:
            with pytest.raises(console.ElfError, match="six digits"):
                console.ask_for_code(EventQueue(), "Enter MFA code for me: ")
    assert lines == ["INFO Enter MFA code for me"]


def test_without_a_terminal_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("123456\n"))
    monkeypatch.setattr("sys.stderr", Stream())
    with pytest.raises(console.ElfError, match="this is not a terminal"):
        console.ask_for_code(EventQueue(), "Enter MFA code for me: ")


def test_ctrl_c_ends_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    class Silent(Terminal):
        def readline(self) -> str:
            asked.set()
            answer.wait(PATIENCE_S)
            return ""

    monkeypatch.setattr("sys.stdin", Silent())
    monkeypatch.setattr("sys.stderr", Terminal())
    events = EventQueue()
    threading.Thread(target=lambda: asked.wait(PATIENCE_S) and events.interrupt(2, None), daemon=True).start()
    with logged(), pytest.raises(Interrupted):
        console.ask_for_code(events, "code: ")
    answer.set()


def test_an_event_is_a_line_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr("sys.stdout", stream)
    output = OutputWriter(EventQueue())
    EventWriter("json", output).put("published", payload="a\nb", number=1)
    output.flush()
    assert [json.loads(line) for line in stream.written] == [{"event": "published", "payload": "a\nb", "number": 1}]
