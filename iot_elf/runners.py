# SPDX-License-Identifier: Apache-2.0
"""The things of a running send or subscribe: waits, and counts."""

from __future__ import annotations

import collections
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from iot_elf import defaults
from iot_elf.device import Device, DeviceListener, PlannedOutage
from iot_elf.errors import ElfError, Refusal
from iot_elf.events import EventQueue
from iot_elf.messages import Line, Message
from iot_elf.metrics import RunRecord, object_in, time_of_sending
from iot_elf.mqtt import EventLoop, PacketTooLong
from iot_elf.outages import Outage, Outages
from iot_elf.text import detail_log, log

LAG_S = 1.0  # if messages are later than this, the machine can't keep the schedule
LINES_AHEAD = 8  # lines that are read before the things have sent the previous ones
LINES_OFFLINE = 1000  # those of one thing alone, while it has no connection; then the others wait for it, too
LONG_WAIT_S = 60.0  # until a line is due
Check = Callable[[], object]
SNAPSHOT_S = 1.0  # between two entries of the record
AFTER_PAUSE_S = 10.0  # so long, what is lost may be due to the reader for whom ELF paused
FASTER_READER = (
    "the reader of the output was too slow, so ELF stopped reading from its connections: "
    "use a faster one, write to a file, or write less (--quiet, or no --output)"
)
OTHER_CLIENT = (
    "another client seems to connect as %s, too, and AWS IoT then ends the earlier connection: end that client "
    "(another ELF, or the real device), or choose another --client-id for this command"
)
TAKEOVER_LOSSES, TAKEOVER_S = 3, 60.0  # so many losses in a row, of one thing alone, are no accident


class StateChanged(NamedTuple):
    """An event: something changed, and wait() looks whether it was waiting for that."""

    is_loss: bool = False  # of a connection


class MessageObserver:
    """Gets each message of a run, to show it."""

    def on_publish(self, device: Device, number: int, topic: str, payload: bytes) -> None:
        """A thing published its message `number`."""

    def on_dropped(self, device: Device, number: int, topic: str, payload: bytes) -> None:
        """A thing lost its message `number`, at QoS 0, for want of a connection."""

    def on_puback(self, device: Device, number: int, after_s: float) -> None:
        """The broker acknowledged it."""

    def on_message(self, device: Device, message: Any, payload: bytes) -> None:
        """A thing received a message."""

    def on_rejected(self, device: Device, topic: str, answer: Mapping[str, Any]) -> None:
        """AWS rejected what a thing published to `topic`, its shadow's."""


class LostConnections:
    """Says what to do about connections that were lost, once for each cause."""

    def __init__(self) -> None:
        self._last: collections.deque[tuple[str, float]] = collections.deque(maxlen=TAKEOVER_LOSSES)  # who, and when
        self._advised: set[str] = set()  # the things whose client ID another client takes over; "": the network

    def names_other_client(self, device: Device) -> bool:
        """Return whether another client seems to have the client ID that a device keeps, and say so, once in a run.

        The two end each other's connections: each lasts until the other one is back, and no network fails meanwhile.
        """
        is_so = bool(device.options.client_id) and device.brief_connections >= TAKEOVER_LOSSES
        if is_so and OTHER_CLIENT not in self._advised:
            self._advised.add(OTHER_CLIENT)
            log.warning(f"what to do: {OTHER_CLIENT}", device.client_id)
        return is_so

    def add(self, device: Device, devices: Iterable[Device], has_paused: bool) -> None:
        """Take note that a device lost its connection, perhaps since the loop `has_paused`.

        `devices` are all: another client with its ID ends it alone.
        """
        if has_paused:
            if FASTER_READER not in self._advised:
                self._advised.add(FASTER_READER)
                log.warning("what to do: %s", FASTER_READER)
            return
        self._last.append((device.thing, time.monotonic()))
        things, times = zip(*self._last, strict=True)
        is_often = len(times) == TAKEOVER_LOSSES and times[-1] - times[0] <= TAKEOVER_S
        is_taken_over = is_often and len({*things}) == 1 and any(each.is_online for each in devices)
        if (subject := device.thing if is_taken_over else "") in self._advised:
            return
        self._advised.add(subject)
        if is_taken_over:
            log.warning(
                "what to do: all others stay connected, so another client seems to take over the client ID of %s "
                "(last %s): find out who else has its keys",
                device.thing,
                device.client_id,
            )
        else:
            log.warning("what to do: if it does not reconnect, check the network")


