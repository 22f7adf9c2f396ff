"""The outages that a run makes itself: when they begin and end, and when none does any more."""

from __future__ import annotations

from typing import Any

import pytest

from iot_elf import outages
from iot_elf.metrics import RunRecord
from iot_elf.outages import Outage, Outages

from .fake_loop import Loop
from .stand_ins import Clock


class FakeDevice:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.events = clock, list[tuple[str, float]]()

    def begin_outage(self) -> None:
        self.events.append(("begins", self.clock.now))

    def end_outage(self) -> None:
        self.events.append(("ends", self.clock.now))


def test_an_outage_is_in_the_middle_of_each_period_while_the_run_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, record = Clock(monkeypatch, outages, now=0.0), RunRecord()
    loop: Any = Loop(clock)
    device: Any = FakeDevice(clock)
    record.ends_at, record.planned_outages = 144.0, 0
    Outages(Outage(10, 60), loop, {"thing_0": device}, record).start()
    loop.run(200.0)
    assert device.events == [("begins", 25.0), ("ends", 35.0), ("begins", 85.0), ("ends", 95.0)]
    assert record.planned_outages == 2
