# SPDX-License-Identifier: Apache-2.0
"""One thing on MQTT: gets and keeps its connection, and publishes."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from iot_elf import defaults, errors, outbox
from iot_elf.defaults import T
from iot_elf.errors import ElfError, Refusal
from iot_elf.messages import Message, Will
from iot_elf.mqtt import Connection, EventLoop
from iot_elf.network import Endpoint
from iot_elf.outbox import Outbox, OutgoingMessage
from iot_elf.refusals import RefusalTracker
from iot_elf.state import ThingFiles
from iot_elf.text import log

REJECTED_WITHIN_S = 2.0  # how soon AWS IoT closes the connection after a message that it refuses
MAX_RECONNECT_PAUSE_S = 4.0  # between attempts to reconnect; in that time AWS accepts all things of a fleet
# Between two CONNECTs of one client ID: AWS allows one a second, as they arrive
# (https://docs.aws.amazon.com/general/latest/gr/iot-core.html).
SAME_ID_PAUSE_S = 1.1
BRIEF_S = 0.3, 20.0  # a connection that lasts so long may have lost its client ID to a client that reconnects, too
ACK_TIMEOUT_S = 30.0  # for a PUBACK on a living connection: seconds if AWS is slow; it sends none for what it throttles
_TLS_REFUSAL = re.compile("ALERT.*(CERTIFICATE|UNKNOWN_CA|ACCESS_DENIED)")  # the other side refuses a certificate
_CONNACK = {  # MQTT 3.1.1, table 3.1
    1: "unacceptable protocol version",
    2: "client identifier rejected",
    3: "server unavailable",
    4: "bad user name or password",
    5: "not authorized",
}
CONNECTING, ONLINE, ENDED = "connecting", "online", "ended"  # a device's states


class DeviceOptions(NamedTuple):
    """How a thing uses MQTT."""

    qos: int
    topic: str = ""  # to publish to what has none of its own
    topic_filters: Sequence[str] = ()  # to subscribe to
    client_id: str = ""  # of all connections; "": a new one for each
    retain: bool = False  # what it publishes
    will: Will | None = None
    session: bool = False  # MQTT's persistent session: subscriptions and QoS 1 messages wait while it is offline

    def needs(self, action: str) -> Iterator[tuple[str, str]]:
        """Yield what a policy must also allow for an action: other actions, and their resources."""
        if action == "iot:Publish" and self.retain:
            yield "iot:RetainPublish", f"topic/{self.topic}"
        if action == "iot:Connect" and self.will:
            yield "iot:Publish", f"topic/{self.will.topic}"
            if self.will.retain:
                yield "iot:RetainPublish", f"topic/{self.will.topic}"
            yield "iot:ConnectAttributes", "LastWill"
        if action == "iot:Connect" and self.session:
            yield "iot:ConnectAttributes", "PersistentConnect"


class PlannedOutage(Exception):  # noqa: N818 - what it is, not what it does
    """Why a thing loses its connection in an outage that the run makes itself."""


class DeviceListener:
    """Gets what happens to devices and their messages, in the loop's thread, which waits for it."""

    def on_connected(self, device: Device) -> None:
        """The thing is connected for the first time, and subscribed to its topic filters."""

    def on_connect_delayed(self, device: Device, reason: str) -> None:
        """An attempt to connect for the first time failed, for a `reason` that may pass, and others follow."""

    def on_connection_interrupted(self, device: Device, error: Exception, rejected: bool) -> None:
        """It lost its connection, just after a message if `rejected`, and is reconnecting.

        A TimeoutError means that it gave the connection up itself, since a message was not acknowledged. After a
        PlannedOutage it waits until that is over.
        """

    def on_connection_resumed(self, device: Device, after_s: float) -> None:
        """It is connected again, and subscribed."""

    def on_refused(self, device: Device, refusal: Refusal) -> None:
        """The broker refuses it, and it keeps trying. AWS may know why."""

    def on_failed(self, device: Device, failure: Exception) -> None:
        """It failed, and does not try again."""

    def on_publish(self, device: Device, number: int, topic: str, payload: bytes, late_s: float) -> None:
        """The thing's message `number` was sent: its connection took all of it."""

    def on_dropped(self, device: Device, number: int, topic: str, payload: bytes) -> None:
        """The thing's message `number` is lost, at QoS 0: there was no connection, or it ended before it took all."""

    def on_puback(self, device: Device, number: int, after_s: float, after_due_s: float) -> None:
        """The broker acknowledged a QoS 1 message, so long after it was sent, and after it was due."""

    def on_retransmit(self, device: Device, number: int) -> None:
        """A message was sent again for the first time, on another connection, as it had not been acknowledged."""

    def on_not_sent(self, device: Device, count: int) -> None:
        """Messages were due, and will not be sent."""

    def on_invalid_message(self, device: Device, number: int, error: Exception) -> None:
        """The thing's message `number` can't be made."""

    def on_message(self, device: Device, message: Any) -> bool | None:
        """The broker delivered a message: the SDK's, with topic, payload, qos and retain.

        From a session it may come before on_connected(). False leaves it there, unacknowledged, for the next one.
        """

    def on_unreadable_message(self, device: Device, error: Exception) -> None:
        """on_message() failed for a message."""


