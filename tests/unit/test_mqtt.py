"""The one thread that uses connections: in which order it calls, how fast it connects, how it reads."""

from __future__ import annotations

import contextlib
import itertools
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.program import Limits, constant

from iot_elf import mqtt
from iot_elf.mqtt import EventLoop

from .stand_ins import Clock

PATIENCE_S = 10.0


@pytest.fixture
def failures() -> list[Exception]:
    return []


@pytest.fixture
def loop(failures: list[Exception]) -> Iterator[EventLoop]:
    loop = EventLoop(failures.append)
    yield loop
    loop.call_soon_threadsafe(loop.close)
    loop.join(PATIENCE_S)


def run(loop: EventLoop, function: Callable[[], object]) -> None:
    """Call a function in the loop's thread, and wait for it."""
    done = threading.Event()

    def call() -> None:
        function()
        done.set()

    loop.call_soon_threadsafe(call)
    assert done.wait(PATIENCE_S)


# The order of calls


def test_calls_of_other_threads_are_made_in_the_order_in_which_they_came(loop: EventLoop) -> None:
    called: list[int] = []
    for number in range(1000):
        loop.call_soon_threadsafe(called.append, number)
    run(loop, lambda: None)
    assert called == [*range(1000)]


def test_calls_are_made_when_they_are_due_and_of_one_time_in_the_order_in_which_they_were_asked(
    loop: EventLoop,
) -> None:
    called: list[tuple[str, float]] = []
    ended = threading.Event()
    began = time.monotonic()

    def call(name: str) -> None:
        called.append((name, time.monotonic()))

    def ask() -> None:
        for name, after_s in (("d", 0.06), ("a", 0.02), ("b", 0.02), ("c", 0.02), ("now", -1.0)):
            loop.call_at(began + after_s, call, name)
        loop.call_at(began + 0.07, ended.set)

    loop.call_soon_threadsafe(ask)
    assert ended.wait(PATIENCE_S)
    assert [name for name, _ in called] == ["now", "a", "b", "c", "d"]
    assert all(at >= began + due for (name, at), due in zip(called[1:], (0.02, 0.02, 0.02, 0.06), strict=True))


def test_what_a_call_asks_for_is_called_after_what_was_asked_before(loop: EventLoop) -> None:
    called: list[str] = []

    def first() -> None:
        called.append("first")
        loop.call_soon_threadsafe(called.append, "third")

    def both() -> None:
        loop.call_soon_threadsafe(first)
        loop.call_soon_threadsafe(called.append, "second")

    run(loop, both)
    run(loop, lambda: None)
    run(loop, lambda: None)
    assert called == ["first", "second", "third"]


def test_a_call_that_is_due_does_not_wait_for_those_that_come_again_and_again(loop: EventLoop) -> None:
    is_over = threading.Event()

    def again() -> None:
        if not is_over.is_set():
            loop.call_soon_threadsafe(again)

    def ask() -> None:
        again()
        loop.call_at(time.monotonic() + 0.01, is_over.set)

    loop.call_soon_threadsafe(ask)
    assert is_over.wait(PATIENCE_S)


def test_what_comes_while_the_loop_sleeps_wakes_it(loop: EventLoop) -> None:
    run(loop, lambda: loop.call_at(time.monotonic() + 1000.0, lambda: None))
    for _ in range(20):
        run(loop, lambda: None)
        time.sleep(0.001)  # so that it sleeps again


def test_a_socket_that_is_ready_is_served_before_the_calls(failures: list[Exception]) -> None:
    mine, its = socket.socketpair()
    with mine, its:
        called: list[str] = []
        loop = EventLoop(failures.append)

        def serve(events: int) -> None:
            called.append(f"served {its.recv(10).decode()}")

        def ask() -> None:
            loop.selector.register(its, selectors.EVENT_READ, serve)
            mine.send(b"x")
            loop.call_soon_threadsafe(called.append, "called")

        run(loop, ask)
        run(loop, lambda: None)
        run(loop, loop.close)
        loop.join(PATIENCE_S)
        assert called == ["served x", "called"]


