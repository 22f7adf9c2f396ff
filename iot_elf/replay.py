# SPDX-License-Identifier: Apache-2.0
"""Recordings that things play, CSV or events of received messages: only for `send --replay`."""

from __future__ import annotations

import base64
import contextlib
import csv
import datetime
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from iot_elf import messages
from iot_elf.errors import ElfError, UsageError
from iot_elf.messages import Line, PayloadBuilder
from iot_elf.text import detail_log, log, plural, shown

# A row's device (None: any), its time in seconds since 1970, and what makes the message of a thing or raises UsageError
Row = tuple[str | None, float | None, Callable[[str], PayloadBuilder]]
MAX_ROW_BYTES = 1024 * 1024  # of a file; JSON may write a byte of a payload as six
MAX_NAMES = 60  # of columns, in an error
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")  # RFC 8259
COLUMN = re.compile(r"\{([^{}]*)\}")  # in a topic
TIME = re.compile(  # ISO 8601; of datetime.fromisoformat(), each version of Python reads more
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[Tt ]([0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:[.,]([0-9]+))?)?"
    r" ?(?:[Zz]|([+-][0-9]{2}):?([0-9]{2})?)?"
)
TIMES = "1700000000.5, 2023-11-14T22:13:20.5Z or 2023-11-14 23:13:20.5+01:00"


class Plan(NamedTuple):
    """How the rows of a recording become messages."""

    topics: Mapping[str, str]  # of each thing, in order; may contain {COLUMN}
    compose: Callable[[bytes], Any]  # makes a PayloadBuilder of a row's JSON object; raises UsageError
    by: str | None = None  # the column that names the device
    time: str | None = None  # the column with the time
    fixed: Sequence[str] = ()  # the options that do not work with events


def invalid(cause: str, remedy: str) -> UsageError:
    return UsageError("RecordingInvalid", cause, remedy)


def json_of(cell: str) -> str:
    return cell.strip() if NUMBER.fullmatch(cell.strip()) else json.dumps(cell, ensure_ascii=False)


def seconds_of(text: str) -> float:
    """Return the seconds since 1970 of a text, a number of them or ISO 8601; without an offset it is UTC."""
    with contextlib.suppress(ValueError):
        if NUMBER.fullmatch(text.strip()) and abs(float(text)) < 1e11:  # as many are milliseconds
            return float(text)
        if found := TIME.fullmatch(text.strip()):
            day, clock, fraction, hours, minutes = found.groups()
            whole = datetime.datetime.fromisoformat(f"{day}T{clock or '00:00'}{hours or '+00'}:{minutes or '00'}")
            return whole.timestamp() + float(f"0.{fraction or 0}")
    raise invalid(f"{shown(text)} is not a time in seconds since 1970, or in ISO 8601", f"write it as {TIMES}")


class Lines:
    """The lines of a file, as csv.reader() takes them: after one that raises UsageError the next can still be read."""

    def __init__(self, path: Path) -> None:
        self.number = self.row_bytes = 0  # of the last line, and how long its row is until its end
        self._lines, self._kept = messages.read_lines(path, MAX_ROW_BYTES), ""

    def first(self) -> str:
        """Return the first line that is not empty, which stays to be read; "" if there is none."""
        self._kept = next(filter(str.strip, self), "")
        self.number -= bool(self._kept)
        return self._kept

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        kept, self._kept = self._kept, ""
        line = kept or next(self._lines)
        self.number += 1
        if isinstance(line, UsageError):
            raise line
        self.row_bytes += len(line) + 1
        if self.row_bytes > MAX_ROW_BYTES:
            raise invalid("the row does not end within 1 MiB", "close its quote, and write a quote in it twice")
        try:
            return line if isinstance(line, str) else line.decode("utf-8-sig" if self.number == 1 else "utf-8") + "\n"
        except UnicodeDecodeError:
            raise invalid("it is not UTF-8", "convert the file to UTF-8") from None


class Table:
    """CSV with a heading: each row is a JSON object of its columns."""

    def __init__(self, first: str, lines: Lines, plan: Plan) -> None:
        """Read the heading; the delimiter is what is there most often, a comma last. Raises UsageError."""
        csv.field_size_limit(MAX_ROW_BYTES)
        delimiter = max("\t;," if re.search("[\t;]", bare := re.sub('"[^"]*"', "", first)) else ",", key=bare.count)
        self._plan, self._reader = plan, csv.reader(lines, delimiter=delimiter, strict=True)
        names = [name.strip() for name in self._cells()]
        for place, name in enumerate(names):
            if not name or name in names[:place] or NUMBER.fullmatch(name):
                cause = f"column {place + 1} of the heading has the name {shown(name)}"
                raise invalid(cause, "begin with a line that gives each column a name of its own, which is no number")
        for name in (plan.by, plan.time, *(name for topic in plan.topics.values() for name in COLUMN.findall(topic))):
            if name is not None and name not in names:
                remedy = f"choose one of {', '.join(map(shown, names[:MAX_NAMES]))}"
                raise UsageError("NoSuchColumn", f"there is no column {shown(name)}", remedy)
        self._keys = {name: f"{json.dumps(name, ensure_ascii=False)}: " for name in names}

    def _cells(self) -> list[str]:
        try:
            return next(self._reader)
        except csv.Error as error:
            cause, _, hint = str(error).partition(" - ")  # one to programmers, where a carriage return ends a line
            remedy = "end each line with a line feed" if hint else "close each quote, and write a quote in a cell twice"
            raise invalid(f"it is not CSV: {cause}", remedy) from error

    def next_row(self) -> Row | None:
        """Return a row, or None where it is empty. Raises UsageError if it is none; StopIteration."""
        if not "".join(cells := self._cells()).strip():
            return None
        if len(cells) != len(self._keys):
            cause = f"it has {plural(len(cells), 'cell')}, and the heading {len(self._keys)}"
            raise invalid(cause, f"give it one per column, in quotes if it contains {self._reader.dialect.delimiter!r}")
        row = dict(zip(self._keys, cells, strict=True))
        if (device := None if self._plan.by is None else row[self._plan.by]) == "":
            raise invalid(f"{shown(self._plan.by or '')} is empty, and names no device", "fill it in")
        recorded_s = None if self._plan.time is None else seconds_of(row[self._plan.time])
        return device, recorded_s, lambda thing: self._message_of(row, thing)

    def _message_of(self, row: Mapping[str, str], thing: str) -> PayloadBuilder:
        def level(column: re.Match[str]) -> str:
            if not (value := row[column[1]]) or re.search("[/+#]", value):
                cause = f"the value {shown(value)} of {shown(column[1])} can't be in a topic"
                raise invalid(cause, "use another column in --topic: it must not be empty or contain /, + or #")
            return value

        topic = COLUMN.sub(level, self._plan.topics[thing])
        members = [f"{self._keys[name]}{json_of(cell)}" for name, cell in row.items() if cell]
        made: PayloadBuilder = self._plan.compose(f"{{{', '.join(members)}}}".encode())
        return made._replace(topic=topic)