class Pace:
    """When lines are due: as they were recorded, or those of each thing one interval after the other."""

    def __init__(self, interval_s: float, things: Sequence[str], keeps_times: bool) -> None:
        """Make one for an interval in seconds; 0: as they come. With `keeps_times` it is for lines without a time."""
        self._interval_s, self._things, self._keeps_times = interval_s, things, keeps_times
        self._next: dict[str, float] = {}  # by thing, or "": when its next line is due, a time.monotonic()
        self._last = 0.0  # when the last one was; none is due before
        self._recorded_before_s = 0.0  # the difference of its clock

    def due(self, line: Line, now: float) -> float:
        """Return when the next line is due, a time.monotonic()."""
        if not self._next:
            spread = self._interval_s / max(1, len(self._things))
            self._next = {thing: now + place * spread for place, thing in enumerate(self._things)} | {"": now}
            self._recorded_before_s = now - (line.recorded_s or 0.0)
        if self._keeps_times and line.recorded_s is not None:
            due = line.recorded_s + self._recorded_before_s
        elif self._interval_s:
            due = self._next.get(line.thing, now)
        else:
            return now
        self._last = due = max(due, self._last, line.at)
        if due - now > LONG_WAIT_S:
            log.info("line %d is due in %.0f s", line.number, due - now)
        self._next[line.thing] = due + self._interval_s
        return due


