# SPDX-License-Identifier: Apache-2.0
"""What a thing has to send: queued, in flight, to send again; AWS's limits of a connection."""

from __future__ import annotations

import collections
import math

from iot_elf import defaults
from iot_elf.messages import Message

# https://docs.aws.amazon.com/general/latest/gr/iot-core.html: limits of a connection
MAX_BYTES_PER_S = 512 * 1024
MAX_IN_FLIGHT = 100  # unacknowledged publishes
BURST_S = 0.1  # how far a connection's rate may run ahead, so that one late message does not delay all later ones
MAX_QUEUED = 10_000  # messages that a thing keeps in an outage: 1 MB
# Why a message is sent late, unless this machine is busy.
IN_FLIGHT_LIMIT = (
    f"AWS allows {MAX_IN_FLIGHT} unacknowledged messages per connection, and each acknowledgement is a round trip"
)
RATE_LIMIT = f"AWS allows {1 / defaults.MIN_INTERVAL_S:g} messages/s and {MAX_BYTES_PER_S >> 10} KiB/s per connection"
RETAIN_LIMIT = f"AWS allows {1 / defaults.RETAIN_INTERVAL_S:g} retained message/s per topic"
SLOW_NETWORK = "the network was too slow"
SLOW_READER = "the reader of the output was too slow"
OFFLINE = "there was no connection"


class OutgoingMessage:
    """A message that was taken from the queue, and its times: a time.monotonic() each."""

    __slots__ = ("due", "number", "payload", "sendings", "taken_at", "topic", "written_at")

    def __init__(self, number: int, topic: str, payload: bytes, due: float, taken_at: float) -> None:
        self.number, self.topic, self.payload = number, topic, payload  # the thing's message, from 1
        self.due, self.taken_at = due, taken_at  # taken to be sent for the first time
        self.written_at = math.inf  # when its connection took all of it
        self.sendings = 0  # how many connections took all of it

    @property
    def late_s(self) -> float:
        return self.taken_at - self.due


class Outbox:
    """What a thing has to send: queued, then in flight until it is acknowledged, or at QoS 0 written.

    It knows AWS's limits of a connection, and no connection.
    """

    def __init__(self, thing: str, topic: str, qos: int, retain: bool = False) -> None:
        self.topic, self.qos = topic, qos
        self.rate_limit = RETAIN_LIMIT if retain else RATE_LIMIT  # why messages wait until free_at
        self._interval_s = defaults.RETAIN_INTERVAL_S if retain else defaults.MIN_INTERVAL_S
        self.queued: collections.deque[tuple[float, Message]] = collections.deque()  # what is due, and since when
        self.in_flight: dict[int, OutgoingMessage] = {}  # by number, the oldest first
        self.number = 0  # of the last message that was taken from the queue
        self._thing = thing
        self._to_retransmit: collections.deque[int] = collections.deque()  # those in flight that a connection lost
        self._free_at = 0.0  # time.monotonic() at which the next message is due if all are spread evenly
        self._oldest_since = 0.0  # time.monotonic() when the oldest in flight became the oldest

    @property
    def backlog(self) -> int:
        """How many messages are waiting to be sent or acknowledged."""
        return len(self.queued) + len(self.in_flight)

    @property
    def has_due(self) -> bool:
        """Whether a message can be taken."""
        return bool(self._to_retransmit or self.queued)

    def add(self, message: Message, due: float) -> bool:
        """Queue a message that was due at `due`, a time.monotonic(); return whether the oldest had to go for it."""
        self.queued.append((due, message))
        if len(self.queued) <= MAX_QUEUED:
            return False
        self.queued.popleft()
        return True

    def compose(self, message: Message) -> bytes:
        """Return the payload of a message, which gets the next number.

        Raises UsageError if it can't be sent, and ValueError for a template's result that is not a JSON object.
        """
        self.number += 1
        return message.payload(self.topic_of(message), self._thing, self.number)

    def topic_of(self, message: Message) -> str:
        return message.topic or self.topic

    def take(self, now: float) -> OutgoingMessage:
        """Return the message to send at `now`: what a lost connection left comes first, in the order it was sent.

        Raises what compose() raises; the message is gone then.
        """
        if self._to_retransmit:
            return self.in_flight[self._to_retransmit.popleft()]
        due, message = self.queued[0]  # another thread may look at the backlog while the message is rendered
        try:
            taken = OutgoingMessage(self.number + 1, self.topic_of(message), self.compose(message), due, now)
            self.in_flight[self.number] = taken
        finally:
            self.queued.popleft()
        return taken

    def count_sent(self, payload: bytes, now: float) -> None:
        """Take note that a payload was sent, for the limits of the rate."""
        self._free_at = max(self._free_at, now) + max(self._interval_s, len(payload) / MAX_BYTES_PER_S)

    @property
    def is_window_full(self) -> bool:
        """Whether AWS allows no more unacknowledged messages on this connection."""
        return len(self.in_flight) - len(self._to_retransmit) >= MAX_IN_FLIGHT

    @property
    def free_at(self) -> float:
        """The time.monotonic() from which AWS's rate allows the next message."""
        return self._free_at - BURST_S

    @property
    def waits_since(self) -> float:
        """The time.monotonic() since which the oldest message's acknowledgement could have come; infinite if none can.

        Brokers acknowledge in order, so that on a slow network the oldest is always another one, and never waits long.
        """
        oldest = next(iter(self.in_flight.values()), None)
        return max(self._oldest_since, oldest.written_at) if oldest else math.inf

    def finish(self, number: int, now: float) -> OutgoingMessage | None:
        """Forget a message that was acknowledged, or at QoS 0 written, and return it; None if it is not known."""
        if number == next(iter(self.in_flight), None):
            self._oldest_since = now
        return self.in_flight.pop(number, None)

    def lose_connection(self) -> list[OutgoingMessage]:
        """Send all that is in flight once more, on another connection. Return what is lost: at QoS 0, all of it."""
        lost = [] if self.qos else list(self.in_flight.values())
        if not self.qos:
            self.in_flight.clear()
        for message in self.in_flight.values():
            message.written_at = math.inf
        self._to_retransmit = collections.deque(self.in_flight)
        return lost

    def drop_unsent(self) -> int:
        """Forget all that no connection has taken as a whole, and return how many messages that were."""
        dropped = [each.number for each in self.in_flight.values() if not each.sendings]
        for number in dropped:
            del self.in_flight[number]
        count = len(dropped) + len(self.queued)
        self.queued.clear()
        return count
