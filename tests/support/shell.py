"""What the tests stand on: a user at a shell, the AWS that ELF talks to, and an MQTT client that is not ELF's."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import pty
import queue
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import boto3
import paho.mqtt.client as mqtt
import psutil  # type: ignore[import-untyped]
import pyte
from botocore.config import Config
from paho.mqtt.enums import CallbackAPIVersion

from support.program import ELF

WITNESS = Path(__file__).with_name("witness")
PATIENCE_S = 30.0  # how long a test waits for what is to come; it fails afterwards
REGION = "us-west-2"
SECRET = "NotASecretButNobodyElseSaysThis0123456789"
SESSION_TOKEN = "NotATokenButNobodyElseSaysThisEither9876543210"
END = "end-of-test"
ANYTHING = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "iot:*", "Resource": "*"}],
}

Limits = Callable[..., None]  # limits(CONNECT_TIMEOUT_S=0.5): other constants of the program, until the test ends

# What this machine has configured is none of a test's business.
for _name in list(os.environ):
    if _name.upper().startswith(("AWS_", "ELF_")) or _name.upper().endswith("_PROXY"):
        del os.environ[_name]
os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}

_session = boto3.Session()
_accounts = itertools.count(100000000001)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def await_listener(port: int) -> None:
    """Wait until somebody listens on a port of this machine."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection(("localhost", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nobody listens on port {port}"
            time.sleep(0.05)  # there is no event to wait for


class AwsService(NamedTuple):
    """A MiniStack that ELF did not start: somewhere else, as far as ELF is concerned."""

    url: str
    mqtt_port: int
    root_cert: Path


# MiniStack's MQTT broker binds every interface; this machine's loopback is enough for tests. An RSA key takes it longer
# than all else: the third to the tenth, so not those of its root and broker, are used again. Certificates are all new.
_LAUNCHER = """
import asyncio, socket, sys
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
generate, keys = rsa.generate_private_key, []
def generate_or_reuse(**options):
    keys.append(generate(**options) if len(keys) < 10 else keys[-8])
    return keys[-1]
rsa.generate_private_key = generate_or_reuse
load = serialization.load_pem_private_key  # its CA's, for each certificate
serialization.load_pem_private_key = lambda *key, **options: load(*key, **options, unsafe_skip_rsa_key_validation=True)
bind = socket.socket.bind
loopback = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
socket.socket.bind = lambda self, to: bind(self, (loopback[self.family], *to[1:]) if self.family in loopback else to)
if sys.version_info < (3, 12):  # else a paused connection reads, and the broker loses a client's first words
    from asyncio.selector_events import _SelectorSocketTransport as transport
    add_reader = transport._add_reader
    transport._add_reader = lambda self, *to: add_reader(self, *to) if self.is_reading() else None
from hypercorn.asyncio import serve
from hypercorn.config import Config
from ministack.app import app
config = Config()
config.bind = ["127.0.0.1:" + sys.argv[1]]
asyncio.run(serve(app, config))
"""


@contextlib.contextmanager
def aws_service(directory: Path) -> Iterator[AwsService]:
    """Run a MiniStack in which policies are enforced, until the block ends.

    Its root credentials are any 12-digit number, which is the account, with SECRET.
    """
    http_port, mqtt_port = free_port(), free_port()
    environment = clean_environment(directory) | {
        "GATEWAY_PORT": str(http_port),
        "IOT_MTLS_PORT": str(mqtt_port),
        "MINISTACK_REGION": REGION,
        "BIND_HOST": "127.0.0.1",
        "AUTH": "true",
        "TMPDIR": str(directory),
        "STATE_DIR": str(directory / "state"),
        "S3_DATA_DIR": str(directory / "s3"),
        "DOCKER_HOST": "unix:///nonexistent",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": SESSION_TOKEN,
    }
    log = directory / "ministack.log"
    with log.open("wb") as logfile:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, str(http_port)],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=logfile,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in a test is not for it
        )
    try:
        url = f"http://127.0.0.1:{http_port}"
        deadline = time.monotonic() + PATIENCE_S
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"MiniStack does not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)  # there is no event to wait for
        root_cert = directory / "ca.pem"
        root_cert.write_bytes(_get(f"{url}/_ministack/iot/ca.pem"))
        yield AwsService(url, mqtt_port, root_cert)
    finally:
        process.kill()
        process.wait()


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as response:
        return bytes(response.read())