class Runner(DeviceListener):
    """The things of a run: which are connected, which failed and why, and what happens to their messages.

    As a listener it counts in the loop's thread, into `record`; the main thread starts things, and waits.
    """

    def __init__(
        self,
        events: EventQueue,
        *,
        diagnose: Callable[[str, Refusal], ElfError],
        on_loss: Callable[[], None] = lambda: None,
        observer: MessageObserver | None = None,
        outage: Outage | None = None,
    ) -> None:
        """Make one that waits at `events`, and tells `observer` of each message.

        `diagnose(thing, refusal)` asks AWS why the broker refuses a thing; several threads call it. `on_loss` is called
        in the main thread when a connection was lost, and may raise. The run makes the outages of `outage` itself.
        """
        from concurrent.futures import ThreadPoolExecutor

        self.devices: dict[str, Device] = {}
        self.record = RunRecord()
        self.loop: EventLoop
        self._events, self._diagnose, self._on_loss = events, diagnose, on_loss
        self._observer = observer or MessageObserver()
        self._diagnosing = ThreadPoolExecutor(defaults.DIAGNOSES_AT_ONCE)
        self._lines: collections.deque[Line] = collections.deque()  # that were read early
        self._under_diagnosis: set[str] = set()  # things that AWS is being asked about
        self._refused: set[str] = set()  # things that may take minutes, for which nothing waits
        self._losses = LostConnections()
        self._outage = outage
        self.record.planned_outages = 0 if outage else None

    # The main thread

    def connect_all(self) -> None:
        """Connect, and wait until each thing is connected, has failed, or may take longer.

        Raises ElfError if none is connected.
        """
        record = self.record
        record.things = len(self.devices)
        for device in self.devices.values():
            self.loop.call_soon_threadsafe(device.connect)
        self.wait(
            lambda: (
                record.connected | record.failed | (self._refused if record.connected else set()) >= self.devices.keys()
            )
        )
        if not record.connected:
            raise record.failures.behind("NoneConnected", "none of the things could connect", of_all=True)
        record.began_at = time.monotonic()
        self.loop.call_soon_threadsafe(self._take_snapshots)
        if self._outage:
            self.loop.call_soon_threadsafe(Outages(self._outage, self.loop, self.devices, record).start)

    def wait(self, is_over: Check, deadline: float = math.inf, look_s: float = math.inf, reading: bool = False) -> bool:
        """Wait until something `is_over`, or all things failed; look at each StateChanged, and every `look_s`.

        Returns whether that was before the deadline, a time.monotonic(); with `reading`, pauses of the loop put it off.
        """
        before_s = self.loop.paused_s
        while not (is_over() or self.has_failed):
            now, end = time.monotonic(), deadline + (self.loop.paused_s - before_s if reading else 0.0)
            if now >= end:
                return False
            self._on_event(self._events.get(min(end, now + look_s)))
        return True

    def _on_event(self, event: Any) -> None:
        if isinstance(event, Exception):  # the loop has ended
            raise event
        if isinstance(event, Line):
            self._lines.append(event)
        elif event and event.is_loss:
            self._on_loss()

    def next_line(self, deadline: float) -> Line | None:
        self.wait(lambda: self._lines, deadline)
        return self._lines.popleft() if self._lines else None

    @property
    def has_failed(self) -> bool:
        """Return whether all things have failed."""
        return self.record.failed >= self.devices.keys()

    def await_diagnoses(self) -> None:
        self.wait(lambda: not self._under_diagnosis, time.monotonic() + 2 * defaults.CALL_TIMEOUT_S)

    def stop(self) -> None:
        """Disconnect all: quickly after Ctrl-C, but what was sent may still be acknowledged."""
        record = self.record
        if record.ended_at:
            return
        record.ended_at = time.monotonic()
        is_hurried = self._events.signum is not None
        self.loop.call_soon_threadsafe(self.loop.resume)  # nothing waits for a reader any more
        self.loop.call_soon_threadsafe(self._stop, record.ended_at + (defaults.STOP_S / 2 if is_hurried else 0.0))
        try:
            self.loop.join(defaults.STOP_S if is_hurried else 2 * defaults.CONNECT_TIMEOUT_S)
            self._diagnosing.shutdown(wait=False, cancel_futures=True)
            for event in self._events.drain():
                self._on_event(event)
        finally:  # also after a second Ctrl-C, and what ended the run
            self._close_record()

    def _close_record(self) -> None:
        """Record what is so in the end."""
        record = self.observe()
        record.take_snapshot()
        record.paused_s = self.loop.paused_s
        record.offline_s = {device.thing: device.offline_s for device in self.devices.values() if device.offline_s}
        record.planned_offline_s = {it.thing: it.outage_s for it in self.devices.values() if it.outage_s}
        record.unacknowledged = [
            (device.thing, each.topic, each.number, each.payload)
            for device in self.devices.values()
            for each in list(device.outbox.in_flight.values())  # the loop may go on
        ]

    def observe(self) -> RunRecord:
        """Return the record, with what is so at this moment."""
        record, devices = self.record, self.devices.values()
        sent_at = [each.taken_at for device in devices for each in list(device.outbox.in_flight.values())]
        record.in_flight, record.in_flight_since = len(sent_at), min(sent_at, default=math.inf)
        record.online = sum(device.is_online for device in devices)
        return record

    # The loop's thread

    def _take_snapshots(self) -> None:
        self.record.take_snapshot()
        self.loop.call_at(time.monotonic() + SNAPSHOT_S, self._take_snapshots)

    def _stop(self, deadline: float) -> None:
        if time.monotonic() < deadline and any(device.outbox.in_flight for device in self.devices.values()):
            self.loop.call_at(time.monotonic() + defaults.MIN_INTERVAL_S, self._stop, deadline)
            return
        for device in self.devices.values():
            device.end(device.unresolved)
        self.loop.close()

    def on_connected(self, device: Device) -> None:
        self.record.connected.add(device.thing)
        self.record.connects += 1
        self.record.delayed.pop(device.thing, None)
        for topic_filter in device.topic_filters:
            line, shown = "ELF %s subscribed to topic: %s", "%s subscribed to %s"
            detail_log.info(line, device.thing, topic_filter, extra={"on_terminal": shown})
        self._events.put(StateChanged())

    def on_connect_delayed(self, device: Device, reason: str) -> None:
        if device.thing not in self.record.delayed:
            line = "%s can't connect to %s yet: %s; trying again for up to %g s"
            detail_log.warning(line, device.thing, device.endpoint, reason, defaults.FIRST_CONNECT_S)
        self.record.delayed[device.thing] = reason

    def on_connection_interrupted(self, device: Device, error: Exception, rejected: bool) -> None:
        self.record.set_offline(device.thing, True)
        if isinstance(error, PlannedOutage):
            self._events.put(StateChanged())
            return
        given_up = f": {error}" if isinstance(error, (TimeoutError, PacketTooLong)) else ""  # by the device itself
        detail_log.warning("%s lost its connection to %s%s; reconnecting", device.thing, device.endpoint, given_up)
        if not (given_up or self._losses.names_other_client(device) or rejected):
            self._losses.add(device, self.devices.values(), self.loop.paused_s_ago < AFTER_PAUSE_S)
        self._events.put(StateChanged(is_loss=True))

    def on_connection_resumed(self, device: Device, after_s: float) -> None:
        self.record.connects += 1
        self.record.set_offline(device.thing, False)
        level = logging.INFO if device.lost_in_outage else logging.WARNING
        detail_log.log(level, "%s reconnected to %s after %.1f s", device.thing, device.endpoint, after_s)

    def on_failed(self, device: Device, failure: Exception) -> None:
        self.record.failed.add(device.thing)
        self.record.delayed.pop(device.thing, None)
        self.record.failures.add(device.thing, failure)
        if device.was_connected:
            self.record.set_offline(device.thing, True)
        self._events.put(StateChanged())

    def on_refused(self, device: Device, refusal: Refusal) -> None:
        self._refused.add(device.thing)
        self._under_diagnosis.add(device.thing)
        try:
            self._diagnosing.submit(self._find_cause, device, refusal)
        except RuntimeError:  # the pool is shut down: the run has ended in a hurry
            self._under_diagnosis.discard(device.thing)
        self._events.put(StateChanged())

    def _find_cause(self, device: Device, refusal: Refusal) -> None:
        """End the thing if AWS gives a reason; otherwise it keeps trying, and nothing waits for it."""
        failure = self._diagnose(device.thing, refusal)
        if not isinstance(failure, Refusal):
            self.loop.call_soon_threadsafe(device.end, failure)
        else:
            self.loop.call_soon_threadsafe(device.refusals.explain, failure)
            if not (failure.is_final or self.record.ended_at):
                line = "%s: the broker refuses %s, and AWS gives no reason; trying again for up to %g minutes"
                detail_log.warning(line, device.thing, refusal.action, defaults.POLICY_CHANGE_S / 60)
        self._under_diagnosis.discard(device.thing)
        self._events.put(StateChanged())


