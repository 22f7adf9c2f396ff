"""MQTT goes where curl would go: through proxies that nobody here wrote, to a broker that sees what it is asked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.aws import AwsService
from support.failures import Explained
from support.machine import PATIENCE_S, await_listener, free_port
from support.mqtt import Broker
from support.networks import CLOSED_PORT, Impostor, Relay, deaf_port
from support.program import ROOT, Limits
from support.shell import Elf, InProcess, Pair

ONCE = ("--count", "1", "--interval", "0.01")
USER, PASSWORD = "jane", "s3cret-Pass"
LOGIN = "jane:s3cret%2DPass@"
SECRETS = ("s3cret", "jane")
ALPN = "x-amzn-mqtt-ca"  # AWS's, https://docs.aws.amazon.com/iot/latest/developerguide/protocols.html
TINYPROXY = """
Listen 127.0.0.1
Port {port}
Timeout 60
MaxClients 50
ConnectPort 443
{more}
"""

SQUID = """
http_port 127.0.0.1:{port}
auth_param basic program /usr/lib/squid/basic_ncsa_auth {users}
acl login proxy_auth REQUIRED
acl mqtt port 443
http_access deny !login
http_access allow mqtt
http_access deny all
pid_filename none
access_log none
cache_log /dev/null
shutdown_lifetime 0 seconds
"""
USERS = f"{USER}:$apr1$elfelf$NGhUhWxbrrzK2yJaWrRTT/\n"  # openssl passwd -apr1 -salt elfelf s3cret-Pass
DANTE = f"""
logoutput: /dev/null
internal: 127.0.0.1 port = {{port}}
external: lo
clientmethod: none
socksmethod: none
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks block {{ from: 0.0.0.0/0 to: 0.0.0.0/0 port = {CLOSED_PORT} }}
socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
"""


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


pytestmark = [needs("tinyproxy"), needs("microsocks"), pytest.mark.xdist_group("proxies")]


class TlsFront(Impostor):
    """What makes a proxy on this machine one that is reached by TLS."""

    def __init__(self, directory: Path, proxy_port: int) -> None:
        self._proxy_port = proxy_port
        super().__init__(directory)

    def _meet(self, connection: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            self._context.wrap_socket(connection, server_side=True) as client,
            socket.create_connection(("127.0.0.1", self._proxy_port)) as proxy,
        ):
            while True:
                waiting: list[socket.socket] = [client] if client.pending() else []
                for side in waiting or select.select([client, proxy], [], [])[0]:
                    if not (data := side.recv(65536)):
                        return
                    (proxy if side is client else client).sendall(data)


class ByteByByte(Relay):
    """A network that delivers no two bytes at once."""

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            while byte := source.recv(1):
                sink.sendall(byte)
            sink.shutdown(socket.SHUT_RDWR)


class Proxies:
    """The proxies of this machine, each with its port: those that end in _login want a user and a password."""

    def __init__(self, directory: Path) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = Path(tempfile.mkdtemp())
        self._directory.chmod(0o755)  # for the user that squid becomes
        self.http = self._start("tinyproxy", "-d", "-c", file=TINYPROXY.format(port="{port}", more=""))
        login = TINYPROXY.format(port="{port}", more=f"BasicAuth {USER} {PASSWORD}")
        self.http_login = self._start("tinyproxy", "-d", "-c", file=login)
        name = self._file("localhost")
        more = f'Filter "{name}"\nConnectPort {CLOSED_PORT}'
        self.http_filter = self._start("tinyproxy", "-d", "-c", file=TINYPROXY.format(port="{port}", more=more))
        self.squid_login = self._start("squid", "-N", "-f", file=SQUID.format(port="{port}", users=self._file(USERS)))
        self.socks = self._start("microsocks", "-i", "127.0.0.1", "-p", "{port}")
        self.socks_login = self._start("microsocks", "-i", "127.0.0.1", "-p", "{port}", "-u", USER, "-P", PASSWORD)
        self.dante = self._start("danted", "-f", file=DANTE)
        self._front, self._slow = TlsFront(directory, self.http), ByteByByte(self.http_login)
        self.https, self.root_cert, self.slow_login = self._front.port, self._front.root_cert, self._slow.port

    def _file(self, text: str) -> str:
        handle, name = tempfile.mkstemp(dir=self._directory)
        os.write(handle, text.encode())
        os.close(handle)
        Path(name).chmod(0o644)
        return name

    def _start(self, *command: str, file: str = "") -> int:
        """Start a proxy with a port in its arguments or its file, the last argument; 0: it is not installed."""
        if not shutil.which(command[0]):
            return 0
        port, quiet = free_port(), subprocess.DEVNULL
        arguments = [each.replace("{port}", str(port)) for each in command]
        arguments += [self._file(file.replace("{port}", str(port)))] if file else []
        self._processes.append(subprocess.Popen(arguments, stdin=quiet, stdout=quiet, stderr=quiet))
        await_listener(port)
        return port

    def close(self) -> None:
        self._front.close()
        self._slow.close()
        for process in self._processes:
            process.terminate()  # so that squid takes its shared memory away
        for process in self._processes:
            process.wait(PATIENCE_S)
        shutil.rmtree(self._directory)


@pytest.fixture(scope="module")
def proxies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxies]:
    proxies = Proxies(tmp_path_factory.mktemp("proxies"))
    yield proxies
    proxies.close()


class Hearing(Broker):
    """A broker at a port that is AWS's own, which notes the host name and the protocols that TLS is asked for."""

    def __init__(self, directory: Path, port: int) -> None:
        self.names: list[str | None] = []
        super().__init__(directory, port=port)
        self._context.set_alpn_protocols([ALPN])
        self._context.sni_callback = lambda connection, name, context: self.names.append(name)