def _is_ready(url: str) -> bool:
    try:
        return bool(json.loads(_get(f"{url}/_ministack/ready"))["iot_mtls"] == "listening")
    except (OSError, ValueError, KeyError):
        return False


def clean_environment(home: Path) -> dict[str, str]:
    """The environment of a user who has configured nothing."""
    kept = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if key in os.environ}
    return kept | {"HOME": str(home), "LANG": "C.UTF-8", "AWS_EC2_METADATA_DISABLED": "true"}


class Account:
    """A new and empty AWS account, asked through boto3 as its owner."""

    def __init__(self, service: AwsService) -> None:
        self.service = service
        self.id = str(next(_accounts))
        self.iot = self.client("iot")

    def client(self, name: str, region: str = REGION) -> Any:
        return _session.client(
            name,
            region_name=region,
            endpoint_url=self.service.url,
            aws_access_key_id=self.id,
            aws_secret_access_key=SECRET,
            config=Config(proxies={}),
        )

    @property
    def credentials(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.id, "AWS_SECRET_ACCESS_KEY": SECRET}

    def user(self, policy: Mapping[str, Any]) -> dict[str, str]:
        """Make an IAM user who has just this policy; return the user's credentials."""
        iam = self.client("iam")
        name = f"user-{time.monotonic_ns()}"
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="it", PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def things(self, region: str = REGION) -> list[str]:
        iot = self.iot if region == REGION else self.client("iot", region)
        return sorted(thing["thingName"] for thing in _pages(iot, "list_things", "things"))

    def certificates(self) -> dict[str, str]:
        """The status of each certificate, by its ID."""
        pages = _pages(self.iot, "list_certificates", "certificates")
        return {certificate["certificateId"]: certificate["status"] for certificate in pages}

    def policies(self) -> list[str]:
        return sorted(policy["policyName"] for policy in _pages(self.iot, "list_policies", "policies"))

    def certificate_of(self, thing: str) -> str:
        """The ID of the one certificate attached to a thing."""
        (arn,) = self.iot.list_thing_principals(thingName=thing)["principals"]
        return str(arn).rpartition("/")[2]

    def policies_of(self, thing: str) -> list[str]:
        (arn,) = self.iot.list_thing_principals(thingName=thing)["principals"]
        return sorted(policy["policyName"] for policy in self.iot.list_attached_policies(target=arn)["policies"])

    def edit_policy(self, name: str, edit: Callable[[list[dict[str, Any]]], object]) -> None:
        """Edit a policy's statements, as somebody does in AWS's console: that makes another version of it."""
        document = json.loads(self.iot.get_policy(policyName=name)["policyDocument"])
        edit(document["Statement"])
        self.iot.create_policy_version(policyName=name, policyDocument=json.dumps(document), setAsDefault=True)

    def is_empty(self) -> bool:
        return not (self.things() or self.certificates() or self.policies())

    def snapshot(self) -> tuple[list[str], dict[str, str], list[str]]:
        return self.things(), self.certificates(), self.policies()

    def shadow(self, thing: str) -> Any:
        return json.loads(self.client("iot-data").get_thing_shadow(thingName=thing)["payload"].read())


