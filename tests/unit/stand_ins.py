"""What unit tests put in the place of the clock, of the log, and of what AWS answers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from iot_elf import text
from iot_elf.events import EventQueue


class Clock:
    """A time module for one module of the program; its time goes on only when a test, or a wait, says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType, now: float = 1000.0) -> None:
        self.now = now
        for module in modules:
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Waits(EventQueue):
    """Events whose waits end at their deadline at once, with the clock there; the waits are counted."""

    def __init__(self, clock: Clock, at_wait: Callable[[int], object] = lambda number: None) -> None:
        super().__init__()
        self.clock, self.deadlines, self._at_wait = clock, list[float](), at_wait

    def get(self, deadline: float) -> Any:
        self.check()
        assert len(self.deadlines) < 1000, "this wait does not end"
        self.deadlines.append(deadline)
        self.clock.now = max(self.clock.now, deadline)
        return self._at_wait(len(self.deadlines))


@contextlib.contextmanager
def logged(level: int = logging.DEBUG) -> Iterator[list[str]]:
    """Collect the lines that ELF logs, each with its level, whatever an earlier test did to the logger."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    before, level_before = text.log.handlers[:], text.log.level
    text.log.handlers[:] = [handler]
    text.log.setLevel(level)
    try:
        yield lines
    finally:
        text.log.handlers[:] = before
        text.log.setLevel(level_before)


def refusal(code: str, status: int = 400, operation: str = "DeleteThing", message: str = "no", **more: Any) -> Any:
    """AWS's answer of an error, as botocore raises it."""
    return ClientError(
        {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": status, "RetryAttempts": 0, **more},
        },
        operation,
    )


class Pages:
    """A client of boto3's whose lists have one page, which the method of the operation returns."""

    def get_paginator(self, operation: str) -> Any:
        return SimpleNamespace(paginate=lambda **parameters: iter([getattr(self, operation)(**parameters)]))
