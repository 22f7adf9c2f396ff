"""Nothing that others send, and nothing that is logged, moves a terminal's cursor or forges a line of the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType

from support.aws import Account
from support.mqtt import Client
from support.shell import Pair

from iot_elf.console import LogFormatter


def test_what_comes_cannot_play_with_the_terminal(pair: Pair, connect: Callable[[Account], Client]) -> None:
    window = pair.subscribe("--count", 4)
    client = connect(pair.account)
    client.publish("elf/bin", b"\x1b[2J\x07red\r\n2026-11-23 fake log line")
    client.publish("elf/bin", b"\xff\xfe")
    result = window.end()
    assert not set("\x1b\x07\r") & set(result.err)
    assert [line for line in result.err.splitlines() if line.startswith("2026-11-23 fake")] == []
    assert {payload for _, payload in result.received} == {
        r"\x1b[2J\x07red\r\n2026-11-23 fake log line",
        r"\xff\xfe",
    }


def test_nothing_that_is_logged_moves_the_cursor(module: ModuleType) -> None:
    """A traceback keeps its lines, and its text can't pretend to be one of them."""
    try:
        raise ValueError("\x1b[2Jgone\r\x07")
    except ValueError as error:
        facts = (type(error), error, error.__traceback__)
    record = logging.LogRecord("iot-elf", logging.ERROR, "", 0, "name\n\x1b[31m\u202e: %s", ("\x9b1A",), facts)
    first, *rest = LogFormatter().format(record).split("\n")
    assert first.endswith("ERROR - name\\n\\x1b[31m\\u202e: \\x9b1A")
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "ValueError: \\x1b[2Jgone\\r\\x07"
    assert all(line.isprintable() for line in (first, *rest))
