# SPDX-License-Identifier: Apache-2.0
"""What the record of a run looks like: the report, the summary, the live line."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from typing import Any

from iot_elf import defaults
from iot_elf.console import EventWriter, shows_details
from iot_elf.device import Device
from iot_elf.metrics import RunRecord, about_clock
from iot_elf.runners import MessageObserver
from iot_elf.sequences import format_counts
from iot_elf.text import decoded, detail_log, listed, log, on_one_line, plural, redacted_values, report_log

SHORT_PAUSE_S = 1.0  # in all; it does no harm
POSTED = "ELF %(thing)s posting message:'%(payload)s' on topic: %(topic)s"
RECEIVED = "Received message: %(payload)s from topic: %(topic)s by %(thing)s"
RETAINED = RECEIVED.replace("message", "retained message", 1)
STALL_S = 1.0  # an acknowledgement that takes longer is shown on the live line


class MessageWriter(MessageObserver):
    """Shows each message: a line in the log, unless these are hidden, and JSON or its payload on standard output."""

    def __init__(self, output: EventWriter, qos: int) -> None:
        self._output, self._qos = output, qos
        self._is_needed = shows_details() or output.is_on  # else nothing need be formatted

    def on_publish(self, device: Device, number: int, topic: str, payload: bytes) -> None:
        if self._is_needed:
            self._log(POSTED, "→", device, topic, payload, device.options.retain)
            self._put("sent", device, number, topic, payload)

    def on_dropped(self, device: Device, number: int, topic: str, payload: bytes) -> None:
        self._put("lost", device, number, topic, payload)

    def _log(self, line: str, arrow: str, device: Device, topic: str, payload: bytes, retain: bool) -> None:
        """Log the original's line; on a terminal the message comes last, where it may be cut."""
        fields = {"thing": device.thing, "topic": topic, "payload": decoded(payload)}
        fields["shown"] = on_one_line(fields["payload"])
        kind = " (retained)" if retain else ""
        detail_log.info(line, fields, extra={"on_terminal": f"%(thing)s {arrow} %(topic)s{kind}  %(shown)s"})

    def _put(self, event: str, device: Device, number: int, topic: str, payload: bytes) -> None:
        if self._output.is_on:
            fields = message_fields(device.thing, topic, payload)
            self._output.put(event, number=number, **fields, qos=self._qos, retain=device.options.retain)

    def on_puback(self, device: Device, number: int, after_s: float) -> None:
        if self._output.is_on:
            self._output.put("acknowledged", thingName=device.thing, number=number, latencyMs=round(1000 * after_s, 1))

    def on_message(self, device: Device, message: Any, payload: bytes) -> None:
        if self._is_needed:
            line = RETAINED if message.retain else RECEIVED
            self._log(line, "←", device, message.topic, payload, message.retain)
            fields: dict[str, Any] = message_fields(device.thing, message.topic, payload)
            if self._output.is_on and redacted_values(fields) != fields:
                fields["redacted"] = True  # so that nobody takes it for what was sent
            self._output.put("received", **fields, qos=message.qos, retain=bool(message.retain))
        self._output.put_payload(payload)

    def on_rejected(self, device: Device, topic: str, answer: Mapping[str, Any]) -> None:
        code, reason = answer.get("code"), answer.get("message")
        detail_log.warning("AWS rejected a message of %s on %s: %s %s", device.thing, topic, code, reason)
        self._output.put("rejected", thingName=device.thing, topic=topic, code=code, message=reason)


def message_fields(thing: str, topic: str, payload: bytes) -> dict[str, Any]:
    """Return the JSON fields that all messages have. A payload that is not UTF-8 is in Base64."""
    message = {"thingName": thing, "topic": topic, "time": round(time.time(), 3)}
    try:
        return {**message, "payload": payload.decode("utf-8")}
    except UnicodeDecodeError:
        import base64

        return {**message, "payload": None, "payloadBase64": base64.b64encode(payload).decode("ascii")}


