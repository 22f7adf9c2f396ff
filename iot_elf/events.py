# SPDX-License-Identifier: Apache-2.0
"""What a command waits for: its things, Ctrl-C, a deadline."""

from __future__ import annotations

import contextlib
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from iot_elf import defaults

# A second signal so soon is no other one: `timeout` and service managers signal a process, and then its group.
SAME_SIGNAL_S, SAME_CTRL_C_S = 0.5, 0.05  # nobody presses it twice as fast


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The user pressed Ctrl-C, the system asked ELF to end (SIGTERM), or the output's reader closed it (SIGPIPE)."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class EventQueue:
    """Where a command's main thread waits for events of its devices, for Ctrl-C, or until a deadline.

    Other threads put immutable records in.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.signum: int | None = None
        self._signalled_at = math.inf  # time.monotonic()
        # Only for other threads' waits: a signal during wait() in the main thread would block in set().
        self.stopping = threading.Event()
        self.on_idle: Callable[[], None] | None = None  # called at each get(), and repeatedly while it waits

    def put(self, event: Any) -> None:
        self._events.put(event)

    def interrupt(self, signum: int, _frame: object) -> None:
        """Handle a signal: after the first, running calls finish and are recorded; a second stops immediately.

        Those within a moment are one.
        """
        if self.signum is not None:
            moment_s = SAME_CTRL_C_S if signum == signal.SIGINT else SAME_SIGNAL_S
            if time.monotonic() > self._signalled_at + moment_s:
                raise KeyboardInterrupt
            return
        self.signum, self._signalled_at = signum, time.monotonic()
        self.stopping.set()
        self._events.put(None)  # ends a get(); SimpleQueue.put() is safe in a signal handler

    def check(self, **_: object) -> None:
        """Raise Interrupted if the user asked to stop. Any thread may call this, and botocore before it sends."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def get(self, deadline: float) -> Any:
        """Return the next event, or None once `deadline` (time.monotonic()) is past; raise Interrupted."""
        while True:
            self.check()
            if self.on_idle:
                self.on_idle()
            wait_s = deadline - time.monotonic()
            try:  # not for long: Windows can't interrupt a wait
                if (event := self._events.get(timeout=max(0.0, min(defaults.REDRAW_INTERVAL_S, wait_s)))) is not None:
                    return event
            except queue.Empty:
                if wait_s <= defaults.REDRAW_INTERVAL_S:
                    return None

    def drain(self) -> Iterator[Any]:
        """Yield the events that are there, without waiting, even after Ctrl-C."""
        while not self._events.empty():
            if (event := self._events.get()) is not None:
                yield event


@contextlib.contextmanager
def signals_to(events: EventQueue) -> Iterator[None]:
    """Send signals to the event queue, except those that the caller ignores (a shell's background job, nohup)."""
    before = {}
    # Windows has only the last, Ctrl-Break, besides SIGINT: no SIGHUP, and no way to send a SIGTERM.
    wanted = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    for signum in (getattr(signal, name) for name in wanted if hasattr(signal, name)):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not in the main thread
                before[signum] = signal.signal(signum, events.interrupt)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
