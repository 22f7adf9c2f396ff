"""A reverse proxy that makes ELF's calls to MiniStack fail as calls to AWS do: refused, cut off, unanswered."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from support.quota_proxy import HOP_BY_HOP, operation_of

ANY = "any operation"


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Fault(NamedTuple):
    """What becomes of a call: does MiniStack see it, and what does the client get? Without an answer it is cut off.

    One that hangs does so until it is released; `is_late` has it answered then, by MiniStack.
    """

    is_forwarded: bool = False
    answer: Answer | None = None
    hangs: bool = False
    is_late: bool = False


CUT_BEFORE = Fault()
CUT_AFTER = Fault(is_forwarded=True)
HANG = Fault(hangs=True)
HANG_AFTER = Fault(is_forwarded=True, hangs=True)
LATE = Fault(is_forwarded=True, hangs=True, is_late=True)


def aws_error(status: int, code: str, message: str) -> Fault:
    """Answer as an AWS service that speaks REST-JSON does."""
    headers = (("x-amzn-ErrorType", code), ("Content-Type", "application/json"))
    return Fault(answer=Answer(status, json.dumps({"message": message}).encode(), headers))


def page(html: str, status: int = 200) -> Fault:
    """Answer as a captive portal does, or another proxy in the way."""
    return Fault(answer=Answer(status, html.encode(), (("Content-Type", "text/html"),)))


def denied(operation: str) -> Fault:
    user = "arn:aws:iam::123456789012:user/somebody"
    message = f"User: {user} is not authorized to perform: iot:{operation} on resource: *"
    return aws_error(403, "AccessDeniedException", message)


INTERNAL_FAILURE = aws_error(500, "InternalFailureException", "An unexpected error has occurred.")
UNAVAILABLE = aws_error(503, "ServiceUnavailableException", "The service is temporarily unavailable.")
THROTTLED = aws_error(429, "ThrottlingException", "Rate exceeded")


class _Order(NamedTuple):
    operation: str
    fault: Fault
    call: int
    onwards: bool


class FaultProxy(ThreadingHTTPServer):
    """Forward to MiniStack at `upstream_port`, `round_trip_s` away, but for the calls that inject() names.

    `calls` counts the calls that came, and `faults` those that met a fault, by operation. With `loses_abandoned`, a
    call does not arrive if the client has gone when it is half-way.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream_port: int, round_trip_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port, self.round_trip_s = upstream_port, round_trip_s
        self.loses_abandoned = False
        self.calls: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.released = threading.Event()  # of the calls that hang now
        self._orders: list[_Order] = []
        self._under_way = self._hanging = 0
        self._news = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def inject(self, operation: str, fault: Fault, call: int = 1, onwards: bool = False) -> None:
        """Let the `call`-th call since reset() fail, and with `onwards` all that follow; ANY counts all operations."""
        with self._news:
            self._orders.append(_Order(operation, fault, call, onwards))

    def reset(self) -> None:
        """Forget the counts, and inject nothing any more."""
        with self._news:
            self.calls.clear()
            self.faults.clear()
            self._orders.clear()

    def release(self) -> None:
        """Cut the calls that hang, and answer those that are late."""
        with self._news:
            self.released.set()
            self.released = threading.Event()

    def await_hang(self, patience_s: float) -> None:
        """Wait until a call hangs, which MiniStack has dealt with by then if it is forwarded."""
        with self._news:
            assert self._news.wait_for(lambda: self._hanging, patience_s), "no call hangs"

    def await_quiet(self, patience_s: float) -> None:
        """Wait until MiniStack has dealt with every call, those of a client that is dead by now included."""
        with self._news:
            assert self._news.wait_for(lambda: not self._under_way, patience_s), "a call does not end"

    def begin(self, method: str, path: str) -> tuple[Fault | None, threading.Event]:
        """Count a call; return its fault, if any, and what releases it if that is to hang."""
        name, _ = operation_of(method, path)
        with self._news:
            self._under_way += 1
            self.calls[name] += 1
            for operation, fault, call, onwards in self._orders:
                if operation in (name, ANY):
                    number = self.calls.total() if operation == ANY else self.calls[name]
                    if number == call or (onwards and number > call):
                        self.faults[name] += 1
                        return fault, self.released
            return None, self.released

    def hang(self, released: threading.Event) -> None:
        with self._news:
            self._hanging += 1
            self._news.notify_all()
        released.wait()
        with self._news:
            self._hanging -= 1

    def end(self) -> None:
        with self._news:
            self._under_way -= 1
            self._news.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that is killed closes nothing
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.release()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def _take(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the client was killed in the middle of it
            self.close_connection = True
            return
        fault, released = self.server.begin(self.command, self.path)
        try:
            forwarded = self._forward(body) if not fault or fault.is_forwarded else None
            answer = fault.answer if fault and not fault.is_late else forwarded
            if fault and fault.hangs:
                self.server.hang(released)
            with contextlib.suppress(OSError):  # the client has not waited
                self._answer(answer)
        finally:
            self.server.end()

    def _forward(self, body: bytes) -> Answer | None:
        time.sleep(self.server.round_trip_s / 2)
        if self.server.loses_abandoned and self._is_abandoned():
            return None
        # A connection each: MiniStack closes idle ones, which a kept one would learn too late.
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.upstream_port)) as upstream:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP]
            forwarded = Answer(answer.status, answer.read(), tuple(headers))
        time.sleep(self.server.round_trip_s / 2)
        return forwarded

    def _is_abandoned(self) -> bool:
        with contextlib.suppress(ConnectionError):
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        return True

    def _answer(self, answer: Answer | None) -> None:
        if not answer:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_PUT = do_POST = do_DELETE = _take  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        pass
