"""Readers that stall, that are slow or not there at all: ELF can be stopped, and loses nothing without saying so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.aws import Account
from support.machine import PATIENCE_S
from support.mqtt import Client
from support.shell import Elf, Pair

LONG = "x" * 100_000


def shell(elf: Elf, script: str, *, timeout: float = 2 * PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """Run a script in which $ELF is elf.py and $BROKER its options."""
    environment = elf.environment | {"ELF": f"{elf.python} {elf.script}", "BROKER": " ".join(elf.broker)}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=timeout)


def start(elf: Elf, *args: object, **streams: int) -> subprocess.Popen[str]:
    """Run a command whose output nobody reads yet."""
    command = [elf.python, str(elf.script), *map(str, args)]
    return subprocess.Popen(command, env=elf.environment, stdin=subprocess.DEVNULL, text=True, **streams)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_stalls_does_not_keep_a_signal_from_ending_elf(pair: Pair, ear: Client, stream: str) -> None:
    """Over its bound, ELF waits for the reader, who reads nothing."""
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    options = ("--output", "json") if stream == "stdout" else ()
    streams = {stream: subprocess.PIPE, other: subprocess.DEVNULL}
    with start(
        pair, "send", *pair.broker, "--interval", "0.01", "--duration", 600, *options, LONG, **streams
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
        process = start(pair, "subscribe", *pair.broker, "--duration", "6", "--output", "json", **streams)
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
    assert shell(elf, f"$ELF create 2 {closed}").returncode == 0
    for path in elf.misc.glob("thing_?.*"):
        assert path.read_text().startswith("-----BEGIN")
        assert path.read_text().rstrip().endswith("-----")
    assert shell(elf, f"$ELF send $BROKER --count 2 {closed}").returncode == 0
    assert shell(elf, f"$ELF clean {closed}").returncode == 0
    assert account.is_empty()


def test_json_wants_a_standard_output(elf: Elf) -> None:
    done = shell(elf, "$ELF create --output json >&-")
    assert done.returncode == 1
    assert "standard output is closed" in done.stderr
    assert not elf.things()


def test_lines_want_a_standard_input(pair: Pair) -> None:
    done = shell(pair, "$ELF send $BROKER --json-message - <&-")
    assert done.returncode == 1
    assert "standard input is closed" in done.stderr


@pytest.mark.parametrize("where", ["> /dev/full", "2> /dev/full"])
def test_an_output_that_is_full_is_no_success(pair: Pair, where: str) -> None:
    done = shell(pair, f"$ELF send $BROKER --count 2 --output json {where}")
    assert done.returncode == 1
    assert "Exception ignored" not in done.stderr
    if where.startswith(">"):
        assert "the disk is full" in done.stderr
        assert "standard output" in done.stderr


def test_a_pipe_that_does_not_block_loses_no_line(pair: Pair) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    options = ("--count", 8, "--interval", "0.01", "--output", "json", LONG)
    process = start(pair, "send", *pair.broker, *options, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    with os.fdopen(ours, encoding="utf-8") as reader:
        events = [json.loads(line)["event"] for line in reader]
    assert process.wait(PATIENCE_S) == 0
    assert (events.count("sent"), events.count("acknowledged"), events[-1]) == (16, 16, "summary")
