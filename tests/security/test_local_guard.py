"""Nobody but its owner gets into the embedded AWS IoT, and nothing that others do or leave there is run."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.aws import REGION
from support.embedded import address_of, boto3_client_of, things_in_embedded_aws
from support.machine import PATIENCE_S, await_end, kill_servers_of, servers_of
from support.program import ELF, copy_program
from support.shell import Elf

pytestmark = pytest.mark.xdist_group("guard")  # they share a fleet

ONCE = ("--duration", "0.01")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADER = "X-ELF-Token"


def ask(elf: Elf, method: str, path: str, headers: dict[str, str] | None = None, body: str = "") -> tuple[int, Any]:
    """Send a request to the embedded AWS IoT's HTTP port; return the status and the headers of its answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", address_of(elf)["http"], timeout=10)) as connection:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        answer.read()
        return answer.status, {name.lower() for name, _ in answer.getheaders()}


def signed_for(service: str, key: str = "test") -> str:
    scope = f"{key}/20261125/{REGION}/{service}/aws4_request"
    return f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"


@pytest.fixture(scope="module")
def _started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elf]:
    user = Elf(tmp_path_factory.mktemp("guarded"), {})
    try:
        user("--local", "create", 2)
        user("send", *ONCE)
        yield user
    finally:
        kill_servers_of(user)