class RunReport:
    """What a run looks like, from its record: a live line, the report in the log, the JSON summary."""

    counted = ""  # what of the record's totals the rate is of

    def __init__(self, record: RunRecord, label: str) -> None:
        """Show `record`; `label` stands at the beginning of lines of the log: the name of a function, in brackets."""
        self.record, self._label = record, label

    def live_line(self) -> str:
        raise NotImplementedError

    def connecting_line(self) -> str:
        """Return the live line until the run begins."""
        record, delayed = self.record, self.record.delayed.copy()
        waits = f" | {next(iter(delayed))}: {next(iter(delayed.values()))}, trying again" if delayed else ""
        more = f" (and {len(delayed) - 1} more)" if len(delayed) > 1 else ""
        return f"connecting: {record.online}/{record.things} up{waits}{more}"

    def log_report(self) -> None:
        """Log the report."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """Return the JSON summary's members: those of every run."""
        record, rate = self.record, self.record.mean_rate(self.counted)
        return {
            **{"durationS": round(record.duration_s, 1), "messagesPerS": rate and round(rate, 1)},
            **{"connects": record.connects, "offlineS": {its: round(s, 1) for its, s in record.offline_s.items()}},
            **self._planned(),
            "latencyMs": record.latency.in_ms(),
        }

    def _planned(self) -> dict[str, Any]:
        record = self.record
        if record.planned_outages is None:
            return {}
        offline_s = {thing: round(s, 1) for thing, s in record.planned_offline_s.items()}
        return {"plannedOutages": record.planned_outages, "plannedOfflineS": offline_s}

    def log_outages(self, effect: str) -> None:
        if (paused_s := self.record.paused_s) >= SHORT_PAUSE_S:
            line = "%s the reader of the output was too slow: ELF received and sent nothing for %.1f s"
            log.warning(line, self._label, paused_s)
        if (planned := self.record.planned_outages) is not None:
            offline_s = self.record.planned_offline_s
            which = f": {_longest(offline_s)}; {effect}" if offline_s else ""
            report_log.info("%s %s of --outage%s", self._label, plural(planned, "outage"), which)
        if offline_s := self.record.offline_s:
            other = "offline in other outages" if planned else "offline"
            log.warning("%s %s: %s; %s", self._label, other, _longest(offline_s), effect)

    def situation(self) -> str:
        """Return, for the live line, how many connections are up, and the time elapsed and left."""
        now, record = time.monotonic(), self.record
        left = f", {record.ends_at - now:.0f} s left" if now < record.ends_at < math.inf else ""
        return f"{record.online}/{record.things} up | {now - record.began_at:.0f} s{left}"

    def pace(self) -> str:
        """Return, for the live line, the rate, once there is one."""
        rate = self.record.rate(self.counted)
        return "" if rate is None else f" | {rate:.1f}/s"

    def duration_and_rate(self) -> str:
        rate = self.record.mean_rate(self.counted)
        return f"{self.record.duration_s:.1f} s" + ("" if rate is None else f", {rate:.1f} messages/s")


def _longest(offline_s: Mapping[str, float]) -> str:
    """Say how many things were offline, and which the longest."""
    longest = max(offline_s, key=offline_s.__getitem__)
    return f"{plural(len(offline_s), 'thing')}, longest {longest} ({offline_s[longest]:.1f} s)"


class PublishReport(RunReport):
    """What the record of a run that publishes looks like."""

    counted = "sent"

    def live_line(self) -> str:
        record, totals = self.record, self.record.totals
        pace = f"{self.pace()} | {record.latency.recent_ms:.1f} ms"
        if (oldest_s := time.monotonic() - record.in_flight_since) > STALL_S:
            pace = f" | {record.in_flight} waiting, up to {oldest_s:.1f} s"
        lost = f", lost {totals['dropped']}" if totals["dropped"] else ""
        returned = f", came back {totals['returned']}" if record.checks_return else ""
        counts = f"sent {totals['sent']}, acknowledged {totals['acknowledged']}{returned}{lost}{self._answers()}"
        return f"{counts}{pace} | {self.situation()}"

    def _answers(self) -> str:
        if not self.record.totals["requests"]:
            return ""
        totals, unanswered = self.record.totals, self.record.unanswered
        not_answered = f", {unanswered} not answered" if unanswered else ""
        return f", {totals['accepted']} accepted, {totals['rejected']} rejected{not_answered}"

    def log_report(self) -> None:
        record, totals, label = self.record, self.record.totals, self._label
        self.log_outages(f"{plural(totals['retransmitted'], 'message')} sent again")
        late_s, cause = record.latest
        why = f" ({cause})" if cause and late_s > 0.1 else ""
        report_log.info("%s %s, at most %.1f ms behind schedule%s", label, self.duration_and_rate(), 1000 * late_s, why)
        if totals["acknowledged"]:
            report_log.info("%s ack latency: %s", label, record.latency)
            report_log.info("%s ack since due: %s", label, record.latency_from_due)
        self._log_returned()
        unacknowledged = [
            f"not acknowledged: message {number} of {thing} on {topic}: '{decoded(payload)}'"
            for thing, topic, number, payload in record.unacknowledged[: defaults.MAX_LISTED]
        ]
        lines = [
            *unacknowledged,
            *(f"lost while offline: message {number} of {thing}" for thing, number in record.dropped),
        ]
        for line in lines:
            log.warning("%s", line, extra={"may_be_cut": True})  # where the message is
        if (more := record.lost - len(lines)) > 0:
            log.warning("%d more not acknowledged, or lost while offline", more)
        sent = f"{plural(totals['sent'], 'message')} from {plural(len(record.connected), 'thing')}"
        acknowledged = f"{totals['acknowledged']} acknowledged" if record.qos else "none acknowledged (QoS 0)"
        unsent = f", {totals['not_sent']} not sent" if totals["not_sent"] else ""
        report_log.info(
            "%s ELF sent %s: %s, %d lost%s%s", label, sent, acknowledged, record.lost, unsent, self._answers()
        )

    def _log_returned(self) -> None:
        record, label = self.record, self._label
        if not record.checks_return:
            return
        missing = {thing: sorted(numbers) for thing, numbers in record.not_returned.items() if numbers}
        for thing, numbers in itertools.islice(missing.items(), defaults.MAX_LISTED):
            which = listed([str(number) for number in numbers])
            log.warning("did not come back to %s: %s %s", thing, "message" if len(numbers) == 1 else "messages", which)
        if record.round_trip.count:
            report_log.info("%s round trip: %s", label, record.round_trip)
        report_log.info(
            "%s came back: %d of %s", label, record.totals["returned"], plural(record.totals["sent"], "message")
        )

    def summary(self) -> dict[str, Any]:
        record, totals = self.record, self.record.totals
        late_s, cause = record.latest
        returned = (
            {"returned": totals["returned"], "roundTripMs": record.round_trip.in_ms()} if record.checks_return else {}
        )
        return {
            **{"sent": totals["sent"], "acknowledged": totals["acknowledged"], "lost": record.lost},
            **{"notSent": totals["not_sent"], "sentAgain": totals["retransmitted"]},
            **super().summary(),
            "latencyFromDueMs": record.latency_from_due.in_ms(),
            **returned,
            **{"lateMs": round(1000 * late_s, 1), "lateCause": cause or None},
            **{"accepted": totals["accepted"], "rejected": totals["rejected"], "notAnswered": record.unanswered},
        }


