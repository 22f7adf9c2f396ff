#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The embedded AWS IoT of `elf.py --local`: MiniStack's AWS IoT, alone and for its owner alone.

A command asks find_or_start() for its address. What that starts is this file again: serve() runs in the background
until its directory, misc/local/, is gone:

    lock           locked by the server from start to end: it says dead or alive, whatever the ports say
    address.json   its ports and its token, written once it listens; without that file it ends
    ca.pem         the root certificate of its MQTT broker
    state/         the things, certificates and policies, as MiniStack saves them
    ministack.log  what the server says

Other users and every web page reach loopback, too. So an HTTP request has to carry the token, a device its certificate,
and nothing of MiniStack is reached but its AWS IoT: no Lambda, no IAM, nothing that would run code.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - see elf.py
    sys.exit("local_aws.py needs Python 3.10 or later, and this is {}.{}".format(*sys.version_info))

import argparse
import asyncio
import contextlib
import errno
import gzip
import hmac
import json
import os
import secrets
import shlex
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

HERE = Path(__file__).resolve().parent
ADDRESS = "address.json"
LOCK = "lock"
LOG = "ministack.log"
PACKAGES = ("ministack", "hypercorn", "cryptography")

TOKEN_HEADER = "X-ELF-Token"  # noqa: S105 - its name
PROOF_HEADER = "X-ELF-Proof"
ROOT_KEY = "test"  # MiniStack's name for the owner of the account
# The services by the name that a signature gives them; botocore knows the paths of each.
SERVICES = {"iot": "iot", "iotdata": "iot-data", "iotdevicegateway": "iot-data"}

START_S = 60.0  # one second as a rule; a cold disk takes longer, and so does a machine that was asleep
ANSWER_S = 2.0
SAVE_S = 10.0
STOP_S = 5.0
ENDING_S = 1.0
LOOK_S = 0.05
MAX_ANSWER_BYTES = 4096  # of the server to the questions below, and of address.json


class LocalAwsError(Exception):
    """A failure in two lines: the cause and the remedy."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        """Without a remedy, requirements-local.txt is to be installed."""
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy


class LocalAws(NamedTuple):
    """A server that runs: where it listens on 127.0.0.1, and what to show there."""

    http_port: int
    mqtt_port: int
    token: str  # another one for each start: what a dead server's port hears is worth nothing
    root_cert: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def headers(self) -> dict[str, str]:
        """What every HTTP request has to carry."""
        return {TOKEN_HEADER: self.token}


# ---------------------------------------------------------------------------------------------------------------------
# For commands
# ---------------------------------------------------------------------------------------------------------------------


def find(directory: Path, check: Callable[[], object] = lambda: None) -> LocalAws | None:
    """Find the server of `directory`, if one runs and answers within ANSWER_S."""
    local = _read_address(directory) if is_alive(directory) else None
    return local if local and _ask(local, "ready", ANSWER_S, check) else None


def find_or_start(directory: Path, check: Callable[[], object], say: Callable[[str, Path], object]) -> LocalAws:
    """Find the server of `directory`, or start one with the state it had, and wait until it answers, START_S at most.

    `check` is called several times a second, and may raise; `say` is called before a server is started. One that is
    alive but slow is waited for, and never replaced.
    Raises: LocalAwsError when MiniStack is not installed, or the server does not start or does not answer.
    """
    started: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + START_S
    try:
        while not (local := find(directory, check)):
            if is_alive(directory):
                pass
            elif not started:
                say("starting the embedded AWS IoT in %s", directory)
                started = _start(directory)
            elif (status := started.poll()) is not None:
                raise LocalAwsError(
                    f"the embedded AWS IoT did not start: {_last_line(directory)} (exit status {status})",
                    f"see why in {directory / LOG}",
                )
            if time.monotonic() > deadline:
                raise LocalAwsError(
                    f"the embedded AWS IoT has not answered for {START_S:g} s",
                    f"see why in {directory / LOG}, and end its process if it still runs",
                )
            check()
            time.sleep(LOOK_S)
    except BaseException:
        if started:
            started.kill()
        raise
    return local


def is_alive(directory: Path) -> bool:
    """Say whether a server runs for `directory`, be it ready or not."""
    try:
        with open(directory / LOCK, "r+b", opener=_open_private) as file:
            return not _lock(file.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return False


def has_ended(directory: Path) -> bool:
    """Say whether the server has ended. The system closes a dead one's connections before it lets its lock go."""
    deadline = time.monotonic() + ENDING_S
    while is_alive(directory):
        if find(directory) or time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def save(local: LocalAws, say: Callable[[str], object]) -> None:
    """Have the server save its state, so that not even kill -9 takes away what a command has made; or `say` so."""
    if not _ask(local, "save", SAVE_S):
        say("the embedded AWS IoT did not confirm that its state is saved: the last of it may be lost if it is killed")


