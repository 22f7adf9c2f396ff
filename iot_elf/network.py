# SPDX-License-Identifier: Apache-2.0
"""The broker's address, and proxies on the way there."""

from __future__ import annotations

import contextlib
import functools
import threading
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
            if parts.hostname and (usual_port := PROXY_PORTS.get(parts.scheme)):
                return cls(parts.scheme, parts.hostname, parts.port or usual_port, user, password)
        raise ElfError(
            "BadProxyUrl",
            f"{source} is not a valid proxy URL",
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


def open_socket(endpoint: Endpoint) -> Any:
    import socket

    if endpoint.proxy:
        connection = open_tunnel(endpoint, endpoint.proxy)
    else:
        connection = socket.create_connection(endpoint[:2], timeout=defaults.CONNECT_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else 40 ms per message with a subscription
    # If the network drops everything, the connection ends within 30 seconds, where the system supports it.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    limits = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
    for name in limits.keys() & vars(socket).keys():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), limits[name])
    return tls_relay(connection) if endpoint.proxy and endpoint.proxy.scheme == "https" else connection


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
    Stream.read = read_http_head  # type: ignore  # its own takes what one recv() has for the whole
    try:
        way = Way(kind, *proxy[1:], rdns=proxy.scheme == "socks5h", proxy_ssl=tls)
        return way.connect(endpoint.host, endpoint.port, timeout=defaults.CONNECT_TIMEOUT_S).socket
    except ProxyConnectionError as error:
        name, problem = "ProxyUnreachable", f"could not reach the proxy {proxy}: {error.__cause__}"
        if isinstance(error.__cause__, socket.gaierror):
            name, problem = "ProxyUnknown", f"could not resolve the host name of the proxy {proxy}"
    except ssl.SSLError as error:
        name, problem = "ProxyTlsFails", f"TLS to the proxy {proxy} failed: {error}"
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


def read_http_head(stream: Any, _: int = 0) -> bytes:
    """Read only the status and headers of a proxy's answer, or the beginning of an answer that is not HTTP."""
    head = b""
    for byte in iter(functools.partial(stream.socket.recv, 1), b""):
        head += byte
        if head.endswith(b"\r\n\r\n") or (byte == b"\n" and not head.startswith(b"HTTP/")) or len(head) > 65536:
            break
    return head


def tls_relay(outer: Any) -> Any:
    """Return a socket that relays to a TLS connection, because the SDK's TLS can't run inside it."""
    import selectors
    import socket
    import ssl

    mine, its = socket.socketpair()

    def relay() -> None:
        with contextlib.suppress(OSError), outer, its, selectors.DefaultSelector() as selector:
            for end in (outer, its):
                selector.register(end, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(0 if outer.pending() else None)] or [outer]
                if its in ready:
                    if not (data := its.recv(65536)):
                        return
                    outer.settimeout(None)
                    outer.sendall(data)
                if outer in ready:
                    outer.settimeout(0)  # this may be only TLS's own data
                    with contextlib.suppress(ssl.SSLWantReadError):
                        if not (data := outer.recv(65536)):
                            return
                        its.sendall(data)

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
