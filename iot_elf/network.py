# SPDX-License-Identifier: Apache-2.0
"""The broker's address, and proxies on the way there."""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import time
from typing import Any, NamedTuple

from iot_elf import defaults
from iot_elf.errors import ElfError
from iot_elf.text import add_secret, plural

PROXY_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}
MAX_SELECT_SOCKETS = 500  # sockets, where the system has only select() (Windows)


class Proxy(NamedTuple):
    """A proxy to the broker; the default port is 80, 443 or 1080."""

    scheme: str
    host: str
    port: int
    user: str
    password: str

    def __str__(self) -> str:
        return f"{self.scheme}://{Endpoint(self.host, self.port)}"

    @classmethod
    def from_url(cls, url: str, source: str = "--proxy") -> Proxy:
        """Read a URL; its password is never shown from now on. Raises ElfError, which names only the source."""
        import urllib.parse

        with contextlib.suppress(ValueError):
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
            add_secret(parts.password, password, f"{user}:{password}" if password else None, least=4)
            scheme = "socks5" if parts.scheme == "socks" else parts.scheme  # as GNOME sets ALL_PROXY
            if parts.hostname and (usual_port := PROXY_PORTS.get(scheme)):
                return cls(scheme, parts.hostname, parts.port or usual_port, user, password)
        is_socks4 = url.lower().startswith("socks4")
        raise ElfError(
            "BadProxyUrl",
            f"{source} is a SOCKS 4 proxy, which ELF can't use" if is_socks4 else f"{source} is not a valid proxy URL",
            f"use {', '.join(PROXY_PORTS)}, then ://USER:PASSWORD@HOST:PORT, with %40 for @ in the password",
        )


class Endpoint(NamedTuple):
    host: str
    port: int = 0  # the usual one
    proxy: Proxy | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else host

    def routed(self, given: str | None) -> Endpoint:
        """Return it with its proxy (`given`, or the one that curl would use) and its port. Raises ElfError.

        HTTP proxies allow port 443, often no other.
        """
        import urllib.request

        source, url = ("--proxy", given) if given else proxy_in_environment()
        is_direct = url in ("", defaults.NO_PROXY) or (not given and urllib.request.proxy_bypass(self.host))
        proxy = None if is_direct else Proxy.from_url(url, source)
        usual_port = 443 if proxy and proxy.scheme.startswith("http") else defaults.MQTT_PORT
        return Endpoint(self.host, self.port or usual_port, proxy)


def proxy_in_environment() -> tuple[str, str]:
    """Return the variable that sets a proxy for HTTPS or for all, and its URL; empty if none does."""
    import urllib.request

    known = urllib.request.getproxies_environment()
    return next(((f"{name.upper()}_PROXY", known[name]) for name in ("https", "all") if known.get(name)), ("", ""))


def botocore_proxies(given: str | None, endpoint_url: str | None) -> dict[str, str] | None:
    """Return the proxies to the control plane, as botocore wants them; None: those of the environment.

    botocore knows no SOCKS: it connects directly then. Raises ElfError for a proxy that nothing can use.
    """
    import urllib.parse
    import urllib.request

    source, url = ("--proxy", given) if given else proxy_in_environment()
    host = urllib.parse.urlsplit(endpoint_url or "").hostname or "iot.amazonaws.com"
    if not given and urllib.request.proxy_bypass(host):
        return None
    if url == defaults.NO_PROXY or (url and Proxy.from_url(url, source).scheme.startswith("socks")):
        return {}
    return {"http": given, "https": given} if given else None


def open_socket(endpoint: Endpoint) -> Any:
    import socket

    if endpoint.proxy:
        connection = open_tunnel(endpoint, endpoint.proxy)
        connection.settimeout(defaults.CONNECT_TIMEOUT_S)  # for the broker's TLS
    else:
        connection = socket.create_connection(endpoint[:2], timeout=defaults.CONNECT_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else 40 ms per message with a subscription
    # If the network drops everything, the connection ends within 30 seconds, where the system supports it.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    limits = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
    for name in limits.keys() & vars(socket).keys():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), limits[name])
    return tls_relay(connection) if endpoint.proxy and endpoint.proxy.scheme == "https" else connection


