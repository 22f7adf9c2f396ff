"""--view: the things of a run as a table, on the terminal's second screen."""

from __future__ import annotations

import collections
import json
import os
import re

import pyte
import pytest
from support.machine import KeyPress, Terminal
from support.shell import Elf, InProcess, Pair

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"  # xterm's sequences
SEND = ("send", "--view", "--template", '{"temperature": {{ ramp(20.5, 1) }}}', "--interval", "0.15")
HEARD = """$ELF send $BROKER --quiet --duration 90 --interval 0.2 >/dev/null 2>&1 &
$ELF subscribe $BROKER --view {}; status=$?; kill $!; exit $status"""
TO_ITS_END = ".*?\x1b\\[H"  # the rest of a frame
HEAD = " +".join(("^thing", "state", "last message", "(sent|received)", "per s", "latency", "ago$"))


def shown(terminal: Terminal, columns: int, rows: int, view: int = -1) -> list[str]:
    """What the last frame of a view showed in a terminal of that size."""
    screen = pyte.Screen(columns, rows)
    before, _, last = terminal.views[view].rpartition("\x1b[H")
    pyte.Stream(screen).feed(before or last)  # the last one may not be whole, unless it is the only one
    return [line.rstrip() for line in screen.display]


def row_of(thing: str, lines: list[str]) -> str:
    (row,) = (line for line in lines if line.startswith(f"{thing} "))
    return row


def assert_left(terminal: Terminal, times: int = 1) -> None:
    """The second screen was left, with all that was changed for it."""
    assert terminal.written.count(ENTER) == terminal.written.count(LEAVE) == times
    assert "\x1b[?" not in terminal.written.rpartition(LEAVE)[2]
    assert not any("per s" in line for line in terminal.seen)


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (60, 20, r"▁\S+█ +\d\d\.5"),
        (80, 24, r"▁\S+█ +\{\"temperature\": \d\d\.5, \"ts\": \"1?…"),
        (200, 50, r"▁\S+█ +\{\"temperature\": \d\d\.5, \"ts\": \"[0-9.]+\"\}"),
    ],
    ids=["narrow", "usual", "wide"],
)
def test_each_thing_has_a_row_that_fits_and_the_report_follows(
    pair: Pair, columns: int, rows: int, message: str
) -> None:
    fifth = r"thing_1 [^H]+\b(2[4-9]|[3-9]\d)\.5[ ,][^m]" + TO_ITS_END  # or a later message; no time in ms
    keys: dict[str, KeyPress] = {fifth: lambda process: process.terminate()}
    terminal = pair.in_terminal(*SEND, *pair.to_broker, "--duration", 90, columns=columns, rows=rows, keys=keys)
    assert terminal.status == 143
    assert_left(terminal)
    lines = shown(terminal, columns, rows)
    head = next(number for number, line in enumerate(lines) if re.fullmatch(HEAD, line))
    assert re.search(r"sent \d+, acknowledged \d+.* 2/2 up.* s left.*worst latency \S+ m?s", " ".join(lines[:head]))
    assert len(lines[head]) == columns
    for row, thing in zip(lines[head + 1 :], ("thing_0", "thing_1"), strict=False):
        assert re.fullmatch(rf"{thing} +online +{message} +\d +\d\.\d +\d\S+ m?s +0\.\d s", row), row
    assert not any(lines[head + 3 :])
    assert re.search(r"ELF sent (\d+) messages from 2 things: \1 acknowledged, ?0 lost", "".join(terminal.seen))
    assert "posting message" not in terminal.written


def test_it_follows_the_window_and_shows_what_arrives(pair: Pair) -> None:
    arrived = "thing_1 [^H]+IoT EL" + TO_ITS_END
    keys: dict[str, KeyPress] = {arrived: os.terminal_size((60, 8)), r"\x1b\[2J.+\x1b\[2J.*" + arrived: b"\x03"}
    terminal = pair.in_terminal(script=HEARD.format("--duration 90"), columns=100, rows=30, keys=keys)
    assert terminal.status == 130
    wide, narrow = shown(terminal, 100, 30, 0), shown(terminal, 60, 8)
    assert len(next(line for line in wide if re.fullmatch(HEAD, line))) == 100
    assert len(next(line for line in narrow if re.fullmatch(HEAD, line))) == 60
    assert re.search(r'online +\{"msg": "IoT EL… +\d+ ', row_of("thing_1", narrow))
    assert re.search(r"received \d+ messages", "".join(terminal.seen))


