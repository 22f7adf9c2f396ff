# SPDX-License-Identifier: Apache-2.0
"""The device SDK's clients, all on one thread."""

from __future__ import annotations

import collections
import contextlib
import functools
import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from iot_elf import defaults
from iot_elf.text import log

CHECK_INTERVAL_S = 5.0  # between checks whether a connection is alive
CONNECTS_AT_ONCE = 16
MAX_PACKET_BYTES = defaults.MAX_PAYLOAD_BYTES + 1024  # what AWS IoT can deliver, with its topic and its packet's head
LINGER = "ii" if defaults.POSIX else "HH"  # the system's struct linger: on or off, and for how many seconds
LONG_PAUSE_S = 60.0  # without reading, which is said then: twice the keep-alive


class EventLoop:
    """The one thread that uses connections: it reads and writes when their sockets are ready, and calls what is due.

    A second thread would corrupt a TLS connection that it used. Other threads use call_soon_threadsafe(), which
    wakes it.
    """

    def __init__(
        self, failed: Callable[[Exception], None], connects_per_s: float = defaults.CONNECTS_PER_S, selector: Any = None
    ) -> None:
        """Start; `failed` gets the error that ends it, which is a bug. `selector` replaces the system's."""
        import selectors
        import socket
        from concurrent.futures import ThreadPoolExecutor

        self._failed = failed
        self.connects_per_s = connects_per_s
        self._turn = 0.0  # time.monotonic() of the last connect
        self.pool = ThreadPoolExecutor(CONNECTS_AT_ONCE)  # where connects block: a TLS handshake each
        self.selector = selector or selectors.DefaultSelector()
        self._calls: collections.deque[tuple[Callable[..., object], tuple[Any, ...]]] = collections.deque()
        self._due: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []  # a heap
        self._numbers = itertools.count()  # to order calls that are due at the same time
        self._waking, self._waker = socket.socketpair()
        self._is_awake = self._is_closed = False
        self.pausing: set[Connection] = set()  # those that a pause applies to
        self._leaving: set[_BufferedTls] = set()  # those that say no more, and have not been closed yet
        self._paused = math.inf, 0.0  # since when it is, a time.monotonic(), and for how long it was before
        self._resumed_at = -math.inf
        for end in (self._waking, self._waker):
            end.setblocking(False)
        self.selector.register(self._waking, selectors.EVENT_READ, lambda _: self._waking.recv(4096))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def call_soon_threadsafe(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the loop's thread. Any thread may call this."""
        self._calls.append((function, arguments))
        if not self._is_awake:
            self._is_awake = True
            with contextlib.suppress(OSError):  # the socket is full of these already, or closed
                self._waker.send(b"x")

    def call_at(self, due: float, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function at `due`, a time.monotonic(). Only for the loop's thread, as are the methods below."""
        heapq.heappush(self._due, (due, next(self._numbers), function, arguments))

    @property
    def is_current(self) -> bool:
        """Whether this is the loop's thread. Any thread may ask."""
        return threading.current_thread() is self._thread

    @property
    def is_paused(self) -> bool:
        """Whether nothing is read. Any thread may ask."""
        return self._paused[0] < math.inf

    @property
    def paused_s(self) -> float:
        """For how many seconds nothing was read, in all. Any thread may ask."""
        since, before_s = self._paused
        return before_s + max(0.0, time.monotonic() - since)

    @property
    def paused_s_ago(self) -> float:
        """How many seconds ago it was paused; 0: it is. Any thread may ask."""
        return 0.0 if self.is_paused else time.monotonic() - self._resumed_at

    def pause(self, unread: str) -> None:
        """Read from no connection until resume(), as nothing reads `unread`. Any thread may call this.

        What a broker sends then stays in the network, and it waits.
        """
        if not self.is_current:
            self.call_soon_threadsafe(self.pause, unread)
        elif not self.is_paused:
            since = time.monotonic()
            self._paused = since, self._paused[1]
            for connection in list(self.pausing):
                connection.watch()
            self.call_at(since + LONG_PAUSE_S, self._warn_of_pause, since, unread)

    def _warn_of_pause(self, since: float, unread: str) -> None:
        if since == self._paused[0]:
            line = "%s has not been read for %.0f s: ELF receives and sends no messages until its reader continues"
            log.warning(line, unread, time.monotonic() - since)

    def resume(self) -> None:
        """Read from all connections again."""
        if self.is_paused:
            self._paused, self._resumed_at = (math.inf, self.paused_s), time.monotonic()
            for connection in list(self.pausing):
                connection.on_resume()

    def connect_in_turn(self, connect: Callable[[], None], after_s: float) -> None:
        """Call a function in the pool after `after_s`, with at most `connects_per_s` such calls a second.

        https://docs.aws.amazon.com/general/latest/gr/iot-core.html: 500 connects a second an account.
        """
        self._turn = max(self._turn + 1 / self.connects_per_s, time.monotonic())
        self.call_at(self._turn + after_s, self._submit, connect)

    def _submit(self, connect: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the pool is shut down
            self.pool.submit(connect)

    def close_gently(self, stream: _BufferedTls) -> None:
        """Close a connection once the other side has, or after FAREWELL_S; what comes until then is not looked at.

        With anything unread, the system would reset it, and a broker that is sending would fail before it has read
        the last acknowledgements and the DISCONNECT (RFC 1122, 4.2.2.13).
        """
        import selectors

        self._leaving.add(stream)
        stream.finish()
        self.selector.register(stream, selectors.EVENT_READ, functools.partial(self._discard, stream))
        self.call_at(time.monotonic() + defaults.FAREWELL_S, self._let_go, stream)

    def _discard(self, stream: _BufferedTls, events: int) -> None:
        if not stream.has_more():
            self._let_go(stream)

    def _let_go(self, stream: _BufferedTls) -> None:
        if stream in self._leaving:
            self._leaving.remove(stream)
            self.selector.unregister(stream)
            stream.really_close()

    def close(self) -> None:
        """End, once the calls before this one are done, and connections are closed."""
        self._is_closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)

    def join(self, patience_s: float) -> None:
        """Wait for the end. Any other thread may call this."""
        self._thread.join(patience_s)

    def _run(self) -> None:
        try:
            while self._leaving or not self._is_closed:
                self._run_once()
        except Exception as error:
            self._failed(error)
        finally:
            self.selector.close()
            self._waking.close()
            self._waker.close()

    def _run_once(self) -> None:
        wait_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
        ready = self.selector.select(0.0 if self._calls else wait_s)
        self._is_awake = True  # what is handed over from now on is seen below
        for key, events in ready:
            key.data(events)
        self._is_awake = False
        for _ in range(len(self._calls)):
            function, arguments = self._calls.popleft()
            function(*arguments)
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, function, arguments = heapq.heappop(self._due)
            function(*arguments)


class _EventDeque(collections.deque[Any]):
    """What the SDK uses as a Queue: it puts events in while it reads, under locks, and Connection takes them out."""

    put, get = collections.deque.append, collections.deque.popleft


class _Stub:
    """Replaces the sockets by which the SDK wakes a client's network thread, and that thread's timer."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


@functools.cache
def load_sdk() -> Any:
    """Import the SDK and patch it; return the class of its clients."""
    import ssl
    from types import SimpleNamespace

    from AWSIoTPythonSDK import MQTTLib
    from AWSIoTPythonSDK.core.protocol import mqtt_core
    from AWSIoTPythonSDK.core.protocol.connection import alpn
    from AWSIoTPythonSDK.core.protocol.internal import clients, workers
    from AWSIoTPythonSDK.core.protocol.paho import client as paho

    silent = logging.getLogger("silent")  # the SDK's logs can contain keys, and cost more than its packets
    silent.disabled = True
    for kind in (
        MQTTLib.AWSIoTMQTTClient,
        mqtt_core.MqttCore,
        clients.InternalAsyncMqttClient,
        workers.EventProducer,
        workers.EventConsumer,
        workers.SubscriptionManager,
    ):
        kind._logger = silent
    logging.getLogger("AWSIoTPythonSDK").setLevel(logging.CRITICAL + 1)
    bare_context = functools.partial(ssl.SSLContext, ssl.PROTOCOL_TLS_CLIENT)  # else port 443 believes the system's CAs
    alpn.ssl = SimpleNamespace(SSLContext=ssl.SSLContext, create_default_context=bare_context)
    mqtt_core.Queue = _EventDeque
    paho.print = lambda *_: None  # it prints socket errors to standard output, which is for --output json
    paho.time = SimpleNamespace(time=time.monotonic)  # or a change of the clock would end connections
    paho.CONNACK_REFUSED_PROTOCOL_VERSION = None  # or it would reconnect while it reads, with MQTT 3.1
    paho._socketpair_compat = lambda: (_Stub(), _Stub())
    return MQTTLib.AWSIoTMQTTClient


def unused_ids(in_use: Container[object]) -> Iterator[int]:
    """Iterate without end over MQTT's message IDs, in order, but for those that are `in_use` when it is their turn."""
    return (each for each in itertools.cycle(range(1, 65536)) if each not in in_use)


def without_threads(client: Any) -> None:
    """Make a client of the SDK 1.6 start no thread, and leave the window, repetition and writing to Connection.

    It also gives no message ID again that it still has a callback for: an acknowledgement would count for another.
    """
    events, inner = client._mqtt_core._event_consumer, client._mqtt_core._internal_async_client
    paho = inner._paho_client
    paho._mid_generate = functools.partial(next, unused_ids(inner._event_callback_map))
    events.start = lambda: None
    events._stopper.set()  # or a failed connect would wait for it
    paho._client_id = paho._client_id.encode()  # or CONNECT's length would be that of its characters, not its bytes
    paho._thread = threading.current_thread()  # if this is set, publish() does not write
    paho._backoffCore = _Stub()
    paho._max_inflight_messages, paho._message_retry = 0, math.inf


class PacketTooLong(Exception):  # noqa: N818 - what it is, not what it does
    """The broker sends a packet that AWS IoT would not send."""


class _BufferedTls:
    """A TLS connection for paho: reads ahead, because paho asks byte by byte, and raises an error at its end.

    Without that error, paho would read for ever if the end came inside a packet.
    """

    def __init__(self, connection: Any) -> None:
        import ssl

        self._connection, self._nothing_yet = connection, (ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self._ahead, self._at = b"", 0
        self.write, self.fileno, self.really_close = connection.write, connection.fileno, connection.close
        self.error: OSError | None = None  # that ended it

    def read(self, size: int) -> bytes:
        if size > MAX_PACKET_BYTES:  # paho asks for all that is left of a packet
            raise PacketTooLong(f"a packet of {size:,} bytes came, and AWS IoT sends at most {MAX_PACKET_BYTES:,}")
        if self._at == len(self._ahead):
            try:
                self._ahead, self._at = self._connection.read(16384), 0  # the maximum of a TLS record
                if not self._ahead:
                    raise ConnectionResetError("closed by the other side")
            except self._nothing_yet:
                raise
            except OSError as error:
                self.error = error
                raise
        data: bytes = self._ahead[self._at : self._at + size]
        self._at += len(data)
        return data

    def finish(self) -> None:
        """Send no more: the other side sees an end behind what was sent."""
        import socket

        with contextlib.suppress(OSError):  # it has ended already
            self._connection.shutdown(socket.SHUT_WR)

    def has_more(self) -> bool:
        """After finish(): discard what has come, and return whether more may come."""
        try:
            return bool(self._connection.recv(65536))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def discard_unsent(self) -> None:
        """Make the system end the connection with a TCP reset when it is closed. Raises OSError."""
        import socket
        import struct

        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(LINGER, 1, 0))

    @property
    def is_ahead(self) -> bool:
        return self._at < len(self._ahead) or self._connection.pending() > 0

    def close(self) -> None:
        """Do nothing yet: the loop must unregister the socket before its number is used again."""


class Connection:
    """A connected client of the SDK in the loop. Any error ends the connection, and on_lost() is called once."""

    def __init__(self, client: Any, loop: EventLoop, on_lost: Callable[[Exception], None]) -> None:
        """Take over what open_client() returned, in the loop's thread. Nothing is written yet."""
        import selectors

        self.client = client
        self._loop, self._on_lost = loop, on_lost
        self._events = client._mqtt_core._event_queue
        self._dispatch = client._mqtt_core._event_consumer._dispatch_one
        self._paho = client._mqtt_core._internal_async_client._paho_client
        self._paho._ssl = self._stream = _BufferedTls(self._paho._ssl)
        # The SDK would acknowledge a message before anybody has it, and keeps to itself whether there was a session.
        self._send_puback, self._paho._send_puback = self._paho._send_puback, lambda mid: 0
        self._report_connack, self._paho.on_connect = self._paho.on_connect, self._on_connack
        self.session_present = False  # CONNACK says that the broker has kept one for this client ID
        self._is_open, self._is_behind = True, False
        self._is_dispatching = self._is_broken = self._is_cut = False  # broken: a step of the SDK's has failed
        self._error: Exception | None = None  # that made it fail
        self.on_writable: Callable[[], None] = lambda: None  # called when it can send again
        self._reading, self._writing = selectors.EVENT_READ, selectors.EVENT_WRITE
        self._wanted = 0
        self.watch()
        loop.call_at(time.monotonic() + CHECK_INTERVAL_S, self._keep_alive)

    @property
    def is_alive(self) -> bool:
        """Return whether the SDK has it open: what was read before the end is reported first, then the loss."""
        return self._is_open and not self._is_broken and bool(self._paho._ssl)

    @property
    def is_full(self) -> bool:
        """Return whether the socket can't send more for now, or has ended before all was sent."""
        return bool(self._paho.want_write()) if self._is_open else self._is_cut

    @property
    def _is_paused(self) -> bool:
        return self._loop.is_paused and self in self._loop.pausing

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool, on_puback: Callable[..., None] | None) -> int:
        """Publish a message, and return its MQTT message ID; `on_puback` is called when it is acknowledged."""
        # This is all that publishAsync() does, but it can't retain.
        message_id: int = self.client._mqtt_core.publish_async(topic, payload, qos, retain, on_puback)
        self.write()
        return message_id

    def subscribe(self, topic_filter: str, qos: int, on_suback: Callable[..., None]) -> int:
        """Subscribe, and return the MQTT message ID; `on_suback` is called with the broker's answer."""
        message_id: int = self.client.subscribeAsync(topic_filter, qos, on_suback)
        self.write()
        return message_id

    def send_puback(self, message: Any) -> None:
        """Acknowledge a message, with what is written next; what is not acknowledged stays in a persistent session."""
        if message.qos:
            self._send_puback(message.mid)

    def _on_connack(self, client: Any, data: Any, flags: Mapping[str, int], code: int) -> None:
        self.session_present = bool(flags["session present"])
        self._report_connack(client, data, flags, code)

    def write(self) -> None:
        """Send what the SDK has to send, as far as the socket allows."""
        if self.is_alive and self.is_full:  # else it would believe that it has sent something just now
            self._try(self._paho.loop_write)
        self.watch()

    def watch(self) -> None:
        """Have the loop watch the socket for what is wanted now: to read, unless it pauses; to write, if it must."""
        if self._is_open:
            wanted = (0 if self._is_paused else self._reading) | (self._writing if self.is_full else 0)
            selector, was = self._loop.selector, self._wanted
            self._wanted = wanted
            if wanted and not was:
                selector.register(self._stream, wanted, self._serve)
            elif not wanted and was:
                selector.unregister(self._stream)
            elif wanted != was:
                selector.modify(self._stream, wanted, self._serve)
            if was & self._writing and not wanted & self._writing:
                self.on_writable()

    def allow_pauses(self) -> None:
        """Stop reading whenever the loop pauses, from now on: what it waited for has come."""
        self._loop.pausing.add(self)
        self.watch()

    def on_resume(self) -> None:
        """Read on, and go on sending."""
        self._forgive_silence()
        self.watch()
        if self._stream.is_ahead:
            self._loop.call_soon_threadsafe(self._read_on)
        if self._is_open and not self.is_full:
            self.on_writable()

    def close(self) -> None:
        """Send what is left and a DISCONNECT, if the socket can now, and release all. Does not call on_lost()."""
        if self._is_open:
            with contextlib.suppress(Exception):
                self._paho.loop_write()
            is_cut = self.is_full
            with contextlib.suppress(Exception):
                if not is_cut:
                    self.client.disconnectAsync()
                    self._paho.loop_write()
            self._release(is_gentle=not is_cut)
            self._is_cut = is_cut

    def reset(self) -> None:
        """End it as a network that fails: a TCP reset, nothing more, not even a DISCONNECT. Does not call on_lost().

        A broker then sends the last will, and keeps a session.
        """
        if self._is_open:
            with contextlib.suppress(OSError):
                self._stream.discard_unsent()
            self._release()

    def _serve(self, events: int) -> None:
        if self._is_open and events & self._reading and not self._is_paused:
            self._try(self._read)
        if self._is_open and (events & self._writing or self.is_full):  # reading acknowledges what it reads
            self.write()

    def _read(self) -> int:
        """Read a limited amount, so that others have their turn soon; then come back for what was read ahead."""
        for _ in range(defaults.MAX_PER_TURN):
            if (failed := self._paho.loop_read()) or not self._paho._ssl or not self._stream.is_ahead:
                return int(failed)
        if not self._is_behind:
            self._is_behind = True
            self._loop.call_soon_threadsafe(self._read_on)
        return 0

    def _read_on(self) -> None:
        self._is_behind = False
        self._serve(self._reading)

    def _keep_alive(self) -> None:
        if self._is_open:
            if self._is_paused:
                self._forgive_silence()
            self._try(self._paho.loop_misc)
            self.write()
            self._loop.call_at(time.monotonic() + CHECK_INTERVAL_S, self._keep_alive)

    def _forgive_silence(self) -> None:
        """Let the time since the last packet and an unanswered PINGREQ not count: the answers are not read."""
        self._paho._last_msg_in, self._paho._ping_t = time.monotonic(), 0

    def _try(self, step: Callable[[], int]) -> None:
        """Run a step of the SDK's, which may close the connection, fail, or raise any error for invalid data.

        Callbacks get what it found one after the other: what one of them writes is a step, whose results come later.
        """
        try:
            self._is_broken = bool(step()) or self._is_broken
        except Exception as rubbish:
            self._is_broken, self._error = True, rubbish
        if self._is_dispatching:
            return
        self._is_dispatching = True
        while self._is_open and self._events:
            self._dispatch()  # to the callbacks, here, where no lock of the SDK's is held
        self._is_dispatching = False
        if self._is_open and not self.is_alive:
            self._release()
            self._on_lost(self._error or self._stream.error or ConnectionResetError("given up"))

    def _release(self, is_gentle: bool = False) -> None:
        self._is_open, self._is_cut = False, self.is_full
        self._loop.pausing.discard(self)
        if self._wanted:
            self._loop.selector.unregister(self._stream)
        if is_gentle:
            self._loop.close_gently(self._stream)
        else:
            self._stream.really_close()
        self._events.clear()
