"""The page of a run: what is in it, what is not, and how large it is."""

from __future__ import annotations

import html
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.program import constant

from iot_elf import metrics, report, text
from iot_elf.errors import ElfError, UsageError
from iot_elf.metrics import RunRecord, Timeline
from iot_elf.report import RunPage, numbers, render, rows
from iot_elf.results import PublishReport, SubscribeReport

from .stand_ins import Clock, logged

SUMMARY = {"sent": 30, "acknowledged": 30, "lost": 0, "sentAgain": 0, "durationS": 2.0, "latencyMs": {"p50": 2.5}}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, metrics, report)


Run = Callable[..., RunRecord]


@pytest.fixture
def run(clock: Clock) -> Run:
    """Make the record of a run: `things`, `seconds`, and how many messages a second have a latency."""

    def make(things: int = 3, seconds: int = 2, per_s: int = 3) -> RunRecord:
        record, its = RunRecord(), random.Random(1)
        names = [f"thing_{number}" for number in range(things)]
        record.timeline, record.things, record.began_at = Timeline(), things, clock.now
        record.connected.update(names)
        record.take_snapshot()
        for second in range(seconds):
            for name in names[second % 100 :: 100] if things > 100 else names:
                record.count("sent", name)
                record.count("acknowledged", name)
            if second % 8 in (3, 5):  # an outage in each of 450 intervals
                record.set_offline(names[0], second % 8 == 3)
            for _ in range(per_s):
                took_s = its.lognormvariate(-4, 1)
                record.add_acknowledgement(its.choice(names), took_s, 1.5 * took_s)
            clock.now += 1
            record.take_snapshot()
        record.ended_at = clock.now
        return record

    return make


def page_of(record: RunRecord, summary: Any = SUMMARY, **about: Any) -> str:
    given = {"command": "send", "typed": "elf.py send", "where": "region us-west-2", "status": 0, "began": "today"}
    return render(record, summary, **{**given, **about})


# What is shown


def test_the_numbers_are_the_summarys_with_a_name_and_a_unit() -> None:
    summary = {"sent": 3, "lost": 0, "sentAgain": 0, "messagesPerS": 1.5, "lateMs": 3.0, "senderClockAheadS": 7.0}
    assert list(numbers({**summary, "exact": True, "lateCause": "x", "offlineS": {}}, ("lost",))) == [
        ("sent", "sent", 3, ""),
        ("lost", "lost", 0, ""),
        ("messagesPerS", "messages/s", 1.5, ""),
        ("lateMs", "behind schedule, at most", 3.0, "ms"),
        ("senderClockAheadS", "sender clock ahead", 7.0, "s"),
    ]


def test_the_things_that_matter_come_first(run: Run) -> None:
    record = run(things=70)
    record.failed.add("thing_60")
    record.set_offline("thing_50", True)
    record.offline_s = {"thing_40": 1.0, "thing_41": 2.0}
    record.count("not_sent", "thing_30", 2)
    record.count("dropped", "thing_31", 3)
    record.unacknowledged = [("thing_32", "t", 1, b"")]
    record.add_acknowledgement("thing_20", 100, 100)
    with logged():
        record.failures.add("thing_60", ElfError("It", "thing_60 is <refused>", "look"))
    listed = rows(record)
    order = "thing_60 thing_50 thing_31 thing_30 thing_32 thing_41 thing_40 thing_20"
    assert [each["name"] for each in listed[:8]] == order.split()
    assert (listed[0]["state"], listed[0]["why"], listed[1]["state"]) == ("failed", "thing_60 is <refused>", "offline")
    page = page_of(record)
    assert "and 20 more" in page
    assert "thing_60 is &lt;refused&gt;" in page


def test_nothing_that_others_wrote_is_html_nor_secret(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset())
    secret = "s3cr&t" * 4
    text.add_secret(secret)
    evil = "<script>alert(1)</script>\x1b[2J\ud800\u202e"
    record = run()
    record.count("sent", evil)
    long = "x" * (constant("MAX_TEXT") - 8)
    error = {"name": "It", "cause": f"{evil}{secret}", "remedy": f"{long}{secret}"}
    typed = f"{evil} --proxy http://user:word@host -m {secret}"
    page = page_of(record, {**SUMMARY, "error": error}, typed=typed, where=evil, status=1)
    assert "<script" not in page
    assert page.count(html.escape("<script>alert(1)</script>")) == 4
    shown = html.unescape(page)
    assert not any(hidden in shown for hidden in (secret, secret[:8], "word@", "\x1b", "\ud800", "\u202e"))
    assert "http://***@host" in shown