class ConnectAttempt:
    """One attempt of a device to connect, and to subscribe. Only open() is not for the loop's thread.

    Then the device's on_online() is called, and later on_lost(); or on_attempt_failed().
    """

    def __init__(self, device: Device, loop: EventLoop) -> None:
        import secrets

        self.client_id = device.options.client_id or f"{device.thing}-{secrets.token_hex(4)}"
        self.connection: Connection | None = None
        self.began_at = -math.inf  # time.monotonic() of the CONNECT
        self._device, self._loop = device, loop
        self._awaited = "CONNACK"  # or the topic filter whose SUBACK it waits for; empty: it has succeeded
        self._is_over = False  # it has failed, or the device has no use for it any more

    def open(self) -> None:
        """Connect to the broker, in the pool, whose threads may wait."""
        device = self._device
        try:
            if self._is_over:
                return
            log.debug("MQTT %s: CONNECT to %s as %s", device.thing, device.endpoint, self.client_id)
            refuse_blocking_files(device.thing, device.files)
            client = device.open_client(self.client_id, device, self._on_connack, self._on_message)
        except Exception as error:
            if isinstance(error, OSError) and hasattr(error, "verify_code"):  # of a certificate
                from iot_elf.diagnosis import server_certificate

                with contextlib.suppress(OSError, ElfError):
                    error.strerror = f"{error.strerror} ({server_certificate(device.endpoint)})"
            self._loop.call_soon_threadsafe(self._fail, self._tls_refusal(error) or error)
        else:
            self._loop.call_soon_threadsafe(self._use, client)

    def _use(self, client: Any) -> None:
        self.connection = Connection(client, self._loop, self._on_lost)
        if self._is_over:  # meanwhile
            self.connection.reset()  # with nothing sent yet
        else:
            self.began_at = time.monotonic()
            self._expect("CONNACK")
            self.connection.write()

    def close(self) -> None:
        """Disconnect, or do not connect."""
        self._is_over = True
        if self.connection:
            self.connection.close()

    def reset(self) -> None:
        """End the connection as a network that fails, or do not connect."""
        self._is_over = True
        if self.connection:
            self.connection.reset()

    def _expect(self, answer: str) -> None:
        """Wait up to CONNECT_TIMEOUT_S for the broker's answer to what is sent next."""
        self._awaited = answer
        self._loop.call_at(time.monotonic() + defaults.CONNECT_TIMEOUT_S, self._time_out, answer)

    def _time_out(self, answer: str) -> None:
        if self._awaited == answer:
            self._fail(TimeoutError(f"no {answer}"))

    def _on_connack(self, mid: object, data: int) -> None:
        log.debug("MQTT %s: CONNACK %s", self._device.thing, data)
        if self._is_over or self._awaited != "CONNACK" or not self.connection:
            return  # nobody wants it any more, or it is a second one
        self._device.accepted_at, self._device.session_present = time.time(), self.connection.session_present
        if data:
            self._fail(self._refused(f"{_CONNACK.get(data, 'unknown')} (CONNACK {data})"))
        else:
            self._subscribe(iter(self._device.topic_filters))

    def _on_message(self, message: Any) -> None:
        """Hand over what the broker delivered; from a session that is from CONNACK on, before any SUBACK."""
        if self._device.on_message(message) and self.connection:
            self.connection.send_puback(message)

    def _subscribe(self, topic_filters: Iterator[str]) -> None:
        """Subscribe to one after the other: AWS refuses one by closing the connection, without saying which."""

        def on_suback(mid: object, data: Sequence[int] = ()) -> None:  # none in an UNSUBACK, or in rubbish
            if not data or data[0] > 1:
                self._fail(self._refused("it refused the subscription"))
            else:
                self._subscribe(topic_filters)

        topic_filter = next(topic_filters, "")
        if not topic_filter and self.connection:
            self._awaited = ""
            self.connection.allow_pauses()
            self._device.on_online(self.client_id, self.connection)
        elif self.connection and self.connection.is_alive:
            log.debug("MQTT %s: SUBSCRIBE to %s", self._device.thing, topic_filter)
            self._expect(topic_filter)
            self.connection.subscribe(topic_filter, self._device.qos, on_suback)

    def _on_lost(self, error: Exception) -> None:
        """Tell the device, whose loss after a CONNECT or a SUBSCRIBE may be AWS's way to refuse it."""
        if self._is_over:
            return
        if self._awaited:
            self._fail(self._tls_refusal(error) or self._refused("it closed the connection without an answer"))
        else:
            self._device.on_lost(error)

    def _tls_refusal(self, error: Exception) -> Refusal | None:
        """Return the refusal in a TLS error about the thing's certificate; TLS 1.3 sends it after the handshake."""
        reason = getattr(error, "reason", None) or ""
        return self._refused(f"TLS says {reason}") if _TLS_REFUSAL.search(reason) else None

    def _refused(self, reason: str) -> Refusal:
        thing, endpoint = self._device.thing, str(self._device.endpoint)
        if self._awaited == "CONNACK":
            needs, client_id = self._device.options.needs("iot:Connect"), self._device.options.client_id
            return Refusal(thing, endpoint, "iot:Connect", client_id or f"{thing}-*", reason, needs=needs)
        return Refusal(thing, endpoint, "iot:Subscribe", self._awaited, reason)

    def _fail(self, error: Exception) -> None:
        if not self._is_over:
            end = self.reset if isinstance(error, TimeoutError) else self.close
            end()
            self._device.on_attempt_failed(error)


