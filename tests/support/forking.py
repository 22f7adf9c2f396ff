"""Processes of elf.py and Locust, forked by one that has imported their libraries: that was half of what tests cost.

What runs is a process of its own, with its own arguments, streams, environment, directory, umask and session, that can
be stopped, interrupted and killed. Where what Python does before elf.py begins matters, Python is started: then a
variable of the environment is Python's own (but for PYTHONPATH to what may as well be loaded after the libraries), or
the Python or the script is another. In a shell that tries the pages, elf.py is forked, too: CI runs a real one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from support.machine import SLOW_DISK, WITNESS
from support.program import ELF, PACKAGE, TESTS

CAN_FORK = sys.platform == "linux"  # macOS's libraries do not bear it
_ONE_REQUEST = threading.Lock()
_SERVER = TESTS / "support" / "fork_server.py"
_CLIENT = TESTS / "support" / "fork_client.py"


def popen(**settings: Any) -> subprocess.Popen[Any]:
    """subprocess.Popen() of elf.py or `-m locust`, be it forked or started."""
    return (Forked if _can_be_forked(**settings) else subprocess.Popen)(**settings)


def _can_be_forked(args: Any, env: Mapping[str, str], **settings: Any) -> bool:
    is_program = args[1] == str(ELF) or [*args[1:3]] == ["-m", "locust"]
    is_ours = is_program and (args[0], env.get("LANG")) == (sys.executable, "C.UTF-8")
    loaded_first = env.get("PYTHONPATH", str(WITNESS)) not in (str(WITNESS), str(SLOW_DISK))
    is_of_python = loaded_first or any(
        name.startswith(("PYTHON", "LC_", "OPENSSL")) for name in env.keys() - {"PYTHONPATH"}
    )
    return CAN_FORK and is_ours and not is_of_python and not _signs_in(env) and "preexec_fn" not in settings


def _signs_in(env: Mapping[str, str]) -> bool:
    """Whether botocore looks at how the user signs in when it is imported: `aws login`, and where tokens of SSO are."""
    files = (path for path in Path(env["HOME"], ".aws").glob("*") if path.is_file())
    return "AWS_CONFIG_FILE" in env or any(re.search(b"login_session|sso", path.read_bytes()) for path in files)


class Forked(subprocess.Popen[Any]):
    """What subprocess.Popen() would start, forked by the server: it is no child of this process."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        """Fork the process. `others` are those of subprocess.Popen()'s in CPython 3.10 to 3.13, in this order."""
        _executable, _preexec, _close, _pass, cwd, env, _info, _flags, _shell, *pipes = others[:15]
        _restore_signals, _gid, _gids, _uid, umask, new_session = others[15:21]
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        self._ending, its_ending = os.pipe()
        streams = (number if mine == -1 else mine for number, mine in enumerate((p2cread, c2pwrite, errwrite)))
        args = args[2:] if args[1] == "-m" else args[1:]
        request = {"args": args, "cwd": str(cwd), "env": env, "umask": umask, "new_session": new_session}
        self.pid = int(_fork(args[0], json.dumps(request).encode(), [*streams, its_ending]))
        self._child_created = True
        os.close(its_ending)
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._ending], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            with os.fdopen(self._ending, encoding="ascii") as ending:
                self.returncode = os.waitstatus_to_exitcode(int(ending.read()))
        return self.returncode


class _Server(NamedTuple):
    process: subprocess.Popen[bytes]
    requests: socket.socket


def _fork(program: str, request: bytes, descriptors: Sequence[int]) -> bytes:
    """Have a process forked that has the first three descriptors; return its ID. Its status is written to the last."""
    with _ONE_REQUEST:
        socket.send_fds(_server(program).requests, [request], descriptors)
        return _server(program).requests.recv(64)


@functools.cache
def python_in_shells() -> Path:
    """A directory for the PATH of a shell, in which `python elf.py` is forked, whichever copy of elf.py that is."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = f"{PACKAGE.name}-{os.getpid()}"
    listener.bind(f"\0{address}")
    listener.listen()

    def attend(client: socket.socket) -> None:
        with client:
            request, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 4)
            pid = _fork(str(ELF), request, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            client.send(pid)
            if not client.recv(64):  # it has been killed
                os.kill(int(pid), signal.SIGKILL)

    def serve() -> None:
        while True:
            threading.Thread(target=attend, args=listener.accept()[:1], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    python = directory / "python"
    forks = f'elf.py) exec "{sys.executable}" -IS "{_CLIENT}" {address} "$@";;'
    python.write_text(f'#!/bin/sh\ncase $1 in {forks} *) exec "{sys.executable}" "$@";; esac\n')
    python.chmod(0o755)
    return directory


@functools.cache
def _server(program: str) -> _Server:
    """This process's own server, which ends with this process."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        process = subprocess.Popen(
            [sys.executable, str(_SERVER), program, str(its.fileno())],
            env={**environment, "LANG": "C.UTF-8"},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal of the tests is not for it
        )
    return _Server(process, mine)