class Waits(selectors.DefaultSelector):
    """A selector that keeps how long it was to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits_s: list[float | None] = []

    def select(self, timeout: float | None = None) -> Any:
        self.waits_s.append(timeout)
        return super().select(timeout)


def test_the_loop_sleeps_until_something_is_due_or_handed_over(failures: list[Exception]) -> None:
    selector = Waits()
    loop = EventLoop(failures.append, selector=selector)
    run(loop, lambda: None)
    run(loop, selector.waits_s.clear)
    run(loop, lambda: loop.call_at(time.monotonic() + 100.0, lambda: None))
    time.sleep(0.05)
    run(loop, lambda: loop.call_soon_threadsafe(lambda: None))
    run(loop, loop.close)
    loop.join(PATIENCE_S)
    idle = [wait_s for wait_s in selector.waits_s if wait_s != 0.0]
    assert len(selector.waits_s) < 20  # it does not look again and again
    assert idle[0] is None  # until a thread hands something over
    assert all(wait_s is None or 90.0 < wait_s <= 100.0 for wait_s in idle)
    assert 0.0 in selector.waits_s  # while there are calls


def test_the_loop_does_not_oversleep(failures: list[Exception]) -> None:
    selector = Waits()
    loop = EventLoop(failures.append, selector=selector)
    ended = threading.Event()
    run(loop, lambda: loop.call_at(time.monotonic() + 0.2, ended.set))
    assert ended.wait(PATIENCE_S)
    run(loop, loop.close)
    loop.join(PATIENCE_S)
    assert all(wait_s is None or wait_s <= 0.2 for wait_s in selector.waits_s)


def test_the_end_neither_waits_for_a_connect_nor_begins_another(failures: list[Exception], limits: Limits) -> None:
    limits(CONNECTS_AT_ONCE=1)
    loop = EventLoop(failures.append)
    arrived, go_on = threading.Semaphore(0), threading.Event()

    def connect() -> None:
        arrived.release()
        go_on.wait(3 * PATIENCE_S)

    for _ in range(3):
        run(loop, lambda: loop.connect_in_turn(connect, 0.0))
    assert arrived.acquire(timeout=PATIENCE_S)
    until = time.monotonic() + PATIENCE_S
    while loop._due and time.monotonic() < until:
        time.sleep(0.001)
    run(loop, loop.close)
    loop.join(PATIENCE_S / 2)
    assert not loop._thread.is_alive()
    go_on.set()
    loop.pool.shutdown()
    assert not arrived.acquire(blocking=False)
    assert (loop._waking.fileno(), loop._waker.fileno()) == (-1, -1)


def test_an_error_in_a_call_ends_the_loop_and_is_told(loop: EventLoop, failures: list[Exception]) -> None:
    called: list[str] = []
    error = LookupError("a bug")

    def fail() -> None:
        loop.call_soon_threadsafe(called.append, "after it")
        raise error

    loop.call_soon_threadsafe(fail)
    loop.join(PATIENCE_S)
    assert (failures, called) == ([error], [])
    loop.call_soon_threadsafe(called.append, "nobody is there")  # is no error
    assert called == []


def test_a_loop_that_is_closed_has_done_what_was_asked_before_and_frees_its_sockets(
    failures: list[Exception],
) -> None:
    called: list[str] = []
    loop = EventLoop(failures.append)

    def ask() -> None:
        loop.call_soon_threadsafe(called.append, "before")
        loop.call_soon_threadsafe(loop.close)

    loop.call_soon_threadsafe(ask)
    loop.join(PATIENCE_S)
    assert (called, failures) == (["before"], [])
    with pytest.raises((RuntimeError, KeyError, ValueError, TypeError)):
        loop.selector.select(0)
    loop.connect_in_turn(lambda: called.append("connect"), 0.0)
    loop._submit(lambda: called.append("connect"))  # by a call that was due at the end
    assert called == ["before"]


# Connects


class Paced:
    """A loop of which each connect's time is seen, on a clock that does not run."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        self.clock = clock
        self.failures: list[Exception] = []
        self.loop = EventLoop(self.failures.append, **options)
        self.dues: list[float] = []
        self.loop.call_at = lambda due, *_: self.dues.append(due)  # type: ignore[method-assign]

    def connect(self, count: int, after_s: float = 0.0) -> list[float]:
        """Ask for connects; return after how many seconds each will be."""
        self.dues.clear()
        for _ in range(count):
            self.loop.connect_in_turn(lambda: None, after_s)
        return [due - self.clock.now for due in self.dues]


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Paced]]:
    made: list[Paced] = []
    clock = Clock(monkeypatch, mqtt)

    def make(**options: Any) -> Paced:
        made.append(Paced(clock, **options))
        return made[-1]

    yield make
    for each in made:
        each.loop.call_soon_threadsafe(each.loop.close)
        each.loop.join(PATIENCE_S)


def test_things_connect_one_after_the_other_at_the_rate_that_was_asked_for(paced: Callable[..., Paced]) -> None:
    assert paced(connects_per_s=4).connect(5) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_things_connect_more_slowly_than_an_account_may(paced: Callable[..., Paced]) -> None:
    dues = paced().connect(4001)
    assert dues[-1] == pytest.approx(10.0)
    busiest = max(sum(1 for each in dues if start <= each < start + 1) for start in dues[::100])
    assert busiest <= 401 < 500


def test_after_a_quiet_time_no_connects_are_made_up_for(paced: Callable[..., Paced]) -> None:
    its = paced(connects_per_s=4)
    its.connect(3)
    its.clock.now += 100.0
    assert its.connect(3) == [0.0, 0.25, 0.5]
    its.clock.now += 0.5
    assert its.connect(2) == [0.25, 0.5]  # the rest of the last one's time