class Publisher:
    """Publishes what a device has in its outbox, as its connection and AWS's limits allow; awaits acknowledgements.

    The connection takes the last part of a message when the network does, and only then the message is sent.
    """

    def __init__(self, device: Device, loop: EventLoop, listener: DeviceListener) -> None:
        self.blocked_by = ""  # why messages are waiting
        self._device, self._loop, self._listener = device, loop, listener
        self._outbox = device.outbox
        self._connection: Connection | None = None  # while the device is online
        self._unwritten: OutgoingMessage | None = None  # whose last part the connection has not taken
        self.last_topic, self.last_size = "", 0  # of the last message, and the bytes of its payload
        self._is_scheduled = self._is_watching = False  # whether _on_rate_allows(), _check_acknowledgements() are

    def begin(self, connection: Connection) -> None:
        """Use a new connection: send again what the last one left, then what is due."""
        self._connection, connection.on_writable = connection, self._on_writable
        self.flush()

    def pause(self) -> None:
        """Take note that the connection is lost, and with it, at QoS 0, what it has not taken as a whole."""
        self._connection, self._unwritten, self.blocked_by = None, None, outbox.OFFLINE
        for lost in self._outbox.lose_connection():
            self._listener.on_dropped(self._device, lost.number, lost.topic, lost.payload)

    def end(self) -> int:
        """Send nothing more, as the connection is closed; return how many messages that leaves unsent."""
        connection, self._connection = self._connection, None
        if connection and not connection.is_full:
            self._on_writable()
        return self._outbox.drop_unsent()

    def drop(self, message: Message) -> None:
        """Lose a message for want of a connection."""
        if (payload := self._unless_invalid(lambda: self._outbox.compose(message))) is not None:
            self._listener.on_dropped(self._device, self._outbox.number, self._outbox.topic_of(message), payload)

    def _unless_invalid(self, make: Callable[[], T]) -> T | None:
        """Return what `make` makes of the next message, or None if it can't: the listener gets that."""
        try:
            return make()
        except (ElfError, ValueError) as error:  # ValueError: a template's result is not a JSON object this time
            self._listener.on_invalid_message(self._device, self._outbox.number, error)
            return None

    def flush(self) -> None:
        """Send again what a lost connection left, then what is due, until something prevents it."""
        while self._outbox.has_due:
            if reason := self._blocked_reason():
                if reason != self._outbox.rate_limit or not self.blocked_by:  # which keeps late what another delayed
                    self.blocked_by = reason
                return
            if message := self._unless_invalid(lambda: self._outbox.take(time.monotonic())):
                self._send(message)
        self.blocked_by = outbox.SLOW_NETWORK if self._unwritten else ""

    def _blocked_reason(self) -> str:
        """Return why no message can be sent now, or ""; then something will call flush() again."""
        if not self._connection or not self._connection.is_alive:
            return outbox.OFFLINE
        if self._outbox.is_window_full:
            return outbox.IN_FLIGHT_LIMIT
        if self._loop.is_paused:
            return outbox.SLOW_READER
        if self._connection.is_full:
            return outbox.SLOW_NETWORK
        if (free_at := self._outbox.free_at) > time.monotonic():
            if not self._is_scheduled:
                self._is_scheduled = True
                self._loop.call_at(free_at, self._on_rate_allows)
            return self._outbox.rate_limit
        return ""

    def _on_rate_allows(self) -> None:
        self._is_scheduled = False
        self.flush()

    def _send(self, message: OutgoingMessage) -> None:
        if not (connection := self._connection):
            return
        device, now, self._unwritten = self._device, time.monotonic(), message
        self.last_topic, self.last_size = message.topic, len(message.payload)
        if device.refusals.on_send():
            self._loop.call_at(now + REJECTED_WITHIN_S, self._trust, connection)
        self._outbox.count_sent(message.payload, now)
        on_puback = functools.partial(self._on_puback, message.number) if device.qos else None
        message_id = connection.publish(message.topic, message.payload, device.qos, device.options.retain, on_puback)
        log.debug("MQTT %s: PUBLISH %s to %s", device.thing, message_id, message.topic)
        if self._unwritten is message and not connection.is_full:
            self._on_written(message)

    def _on_writable(self) -> None:
        if self._unwritten:
            self._on_written(self._unwritten)
        self.flush()

    def _on_written(self, message: OutgoingMessage) -> None:
        self._unwritten = None
        message.written_at = time.monotonic()
        message.sendings += 1
        if message.sendings == 1:
            self._listener.on_publish(self._device, message.number, message.topic, message.payload, message.late_s)
        elif message.sendings == 2:
            self._listener.on_retransmit(self._device, message.number)
        if not self._device.qos:
            self._outbox.finish(message.number, message.written_at)
        elif not self._is_watching:
            self._watch(message.written_at + ACK_TIMEOUT_S)

    def _watch(self, until: float) -> None:
        self._is_watching = True
        self._loop.call_at(until, self._check_acknowledgements)

    def _check_acknowledgements(self) -> None:
        """Give up a connection on which the oldest message is not acknowledged in time.

        All that is in flight goes out on the next one, with a session of its own, since a broker's session keeps
        nothing of what it received. On the same connection the message would stay in AWS's window, and MQTT 5 forbids
        to send it again there.
        """
        self._is_watching = False
        read_until = time.monotonic() - self._loop.paused_s_ago  # nothing is acknowledged while nothing is read
        until = max(self._outbox.waits_since, read_until) + ACK_TIMEOUT_S
        if time.monotonic() < until < math.inf:
            self._watch(until)
        elif self._connection and until < math.inf:
            self._device.give_up_connection(TimeoutError(f"no acknowledgement for {ACK_TIMEOUT_S:g} s"))

    def _trust(self, connection: Connection) -> None:
        """Forget a refusal if the connection survived its first message: at QoS 0 there is no other sign."""
        if self._connection is connection:
            self._device.refusals.on_success()

    def _on_puback(self, number: int, mid: int, data: object = None) -> None:
        if data is not None:  # a SUBACK, and rubbish
            return
        log.debug("MQTT %s: PUBACK %s", self._device.thing, mid)
        self._device.refusals.on_success()
        now = time.monotonic()
        if message := self._outbox.finish(number, now):
            if message is self._unwritten:  # the broker does not speak MQTT
                self._on_written(message)
            self._listener.on_puback(self._device, number, now - message.taken_at, now - message.due)
        if self._outbox.has_due:
            self.flush()


