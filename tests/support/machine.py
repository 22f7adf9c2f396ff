"""This machine: ports and processes, a terminal of one's own, and what a system can deny to a user's Python."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import random
import re
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import pyte
import pytest

from support.program import TESTS

if TYPE_CHECKING:
    from support.shell import Elf

PATIENCE_S = 60.0  # how long a test waits for what is to come; it fails afterwards
# What the Python of an elf.py under test loads, by PYTHONPATH, before it begins.
WITNESS = TESTS / "support" / "witness"
SLOW_DISK = TESTS / "support" / "slow_disk"
AS_ON_WINDOWS = TESTS / "support" / "as_on_windows"

# What this machine has configured is none of a test's business. It stays away: nothing else runs in this process.
for _name in list(os.environ):
    if _name.upper().startswith(("AWS_", "ELF_")) or _name.upper().endswith("_PROXY"):
        del os.environ[_name]
os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}


def clean_environment(home: Path) -> dict[str, str]:
    """The environment of a user who has configured nothing."""
    kept = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if key in os.environ}
    return kept | {"HOME": str(home), "LANG": "C.UTF-8", "AWS_EC2_METADATA_DISABLED": "true"}


def free_port() -> int:
    """A port that nobody uses, and that the system does not give to a connection meanwhile (Linux: from 32768 on)."""
    chance = random.SystemRandom()  # another one in each worker, whoever has seeded Python's own
    while True:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", chance.randrange(10_000, 32_000))) as its:
            return int(its.getsockname()[1])


def await_listener(port: int) -> None:
    """Wait until somebody listens on a port of this machine."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection(("localhost", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nobody listens on port {port}"
            time.sleep(0.05)  # there is no event to wait for


def servers_of(elf: Elf) -> list[psutil.Process]:
    """The processes that work on a misc/, which are the embedded AWS IoT's."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(elf.misc) in " ".join(process.info["cmdline"] or ())
    ]


def kill_servers_of(elf: Elf) -> None:
    for process in servers_of(elf):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def await_end(process: psutil.Process) -> None:
    """Wait until a process that is not our child has ended, be it reaped or not."""
    deadline = time.monotonic() + PATIENCE_S
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{process} does not end"
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(0.05)


SECOND_SCREEN = re.compile(r"\x1b\[\?1049h(.*?)\x1b\[\?1049l", re.DOTALL)


class Terminal(NamedTuple):
    """A terminal in which a command has run."""

    status: int
    written: str  # with all that moves the cursor and colours
    columns: int

    @property
    def views(self) -> list[str]:
        """What was drawn on its second screen, which pyte has not, from one clearing of it to the next."""
        return "".join(SECOND_SCREEN.findall(self.written)).split("\x1b[2J")[1:]

    @property
    def seen(self) -> list[str]:
        """What it shows in the end, and what has scrolled away."""
        screen = pyte.HistoryScreen(self.columns, 24, history=10_000)
        pyte.Stream(screen).feed(SECOND_SCREEN.sub("", self.written))
        gone = ["".join(row[column].data for column in range(self.columns)) for row in screen.history.top]
        return [line.rstrip() for line in (*gone, *screen.display) if line.strip()]

    @property
    def drawn(self) -> list[str]:
        """All that was ever written between two returns of the cursor."""
        return [text for text in re.split(r"[\r\n]+", self.written) if text.strip()]


# What a user does: types; something else, a signal, say; or gives the terminal's window another size.
KeyPress = bytes | Callable[[subprocess.Popen[Any]], object] | os.terminal_size


def resize(terminal: int, columns: int, rows: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def run_in_terminal(
    start: Callable[..., subprocess.Popen[Any]],
    columns: int = 120,
    keys: Mapping[str, KeyPress] | None = None,
    rows: int = 24,
) -> Terminal:
    """Run what `start` starts, given settings of subprocess.Popen(), to its end in a terminal of its own.

    When it has written what a pattern in `keys` matches, that one's are typed there. It is left as it was.
    """
    mine, its = pty.openpty()
    before = termios.tcgetattr(mine)
    resize(its, columns, rows)
    process = start(stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    written, untyped = b"", dict(keys or {})
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while chunk := os.read(mine, 65536):
            written += chunk
            for pattern in [each for each in untyped if re.search(each.encode(), written, re.DOTALL)]:
                key = untyped.pop(pattern)
                if isinstance(key, bytes):
                    os.write(mine, key)
                elif isinstance(key, os.terminal_size):
                    resize(mine, *key)
                else:
                    key(process)
    assert termios.tcgetattr(mine) == before
    os.close(mine)
    return Terminal(process.wait(PATIENCE_S), written.decode("utf-8"), columns)


# What is done before elf.py runs, as Python code. `command` is what will: the Python, elf.py and its arguments.
# Root may read and write everything, unless it has lost CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
NOT_AS_ROOT = """
import ctypes
if os.getuid() == 0:
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
"""
WITHOUT_PACKAGES = "command.insert(1, '-S')"
ONE_PORT = "echo 40000 40000 > /proc/sys/net/ipv4/ip_local_port_range"
WITH_ONE_FREE_PORT = f"""command[:0] = ['unshare', '-rn', 'sh', '-c', '{ONE_PORT} && exec "$@"', 'sh']"""


def limited(resource: str, limit: int) -> str:
    return f"import resource; resource.setrlimit(resource.{resource}, ({limit}, {limit}))"


def read_only(directory: Path) -> str:
    remount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    return f"command[:0] = ['unshare', '-rm', 'sh', '-c', {remount!r}, {str(directory)!r}]"


def hamper(elf: Elf, directory: Path, code: str) -> None:
    """Have all that a user runs from now on run after this code."""
    wrapper = directory / "python"
    wrapper.write_text(
        f"#!{sys.executable}\nimport os, sys\ncommand = [{elf.python!r}, *sys.argv[1:]]\n"
        f"{code}\nos.execvp(command[0], command)\n"
    )
    wrapper.chmod(0o700)
    elf.python = str(wrapper)


def with_slow_disk(steps: int, slow_s: float) -> dict[str, str]:
    """Have each fsync() take a while, and the process die at the one of this number."""
    return {"PYTHONPATH": str(SLOW_DISK), "STEPS": str(steps), "SLOW": str(slow_s)}


def can_unshare() -> bool:
    """Say whether a user of this machine may make namespaces, in which a disk or the network is another one."""
    try:
        return not subprocess.run(
            ["unshare", "-rmn", "sh", "-c", ONE_PORT], capture_output=True, check=False
        ).returncode
    except FileNotFoundError:
        return False


posix_only = pytest.mark.skipif(os.name != "posix", reason="links, modes, limits and locks of directories are POSIX's")
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount")
