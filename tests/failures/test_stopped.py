"""Ctrl-C and other signals: a command ends soon, says what is left, and the next one finishes it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.aws import Account
from support.http_proxy import HANG, THROTTLED, HttpProxy, aws_error
from support.machine import PATIENCE_S, posix_only, with_slow_disk
from support.mqtt import Client
from support.shell import Elf, Pair

from iot_elf.aws import run_parallel
from iot_elf.events import EventQueue

ONCE = ("--duration", "0.01")
GIVEN_UP = "no answer within"  # said of calls that outlast the wait for them at Ctrl-C

IN_USE = {
    "DeletePolicy": aws_error(409, "DeleteConflictException", "The policy is attached to one or more resources."),
    "DeleteCertificate": aws_error(409, "DeleteConflictException", "Things must be detached before deletion."),
    "DeleteThing": aws_error(400, "InvalidRequestException", "Cannot delete. Thing thing_0 is still attached."),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_clean_that_is_stopped_says_what_is_left_and_goes_on_later(
    elf: Elf, account: Account, signum: signal.Signals, status: int
) -> None:
    elf("create", 25, "--rate", 200)
    window = elf.start("clean", "--verbose")
    window.await_line("cleaned up")
    window.signal(signum)
    result = window.end(status)
    left = int(re.findall(r"cleaned up \d+ things?, (\d+) left", result.err)[0])
    assert 0 < left == len(elf.recorded())
    assert set(account.things()) <= set(elf.recorded())
    elf("clean", "--rate", 200)
    assert account.is_empty()


@pytest.mark.parametrize(
    ("command", "hangs", "sign"),
    [
        ("create", "DescribeEndpoint", None),
        ("create", "CreateKeysAndCertificate", r"\[create_things\] \d things? not created yet"),
        ("send", "AttachPolicy", "1 thing without the policy that is needed"),
        ("clean", "DeleteCertificate", r"cleaned up \d things?, \d left"),
    ],
)
def test_ctrl_c_waits_only_so_long_for_a_call_that_hangs(
    elf: Elf, account: Account, proxy: HttpProxy, command: str, hangs: str, sign: str | None
) -> None:
    arguments = {"create": (2,), "send": (*elf.to_broker, *ONCE), "clean": ()}[command]
    if command != "create":
        elf("create", 2)
    proxy.inject(hangs, HANG, call=1)
    window = elf.start(command, *arguments)
    deadline = time.monotonic() + 30
    while not proxy.faults[hangs] or (hangs != "DescribeEndpoint" and proxy.calls[hangs] < 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # there is no event to wait for
    window.signal(signal.SIGINT)
    result = window.end(130)
    assert f"1 call: {GIVEN_UP} 4 s" in result.err
    assert "interrupted (Ctrl-C)" in result.lines[-1]
    assert not sign or re.search(sign, result.err)
    proxy.reset()
    elf(command, *arguments)
    elf("clean")
    assert account.is_empty()


def test_a_second_ctrl_c_stops_at_once(elf: Elf, account: Account, proxy: HttpProxy) -> None:
    proxy.inject("CreateThing", HANG, onwards=True)
    window = elf.start("create", 5)
    proxy.await_hang(PATIENCE_S)
    window.signal(signal.SIGINT)
    window.await_line("again to stop now")
    time.sleep(0.06)  # nobody is faster
    window.signal(signal.SIGINT)
    assert window.end(130).lines[-1] == "stopped"
    proxy.reset()
    elf("create", 5)
    elf("clean")
    assert account.is_empty()


@pytest.mark.sample(2)
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_create_that_is_stopped_has_recorded_all_it_made(
    elf: Elf, account: Account, signum: signal.Signals, status: int
) -> None:
    """As GNU timeout does it, the process is signalled, and then its group; by Ctrl-C, the group."""
    window = elf.start("create", 900, "--verbose")
    window.await_line("Thing:'thing_0' associated")
    if signum != signal.SIGINT:
        window.signal(signum)
    os.killpg(window.process.pid, signum)
    assert "interrupted (" in window.end(status).lines[-1]
    assert 0 < len(account.things()) < 900
    assert set(account.things()) <= set(elf.recorded())  # what is not there yet is known to be asked for
    recorded = {thing["certificateId"] for thing in elf.recorded().values() if "certificateId" in thing}
    assert set(account.certificates()) == recorded
    elf("clean", "--rate", 200)
    assert account.is_empty()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize(
    ("command", "sign_of_life", "report"),
    [
        (
            "send",
            "posting message",
            r"\[send_messages\] ELF sent [0-9]+ messages? from 2 things: .* lost, 1[01][0-9] not sent",
        ),
        ("subscribe", "ELF listening on 2 things", r"\[subscribe\] ELF received 0 messages on 2 things"),
    ],
)
def test_send_and_subscribe_that_are_stopped_report_and_disconnect(
    pair: Pair,
    connect: Callable[[Account], Client],
    command: str,
    sign_of_life: str,
    report: str,
    signum: signal.Signals,
    status: int,
) -> None:
    client = connect(pair.account)
    client.subscribe("$aws/events/presence/disconnected/+")
    window = pair.start(command, *pair.to_broker, "--debug", "--duration", "60")
    window.await_line(sign_of_life)
    window.signal(signum)
    result = window.end(status)
    assert re.search(report, result.err)
    connected = set(re.findall(r"CONNECT to \S+ as (\S+)", result.err))
    assert {client_id.rpartition("-")[0] for client_id in connected} == {"thing_0", "thing_1"}
    while connected:  # other tests' clients may be on their way out as well
        event = json.loads(client.hear().payload)
        if event["clientId"] in connected:
            connected.remove(event["clientId"])
            assert event["clientInitiatedDisconnect"] is True


def test_nohup_is_heeded(elf: Elf) -> None:
    """A SIGHUP that whoever started ELF has it ignore ends nothing."""
    window = elf.start("create", 5, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    window.await_line("ELF creating 5 things")
    window.signal(signal.SIGHUP)
    window.end(0)
    assert len(elf.recorded()) == 5


INTERRUPTED_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(name, *_):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


@posix_only
@pytest.mark.parametrize("imported", ["pathlib", "argparse", "iot_elf.runners"])
def test_ctrl_c_before_elf_has_begun_is_quiet(elf: Elf, tmp_path: Path, imported: str) -> None:
    """As a shell sees it, which reports 130."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT.format(name=imported))
    assert elf("list", env={"PYTHONPATH": str(tmp_path)}, status=-signal.SIGINT).err == ""