def _pages(iot: Any, operation: str, key: str) -> list[Any]:
    return [item for page in iot.get_paginator(operation).paginate() for item in page[key]]


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What was logged, without the time."""
        return [line.partition(" - ")[2] for line in self.err.splitlines()]

    @property
    def received(self) -> list[tuple[str, str]]:
        """The topic and payload of each message that `subscribe` logged."""
        found = (re.fullmatch(r"Received message: (.*) from topic: (\S+) by \S+", line) for line in self.lines)
        return [(match[2], match[1]) for match in found if match]


class Terminal(NamedTuple):
    """A terminal in which a command has run."""

    status: int
    written: str  # with all that moves the cursor and colours
    columns: int

    @property
    def seen(self) -> list[str]:
        """What it shows in the end, and what has scrolled away."""
        screen = pyte.HistoryScreen(self.columns, 24, history=10_000)
        pyte.Stream(screen).feed(self.written)
        gone = ["".join(row[column].data for column in range(self.columns)) for row in screen.history.top]
        return [line.rstrip() for line in (*gone, *screen.display) if line.strip()]

    @property
    def drawn(self) -> list[str]:
        """All that was ever written between two returns of the cursor."""
        return [text for text in re.split(r"[\r\n]+", self.written) if text.strip()]


class Running:
    """A command in a window of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.out = ""  # once it has ended, the standard output
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_output)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _read_output(self) -> None:
        if self.process.stdout:
            with self.process.stdout:
                self.out = self.process.stdout.read()

    def await_line(self, pattern: str) -> str:
        """Wait until a line of the standard error matches."""

        def found() -> str | None:
            return next((line for line in self._lines if re.search(pattern, line)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, PATIENCE_S)
            line = found()
        assert line, f"no line like {pattern!r} in:\n{''.join(self._lines)}"
        return line

    def count(self, text: str) -> int:
        """Count the lines of the standard error that have come and contain a text."""
        with self._news:
            return sum(text in line for line in self._lines)

    def await_count(self, text: str, number: int) -> None:
        """Wait until that many lines contain a text."""
        with self._news:
            assert self._news.wait_for(lambda: sum(text in line for line in self._lines) >= number, PATIENCE_S)

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def end(self, status: int = 0) -> Result:
        """Wait until it ends, with `status`."""
        self.process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        result = Result(self.process.returncode, self.out, "".join(self._lines))
        assert result.status == status, f"exit status {result.status}, not {status}:\n{result.err}"
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        assert self.process.stderr
        self.process.stderr.close()


class Elf:
    """A user of elf.py: a shell in some directory, an environment, and a misc/ that nobody else uses."""

    def __init__(self, directory: Path, environment: Mapping[str, str], service: AwsService | None = None) -> None:
        self.script = ELF
        self.python = sys.executable
        self.misc = directory / "misc"
        self.home = directory / "home"
        self.cwd = directory / "elsewhere"
        for each in (self.home, self.cwd):
            each.mkdir(exist_ok=True)
        self.environment = clean_environment(self.home) | {"ELF_MISC_DIR": str(self.misc)} | dict(environment)
        self.broker: tuple[str, ...] = ()
        if service:
            self.broker = ("--mqtt-endpoint", f"localhost:{service.mqtt_port}", "--root-cert", str(service.root_cert))
        self._running: list[Running] = []

    def _command(self, args: tuple[object, ...], environment: Mapping[str, str]) -> dict[str, Any]:
        return {
            "args": [self.python, str(self.script), *map(str, args)],
            "cwd": self.cwd,
            "env": {**self.environment, **environment},
            "stdin": subprocess.DEVNULL,
            "text": True,
            "encoding": "utf-8",
            "errors": "surrogateescape",
        }

    def __call__(
        self,
        *args: object,
        status: int = 0,
        env: Mapping[str, str] | None = None,
        umask: int = -1,
        feed: bytes | None = None,
    ) -> Result:
        """Run a command, with `feed` as its standard input, and make sure of its exit status."""
        command = self._command(args, env or {})
        if feed is not None:
            command["input"] = feed.decode("utf-8", "surrogateescape")
            del command["stdin"]
        done = subprocess.run(**command, capture_output=True, timeout=PATIENCE_S * 2, check=False, umask=umask)
        result = Result(done.returncode, done.stdout, done.stderr)
        assert result.status == status, f"exit status {result.status}, not {status}:\n{result.out}{result.err}"
        return result

    def start(self, *args: object, env: Mapping[str, str] | None = None, **settings: Any) -> Running:
        """Run a command in another window, a process group of its own; `settings` are subprocess.Popen()'s."""
        kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
        process = subprocess.Popen(**{**self._command(args, env or {}), **kept, **settings})
        running = Running(process)
        self._running.append(running)
        return running

    def subscribe(self, *args: object) -> Running:
        """Run `subscribe` in another window, and wait until every thing has subscribed."""
        running = self.start("subscribe", *self.broker, "--duration", "30", *args)
        running.await_line("ELF listening on")
        return running

    def in_terminal(
        self,
        *args: object,
        columns: int = 120,
        env: Mapping[str, str] | None = None,
        script: str = "",
        keys: Mapping[str, bytes] | None = None,
    ) -> Terminal:
        """Run a command to its end in a terminal of its own; or a shell's script with jobs, in which $ELF is ELF.

        When the terminal shows a text that `keys` has, those are typed there. It is left as it was.
        """
        mine, its = pty.openpty()
        before = termios.tcgetattr(mine)
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        command = self._command(args, {"TERM": "xterm-256color", **(env or {})})
        if script:
            command["env"] |= {"ELF": f"{self.python} {self.script}", "BROKER": " ".join(self.broker)}
            command["args"] = ["setsid", "--ctty", "--wait", "bash", "-mc", script]
        process = subprocess.Popen(**{**command, "stdin": its, "stdout": its, "stderr": its, "start_new_session": True})
        os.close(its)
        written, untyped = b"", dict(keys or {})
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(mine, 65536):
                written += chunk
                for text in [text for text in untyped if text.encode() in written]:
                    os.write(mine, untyped.pop(text))
        assert termios.tcgetattr(mine) == before
        os.close(mine)
        return Terminal(process.wait(PATIENCE_S), written.decode("utf-8"), columns)

    def close_windows(self) -> None:
        for running in self._running:
            running.kill()

    def things(self) -> dict[str, dict[str, Any]]:
        """What things.json says of each thing."""
        path = self.misc / "things.json"
        entries = json.loads(path.read_text()) if path.exists() else []
        return {name: recorded for entry in entries for name, recorded in entry.items()}

    def elf_json(self) -> dict[str, Any]:
        return dict(json.loads((self.misc / "elf.json").read_text()))

    def files(self) -> list[str]:
        return sorted(path.name for path in self.misc.iterdir())


class Pair(Elf):
    """A fleet of two things, and the account they are in."""

    account: Account


class InProcess:
    """elf.py as a program that imports it sees it: main(argv) returns the exit status. Quicker than a process."""

    def __init__(self, module: ModuleType, elf: Elf, monkeypatch: Any, capsys: Any) -> None:
        self.module = module
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        for key in list(os.environ):
            if key.startswith("AWS_"):
                monkeypatch.delenv(key)
        self.use(elf.environment)

    def use(self, environment: Mapping[str, str]) -> None:
        for key, value in environment.items():
            self._monkeypatch.setenv(key, value)

    def forget(self, *names: str) -> None:
        for name in names:
            self._monkeypatch.delenv(name)

    def __call__(self, *args: object, status: int = 0) -> Result:
        self._capsys.readouterr()
        result = Result(self.module.main([str(arg) for arg in args]), *self._capsys.readouterr())
        assert result.status == status, f"exit status {result.status}, not {status}:\n{result.out}{result.err}"
        return result


class Heard(NamedTuple):
    topic: str
    payload: bytes
    qos: int


class Client:
    """An MQTT client that is not ELF's, and has a certificate and a key in files."""

    def __init__(self, service: AwsService, certificate: Path, key: Path, client_id: str) -> None:
        self._service = service
        self._heard: queue.Queue[Heard] = queue.Queue()
        self._answers: queue.Queue[Any] = queue.Queue()
        self._mqtt = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, reconnect_on_failure=False)
        self._mqtt.tls_set(str(service.root_cert), str(certificate), str(key))
        self._mqtt.on_connect = lambda client, data, flags, reason, properties: self._answers.put(str(reason))
        self._mqtt.on_disconnect = lambda client, data, flags, reason, properties: self._answers.put(
            f"closed: {reason}"
        )
        self._mqtt.on_subscribe = lambda client, data, mid, reasons, properties: self._answers.put(reasons)
        self._mqtt.on_message = lambda client, data, message: self._heard.put(
            Heard(message.topic, bytes(message.payload), message.qos)
        )

    def connect(self) -> str:
        """Connect; return how the broker answered: "Success", or why not."""
        self._mqtt.connect("localhost", self._service.mqtt_port)
        self._mqtt.loop_start()
        return str(self._answers.get(timeout=PATIENCE_S))

    def subscribe(self, topic_filter: str) -> None:
        self._mqtt.subscribe(topic_filter, qos=1)
        (reason,) = self._answers.get(timeout=PATIENCE_S)
        assert not reason.is_failure

    def publish(self, topic: str, payload: str | bytes, qos: int = 1) -> None:
        self._mqtt.publish(topic, payload, qos).wait_for_publish(PATIENCE_S)

    def hear(self) -> Heard:
        while (heard := self._heard.get(timeout=PATIENCE_S)).topic == END:
            pass
        return heard

    def hear_all(self) -> list[Heard]:
        """Return all that has come until now. Messages come in order: what comes after this one was sent later."""
        token = secrets.token_bytes(8)
        self.publish(END, token)
        heard = list(iter(lambda: self._heard.get(timeout=PATIENCE_S), Heard(END, token, 1)))
        return [message for message in heard if message.topic != END]

    def close(self) -> None:
        self._mqtt.disconnect()
        self._mqtt.loop_stop()


