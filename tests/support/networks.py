"""Networks between ELF and what it talks to: relays that break, ports that lead nowhere, servers of somebody else."""

from __future__ import annotations

import contextlib
import datetime
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support.aws import AwsService
from support.machine import PATIENCE_S

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


def certificate_and_key(
    key: ec.EllipticCurvePrivateKey, subject: str, issuer: str, host: str, is_ca: bool, begins_in_h: float = -1
) -> bytes:
    """A certificate for a host that `key` signs and is for, valid for two hours, and the key, in PEM."""
    subject_name, issuer_name = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in (subject, issuer)
    )
    begins = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=begins_in_h)
    certificate = (
        x509.CertificateBuilder(issuer_name, subject_name, key.public_key(), x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + datetime.timedelta(hours=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem) + private


class Impostor:
    """A server on localhost with a TLS certificate of its own making, who hears what a client says and hangs up.

    It first says `answer`; with `holds`, it says nothing and does not hang up either.
    """

    def __init__(
        self, directory: Path, answer: bytes = b"", holds: bool = False, port: int = 0, begins_in_h: float = -1
    ) -> None:
        self.root_cert = directory / "impostor.pem"
        self._answer, self._holds, self._begins_in_h = answer, holds, begins_in_h
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self._certify())
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _certify(self) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        names = "impostor", "impostor", "localhost"
        self.root_cert.write_bytes(certificate_and_key(key, *names, is_ca=True, begins_in_h=self._begins_in_h))
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


class Relay:
    """A TCP relay to a port of this machine: a network that can break in several ways, and be repaired.

    `arrivals` has the time.monotonic() of each connection that came, `resets` that of each client's TCP reset.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._sockets: list[socket.socket] = []  # of what is connected
        self._changing = threading.Lock()
        self._silent = False
        self.arrivals: list[float] = []
        self.resets: list[float] = []
        self._clients: set[socket.socket] = set()
        self._arrived = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._serve()

    def _serve(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                client, _ = listener.accept()
                with self._changing:
                    if listener is not self._listener:  # it went down meanwhile
                        client.close()
                        return
                    with self._arrived:
                        self.arrivals.append(time.monotonic())
                        self._arrived.notify_all()
                    self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        if self._silent:
            self._sockets.append(client)
            return
        try:
            target = socket.create_connection(("127.0.0.1", self._target_port))
        except OSError:
            client.close()
            return
        self._sockets += [client, target]
        self._clients.add(client)
        for source, sink in ((client, target), (target, client)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @contextlib.contextmanager
    def _noting_reset(self, end: socket.socket) -> Iterator[None]:
        """Take note of a client's reset: the system tells it to whichever of the two threads is next, and to one."""
        try:
            yield
        except ConnectionResetError:
            if end in self._clients:
                self.resets.append(time.monotonic())
            raise

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is cut
            data = b"x"
            while data:
                with self._noting_reset(source):
                    data = source.recv(65536)
                if not self._silent:
                    with self._noting_reset(sink):
                        sink.sendall(data)
        if not self._silent:  # else the other end does not hear of this one's end either
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

    def to_broker(self, service: AwsService) -> tuple[str, ...]:
        """The options by which ELF connects through it."""
        return "--mqtt-endpoint", f"localhost:{self.port}", "--root-cert", str(service.root_cert)

    def await_arrivals(self, number: int) -> None:
        """Wait until so many connections have come."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.arrivals) >= number, PATIENCE_S), self.arrivals

    def cut(self) -> None:
        """Cut what is connected now; new connections are taken."""
        with self._changing:
            self._cut()

    def _cut(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def down(self) -> None:
        """Cut what is connected, and refuse new connections until up()."""
        with self._changing:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # which wakes accept(); close() alone does not
            self._listener.close()
            self._listener = socket.socket()
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(("127.0.0.1", self.port))  # nobody else shall have it; it does not listen yet
            self._cut()

    def up(self) -> None:
        """Take connections on the same port again."""
        self._listener.listen()
        self._serve()

    def silence(self) -> None:
        """Drop all that is sent from now on, in both directions; take new connections, and tell them nothing."""
        with self._changing:
            self._silent = True

    def unsilence(self) -> None:
        """Cut what was silent, which has lost bytes, and relay what connects from now on."""
        with self._changing:
            self._cut()
            self._silent = False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


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
