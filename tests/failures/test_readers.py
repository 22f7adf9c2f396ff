"""Readers that stall, are slow, full or gone: ELF can be stopped, ends, and loses nothing without saying so."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.aws import Account
from support.failures import Explained
from support.machine import PATIENCE_S
from support.mqtt import PINGREQ, Broker, Client, Peer, answer_to, publish
from support.program import Limits
from support.shell import Elf, InProcess, Pair

LONG = "x" * 100_000

JSON = ("--output", "json")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_stalls_does_not_keep_a_signal_from_ending_elf(pair: Pair, ear: Client, stream: str) -> None:
    """Over its bound, ELF waits for the reader, who reads nothing."""
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    options = ("--output", "json") if stream == "stdout" else ()
    streams = {stream: subprocess.PIPE, other: subprocess.DEVNULL}
    with pair.popen(
        "send", *pair.to_broker, "--interval", "0.01", "--duration", 600, *options, LONG, **streams
    ) as process:
        for _ in range(40 if options else 80):  # of 100 kB, and in JSON once more: as many as ELF's bound holds
            ear.hear()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 143


def test_subscribe_reports_to_a_slow_reader_all_that_came_in_time(
    pair: Pair, connect: Callable[[Account], Client], tmp_path: Path
) -> None:
    client = connect(pair.account)
    lines = tmp_path / "lines"
    with lines.open("w") as log:
        streams = {"stdout": subprocess.PIPE, "stderr": log.fileno()}
        process = pair.popen("subscribe", *pair.to_broker, "--duration", "6", "--output", "json", **streams)
    assert process.stdout
    while "ELF listening" not in lines.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    deadline = time.monotonic() + 5.9
    for number in range(400):
        client.publish("elf/slow", json.dumps({"number": number}) + LONG[:400])
    assert time.monotonic() < deadline
    time.sleep(max(0.0, deadline + 1.0 - time.monotonic()))  # its time is over, and it could write 64 KiB
    events = [json.loads(line) for line in process.stdout]
    assert process.wait(PATIENCE_S) == 0
    assert events[-1]["received"] == len(events) - 1 == 800


def flood(peer: Peer) -> None:
    """Send 3 MB as fast as they are taken, and answer no PINGREQ until they are gone."""
    peer.send(answer_to(peer.packets[0]))
    peer.send(answer_to(next(iter(peer))))
    peer.connection.settimeout(0.05)
    left = memoryview(publish(b"elf/x", LONG[:20_000].encode()) * 150)
    with contextlib.suppress(OSError):  # ELF is gone
        while left:
            try:
                left = left[peer.connection.send(left[:16_384]) :]
            except TimeoutError:
                collections.deque(peer, maxlen=0)  # which waits as long
        peer.connection.settimeout(None)
        peer.answer()


class PatientReader:
    """Reads standard output in this process, once something is so."""

    def __init__(self, broker: Broker, monkeypatch: pytest.MonkeyPatch, is_time: Callable[[], object]) -> None:
        ours, theirs = os.pipe()
        self.lines, self._pipe, self._stream = 0, os.fdopen(ours, "rb"), os.fdopen(theirs, "w", encoding="utf-8")
        self._wait = lambda: broker.await_that(is_time)
        self._thread = threading.Thread(target=self._read, daemon=True)
        monkeypatch.setattr("sys.stdout", self._stream)
        self._thread.start()

    def _read(self) -> None:
        with self._pipe:
            self._wait()
            self.lines = sum(1 for _ in self._pipe)

    def end(self) -> int:
        """Return how many lines it has read."""
        self._stream.close()
        self._thread.join(PATIENCE_S)
        return self.lines


@pytest.fixture
def flooding(tmp_path: Path, limits: Limits) -> Iterator[Broker]:
    """A broker that sends thing_0 3 MB, of which ELF holds 0.2 MB for a reader; keep-alives are fast."""
    limits(MAX_UNREAD=200_000, KEEP_ALIVE_S=1, CHECK_INTERVAL_S=0.1, LONG_PAUSE_S=2.0)
    with contextlib.closing(Broker(tmp_path, {"thing_0": [flood]})) as broker:
        yield broker


SUBSCRIBE_ONE = ("subscribe", "--things", 1, "--output", "payload", "--quiet")


def test_connections_stay_alive_while_nothing_reads_and_all_arrives_then(
    main_of_pair: InProcess, flooding: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader waits for three keep-alives, which have no answer that ELF reads."""
    reader = PatientReader(flooding, monkeypatch, lambda: len(flooding.of("thing_0", PINGREQ)) == 3)
    result = main_of_pair(*SUBSCRIBE_ONE, *flooding.to_broker, "--count", 150)
    assert reader.end() == 150
    assert len(flooding.peers) == 1
    pings = [each.at for each in flooding.of("thing_0", PINGREQ)]
    assert all(later - earlier < 1.5 for earlier, later in itertools.pairwise(pings))
    (warned, reported, _, _) = result.lines
    assert re.match(r"standard output has not been read for 2 s: .* until its reader continues", warned)
    assert re.search(r"the reader of the output was too slow: ELF received and sent nothing for [2-9]\.\d s", reported)


def test_what_a_reader_lets_get_lost_is_said_to_be_its_doing(
    main_of_pair: InProcess, flooding: Broker, monkeypatch: pytest.MonkeyPatch, explained: Explained
) -> None:
    """It reads when the connection is gone."""
    reader = PatientReader(flooding, monkeypatch, lambda: flooding.peers and flooding.peers[0].is_over)
    result = main_of_pair(*SUBSCRIBE_ONE, *flooding.to_broker, "--duration", 1, status=1)
    assert 0 < reader.end() < 150
    explained(result, "OutputUnread", "the reader of the output was too slow")


