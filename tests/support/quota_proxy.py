"""A reverse proxy that puts AWS's distance and AWS's quotas between ELF and MiniStack."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Method and path of each operation (AWS IoT API reference), and its default quota in calls a second
# (https://docs.aws.amazon.com/general/latest/gr/iot-core.html).
OPERATIONS = [
    ("GET", r"/endpoint", "DescribeEndpoint", 10),
    ("POST", r"/keys-and-certificate", "CreateKeysAndCertificate", 10),
    ("PUT", r"/certificates/[^/]+", "UpdateCertificate", 10),
    ("DELETE", r"/certificates/[^/]+", "DeleteCertificate", 10),
    ("POST", r"/policies/[^/]+", "CreatePolicy", 10),
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


class QuotaProxy(ThreadingHTTPServer):
    """Forward to MiniStack at `upstream_port`, each answer `round_trip_s` late; throttle past `quota_factor` quotas.

    `calls` and `throttled` count by operation; `most_at_once` is the largest number of calls under way together, and
    `busy_s` the time from the first call's coming to the last answer's going.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream_port: int, round_trip_s: float = 0.06, quota_factor: float = 1.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port, self.round_trip_s, self.quota_factor = upstream_port, round_trip_s, quota_factor
        self.calls: Counter[str] = Counter()
        self.throttled: Counter[str] = Counter()
        self.most_at_once = self._at_once = 0
        self.connections = 0
        self._began = self._ended = 0.0
        self._buckets: dict[str, TokenBucket] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def busy_s(self) -> float:
        return self._ended - self._began

    def reset(self) -> None:
        """Forget the counts, and fill every bucket."""
        with self._lock:
            self.calls.clear()
            self.throttled.clear()
            self._buckets.clear()
            self.most_at_once = self.connections = 0
            self._began = 0.0

    def admit(self, method: str, path: str) -> bool:
        name, quota = operation_of(method, path)
        with self._lock:
            self._began = self._began or time.monotonic()
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.calls[name] += 1
            if self._buckets.setdefault(name, TokenBucket(quota * self.quota_factor)).take():
                return True
            self.throttled[name] += 1
            return False

    def leave(self) -> None:
        with self._lock:
            self._at_once -= 1
            self._ended = time.monotonic()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: QuotaProxy

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        admitted = self.server.admit(self.command, self.path)
        try:
            time.sleep(self.server.round_trip_s)  # the distance to AWS
            if admitted:
                # A connection each: MiniStack closes idle ones, which a kept one would learn too late.
                upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                status, content, headers = answer.status, answer.read(), answer.getheaders()
                upstream.close()
            else:
                status, content = 429, b'{"message": "Rate exceeded"}'
                headers = [("x-amzn-ErrorType", "ThrottlingException"), ("Content-Type", "application/json")]
        finally:
            self.server.leave()
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        pass