def stop(directory: Path, say: Callable[[str, Path], object]) -> None:
    """Stop the server of `directory`, if one runs, and remove the directory; if it does not end, `say` so.

    A directory whose server is suspended, say, stays: without its lock, the next command would start a second one.
    """
    (directory / ADDRESS).unlink(missing_ok=True)  # which is what tells it to end, once it can
    deadline = time.monotonic() + STOP_S
    while is_alive(directory):
        if time.monotonic() > deadline:
            say(
                "the embedded AWS IoT (`local_aws.py serve --directory %s`) does not end: kill it, then clean again",
                directory,
            )
            return
        time.sleep(LOOK_S)
    shutil.rmtree(directory, ignore_errors=True)


def _start(directory: Path) -> subprocess.Popen[bytes]:
    import importlib.util

    missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        raise LocalAwsError(f"--local needs MiniStack, and there is no Python package {' or '.join(missing)}")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(directory / LOG, "w", opener=_open_private) as logfile:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "serve", "--directory", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=logfile,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=_environment(directory),
            start_new_session=True,  # the terminal's Ctrl-C is not for it
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def _environment(directory: Path) -> dict[str, str]:
    """Give MiniStack what it needs, and nothing of the user's AWS configuration or Docker."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "DOCKER_", "PYTHON"))}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(_import_path()),
        "PYTHONSAFEPATH": "1",
        "AUTH": "true",  # IoT policies are enforced, as AWS does
        "PERSIST_STATE": "1",
        "STATE_DIR": "state",
        "TMPDIR": str(directory),
    }


def _import_path() -> list[str]:
    """Say where the server finds its packages: where this process does, by PYTHONPATH or in the user's site-packages.

    Not in the working directory nor beside the script, which others may have filled (Python puts one of them first,
    Locust the other), unless it needs packages that are there alone.
    """
    from importlib.machinery import PathFinder

    entries = [str(Path(entry).absolute()) for entry in sys.path if entry]
    work = {str(HERE), str(Path(sys.argv[0]).resolve().parent)}
    with contextlib.suppress(OSError):  # it was removed
        work.add(str(Path.cwd()))
    trusted = [entry for entry in entries if str(Path(entry).resolve()) not in work]
    return trusted if all(PathFinder.find_spec(name, trusted) for name in PACKAGES) else entries


def _ask(local: LocalAws, question: str, patience_s: float, check: Callable[[], object] = lambda: None) -> bool:
    """Have the server answer "ready" or "save"; return whether it did, and it was the server.

    Both sides show that they know the token without saying it: whoever else listens on that port, now that the server
    may have ended, learns nothing, and gets no more than `patience_s` and MAX_ANSWER_BYTES.
    """
    nonce = secrets.token_hex(16)
    request = (
        f"POST /_elf/{question} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n"
        f"{PROOF_HEADER}: {nonce}:{_proof(local, 'command', nonce)}\r\n\r\n"
    )
    answer = b""
    deadline = time.monotonic() + patience_s
    address = "127.0.0.1", local.http_port
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=LOOK_S) as connection:
        connection.sendall(request.encode("ascii"))
        while len(answer) < MAX_ANSWER_BYTES and time.monotonic() < deadline:
            check()
            with contextlib.suppress(TimeoutError):
                if not (received := connection.recv(MAX_ANSWER_BYTES)):
                    break
                answer += received
    return hmac.compare_digest(answer.partition(b"\r\n\r\n")[2], _proof(local, "server", nonce).encode("ascii"))


def _proof(local: LocalAws, who: str, nonce: str) -> str:
    """Prove the token for one question and one port, so that an answer can't be passed on from another."""
    return hmac.new(local.token.encode(), f"{who} {local.http_port} {nonce}".encode(), "sha256").hexdigest()


def _read_address(directory: Path) -> LocalAws | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(directory / ADDRESS, encoding="ascii", opener=_open_private) as file:
            address = json.loads(file.read(MAX_ANSWER_BYTES))
        ports = int(address["http"]), int(address["mqtt"])
        if all(0 < port < 2**16 for port in ports):
            return LocalAws(*ports, str(address["token"]), directory / "ca.pem")
    return None


