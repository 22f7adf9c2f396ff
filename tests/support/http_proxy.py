"""A reverse proxy between ELF and MiniStack: AWS's distance and quotas, and calls that fail as calls to AWS do."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

# Method and path of each operation (AWS IoT API reference), and its default quota in calls a second
# (https://docs.aws.amazon.com/general/latest/gr/iot-core.html).
OPERATIONS = [
    ("GET", r"/endpoint", "DescribeEndpoint", 10),
    ("POST", r"/keys-and-certificate", "CreateKeysAndCertificate", 10),
    ("PUT", r"/certificates/[^/]+", "UpdateCertificate", 10),
    ("DELETE", r"/certificates/[^/]+", "DeleteCertificate", 10),
    ("POST", r"/policies/[^/]+", "CreatePolicy", 10),
    ("POST", r"/policies/[^/]+/version", "CreatePolicyVersion", 10),
    ("GET", r"/policies/[^/]+", "GetPolicy", 10),
    ("DELETE", r"/policies/[^/]+", "DeletePolicy", 10),
    ("GET", r"/policies/[^/]+/version", "ListPolicyVersions", 10),
    ("DELETE", r"/policies/[^/]+/version/[^/]+", "DeletePolicyVersion", 10),
    ("PUT", r"/target-policies/[^/]+", "AttachPolicy", 15),
    ("POST", r"/target-policies/[^/]+", "DetachPolicy", 15),
    ("GET", r"/certificates/[^/]+", "DescribeCertificate", 10),
    ("GET", r"/certificates", "ListCertificates", 10),
    # A target is an ARN, whose slash a client should escape.
    ("POST", r"/attached-policies/.+", "ListAttachedPolicies", 15),
    ("POST", r"/policy-targets/[^/]+", "ListTargetsForPolicy", 10),
    ("GET", r"/principals/things", "ListPrincipalThings", 10),
    ("POST", r"/things/[^/]+", "CreateThing", 100),
    ("GET", r"/things/[^/]+", "DescribeThing", 350),
    ("GET", r"/things", "ListThings", 10),
    ("GET", r"/things/[^/]+/principals", "ListThingPrincipals", 20),
    ("DELETE", r"/things/[^/]+", "DeleteThing", 100),
    ("PUT", r"/things/[^/]+/principals", "AttachThingPrincipal", 100),
    ("DELETE", r"/things/[^/]+/principals", "DetachThingPrincipal", 100),
]
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


def operation_of(method: str, path: str) -> tuple[str, float]:
    """Name the AWS IoT operation of a request, and its quota."""
    plain = path.partition("?")[0]
    for verb, pattern, name, quota in OPERATIONS:
        if verb == method and re.fullmatch(pattern, plain):
            return name, quota
    return f"{method} {plain}", float("inf")


class TokenBucket:
    """`quota` calls a second, and as many at once after a pause."""

    def __init__(self, quota: float) -> None:
        self._quota, self._tokens, self._at = quota, quota, time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self._quota, self._tokens + (now - self._at) * self._quota)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


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


class HttpProxy(ThreadingHTTPServer):
    """Forward to `url`, which is `round_trip_s` away, but for the calls that inject() names.

    With a `quota_factor`, throttle past so many times AWS's default quotas. With `loses_abandoned`, a call does not
    arrive if the client has gone when it is half-way.

    `calls` counts the calls that came, `faults` those that met a fault, and `throttled` those over a quota, by
    operation; `connections` counts what they came through. `most_at_once` is the largest number of calls under way
    together, and `busy_s` the time from the first call's coming to the last answer's going.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, url: str, round_trip_s: float = 0.0, quota_factor: float | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port = urlsplit(url).port or 0
        self.round_trip_s, self.quota_factor = round_trip_s, quota_factor
        self.loses_abandoned = False
        self.calls: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.throttled: Counter[str] = Counter()
        self.connections = self.most_at_once = 0
        self.released = threading.Event()  # of the calls that hang now
        self._orders: list[_Order] = []
        self._buckets: dict[str, TokenBucket] = {}
        self._under_way = self._hanging = 0
        self._began = self._ended = 0.0
        self._news = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def busy_s(self) -> float:
        return self._ended - self._began

    def inject(self, operation: str, fault: Fault, call: int = 1, onwards: bool = False) -> None:
        """Let the `call`-th call since reset() fail, and with `onwards` all that follow; ANY counts all operations."""
        with self._news:
            self._orders.append(_Order(operation, fault, call, onwards))

    def reset(self) -> None:
        """Forget the counts, fill every bucket, and inject nothing any more."""
        with self._news:
            for counts in (self.calls, self.faults, self.throttled):
                counts.clear()
            self._orders.clear()
            self._buckets.clear()
            self.connections = self.most_at_once = 0
            self._began = 0.0

    def release(self) -> None:
        """Cut the calls that hang, and answer those that are late; none that arrives from now on hangs."""
        with self._news:
            self._orders = [order for order in self._orders if not order.fault.hangs]
            self.released.set()
            self.released = threading.Event()

    def await_hang(self, patience_s: float) -> None:
        """Wait until a call hangs, which MiniStack has dealt with by then if it is forwarded."""
        with self._news:
            assert self._news.wait_for(lambda: self._hanging, patience_s), "no call hangs"

    @contextlib.contextmanager
    def while_hanging(self, act: Callable[[], object], patience_s: float) -> Iterator[None]:
        """Do something once a call hangs, in another thread, and release it."""

        def run() -> None:
            self.await_hang(patience_s)
            act()
            self.release()

        other = threading.Thread(target=run)
        other.start()
        yield
        other.join()

    def await_quiet(self, patience_s: float) -> None:
        """Wait until MiniStack has dealt with every call, those of a client that is dead by now included."""
        with self._news:
            assert self._news.wait_for(lambda: not self._under_way, patience_s), "a call does not end"

    def begin(self, method: str, path: str) -> tuple[Fault | None, threading.Event]:
        """Count a call; return its fault, if any, and what releases it if that is to hang."""
        name, quota = operation_of(method, path)
        with self._news:
            self._began = self._began or time.monotonic()
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            self.calls[name] += 1
            for operation, fault, call, onwards in self._orders:
                if operation in (name, ANY):
                    number = self.calls.total() if operation == ANY else self.calls[name]
                    if number == call or (onwards and number > call):
                        self.faults[name] += 1
                        return fault, self.released
            if self.quota_factor is not None:
                bucket = self._buckets.setdefault(name, TokenBucket(quota * self.quota_factor))
                if not bucket.take():
                    self.throttled[name] += 1
                    return THROTTLED, self.released
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
            self._ended = time.monotonic()
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
    server: HttpProxy

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def _take(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the client was killed in the middle of it
            self.close_connection = True
            return
        fault, released = self.server.begin(self.command, self.path)
        try:
            time.sleep(self.server.round_trip_s / 2)
            arrives = not (self.server.loses_abandoned and self._is_abandoned())
            forwarded = self._forward(body) if arrives and (not fault or fault.is_forwarded) else None
            time.sleep(self.server.round_trip_s / 2)
            if fault and fault.hangs:
                self.server.hang(released)
        finally:
            self.server.end()
        with contextlib.suppress(OSError):  # the client has not waited
            self._answer(fault.answer if fault and not fault.is_late else forwarded)

    def _forward(self, body: bytes) -> Answer:
        # A connection each: MiniStack closes idle ones, which a kept one would learn too late.
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.upstream_port)) as upstream:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP]
            return Answer(answer.status, answer.read(), tuple(headers))

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
