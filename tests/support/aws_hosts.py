"""All of AWS's host names, as a proxy shows them: what is asked of each goes to MiniStack, over TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from support.networks import certificate_and_key


class AwsHosts:
    """An HTTP proxy behind which AWS has a host of each name, except for those with one of `unknown` in it.

    `asked` has the names, in the order of the first connection to each.
    """

    def __init__(self, directory: Path, port: int, unknown: tuple[str, ...] = ()) -> None:
        self._directory, self._target_port, self._unknown = directory, port, unknown
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._making = threading.Lock()
        self.ca_bundle = directory / "aws-ca.pem"
        self.ca_bundle.write_bytes(self._certify("ca.test", is_ca=True))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What a user sets who sees these hosts."""
        return {"HTTPS_PROXY": self.url, "AWS_CA_BUNDLE": str(self.ca_bundle)}

    @property
    def asked(self) -> list[str]:
        return list(self._contexts)

    def forget(self) -> None:
        with self._making:
            self._contexts.clear()

    def _certify(self, host: str, is_ca: bool = False) -> bytes:
        return certificate_and_key(self._key, host, "ca.test", host, is_ca)

    def _context_of(self, host: str) -> ssl.SSLContext:
        with self._making:
            if host not in self._contexts:
                path = self._directory / f"{host}.pem"
                path.write_bytes(self._certify(host))
                self._contexts[host] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                self._contexts[host].load_cert_chain(path)
            return self._contexts[host]

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (data := connection.recv(1)):
                    return
                head += data
            host = head.split()[1].decode().partition(":")[0]
            if any(part in host for part in self._unknown):
                connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                return
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with (
                self._context_of(host).wrap_socket(connection, server_side=True) as client,
                socket.create_connection(("127.0.0.1", self._target_port)) as target,
            ):
                threading.Thread(target=self._pump, args=(target, client), daemon=True).start()
                self._pump(client, target)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes accept(); close() alone does not
        self._listener.close()
