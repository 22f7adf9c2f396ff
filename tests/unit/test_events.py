"""What a command waits for comes in order, at its deadline, or ends with Ctrl-C."""

from __future__ import annotations

import queue
import signal

import pytest
from support.program import constant

from iot_elf import events as module
from iot_elf.events import EventQueue, Interrupted, signals_to

from .stand_ins import Clock


class Arrivals:
    """A queue whose events arrive at times of the clock, which its waits move."""

    def __init__(self, clock: Clock, *arrivals: tuple[float, object]) -> None:
        self.clock, self.arrivals, self.timeouts = clock, list(arrivals), list[float]()

    def get(self, timeout: float) -> object:
        self.timeouts.append(round(timeout, 6))
        end = self.clock.now + timeout
        if self.arrivals and self.arrivals[0][0] <= end:
            at, event = self.arrivals.pop(0)
            self.clock.now = max(self.clock.now, at)
            return event
        self.clock.now = end
        raise queue.Empty


def waiting(clock: Clock, *arrivals: tuple[float, object]) -> tuple[EventQueue, Arrivals]:
    events, its = EventQueue(), Arrivals(clock, *arrivals)
    events._events = its  # type: ignore[assignment]
    return events, its


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    assert constant("REDRAW_INTERVAL_S") == 0.2
    return Clock(monkeypatch, module, now=0.0)


@pytest.mark.parametrize(
    ("arrivals", "deadline", "event", "at"),
    [
        ([(0.0, "a")], 1.0, "a", 0.0),
        ([(0.5, "a")], 1.0, "a", 0.5),
        ([(0.5, None), (0.7, "a")], 1.0, "a", 0.7),  # a signal's, that somebody has seen
        ([(1.5, "a")], 1.0, None, 1.0),
        ([], 1.0, None, 1.0),
        ([], 0.1, None, 0.1),
        ([], 0.0, None, 0.0),
        ([], -1.0, None, 0.0),
        ([(0.0, "a")], -1.0, "a", 0.0),  # what is there counts, however late it is
        ([(100.0, "a")], float("inf"), "a", 100.0),
    ],
)
def test_an_event_is_waited_for_until_the_deadline(
    clock: Clock, arrivals: list[tuple[float, object]], deadline: float, event: object, at: float
) -> None:
    events, its = waiting(clock, *arrivals)
    assert events.get(deadline) == event
    assert clock.now == pytest.approx(at, abs=1e-6)
    assert max(its.timeouts) <= 0.2
    assert min(its.timeouts) >= 0.0


def test_while_nothing_comes_there_is_a_look_at_the_live_line_five_times_a_second(clock: Clock) -> None:
    events, its = waiting(clock)
    drawn: list[float] = []
    events.on_idle = lambda: drawn.append(round(clock.now, 6))
    assert events.get(1.0) is None
    assert drawn[:5] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert len(its.timeouts) == len(drawn)


def test_events_come_in_order_and_ctrl_c_before_all() -> None:
    events = EventQueue()
    for event in ("a", "b", "c"):
        events.put(event)
    assert events.get(0.0) == "a"
    events.interrupt(15, None)
    with pytest.raises(Interrupted) as raised:
        events.get(float("inf"))
    assert raised.value.signum == 15
    assert list(events.drain()) == ["b", "c"]  # without the signal's own
    assert list(events.drain()) == []


def test_the_first_ctrl_c_asks_to_stop_and_the_second_stops(clock: Clock) -> None:
    events = EventQueue()
    events.check()
    assert not events.stopping.is_set()
    events.interrupt(2, None)
    assert (events.signum, events.stopping.is_set()) == (2, True)
    with pytest.raises(Interrupted):
        events.check(request=None)
    clock.now += 0.6
    with pytest.raises(KeyboardInterrupt):
        events.interrupt(15, None)
    assert events.signum == 2


@pytest.mark.parametrize(("signum", "moment_s"), [(15, 0.5), (1, 0.5), (2, 0.05)])
def test_a_signal_that_comes_twice_within_a_moment_is_one(clock: Clock, signum: int, moment_s: float) -> None:
    """`timeout` and service managers signal a process, and then its group."""
    events = EventQueue()
    events.interrupt(signum, None)
    clock.now += moment_s
    events.interrupt(signum, None)
    clock.now += 0.01
    with pytest.raises(KeyboardInterrupt):
        events.interrupt(signum, None)
    assert events.signum == signum


def test_ctrl_c_ends_a_wait_that_has_begun(clock: Clock) -> None:
    events, its = waiting(clock)
    events.on_idle = lambda: events.interrupt(2, None) if clock.now >= 0.4 else None
    its.put = lambda event: its.arrivals.append((clock.now, event))  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        events.get(10.0)
    assert clock.now == pytest.approx(0.4)


def test_signals_are_the_commands_while_it_runs_but_for_those_that_its_caller_ignores() -> None:
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.getsignal(signum) for signum in wanted}
    events = EventQueue()
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals_to(events):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert [signal.getsignal(signum) for signum in wanted[:2]] == [events.interrupt] * 2
            signal.raise_signal(signal.SIGTERM)
            assert events.signum == signal.SIGTERM
        assert [signal.getsignal(signum) for signum in wanted[:2]] == [before[signum] for signum in wanted[:2]]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
