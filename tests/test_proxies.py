"""MQTT goes where curl would go: through proxies that nobody here wrote, to a broker that sees what it is asked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from harness import InProcess, await_listener, free_port
from obstacles import CLOSED_PORT, Broker, deaf_port

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

pytestmark = [
    pytest.mark.skipif(not shutil.which("tinyproxy"), reason="tinyproxy is not installed"),
    pytest.mark.skipif(not shutil.which("microsocks"), reason="microsocks is not installed"),
    pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="port 443 is root's"),
]


class Proxies:
    """The proxies of this machine, each with its port: those that end in _login want a user and a password."""

    def __init__(self, directory: Path) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self.http = self._tinyproxy(directory / "http.conf", "")
        self.http_login = self._tinyproxy(directory / "login.conf", f"BasicAuth {USER} {PASSWORD}")
        self.socks = self._microsocks()
        self.socks_login = self._microsocks("-u", USER, "-P", PASSWORD)
        for port in (self.http, self.http_login, self.socks, self.socks_login):
            await_listener(port)

    def _tinyproxy(self, file: Path, more: str) -> int:
        port = free_port()
        file.write_text(TINYPROXY.format(port=port, more=more))
        self._start("tinyproxy", "-d", "-c", str(file))
        return port

    def _microsocks(self, *login: str) -> int:
        port = free_port()
        self._start("microsocks", "-i", "127.0.0.1", "-p", str(port), *login)
        return port

    def _start(self, *command: str) -> None:
        quiet = subprocess.DEVNULL
        self._processes.append(subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


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
            broker = Hearing(tmp_path, port)
            stack.callback(broker.close)
            return broker

        yield run


@pytest.mark.parametrize(
    ("variable", "way", "port"),
    [
        ("HTTPS_PROXY", "http://127.0.0.1:{0.http}", 443),
        ("https_proxy", "127.0.0.1:{0.http}", 443),
        ("ALL_PROXY", f"http://{LOGIN}127.0.0.1:{{0.http_login}}", 443),
        ("all_proxy", "socks5://127.0.0.1:{0.socks}", 8883),
        ("", f"socks5h://{LOGIN}localhost:{{0.socks_login}}", 8883),
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
        main_of_pair.use({variable: url})
    options = () if variable else ("--proxy", url)
    root_cert = ("--root-cert", broker.root_cert, "--debug", "--output", "json")
    result = main_of_pair("send", *options, "--mqtt-endpoint", "localhost", *root_cert, *ONCE)
    shown = url.replace(LOGIN, "")
    assert f"through the proxy {shown if '://' in shown else f'http://{shown}'}" in result.lines
    assert "2 acknowledged" in result.err
    assert broker.names == ["localhost"] * 2
    assert [peer.protocol for peer in broker.peers] == ([ALPN] * 2 if port == 443 else [None] * 2)
    assert not [secret for secret in SECRETS if secret in result.err + result.out]


@pytest.mark.parametrize(
    ("way", "cause", "remedy"),
    [
        ("http://nobody.invalid:3128", "can't be reached: its name can't be resolved", "--proxy none"),
        (f"http://127.0.0.1:{CLOSED_PORT}", "can't be reached: [Errno 111] Connection refused", "--proxy none"),
        (f"socks5://127.0.0.1:{CLOSED_PORT}", "can't be reached: [Errno 111] Connection refused", "--proxy none"),
        ("http://127.0.0.1:{1}", "does not answer", "--proxy none"),
        ("http://127.0.0.1:{0.http_login}", "wants a user and a password: 407", "http://USER:PASSWORD@127.0.0.1"),
        ("http://jane:w4ong@127.0.0.1:{0.http_login}", "refuses this user and password: ", "http://USER:PASSWORD@"),
        ("socks5://127.0.0.1:{0.socks_login}", "wants a user and a password: ", "socks5://USER:PASSWORD@127.0.0.1"),
        ("socks5://jane:w4ong@127.0.0.1:{0.socks_login}", "refuses this user and password: ", "socks5://USER:"),
        ("http://127.0.0.1:{0.http}", "forbids it: 403", "have its administrator allow that host and port"),
        ("socks5://127.0.0.1:{0.socks}", "can't reach it: ", "check --mqtt-endpoint"),
        ("http://127.0.0.1:{0.socks}", "gives no answer of a proxy's: ", "--proxy none"),
    ],
)
def test_a_proxy_that_does_not_lead_there_is_explained(
    main_of_pair: InProcess,
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    proxies: Proxies,
    way: str,
    cause: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.5)
    with deaf_port() as deaf:
        url = way.format(proxies, deaf)
        endpoint = ("--mqtt-endpoint", f"localhost:{CLOSED_PORT}", "--things", 1)
        result = main_of_pair("send", "--proxy", url, *endpoint, *ONCE, status=1)
    host = url.rpartition("@")[2].rpartition("/")[2]
    failed = f"can't connect to localhost:{CLOSED_PORT}: the proxy {url.partition('//')[0]}//{host} {cause}"
    assert any(failed in line for line in result.lines), result.err
    assert any(line.startswith("what to do: ") and remedy in line for line in result.lines), result.err
    assert "w4ong" not in result.err
