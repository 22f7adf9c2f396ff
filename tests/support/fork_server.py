"""The server that forks processes of elf.py for `forking`: `python fork_server.py ELF DESCRIPTOR`."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any


def prepare(elf: str) -> Any:
    """Import what most commands import, and parse what botocore parses; return the code of elf.py."""
    sys.modules["awscrt"] = None  # type: ignore[assignment]  # as ELF does, unless it needs it
    import AWSIoTPythonSDK.core.protocol.mqtt_core
    import AWSIoTPythonSDK.MQTTLib  # noqa: F401
    import boto3
    from botocore_once import work_once

    del sys.modules["awscrt"]
    work_once(setattr)
    for service in ("sts", "iot"):
        client = boto3.client(service, "us-west-2", aws_access_key_id="nobody", aws_secret_access_key="none")
    client.can_paginate("list_things")
    sys.path[0] = str(Path(elf).parent)
    __import__("iot_elf.sign_in").sign_in.is_own_endpoint(None, "us-west-2")
    __import__("elf")
    del sys.modules["elf"]
    return compile(Path(elf).read_text(encoding="utf-8"), elf, "exec", dont_inherit=True)


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a process for each request, and tell its exit status; return in such a process, to run the command."""
    awake, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    endings: dict[int, int] = {}  # the pipe for the exit status of each process
    while True:
        ready, _, _ = select.select([requests, awake], [], [])
        if awake in ready:
            awake.recv(4096)
            tell_endings(endings)
        if requests not in ready:
            continue
        text, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not text:
            sys.exit()
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for target, descriptor in enumerate(descriptors[:3]):
                os.dup2(descriptor, target)
            os.closerange(3, 256)  # what is the server's, and other processes'
            for connection in (requests, awake, wake):
                connection.detach()
            return dict(json.loads(text))
        endings[pid] = descriptors.pop()
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(pid).encode())


def tell_endings(endings: dict[int, int]) -> None:
    while endings:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with os.fdopen(endings.pop(pid), "w", encoding="ascii") as ending:
            ending.write(str(status))


def become(args: list[str], cwd: str, env: dict[str, str], umask: int, new_session: bool) -> None:
    """Give this process what a started one would have."""
    if new_session:
        os.setsid()
    if umask >= 0:
        os.umask(umask)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.argv[:], sys.orig_argv[:] = args, [sys.executable, *args]
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        buffering = 1 if number == 2 or os.isatty(number) else -1
        stream = os.fdopen(number, "w", buffering, encoding="utf-8", errors=errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if "PYTHONPATH" in env:
        sys.path.insert(1, env["PYTHONPATH"])
        sys.modules.pop("sitecustomize", None)
        __import__("sitecustomize")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = prepare(sys.argv[1])
    gc.freeze()
    become(**serve(socket.socket(fileno=int(sys.argv[2]))))
    program = ModuleType("__main__")
    program.__file__ = sys.argv[0]
    sys.modules["__main__"] = program
    exec(code, vars(program))