def client_of(elf: Elf, service: AwsService, thing: str, client_id: str) -> Client:
    """Make an MQTT client that uses the files of a thing."""
    return Client(service, elf.misc / f"{thing}.pem", elf.misc / f"{thing}.prv", client_id)


def servers_of(elf: Elf) -> list[psutil.Process]:
    """The processes that work on a misc/, which are the embedded AWS IoT's."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(elf.misc) in " ".join(process.info["cmdline"] or ())
    ]


def kill_servers_of(elf: Elf) -> None:
    for process in servers_of(elf):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def await_end(process: psutil.Process) -> None:
    """Wait until a process that is not our child has ended, be it reaped or not."""
    deadline = time.monotonic() + PATIENCE_S
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{process} does not end"
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(0.05)


class Relay:
    """A TCP relay to a port of this machine: a network that can break in several ways, and be repaired.

    `arrivals` has the time.monotonic() of each connection that came.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._sockets: list[socket.socket] = []  # of what is connected
        self._changing = threading.Lock()
        self._silent = False
        self.arrivals: list[float] = []
        self._arrived = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._serve()

    def _serve(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                client, _ = listener.accept()
                with self._changing:
                    if listener is not self._listener:  # it went down meanwhile
                        client.close()
                        return
                    with self._arrived:
                        self.arrivals.append(time.monotonic())
                        self._arrived.notify_all()
                    self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        if self._silent:
            self._sockets.append(client)
            return
        try:
            target = socket.create_connection(("127.0.0.1", self._target_port))
        except OSError:
            client.close()
            return
        self._sockets += [client, target]
        for source, sink in ((client, target), (target, client)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is cut
            while data := source.recv(65536):
                if not self._silent:
                    sink.sendall(data)
        if not self._silent:  # else the other end does not hear of this one's end either
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

    def broker(self, service: AwsService) -> tuple[str, ...]:
        """The options by which ELF connects through it."""
        return "--mqtt-endpoint", f"localhost:{self.port}", "--root-cert", str(service.root_cert)

    def await_arrivals(self, number: int) -> None:
        """Wait until so many connections have come."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.arrivals) >= number, PATIENCE_S), self.arrivals

    def cut(self) -> None:
        """Cut what is connected now; new connections are taken."""
        with self._changing:
            self._cut()

    def _cut(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def down(self) -> None:
        """Cut what is connected, and refuse new connections until up()."""
        with self._changing:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # which wakes accept(); close() alone does not
            self._listener.close()
            self._listener = socket.socket()
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(("127.0.0.1", self.port))  # nobody else shall have it; it does not listen yet
            self._cut()

    def up(self) -> None:
        """Take connections on the same port again."""
        self._listener.listen()
        self._serve()

    def silence(self) -> None:
        """Drop all that is sent from now on, in both directions; take new connections, and tell them nothing."""
        with self._changing:
            self._silent = True

    def unsilence(self) -> None:
        """Cut what was silent, which has lost bytes, and relay what connects from now on."""
        with self._changing:
            self._cut()
            self._silent = False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
