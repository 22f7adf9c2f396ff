"""An event loop for unit tests, without a thread and without sockets."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

from .stand_ins import Clock


class Loop:
    """In place of an EventLoop: what it is asked to call is called by run(), in the caller's thread."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.connects: list[tuple[float, Callable[[], None]]] = []  # after how long, and what
        self.connections: list[Any] = []  # the stand-ins of Connection that were made in it
        self.joins_s: list[float] = []  # how long each join() would have waited
        self.is_closed = self.is_paused = False
        self.paused_s, self.paused_s_ago = 0.0, math.inf
        self.waiting: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def call_soon_threadsafe(self, function: Callable[..., object], *arguments: Any) -> None:
        self.call_at(self.clock.now, function, *arguments)

    def call_at(self, due: float, function: Callable[..., object], *arguments: Any) -> None:
        heapq.heappush(self.waiting, (due, next(self._numbers), function, arguments))

    def connect_in_turn(self, connect: Callable[[], None], after_s: float) -> None:
        self.connects.append((after_s, connect))

    def resume(self) -> None:
        self.is_paused = False

    def close(self) -> None:
        self.is_closed = True

    def join(self, patience_s: float) -> None:
        self.joins_s.append(patience_s)
        self.run(patience_s)

    def run(self, seconds: float = 0.0) -> None:
        """Let time pass, and call what is due meanwhile, at its time."""
        end = self.clock.now + seconds
        while self.waiting and self.waiting[0][0] <= end and not self.is_closed:
            due, _, function, arguments = heapq.heappop(self.waiting)
            self.clock.now = max(self.clock.now, due)
            function(*arguments)
        self.clock.now = max(self.clock.now, end)
