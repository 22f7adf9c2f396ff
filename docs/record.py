"""Record elf.svg, the picture in README: its quick start and `send --verify`, typed at a shell in a pseudo-terminal.

It is quicker than what it shows, and begins with a result, before which no viewer has to wait.

usage: pip install -r docs/requirements.txt && python docs/record.py
"""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

import pyte
from pyte.screens import Char

HERE = Path(__file__).resolve().parent
COLUMNS, ROWS = 90, 26
FRAME_S = 0.25  # no two pictures are closer in the terminal
TYPING_SPEED, RUNNING_SPEED = 2.0, 5.0  # of the picture
RESULT_S = 1.5  # how long a command's result is shown
LONGEST_S = 2.0  # of a picture, but for the last
LAST_S = 2.0
RESULT = "came back: "  # of the command whose result is shown first
COMMAND_S = 120.0  # no command takes longer
PROMPT = "$ "
CHAR_WIDTH, LINE_HEIGHT, MARGIN = 8.4, 19, 14
COLOURS = {
    "default": "#d6deeb",
    "red": "#ff6b6b",
    "brown": "#e5c07b",
    "yellow": "#e5c07b",
    "green": "#7ec699",
    "brightblack": "#7d8799",
}


def commands() -> list[str]:
    """Return the command lines of README's quick start, without what sets up the virtual environment, and --verify."""
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Quick start")[2].partition("\n## ")[0]
    lines = list(dict.fromkeys(re.findall(r"^(?:.*?&& )??(python elf\.py .*)$", section, re.MULTILINE)))
    verify = re.findall(r"^python elf\.py send --verify.*$", readme, re.MULTILINE)
    place = lines.index("python elf.py list")
    return lines[:place] + verify + lines[place:]


class Frame(NamedTuple):
    at: float  # seconds of the picture
    lines: tuple[str, ...]  # each an SVG text's content


def line_of(row: dict[int, Char]) -> str:
    """Make the spans of one line."""
    cells = [row[column] for column in range(COLUMNS)]
    while cells and cells[-1].data == " ":
        cells.pop()
    spans: list[tuple[str, str]] = []
    for cell in cells:
        colour = COLOURS.get(cell.fg, COLOURS["default"])
        if spans and spans[-1][0] == colour:
            spans[-1] = (colour, spans[-1][1] + cell.data)
        else:
            spans.append((colour, cell.data))
    return "".join(
        escape(text) if colour == COLOURS["default"] else f'<tspan fill="{colour}">{escape(text)}</tspan>'
        for colour, text in spans
    )


def record(directory: Path) -> Iterator[Frame]:
    """Type the commands at a shell in a clone of ELF, and yield what the terminal shows."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(directory),
        "TERM": "xterm-256color",
        "LANG": "C.UTF-8",
        "PS1": PROMPT,
    }
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        cwd=directory,
        env=environment,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    shown: tuple[str, ...] = ()
    at, looked_at = 0.0, time.monotonic()

    def look(speed: float) -> Iterator[Frame]:
        nonlocal shown, at, looked_at
        until = time.monotonic() + FRAME_S * speed / TYPING_SPEED
        while (left_s := until - time.monotonic()) > 0:
            if select.select([mine], [], [], left_s)[0]:
                stream.feed(os.read(mine, 65536).replace(b"\x1b[2m", b"\x1b[90m"))  # pyte knows no dimmed text
        now = time.monotonic()
        at, looked_at = at + (now - looked_at) / speed, now
        lines = tuple(line_of(screen.buffer[row]) for row in range(ROWS))
        if lines != shown:
            shown = lines
            yield Frame(at, lines)

    def await_prompt() -> Iterator[Frame]:
        deadline = time.monotonic() + COMMAND_S
        while not (screen.display[screen.cursor.y].rstrip() == PROMPT.rstrip() and screen.cursor.x == len(PROMPT)):
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(("there is no prompt:", *screen.display)))
            yield from look(RUNNING_SPEED)

    yield from await_prompt()
    for command in commands():
        for start in range(0, len(command), 7):
            os.write(mine, command[start : start + 7].encode())
            yield from look(TYPING_SPEED)
        os.write(mine, b"\n")
        yield from look(TYPING_SPEED)
        yield from await_prompt()
        at += RESULT_S
    shell.kill()
    shell.wait()


def svg_of(frames: list[Frame]) -> str:
    """Make the pictures one animation: all are drawn side by side, and slide past a window."""
    lengths_s = [min(after.at - frame.at, LONGEST_S) for frame, after in itertools.pairwise(frames)]
    total_s = sum(lengths_s) + LAST_S
    width, height = round(COLUMNS * CHAR_WIDTH + 2 * MARGIN), ROWS * LINE_HEIGHT + 2 * MARGIN
    steps, passed_s = [], 0.0
    for number, length_s in enumerate([*lengths_s, LAST_S]):
        steps.append(f"{100 * passed_s / total_s:.3f}%{{transform:translateX({-number * width}px)}}")
        passed_s += length_s
    known: dict[str, int] = {}
    pictures = []
    for number, frame in enumerate(frames):
        uses = "".join(
            f'<use href="#l{known.setdefault(line, len(known))}" y="{MARGIN + (row + 1) * LINE_HEIGHT - 5}"/>'
            for row, line in enumerate(frame.lines)
            if line
        )
        pictures.append(f'<g transform="translate({number * width + MARGIN})">{uses}</g>')
    lines = "".join(f'<text id="l{number}" xml:space="preserve">{line}</text>' for line, number in known.items())
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<title>elf.py in a terminal: create, send, subscribe, list and clean</title>
<style>
text{{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:{COLOURS["default"]}}}
@keyframes run{{{"".join(steps)}}}
#film{{animation:run {total_s:.2f}s step-end infinite}}
@media(prefers-reduced-motion){{#film{{animation:none}}}}
</style>
<defs>{lines}</defs>
<rect width="100%" height="100%" rx="8" fill="#1b2330"/>
<g id="film">{"".join(pictures)}</g>
</svg>
"""


def main() -> None:
    directory = Path(tempfile.gettempdir(), "elf")  # which is seen
    directory.mkdir()
    try:
        shutil.copy(HERE.parent / "elf.py", directory)
        shutil.copytree(HERE.parent / "iot_elf", directory / "iot_elf")
        frames = list(record(directory))
        first = next(frame for frame in frames if any(RESULT in line for line in frame.lines) and "$" in frame.lines)
        frames.insert(0, first._replace(at=frames[0].at - RESULT_S))
    finally:
        shutil.rmtree(directory)
    (HERE / "elf.svg").write_text(svg_of(frames), encoding="utf-8")
    length_s, size = frames[-1].at - frames[0].at + LAST_S, (HERE / "elf.svg").stat().st_size
    print(f"{len(frames)} pictures, {length_s:.0f} s, {size // 1024} KiB")


if __name__ == "__main__":
    main()