def passing_reason(error: Exception) -> str:
    """Return why an attempt to connect failed, if another one may succeed: a time-out, a reset, a sudden end; or ""."""
    import ssl

    if isinstance(error, ElfError) and error.name == "ProxyUnanswered":
        return "the proxy does not answer"
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, EOFError)):
        return "it closes the connection in the TLS handshake"
    is_reset = isinstance(error, (ConnectionResetError, ConnectionAbortedError, BrokenPipeError))
    return "it resets the connection" if is_reset else ""


class Device:
    """One thing on MQTT, with its own certificate and key. Only for the loop's thread, as is its listener.

    It connects, reconnects when the connection is lost, and keeps each QoS 1 message until it is acknowledged: the
    SDK's own reconnection takes a refusal for a success, and does not tell what it sent again.
    """

    def __init__(
        self,
        thing: str,
        files: ThingFiles,
        endpoint: Endpoint,
        root_cert: Path,
        loop: EventLoop,
        listener: DeviceListener,
        open_client: Callable[..., Any],
        options: DeviceOptions,
        patience_s: float = 0.0,
    ) -> None:
        """Make one; refusals in the next `patience_s` are ignored.

        `open_client(client_id, device, on_connack, on_message)` connects a client of the SDK.
        """
        self.thing, self.files, self.endpoint, self.root_cert = thing, files, endpoint, root_cert
        self.open_client, self.options = open_client, options
        self.qos, self.topic, self.topic_filters = options.qos, options.topic, options.topic_filters
        self.state = CONNECTING
        self.client_id = ""  # of the last connection
        self.was_connected = False
        self.accepted_at, self.session_present = 0.0, False  # time.time() of the last CONNACK, and its flag
        self.offline_s = 0.0  # in all, once it is online again or has ended
        self.in_outage = self.lost_in_outage = False  # one that the run makes: now; when it was last online
        self.outage_s = 0.0  # the same as offline_s, where one of these ended the connection
        self.brief_connections = 0  # in a row that were ended soon, and came back without a failure of the network
        self.outbox = Outbox(thing, self.topic, self.qos, options.retain)
        self.refusals = RefusalTracker(patience_s)
        self._loop, self._listener = loop, listener
        self._attempt: ConnectAttempt | None = None
        # Attempts since it was online; a time.monotonic() each.
        self._failed_attempts, self._offline_since, self._gives_up_at = 0, 0.0, 0.0
        self._publisher = Publisher(self, loop, listener)

    @property
    def backlog(self) -> int:
        """How many messages are waiting to be sent or acknowledged; none once it has ended."""
        return 0 if self.state == ENDED else self.outbox.backlog

    @property
    def blocked_by(self) -> str:
        """Why messages are waiting."""
        return self._publisher.blocked_by

    @property
    def is_online(self) -> bool:
        return self.state == ONLINE

    @property
    def is_offline(self) -> bool:
        return self.was_connected and self.state == CONNECTING

    @property
    def is_offline_as_planned(self) -> bool:
        """Whether that is for an outage that the run makes, or made just now: no attempt has failed since."""
        return self.in_outage or (self.lost_in_outage and not self._failed_attempts)

    @property
    def unresolved(self) -> Refusal | None:
        """The last refusal, unless it was of a connect for which nothing is left to do."""
        refusal = self.refusals.last
        is_done = self.topic and self.was_connected and not self.backlog
        return None if refusal and refusal.action == "iot:Connect" and is_done else refusal

    def connect(self, after_s: float = 0.0) -> None:
        """Connect and subscribe after `after_s`, when it is its turn; the listener gets the event."""
        self.state, self._attempt = CONNECTING, ConnectAttempt(self, self._loop)
        self._loop.connect_in_turn(self._attempt.open, after_s)

    def on_online(self, client_id: str, connection: Connection) -> None:
        """Use a connection, as its ConnectAttempt asks."""
        self.state, self.client_id = ONLINE, client_id
        self._failed_attempts = 0
        self.refusals.on_online()
        if self.was_connected:
            after_s = self._count_offline()
            self._listener.on_connection_resumed(self, after_s)
        else:
            self.was_connected = True
            self._listener.on_connected(self)
        self._publisher.begin(connection)

    def on_message(self, message: Any) -> bool:
        """Hand over what the broker delivered, and return whether to acknowledge it."""
        try:
            return self._listener.on_message(self, message) is not False
        except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
            self._listener.on_unreadable_message(self, error)
            return True

    def on_lost(self, error: Exception) -> None:
        """Reconnect. A loss after a message may be AWS's way to refuse it."""
        rejected = self.refusals.is_on_trial and not self.in_outage
        self.lost_in_outage = self.in_outage
        self.state, self._offline_since = CONNECTING, time.monotonic()
        log.debug("MQTT %s: lost: %s", self.thing, error)
        topic, size = self._publisher.last_topic, self._publisher.last_size
        self._publisher.pause()
        lasted_s = self._offline_since - self._attempt.began_at if self._attempt else math.inf
        is_brief = BRIEF_S[0] < lasted_s < BRIEF_S[1] and not self.in_outage
        self.brief_connections = self.brief_connections + 1 if is_brief else 0
        self._listener.on_connection_interrupted(self, error, rejected)
        if rejected:
            known = self.thing, str(self.endpoint), "iot:Publish", topic, f" ({size:,} bytes)"
            self._on_refusal(Refusal(*known, needs=self.options.needs("iot:Publish")))
        else:
            self.refusals.clear()
        self._reconnect()

    def give_up_connection(self, error: Exception) -> None:
        """Reset the connection, as where a network seems dead no goodbye arrives, and a will goes out; reconnect."""
        if self._attempt:
            self._attempt.reset()
        self.on_lost(error)

    def on_attempt_failed(self, error: Exception) -> None:
        """Try to connect again, or give up where that can't help, or has not helped for FIRST_CONNECT_S."""
        log.debug("MQTT %s: %s; trying again", self.thing, error)
        self._failed_attempts += 1
        if isinstance(error, Refusal):
            self._on_refusal(error)
        elif self.was_connected:
            self.brief_connections = 0
            self.refusals.clear()
        elif (reason := passing_reason(error)) and time.monotonic() < (self._gives_up_at or math.inf):
            self._gives_up_at = self._gives_up_at or time.monotonic() + defaults.FIRST_CONNECT_S
            self.refusals.clear()
            self._listener.on_connect_delayed(self, reason)
        else:
            from iot_elf.diagnosis import connect_failure

            self.end(connect_failure(error, self.thing, self.endpoint, self.files))
        self._reconnect()

    def _on_refusal(self, refusal: Refusal) -> None:
        """Have AWS asked about a refusal, and give up after POLICY_CHANGE_S with nothing but refusals."""
        should_ask, gives_up = self.refusals.add(refusal)
        if should_ask:
            self._listener.on_refused(self, refusal)
        if gives_up:
            self.end(self.refusals.last)

    def _reconnect(self) -> None:
        import random

        if self.state != ENDED and not self.in_outage:
            longest_s = min(2.0**self._failed_attempts, MAX_RECONNECT_PAUSE_S)
            pause_s = longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - so that things take turns
            if self.options.client_id and self._attempt:
                pause_s = max(pause_s, self._attempt.began_at + SAME_ID_PAUSE_S - time.monotonic())
            self.connect(after_s=pause_s)

    def end(self, failure: Exception | None = None) -> None:
        """Disconnect, and do not reconnect; `failure` says why, if the thing failed."""
        if self.state == ENDED:
            return
        if self.is_offline:
            self._count_offline()
        self.state = ENDED
        if self._attempt:
            log.debug("MQTT %s: DISCONNECT", self.thing)
            self._attempt.close()
        if unsent := self._publisher.end():
            self._listener.on_not_sent(self, unsent)
        if failure:
            self._listener.on_failed(self, failure)

    def _count_offline(self) -> float:
        """Count the time since the connection was lost, and return it."""
        after_s = time.monotonic() - self._offline_since
        if self.lost_in_outage:
            self.outage_s += after_s
        else:
            self.offline_s += after_s
        return after_s

    def begin_outage(self) -> None:
        """End the connection with a TCP reset, without a DISCONNECT, and attempt none until end_outage()."""
        self.in_outage = True
        if self._attempt:
            self._attempt.reset()
        if self.state == ONLINE:
            self.on_lost(PlannedOutage())

    def end_outage(self) -> None:
        """Connect again."""
        self.in_outage = False
        if self.state == CONNECTING:
            self._reconnect()

    def publish(self, message: Message, due: float) -> None:
        """Publish a message that was due at `due`, a time.monotonic(), as soon as possible."""
        if self.state == ENDED:
            self._listener.on_not_sent(self, 1)
        elif self.state == CONNECTING and not self.qos:
            self._publisher.drop(message)
        else:
            if self.outbox.add(message, due):
                self._listener.on_not_sent(self, 1)
            self._publisher.flush()


def refuse_blocking_files(thing: str, files: ThingFiles) -> None:
    """Raise ElfError if TLS would wait for ever for a thing's files: for data in a pipe, or for a passphrase."""
    for path in files:
        if path.exists() and not path.is_file():
            cause = f"{thing} can't use its file {path}: it is not a file"
            raise ElfError("KeyUnreadable", cause, errors.restore_keys(thing))
    if b"ENCRYPTED" in files.private_key.read_bytes():
        remedy = "write it without one: openssl pkey -in FILE -out NEW"
        raise ElfError("KeyEncrypted", f"the key file {files.private_key} has a passphrase", remedy)