class PublishRunner(Runner):
    """Counts what happens to the messages that things publish, and AWS's answers to those for shadows."""

    awaited = "acknowledgement"

    def __init__(self, events: EventQueue, *, qos: int, interval_s: float, **options: Any) -> None:
        """Make one for messages that are due every `interval_s`; 0: as they come. The options are Runner's."""
        super().__init__(events, **options)
        self.record.qos = qos
        self._interval_s = interval_s
        self._is_lagging = self._is_publishing = False
        self._requests: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        # By thing: the clientTokens of what shadows have not answered.

    def publish_on_schedule(
        self,
        message: Message,
        due: float,
        interval_s: float,
        spread: float = 1.0,
        rounds: int | None = 1,
        thing: str = "",
    ) -> None:
        """Make each thing publish a message `rounds` times (None: without end), once per interval from `due` on; wait.

        The things take turns over the part `spread` of an interval. A thing's message k is due k intervals after its
        first, whatever happened to those before. With `thing` it is the message of that one alone.
        """
        if thing and thing not in self.devices:  # it has no policy
            self.record.count("not_sent", thing)
            return
        devices = [self.devices[thing]] if thing else list(self.devices.values())
        turns = (
            (due + (number + spread * place / len(devices)) * interval_s, device)
            for number in itertools.islice(itertools.count(), rounds)
            for place, device in enumerate(devices)
        )
        self._is_publishing = True
        self.loop.call_soon_threadsafe(self._publish_due, message, turns, next(turns))
        self.wait(lambda: not self._is_publishing)

    def _publish_due(self, message: Message, turns: Iterator[tuple[float, Device]], turn: tuple[float, Device]) -> None:
        for _ in range(defaults.MAX_PER_TURN):  # then read what has arrived
            due, device = turn
            if self.record.ended_at:
                return
            if due > time.monotonic():
                break
            if device.was_connected:
                device.publish(message, due)
            else:
                self.on_not_sent(device, 1)
            if not (following := next(turns, None)):
                self._is_publishing = False
                self._events.put(StateChanged())
                return
            turn = following
        self.loop.call_at(turn[0], self._publish_due, message, turns, turn)

    def _close_record(self) -> None:
        self.record.settle_not_sent(self.devices.keys() | self.record.failed)
        super()._close_record()

    def on_publish(self, device: Device, number: int, topic: str, payload: bytes, late_s: float) -> None:
        record = self.record
        record.count("sent", device.thing)
        record.note_message(device.thing, payload)
        if late_s > record.late_s.get(device.blocked_by, 0.0):
            record.late_s[device.blocked_by] = late_s
            if late_s > LAG_S and not (device.blocked_by or self._is_lagging):
                self._is_lagging = True
                wanted = f"{len(record.connected) / self._interval_s:.0f}" if self._interval_s else "more"
                per_s = record.totals["sent"] / (time.monotonic() - record.began_at)
                log.warning("asked for %s messages/s, this machine manages %.0f", wanted, per_s)
        if device.topic_filters:
            self._expect_answer(device, number, payload)
        self._observer.on_publish(device, number, topic, payload)

    def _expect_answer(self, device: Device, number: int, payload: bytes) -> None:
        self.record.count("requests", device.thing)
        self._requests[device.thing][str(object_in(payload).get("clientToken", ""))] += 1

    def on_dropped(self, device: Device, number: int, topic: str, payload: bytes) -> None:
        record = self.record
        record.count("dropped", device.thing)
        record.dropped += [(device.thing, number)] if len(record.dropped) < defaults.MAX_LISTED else []
        self._observer.on_dropped(device, number, topic, payload)

    def on_puback(self, device: Device, number: int, after_s: float, after_due_s: float) -> None:
        self.record.count("acknowledged", device.thing)
        self.record.add_acknowledgement(device.thing, after_s, after_due_s)
        self.record.acknowledged_at = time.monotonic()
        self._observer.on_puback(device, number, after_s)

    def on_retransmit(self, device: Device, number: int) -> None:
        self.record.count("retransmitted", device.thing)

    def on_not_sent(self, device: Device, count: int) -> None:
        self.record.count("not_sent", device.thing, count)

    def on_invalid_message(self, device: Device, number: int, error: Exception) -> None:
        self.record.invalid = self.record.invalid or error
        self.record.count("invalid", device.thing)
        self.record.count("not_sent", device.thing)
        detail_log.error("message %d of %s is not sent: %s", number, device.thing, getattr(error, "cause", error))

    def on_message(self, device: Device, message: Any) -> None:
        """Count a shadow's answer, unless it is for another client: its token differs, or all are answered."""
        answer, requests = object_in(bytes(message.payload or b"")), self._requests[device.thing]
        token = str(answer.get("clientToken", ""))
        if not requests[token]:
            return
        requests[token] -= 1  # and none is kept at 0, nor are all looked at
        if not requests[token]:
            del requests[token]
        if message.topic.endswith("/rejected"):
            self.record.count("rejected", device.thing)
            self.record.rejection = self.record.rejection or f"{answer.get('code')} {answer.get('message')}"
            self._observer.on_rejected(device, message.topic.removesuffix("/rejected"), answer)
        else:
            self.record.count("accepted", device.thing)

    def has_room(self, thing: str = "") -> bool:
        """Return whether the things that are online have sent nearly all their messages; or one, online or not."""
        if not thing:
            return all(len(it.outbox.queued) < LINES_AHEAD for it in self.devices.values() if it.is_online)
        device = self.devices.get(thing)
        return not device or len(device.outbox.queued) < (LINES_AHEAD if device.is_online else LINES_OFFLINE)

    @property
    def backlog(self) -> int:
        """How many messages are waiting to be sent or acknowledged."""
        return sum(device.backlog for device in self.devices.values())


