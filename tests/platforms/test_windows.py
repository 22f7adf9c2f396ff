"""The paths that Windows takes, switched on here: no fcntl, no fork, no SIGTERM, open files that can't be removed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from support.aws import Account
from support.program import TESTS
from support.shell import Elf

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the imitation of Windows needs Linux' locks and /proc")
AS_ON_WINDOWS = TESTS / "support" / "as_on_windows"
ONCE = ("--count", 1)


@pytest.fixture
def windows(elf: Elf) -> Elf:
    """A user whose Python lacks what Windows lacks."""
    elf.environment["PYTHONPATH"] = str(AS_ON_WINDOWS)
    return elf


def test_the_imitation_lacks_what_windows_lacks(windows: Elf) -> None:
    asked = (
        "import os, signal, sys; from support.program import constant; assert not constant('POSIX'); "
        "assert not (hasattr(os, 'fork') or hasattr(signal, 'SIGTERM') or hasattr(os, 'O_NOFOLLOW')); import fcntl"
    )
    environment = windows.environment | {"PYTHONPATH": f"{AS_ON_WINDOWS}:{TESTS}"}
    done = subprocess.run([windows.python, "-c", asked], env=environment, capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: import of fcntl halted" in done.stderr


def test_a_fleet_is_made_sends_listens_and_goes_on_windows(windows: Elf, account: Account) -> None:
    windows("create", 2)
    window = windows.subscribe("--count", 4)
    windows("send", *windows.to_broker, *ONCE)
    assert len(window.end().received) == 4
    result = windows("clean")
    assert account.is_empty()
    assert [path for path in windows.misc.iterdir() if path.stat().st_size] == [windows.misc / "elf.json"]
    assert "was interrupted" not in result.err


def test_no_command_leaves_work_for_the_next_on_windows(windows: Elf) -> None:
    for command in (
        ("create", 2),
        ("create", 3),
        ("send", *windows.to_broker, *ONCE),
        ("send", *windows.to_broker, *ONCE),
    ):
        assert "WARNING" not in windows(*command).err
        assert not (windows.misc / "things.journal").exists()


def test_who_is_at_work_is_named_and_nobody_who_has_gone_on_windows(windows: Elf) -> None:
    windows("create", 1)
    windows("send", *windows.to_broker, *ONCE)
    first = windows.subscribe()
    second = windows.subscribe()
    named = windows("create", 2, status=1).lines[0].partition(": ")[2]
    assert named == ", ".join(f"`elf.py subscribe` (process {each.process.pid})" for each in (first, second))
    waiting = windows.start("create", 2, "--wait", 30)
    waiting.await_line("waiting for `elf.py subscribe`")
    for window in (first, second):
        window.signal(signal.SIGINT)
        window.end(130)
    waiting.end()
    assert set(windows.recorded()) == {"thing_0", "thing_1"}


def test_a_lock_goes_with_the_process_that_is_killed_on_windows(windows: Elf, account: Account) -> None:
    window = windows.start("create", 12, "--verbose")
    window.await_line("Thing:'thing_[0-9]+' associated")
    window.kill()
    assert "from a run that was interrupted" in windows("create", 12, "--rate", 200).err
    assert len(account.things()) == len(windows.recorded()) == 12


def test_ctrl_c_ends_a_command_on_windows(windows: Elf) -> None:
    windows("create", 1)
    window = windows.subscribe()
    window.signal(signal.SIGINT)
    assert "interrupted (Ctrl-C)" in window.end(130).err
