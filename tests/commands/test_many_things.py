"""A fleet of more things than anybody looks at, and one that this machine does not allow."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from support.aws import Account, AwsService
from support.shell import Elf

pytestmark = pytest.mark.xdist_group("many things")  # they share a fleet

THINGS = 40
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}:iot-elf:[A-Z]+ - .+")


@pytest.fixture(scope="module")
def account(service: AwsService) -> Account:
    return Account(service)


@pytest.fixture(scope="module")
def many_things(account: Account, service: AwsService, tmp_path_factory: pytest.TempPathFactory) -> Elf:
    """A fleet that has sent already."""
    environment = account.credentials | {"AWS_ENDPOINT_URL": service.url}
    many_things = Elf(tmp_path_factory.mktemp("many_things"), environment, service)
    many_things("create", THINGS, "--rate", 200)
    many_things("send", *many_things.to_broker, "--duration", "0.01", "--rate", 200)
    return many_things


def test_every_thing_is_heard_once_by_every_thing_and_no_line_is_torn(many_things: Elf) -> None:
    window = many_things.subscribe("--count", THINGS * THINGS, "--verbose")
    sent = many_things("send", *many_things.to_broker, "--duration", "1", "--verbose")
    assert (
        f"[send_messages] ELF sent {THINGS} messages from {THINGS} things: {THINGS} acknowledged, 0 lost" in sent.lines
    )
    heard = window.end()
    assert len(heard.received) == THINGS * THINGS
    assert {topic for topic, _ in heard.received} == {f"elf/thing_{number}" for number in range(THINGS)}
    assert [line for line in (sent.err + heard.err).splitlines() if not LINE.fullmatch(line)] == []
    many_things.close_windows()


@pytest.mark.sample(2)
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_loses_nothing_that_has_left(many_things: Elf, signum: signal.Signals, status: int) -> None:
    window = many_things.start("send", *many_things.to_broker, "--duration", "60", "--interval", "0.1", "--verbose")
    window.await_line("posting message")
    window.signal(signum)
    result = window.end(status)
    counts = re.findall(rf"ELF sent (\d+) messages? from {THINGS} things: (\d+) acknowledged, 0 lost", result.err)
    assert counts
    assert counts[0][0] == counts[0][1]
    many_things.close_windows()


def test_a_fleet_takes_one_process_and_few_threads(many_things: Elf) -> None:
    window = many_things.start("send", *many_things.to_broker, "--duration", "60", "--verbose")
    window.await_line("posting message")
    process = psutil.Process(window.process.pid)
    assert process.children() == []
    assert process.num_threads() <= 25
    window.signal(signal.SIGINT)
    window.end(130)
    many_things.close_windows()


@pytest.fixture
def with_limit(many_things: Elf, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Have elf.py run under a limit of open files, by a shell's `ulimit` with these options."""
    python = many_things.python

    def with_limit(options: str) -> None:
        wrapper = tmp_path / "python"
        wrapper.write_text(f'#!/bin/sh\nulimit {options} && exec "{python}" "$@"\n')
        wrapper.chmod(0o755)
        many_things.python = str(wrapper)

    yield with_limit
    many_things.python = python


def test_a_low_limit_of_open_files_is_raised(many_things: Elf, with_limit: Callable[[str], None]) -> None:
    with_limit("-Sn 60")
    many_things("send", *many_things.to_broker, "--duration", "0.01")


def test_too_low_a_limit_is_an_error_before_anything_connects(
    many_things: Elf, with_limit: Callable[[str], None]
) -> None:
    with_limit("-n 60")
    err = many_things("--debug", "send", *many_things.to_broker, "--duration", "0.01", status=1).err
    assert "open files" in err
    assert "ulimit" in err
    assert "CONNECT" not in err
