# SPDX-License-Identifier: Apache-2.0
"""The embedded AWS IoT of `elf.py --local`: only MiniStack's AWS IoT, and only for its owner.

A command asks find_or_start() for its address. That starts this module as a program: serve() runs in the background
until its directory, misc/local/, is gone:

    lock           locked while the server runs: it shows whether the server is alive, whatever uses its ports
    address.json   its ports and its token, written once it listens; without that file it ends
    ca.pem         the root certificate of its MQTT broker
    state/         the things, certificates and policies, as MiniStack saves them
    ministack.log  the server's log

Other users and web pages can reach loopback too. So an HTTP request needs the token, and a device its certificate; and
only MiniStack's AWS IoT can be reached: no Lambda, no IAM, nothing that could run code.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import hmac
import json
import os
import secrets
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qs

ROOT = Path(__file__).resolve().parent.parent  # which has iot_elf/
ADDRESS = "address.json"
LOCK = "lock"
LOG = "ministack.log"
PACKAGES = ("ministack", "hypercorn", "cryptography")
UV_SCRIPT = ROOT / "iot_elf" / "embedded" / "environment.py"  # whose environment uv makes for the server

TOKEN_HEADER = "X-ELF-Token"  # noqa: S105 - its name
PROOF_HEADER = "X-ELF-Proof"
ROOT_KEY = "test"  # MiniStack's name for the owner of the account
# The services, by their name in signatures; botocore knows the paths of each.
SERVICES = {"iot": "iot", "iotdata": "iot-data", "iotdevicegateway": "iot-data"}

START_S = 60.0  # usually one second; more with a cold disk, or after sleep
ANSWER_S = 2.0
SAVE_S = 10.0
SERVER_STOP_S = 5.0
ENDING_S = 1.0
LOOK_S = 0.05
MAX_ANSWER_BYTES = 4096  # of the server's answers below, and of address.json
MAX_LOG_BYTES = 10 * 1024 * 1024


class LocalAwsError(Exception):
    """A failure: its name, and a cause and a remedy, of a line each."""

    def __init__(self, name: str, cause: str, remedy: str = "") -> None:
        """Without a remedy, the remedy is to install requirements-local.txt."""
        super().__init__(name, cause, remedy)
        self.name = name
        self.cause = cause
        self.remedy = remedy


class LocalAws(NamedTuple):
    """A running server: its ports on 127.0.0.1, and what requests need."""

    http_port: int
    mqtt_port: int
    token: str  # new at each start, so that one sent to a dead server's port is worthless
    root_cert: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def headers(self) -> dict[str, str]:
        """What every HTTP request needs."""
        return {TOKEN_HEADER: self.token}

    @property
    def environment(self) -> dict[str, str | None]:
        """The variables that point boto3 and the AWS CLI at it, without the region's; None: not set."""
        others = "AWS_PROFILE AWS_DEFAULT_PROFILE AWS_SESSION_TOKEN AWS_CREDENTIAL_EXPIRATION AWS_ENDPOINT_URL_IOT"
        others += " AWS_ENDPOINT_URL_IOT_DATA_PLANE AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"
        no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        if not {"*", "127.0.0.1"} & set(no_proxy.split(",")):
            no_proxy = f"{no_proxy},127.0.0.1".lstrip(",")
        return {
            **dict.fromkeys(others.split()),
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.token,
            "AWS_SECRET_ACCESS_KEY": ROOT_KEY,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,  # which is the one that counts if both are set
        }


# ---------------------------------------------------------------------------------------------------------------------
# For commands
# ---------------------------------------------------------------------------------------------------------------------


def find(directory: Path, check: Callable[[], object] = lambda: None) -> LocalAws | None:
    """Find the server of `directory`, if one runs and answers within ANSWER_S."""
    local = _read_address(directory) if is_alive(directory) else None
    return local if local and _ask(local, "ready", ANSWER_S, check) else None


