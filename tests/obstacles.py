"""What can be in a user's way on this machine and next to it: ports that lead nowhere, and a Python that may not."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from harness import Elf

CLOSED_PORT = 9  # discard: nobody serves it any more, and the system hands it out to nobody


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port whose connections are opened, and never heard."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port that drops what comes, as a firewall does: its queue of connections is full, and nobody takes one out."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])


class Impostor:
    """A server on localhost with a TLS certificate of its own making, who hears what a client says and hangs up.

    It first says `answer`; with `holds`, it says nothing and does not hang up either.
    """

    def __init__(self, directory: Path, answer: bytes = b"", holds: bool = False) -> None:
        self.root_cert = directory / "impostor.pem"
        self._answer, self._holds = answer, holds
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self._certify())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _certify(self) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "impostor")])
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.root_cert.write_bytes(certificate.public_bytes(pem) + private)
        return self.root_cert

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(connection, server_side=True) as client:
            client.recv(65536)
            client.sendall(self._answer)
            while self._holds and client.recv(65536):
                pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes accept(); close() alone does not
        self._listener.close()


# What is done before elf.py runs, as Python code. `command` is what will: the Python, elf.py and its arguments.
# Root may read and write everything, unless it has lost CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
NOT_AS_ROOT = """
import ctypes
if os.getuid() == 0:
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
"""
WITHOUT_PACKAGES = "command.insert(1, '-S')"
ONE_PORT = "echo 40000 40000 > /proc/sys/net/ipv4/ip_local_port_range"
WITH_ONE_FREE_PORT = f"""command[:0] = ['unshare', '-rn', 'sh', '-c', '{ONE_PORT} && exec "$@"', 'sh']"""


def limited(resource: str, limit: int) -> str:
    return f"import resource; resource.setrlimit(resource.{resource}, ({limit}, {limit}))"


def read_only(directory: Path) -> str:
    remount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    return f"command[:0] = ['unshare', '-rm', 'sh', '-c', {remount!r}, {str(directory)!r}]"


def hamper(elf: Elf, directory: Path, code: str) -> None:
    """Have all that a user runs from now on run after this code."""
    wrapper = directory / "python"
    wrapper.write_text(
        f"#!{sys.executable}\nimport os, sys\ncommand = [{elf.python!r}, *sys.argv[1:]]\n"
        f"{code}\nos.execvp(command[0], command)\n"
    )
    wrapper.chmod(0o700)
    elf.python = str(wrapper)


def can_unshare() -> bool:
    """Say whether a user of this machine may make namespaces, in which a disk or the network is another one."""
    try:
        return not subprocess.run(
            ["unshare", "-rmn", "sh", "-c", ONE_PORT], capture_output=True, check=False
        ).returncode
    except FileNotFoundError:
        return False