@pytest.mark.parametrize(("at_create", "at_send", "at_clean"), [("<&-", ">&-", "2>&-"), ("<&- >&- 2>&-",) * 3])
def test_standard_streams_that_are_closed_do_no_harm(
    elf: Elf, account: Account, at_create: str, at_send: str, at_clean: str
) -> None:
    """A file that got the number of a closed one would be written to instead."""
    elf.in_shell(f"$ELF create 2 {at_create}")
    for path in elf.misc.glob("thing_?.*"):
        assert path.read_text().startswith("-----BEGIN")
        assert path.read_text().rstrip().endswith("-----")
    elf.in_shell(f"$ELF send $BROKER --count 2 {at_send}")
    elf.in_shell(f"$ELF clean {at_clean}")
    assert account.is_empty()


def test_json_wants_a_standard_output(elf: Elf) -> None:
    assert "standard output is closed" in elf.in_shell("$ELF create --output json >&-", status=1).err
    assert not elf.recorded()


def test_lines_want_a_standard_input(pair: Pair, explained: Explained) -> None:
    for option in ("--json-message", "--replay"):
        script = f"$ELF send $BROKER {option} - --output json <&-"
        explained(pair.in_shell(script, status=1), "InputClosed", f"elf.py send {option} -")


@pytest.mark.parametrize("where", ["> /dev/full", "2> /dev/full"])
def test_an_output_that_is_full_is_no_success(pair: Pair, where: str) -> None:
    result = pair.in_shell(f"$ELF send $BROKER --count 2 --output json {where}", status=1)
    assert "Exception ignored" not in result.err
    if where.startswith(">"):
        assert "the disk is full" in result.err
        assert "standard output" in result.err
    else:
        summary = json.loads(result.out.splitlines()[-1])
        assert summary["exitStatus"] == 1
        assert summary["error"]["name"] == "DiskFull"
        assert "standard error" in summary["error"]["cause"]


def test_where_a_log_is_full_standard_output_says_so(main_of_pair: InProcess, pair: Pair) -> None:
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - what could not be written fails again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", full)
        result = main_of_pair("send", *pair.to_broker, "--count", 1, status=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert result.out == "the disk is full: [Errno 28] No space left on device: 'standard error'\n"


def test_where_the_reader_of_the_summary_is_gone_the_log_says_so(
    main_of_pair: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    monkeypatch.setattr("sys.stdout", os.fdopen(theirs, "w", encoding="utf-8"))
    result = main_of_pair("list", "--output", "json", status=141)
    assert result.lines == ["the reader of standard output closed it"]


@pytest.mark.parametrize(
    ("script", "status"),
    [("$ELF --help > /dev/full", 1), ("$ELF --version > /dev/full", 1), ("$ELF --help | true", 141), ("$ELF >&-", 2)],
)
def test_help_that_can_not_be_printed_is_no_success(pair: Pair, script: str, status: int) -> None:
    said = pair.in_shell(script, status).err
    assert "Traceback" not in said
    assert ("the disk is full" in said) == (status == 1)


def test_a_pipe_that_does_not_block_loses_no_line(pair: Pair) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    options = ("--count", 8, "--interval", "0.01", "--output", "json", LONG)
    process = pair.popen("send", *pair.to_broker, *options, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    with os.fdopen(ours, encoding="utf-8") as reader:
        events = [json.loads(line)["event"] for line in reader]
    assert process.wait(PATIENCE_S) == 0
    assert (events.count("sent"), events.count("acknowledged"), events[-1]) == (16, 16, "summary")


def test_a_reader_that_has_enough_ends_subscribe_quietly(pair: Pair) -> None:
    sender = pair.start("send", *pair.to_broker, "--duration", "30", "--interval", "0.05")
    sender.await_line("posting message")
    started = time.monotonic()
    result = pair.in_shell("$ELF subscribe $BROKER --duration 600 --output json | head -n 1", status=141)
    assert time.monotonic() - started < PATIENCE_S
    assert json.loads(result.out)["event"] == "received"
    assert not re.search("Traceback|Error|Broken|ERROR|WARNING", result.err)


def test_a_reader_of_the_log_that_has_enough_ends_send_quietly(pair: Pair) -> None:
    result = pair.in_shell("$ELF send $BROKER --duration 600 --interval 0.05 2>&1 | head -n 3", status=141)
    assert len(result.out.splitlines()) == 3
    assert result.err == ""


def test_a_reader_that_has_enough_loses_nothing_of_create(elf: Elf, account: Account) -> None:
    elf.in_shell("$ELF create 40 --output json 2>/dev/null | head -n 1", status=141)
    ready = {name for name, recorded in elf.recorded().items() if "elf_stage" not in recorded}
    assert 1 <= len(ready) < 40
    assert set(account.things()) >= ready
    elf("clean")
    assert account.is_empty()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_is_full_is_explained_and_loses_nothing(elf: Elf, account: Account) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    window = elf.start("create", 2, *JSON, stdout=full)
    os.close(full)
    lines = window.end(1).lines
    assert [line.partition(":")[0] for line in lines[-2:]] == ["the disk is full", "what to do"]
    assert "standard output" in lines[-2]
    assert set(account.things()) == set(elf.recorded())
    elf("clean")
    assert account.is_empty()
