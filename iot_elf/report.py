# SPDX-License-Identifier: Apache-2.0
"""The page of a run, for --report: its totals, latency and rate over time, outages, and things, in one HTML file."""

from __future__ import annotations

import collections
import contextlib
import heapq
import os
import re
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from iot_elf import defaults
from iot_elf.errors import ElfError, UsageError
from iot_elf.metrics import RunRecord, Timeline
from iot_elf.text import by_number, plural, printable, redacted, utc_time, without_password

MAX_ROWS = 50  # of the table of things
MAX_OUTAGES = 10  # that are listed; the charts show all
MAX_TEXT = 400  # characters of the command line, or of a cause
REMEDY = "name a file, such as run.html, in a directory that exists and that you may write to"
# What of the summary's numbers is shown even if it is 0, what of them has another name, and where the things are told.
ALWAYS = ("sent", "acknowledged", "returned", "received", "lost", "notSent")
NAMES = {
    "returned": "came back",
    "messagesPerS": "messages/s",
    "lateMs": "behind schedule, at most",
    "durationS": "duration",
}
LATENCIES = {"latencyMs": "from sending", "latencyFromDueMs": "from schedule", "roundTripMs": "round trip"}
COUNTS = {
    **{"sent": "sent", "acknowledged": "acknowledged", "received": "received", "not_sent": "not sent"},
    **{"retransmitted": "sent again", "rejected": "rejected", "unreadable": "unreadable"},
}
HEAD = ("name", "state", "why")  # of a row of the table; the rest are numbers, shown if there is any


class RunPage:
    """The page of a run, and the file that it is for."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        """Have `record` keep what the page needs. Raises UsageError if `path` can't be written: now, not at the end."""
        self._path, self._record = path, record
        record.timeline = Timeline()
        with _explained(path, UsageError):
            if path.suffix.lower() not in (".html", ".htm"):  # it could be a file that is not to be replaced
                raise OSError(0, "its name does not end in .html")
            if path.exists() and not path.is_file():
                raise OSError(0, "it is a directory" if path.is_dir() else "it is not a regular file")
            if path.exists() and not os.access(path, os.W_OK):
                raise OSError(0, "it is read-only")
            with _replacing(path) as (temporary, file):
                file.close()
                temporary.unlink()

    def write(self, summary: Mapping[str, Any], command: str, typed: Sequence[str], place: object, status: int) -> None:
        """Write it, whole or not at all, in the place of an earlier one. Raises ElfError.

        `summary` has the JSON summary's members, `typed` the arguments of `command`, `status` is the exit status.
        """
        record = self._record
        began = time.time() - (time.monotonic() - record.began_at if record.began_at else 0.0)
        about = {"command": command, "typed": shlex.join(["elf.py", *typed]), "where": str(place), "status": status}
        page = render(record, summary, **about, began=utc_time(began))
        with _explained(self._path, ElfError), _replacing(self._path) as (temporary, file):
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            temporary.replace(self._path.resolve())


@contextlib.contextmanager
def _explained(path: Path, kind: type[ElfError]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise kind("ReportUnwritable", f"can't write the report to {path}: {reason}", REMEDY) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[tuple[Path, Any]]:
    """Give the block a new file, which others may read, beside the one at `path`; it is gone if the block fails."""
    import secrets

    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            yield temporary, file
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def render(record: RunRecord, summary: Mapping[str, Any], **about: Any) -> str:
    """Return the page's text. Each value in it is escaped, and redacted as the log is."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from iot_elf import charts

    def shown(value: Any) -> Any:
        return printable(redacted(without_password(value))) if isinstance(value, str) else value

    intervals = record.timeline.intervals() if record.timeline else []
    things = rows(record)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["clock"] = charts.clock
    # What is secret goes first, or half of it could stay.
    environment.filters["short"] = lambda it: it if len(it := shown(it)) <= MAX_TEXT else f"{it[:MAX_TEXT]}…"
    return environment.get_template("report.html").render(
        about,
        program=f"aws-iot-elf {defaults.VERSION}",
        numbers=list(numbers(summary, (*ALWAYS, "missing") if str(record.sequence) else ALWAYS)),
        senders=list(summary.get("senders", {}).items()),
        max_rows=MAX_ROWS,
        latencies=[(key, what, summary[key]) for key, what in LATENCIES.items() if summary.get(key)],
        error=summary.get("error"),
        charts=charts.of(intervals) if intervals else [],
        width=charts.WIDTH,
        height=charts.HEIGHT,
        connected=len(record.connected),
        outages=charts.outages(intervals),
        max_outages=MAX_OUTAGES,
        point=plural(round(max([1.0, *(each.lasted_s for each in intervals)])), "second"),
        things=things,
        columns=[name for name in (things or [{}])[0] if name not in HEAD and any(row[name] for row in things)],
        more=len(_names(record)) - len(things),
    )


def numbers(summary: Mapping[str, Any], always: Collection[str]) -> Iterator[tuple[str, str, float, str]]:
    """Yield the numbers of the JSON summary that are not 0, or are of `always`: key, name for people, value, unit."""
    for key, value in summary.items():
        if type(value) in (int, float) and (value or key in always):
            quantity, unit = re.findall("(.+?)(PerS|Ms|S|)$", key)[0]
            words = re.sub("(?=[A-Z])", " ", quantity).lower()
            yield key, NAMES.get(key, words), value, {"Ms": "ms", "S": "s"}.get(unit, "")


def _names(record: RunRecord) -> set[str]:
    return record.connected | record.failed | record.by_thing.keys()


def rows(record: RunRecord) -> list[dict[str, Any]]:
    """Return the things that matter first: those that failed, lost messages, were offline, or had the longest times."""
    by_thing = dict(record.by_thing)  # which may still grow after a second Ctrl-C
    lost = collections.Counter(thing for thing, *_ in record.unacknowledged)
    lost.update({thing: its["dropped"] for thing, its in by_thing.items()})
    none = collections.Counter[str]()
    longest_s = record.timeline.longest_s if record.timeline else {}

    def order(thing: str) -> tuple[Any, ...]:
        counts = by_thing.get(thing, none)
        bad = lost[thing] + counts["not_sent"] + counts["rejected"] + len(record.not_returned.get(thing, ()))
        times = -record.offline_s.get(thing, 0.0), -longest_s.get(thing, 0.0)
        return thing not in record.failed, thing not in record.offline, -bad, *times, by_number(thing)

    return [
        {
            "name": thing,
            "state": "failed" if thing in record.failed else "offline" if thing in record.offline else "",
            "why": record.failures.cause_of(thing),
            **{name: by_thing.get(thing, none)[key] for key, name in COUNTS.items()},
            "lost": lost[thing],
            "not back": len(record.not_returned.get(thing, ())),
            "offline, s": round(record.offline_s.get(thing, 0.0), 1),
            "longest, ms": round(1000 * longest_s.get(thing, 0.0), 1),
        }
        for thing in heapq.nsmallest(MAX_ROWS, _names(record), key=order)
    ]