def test_missing_numbers_are_told_by_sender_if_messages_were_numbered(run: Run) -> None:
    record = run()
    record.checks_sequence = True
    assert 'id="missing"' not in page_of(record, SubscribeReport(record, "").summary())
    for number in (1, 2, 5):
        record.sequence.add("thing_0", {"thing": "a<b", "seq": number}, is_over=False)
    page = page_of(record, SubscribeReport(record, "").summary())
    assert 'id="missing" data-value="2"' in page
    assert "<td>a&lt;b</td><td>2</td><td>0</td><td>0</td>" in page


def test_what_came_back_is_told_even_if_nothing_did(run: Run) -> None:
    record = run()
    assert "came back" not in page_of(record, PublishReport(record, "").summary())
    record.checks_return, record.not_returned["thing_1"] = True, {4: 0.0, 5: 0.0}
    with logged() as lines:
        PublishReport(record, "").log_report()
    assert "INFO  came back: 0 of 6 messages" in lines
    assert not any("round trip" in line for line in lines)
    page = page_of(record, PublishReport(record, "").summary())
    assert 'id="returned" data-value="0"' in page
    assert (rows(record)[0]["name"], rows(record)[0]["not back"]) == ("thing_1", 2)
    assert "<th>not back</th>" in page
    record.round_trip.add(0.0205)
    assert '<tr id="roundTripMs"><td>round trip</td><td>20.5</td>' in page_of(
        record, PublishReport(record, "").summary()
    )


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_run_without_messages_has_a_page_too(run: Run, seconds: int) -> None:
    record = run(seconds=seconds, per_s=0)
    record.timeline = record.timeline if seconds else Timeline()
    page = page_of(record, {"things": 0, "error": {"name": "NoneConnected", "cause": "none", "remedy": "look"}})
    assert page.count('class="chart"') == (1 if seconds else 0)  # of rates: nothing took any time
    assert "NoneConnected" in page


def test_an_hour_with_1000_things_is_a_small_page_soon_made(run: Run) -> None:
    record = run(things=1000, seconds=3600, per_s=1)
    names = [f"{'<' * 100}{number}" for number in range(100)]
    record.failed.update(names)
    with logged():
        for name in names:
            record.failures.add(name, ElfError("It", f"{name} fails {'&' * 999}", "look"))
    page = page_of(record, {})  # imports
    began = time.process_time()
    page = page_of(record, PublishReport(record, "").summary())
    assert time.process_time() - began < 1
    assert len(page.encode()) < 300_000
    assert 200 <= len(record.timeline.intervals() if record.timeline else ()) <= constant("MAX_INTERVALS")
    assert len(re.findall("<tr", page)) == constant("MAX_ROWS") + 4
    assert "Each point is 8 seconds" in page
    assert "1:00:00" in page


# The file


def test_a_page_replaces_an_earlier_one_whole_and_leaves_nothing_else(run: Run, tmp_path: Path) -> None:
    path, link, mask = tmp_path / "run.html", tmp_path / "link.html", os.umask(0o022)
    os.umask(mask)
    path.write_text("earlier")
    link.symlink_to(path)
    page = RunPage(link, run())
    assert path.read_text() == "earlier"
    page.write(SUMMARY, "send", ["send", "two words"], "here", 0)
    assert path.read_text().endswith("</html>")
    assert "elf.py send &#39;two words&#39;" in path.read_text()
    assert sorted(tmp_path.iterdir()) == [link, path]
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_page_that_can_not_be_written_leaves_the_earlier_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "run.html"
    path.write_text("earlier")
    page = RunPage(path, run())

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ElfError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        page.write(SUMMARY, "send", [], "here", 0)
    assert isinstance(error, KeyboardInterrupt) or f"{path}: No space left" in str(caught.value.args)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("run.html", "earlier")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "does not end in .html"),
        ("message.json", "does not end in .html"),
        ("directory.html", "is a directory"),
        ("pipe.html", "is not a regular file"),
        ("missing/run.html", "No such file or directory"),
        ("file/run.html", "Not a directory"),
        ("\0.html", "null"),
        (f"{'x' * 300}.html", "File name too long"),
    ],
)
def test_a_file_that_can_not_be_written_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "directory.html").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.html")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError) as refused:
        RunPage(tmp_path / name, RunRecord())
    assert refused.value.name == "ReportUnwritable"
    assert reason in refused.value.cause
    assert sorted(tmp_path.iterdir()) == before
