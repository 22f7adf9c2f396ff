"""Record view.svg, the picture of --view in the README: its last moment, with a thing whose key is lost.

usage: pip install -r docs/requirements.txt && python docs/record_view.py
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pyte
import record

HERE = Path(__file__).resolve().parent
THINGS = 30
END = b"\x1b[?7h"  # is written when the view ends
TEMPLATE = '{"temperature": {{ walk(20, 0.8, 10, 30)|round(1) }}, "door": "{{ choice(\'open\', \'shut\') }}"}'
record.COLUMNS, record.ROWS = 80, 18
record.COLOURS["cyan"] = "#7fdbca"


def run(directory: Path, *arguments: str) -> bytes:
    """Run elf.py in a terminal of its own, and return what it writes until the view ends, or it does."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", record.ROWS, record.COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "ELF_MISC_DIR": str(directory)}
    command = [sys.executable, str(HERE.parent / "elf.py"), *arguments]
    process = subprocess.Popen(command, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(mine, 65536):
            written += chunk
    process.wait()
    return written.partition(END)[0]


def main() -> None:
    directory = Path(tempfile.gettempdir(), "misc")  # which is seen
    directory.mkdir()
    try:
        run(directory, "--local", "create", str(THINGS), "--prefix", "lamp", "--rate", "100")
        run(directory, "send", "--count", "1")
        (directory / "lamp_7.prv").write_text("")
        frames = run(directory, "send", "--view", "--duration", "9.7", "--interval", "0.5", "--template", TEMPLATE)
        run(directory, "clean", "--rate", "100")
    finally:
        shutil.rmtree(directory)
    screen = pyte.Screen(record.COLUMNS, record.ROWS)
    pyte.ByteStream(screen).feed(frames.rpartition(b"\x1b[H")[0].replace(b"\x1b[7m", b"\x1b[90m"))
    lines = tuple(record.line_of(screen.buffer[row]) for row in range(record.ROWS))
    picture = record.svg_of([record.Frame(0.0, lines)]).replace(
        "create, send, subscribe, list and clean", "send --view"
    )
    (HERE / "view.svg").write_text(picture, encoding="utf-8")
    print("\n".join(screen.display))


if __name__ == "__main__":
    main()