def find_or_start(directory: Path, check: Callable[[], object], say: Callable[[str, Path], object]) -> LocalAws:
    """Find the server of `directory`, or start one with its last state, and wait until it answers, up to START_S.

    `check` is called several times a second, and may raise; `say` is called before a server is started. A server that
    is alive but slow is waited for, never replaced.
    Raises LocalAwsError when MiniStack is not installed, or the server does not start or does not answer.
    """
    started: subprocess.Popen[bytes] | None = None  # it stays, whatever ends this: another command may use it already
    deadline = time.monotonic() + START_S
    while not (local := find(directory, check)):
        if is_alive(directory):
            pass
        elif not started:
            say("starting the embedded AWS IoT in %s", directory)
            started = _start(directory, check, say)
        elif (status := started.poll()) is not None:
            raise LocalAwsError(
                "LocalNotStarted",
                f"the embedded AWS IoT did not start: {_last_line(directory)} (exit status {status})",
                f"see why in {directory / LOG}",
            )
        if time.monotonic() > deadline:
            raise LocalAwsError(
                "LocalUnanswered",
                f"the embedded AWS IoT did not answer within {START_S:g} s",
                f"see why in {directory / LOG}, and kill its process if it is still running",
            )
        check()
        time.sleep(LOOK_S)
    return local


def is_alive(directory: Path) -> bool:
    """Return whether a server is running for `directory`, ready or not."""
    try:
        with open(directory / LOCK, "r+b", opener=_open_private) as file:
            return not _lock(file)
    except (FileNotFoundError, NotADirectoryError):
        return False


def has_ended(directory: Path) -> bool:
    """Return whether the server has ended. The system closes a dead one's connections before it releases its lock."""
    deadline = time.monotonic() + ENDING_S
    while is_alive(directory):
        if find(directory) or time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def save(local: LocalAws, say: Callable[[str], object]) -> None:
    """Make the server save its state, so that what a command made survives kill -9; if that fails, `say` so."""
    if not _ask(local, "save", SAVE_S):
        say("the embedded AWS IoT did not confirm that it saved its state: recent changes are lost if it is killed")


def stop(directory: Path, say: Callable[[str, Path], object]) -> None:
    """Stop the server of `directory`, if one is running, and remove the directory; if it does not end, `say` so.

    Then (if it is suspended, for example) the directory stays: without its lock, the next command would start a second.
    """
    deadline = time.monotonic() + SERVER_STOP_S
    while True:
        (directory / ADDRESS).unlink(missing_ok=True)  # which tells it to end; one that has just started writes it late
        if not is_alive(directory):
            break
        if time.monotonic() > deadline:
            say(
                "the embedded AWS IoT (`python -m iot_elf.local_aws %s`) does not stop: kill it, then clean again",
                directory,
            )
            return
        time.sleep(LOOK_S)
    shutil.rmtree(directory, ignore_errors=True)