def is_out_of_date(error: Any) -> bool:
    """Return whether TLS failed because a certificate has expired, or is not valid yet: OpenSSL's x509_vfy.h."""
    return getattr(error, "verify_code", None) in (9, 10)


def open_tunnel(endpoint: Endpoint, proxy: Proxy) -> Any:
    """Return a socket to the broker through a proxy. Raises ElfError, with the proxy's answer."""
    import socket
    import ssl

    from python_socks import ProxyConnectionError, ProxyError, ProxyTimeoutError, ProxyType
    from python_socks.sync.v2 import Proxy as Way
    from python_socks.sync.v2._stream import SyncSocketStream as Stream

    kind = ProxyType.HTTP if proxy.scheme.startswith("http") else ProxyType.SOCKS5
    tls = ssl.create_default_context() if proxy.scheme == "https" else None
    name, problem = "ProxyUnanswered", f"the proxy {proxy} does not answer"
    remedy = "check HTTPS_PROXY, ALL_PROXY, NO_PROXY and --proxy"
    # Its own has a time-out for each recv(), and takes what one has for the whole of an HTTP answer.
    Stream.read, Stream.read_exactly = read_http_head, read_exactly  # type: ignore
    try:
        way = Way(kind, *proxy[1:], rdns=proxy.scheme == "socks5h", proxy_ssl=tls)
        return way.connect(endpoint.host, endpoint.port, timeout=defaults.CONNECT_TIMEOUT_S).socket
    except ProxyConnectionError as error:
        name, problem = "ProxyUnreachable", f"could not reach the proxy {proxy}: {error.__cause__}"
        if isinstance(error.__cause__, socket.gaierror):
            name, problem = "ProxyUnknown", f"could not resolve the host name of the proxy {proxy}"
    except ssl.SSLError as error:
        name, problem = "ProxyTlsFails", f"TLS to the proxy {proxy} failed: {error}"
        remedy = f"{remedy}, and this machine's clock" if is_out_of_date(error) else remedy
    except (ProxyTimeoutError, ConnectionError):
        pass
    except ValueError:  # HTTP allows no colon in a user, SOCKS only ASCII
        name, problem = "ProxyLoginInvalid", f"this user and password are not valid for the proxy {proxy}"
    except ProxyError as error:
        code, said = error.error_code, str(error)  # an HTTP status, or a code of SOCKS 5 (RFC 1928, 6)
        if code in (401, 407) or (not code and "uthentication" in said):
            name = "ProxyLoginRefused"
            it = "refuses this user and password" if proxy.user else "requires a user and a password"
            remedy = f"put them in its URL: {proxy.scheme}://USER:PASSWORD@{Endpoint(proxy.host, proxy.port)}"
        elif code in (2, 403, 405):
            name, it = "ProxyForbids", "forbids it"
            remedy = "ask its administrator to allow that host and port, or try --mqtt-endpoint :443 or :8883"
        elif code and code // 100 != 3:  # a redirect, probably to a login page
            name, it = "ProxyCantReach", "can't reach it"
            remedy = "check --mqtt-endpoint, and that the proxy can reach AWS IoT"
        else:
            name, it = "NotAProxy", "does not answer as a proxy"
        problem = f"the proxy {proxy} {it}: {said}"
    raise ElfError(name, f"can't connect to {endpoint}: {problem}", remedy)


def receive(stream: Any, size: int) -> bytes:
    """Receive a part of a proxy's answer, which has CONNECT_TIMEOUT_S in all. Raises OSError."""
    stream.deadline = getattr(stream, "deadline", None) or time.monotonic() + defaults.CONNECT_TIMEOUT_S
    if (left_s := stream.deadline - time.monotonic()) <= 0:
        raise TimeoutError
    stream.socket.settimeout(left_s)
    data: bytes = stream.socket.recv(size)
    return data


