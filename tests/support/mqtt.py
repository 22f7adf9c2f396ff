"""What can be in a user's way on this machine and next to it: ports that lead nowhere, and a Python that may not."""

from __future__ import annotations

import collections
import contextlib
import datetime
import queue
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support.shell import PATIENCE_S, Elf, Relay

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

    def __init__(self, directory: Path, answer: bytes = b"", holds: bool = False, port: int = 0) -> None:
        self.root_cert = directory / "impostor.pem"
        self._answer, self._holds = answer, holds
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self._certify())
        self._listener = socket.create_server(("127.0.0.1", port))
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


# MQTT 3.1.1, table 2.1
CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP = 1, 2, 3, 4, 8, 9, 12, 13


class Packet(NamedTuple):
    """What has come, with its time.time()."""

    kind: int
    flags: int
    body: bytes
    at: float

    @property
    def mid(self) -> bytes:
        """The packet identifier: of a PUBLISH, which has one at QoS 1, behind the topic."""
        begin = 2 + int.from_bytes(self.body[:2], "big") if self.kind == PUBLISH else 0
        return self.body[begin : begin + 2]

    @property
    def payload(self) -> bytes:
        """The payload of a PUBLISH."""
        return self.body[2 + int.from_bytes(self.body[:2], "big") + (2 if self.flags & 6 else 0) :]


def packet(kind: int, body: bytes, flags: int = 0) -> bytes:
    length, rest = b"", len(body)
    while not length or rest:
        length += bytes([rest % 128 | (128 if rest > 127 else 0)])
        rest //= 128
    return bytes([kind << 4 | flags]) + length + body


def publish(topic: bytes, payload: bytes, qos: int = 0, retain: bool = False) -> bytes:
    mid = b"\0\7" if qos else b""
    return packet(PUBLISH, struct.pack("!H", len(topic)) + topic + mid + payload, qos << 1 | retain)


def answer_to(asked: Packet) -> bytes:
    """What a broker says to a packet; nothing, to most."""
    answers = {
        CONNECT: lambda: packet(CONNACK, b"\0\0"),
        SUBSCRIBE: lambda: packet(SUBACK, asked.mid + asked.body[-1:]),
        PUBLISH: lambda: packet(PUBACK, asked.mid) if asked.flags & 6 else b"",
        PINGREQ: lambda: packet(PINGRESP, b""),
    }
    return answers.get(asked.kind, bytes)()


class Peer:
    """A client's connection, seen from the broker. Iterating waits for packets, until the client is gone."""

    def __init__(self, connection: ssl.SSLSocket, heard: Callable[[], None]) -> None:
        self.connection, self.protocol = connection, connection.selected_alpn_protocol()
        self.packets: list[Packet] = []
        self.is_over = self.is_patient = False  # patient: it has waited for more until its time-out
        self._heard = heard
        self._stream = connection.makefile("rb")

    def __iter__(self) -> Iterator[Packet]:
        try:
            while first := self._stream.read(1):
                length = shift = 0
                while (byte := self._stream.read(1)[0]) > 127:
                    length, shift = length | (byte & 127) << shift, shift + 7
                body = self._stream.read(length | byte << shift)
                self.packets.append(Packet(first[0] >> 4, first[0] & 15, body, time.time()))
                self._heard()
                yield self.packets[-1]
        except TimeoutError:
            self.is_patient = True
            self._stream = self.connection.makefile("rb")  # the other one is of no use any more
        except (OSError, IndexError):
            pass

    @property
    def thing(self) -> str:
        """Who it is, by the client ID, which is a thing's name and something that is new each time."""
        return self.packets[0].body[12:].decode().rpartition("-")[0]

    def of(self, kind: int) -> list[Packet]:
        return [each for each in self.packets if each.kind == kind]

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(self) -> None:
        """Behave, until the client is gone."""
        for asked in self:
            self.send(answer_to(asked))

    def end(self, data: bytes, how: str = "FIN") -> None:
        """Send something, and have the connection end: with a TCP reset (RST), or with the FIN in the same segment.

        TLS wants to be told first (TLS).
        """
        if how == "RST":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        self.send(data)
        if how == "TLS":
            self.connection.settimeout(0.0)
            with contextlib.suppress(OSError, ValueError):  # the client does not answer yet
                self.connection.unwrap()


Script = Callable[[Peer], None]  # it has a connection's CONNECT to answer, and hangs up when it returns


class Broker(Impostor):
    """A broker that takes any client, and does to each connection of a thing what a script says; then it behaves.

    With `accepted`, it takes those alone whose certificates these have signed.
    """

    def __init__(
        self,
        directory: Path,
        scripts: Mapping[str, Sequence[Script]] | None = None,
        accepted: Path | None = None,
        version: str = "MAXIMUM_SUPPORTED",
        port: int = 0,
    ) -> None:
        self.peers: list[Peer] = []  # in the order of their CONNECT
        self.refused = 0  # connections without one
        self._scripts = {thing: collections.deque(its) for thing, its in (scripts or {}).items()}
        self._accepted, self._version = accepted, ssl.TLSVersion[version]
        self._news = threading.Condition()
        super().__init__(directory, port=port)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # what is not read is soon felt
        # As on Ethernet: for the segments of 64 kB on loopback, the client's system holds megabytes that are not read.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)

    @property
    def options(self) -> tuple[str, ...]:
        """The options by which ELF connects to it."""
        return "--mqtt-endpoint", f"localhost:{self.port}", "--root-cert", str(self.root_cert)

    def _heard(self) -> None:
        with self._news:
            self._news.notify_all()

    def _meet(self, connection: socket.socket) -> None:
        self._context.maximum_version = self._version
        if self._accepted:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._context.load_verify_locations(self._accepted)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                client = self._context.wrap_socket(connection, server_side=True)
            except OSError:
                self.refused += 1
                raise
            with client:
                peer = Peer(client, self._heard)
                for _ in peer:
                    self.peers.append(peer)
                    scripts = self._scripts.get(peer.thing)
                    script = scripts.popleft() if scripts else behave
                    script(peer)
                    break
                peer.is_over = True
                peer._stream.close()
                self._heard()

    def of(self, thing: str, kind: int) -> list[Packet]:
        """All packets of a kind that a thing has sent."""
        return [each for peer in list(self.peers) if peer.thing == thing for each in peer.of(kind)]

    def await_that(self, happened: Callable[[], object]) -> None:
        """Wait until something is so, which a packet or an end brings about."""
        with self._news:
            assert self._news.wait_for(happened, PATIENCE_S)


def behave(peer: Peer) -> None:
    peer.send(answer_to(peer.packets[0]))
    peer.answer()


class SlowRelay(Relay):
    """A network that takes `delay_s` in each direction, however much is under way."""

    def __init__(self, target_port: int, delay_s: float) -> None:
        self._delay_s = delay_s
        super().__init__(target_port)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def deliver() -> None:
            data = b"x"
            with contextlib.suppress(OSError):
                while data:
                    at, data = under_way.get()
                    time.sleep(max(0.0, at - time.monotonic()))  # it is what this network is
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=deliver, daemon=True).start()
        data = b"x"
        while data:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            under_way.put((time.monotonic() + self._delay_s, data))


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
