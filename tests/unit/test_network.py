"""The broker's address, the way there, and how soon a connection that is dead is given up."""

from __future__ import annotations

import errno
import resource
import select
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support.program import Limits, constant

from iot_elf import network, text
from iot_elf.errors import ElfError
from iot_elf.network import Endpoint, Proxy

from .stand_ins import Clock


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset())


# A connection


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_a_connection_that_the_network_drops_ends_within_30_seconds(listener: socket.socket) -> None:
    """15 s without a word, then three questions 5 s apart; and 30 s for what is sent and not acknowledged."""
    with network.open_socket(Endpoint(*listener.getsockname())) as connection:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        limits = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        found = {name: connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in limits}
        assert found == {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}


def test_a_message_is_sent_at_once_and_a_connection_is_waited_for_5_seconds(listener: socket.socket) -> None:
    with network.open_socket(Endpoint(*listener.getsockname())) as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert connection.gettimeout() == constant("CONNECT_TIMEOUT_S") == 5.0


@pytest.mark.parametrize(("scheme", "is_relayed"), [("http", False), ("socks5", False), ("https", True)])
def test_a_connection_through_a_proxy_is_given_up_as_soon(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, scheme: str, is_relayed: bool
) -> None:
    tunnel = socket.create_connection(listener.getsockname())
    relayed: list[Any] = []

    def relay(connection: Any) -> Any:
        relayed.append(connection)
        return connection

    monkeypatch.setattr(network, "open_tunnel", lambda endpoint, proxy: tunnel)
    monkeypatch.setattr(network, "tls_relay", relay)
    with network.open_socket(Endpoint("broker", 8883, Proxy(scheme, "proxy", 1, "", ""))) as connection:
        assert connection is tunnel
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
    assert relayed == [tunnel] * is_relayed


@pytest.mark.parametrize(
    ("said", "head"),
    [
        (b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nTLS", b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"),
        (b"SSH-2.0\nmore", b"SSH-2.0\n"),
        (b"HTTP/1.1 200", b"HTTP/1.1 200"),  # it closes the connection
        (b"", b""),
        pytest.param(b"x" * 70_000, b"x" * 65_537, id="no answer of a proxy"),
    ],
)
def test_of_a_proxys_answer_no_byte_is_read_that_is_the_brokers(said: bytes, head: bytes) -> None:
    mine, its = socket.socketpair()
    with mine, its:
        its.sendall(said)
        its.shutdown(socket.SHUT_WR)

        class Stream:
            socket = mine

        assert network.read_http_head(Stream) == head


# Addresses


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        (Endpoint("host"), "host"),
        (Endpoint("host", 443), "host:443"),
        (Endpoint("::1"), "[::1]"),
        (Endpoint("::1", 443), "[::1]:443"),
    ],
)
def test_an_address_is_shown_as_it_is_typed(endpoint: Endpoint, shown: str) -> None:
    assert str(endpoint) == shown


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://proxy", Proxy("http", "proxy", 80, "", "")),
        ("https://proxy", Proxy("https", "proxy", 443, "", "")),
        ("socks5://proxy", Proxy("socks5", "proxy", 1080, "", "")),
        ("socks5h://proxy:1", Proxy("socks5h", "proxy", 1, "", "")),
        ("socks://proxy", Proxy("socks5", "proxy", 1080, "", "")),  # as GNOME sets ALL_PROXY
        ("proxy:3128", Proxy("http", "proxy", 3128, "", "")),
        ("http://me:it%40s@proxy", Proxy("http", "proxy", 80, "me", "it@s")),
        ("http://me@[::1]:8", Proxy("http", "::1", 8, "me", "")),
        ("http://", None),
        ("ftp://proxy", None),
        ("http://proxy:99999", None),
        ("http://proxy:x", None),
        ("http://[proxy", None),
    ],
)
def test_a_proxys_url_is_read_or_refused_without_being_shown(url: str, proxy: Proxy | None) -> None:
    if proxy:
        assert Proxy.from_url(url) == proxy
        assert str(proxy) == f"{proxy.scheme}://{Endpoint(proxy.host, proxy.port)}"
        return
    with pytest.raises(ElfError) as raised:
        Proxy.from_url(url, "HTTPS_PROXY")
    assert raised.value.cause == "HTTPS_PROXY is not a valid proxy URL"


