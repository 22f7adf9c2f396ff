"""elf.py is killed at any instant, and the next commands finish what it was at and lose nothing of it."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from support.aws import Account
from support.http_proxy import HttpProxy
from support.machine import PATIENCE_S
from support.program import constant
from support.shell import Elf, InProcess

THINGS = 12
KILLS = 10  # a test
COMMANDS = ("create", "send", "clean")


class Victim:
    """A user of twelve things, some of whose commands are killed. What comes after a kill is quicker in process."""

    def __init__(self, elf: Elf, main: InProcess, account: Account, proxy: HttpProxy) -> None:
        self._elf, self._main, self._account, self._proxy = elf, main, account, proxy
        self._arguments: dict[str, tuple[object, ...]] = {
            "create": ("create", THINGS),
            "send": ("send", *elf.broker, "--duration", "0.01"),
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
        """Ask AWS for the twelve things: each has the one certificate that ELF has the files of."""
        recorded, statuses = self._elf.things(), self._account.certificates()
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
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("killed", COMMANDS)
def test_what_a_killed_command_was_at_is_finished_by_the_next_ones(victim: Victim, killed: str, seed: int) -> None:
    rng = random.Random(f"{killed} {seed}")
    victim.prepare(killed, rng)
    duration_s = victim.time(killed)
    victim.run("clean")
    kills = 0
    while kills < KILLS:
        victim.prepare(killed, rng)
        if victim.kill(killed, rng.uniform(0, duration_s), loses_calls=rng.random() < 0.5):
            kills += 1
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