class VerifyRunner(PublishRunner):
    """Counts which messages come back to the thing that publishes them, since it has subscribed to its own topic."""

    awaited = "returning message"

    def __init__(self, events: EventQueue, **options: Any) -> None:
        super().__init__(events, **options)
        self.record.checks_return = True
        self._missed: dict[str, int] = {}  # by thing: how many a lost connection had yet to bring back

    def _expect_answer(self, device: Device, number: int, payload: bytes) -> None:
        self.record.not_returned[device.thing].setdefault(number, time.monotonic())

    def on_connection_interrupted(self, device: Device, error: Exception, rejected: bool) -> None:
        """Wait no more for what the broker took: only what is sent again can come on the next connection."""
        not_returned = self.record.not_returned[device.thing]
        self._missed[device.thing] = sum(number not in device.outbox.in_flight for number in not_returned)
        super().on_connection_interrupted(device, error, rejected)

    def on_message(self, device: Device, message: Any) -> None:
        """Count a message of this run and this thing, the first time that it comes."""
        now, record, content = time.monotonic(), self.record, object_in(bytes(message.payload or b""))
        is_own = content.get("thing") == device.thing and content.get("run") == record.run
        sent_at = record.not_returned[device.thing].pop(content.get("seq", 0), None) if is_own else None
        if sent_at is not None:
            device.refusals.on_success()  # at QoS 0 the only sign that the broker takes its messages
            record.count("returned", device.thing)
            record.round_trip.add(now - sent_at)
            record.acknowledged_at = now

    @property
    def backlog(self) -> int:
        """How many messages are waiting to be sent, acknowledged or returned; none of a thing that failed."""
        waiting = [each for each in list(self.record.not_returned.items()) if each[0] not in self.record.failed]
        return super().backlog + sum(len(those) - self._missed.get(thing, 0) for thing, those in waiting)