def _start(directory: Path, check: Callable[[], object], say: Callable[[str, Path], object]) -> subprocess.Popen[bytes]:
    import importlib.util

    python, path = sys.executable, _import_path()
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        if not os.environ.get("UV"):  # which `uv run` sets
            names = ", ".join(missing)
            raise LocalAwsError("LocalPackagesMissing", f"--local needs MiniStack; missing Python packages: {names}")
        python, path = _python_of_uv(check, say), [str(ROOT)]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_owner(directory.parent)
    with open(directory / LOG, "ab", opener=_open_private) as logfile:
        logfile.truncate(0)
        return subprocess.Popen(
            [python, "-m", "iot_elf.local_aws", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=logfile,
            stderr=subprocess.STDOUT,
            cwd=ROOT,  # from which Python 3.10 imports first; serve() leaves it
            env=_environment(directory, path),
            start_new_session=True,  # the terminal's Ctrl-C is not for it
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def _python_of_uv(check: Callable[[], object], say: Callable[[str, Path], object]) -> str:
    """Return the Python of an environment of uv's that has the packages; `say` so if uv has to install them first."""
    sync = ("sync", "--quiet", "--script", str(UV_SCRIPT))
    try:
        _uv(*sync, "--offline", "--check")
    except LocalAwsError:
        say("installing the packages of the embedded AWS IoT with uv, as %s says", UV_SCRIPT)
        try:
            _uv(*sync)
        except LocalAwsError:
            check()  # Ctrl-C ends uv, too
            raise
    return _uv("python", "find", "--script", str(UV_SCRIPT))


def _uv(*arguments: str) -> str:
    """Run uv; return the line that it prints. Raises LocalAwsError if it fails."""
    try:
        done = subprocess.run(
            [os.environ["UV"], *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).split("\n")
        reason = next((line.strip() for line in lines if line.strip()), "it says nothing")
        raise LocalAwsError(
            "LocalPackagesMissing",
            f"uv can't install what --local needs: {reason}",
            f"see `uv sync --script {UV_SCRIPT}`; it needs a network the first time",
        ) from error
    return done.stdout.strip()


def _refuse_owner(directory: Path) -> None:
    """Raise LocalAwsError if root would run the server where another user could replace what it reads and writes."""
    owner = directory.stat().st_uid
    if hasattr(os, "geteuid") and os.geteuid() == 0 != owner:
        raise LocalAwsError(
            "DirectoryOfOthers",
            f"{directory} belongs to user {owner}, who can change it while root uses it",
            "run the command as that user, or use another directory with --misc-dir",
        )


def _environment(directory: Path, import_path: Sequence[str]) -> dict[str, str]:
    """Return the environment for MiniStack, without the user's AWS, Docker and Python settings."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "DOCKER_", "PYTHON"))}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(import_path),
        "PYTHONSAFEPATH": "1",
        "AUTH": "true",  # enforces IoT policies, as AWS does
        "PERSIST_STATE": "1",
        "STATE_DIR": "state",
        "TMPDIR": str(directory),
    }


def _import_path() -> list[str]:
    """Return the server's import path: this process's, which may include PYTHONPATH or the user's site-packages.

    It leaves out the working directory and the script's, to which others may be able to write (Python puts one of them
    first, Locust the other), unless the packages are only there. The directory with iot_elf/ comes last.
    """
    from importlib.machinery import PathFinder

    entries = [str(Path(entry).absolute()) for entry in sys.path if entry]
    work = {str(ROOT), str(Path(sys.argv[0]).resolve().parent)}
    with contextlib.suppress(OSError):  # it was removed
        work.add(str(Path.cwd()))
    trusted = [entry for entry in entries if str(Path(entry).resolve()) not in work]
    return [*(trusted if all(PathFinder.find_spec(name, trusted) for name in PACKAGES) else entries), str(ROOT)]


def _ask(local: LocalAws, question: str, patience_s: float, check: Callable[[], object] = lambda: None) -> bool:
    """Ask the server "ready" or "save"; return whether it answered, and proved to be the server.

    Both sides prove that they know the token without sending it: if the server has ended and another program listens
    on its port, that one learns nothing, and can cost no more than `patience_s` and MAX_ANSWER_BYTES.
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
    """Return the proof of the token for one question and one port, so that an answer can't be relayed from another."""
    return hmac.new(local.token.encode(), f"{who} {local.http_port} {nonce}".encode(), "sha256").hexdigest()


def _read_address(directory: Path) -> LocalAws | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        address = json.loads(_read(directory / ADDRESS, MAX_ANSWER_BYTES))
        ports = int(address["http"]), int(address["mqtt"])
        if all(0 < port < 2**16 for port in ports):
            return LocalAws(*ports, str(address["token"]), directory / "ca.pem")
    return None


def _last_line(directory: Path) -> str:
    lines = _read(directory / LOG, 2 * MAX_LOG_BYTES).decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "its log is empty")


def _read(path: Path, most: int) -> bytes:
    """Read the first `most` bytes of a file. Raises OSError, also if it is not a regular file."""
    with open(path, "rb", opener=_open_private) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read(most)


def _open_private(path: str, flags: int) -> int:
    """Open a file only for its owner, without following a symbolic link or waiting for a pipe's other end.

    A file with another name (a hard link) could be anybody's: OSError.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EMLINK, "the file has another name too (a hard link)", str(path))
    return descriptor


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed or the process ends; return False if another process has locked it."""
    descriptor = file.fileno()
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # a disk without locks, for example
        error.filename = file.name
        raise
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


def serve(directory: Path) -> None:
    """Run the embedded AWS IoT of `directory` until SIGTERM, or until address.json is gone or another server's.

    All paths are relative to the working directory: if that is removed, nothing is created in its place.
    """
    os.umask(0o077)
    os.chdir(directory)
    _raise_limits()
    with open(LOCK, "a+b", opener=_open_private) as file:
        deadline = time.monotonic() + ANSWER_S
        while not _lock(file):  # a command that checks whether this is alive has it for a moment
            if time.monotonic() > deadline:
                sys.exit("another server is running here")
            time.sleep(LOOK_S)
        before = _read_address(Path())
        Path(ADDRESS).unlink(missing_ok=True)  # a dead server's
        http, mqtt = _listen(before.http_port if before else 0), _listen(before.mqtt_port if before else 0)
        os.environ["GATEWAY_PORT"] = str(mqtt.getsockname()[1])  # for the addresses that DescribeEndpoint gives
        asyncio.run(_serve(http, mqtt))


def _raise_limits() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none, and macOS allows less than `hard`
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(port: int) -> socket.socket:
    """Listen on a port of loopback, or on any other if it is in use."""
    for candidate in (port, 0):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", candidate))
    sys.exit("there is no free port on 127.0.0.1")


async def _serve(http: socket.socket, mqtt: socket.socket) -> None:
    from hypercorn.asyncio import serve as serve_http
    from hypercorn.config import Config
    from ministack.core import iam_evaluator
    from ministack.core.persistence import load_state, save_state
    from ministack.services import iot

    iam_evaluator.validate_role_arn = lambda role_arn: None  # of a rule: there is no IAM to make a role in
    saving = threading.Lock()

    def save_now() -> None:
        with saving, contextlib.suppress(RuntimeError):  # it changed during the copy: the next save has it
            save_state("iot", iot.get_state())

    if state := load_state("iot"):
        iot.load_persisted_state(state)
    local = LocalAws(http.getsockname()[1], mqtt.getsockname()[1], secrets.token_hex(32), Path("ca.pem"))
    _write_private("ca.pem", iot.get_ca_cert_pem())
    context: ssl.SSLContext = iot._mtls_build_ssl_context()
    context.verify_mode = ssl.CERT_REQUIRED  # MiniStack also accepts clients without a certificate
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
    """Save the state after any work, over HTTP or MQTT, which shows in the processor time.

    MiniStack saves only at a clean end, and would lose everything in a crash.
    """
    worked = 0.0
    while True:
        await asyncio.sleep(0.2)
        began = time.process_time()
        if began - worked > 0.01:
            await asyncio.to_thread(save_now)
            worked = time.process_time()
            await asyncio.sleep(10 * (worked - began))  # so that it takes at most a tenth of the time


async def _end_with_address(mine: str) -> None:
    """End the process when its address file is gone or another server's: its state is not needed. Limit its log."""
    while True:
        await asyncio.sleep(0.2)
        limit_log(1)
        try:
            if _read(Path(ADDRESS), MAX_ANSWER_BYTES) != mine.encode("ascii"):
                os._exit(0)
        except OSError as error:  # others, such as too many open files, are no reason to end
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                os._exit(0)


def limit_log(descriptor: int) -> None:
    """Begin a log anew, which is written to by appending, if it has become too large."""
    with contextlib.suppress(OSError):
        if os.fstat(descriptor).st_size > MAX_LOG_BYTES:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, b"the log was too large: what came before is gone\n")


def _write_private(name: str, text: str) -> None:
    """Replace a file in the working directory in one step (it is never half written), readable only by its owner."""
    descriptor, temporary = tempfile.mkstemp(dir=".", prefix=f".{name}.")  # which makes it 0600
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    Path(temporary).replace(name)


class Gate:
    """The HTTP server's application (ASGI): it passes only requests with the token to AWS IoT.

    It calls MiniStack's handlers of AWS IoT and its data plane directly, not through MiniStack's router, which chooses
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
        if scope["type"] != "http":  # MQTT over WebSocket needs no certificate
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
            denied = {"__type": "AccessDeniedException", "message": "only its owner can use this: see `elf.py env`"}
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
    """Return the access key ID, region and service of a request's signature, or three empty strings."""
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
            raise ConnectionError("the client closed the connection during the request")
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return b"".join(parts)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
