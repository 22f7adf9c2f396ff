"""A broker that keeps persistent sessions as AWS does: what waited comes at a limited rate, beside what is sent now."""

from __future__ import annotations

import collections
import contextlib
import itertools
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from paho.mqtt.client import topic_matches_sub

from support.mqtt import CONNACK, DISCONNECT, PUBACK, PUBLISH, SUBSCRIBE, Broker, Packet, Peer, answer_to, packet
from support.mqtt_proxy import split

WINDOW = 100  # unacknowledged messages that AWS has under way to a client


class Session:
    """What the broker has of a client. Each message begins with its topic."""

    def __init__(self) -> None:
        self.filters: set[str] = set()
        self.stored = collections.deque[bytes]()  # what came while it was offline, or was not acknowledged
        self.current = collections.deque[bytes]()  # what has come since it is connected
        self.unacknowledged: dict[bytes, bytes] = {}
        self.acknowledged = collections.deque[tuple[bytes, bytes]](maxlen=3)  # the last ones, as if they came too late
        self.waker: socket.socket | None = None  # of the connection that it has
        self._mids = itertools.cycle(range(1, 65536))

    def resume(self, waker: socket.socket) -> None:
        self.suspend()
        self.waker = waker

    def suspend(self) -> None:
        """Keep for the next connection what this one has not delivered."""
        self.stored.extendleft(reversed(self.unacknowledged.values()))
        self.stored.extend(self.current)
        self.unacknowledged.clear()
        self.acknowledged.clear()
        self.current.clear()
        self.waker = None

    def take(self, message: bytes) -> None:
        (self.current if self.waker else self.stored).append(message)
        self.wake()

    def wake(self) -> None:
        if self.waker:
            self.waker.send(b"x")

    def next_packet(self, messages: collections.deque[bytes]) -> bytes:
        message, mid = messages.popleft(), struct.pack("!H", next(self._mids))
        self.unacknowledged[mid] = message
        topic = message[: 2 + int.from_bytes(message[:2], "big")]
        return packet(PUBLISH, topic + mid + message[len(topic) :], flags=2)


class SessionBroker(Broker):
    """All is QoS 1. What a session has stored is delivered at `per_s` messages a second.

    With a connection that ends without a DISCONNECT, the last three acknowledgements are lost.

    https://docs.aws.amazon.com/iot/latest/developerguide/mqtt.html#persistent-session-reconnect
    """

    def __init__(self, directory: Path, things: Iterable[str], per_s: float = 10.0) -> None:
        self.sessions: dict[str, Session] = {}
        self.connacks: list[tuple[str, bool]] = []  # of what asks for no clean session: its client ID, and the flag
        self._interval_s, self._changing = 1 / per_s, threading.RLock()
        super().__init__(directory, {thing: [self._attend] * 99 for thing in things})

    def _attend(self, peer: Peer) -> None:
        """Serve a client, in one thread: a TLS connection is no thread's but one's."""
        about = peer.packets[0].body
        is_clean, client_id = bool(about[7] & 2), about[12:].decode()
        waking, waker = socket.socketpair()
        with waking, waker:
            with self._changing:
                known = self.sessions.get(client_id)
                session = self.sessions[client_id] = Session() if is_clean or not known else known
                session.resume(waker)
                if not is_clean:
                    self.connacks.append((client_id, session is known))
            peer.send(packet(CONNACK, bytes([session is known, 0])))
            with contextlib.suppress(OSError):
                self._serve_client(peer, session, waking)
            with self._changing:
                if session.waker is waker:
                    if not peer.of(DISCONNECT):
                        session.unacknowledged = dict(session.acknowledged) | session.unacknowledged
                    session.suspend()
                    if is_clean:
                        del self.sessions[client_id]
        self._heard()

    def _serve_client(self, peer: Peer, session: Session, waking: socket.socket) -> None:
        received, stored_at = bytearray(), 0.0
        while True:
            with self._changing:
                while session.current and len(session.unacknowledged) < WINDOW:
                    peer.send(session.next_packet(session.current))
                has_more = session.stored and len(session.unacknowledged) < WINDOW
                wait_s = max(0.0, stored_at + self._interval_s - time.monotonic()) if has_more else None
                if wait_s == 0:
                    peer.send(session.next_packet(session.stored))
                    stored_at = time.monotonic()
            if not peer.connection.pending():
                ready, _, _ = select.select([peer.connection, waking], [], [], wait_s)
                if waking in ready:
                    waking.recv(4096)
                if peer.connection not in ready:
                    continue
            if not (data := peer.connection.recv(65536)):
                return
            received += data
            for asked in split(received):
                peer.packets.append(asked)
                self._take(peer, session, asked)

    def _take(self, peer: Peer, session: Session, asked: Packet) -> None:
        with self._changing:
            if asked.kind == PUBACK:
                session.acknowledged.append((asked.body[:2], session.unacknowledged.pop(asked.body[:2])))
            elif asked.kind == SUBSCRIBE:
                session.filters.add(asked.body[4:-1].decode())
            elif asked.kind == PUBLISH:
                size = 2 + int.from_bytes(asked.body[:2], "big")
                topic, message = asked.body[2:size].decode(), asked.body[:size] + asked.payload
                for each in self.sessions.values():
                    if any(topic_matches_sub(topic_filter, topic) for topic_filter in each.filters):
                        each.take(message)
        if answer := answer_to(asked):
            peer.send(answer)
