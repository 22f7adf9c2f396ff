# SPDX-License-Identifier: Apache-2.0
"""Log lines, JSON lines, the live line."""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import json
import logging
import math
import os
import queue
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from iot_elf import defaults
from iot_elf.defaults import T
from iot_elf.errors import ElfError, explained, log_failure
from iot_elf.events import EventQueue
from iot_elf.mqtt import EventLoop
from iot_elf.text import detail_log, log, plural, printable, redacted, redacted_values, report_log, short_path

MIN_FOR_PROGRESS = 5  # up to this many need no progress bar
MAX_UNREAD = 8 * 1024 * 1024  # characters buffered for a slow reader of a stream: some 50,000 messages
STANDARD_OUTPUT, STANDARD_ERROR = "standard output", "standard error"
READER_GONE = (errno.EPIPE, errno.EIO)  # a pipe's, or a terminal's
SIGPIPE = 13  # as a shell reports it (128 + 13); Windows has no name for it
CLEAR_LINE = "\r\x1b[K\r"  # the line of the terminal in which the cursor stands
LEVEL_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m"}


def on_terminal() -> bool:
    """Return whether standard error is a terminal that can show more than plain lines."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def is_in_background() -> bool:
    """Return whether ELF is in the background: another program uses the terminal, and may draw there."""
    with contextlib.suppress(AttributeError, OSError):  # not on Windows, nor for a pipe
        return os.tcgetpgrp(sys.stderr.fileno()) != os.getpgrp()
    return False


def is_utf(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().startswith("utf")


def terminal_width(stream: TextIO) -> int:
    """Return how many columns a terminal has; 80 if that is unknown."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def open_standard_streams() -> None:
    """Open descriptors 0, 1 and 2 if they are closed (a key file could get such a number), and make them blocking.

    Output to a non-blocking descriptor would be lost when its reader is slow.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest number that is free
        if number and hasattr(os, "set_blocking"):  # Windows has none before Python 3.12
            with contextlib.suppress(OSError):
                os.set_blocking(number, True)
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - it is there to the end


class _Queue:
    """What one file is still to get, in order: streams, what to write to them, and the live line that then follows."""

    def __init__(self) -> None:
        self.waiting: collections.deque[tuple[Any, Any, str]] = collections.deque()
        self.unread = 0  # characters
        self.is_full = False  # from MAX_UNREAD on, until half of that is read
        self.thread: threading.Thread | None = None


class OutputWriter:
    """Writes log lines and JSON, in order, in a thread for each file: a reader that stalls does not stall ELF.

    At most MAX_UNREAD characters are buffered for each. Then callers wait for the reader, or for Ctrl-C; but an event
    loop never does, and stops reading from its connections instead. In a terminal, everything is written above the
    live line, which is drawn while ELF is in the foreground.
    """

    def __init__(self, events: EventQueue) -> None:
        self._events = events
        self._changed = threading.Condition()
        self._log, self._data = _Queue(), _Queue()
        if is_one_file(sys.stdout, sys.stderr):
            self._data = self._log
        self._loop: EventLoop | None = None
        self._status_line, self._has_drawn = "", False
        self._flush_until = math.inf  # time.monotonic()
        self.failures: dict[str, OSError] = {}  # of writes, by the stream's name; EPIPE or EIO: its reader is gone

    def pause_instead(self, loop: EventLoop) -> None:
        """From now on have a loop stop reading while too much is unread, and never wait."""
        self._loop = loop

    def write(self, stream: Any, text: Any) -> None:
        """Write to a stream, in an output thread. Any thread may call this."""
        queue, loop = self._log if stream is sys.stderr else self._data, self._loop
        never_waits = not text or bool(loop and loop.is_current)
        with self._changed:
            while queue.is_full and self._events.signum is None and not never_waits:
                self._changed.wait(
                    defaults.REDRAW_INTERVAL_S
                )  # a signal's handler must not touch a condition, so look for it
            queue.waiting.append((stream, text, self._status_line))
            queue.unread += len(text)
            queue.is_full = queue.is_full or queue.unread > MAX_UNREAD
            if not queue.thread:
                queue.thread = threading.Thread(target=self._work, args=(queue,), daemon=True)
                queue.thread.start()
            self._changed.notify_all()
            if queue.is_full and loop and self._events.signum is None:
                loop.pause(_name(stream))

    def failure_of(self, stream: Any) -> ElfError | None:
        """Return why a standard stream did not get everything, or None: it did, as far as it was written."""
        if not (error := self.failures.get(_name(stream))):
            return None
        if error.errno in READER_GONE:
            remedy = "let it read to the end, or write to a file"
            return ElfError("OutputClosed", f"the reader of {_name(stream)} closed it", remedy)
        return explained(error)

    def draw(self, status_line: str) -> None:
        """Show a line at the bottom of the terminal in place of the one there; empty: none."""
        with self._changed:
            self._status_line, waiting = status_line, self._log.waiting
            if status_line and len(waiting) > 1:  # the first may be on its way; the last brings it, and no text before
                waiting[-1] = (*waiting[-1][:2], status_line)
                return
        self.write(sys.stderr, "")

    def _work(self, queue: _Queue) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: queue.waiting)
                stream, text, status_line = queue.waiting[0]
            try:
                self._show(stream, text, status_line)
            except Exception as error:
                self._fail(stream, error)
            with self._changed:
                queue.waiting.popleft()
                queue.unread -= len(text)
                if queue.is_full and queue.unread <= MAX_UNREAD // 2:
                    queue.is_full = False
                    if self._loop and not (self._log.is_full or self._data.is_full):
                        self._loop.call_soon_threadsafe(self._loop.resume)
                self._changed.notify_all()

    def _fail(self, stream: Any, error: Exception) -> None:
        """Remember a failure, let what follows go nowhere, and end ELF if the stream's reader is gone."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        self.failures.setdefault(_name(stream), OSError(number or errno.EINVAL, reason or str(error), _name(stream)))
        if number in READER_GONE and self._events.signum is None:
            self._events.interrupt(SIGPIPE, None)

    def _show(self, stream: Any, text: Any, status_line: str) -> None:
        if stream is not sys.stderr and self._data is not self._log:
            stream.write(text)
            stream.flush()
            return
        is_seen = on_terminal() and (stream is sys.stderr or stream.isatty())
        if not is_seen or is_in_background():
            status_line = ""
        # What this or another ELF drew there, and ^C.
        clear = CLEAR_LINE if self._has_drawn or (is_seen and text) else ""
        self._has_drawn = bool(status_line)
        if stream is sys.stderr:  # in one write, or another ELF's live line could get in between
            clear, text, status_line = "", clear + text + status_line, ""
        for to, what in ((sys.stderr, clear), (stream, text), (sys.stderr, status_line)):
            if what:
                to.write(what)
                to.flush()

    def flush(self) -> bool:
        """Wait until everything is written, or until STOP_S / 2 after Ctrl-C; return whether everything is."""
        with self._changed:
            while (self._log.waiting or self._data.waiting) and time.monotonic() < self._flush_until:
                self._changed.wait(defaults.REDRAW_INTERVAL_S)
                if self._events.signum is not None:
                    self._flush_until = min(self._flush_until, time.monotonic() + defaults.STOP_S / 2)
            return not (self._log.waiting or self._data.waiting)