@posix_only
def test_ctrl_c_twice_on_a_slow_disk_loses_no_key(elf: Elf, account: Account) -> None:
    window = elf.start("create", 4, env=with_slow_disk(0, 0.3))
    window.await_line("ELF creating")
    while not (elf.misc / "things.journal").exists() or b"keyPair" not in (elf.misc / "things.journal").read_bytes():
        assert window.process.poll() is None
        time.sleep(0.01)  # there is no event to wait for
    window.signal(signal.SIGINT)
    window.await_line("press Ctrl-C again to stop now")
    time.sleep(0.06)
    window.signal(signal.SIGINT)
    window.end(130)
    elf("create", 4)
    things = elf.recorded()
    assert len(things) == 4
    assert {thing["certificateId"] for thing in things.values()} == {
        account.certificate_of(f"thing_{number}") for number in range(4)
    }


def unanswered(elf: Elf) -> list[Any]:
    return list(elf.elf_json().get("unanswered", []))


def test_a_signal_ends_the_wait_for_a_turn_and_no_call_counts_as_sent_that_was_not(elf: Elf, account: Account) -> None:
    window = elf.start("create", 60, "--rate", "0.1", "--verbose")
    window.await_line("Thing:'thing_[0-9]+' associated")
    window.signal(signal.SIGTERM)
    result = window.end(143)
    assert GIVEN_UP not in result.err
    assert "got no answer" not in result.err
    recorded = elf.recorded()
    assert {thing["certificateId"] for thing in recorded.values() if "certificateId" in thing} == set(
        account.certificates()
    )
    assert set(account.things()) <= set(recorded)
    cleaned = elf("clean", "--rate", "200")
    assert "got no answer" not in cleaned.err
    assert unanswered(elf) == []
    assert account.is_empty()


def test_a_signal_ends_the_pause_after_a_throttled_call_for_a_certificate(
    elf: Elf, account: Account, proxy: HttpProxy
) -> None:
    proxy.inject("CreateKeysAndCertificate", THROTTLED, onwards=True)
    window = elf.start("create", 3)
    window.await_line("CreateKeysAndCertificate: AWS is busy: trying again")
    window.signal(signal.SIGTERM)
    assert GIVEN_UP not in window.end(143).err
    proxy.reset()
    assert "got no answer" not in elf("clean").err
    assert account.is_empty()


def test_a_signal_ends_the_wait_for_what_aws_has_not_done_yet(elf: Elf, account: Account, proxy: HttpProxy) -> None:
    elf("create")
    elf("send", *elf.to_broker, *ONCE)
    proxy.inject("DeletePolicy", IN_USE["DeletePolicy"], onwards=True)
    window = elf.start("clean")
    window.await_line("trying again for up to 300 s")
    window.signal(signal.SIGINT)
    assert GIVEN_UP not in window.end(130).err
    proxy.reset()
    elf("clean")
    assert account.is_empty()


def test_a_step_that_is_stopped_leaves_no_thread_behind(module: Any) -> None:
    """Threads wait for work without using the processor, and end with the loop."""
    before = threading.active_count()
    inbox = EventQueue()
    assert dict(run_parallel(inbox, range(50), lambda number: number * 2)) == {n: 2 * n for n in range(50)}
    assert threading.active_count() == before
