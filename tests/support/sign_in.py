"""The services by which a user signs in: STS, SSO, and what a container or an instance asks."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.aws import SECRET, SESSION_TOKEN

ROLE = "arn:aws:iam::123456789012:role/elf"


class Services(ThreadingHTTPServer):
    """STS, SSO, the container's and the instance's endpoint: all answer the same, whatever is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.status, self.body, self.headers = 200, b"", {}  # type: int, bytes, dict[str, str]
        self.asked: list[str] = []  # the bodies
        self.paths: list[str] = []
        self.answer_of: dict[str, bytes] = {}  # other bodies, by the end of the path
        self.refuses_next: tuple[int, str, str] | None = None  # refuse(), from the second request on
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def refuse(self, status: int, code: str, message: str) -> None:
        """Refuse as a service does that speaks XML, or JSON."""
        xml = f"<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>"
        text = xml if not code.startswith("json ") else json.dumps({"message": message})
        self.status, self.body, self.headers = status, text.encode(), {"x-amzn-ErrorType": code.removeprefix("json ")}


class _Handler(BaseHTTPRequestHandler):
    server: Services

    def do_POST(self) -> None:
        server = self.server
        server.asked.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        server.paths.append(self.path)
        body = next((body for end, body in server.answer_of.items() if self.path.endswith(end)), server.body)
        self.send_response(server.status)
        for name, value in {**server.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if server.refuses_next:
            server.refuse(*server.refuses_next)

    do_GET = do_PUT = do_POST  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        pass


def a_session(minutes: float, key: str = "ASIAIOSFODNN7EXAMPLE") -> bytes:
    """What AssumeRole answers."""
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60 * minutes))
    keys = {"AccessKeyId": key, "SecretAccessKey": SECRET, "SessionToken": SESSION_TOKEN}
    fields = "".join(f"<{name}>{value}</{name}>" for name, value in {**keys, "Expiration": expires}.items())
    user = f"<AssumedRoleUser><Arn>{ROLE}/elf</Arn><AssumedRoleId>elf</AssumedRoleId></AssumedRoleUser>"
    result = f"<AssumeRoleResult><Credentials>{fields}</Credentials>{user}</AssumeRoleResult>"
    return f"<AssumeRoleResponse>{result}</AssumeRoleResponse>".encode()