@pytest.mark.parametrize("scheme", ["socks4", "socks4a", "SOCKS4"])
def test_socks_4_is_refused_in_words(scheme: str) -> None:
    with pytest.raises(ElfError, match="SOCKS 4") as raised:
        Proxy.from_url(f"{scheme}://proxy", "ALL_PROXY")
    assert raised.value.name == "BadProxyUrl"


@pytest.mark.parametrize(
    ("environment", "given", "url", "proxies"),
    [
        ({}, None, None, None),
        ({}, "http://given", None, {"http": "http://given", "https": "http://given"}),
        ({}, "none", None, {}),
        ({}, "socks://given", None, {}),
        ({"HTTPS_PROXY": "http://env"}, None, None, None),  # botocore looks itself
        ({"ALL_PROXY": "socks://env"}, None, None, {}),
        ({"ALL_PROXY": "socks5h://env"}, None, None, {}),
        ({"ALL_PROXY": "socks4://env"}, None, None, "ALL_PROXY is a SOCKS 4 proxy"),
        ({"HTTPS_PROXY": "socks4://env"}, "http://given", None, {"http": "http://given", "https": "http://given"}),
        ({"ALL_PROXY": "socks4://env", "NO_PROXY": ".amazonaws.com"}, None, None, None),
        ({"ALL_PROXY": "socks4://env", "NO_PROXY": "localhost"}, None, "http://localhost:4566", None),
        ({"ALL_PROXY": "socks4://env", "NO_PROXY": "localhost"}, None, None, "ALL_PROXY is a SOCKS 4 proxy"),
    ],
)
def test_the_control_plane_is_reached_directly_where_botocore_has_no_way(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    given: str | None,
    url: str | None,
    proxies: dict[str, str] | str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(proxies, str):
        with pytest.raises(ElfError, match=proxies):
            network.botocore_proxies(given, url)
    else:
        assert network.botocore_proxies(given, url) == proxies


@pytest.mark.parametrize("read", [network.read_http_head, lambda stream: network.read_exactly(stream, 100)])
def test_a_proxys_answer_has_five_seconds_in_all(monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    clock = Clock(monkeypatch, network)
    timeouts: list[float] = []

    def a_byte_a_second(size: int) -> bytes:
        clock.now += 1.0
        return b"H"

    its = SimpleNamespace(settimeout=timeouts.append, recv=a_byte_a_second)
    with pytest.raises(TimeoutError):
        read(SimpleNamespace(socket=its))
    assert timeouts == [5.0, 4.0, 3.0, 2.0, 1.0]


def test_a_relay_passes_on_what_comes_while_the_other_direction_is_full() -> None:
    """Both ends send more than fits in between before either reads."""
    outer, its = socket.socketpair()
    mine, much = network.tls_relay(outer), bytes(5_000_000)
    with mine, its:
        for each in (mine, its):
            each.settimeout(0.2)
            with pytest.raises(TimeoutError):
                each.sendall(much)  # nobody reads it
        with pytest.raises(TimeoutError):
            while its.recv(65_536):
                pass
        mine.sendall(b"more")
        assert its.recv(10) == b"more"


def test_what_was_sent_last_reaches_a_proxy_that_still_sends() -> None:
    """A socket that is closed with anything unread lets the other side's writing fail, before it reads."""
    outer, its = socket.socketpair()
    mine = network.tls_relay(outer)
    with mine, its:
        mine.sendall(b"goodbye")
        mine.shutdown(socket.SHUT_WR)
        its.sendall(bytes(1_000_000))
        its.shutdown(socket.SHUT_WR)
        assert its.recv(10) == b"goodbye"
        assert its.recv(10) == b""


def test_a_proxys_password_is_never_shown() -> None:
    Proxy.from_url("http://me:s3cr%40t@proxy")
    assert text.redacted("s3cr@t s3cr%40t me me:s3cr@t") == "*** *** me ***"


def test_a_password_that_may_be_a_word_is_shown() -> None:
    Proxy.from_url("http://me:abc@proxy")
    assert text.redacted("abc") == "abc"


@pytest.mark.parametrize(
    ("environment", "given", "port", "way"),
    [
        ({}, None, 0, ("", 8883)),
        ({}, None, 1, ("", 1)),
        ({"HTTPS_PROXY": "http://env"}, None, 0, ("http://env:80", 443)),
        ({"HTTPS_PROXY": "http://env"}, None, 8883, ("http://env:80", 8883)),
        ({"HTTPS_PROXY": "https://env"}, None, 0, ("https://env:443", 443)),
        ({"ALL_PROXY": "socks5://env"}, None, 0, ("socks5://env:1080", 8883)),
        ({"HTTPS_PROXY": "http://env", "ALL_PROXY": "http://all"}, None, 0, ("http://env:80", 443)),
        ({"HTTPS_PROXY": "", "ALL_PROXY": "http://all"}, None, 0, ("http://all:80", 443)),
        ({"HTTP_PROXY": "http://env"}, None, 0, ("", 8883)),
        ({"HTTPS_PROXY": "http://env", "NO_PROXY": "broker"}, None, 0, ("", 8883)),
        ({"HTTPS_PROXY": "http://env", "NO_PROXY": "broker"}, "http://given", 0, ("http://given:80", 443)),
        ({"HTTPS_PROXY": "http://env"}, "http://given", 0, ("http://given:80", 443)),
        ({"HTTPS_PROXY": "http://env"}, "none", 0, ("", 8883)),
        ({"HTTPS_PROXY": "none"}, None, 0, ("", 8883)),
    ],
)
def test_the_way_to_the_broker_is_the_one_that_is_given_or_curls(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], given: str | None, port: int, way: tuple[str, int]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = Endpoint("broker", port).routed(given)
    assert (str(found.proxy or ""), found.port, found.host) == (*way, "broker")


def test_a_proxy_that_is_not_valid_is_called_after_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "ftp://env")
    for given, source in (None, "ALL_PROXY"), ("ftp://given", "--proxy"):
        with pytest.raises(ElfError) as raised:
            Endpoint("broker").routed(given)
        assert raised.value.name == "BadProxyUrl"
        assert raised.value.cause.startswith(f"{source} ")


# How many


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The limits that are asked for; now 1,000 files may be open, and 2,000 if asked."""
    found: list[tuple[int, int]] = []

    def setrlimit(which: int, limits: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        found.append(limits)
        if limits[0] > 2000:
            raise ValueError

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, 2000))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    return found


@pytest.mark.parametrize(("things", "limits"), [(1, []), (900, []), (901, [(1001, 2000)]), (1900, [(2000, 2000)])])
def test_as_many_files_may_be_open_as_there_are_things_and_some_more(
    asked: list[tuple[int, int]], things: int, limits: list[tuple[int, int]]
) -> None:
    network.raise_descriptor_limit(things)
    assert asked == limits


@pytest.mark.parametrize("error", [ValueError(), OSError(errno.EPERM, "any")])
def test_more_things_than_the_system_allows_are_refused(
    asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(ElfError, match="1901 things need 2001 open files, and this system allows 2000"):
        network.raise_descriptor_limit(1901)


def test_without_a_limit_none_is_raised(monkeypatch: pytest.MonkeyPatch, asked: list[tuple[int, int]]) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    network.raise_descriptor_limit(100_000)
    assert asked == []


def test_where_the_system_has_only_select_500_things_are_the_most(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[int, int]], limits: Limits
) -> None:
    assert constant("MAX_SELECT_SOCKETS") == 500
    network.raise_descriptor_limit(501)
    monkeypatch.delattr(select, "poll")
    network.raise_descriptor_limit(500)
    with pytest.raises(ElfError, match="501 things are more than the 500"):
        network.raise_descriptor_limit(501)
