"""Loaded by the Python of an elf.py under test (PYTHONPATH): sees what leaves no trace afterwards.

Writes to $WITNESS_LOG, one a line, each connection made ("connect HOST PORT"), and each file and directory under
$WITNESS_DIRECTORY that others than its owner could use at any moment ("exposed MODE PATH"): it looks before each
operation on files, so before a chmod() that would come too late.
"""

import os
import socket
import sys
from typing import NoReturn

_log = os.open(os.environ["WITNESS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
_directory = os.environ["WITNESS_DIRECTORY"]
_looking = False


def _write(line: str) -> None:
    os.write(_log, f"{line}\n".encode())


def _look() -> None:
    global _looking
    if _looking:
        return
    _looking = True
    try:
        paths = [_directory, *(entry.path for entry in os.scandir(_directory))]
        for path in paths:
            mode = os.lstat(path).st_mode
            if mode & 0o077:
                _write(f"exposed {mode & 0o777:o} {path}")
    except FileNotFoundError:
        pass
    finally:
        _looking = False


def _witness(event: str, args: tuple[object, ...]) -> None:
    if event == "socket.connect":
        address = args[1]
        _write("connect " + (" ".join(map(str, address[:2])) if isinstance(address, tuple) else str(address)))
    elif event == "open" or event.startswith(("os.", "shutil.", "tempfile.")):
        _look()


def _end(status: int) -> NoReturn:
    _look()
    _exit(status)


sys.addaudithook(_witness)
_exit, os._exit = os._exit, _end  # which is how elf.py ends

# Any name under .localhost is loopback (RFC 6761), which not every system's resolver knows.
_getaddrinfo = socket.getaddrinfo


def _resolve(host, *args, **options):  # type: ignore[no-untyped-def]
    return _getaddrinfo("127.0.0.1" if str(host).endswith(".localhost") else host, *args, **options)


socket.getaddrinfo = _resolve