def _last_line(directory: Path) -> str:
    lines = (directory / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _open_private(path: str, flags: int) -> int:
    """Open a file as its owner's alone, not where a symbolic link leads, and without waiting for a pipe's other end."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed, or return False: another process has it. The system unlocks it for the dead."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


def serve(directory: Path) -> None:
    """Be the embedded AWS IoT of `directory` until it is asked to end (SIGTERM), or address.json is gone or another's.

    All paths are relative to the working directory: when that is gone, nothing is made again in its place.
    """
    os.umask(0o077)
    os.chdir(directory)
    _raise_limits()
    with open(LOCK, "a+b", opener=_open_private) as file:
        deadline = time.monotonic() + ANSWER_S
        while not _lock(file.fileno()):  # for a moment, a command that looks whether we are alive has it
            if time.monotonic() > deadline:
                sys.exit("another server runs here")
            time.sleep(LOOK_S)
        before = _read_address(Path())
        Path(ADDRESS).unlink(missing_ok=True)  # a dead server's
        http, mqtt = _listen(before.http_port if before else 0), _listen(before.mqtt_port if before else 0)
        os.environ["GATEWAY_PORT"] = str(http.getsockname()[1])  # for the addresses that DescribeEndpoint gives
        asyncio.run(_serve(http, mqtt))


def _raise_limits() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none, and macOS takes less than it says
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(port: int) -> socket.socket:
    """Listen on a port of loopback, or on another if somebody has that one."""
    for candidate in (port, 0):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", candidate))
    sys.exit("there is no free port on 127.0.0.1")


async def _serve(http: socket.socket, mqtt: socket.socket) -> None:
    from hypercorn.asyncio import serve as serve_http
    from hypercorn.config import Config
    from ministack.core.persistence import load_state, save_state
    from ministack.services import iot

    saving = threading.Lock()

    def save_now() -> None:
        with saving, contextlib.suppress(RuntimeError):  # a change in mid-copy: the next time
            save_state("iot", iot.get_state())

    if state := load_state("iot"):
        iot.load_persisted_state(state)
    local = LocalAws(http.getsockname()[1], mqtt.getsockname()[1], secrets.token_hex(32), Path("ca.pem"))
    _write_private("ca.pem", iot.get_ca_cert_pem())
    context: ssl.SSLContext = iot._mtls_build_ssl_context()
    context.verify_mode = ssl.CERT_REQUIRED  # MiniStack lets in who has no certificate at all
    broker = await asyncio.start_server(iot._mtls_handle_conn, sock=mqtt, ssl=context)
    address = json.dumps({"http": local.http_port, "mqtt": local.mqtt_port, "pid": os.getpid(), "token": local.token})
    _write_private(ADDRESS, address)
    config = Config()
    config.bind = [f"fd://{http.detach()}"]
    background = [asyncio.create_task(work) for work in (_save_after_work(save_now), _end_with_address(address))]
    await serve_http(Gate(local, save_now), config)  # until SIGTERM
    for task in background:
        task.cancel()
    broker.close()
    save_now()


async def _save_after_work(save_now: Callable[[], None]) -> None:
    """Save the state after any work, which shows in the processor time whether it came over HTTP or MQTT.

    MiniStack saves at a clean end only, and would lose it all in a crash.
    """
    worked = 0.0
    while True:
        await asyncio.sleep(0.2)
        began = time.process_time()
        if began - worked > 0.01:
            await asyncio.to_thread(save_now)
            worked = time.process_time()
            await asyncio.sleep(10 * (worked - began))  # a tenth of the time at the most


async def _end_with_address(mine: str) -> None:
    """End the process, at once, when its address is gone or another's: nobody wants its state any more."""
    while True:
        await asyncio.sleep(0.2)
        try:
            if Path(ADDRESS).read_bytes() != mine.encode("ascii"):
                os._exit(0)
        except OSError as error:  # too many open files, say, is no reason to end
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                os._exit(0)


def _write_private(name: str, text: str) -> None:
    """Write a file of the working directory, readable by its owner alone, that is whole at every moment."""
    descriptor, temporary = tempfile.mkstemp(dir=".", prefix=f".{name}.")  # which makes it 0600
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    Path(temporary).replace(name)


class Gate:
    """The HTTP server's application (ASGI): it lets requests of who knows the token through to AWS IoT, and no others.

    It calls MiniStack's handlers of AWS IoT and of its data plane itself, past MiniStack's own router: that chooses
    among a hundred services by a request's host, headers, path, query and body, and by more with each release.
    """

    def __init__(self, local: LocalAws, save_now: Callable[[], None]) -> None:
        import botocore
        from ministack.services import iot, iot_data

        self._local = local
        self._save_now = save_now
        self._handlers = {"iot": iot.handle_request, "iot-data": iot_data.handle_request}
        self._paths: dict[str, set[str]] = {}  # how the paths of each service begin
        for service in self._handlers:
            (model,) = Path(botocore.__path__[0], "data", service).glob("*/service-2.json.gz")  # its loader takes 0.2 s
            operations = json.loads(gzip.decompress(model.read_bytes()))["operations"].values()
            self._paths[service] = {_first_level(operation["http"]["requestUri"]) for operation in operations}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                event = (await receive())["type"]
                await send({"type": f"{event}.complete"})
                if event == "lifespan.shutdown":
                    return
        if scope["type"] != "http":  # MQTT over WebSocket takes no certificate
            await send({"type": "websocket.close"})
            return
        status, headers, body = await self._answer(scope, receive)
        body = body.encode() if isinstance(body, str) else body
        headers |= {"content-length": str(len(body))}
        pairs = [(name.lower().encode("latin-1"), str(value).encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Any, receive: Any) -> tuple[int, dict[str, str], str | bytes]:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        nonce, _, proof = headers.get(PROOF_HEADER.lower(), "").partition(":")
        if _same(proof, _proof(self._local, "command", nonce)):
            if scope["path"] == "/_elf/save":
                await asyncio.to_thread(self._save_now)
            return 200, {}, _proof(self._local, "server", nonce)
        key, region, service = _credential_scope(headers.get("authorization", ""))
        trusted = _same(headers.get(TOKEN_HEADER.lower(), ""), self._local.token) or _same(key, self._local.token)
        if not trusted or _first_level(scope["path"]) not in self._paths.get(service, ()):
            denied = {"__type": "AccessDeniedException", "message": "this AWS IoT is its owner's alone (local_aws.py)"}
            return 403, {"content-type": "application/json", "connection": "close"}, json.dumps(denied)
        return await self._handle(service, region, scope, headers, await _read_body(receive))

    async def _handle(
        self, service: str, region: str, scope: Any, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], str | bytes]:
        from ministack.core.responses import set_request_account_id, set_request_region

        set_request_account_id(ROOT_KEY)
        set_request_region(region)
        headers["authorization"] = f"AWS4-HMAC-SHA256 Credential={ROOT_KEY}/"
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        status, answered, answer = await self._handlers[service](scope["method"], scope["path"], headers, body, query)
        return int(status), {**answered, "x-amzn-requestid": secrets.token_hex(16)}, answer


def _first_level(path: str) -> str:
    return path.partition("?")[0].split("/")[1] if path.startswith("/") else ""


def _credential_scope(authorization: str) -> tuple[str, str, str]:
    """Return the access key ID, region and service that a request is signed for: "", "", "" if it is not."""
    credential = authorization.partition("Credential=")[2].partition(",")[0].strip()
    key, _, scope = credential.partition("/")
    parts = scope.split("/")
    return (key, parts[1], SERVICES.get(parts[2], "")) if len(parts) == 4 else ("", "", "")


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


async def _read_body(receive: Any) -> bytes:
    parts = []
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ConnectionError("the client hung up in mid-request")
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return b"".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def show_environment(misc: Path) -> int:
    """Print, for a shell, what points boto3 or the AWS CLI at the server in `misc`; return the exit status."""
    local = find(misc / "local")
    if not local:
        print(f"no embedded AWS IoT runs in {misc / 'local'}", file=sys.stderr)  # noqa: T201
        print("what to do: start one with `elf.py --local create`, or name its misc/ with --misc-dir", file=sys.stderr)  # noqa: T201
        return 1
    region = "us-west-2"
    with contextlib.suppress(OSError, ValueError, KeyError):  # before the fleet's first thing
        region = json.loads((misc / "elf.json").read_text(encoding="utf-8"))["fleet"]["region"]
    variables = {
        "AWS_ENDPOINT_URL": local.url,
        "AWS_ACCESS_KEY_ID": local.token,
        "AWS_SECRET_ACCESS_KEY": ROOT_KEY,
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,  # which boto3 reads
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")  # noqa: T201
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="The embedded AWS IoT of `elf.py --local`.")
    parser.add_argument("command", choices=("env", "serve"), help="env: print what points other tools at it")
    parser.add_argument("--misc-dir", default=os.environ.get("ELF_MISC_DIR") or HERE / "misc", help="as of elf.py")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command == "serve":
        serve(options.directory)
        return 0
    return show_environment(Path(options.misc_dir).expanduser().absolute())


if __name__ == "__main__":
    sys.exit(main())
