"""A fleet that is too large for one process, and one that this machine does not allow."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import psutil  # type: ignore[import-untyped]
import pytest
from harness import Account, AwsService, Elf, Running

THINGS = 60  # enough for two processes on two cores
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}:iot-elf:[A-Z]+ - .+")


@pytest.fixture(scope="module")
def account(service: AwsService) -> Account:
    return Account(service)


@pytest.fixture(scope="module")
def crowd(account: Account, service: AwsService, tmp_path_factory: pytest.TempPathFactory) -> Elf:
    """A fleet that has sent already."""
    environment = account.credentials | {"AWS_ENDPOINT_URL": service.url}
    crowd = Elf(tmp_path_factory.mktemp("crowd"), environment, service)
    crowd("create", THINGS, "--rate", 200)
    crowd("send", *crowd.broker, "--duration", "0.01", "--rate", 200)
    return crowd


@pytest.fixture(autouse=True)
def _two_cores(module: ModuleType) -> None:
    if module.processes_for(THINGS) < 2:
        pytest.skip("one core: ELF uses one process for so few things")


def workers_of(running: Running) -> list[psutil.Process]:
    return list(psutil.Process(running.process.pid).children(recursive=True))


def test_every_thing_is_heard_once_by_every_thing_and_no_line_is_torn(crowd: Elf) -> None:
    window = crowd.subscribe("--count", THINGS * THINGS, "--verbose")
    assert len(workers_of(window)) >= 2
    sent = crowd("send", *crowd.broker, "--duration", "1", "--verbose")
    assert (
        f"[send_messages] ELF sent {THINGS} messages from {THINGS} things: {THINGS} acknowledged, 0 lost" in sent.lines
    )
    heard = window.end()
    assert len(heard.received) == THINGS * THINGS
    assert {topic for topic, _ in heard.received} == {f"elf/thing_{number}" for number in range(THINGS)}
    assert [line for line in (sent.err + heard.err).splitlines() if not LINE.fullmatch(line)] == []
    crowd.close_windows()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_workers_and_still_brings_the_report(crowd: Elf, signum: signal.Signals, status: int) -> None:
    window = crowd.start("send", *crowd.broker, "--duration", "60", "--verbose")
    window.await_line("posting message")
    workers = workers_of(window)
    assert len(workers) >= 2
    window.signal(signum)
    assert re.search(
        rf"ELF sent \d+ messages? from {THINGS} things: \d+ acknowledged, \d+ lost", window.end(status).err
    )
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    crowd.close_windows()


def test_a_worker_that_dies_is_reported_and_the_others_go_on(crowd: Elf) -> None:
    window = crowd.start("send", *crowd.broker, "--duration", "3", "--interval", "0.5", "--verbose")
    window.await_line("posting message")
    victim = max(workers_of(window), key=lambda process: process.pid)
    victim.kill()
    result = window.end(1)
    died = [line for line in result.lines if "its worker process died" in line]
    assert THINGS // 3 <= len(died) < THINGS
    last = {line.split()[1] for line in result.lines[-200:] if "posting message" in line}
    assert len(last) == THINGS - len(died)
    crowd.close_windows()


def test_a_worker_that_dies_before_its_things_are_connected_holds_up_nobody(crowd: Elf) -> None:
    window = crowd.start("send", *crowd.broker, "--duration", "0.01")
    while not (workers := workers_of(window)):  # there is no event to wait for
        assert window.process.poll() is None
    workers[0].kill()
    assert "its worker process died" in window.end(1).err
    crowd.close_windows()


def test_workers_end_with_a_parent_that_is_killed(crowd: Elf) -> None:
    window = crowd.start("subscribe", *crowd.broker, "--duration", "60")
    window.await_line("ELF listening")
    workers = workers_of(window)
    assert len(workers) >= 2
    window.kill()
    assert psutil.wait_procs(workers, timeout=15)[1] == []


@pytest.fixture
def with_limit(crowd: Elf, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Have elf.py run under a limit of open files, by a shell's `ulimit` with these options."""
    python = crowd.python

    def with_limit(options: str) -> None:
        wrapper = tmp_path / "python"
        wrapper.write_text(f'#!/bin/sh\nulimit {options} && exec "{python}" "$@"\n')
        wrapper.chmod(0o755)
        crowd.python = str(wrapper)

    yield with_limit
    crowd.python = python


def test_a_low_limit_of_open_files_is_raised(crowd: Elf, with_limit: Callable[[str], None]) -> None:
    with_limit("-Sn 200")
    crowd("send", *crowd.broker, "--duration", "0.01")


def test_too_low_a_limit_is_an_error_before_anything_connects(crowd: Elf, with_limit: Callable[[str], None]) -> None:
    with_limit("-n 200")
    err = crowd("--debug", "send", *crowd.broker, "--duration", "0.01", status=1).err
    assert "open files" in err
    assert "ulimit" in err
    assert "CONNECT" not in err