def read_http_head(stream: Any, _: int = 0) -> bytes:
    """Read only the status and headers of a proxy's answer, or the beginning of an answer that is not HTTP."""
    head = b""
    for byte in iter(functools.partial(receive, stream, 1), b""):
        head += byte
        if head.endswith(b"\r\n\r\n") or (byte == b"\n" and not head.startswith(b"HTTP/")) or len(head) > 65536:
            break
    return head


def read_exactly(stream: Any, size: int) -> bytes:
    """Read so many bytes of a SOCKS proxy's answer."""
    from python_socks import ProxyError

    data = b""
    while len(data) < size:
        if not (more := receive(stream, size - len(data))):
            raise ProxyError("it closed the connection")
        data += more
    return data


class _Way:
    """One direction of a relay between sockets that do not block."""

    def __init__(self, source: Any, sink: Any) -> None:
        self._source, self._sink, self._data = source, sink, b""

    def move(self) -> tuple[Any, int] | None:
        """Pass something on; return the socket that this has to wait for, and selectors' event, or None.

        Raises OSError when either end is closed.
        """
        import selectors
        import ssl

        try:
            if not self._data and not (data := self._source.recv(65536)):
                raise ConnectionResetError
            self._data = self._data or data
            self._data = self._data[self._sink.send(self._data) :]
        except ssl.SSLWantReadError:  # TLS may have to read before it writes
            return self._sink if self._data else self._source, selectors.EVENT_READ
        except (BlockingIOError, ssl.SSLWantWriteError):
            return (self._sink, selectors.EVENT_WRITE) if self._data else (self._source, selectors.EVENT_READ)
        return None


def close_gently(connection: Any) -> None:
    """Send no more, and close once the other side has, or after FAREWELL_S: see EventLoop.close_gently()."""
    import socket

    until = time.monotonic() + defaults.FAREWELL_S
    with contextlib.suppress(OSError), connection:
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(defaults.FAREWELL_S)
        while connection.recv(65536) and time.monotonic() < until:
            pass


def tls_relay(outer: Any) -> Any:
    """Return a socket that relays to a TLS connection, because the SDK's TLS can't run inside it."""
    import selectors
    import socket

    mine, its = socket.socketpair()
    mine.settimeout(defaults.CONNECT_TIMEOUT_S)
    ways = _Way(its, outer), _Way(outer, its)

    def relay() -> None:
        """Pass on what comes until either end is closed; a direction that is stuck does not stop the other."""
        with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            outer.setblocking(False)
            its.setblocking(False)
            while True:
                waits, wanted = [way.move() for way in ways], collections.Counter[Any]()
                for end, event in filter(None, waits):
                    wanted[end] |= event
                for key in list(selector.get_map().values()):
                    selector.unregister(key.fileobj)
                for end, events in wanted.items():
                    selector.register(end, events)
                selector.select(None if all(waits) else 0)
        with its:
            close_gently(outer)

    threading.Thread(target=relay, daemon=True).start()
    return mine


def raise_descriptor_limit(devices: int) -> None:
    """Raise the limit of open files to what `devices` connections need. Raises ElfError if that is not possible."""
    import select

    if not hasattr(select, "poll") and devices > MAX_SELECT_SOCKETS:
        things, most = plural(devices, "thing"), MAX_SELECT_SOCKETS
        raise ElfError(
            "TooManySockets",
            f"{things} are more than the {most} connections that a program can have here",
            "use fewer things, or another system (Linux, macOS, WSL)",
        )
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    needed = devices + 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError) as error:
            raise ElfError(
                "TooFewDescriptors",
                f"{plural(devices, 'thing')} need {needed} open files, and this system allows {hard}",
                "raise the limit (`ulimit -Hn`, or nofile in /etc/security/limits.conf), or use fewer things",
            ) from error