@pytest.fixture
def broker_at(tmp_path: Path) -> Iterator[Callable[[int], Hearing]]:
    """Run a broker at a port of this machine, that no other test has meanwhile."""
    with contextlib.ExitStack() as stack:

        def run(port: int) -> Hearing:
            lock = stack.enter_context((Path(tempfile.gettempdir()) / f"elf-test-{port}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                broker = Hearing(tmp_path, port)
            except PermissionError:
                pytest.skip(f"port {port} is root's")
            stack.callback(broker.close)
            return broker

        yield run


@pytest.mark.parametrize(
    ("variable", "way", "port"),
    [
        ("HTTPS_PROXY", "http://127.0.0.1:{0.http}", 443),
        ("https_proxy", "127.0.0.1:{0.http}", 443),
        ("ALL_PROXY", f"http://{LOGIN}127.0.0.1:{{0.http_login}}", 443),
        ("HTTPS_PROXY", "https://localhost:{0.https}", 443),
        ("all_proxy", "socks5://127.0.0.1:{0.socks}", 8883),
        ("", f"socks5h://{LOGIN}localhost:{{0.socks_login}}", 8883),
        ("https_proxy", f"{LOGIN}localhost:{{0.slow_login}}", 443),
        pytest.param("HTTPS_PROXY", f"http://{LOGIN}127.0.0.1:{{0.squid_login}}", 443, marks=needs("squid")),
        pytest.param("ALL_PROXY", "socks5h://127.0.0.1:{0.dante}", 8883, marks=needs("danted")),
    ],
)
def test_messages_go_through_the_proxy(
    main_of_pair: InProcess,
    proxies: Proxies,
    broker_at: Callable[[int], Hearing],
    variable: str,
    way: str,
    port: int,
) -> None:
    broker, url = broker_at(port), way.format(proxies)
    if variable:
        main_of_pair.use({variable: url, "SSL_CERT_FILE": str(proxies.root_cert)})
    options = () if variable else ("--proxy", url)
    root_cert = ("--root-cert", broker.root_cert, "--debug", "--output", "json")
    result = main_of_pair("send", *options, "--mqtt-endpoint", "localhost", *root_cert, *ONCE)
    shown = url.replace(LOGIN, "")
    assert f"through the proxy {shown if '://' in shown else f'http://{shown}'}" in result.lines
    assert "2 acknowledged" in result.err
    assert broker.names == ["localhost"] * 2
    assert [peer.protocol for peer in broker.peers] == ([ALPN] * 2 if port == 443 else [None] * 2)
    assert not [secret for secret in SECRETS if secret in result.err + result.out]


USE = "://USER:PASSWORD@127.0.0.1:"


@pytest.mark.parametrize(
    ("way", "failure", "fact"),
    [
        ("http://nobody.invalid:3128", "ProxyUnknown", "HTTPS_PROXY"),
        (f"http://127.0.0.1:{CLOSED_PORT}", "ProxyUnreachable", "Connection refused"),
        (f"socks5://127.0.0.1:{CLOSED_PORT}", "ProxyUnreachable", "Connection refused"),
        ("https://localhost:{0.https}", "ProxyTlsFails", "CERTIFICATE_VERIFY_FAILED"),
        ("http://127.0.0.1:{1}", "ProxyUnanswered", "HTTPS_PROXY"),
        ("http://127.0.0.1:{0.http_login}", "ProxyLoginRefused", f"http{USE}"),
        ("http://jane:w4ong@127.0.0.1:{0.http_login}", "ProxyLoginRefused", f"http{USE}"),
        ("http://j%3Ae:w4ong@127.0.0.1:{0.http_login}", "ProxyLoginInvalid", "HTTPS_PROXY"),
        ("socks5://127.0.0.1:{0.socks_login}", "ProxyLoginRefused", f"socks5{USE}"),
        ("socks5://jane:w4ong@127.0.0.1:{0.socks_login}", "ProxyLoginRefused", f"socks5{USE}"),
        ("http://127.0.0.1:{0.http}", "ProxyForbids", "403"),
        ("http://127.0.0.1:{0.http_filter}", "ProxyForbids", "403 Filtered"),
        ("socks5://127.0.0.1:{0.socks}", "ProxyCantReach", "--mqtt-endpoint"),
        ("http://127.0.0.1:{0.socks}", "NotAProxy", "HTTPS_PROXY"),
        *(
            pytest.param(way, failure, fact, marks=needs(program))
            for program, way, failure, fact in (
                ("squid", "http://127.0.0.1:{0.squid_login}", "ProxyLoginRefused", "407"),
                ("squid", "http://jane:w4ong@127.0.0.1:{0.squid_login}", "ProxyLoginRefused", "407"),
                ("squid", f"http://{LOGIN}127.0.0.1:{{0.squid_login}}", "ProxyForbids", "403"),
                ("danted", "socks5://127.0.0.1:{0.dante}", "ProxyForbids", "Connection not allowed"),
            )
        ),
    ],
)
def test_a_proxy_that_does_not_lead_there_is_explained(
    main_of_pair: InProcess,
    limits: Limits,
    proxies: Proxies,
    way: str,
    failure: str,
    fact: str,
    explained: Explained,
) -> None:
    limits(CONNECT_TIMEOUT_S=0.5, FIRST_CONNECT_S=0.5)
    with deaf_port() as deaf:
        url = way.format(proxies, deaf)
        endpoint = ("--mqtt-endpoint", f"localhost:{CLOSED_PORT}", "--things", 1)
        result = main_of_pair("send", "--proxy", url, *endpoint, *ONCE, status=1)
    host = url.rpartition("@")[2].rpartition("/")[2]
    explained(result, failure, f"localhost:{CLOSED_PORT}: ", f"{url.partition('//')[0]}//{host}", fact)
    assert "w4ong" not in result.err


def test_a_proxy_that_opens_tls_is_named_though_the_system_trusts_it(
    main_of_pair: InProcess,
    proxies: Proxies,
    service: AwsService,
    broker_at: Callable[[int], Hearing],
    explained: Explained,
) -> None:
    main_of_pair.use({"SSL_CERT_FILE": str(broker_at(443).root_cert)})
    way = ("--proxy", f"http://127.0.0.1:{proxies.http}", "--mqtt-endpoint", "localhost")
    result = main_of_pair("send", *way, "--root-cert", service.root_cert, "--things", 1, *ONCE, status=1)
    through = f"localhost:443 through the proxy http://127.0.0.1:{proxies.http}: "
    explained(result, "NotTrusted", through, "(it is impostor's, signed by impostor)", "--root-cert")


@pytest.mark.parametrize(
    ("environment", "options", "hint"),
    [
        ({}, (), "--proxy"),
        ({"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "localhost"}, (), "keeps ELF from HTTPS_PROXY"),
        ({"ALL_PROXY": "socks5://127.0.0.1:9", "no_proxy": "*"}, (), "keeps ELF from ALL_PROXY"),
        ({"HTTPS_PROXY": "http://127.0.0.1:9"}, ("--proxy", "none"), "keeps ELF from HTTPS_PROXY"),
    ],
)
def test_a_failure_without_the_proxy_names_what_keeps_elf_from_it(
    main_of_pair: InProcess,
    pair: Pair,
    environment: dict[str, str],
    options: tuple[str, ...],
    hint: str,
    explained: Explained,
) -> None:
    main_of_pair.use(environment)
    main_of_pair("send", *options, *pair.to_broker, *ONCE)
    nowhere = ("--mqtt-endpoint", f"localhost:{CLOSED_PORT}", "--things", 1)
    result = main_of_pair("send", *options, *nowhere, *ONCE, status=1)
    explained(result, "NothingListens", f"localhost:{CLOSED_PORT}: ", hint)
    assert "through the proxy" not in result.err


def test_the_library_of_tunnels_is_imported_where_there_is_a_proxy_alone(pair: Pair, proxies: Proxies) -> None:
    for way, is_imported in (("none", False), (f"socks5h://127.0.0.1:{proxies.socks}", True)):
        result = pair("send", *pair.to_broker, "--proxy", way, *ONCE, env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert ("python_socks" in result.err) == is_imported


def test_a_tunnel_that_is_cut_is_opened_again(
    pair: Pair, proxies: Proxies, broker_at: Callable[[int], Hearing]
) -> None:
    broker, relay = broker_at(443), Relay(proxies.http)
    options = ("--proxy", f"http://localhost:{relay.port}", "--root-cert", broker.root_cert, "--things", 1)
    running = pair.start("send", *options, "--mqtt-endpoint", "localhost", "--duration", 0, "--interval", 0.1)
    running.await_line("posting message")
    relay.cut()
    running.await_line("thing_0 reconnected to localhost:443")
    running.signal(signal.SIGINT)
    running.end(130)
    relay.close()


def test_a_broker_name_that_only_the_proxy_may_resolve_is_explained(
    main_of_pair: InProcess, proxies: Proxies, explained: Explained
) -> None:
    endpoint = ("--mqtt-endpoint", "nobody.invalid", "--things", 1)
    result = main_of_pair("send", "--proxy", f"socks5://127.0.0.1:{proxies.socks}", *endpoint, *ONCE, status=1)
    explained(result, "HostUnknown", "nobody.invalid", "socks5h://")


@pytest.mark.parametrize("scheme", ["http", "socks5h"])
def test_the_control_plane_goes_through_what_botocore_can(main: InProcess, proxies: Proxies, scheme: str) -> None:
    result = main("create", "--proxy", f"{scheme}://127.0.0.1:{CLOSED_PORT}", status=1 if scheme == "http" else 0)
    assert [failure.name for failure in result.failures] == ["ControlPlaneProxyFails"] * (scheme == "http")
    main.use({"HTTP_PROXY": f"http://127.0.0.1:{CLOSED_PORT}"})  # MiniStack's is an http:// URL
    main("create", "--proxy", "none")
    main("create", 2, "--proxy", f"http://127.0.0.1:{proxies.http}")


@pytest.mark.parametrize(("login", "reason"), [("", "407"), (f"{USER}:w4ong@", "401"), (LOGIN, "403")])
def test_a_proxy_that_refuses_the_control_plane_gives_its_reason(
    main: InProcess, proxies: Proxies, login: str, reason: str, explained: Explained
) -> None:
    main.use(
        {"HTTPS_PROXY": f"http://{login}127.0.0.1:{proxies.http_login}", "AWS_ENDPOINT_URL": "https://localhost:9"}
    )
    result = main("create", "--debug", status=1)
    explained(result, "ControlPlaneProxyFails", f": Tunnel connection failed: {reason} ", "HTTPS_PROXY")
    assert "w4ong" not in result.err and "s3cret" not in result.err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--local", "--proxy", "http://127.0.0.1:9"), "--local uses no proxy"),
        (("--proxy", "ftp://jane:s3cret@127.0.0.1"), "not a valid proxy URL"),
        (("--proxy", "http://jane:s3c/ret@127.0.0.1"), "not a valid proxy URL"),
        (("--prox", "http://jane:s3cret@127.0.0.1"), "did you mean --proxy?"),
    ],
)
def test_a_proxy_that_can_not_be_meant_is_refused(main: InProcess, options: tuple[str, ...], problem: str) -> None:
    result = main("create", *options, status=2)
    assert problem in result.err
    assert "s3c" not in result.err


def test_a_variable_that_holds_no_proxy_is_named(main_of_pair: InProcess, pair: Pair, explained: Explained) -> None:
    main_of_pair.use({"HTTPS_PROXY": "gopher://jane:s3cret@127.0.0.1"})
    result = main_of_pair("send", *pair.to_broker, *ONCE, status=1)
    explained(result, "BadProxyUrl", "HTTPS_PROXY")
    assert "s3cret" not in result.err


def test_locusts_users_go_through_the_proxy(elf: Elf, proxies: Proxies) -> None:
    elf("create", 2)
    url = f"socks5h://{LOGIN}127.0.0.1:{proxies.socks_login}"
    command = [sys.executable, "-m", "locust", "-f", ROOT / "locustfile.py", "--headless", "--host", elf.to_broker[1]]
    done = subprocess.run(
        [*command, "--root-cert", elf.to_broker[3], "--interval", "0.1", "--run-time", "1s"],
        cwd=elf.cwd,
        env={**elf.environment, "PYTHONPATH": str(ROOT), "ALL_PROXY": url},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert f"through the proxy {url.replace(LOGIN, '')}" in done.stderr
    assert re.search(r"CONNECT +localhost:\d+ +2 +0\(0.00%\)", done.stderr), done.stderr
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]


def test_a_local_fleet_goes_through_no_proxy(local: Elf, explained: Explained) -> None:
    local("--local", "create")
    result = local("send", *ONCE)
    assert "1 acknowledged" in result.err
    assert "through the proxy" not in result.err
    refused = local("send", "--proxy", "http://127.0.0.1:9", "--output", "json", status=1)
    explained(refused, "PlaceDiffers", "--proxy ")
