"""MQTT without ELF: a client of MiniStack's broker, and a broker that does to each connection what a script says."""

from __future__ import annotations

import collections
import contextlib
import queue
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from support.aws import AwsService
from support.machine import PATIENCE_S
from support.networks import Impostor
from support.shell import Elf

END = "end-of-test"


class Heard(NamedTuple):
    topic: str
    payload: bytes
    qos: int
    retain: bool = False  # it was there before


class Client:
    """An MQTT client that is not ELF's, and has a certificate and a key in files."""

    def __init__(
        self, service: AwsService, certificate: Path, key: Path, client_id: str, clean_session: bool = True
    ) -> None:
        self._service = service
        self.session_present = False  # as CONNACK says
        self._heard: queue.Queue[Heard] = queue.Queue()
        self._answers: queue.Queue[Any] = queue.Queue()
        self._mqtt = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id, clean_session=clean_session, reconnect_on_failure=False
        )
        self._mqtt.tls_set(str(service.root_cert), str(certificate), str(key))
        self._mqtt.on_connect = self._on_connect
        self._mqtt.on_disconnect = lambda client, data, flags, reason, properties: self._answers.put(
            f"closed: {reason}"
        )
        self._mqtt.on_subscribe = lambda client, data, mid, reasons, properties: self._answers.put(reasons)
        self._mqtt.on_message = lambda client, data, message: self._heard.put(
            Heard(message.topic, bytes(message.payload), message.qos, message.retain)
        )

    def _on_connect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.session_present = flags.session_present
        self._answers.put(str(reason))

    def connect(self) -> str:
        """Connect; return how the broker answered: "Success", or why not."""
        self._mqtt.connect("localhost", self._service.mqtt_port)
        self._mqtt.loop_start()
        return str(self._answers.get(timeout=PATIENCE_S))

    def subscribe(self, topic_filter: str) -> None:
        self._mqtt.subscribe(topic_filter, qos=1)
        (reason,) = self._answers.get(timeout=PATIENCE_S)
        assert not reason.is_failure

    def publish(self, topic: str, payload: str | bytes, qos: int = 1, retain: bool = False) -> None:
        self._mqtt.publish(topic, payload, qos, retain).wait_for_publish(PATIENCE_S)

    def hear(self) -> Heard:
        while (heard := self._heard.get(timeout=PATIENCE_S)).topic == END:
            pass
        return heard

    def hear_all(self) -> list[Heard]:
        """Return all that has come until now. Messages come in order: what comes after this one was sent later."""
        token = secrets.token_bytes(8)
        self.publish(END, token)
        heard = list(iter(lambda: self._heard.get(timeout=PATIENCE_S), Heard(END, token, 1)))
        return [message for message in heard if message.topic != END]

    def close(self) -> None:
        self._mqtt.disconnect()
        self._mqtt.loop_stop()


def mqtt_client_of(elf: Elf, service: AwsService, thing: str, client_id: str, clean_session: bool = True) -> Client:
    """Make an MQTT client that uses the files of a thing."""
    return Client(service, elf.misc / f"{thing}.pem", elf.misc / f"{thing}.prv", client_id, clean_session)


# MQTT 3.1.1, table 2.1
CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = 1, 2, 3, 4, 8, 9, 12, 13, 14


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
        self.ended_at = 0.0  # time.time()
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
        self.ended_at = time.time()

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

    With `accepted`, it takes those alone whose certificates these have signed. Before TLS, it resets the first
    `resets` connections, and ends as many more without a word.
    """

    def __init__(
        self,
        directory: Path,
        scripts: Mapping[str, Sequence[Script]] | None = None,
        accepted: Path | None = None,
        version: str = "MAXIMUM_SUPPORTED",
        port: int = 0,
        resets: int = 0,
    ) -> None:
        self.peers: list[Peer] = []  # in the order of their CONNECT
        self.refused = 0  # connections without one
        self._scripts = {thing: collections.deque(its) for thing, its in (scripts or {}).items()}
        self._accepted, self._version = accepted, ssl.TLSVersion[version]
        self._ends = collections.deque([True] * resets + [False] * resets)  # of the first connections: by a reset
        self._news = threading.Condition()
        super().__init__(directory, port=port)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # what is not read is soon felt
        # As on Ethernet: for the segments of 64 kB on loopback, the client's system holds megabytes that are not read.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)

    @property
    def to_broker(self) -> tuple[str, ...]:
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
            if self._ends:
                if not self._ends.popleft():
                    connection.recv(65536)
                else:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
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
