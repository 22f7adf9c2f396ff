"""Mosquitto with mutual TLS on loopback, and the files of a fleet that may connect to it."""

from __future__ import annotations

import contextlib
import datetime
import json
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

CONFIGURATION = """\
listener {port} 127.0.0.1
cafile {directory}/ca.pem
certfile {directory}/server.pem
keyfile {directory}/server.prv
require_certificate true
allow_anonymous true
max_queued_messages 0
max_inflight_messages 0
set_tcp_nodelay true
persistence false
user root
log_type error
"""


def find_mosquitto() -> str | None:
    """Find Debian's mosquitto, which /usr/sbin has and a user's PATH may not."""
    return shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")


class Authority:
    """A certificate authority of its own. One RSA key serves all certificates: making a thousand takes minutes."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.private_key_pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        ).decode()
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ELF benchmark CA")])
        self.root_pem = self._sign(self._name, x509.BasicConstraints(ca=True, path_length=None))

    def certificate_pem(self, common_name: str) -> str:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        return self._sign(name, x509.SubjectAlternativeName([x509.DNSName("localhost")]))

    def _sign(self, subject: x509.Name, extension: x509.ExtensionType) -> str:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(extension, critical=False)
            .sign(self._key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
            .decode()
        )


def write_fleet(directory: Path, authority: Authority, things: int) -> None:
    """Write misc/ as ELF leaves it after the first send of a fleet of `things`."""
    directory.mkdir(mode=0o700, parents=True)
    entries = []
    for number in range(things):
        name = f"thing_{number}"
        certificate_id = f"{number:064x}"
        entries.append(
            {
                name: {
                    "certificateArn": f"arn:aws:iot:us-west-2:000000000000:cert/{certificate_id}",
                    "certificateId": certificate_id,
                    "elf_policy": f"policy-{name}",
                    "elf_policy_arn": f"arn:aws:iot:us-west-2:000000000000:policy/policy-{name}",
                }
            }
        )
        (directory / f"{name}.pem").write_text(authority.certificate_pem(name))
        (directory / f"{name}.prv").touch(mode=0o600)
        (directory / f"{name}.prv").write_text(authority.private_key_pem)
    (directory / "things.json").write_text(json.dumps(entries))
    (directory / "elf.json").write_text(json.dumps({"elf_id": uuid.uuid4().urn, "fleet": {"region": "us-west-2"}}))


class Site(NamedTuple):
    """A fleet, and a broker that lets it in."""

    misc: Path
    port: int
    root_cert: Path


@contextlib.contextmanager
def site(things: int) -> Iterator[Site]:
    """Have a fleet of `things` and a Mosquitto for it until the block ends; exit where there is no Mosquitto."""
    if not find_mosquitto():
        sys.exit("this benchmark needs Mosquitto: apt-get install mosquitto, or brew install mosquitto")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < (needed := things + 200):  # Mosquitto does not raise its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    with tempfile.TemporaryDirectory() as name:
        directory, authority = Path(name), Authority()
        write_fleet(directory / "misc", authority, things)
        with mosquitto(directory / "broker", authority) as port:
            yield Site(directory / "misc", port, directory / "broker" / "ca.pem")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def mosquitto(directory: Path, authority: Authority) -> Iterator[int]:
    """Run Mosquitto with files in `directory`; yield its port."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "ca.pem").write_text(authority.root_pem)
    (directory / "server.pem").write_text(authority.certificate_pem("localhost"))
    (directory / "server.prv").touch(mode=0o600)
    (directory / "server.prv").write_text(authority.private_key_pem)
    port = free_port()
    (directory / "mosquitto.conf").write_text(CONFIGURATION.format(port=port, directory=directory))
    with (directory / "mosquitto.log").open("w") as log:
        broker = subprocess.Popen([str(find_mosquitto()), "-c", str(directory / "mosquitto.conf")], stderr=log)
    try:
        while broker.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        if broker.poll() is not None:
            raise RuntimeError(f"mosquitto ended with {broker.returncode}")
        yield port
    finally:
        broker.terminate()
        broker.wait()
