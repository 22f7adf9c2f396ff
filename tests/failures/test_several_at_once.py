"""Commands that run at the same time on the same misc/."""

from __future__ import annotations

import os
import signal

import pytest
from support.aws import Account
from support.failures import Explained
from support.machine import posix_only
from support.shell import Elf, Pair, assert_whole


def test_sends_and_subscribes_run_together(pair: Pair) -> None:
    listening = [pair.subscribe("--count", 4) for _ in range(2)]
    sending = [pair.start("send", *pair.to_broker, "--duration", "0.01") for _ in range(2)]
    for window in sending:
        window.end()
    for window in listening:
        assert len(window.end().received) == 4


@pytest.mark.parametrize("command", ["create", "clean"])
def test_create_and_clean_do_not_run_beside_a_send_and_say_who_is_at_work(
    pair: Pair, command: str, explained: Explained
) -> None:
    window = pair.start("send", *pair.to_broker, "--duration", "60")
    window.await_line("posting message")
    refused = pair(command, "--output", "json", status=1)
    explained(refused, "DirectoryInUse", pair.misc, f"`elf.py send` (process {window.process.pid})")
    assert "--wait" in refused.lines[-1]
    window.signal(signal.SIGTERM)
    window.end(143)


def test_nothing_runs_beside_a_create(elf: Elf, account: Account) -> None:
    window = elf.start("create", 400, "--verbose")
    window.await_line("Thing:'thing_0' associated")
    for command in ("create", "send", "subscribe", "clean"):
        assert f"`elf.py create` (process {window.process.pid})" in elf(command, status=1).err
    window.signal(signal.SIGTERM)
    window.end(143)
    elf("clean", "--rate", 200)
    assert account.is_empty()


def test_wait_waits_for_the_other_one(pair: Pair) -> None:
    first = pair.start("send", *pair.to_broker, "--duration", "2")
    first.await_line("posting message")
    second = pair.start("create", 2, "--wait", 60)
    second.await_line(f"waiting for `elf.py send` \\(process {first.process.pid}\\)")
    first.end()
    second.end()


def test_a_wait_that_was_too_short_says_who_is_at_work(pair: Pair) -> None:
    first = pair.start("send", *pair.to_broker, "--duration", "60")
    first.await_line("posting message")
    refused = pair("create", 2, "--wait", 0.5, status=1)
    assert f"(process {first.process.pid})" in refused.err


@pytest.mark.skipif(os.name != "posix", reason="Windows locks another file")
def test_a_wait_for_the_journal_is_said_and_ctrl_c_ends_it(elf: Elf) -> None:
    import fcntl

    elf("create", 1)
    with (elf.misc / "things.journal").open("w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        stopped, patient = (elf.start("send", *elf.to_broker, "--duration", "0.01") for _ in range(2))
        for window in (stopped, patient):
            window.await_line(f"waiting for another elf.py to finish with {elf.misc}")
        stopped.signal(signal.SIGINT)
        stopped.end(130)
    assert "1 acknowledged, 0 lost" in patient.end().err


def test_two_first_sends_at_once_make_one_policy_a_thing(elf: Elf, account: Account) -> None:
    elf("create", 3)
    windows = [elf.start("send", *elf.to_broker, "--duration", "0.01") for _ in range(3)]
    for window in windows:
        assert "3 acknowledged, 0 lost" in window.end().err
    assert account.policies() == [f"policy-thing_{number}" for number in range(3)]
    for number in range(3):
        assert account.policies_of(f"thing_{number}") == [f"policy-thing_{number}"]


def test_two_cleans_at_once_clean_once(elf: Elf, account: Account) -> None:
    elf("create", 5)
    windows = [elf.start("clean", "--wait", 30) for _ in range(2)]
    for window in windows:
        window.end()
    assert account.is_empty()
    assert elf.files() == ["elf.json"]


def test_two_creates_at_once_make_one_fleet(elf: Elf, account: Account) -> None:
    windows = [elf.start("create", 2, "--wait", 30), elf.start("create", 2, "--wait", 30)]
    for window in windows:
        window.end()
    assert account.things() == ["thing_0", "thing_1"]
    assert set(account.certificates()) == {thing["certificateId"] for thing in elf.recorded().values()}
    assert len(account.certificates()) == 2


@posix_only
def test_removing_the_lock_file_lets_no_second_command_in(elf: Elf, account: Account) -> None:
    """The lock is on the directory; the files that one can remove are notes."""
    window = elf.start("create", 30, "--rate", 5, "--verbose")
    window.await_line("Thing:'thing_0'")
    for name in (".lock", ".writing"):
        (elf.misc / name).unlink(missing_ok=True)
    refused = elf("create", 40, "--output", "json", status=1)
    assert [failure.name for failure in refused.failures] == ["DirectoryInUse"]
    window.end()
    assert_whole(elf, account, 30)