def test_a_pause_comes_on_top_of_a_things_turn(paced: Callable[..., Paced]) -> None:
    its = paced(connects_per_s=4)
    assert its.connect(2, after_s=3.0) == [3.0, 3.25]
    assert its.connect(1) == [0.5]


def test_connects_wait_in_other_threads_a_limited_number_at_a_time(loop: EventLoop) -> None:
    arrived = threading.Semaphore(0)
    go_on = threading.Event()
    threads: set[int] = set()

    def connect() -> None:
        threads.add(threading.get_ident())
        arrived.release()
        assert go_on.wait(PATIENCE_S)

    at_once = constant("CONNECTS_AT_ONCE")
    for _ in range(at_once + 4):
        loop.call_soon_threadsafe(loop.connect_in_turn, connect, 0.0)
    for _ in range(at_once):
        assert arrived.acquire(timeout=PATIENCE_S)
    run(loop, lambda: None)  # which none of them holds up
    assert not arrived.acquire(timeout=0.05)
    go_on.set()
    for _ in range(4):
        assert arrived.acquire(timeout=PATIENCE_S)
    assert len(threads) == at_once == 16


def test_no_message_id_is_given_again_while_it_is_in_use() -> None:
    in_use: set[int] = set()
    ids = mqtt.unused_ids(in_use)
    assert [next(ids) for _ in range(65535)] == [*range(1, 65536)]
    in_use |= {1, 3}
    assert [next(ids) for _ in range(3)] == [2, 4, 5]


# TLS


class Tls:
    """In place of a TLS connection: what each read() returns, or raises."""

    def __init__(self, *answers: bytes | Exception, pending: int = 0) -> None:
        self._answers, self._pending = iter(answers), pending
        self.write = self.fileno = lambda: None
        self.is_closed = False

    def read(self, size: int) -> bytes:
        assert size >= 16384  # the maximum of a record, or it would stay in OpenSSL
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pending(self) -> int:
        return self._pending

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("sizes", [(1,) * 8, (3, 5), (8,), (5, 3), (100,)])
def test_what_is_read_ahead_is_handed_on_in_order_and_once(sizes: tuple[int, ...]) -> None:
    stream = mqtt._BufferedTls(Tls(b"abc", b"defgh", ssl.SSLWantReadError()))
    data = b""
    with contextlib.suppress(ssl.SSLWantReadError):
        for size in itertools.chain(sizes, itertools.repeat(1)):
            piece = stream.read(size)
            assert 0 < len(piece) <= size
            data += piece
    assert (data, stream.error) == (b"abcdefgh", None)


def test_what_was_read_ahead_is_known() -> None:
    stream = mqtt._BufferedTls(Tls(b"ab"))
    assert not stream.is_ahead
    stream.read(1)
    assert stream.is_ahead
    stream.read(1)
    assert not stream.is_ahead
    assert mqtt._BufferedTls(Tls(pending=1)).is_ahead


@pytest.mark.parametrize(
    ("answer", "raised", "is_the_end"),
    [
        (ssl.SSLWantReadError(), ssl.SSLWantReadError, False),
        (ssl.SSLWantWriteError(), ssl.SSLWantWriteError, False),
        (ConnectionResetError(), ConnectionResetError, True),
        (ssl.SSLError(1, "bad record"), ssl.SSLError, True),
        (b"", ConnectionResetError, True),
    ],
)
def test_the_end_of_a_connection_is_an_error_and_a_pause_is_none(
    answer: bytes | Exception, raised: type[Exception], is_the_end: bool
) -> None:
    stream = mqtt._BufferedTls(Tls(answer))
    with pytest.raises(raised) as caught:
        stream.read(1)
    assert type(caught.value) is raised
    assert stream.error is (caught.value if is_the_end else None)


def test_a_packet_that_aws_iot_never_sends_is_the_end() -> None:
    """128 KiB is the largest payload, 256 bytes the longest topic."""
    longest = 128 * 1024 + 2 + 256 + 2
    assert mqtt._BufferedTls(Tls(b"begin")).read(longest) == b"begin"
    stream = mqtt._BufferedTls(Tls(b"begin"))
    with pytest.raises(mqtt.PacketTooLong, match="135,000 bytes"):
        stream.read(135_000)


def test_a_tls_connection_is_closed_by_the_loop_alone() -> None:
    tls = Tls()
    stream = mqtt._BufferedTls(tls)
    stream.close()
    assert not tls.is_closed
    stream.really_close()
    assert tls.is_closed


def test_what_the_sdk_queues_it_gets_back_in_order() -> None:
    events = mqtt._EventDeque()
    for number in range(3):
        events.put(number)
    assert [events.get() for _ in range(3)] == [0, 1, 2]