def _name(stream: Any) -> str:
    return STANDARD_ERROR if stream is sys.stderr else STANDARD_OUTPUT


def status_of(failure: ElfError) -> int:
    """Return the exit status for a failure of a standard stream."""
    return 128 + SIGPIPE if failure.name == "OutputClosed" else 1


def status_of_write(error: OSError) -> int:
    """Explain why a stream could not be written to, unless its reader closed it; return the exit status."""
    if error.errno in READER_GONE:
        return 128 + SIGPIPE
    log_failure(error)
    return 1


def is_one_file(one: Any, other: Any) -> bool:
    """Return whether two streams end in the same file, or in a terminal each; also if that is unknown."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or no file
        is_same = os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))
        return is_same or (one.isatty() and other.isatty())
    return True


class LogFormatter(logging.Formatter):
    """Writes the original's log lines, in UTC, without control characters or secrets."""

    def __init__(self, line: str = "%(asctime)s:iot-elf:%(levelname)s - %(message)s") -> None:
        super().__init__(line)
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        record.msg, record.args = printable(record.getMessage()), ()  # its line ends too; a traceback keeps its own
        return redacted("\n".join(map(printable, super().format(record).split("\n"))))


class TerminalFormatter(LogFormatter):
    """Writes log lines for a person: the local time and the text, in colour or with its level."""

    def __init__(self, coloured: bool) -> None:
        super().__init__("%(message)s")
        self.converter, self._coloured = time.localtime, coloured

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record.args = tuple(short_path(value) if isinstance(value, Path) else value for value in record.args)
        if shown := getattr(record, "on_terminal", ""):
            record.msg = shown if is_utf(sys.stderr) else shown.replace("→", "->").replace("←", "<-")
        at, colour = self.formatTime(record, "%H:%M:%S"), LEVEL_COLOURS.get(record.levelno)
        text = re.sub(r"\A\[\w+\] ", "", super().format(record))  # the original's functions tell a person nothing
        room = terminal_width(sys.stderr) - len("00:00:00 ")
        is_of_message = record.name == detail_log.name and record.levelno == logging.INFO
        may_be_cut = log.level == logging.INFO and (is_of_message or getattr(record, "may_be_cut", False))
        if len(text) > room and may_be_cut:
            text = f"{text[: room - 1]}…"
        if not self._coloured:
            return f"{at} {record.levelname}: {text}" if colour else f"{at} {text}"
        return f"\x1b[2m{at}\x1b[0m " + (f"{colour}{text}\x1b[0m" if colour else text)


