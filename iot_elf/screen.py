# SPDX-License-Identifier: Apache-2.0
"""The terminal's second screen, and the log that waits meanwhile: only with --view."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable

from iot_elf import console
from iot_elf.events import EventQueue
from iot_elf.text import log, report_log

MAX_WARNINGS = 3
MAX_LINES = 10_000  # of the log, that wait: some 2 MB
# What was in the terminal before comes back; in between it has no cursor, and wraps no lines.
ENTER, CLEAR, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[2J", "\x1b[?7h\x1b[?25h\x1b[?1049l"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class DeferredLog:
    """Keeps the lines of the log while the view is shown: its last warnings are in the view, and all follow later."""

    def __init__(self, output: console.OutputWriter) -> None:
        self.warnings: collections.deque[tuple[str, str]] = collections.deque(maxlen=MAX_WARNINGS)  # and their colours
        self._output, self._handler = output, log.handlers[0]
        self._lines: collections.deque[str] = collections.deque(maxlen=MAX_LINES)
        self._count = 0  # of all lines

    def _keep(self, record: logging.LogRecord) -> bool:
        line = self._handler.format(record)
        self._lines.append(f"{line}\n")
        self._count += 1
        if record.levelno >= logging.WARNING or record.name == report_log.name:  # which asks for an MFA code
            self.warnings.append(
                (_COLOURS.sub("", line).replace("\n", " "), "red" if record.levelno >= logging.ERROR else "yellow")
            )
        return True

    def _write(self) -> None:
        if (left_out := self._count - len(self._lines)) > 0:
            self._output.write(sys.stderr, f"({left_out} earlier lines of the log are left out)\n")
        self._count = 0
        while self._lines:
            self._output.write(sys.stderr, self._lines.popleft())

    def __enter__(self) -> DeferredLog:
        self._handle, self._handler.handle = self._handler.handle, self._keep  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        self._handler.handle = self._handle  # type: ignore[method-assign]
        self._write()  # what other threads logged in between


class Screen:
    """The terminal's second screen, while ELF is in the foreground; left at the end, and while Ctrl-Z stops ELF."""

    def __init__(self, events: EventQueue, output: console.OutputWriter) -> None:
        self._events, self._output = events, output
        self._size: os.terminal_size | None = None  # None: it is not shown
        self._is_to_stop = False

    def draw(self, frame: Callable[[int, int], str]) -> None:
        """Show what `frame` returns for a width and a height; stop where Ctrl-Z asked for it."""
        if self._is_to_stop:
            self._stop()
        if console.is_in_background():
            return
        try:
            size = os.get_terminal_size(sys.stderr.fileno())
        except OSError:  # it is gone
            return
        size = size if size.columns and size.lines else os.terminal_size((80, 24))
        if size != self._size:
            self._output.draw("")  # or what was drawn for the other size would follow
            self._output.write(sys.stderr, CLEAR if self._size else ENTER + CLEAR)
            self._size = size
        self._output.draw(f"{frame(*size)}\x1b[H")

    def leave(self) -> None:
        self._output.draw("")
        if self._size:
            self._size = None
            self._output.write(sys.stderr, LEAVE)

    def _ask_to_stop(self, *_: object) -> None:
        self._is_to_stop = True
        self._events.put(None)

    def _stop(self) -> None:
        self._is_to_stop = False
        self.leave()
        self._output.flush()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # the shell goes on here, and this line with its `fg`
        signal.signal(signal.SIGTSTP, self._ask_to_stop)

    def __enter__(self) -> Screen:
        with contextlib.suppress(AttributeError, ValueError):  # Windows; not the main thread
            if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, self._ask_to_stop)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        with contextlib.suppress(AttributeError, ValueError):
            if signal.getsignal(signal.SIGTSTP) == self._ask_to_stop:
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)