@pytest.fixture
def started(_started: Elf) -> Iterator[Elf]:
    """A fleet of two things on an embedded AWS IoT, in which nobody changes anything."""
    yield _started
    assert things_in_embedded_aws(_started) == ["thing_0", "thing_1"]


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/things", {}),
        ("GET", "/things", {"Authorization": signed_for("iot")}),
        ("GET", "/things", {"Authorization": signed_for("iot"), HEADER: "0" * 64}),
        ("DELETE", "/things/thing_0", {"Authorization": signed_for("iot", "0" * 64)}),
        ("OPTIONS", "/things", {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}),
        ("POST", "/_ministack/reset", {}),
        ("GET", "/_ministack/health", {}),
        ("POST", "/_elf/save", {"X-ELF-Proof": "0:0"}),
        ("POST", "/_elf/ready", {"X-ELF-Proof": "é"}),
    ],
)
def test_without_the_token_nothing_is_answered(started: Elf, method: str, path: str, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    status, answered = ask(started, method, path, encoded)  # type: ignore[arg-type]
    assert status == 403
    assert not {name for name in answered if name.startswith("access-control-")}


FUNCTION = json.dumps({"FunctionName": "f", "Role": "arn:aws:iam::000000000000:role/r", "Handler": "h", "Code": {}})


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("/2015-03-31/functions", {"Authorization": signed_for("lambda")}, FUNCTION),
        ("/2015-03-31/functions", {"Authorization": signed_for("iot")}, FUNCTION),
        ("/2015-03-31/functions", {"Host": f"lambda.{REGION}.amazonaws.com"}, FUNCTION),
        ("/", {"Authorization": signed_for("iot"), "X-Amz-Target": "AWSStepFunctions.CreateStateMachine"}, "{}"),
        ("/?Action=CreateUser&UserName=u", {"Authorization": signed_for("iot")}, ""),
        ("/bucket", {"Authorization": signed_for("s3")}, ""),
        ("/_ministack/reset", {"Authorization": signed_for("iot")}, ""),
        ("/_ministack/config", {"Authorization": signed_for("iot")}, "{}"),
        ("//_ministack/reset", {"Authorization": signed_for("iot")}, ""),
        ("/%5fministack/reset", {"Authorization": signed_for("iot")}, ""),
        ("/iceberg/v1/config", {"Authorization": signed_for("iot")}, ""),
    ],
)
def test_its_owner_reaches_aws_iot_and_nothing_else(
    started: Elf, path: str, headers: dict[str, str], body: str
) -> None:
    status, _ = ask(started, "POST", path, {HEADER: address_of(started)["token"], **headers}, body)
    assert status == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": f"lambda.{REGION}.amazonaws.com"},
        {"Host": "f.lambda-url.us-east-1.localhost", "X-Amz-Target": "AWSLambda.CreateFunction"},
        {"Host": "bucket.s3.amazonaws.com", "X-Amz-Request-Route": "r"},
    ],
)
def test_a_request_that_hints_at_another_service_is_still_aws_iots(started: Elf, headers: dict[str, str]) -> None:
    token = {HEADER: address_of(started)["token"], "Authorization": signed_for("iot")}
    status, answered = ask(started, "GET", "/things?Action=ListUsers", {**token, **headers})
    assert status == 200
    assert not {name for name in answered if name.startswith("access-control-")}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_gets_nowhere(started: Elf) -> None:
    address = address_of(started)
    asks = f"""
import boto3, os, pathlib, urllib.request
os.setgid(65534); os.setgroups([]); os.setuid(65534)
for path in pathlib.Path({str(started.misc)!r}), pathlib.Path({str(started.misc / "local" / "address.json")!r}):
    try:
        path.read_text() if path.suffix else list(path.iterdir()); print("read", path)
    except PermissionError:
        print("shut")
for service, call in ("lambda", "list_functions"), ("iam", "list_users"), ("iot", "list_things"):
    client = boto3.client(service, "{REGION}", endpoint_url="http://127.0.0.1:{address["http"]}",
                          aws_access_key_id="test", aws_secret_access_key="test")
    try:
        getattr(client, call)(); print("got in")
    except Exception as error:
        print("shut")
"""
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["shut"] * 5


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_page_of_another_origin_gets_nowhere(started: Elf, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    url = f"http://127.0.0.1:{address_of(started)['http']}"
    attempts = """async url => {
        const authorization = "AWS4-HMAC-SHA256 Credential=test/1/us-west-2/iot/aws4_request";
        const get = (path, options) => fetch(url + path, options).then(r => r.status, () => "shut");
        const socket = new Promise(done => {
            const it = new WebSocket(url.replace("http", "ws") + "/mqtt", ["mqtt"]);
            it.onopen = () => done("open"); it.onerror = () => done("shut");
        });
        await fetch(url + "/_ministack/reset", {method: "POST", mode: "no-cors"});
        return [
            await get("/things", {headers: {authorization}}),
            await get("/things"),
            await get("/2015-03-31/functions", {method: "POST", body: "{}"}),
            await socket,
        ];
    }"""
    (tmp_path / "page.html").write_text("<p>elsewhere")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate(attempts, url) == ["shut"] * 4
        browser.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_device_without_a_certificate_gets_nowhere(started: Elf, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=str(started.misc / "local" / "ca.pem"))
    context.minimum_version = context.maximum_version = version
    connect = b"\x10\x0f\x00\x04MQTT\x04\x02\x00\x3c\x00\x03any"
    answer = b""
    plain = socket.create_connection(("127.0.0.1", address_of(started)["mqtt"]), timeout=PATIENCE_S)
    with contextlib.suppress(ssl.SSLError, ConnectionError), plain:
        device = context.wrap_socket(plain, server_hostname="localhost")
        device.sendall(connect)
        answer = device.recv(4)
    assert answer == b""  # and no CONNACK


def test_mqtt_over_a_websocket_is_refused(started: Elf) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": "mqtt"}
    host = {"Host": f"data-ats.iot.{REGION}.localhost", HEADER: address_of(started)["token"]}
    status, _ = ask(started, "GET", "/mqtt", {**upgrade, **key, **host})
    assert status == 403


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_only_its_owner_can_read_the_token(started: Elf) -> None:
    assert stat.S_IMODE((started.misc / "local").stat().st_mode) == 0o700
    assert stat.S_IMODE((started.misc / "local" / "address.json").stat().st_mode) == 0o600


def test_a_token_is_worth_nothing_after_a_restart(local: Elf) -> None:
    local("--local", "create")
    old = address_of(local)["token"]
    (server,) = servers_of(local)
    server.kill()
    await_end(server)
    local("create", 2)
    with pytest.raises(Exception, match="AccessDenied"):
        boto3_client_of(local, "iot", old).list_things()


def says_nothing(connection: socket.socket) -> None:
    connection.recv(1)  # until the command hangs up


def drips(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def floods(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


@pytest.mark.sample(2)
@pytest.mark.parametrize("behaves", [says_nothing, drips, floods])
@pytest.mark.parametrize("locked", [False, True], ids=["dead", "alive"])
def test_another_program_on_its_port_learns_no_token_and_holds_no_command_up(
    local: Elf, behaves: Callable[[socket.socket], None], locked: bool
) -> None:
    """`alive`: as if it had got the port in the moment before the server wrote where it listens now."""
    local("--local", "create")
    (server,) = servers_of(local)
    address = local.misc / "local" / "address.json"
    remembered = json.loads(address.read_text())
    heard: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def meet(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:  # the command hangs up
            heard.append(connection.recv(65536))
            behaves(connection)

    def impersonate() -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                threading.Thread(target=meet, args=listener.accept()[:1], daemon=True).start()

    server.kill()
    await_end(server)
    remembered["http"] = listener.getsockname()[1]
    address.write_text(json.dumps(remembered))
    threading.Thread(target=impersonate, daemon=True).start()
    with (local.misc / "local" / "lock").open("r+") as lock:
        if locked:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
            window = local.start("send", *ONCE)
            with pytest.raises(subprocess.TimeoutExpired):
                window.process.wait(4)
            window.signal(signal.SIGINT)
            window.end(130)
            assert heard
        else:
            local("send", *ONCE)
    assert not [said for said in heard if remembered["token"].encode() in said]
    listener.close()


def test_it_finds_packages_where_the_command_does_and_none_in_its_directory(local: Elf, tmp_path: Path) -> None:
    packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    local.python = os.path.realpath(sys.executable)  # which has none of them
    local.environment["PYTHONPATH"] = str(packages)
    poisoned = local.misc / "local"
    poisoned.mkdir(parents=True, mode=0o700)
    local.misc.chmod(0o700)
    (poisoned / "ministack.log").touch(mode=0o600)  # an earlier server's
    for directory in (poisoned, local.cwd):
        for name in ("asyncio", "ssl", "json", "ministack", "hypercorn", "sitecustomize"):
            (directory / f"{name}.py").write_text(f"open({str(tmp_path / 'poisoned')!r}, 'w')")
    local("--local", "create")
    local("send", *ONCE)
    assert not (tmp_path / "poisoned").exists()
    assert things_in_embedded_aws(local) == ["thing_0"]


def test_it_imports_nothing_from_where_a_program_works(local: Elf, tmp_path: Path) -> None:
    """Locust puts the working directory on its sys.path as an absolute path."""
    for name in ("asyncio", "ssl", "json", "ministack", "hypercorn", "sitecustomize"):
        (local.cwd / f"{name}.py").write_text(f"open({str(tmp_path / 'poisoned')!r}, 'w')")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, sys; from iot_elf import local_aws; sys.path.insert(0, os.getcwd()); "
        f"local_aws.find_or_start(pathlib.Path({str(local.misc / 'local')!r}), lambda: None, print)"
    )
    environment = local.environment | {"PYTHONPATH": str(ELF.parent)}
    subprocess.run([local.python, program], cwd=local.cwd, env=environment, check=True)
    assert not (tmp_path / "poisoned").exists()
    assert len(servers_of(local)) == 1


def test_it_starts_from_anywhere_and_its_package_hides_no_other(local: Elf, tmp_path: Path) -> None:
    """A module of iot_elf/ may have the name of one that the server imports."""
    clone = copy_program(tmp_path / "clone").parent
    for name in ("asyncio", "ssl", "ministack", "hypercorn"):
        (clone / "iot_elf" / f"{name}.py").write_text("raise SystemExit('this is another module')")
    local.script = local.cwd / "elf"
    local.script.symlink_to(clone / "elf.py")
    local("--local", "create")
    local("send", *ONCE)
    assert things_in_embedded_aws(local) == ["thing_0"]
    local("clean")
    assert servers_of(local) == []
