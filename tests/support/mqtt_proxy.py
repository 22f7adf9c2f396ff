"""A proxy that speaks MQTT: it drops, repeats and swaps what things hear of each other, and counts what it did."""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import ssl
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from support.aws import AwsService
from support.mqtt import CONNECT, PUBACK, PUBLISH, Broker, Packet, Peer, packet
from support.shell import Elf

DROP, REPEAT, REPEAT_LATER, SWAP = "drop", "repeat", "repeat later", "swap"


def split(received: bytearray) -> Iterator[Packet]:
    """Take the whole packets out of what was received."""
    while len(received) > 1:
        length = shift = 0
        for at, byte in enumerate(received[1:5], 2):  # noqa: B007 - where the body begins
            length, shift = length | (byte & 127) << shift, shift + 7
            if byte < 128:
                break
        else:
            return
        if len(received) < at + length:
            return
        yield Packet(received[0] >> 4, received[0] & 15, bytes(received[at : at + length]), time.time())
        del received[: at + length]


class MqttProxy(Broker):
    """Between the things of a fleet and its broker: it drops, repeats and swaps messages of each run of a sender.

    What it does to which number is a matter of a seed, of who sends and who hears, and of the `kinds` allowed; `done`
    counts it by sender. It drops neither the first nor the last of the `messages` of a run: without these, nobody who
    hears the others can know that one is missing.
    """

    def __init__(
        self, directory: Path, elf: Elf, service: AwsService, seed: int, messages: int, kinds: list[str]
    ) -> None:
        self.done: Counter[tuple[str, str]] = Counter()
        self._elf, self._service = elf, service
        self._seed, self._messages, self._kinds = seed, messages, kinds
        self._plans: dict[tuple[str, str, str], dict[int, tuple[str, list[int]]]] = {}
        self._kept: dict[tuple[str, str, str], dict[int, bytes]] = defaultdict(dict)
        super().__init__(directory, {thing: [self._relay] * 9 for thing in elf.recorded()})

    def plan(self, hearer: str, thing: str) -> dict[int, tuple[str, list[int]]]:
        """Say what to do with each number of a run, and which of them to pass on when it comes."""
        chance = random.Random(f"{self._seed} {hearer} {thing}")
        plan: dict[int, tuple[str, list[int]]] = {}
        number = 1
        while number <= self._messages:
            what = chance.choice([*self._kinds, *[""] * 5])
            if what == DROP and 1 < number < self._messages:
                plan[number] = DROP, []
            elif what == REPEAT:
                plan[number] = REPEAT, [number, number]
            elif what == REPEAT_LATER and number < self._messages:
                plan |= {number: ("", [number]), number + 1: (REPEAT, [number + 1, number])}
            elif what == SWAP and number < self._messages:
                plan |= {number: ("", []), number + 1: (SWAP, [number + 1, number])}
            else:
                plan[number] = "", [number]
            number = max(plan) + 1
        return plan

    def passed_on(self) -> int:
        """How many messages it passes on in all of one run of all things to all of them."""
        things = list(self._elf.recorded())
        return sum(len(out) for hearer in things for thing in things for _, out in self.plan(hearer, thing).values())

    def _fate(self, hearer: str, message: Packet) -> list[bytes]:
        content = json.loads(message.payload)
        key, number = (hearer, content["thing"], content["run"]), content["seq"]
        plan = self._plans.setdefault(key, self.plan(hearer, content["thing"]))
        what, out = plan[number]
        self.done[content["thing"], what] += 1
        kept = self._kept[key]
        kept[number] = packet(PUBLISH, message.body, message.flags)
        return [kept[each] for each in out]

    def _relay(self, peer: Peer) -> None:
        """Pass on what either side says, in one thread, since TLS connections are no thread's but one's."""
        context = ssl.create_default_context(cafile=str(self._service.root_cert))
        misc = self._elf.misc
        context.load_cert_chain(misc / f"{peer.thing}.pem", misc / f"{peer.thing}.prv")
        behind = socket.create_connection(("localhost", self._service.mqtt_port))
        with context.wrap_socket(behind, server_hostname="localhost") as broker:
            broker.sendall(packet(CONNECT, peer.packets[0].body))
            client, received = peer.connection, bytearray()
            with contextlib.suppress(OSError):
                while True:
                    waiting = [each for each in (client, broker) if each.pending()]
                    for side in waiting or select.select([client, broker], [], [])[0]:
                        if not (data := side.recv(65536)):
                            return
                        if side is client:
                            broker.sendall(data)
                            continue
                        received += data
                        for each in split(received):
                            out = [packet(each.kind, each.body, each.flags)]
                            if each.kind == PUBLISH:
                                out = self._fate(peer.thing, each)
                                if not out and each.flags & 6:
                                    broker.sendall(packet(PUBACK, each.mid))
                            client.sendall(b"".join(out))