def start_logging(level: int, output: OutputWriter) -> None:
    """Log ELF's own lines to standard error; libraries' logs are not shown."""
    coloured = on_terminal() and not os.environ.get("NO_COLOR")  # https://no-color.org
    if on_terminal() and sys.platform == "win32":
        import colorama

        colorama.just_fix_windows_console()
    handler = logging.Handler()

    def handle(record: logging.LogRecord) -> bool:
        output.write(sys.stderr, handler.format(record) + "\n")
        return True

    # Its own holds a lock during emit(): an event loop would wait for a thread that waits for a reader.
    handler.handle = handle  # type: ignore[method-assign]
    handler.setFormatter(TerminalFormatter(coloured) if sys.stderr.isatty() else LogFormatter())
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level)
    detail_log.filters.clear()

    def log_uncaught(args: threading.ExceptHookArgs) -> None:
        if args.exc_value and not isinstance(args.exc_value, SystemExit):
            log.debug("uncaught exception in a thread:", exc_info=args.exc_value)

    threading.excepthook = log_uncaught  # Python would print it with secrets


def shows_details() -> bool:
    """Return whether a line about each message is shown."""
    return detail_log.isEnabledFor(logging.INFO) and not detail_log.filters


def hide_details_above(things: int) -> None:
    """Hide the lines about single things and messages if there are many things, unless --verbose is given.

    The first MAX_LISTED warnings and errors are still shown.
    """
    if things <= defaults.MAX_LISTED or detail_log.filters or detail_log.isEnabledFor(defaults.VERBOSE):
        return
    log.info("%s: showing totals only (--verbose shows each)", plural(things, "thing"))
    failures = itertools.count()

    def passes(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return False
        if (number := next(failures)) == defaults.MAX_LISTED:
            log.log(record.levelno, "more lines like these are not shown (--verbose shows them)")
        return number < defaults.MAX_LISTED

    detail_log.addFilter(passes)


def hide_messages() -> None:
    """Hide the lines about single things and messages, but for warnings and errors: something else shows them."""
    detail_log.addFilter(lambda record: record.levelno >= logging.WARNING)


@contextlib.contextmanager
def live_line(events: EventQueue, output: OutputWriter, text: Callable[[], str]) -> Iterator[None]:
    """Show the line that `text` returns at the bottom of the terminal, if there is one, while the block runs.

    Not with --debug or --quiet.
    """
    drawn_at = 0.0

    def draw() -> None:
        nonlocal drawn_at
        if time.monotonic() > drawn_at + defaults.REDRAW_INTERVAL_S:
            drawn_at = time.monotonic()
            output.draw(redacted(text())[: terminal_width(sys.stderr) - 1])

    if on_terminal() and log.isEnabledFor(logging.INFO) and not log.isEnabledFor(logging.DEBUG):
        events.on_idle = draw
    try:
        yield
    finally:
        events.on_idle = None
        output.draw("")


def progress_bar(what: str, done: int, total: int, took_s: float, width: int, in_utf: bool) -> str:
    """Return a line of `width` characters, in eighths of one if `in_utf`: create:  25%|██▌   | 2/8 [00:01<00:03, …]."""
    left = rate = "?"
    if done and took_s >= 1:  # sooner, both would be invented
        left, rate = clock(took_s / done * (total - done)), f"{done / took_s:.1f}"
    begin, end = f"{what}: {100 * done // total:3}%|", f"| {done}/{total} [{clock(took_s)}<{left}, {rate} things/s]"
    room, blocks = max(0, width - len(begin) - len(end)), "▏▎▍▌▋▊▉█" if in_utf else "#"
    full, part = divmod(room * len(blocks) * done // total, len(blocks))
    return f"{begin}{(blocks[-1] * full + blocks[part - 1 : part]).ljust(room)}{end}"


def clock(duration_s: float) -> str:
    """Return a duration as a clock shows it: minutes and seconds."""
    return "{:02}:{:02}".format(*divmod(int(duration_s), 60))


def with_progress_bar(
    events: EventQueue, output: OutputWriter, what: str, steps: Iterable[T], total: int
) -> Iterator[T]:
    """Iterate over `steps`, with a progress bar as live line if there are more than MIN_FOR_PROGRESS."""
    done, began = 0, time.monotonic()

    def bar() -> str:
        width = terminal_width(sys.stderr) - 1
        return progress_bar(what, done, total, time.monotonic() - began, width, is_utf(sys.stderr))

    with live_line(events, output, bar) if total > MIN_FOR_PROGRESS else contextlib.nullcontext():
        for step in steps:
            yield step
            done += 1


class EventWriter:
    """Writes standard output: with --output json, one JSON object per line, the last a summary; with --output payload,
    the messages that arrive."""

    def __init__(self, form: str | None, output: OutputWriter) -> None:
        self.is_on, self._has_payloads = form == "json", form == "payload"
        self.has_failed = False  # a write, whose error was raised
        self._output = output

    def put(self, event: str, **fields: Any) -> None:
        """Write an event. Raises the OSError of an earlier write."""
        if self.is_on:
            self._write(sys.stdout, json.dumps({"event": event, **redacted_values(fields)}) + "\n")

    def put_payload(self, payload: bytes) -> None:
        """Write a message as is. Raises the OSError of an earlier write."""
        if self._has_payloads:
            self._write(sys.stdout.buffer, payload + b"\n")

    def _write(self, stream: Any, text: str | bytes) -> None:
        error = self._output.failures.get(STANDARD_OUTPUT)
        if error and error.errno not in READER_GONE:
            self.is_on, self._has_payloads, self.has_failed = False, False, True
            raise error
        self._output.write(stream, text)


def ask_for_code(events: EventQueue, prompt: str) -> str:
    """Ask for an MFA code on the terminal; any thread may. Raises ElfError without a terminal; Interrupted."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()) or is_in_background():
        raise ElfError(
            "NoTerminal",
            f"could not ask for an MFA code: this is not a terminal ({prompt.strip(': ')})",
            "run the command in a terminal, or set credentials that need no code: `aws configure export-credentials`",
        )
    report_log.info("%s", prompt.strip(": "))
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(sys.stdin.readline().strip()), daemon=True).start()
    while answers.empty():
        events.check()
        events.stopping.wait(defaults.REDRAW_INTERVAL_S)
    if not re.fullmatch("[0-9]{6}", code := answers.get()):
        raise ElfError("BadMfaCode", "an MFA code has six digits", "run the command again")
    return code


def is_input_unread(given: Path | None) -> bool:
    """Return whether standard input is a pipe with data, or a file at its beginning, and not what `given` names.

    A file that a shell's loop reads from is not at its beginning.
    """
    with contextlib.suppress(ImportError, OSError):  # Windows
        import fcntl
        import termios

        about = os.fstat(0)
        if str(given) == "-" or (given and os.path.samestat(about, given.stat())):
            return False
        if stat.S_ISFIFO(about.st_mode) or (stat.S_ISREG(about.st_mode) and not os.lseek(0, 0, os.SEEK_CUR)):
            return fcntl.ioctl(0, termios.FIONREAD, bytes(4)) != bytes(4)
    return False
