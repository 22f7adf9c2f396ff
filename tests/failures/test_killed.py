"""elf.py is killed at any instant, and the next commands finish what it was at and lose nothing of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from support.aws import Account, AwsService
from support.http_proxy import HANG, HttpProxy
from support.machine import PATIENCE_S, posix_only, with_slow_disk
from support.program import constant
from support.shell import Elf, InProcess, assert_whole

from iot_elf.events import EventQueue
from iot_elf.state import Fleet

THINGS = 5
KILLS, MANY_KILLS = 1, 15  # a test; with --matrix
COMMANDS = ("create", "send", "clean")

ONCE = ("--duration", "0.01")


class Victim:
    """A user of some things, some of whose commands are killed. What comes after a kill is quicker in process."""

    def __init__(self, elf: Elf, main: InProcess, account: Account, proxy: HttpProxy) -> None:
        self._elf, self._main, self._account, self._proxy = elf, main, account, proxy
        self._arguments: dict[str, tuple[object, ...]] = {
            "create": ("create", THINGS),
            "send": ("send", *elf.to_broker, "--duration", "0.01"),
            "clean": ("clean",),
        }
        self._in_flight = int(constant("CALLS_IN_FLIGHT"))
        self.printed = ""  # since the last kill

    def run(self, command: str, status: int = 0) -> str:
        err = self._main(*self._arguments[command], status=status).err
        self.printed += err
        return err

    def prepare(self, command: str, rng: random.Random) -> None:
        """Do what comes before a command: its things exist, and for `clean` most of them have policies."""
        if command != "create":
            self.run("create")
        if command == "clean" and rng.random() < 0.7:
            self.run("send")

    @contextlib.contextmanager
    def _far_away(self) -> Iterator[None]:
        """Take some time over each call, so that many a kill finds some on their way."""
        self._proxy.round_trip_s = 0.03
        yield
        self._proxy.round_trip_s = 0.0

    def time(self, command: str) -> float:
        """Run a command, undisturbed; return how many seconds it took."""
        with self._far_away():
            started = time.monotonic()
            self._elf(*self._arguments[command])
            return time.monotonic() - started

    def kill(self, command: str, after_s: float, loses_calls: bool) -> bool:
        """Kill a command so long after its start, and wait until AWS is done with its calls; False: it was quicker.

        A call that is on its way at that moment arrives or not, with `loses_calls`.
        """
        self._proxy.loses_abandoned = loses_calls
        with self._far_away():
            window = self._elf.start(*self._arguments[command])
            with contextlib.suppress(subprocess.TimeoutExpired):
                window.process.wait(after_s)
            window.kill()
            self._proxy.await_quiet(PATIENCE_S)
        self.printed = ""
        with contextlib.suppress(FileNotFoundError):
            json.loads((self._elf.misc / "things.json").read_text())
        return window.process.returncode == -signal.SIGKILL

    def recover(self) -> None:
        """Make the fleet whole again."""
        self.run("create")

    def assert_complete(self) -> None:
        """Ask AWS for the things: each has the one certificate that ELF has the files of."""
        recorded, statuses = self._elf.recorded(), self._account.certificates()
        assert set(self._account.things()) == set(recorded) == {f"thing_{number}" for number in range(THINGS)}
        for name, thing in recorded.items():
            pem, pub, prv = ((self._elf.misc / f"{name}.{suffix}").read_bytes() for suffix in ("pem", "pub", "prv"))
            certificate = x509.load_pem_x509_certificate(pem)
            certificate_id = certificate.fingerprint(SHA256()).hex()  # as AWS IoT names it
            assert certificate_id == thing["certificateId"] == self._account.certificate_of(name)
            assert statuses[certificate_id] == "ACTIVE"
            private_key = load_pem_private_key(prv, None, unsafe_skip_rsa_key_validation=True)  # quicker
            assert certificate.public_key() == load_pem_public_key(pub) == private_key.public_key()

    def assert_nothing_left(self, unanswered: bool) -> None:
        """Ask AWS for what is left; take away the certificates without an answer, if there may be any, as a user can.

        ELF has named them, and no more than calls can have been in flight.
        """
        assert self._elf.files() == ["elf.json"]
        assert set(self._elf.elf_json()) <= {"elf_id", *(["unanswered"] if unanswered else [])}
        assert (self._account.things(), self._account.policies()) == ([], [])
        certificates, iot = self._account.certificates(), self._account.iot
        assert len(certificates) <= (self._in_flight if unanswered else 0)
        for certificate_id in certificates:
            assert certificate_id in self.printed
            described = iot.describe_certificate(certificateId=certificate_id)["certificateDescription"]
            assert iot.list_principal_things(principal=described["certificateArn"])["things"] == []
            assert iot.list_attached_policies(target=described["certificateArn"])["policies"] == []
            iot.update_certificate(certificateId=certificate_id, newStatus="INACTIVE")
            iot.delete_certificate(certificateId=certificate_id)


@pytest.fixture
def victim(elf: Elf, main: InProcess, account: Account, proxy: HttpProxy) -> Victim:
    return Victim(elf, main, account, proxy)


@pytest.mark.long
@pytest.mark.parametrize("killed", COMMANDS)
def test_what_a_killed_command_was_at_is_finished_by_the_next_ones(
    victim: Victim, killed: str, pytestconfig: pytest.Config
) -> None:
    rng = random.Random(killed)
    victim.prepare(killed, rng)
    duration_s = victim.time(killed)
    victim.run("clean")
    left = MANY_KILLS if pytestconfig.getoption("matrix") else KILLS
    while left:
        victim.prepare(killed, rng)
        if victim.kill(killed, rng.uniform(0, duration_s), loses_calls=rng.random() < 0.5):
            left -= 1
        else:
            duration_s *= 0.9  # it is quicker than it was
        if rng.random() < 0.2:
            victim.run("clean")
            victim.assert_nothing_left(unanswered=killed == "create")
        victim.recover()
        victim.assert_complete()
        if rng.random() < 0.2:
            victim.run("send")
        victim.run("clean")
        victim.assert_nothing_left(unanswered=killed == "create")


@pytest.mark.sample(2)
@pytest.mark.parametrize("operation", ["DetachPolicy", "UpdateCertificate", "DeleteCertificate", "DeleteThing"])
def test_create_alone_makes_whole_what_a_killed_clean_left(
    main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, operation: str
) -> None:
    main("create", 3)
    main("send", *elf.to_broker, *ONCE)
    proxy.inject(operation, HANG, call=2, onwards=True)
    window = elf.start("clean")
    proxy.await_hang(PATIENCE_S)
    window.kill()
    proxy.release()
    proxy.await_quiet(PATIENCE_S)
    proxy.reset()
    assert "finishing an interrupted clean of: " in main("create", 3).err
    assert_whole(elf, account, 3)
    assert "3 acknowledged, 0 lost" in main("send", *elf.to_broker, *ONCE).err
    main("clean")
    assert account.is_empty()


def journal_of_a_fleet(elf: Elf) -> tuple[list[Any], list[str]]:
    """The entries of a fleet, and the lines of the journal from which it came, keys included."""
    entries = json.loads((elf.misc / "things.json").read_text())
    lines = []
    for entry in entries:
        ((name, recorded),) = entry.items()
        pem, pub, prv = ((elf.misc / f"{name}.{suffix}").read_text() for suffix in ("pem", "pub", "prv"))
        keys = {"certificatePem": pem, "keyPair": {"PublicKey": pub, "PrivateKey": prv}}
        for stage in ({"elf_stage": "creating"}, {**recorded, **keys, "elf_stage": "creating"}, recorded):
            lines.append(json.dumps({name: stage}) + "\n")
    return entries, lines


def test_a_journal_that_is_cut_off_anywhere_is_read_and_repaired(
    module: Any, elf: Elf, account: Account, tmp_path: Path
) -> None:
    elf("create", 2)
    _, lines = journal_of_a_fleet(elf)
    journal = "".join(lines)
    ends = [0, *(sum(map(len, lines[: number + 1])) for number in range(len(lines)))]
    cuts = sorted({*range(0, len(journal), 97), *ends, *(end - 1 for end in ends[1:])})
    for cut in cuts:
        directory = tmp_path / str(cut)
        directory.mkdir(mode=0o700)
        (directory / "things.journal").touch(mode=0o600)
        (directory / "things.journal").write_text(journal[:cut])
        fleet = Fleet(directory)
        with fleet.held("create", exclusive=True, wait_s=0, events=EventQueue()):
            pass
        whole = sum(end <= cut for end in ends[1:])
        assert list(fleet.things) == [f"thing_{number}" for number in range((whole + 2) // 3)]
        for name, thing in fleet.things.items():
            if thing.certificate_arn:
                for file in fleet.files(name):
                    assert file.read_text() == (elf.misc / file.name).read_text()
                    assert os.name != "posix" or file.stat().st_mode & 0o777 == 0o600
        left = {path.name for path in directory.iterdir()} - {
            file.name for name in fleet.things for file in fleet.files(name)
        }
        assert left <= ({"things.json"} if whole else {"things.journal"})


def test_what_a_crash_left_is_taken_up_in_one_line_and_used(elf: Elf, account: Account, service: AwsService) -> None:
    elf("create", 2)
    _, lines = journal_of_a_fleet(elf)
    for path in elf.misc.glob("thing_*"):
        path.unlink()
    (elf.misc / "things.json").unlink()
    (elf.misc / "things.journal").write_text("".join(lines) + '{"thing_1": {"elf_st')
    (elf.misc / ".thing_0.prv.abcd_123.elf-half").write_text("half a key")
    (elf.misc / ".mine").write_text("not ELF's")
    result = elf("send", *elf.to_broker, *ONCE)
    assert len([line for line in result.lines if "recovered 6 changes from a run that was interrupted" in line]) == 1
    assert "2 acknowledged, 0 lost" in result.err
    assert "keyPair" not in (elf.misc / "things.json").read_text()
    assert not {".thing_0.prv.abcd_123.elf-half", "things.journal"} & set(elf.files())
    elf("clean")
    assert account.is_empty()
    assert elf.files() == [".mine", "elf.json"]


@posix_only
@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_kill_at_any_step_of_create_loses_no_key(elf: Elf, main: InProcess, account: Account, first: int) -> None:
    """At each fsync() of a create: what is made by then is taken up by the next create, and nothing is made twice."""
    step, status = first - 3, -signal.SIGKILL
    while status == -signal.SIGKILL:
        step += 3
        status = elf("create", 2, status=None, env=with_slow_disk(step, 0)).status
        main("create", 2)
        orphans = len(account.certificates()) - 2
        assert orphans in (0, 1, 2)  # certificates asked for and never recorded: said as unanswered, not lost keys
        if orphans:
            assert elf.elf_json()["unanswered"]
        for name in ("thing_0", "thing_1"):
            assert account.certificates()[account.certificate_of(name)] == "ACTIVE"
            assert (elf.misc / f"{name}.prv").read_text().startswith("-----BEGIN")
        main("clean")
        for certificate in account.certificates():
            account.iot.update_certificate(certificateId=certificate, newStatus="INACTIVE")
            account.iot.delete_certificate(certificateId=certificate)
        shutil.rmtree(elf.misc, ignore_errors=True)
    assert status == 0
    assert step > 10


def test_what_a_killed_command_had_locked_is_free(elf: Elf, account: Account) -> None:
    window = elf.start("create", 400, "--verbose")
    window.await_line("Thing:'thing_0' associated")
    window.kill()
    assert ".lock" in elf.files()
    elf("clean")
    assert account.things() == []


@pytest.mark.long
def test_the_workers_of_a_killed_send_keep_nothing_locked(elf: Elf, account: Account) -> None:
    elf("create", 20, "--rate", 200)
    elf("send", *elf.to_broker, "--duration", "0.01", "--rate", 200)
    window = elf.start("send", *elf.to_broker, "--duration", "60", "--verbose")
    window.await_line("posting message")
    workers = psutil.Process(window.process.pid).children(recursive=True)
    window.kill()
    elf("clean", "--rate", 200)  # whether they have ended by now or not
    assert account.is_empty()
    assert psutil.wait_procs(workers, timeout=15)[1] == []


def test_what_a_crash_left_in_the_journal_counts_but_for_a_line_that_is_cut_off(elf: Elf, account: Account) -> None:
    elf("create", 3)
    first, second, third = json.loads((elf.misc / "things.json").read_text())
    (elf.misc / "things.json").write_text(json.dumps([first, third]))
    journal = [{"thing_1": {"elf_stage": "creating"}}, second, {"thing_2": None}]
    (elf.misc / "things.journal").write_text("".join(json.dumps(entry) + "\n" for entry in journal) + '{"thing_7": {"c')
    assert "beyond the 1 requested: thing_1" in elf("create", 1, status=1).err
    assert [first, second] == json.loads((elf.misc / "things.json").read_text())
    assert not (elf.misc / "things.journal").exists()
    (elf.misc / "things.json").write_text(json.dumps([first, second, third]))
    elf("clean")
    assert account.is_empty()
