"""The server that forks processes for `forking`: `python fork_server.py PROGRAM DESCRIPTOR`.

PROGRAM is the path of elf.py, or `locust`, which replaces functions of Python's when it is imported: those that the
server itself calls are taken before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
from os import close, fork, waitpid
from pathlib import Path
from select import select
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def prepare(program: str) -> Any:
    """Import what most commands import, and parse what botocore parses; return the code to run."""
    if program == "locust":
        import locust.main  # noqa: F401
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
    sys.path[0] = str(ROOT)
    __import__("iot_elf.sign_in").sign_in.is_own_endpoint(None, "us-west-2")
    __import__("elf")
    if program == "locust":
        sys.path[0] = ""
        return compile("from locust.main import main\nmain()", program, "exec")
    del sys.modules["elf"]
    return compile(Path(program).read_text(encoding="utf-8"), program, "exec", dont_inherit=True)


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a process for each request, and tell its exit status; return in such a process, to run the command."""
    running: dict[int, tuple[int, int]] = {}  # by what tells its end: a process, and the pipe for its exit status
    while True:
        ready, _, _ = select([requests, *running], [], [])
        for ended in running.keys() & ready:
            pid, ending = running.pop(ended)
            status = str(waitpid(pid, 0)[1]).encode()
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                os.write(ending, status)
            close(ending)
            close(ended)
        if requests not in ready:
            continue
        text, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not text:
            sys.exit()
        pid = fork()
        if not pid:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for target, descriptor in enumerate(descriptors[:3]):
                os.dup2(descriptor, target)
            for each in (*descriptors, *running, *(ending for _, ending in running.values()), requests.detach()):
                close(each)
            if "gevent" in sys.modules:
                sys.modules["gevent"].reinit()  # Locust's, whose loop makes files of its own
            return dict(json.loads(text))
        running[os.pidfd_open(pid)] = pid, descriptors.pop()
        for descriptor in descriptors:
            close(descriptor)
        requests.send(str(pid).encode())


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
    requests = socket.socket(fileno=int(sys.argv[2]))
    code = prepare(sys.argv[1])
    gc.freeze()
    become(**serve(requests))
    program = ModuleType("__main__")
    program.__file__ = sys.argv[0]
    sys.modules["__main__"] = program
    exec(code, vars(program))
