"""Readers that stall, are slow, full or gone: ELF can be stopped, ends, and loses nothing without saying so."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.aws import Account
from support.failures import Explained
from support.machine import PATIENCE_S
from support.mqtt import Client
from support.shell import Elf, Pair

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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_closed_do_no_harm(elf: Elf, account: Account, closed: str) -> None:
    """A file that got the number of a closed one would be written to instead."""
    elf.in_shell(f"$ELF create 2 {closed}")
    for path in elf.misc.glob("thing_?.*"):
        assert path.read_text().startswith("-----BEGIN")
        assert path.read_text().rstrip().endswith("-----")
    elf.in_shell(f"$ELF send $BROKER --count 2 {closed}")
    elf.in_shell(f"$ELF clean {closed}")
    assert account.is_empty()


def test_json_wants_a_standard_output(elf: Elf) -> None:
    assert "standard output is closed" in elf.in_shell("$ELF create --output json >&-", status=1).err
    assert not elf.recorded()


def test_lines_want_a_standard_input(pair: Pair, explained: Explained) -> None:
    script = "$ELF send $BROKER --json-message - --output json <&-"
    explained(pair.in_shell(script, status=1), "InputClosed", "elf.py send --json-message -")


@pytest.mark.parametrize("where", ["> /dev/full", "2> /dev/full"])
def test_an_output_that_is_full_is_no_success(pair: Pair, where: str) -> None:
    result = pair.in_shell(f"$ELF send $BROKER --count 2 --output json {where}", status=1)
    assert "Exception ignored" not in result.err
    if where.startswith(">"):
        assert "the disk is full" in result.err
        assert "standard output" in result.err


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