def test_it_ends_with_its_run_whose_report_comes_last(pair: Pair) -> None:
    sent = pair.in_terminal(*SEND, *pair.to_broker, "--count", 9)
    heard = pair.in_terminal(script=HEARD.format("--count 36"))
    for terminal, said in (
        (sent, "ELF sent 18 messages from 2 things: 18 acknowledged, 0 lost$"),
        (heard, "received 36 messages"),
    ):
        assert terminal.status == 0
        assert_left(terminal)
        assert re.search(said, "".join(terminal.seen[-2:]))


def test_ctrl_c_and_sigterm_leave_the_terminal_as_it_was(pair: Pair) -> None:
    send = ("send", "--view", "--duration", 0)
    by_ctrl_c = pair.in_terminal(script=f"exec $ELF {' '.join(map(str, send))} $BROKER", keys={"Hello": b"\x03"})
    ended = pair.in_terminal(*send, *pair.to_broker, keys={"Hello": lambda process: process.terminate()})
    for terminal, status, name in ((by_ctrl_c, 130, "Ctrl-C"), (ended, 143, "SIGTERM")):
        assert terminal.status == status
        assert_left(terminal)
        assert any(f"interrupted ({name})" in line for line in terminal.seen)
        assert any(re.search(r"acknowledged, 0 lost$", line) for line in terminal.seen)


def test_ctrl_z_shows_the_shell_and_fg_shows_the_view_again(pair: Pair) -> None:
    """And the JSON lines are where they were sent."""
    send = "$ELF send $BROKER --view --output json --count 8 --interval 0.3 >lines"
    terminal = pair.in_terminal(script=f"{send}; echo stopped; sleep 0.5; fg", keys={"online": b"\x1a"})
    assert terminal.status == 0
    assert_left(terminal, times=2)
    assert "stopped" in terminal.seen
    events = collections.Counter(json.loads(line)["event"] for line in (pair.cwd / "lines").read_text().splitlines())
    assert events == {"sent": 16, "acknowledged": 16, "summary": 1}


def test_what_fails_comes_first_and_all_warnings_follow(elf: Elf) -> None:
    """There are more things than rows."""
    elf("create", 7)
    for number in (3, 4, 5, 6):
        (elf.misc / f"thing_{number}.prv").write_text("" if number % 2 else "no key")
    all_are_in = r"and \d more: (?!.*connecting)[^H]*online" + TO_ITS_END
    keys: dict[str, KeyPress] = {all_are_in: lambda process: process.terminate()}
    terminal = elf.in_terminal(*SEND, *elf.to_broker, "--duration", 90, columns=80, rows=8, keys=keys)
    assert terminal.status == 143
    assert_left(terminal)
    lines = shown(terminal, 80, 8)
    assert re.match(r"thing_3 +failed +the file \S+", row_of("thing_3", lines))
    assert any(re.fullmatch(r"and \d more: (.+, \d )?online", line) for line in lines)
    assert elf.in_terminal("send", "--view", *elf.to_broker, "--count", 1).status == 1
    warned = "".join(terminal.seen)
    assert re.search(r"(thing_\d: the file .+){2}2 of 7 things failed: .+\(thing_3, thing_5\)", warned)


def test_what_has_no_terminal_gets_no_view(main_of_pair: InProcess, pair: Pair) -> None:
    refused = main_of_pair("send", "--view", status=2)
    assert "--view needs a terminal" in refused.err
    for options, reason in (("--debug", "--debug"), ("--output json", "--output json need different places")):
        terminal = pair.in_terminal("send", "--view", *options.split())
        assert (terminal.status, ENTER in terminal.written) == (2, False)
        assert reason in " ".join(terminal.seen)
