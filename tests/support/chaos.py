"""A broker that restarts, refuses, delays and repeats at random, as MQTT 3.1.1 allows, and counts what it heard."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from pathlib import Path

from support.mqtt import CONNACK, PUBACK, PUBLISH, SUBSCRIBE, Broker, Packet, Peer, answer_to, packet

# What becomes of a connection, and how often.
CONNECTS = Counter({"": 12, "reset": 1, "closed in the handshake": 1, "no CONNACK": 1, "refused": 1})
# What becomes of a message that is heard.
MESSAGES = Counter({"": 120, "no PUBACK": 1, "late": 8, "two PUBACKs": 8, "closed": 1, "acknowledged, and closed": 1})


class ChaosBroker(Broker):
    """Each `restart_s` on average it restarts; each connection, and each message, has a fate of its own.

    `heard` has how often each message came, by thing and number (those of `send --sequence`), `done` what befell them.
    It refuses no thing that it does not know yet: `send` would begin without it, and not send what it missed.
    """

    def __init__(self, directory: Path, seed: int, restart_s: float, down_s: float) -> None:
        self.heard: Counter[tuple[str, int]] = Counter()
        self.acknowledged: set[tuple[str, int]] = set()
        self.done: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._restart_s, self._down_s = restart_s, down_s
        self._is_down = False
        self._connections: set[socket.socket] = set()
        self._known: set[str] = set()
        self._is_over = threading.Event()
        super().__init__(directory)
        threading.Thread(target=self._restart, daemon=True).start()

    def close(self) -> None:
        self._is_over.set()
        super().close()

    def _pick(self, fates: Counter[str]) -> str:
        (fate,) = self._chance.choices(list(fates), list(fates.values()))
        self.done[fate] += 1
        return fate

    def _restart(self) -> None:
        while not self._is_over.wait(self._chance.uniform(0.5, 1.5) * self._restart_s):
            self._is_down = True
            self.done["restart"] += 1
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._is_over.wait(self._down_s)
            self._is_down = False

    def _meet(self, connection: socket.socket) -> None:
        fate = "reset" if self._is_down else self._pick(CONNECTS)
        with connection:
            if fate == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif fate == "closed in the handshake":
                connection.recv(65536)
            else:
                self._serve_client(connection, fate)

    def _serve_client(self, connection: socket.socket, fate: str) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(connection, server_side=True) as client:
            self._connections.add(client)
            peer = Peer(client, lambda: None)
            try:
                for connect in peer:
                    if fate == "refused" and peer.thing in self._known:
                        peer.send(packet(CONNACK, b"\0\3"))
                    elif not fate or peer.thing not in self._known:
                        peer.send(answer_to(connect))
                        self._known.add(peer.thing)
                        self._attend(peer)
                    return
            finally:
                self._connections.discard(client)

    def _attend(self, peer: Peer) -> None:
        for asked in peer:
            if asked.kind != PUBLISH:
                peer.send(answer_to(asked) * (2 if asked.kind == SUBSCRIBE else 1))
            elif not self._hear(peer, asked):
                return
            peer.packets.clear()

    def _hear(self, peer: Peer, message: Packet) -> bool:
        """Count a message, and do to it what is its fate; return whether the connection goes on."""
        content, fate = json.loads(message.payload), self._pick(MESSAGES)
        name = content["thing"], content["seq"]
        self.heard[name] += 1
        if fate == "late":
            time.sleep(self._chance.uniform(0.0, 0.3))
        if fate not in ("no PUBACK", "closed"):
            self.acknowledged.add(name)
            peer.send(packet(PUBACK, message.mid) * (2 if fate == "two PUBACKs" else 1))
        return "closed" not in fate