class SubscribeRunner(Runner):
    """Counts the messages that things receive."""

    def __init__(
        self,
        events: EventQueue,
        *,
        count: int | None,
        checks_sequence: bool,
        keeps_sessions: bool = False,
        **options: Any,
    ) -> None:
        """Make one that has enough after `count` messages, and `checks_sequence` of those that are numbered.

        Things of which the broker `keeps_sessions` take what fills gaps also at the end. The options are Runner's.
        """
        super().__init__(events, **options)
        self._count = count or math.inf
        self.record.checks_sequence, self.record.keeps_sessions = checks_sequence, keeps_sessions

    def on_connected(self, device: Device) -> None:
        if device.session_present:
            self.record.session_present.add(device.thing)
        super().on_connected(device)

    def on_connection_resumed(self, device: Device, after_s: float) -> None:
        super().on_connection_resumed(device, after_s)
        if self.record.keeps_sessions and not device.session_present:
            self.record.session_lost.add(device.thing)
            detail_log.warning("%s: its session is gone, and what waited in it", device.thing)

    @property
    def has_enough(self) -> bool:
        return self.record.totals["received"] >= self._count

    def on_message(self, device: Device, message: Any) -> bool:
        """Count and show a message. At the end a session goes on to take all while numbers are missing.

        Among a hundred others, if they were not acknowledged, AWS would not deliver these.
        """
        payload, at, record = bytes(message.payload or b""), time.time(), self.record
        is_over = time.monotonic() > record.ends_at or self.has_enough
        is_wanted = record.keeps_sessions and bool(record.sequence.counts["missing"])
        content = {} if message.retain else object_in(payload)
        if record.checks_sequence:
            record.sequence.add(device.thing, content, is_over)
        if is_over:
            self._events.put(StateChanged())
            if not is_wanted:
                return not record.keeps_sessions
        record.count("received", device.thing)
        if message.retain:
            record.count("retained", device.thing)
        record.note_message(device.thing, payload)
        if (sent_at := time_of_sending(content)) is not None:
            if record.keeps_sessions and sent_at < device.accepted_at:
                record.count("waited", device.thing)
            else:
                record.add_delivery(device.thing, at - sent_at)
        self._observer.on_message(device, message, payload)
        if self.has_enough:
            self._events.put(StateChanged())
        return True

    def on_unreadable_message(self, device: Device, error: Exception) -> None:
        self.record.count("unreadable", device.thing)
        detail_log.warning("%s could not read a message: %s", device.thing, error)