class Events:
    """What a subscriber wrote, an event a line: the messages that the first of its things received."""

    def __init__(self, first: str, lines: Lines, plan: Plan) -> None:
        """Look whether the first line is an event. Raises UsageError."""
        self._lines, self._receiver, self._say_once = lines, None, functools.cache(log.info)
        self._event_in(first)
        if option := [*plan.fixed, "--by" if plan.by not in (None, "topic") else ""][0]:
            remedy = "leave it out: their topics, contents and times are as they were, and each topic is a device"
            raise UsageError("RecordingFixed", f"{option} does not work with received messages", remedy)

    @staticmethod
    def _event_in(line: str) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            event = messages.parse_json(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                return event
        remedy = "replay CSV or such events; send other lines with `elf.py send --json-message FILE.jsonl`"
        raise invalid("it is not an event that `subscribe --output json` wrote", remedy)

    def next_row(self) -> Row | None:
        """Return the next message, or None if the event is another. Raises UsageError if it is none; StopIteration."""
        event = self._event_in(next(self._lines))
        if event["event"] != "received":
            return None
        self._receiver = self._receiver or event.get("thingName")
        if event.get("thingName") != self._receiver:
            self._say_once("sending only what %s received, not what other things did", self._receiver)
            return None
        if event.get("redacted"):
            cause = "a credential in the message was replaced by ***"
            raise invalid(cause, "record where that is not in the environment")
        text, coded = event.get("payload"), event.get("payloadBase64")
        try:
            messages.utf8(topic := event["topic"])
            payload = base64.b64decode(coded or "!", validate=True) if text is None else messages.utf8(text)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise invalid("the event has no topic or no payload", "record it again") from None
        return topic, seconds_of(str(event.get("time"))), lambda thing: PayloadBuilder(payload, topic=topic)


def thing_finder(things: Sequence[str]) -> Callable[[str | None], str]:
    """Return what finds a device's thing, in order of appearance; those of rows without a device take turns."""
    thing_of, turns = dict[str, str](), itertools.cycle(things)

    def find(device: str | None) -> str:
        if device is not None and device not in thing_of:
            if len(thing_of) == len(things):
                cause = f"{shown(device)} is one device too many for {plural(len(things), 'thing')}"
                remedy = "make more things with `elf.py create COUNT`, use more with --things, or choose another --by"
                raise ElfError("TooManyDevices", cause, remedy)
            thing_of[device] = things[len(thing_of)]
            detail_log.info("%s is %s", thing_of[device], shown(device))
        return next(turns) if device is None else thing_of[device]

    return find


def read(path: Path, plan: Plan) -> Iterator[Line]:
    """Yield a recording's messages, or why a row can't be sent, then an empty Line. Raises UsageError if it is none."""
    log.debug("reading %s", path)
    lines, found = Lines(path), False
    try:
        if first := lines.first():
            kind: Table | Events = (Events if messages.begins_object(first.encode()) else Table)(first, lines, plan)
            for line in _messages(kind, lines, thing_finder([*plan.topics])):
                yield line
                found = True
        if not found and str(path) != "-":
            raise OSError(0, "it contains no row, and no received message")
        yield Line()
    except UsageError as error:
        raise UsageError(error.name, f"line {lines.number or 1} of {path}: {error.cause}", error.remedy) from error
    except OSError as error:
        if found or str(path) == "-":
            raise
        remedy = "use CSV with a heading, or what `subscribe --output json` wrote"
        raise UsageError("MessageFileInvalid", f"could not read {path}: {error.strerror}", remedy) from error


def _messages(kind: Table | Events, lines: Lines, thing_for: Callable[[str | None], str]) -> Iterator[Line]:
    while True:
        number, lines.row_bytes = lines.number + 1, 0
        try:
            if (row := kind.next_row()) is None:
                continue
            device, recorded_s, message_of = row
            message = message_of(thing := thing_for(device))
            if problem := messages.topic_problem(message.topic, wildcards=False):
                raise invalid(f"{problem}: {shown(message.topic)}", "choose another topic, or leave this line out")
            message.payload(message.topic, thing, 1)  # which may be too long
        except StopIteration:
            return
        except ElfError as error:
            yield Line(None, error, number)
            if not isinstance(error, UsageError):
                return
        else:
            yield Line(message, None, number, time.monotonic(), thing, recorded_s)
