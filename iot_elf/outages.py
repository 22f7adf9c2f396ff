# SPDX-License-Identifier: Apache-2.0
"""The outages of --outage: times without a connection, which a run makes itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from iot_elf.device import Device
from iot_elf.metrics import RunRecord
from iot_elf.mqtt import EventLoop
from iot_elf.text import log


class Outage(NamedTuple):
    """`length_s` without a connection in the middle of each `period_s`: so a run can begin and end with one."""

    length_s: float
    period_s: float

    @property
    def first_after_s(self) -> float:
        return (self.period_s - self.length_s) / 2


class Outages:
    """Ends all connections of a run when an outage is due, and lets the things reconnect when it is over.

    None begins after the run's time is over, in which messages may still be sent again. Only for the loop's thread.
    """

    def __init__(self, outage: Outage, loop: EventLoop, devices: Mapping[str, Device], record: RunRecord) -> None:
        self._outage, self._loop, self._devices, self._record = outage, loop, devices, record
        self._due = 0.0  # time.monotonic() of the next one

    def start(self) -> None:
        """Begin to count the time."""
        first_after_s, (length_s, period_s) = self._outage.first_after_s, self._outage
        log.info(
            "outages: %g s without a connection in each %g s, the first in %g s", length_s, period_s, first_after_s
        )
        self._schedule(time.monotonic() + first_after_s)

    def _schedule(self, due: float) -> None:
        self._due = due
        self._loop.call_at(due, self._begin)

    def _begin(self) -> None:
        record = self._record
        if record.ended_at or time.monotonic() >= record.ends_at:
            return
        record.planned_outages = (record.planned_outages or 0) + 1
        record.outage_until = self._due + self._outage.length_s
        log.info("outage %d: no connection for %g s", record.planned_outages, self._outage.length_s)
        for device in self._devices.values():
            device.begin_outage()
        self._loop.call_at(record.outage_until, self._end)

    def _end(self) -> None:
        log.info("outage %d is over: reconnecting", self._record.planned_outages or 0)
        for device in self._devices.values():
            device.end_outage()
        self._schedule(self._due + self._outage.period_s)