class SubscribeReport(RunReport):
    """What the record of a run that subscribes looks like."""

    counted = "received"

    def live_line(self) -> str:
        record = self.record
        latency = f" | {record.latency.recent_ms:.0f} ms" if record.latency.count else ""
        counts = f"received {record.totals['received']}{record.sequence}"
        return f"{counts}{self.pace()}{latency} | {self.situation()}"

    def log_report(self) -> None:
        record, label = self.record, self._label
        received, unreadable = record.totals["received"], record.totals["unreadable"]
        waited = record.keeps_sessions and not record.session_lost
        self.log_outages("what came meanwhile waited" if waited else "they may have missed messages")
        report_log.info("%s %s", label, self.duration_and_rate())
        if record.keeps_sessions:
            present = f"{len(record.session_present)} of {plural(len(record.connected), 'thing')}"
            older = f"{plural(record.totals['waited'], 'message')} older than the connection (from ts)"
            report_log.info("%s session present: %s; %s", label, present, older)
        if record.session_lost:
            line = "%s session gone on reconnecting, and what waited in it: %s"
            log.warning(line, label, listed(record.session_lost))
        if record.latency.count:
            report_log.info("%s latency (from ts, ±1 ms): %s", label, record.latency)
        if record.without_latency:
            messages = plural(record.without_latency, "message")
            log.warning("%s %s: no latency of %s", label, about_clock(record.clock_ahead_s), messages)
        if unreadable:
            log.warning("%s could not read %s", label, plural(unreadable, "message"))
        for thing, counts in itertools.islice(record.sequence.senders().items(), defaults.MAX_LISTED):
            report_log.info("%s from %s: %s", label, thing, format_counts(counts))
        if not record.sequence.is_exact:
            log.warning("%s too many senders, or gaps: the number of missing messages is not exact", label)
        messages, things = plural(received, "message"), plural(len(record.connected), "thing")
        retained = f" ({count} retained)" if (count := record.totals["retained"]) else ""
        report_log.info("%s ELF received %s%s on %s%s", label, messages, retained, things, record.sequence)

    def summary(self) -> dict[str, Any]:
        record, sequence, totals = self.record, self.record.sequence, self.record.totals
        exactness = {"senders": sequence.senders(), "exact": sequence.is_exact}
        sessions = {"sessionPresent": len(record.session_present), "sessionLost": len(record.session_lost)}
        return {
            **{"received": totals["received"], "retained": totals["retained"], "unreadable": totals["unreadable"]},
            **({**sessions, "waited": totals["waited"]} if record.keeps_sessions else {}),
            **super().summary(),
            "senderClockAheadS": round(record.clock_ahead_s, 1),
            **({**sequence.counts, **exactness} if record.checks_sequence else {}),
        }
