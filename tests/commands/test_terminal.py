"""What a person sees in a terminal: bars, a live line, colours, and a large fleet's summaries."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from types import ModuleType

import pytest
from support.aws import Account, AwsService
from support.machine import Terminal
from support.networks import Relay
from support.shell import Elf, Pair

from iot_elf.console import progress_bar

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}:iot-elf:[A-Z]+ - .+")
SEEN = re.compile(r"\d\d:\d\d:\d\d \S.*")
BAR = re.compile(r"(create|policies|clean): +\d+%\|.*\| \d+/8 \[\d\d:\d\d<(\d\d:\d\d|\?), ([\d.]+|\?) things/s\]")
UP = r"\d/2 up \| \d+ s(?:, \d+ s left)?"
LIVE_SEND = re.compile(rf"sent (\d+), acknowledged (\d+)(?: \| (\d+\.\d)/s)? \| \d+\.\d ms \| {UP}")
LIVE_SUBSCRIBE = re.compile(rf"received (\d+)(?: \| \d+\.\d/s)?( \| -?\d+ ms)? \| {UP}")
LATENCY = r"p50 \d+\.\d, p95 \d+\.\d, p99 \d+\.\d, max \d+\.\d ms"
MANY = 25


def matches(pattern: re.Pattern[str], terminal: Terminal) -> list[re.Match[str]]:
    return [match for text in terminal.drawn if (match := pattern.search(text))]


def test_more_than_a_few_things_come_and_go_under_a_bar_and_whole_log_lines(elf: Elf, account: Account) -> None:
    for command, rate in (("create", ()), ("send", (*elf.to_broker, "--count", 1)), ("clean", ())):
        count = (8,) if command == "create" else ()
        terminal = elf.in_terminal(command, *count, *rate, "--rate", 100, columns=300)
        assert terminal.status == 0
        assert {match[1] for match in matches(BAR, terminal)} == {{"send": "policies"}.get(command, command)}
        assert [line for line in terminal.seen if not SEEN.fullmatch(line)] == []
    assert account.is_empty()


def test_a_few_things_need_no_bar(elf: Elf) -> None:
    assert "%|" not in elf.in_terminal("create", 3).written


def test_no_terminal_no_bar_no_live_line_and_no_colour(elf: Elf) -> None:
    for command in (
        ("create", 8, "--rate", 100),
        ("send", *elf.to_broker, "--count", 2, "--interval", "0.3"),
        ("clean",),
    ):
        result = elf(*command)
        assert [line for line in result.err.splitlines() if not LINE.fullmatch(line)] == []
        assert result.out == ""
        assert set("\r\x1b").isdisjoint(result.err)


def test_send_keeps_a_live_line_and_takes_it_away_again(pair: Pair) -> None:
    terminal = pair.in_terminal("send", *pair.to_broker, "--duration", "1.5", "--interval", "0.1", columns=300)
    live = matches(LIVE_SEND, terminal)
    sent, acknowledged = ([int(match[group]) for match in live] for group in (1, 2))
    assert sent == sorted(sent)
    assert acknowledged == sorted(acknowledged)
    assert 0 < sent[-1] <= 30
    assert any(float(match[3] or 0) > 0 for match in live)
    assert [line for line in terminal.seen if not SEEN.fullmatch(line)] == []
    late = r"at most \d+\.\d ms behind schedule"
    assert re.search(rf" [12]\.\d s, [12]\d\.\d messages/s, {late}$", terminal.seen[-4])
    for its, line in (("ack latency", terminal.seen[-3]), ("ack since due", terminal.seen[-2])):
        assert re.search(rf" {its}: {LATENCY}$", line)
    assert terminal.seen[-1].endswith("ELF sent 30 messages from 2 things: 30 acknowledged, 0 lost")


def test_the_live_line_of_subscribe_counts_and_measures_from_the_senders_ts(pair: Pair) -> None:
    sender = pair.start("send", *pair.to_broker, "--duration", "30", "--interval", "0.1")
    sender.await_line("posting message")
    terminal = pair.in_terminal("subscribe", *pair.to_broker, "--duration", "1.5", columns=300)
    live = matches(LIVE_SUBSCRIBE, terminal)
    assert int(live[-1][1]) > 0
    assert live[-1][2]
    assert [line for line in terminal.seen if not SEEN.fullmatch(line)] == []
    assert re.search(r" 1\.\d s, \d+\.\d messages/s$", terminal.seen[-3])
    assert re.search(rf" latency \(from ts, ±1 ms\): {LATENCY}$", terminal.seen[-2])


def test_a_frozen_broker_shows_at_once_and_so_does_a_lost_connection(
    pair: Pair, service: AwsService, relay: Relay
) -> None:
    def freeze() -> None:
        relay.await_arrivals(2)
        time.sleep(1.5)
        relay.silence()
        time.sleep(3)
        relay.unsilence()

    threading.Thread(target=freeze).start()
    send = ("send", *relay.to_broker(service), "--duration", "6", "--interval", "0.1")
    terminal = pair.in_terminal(*send, columns=80)
    assert terminal.status == 0
    stalled = matches(
        re.compile(r"sent (\d+), acknowledged (\d+) \| (\d+) waiting, up to (\d+\.\d) s \| (\d)/2 up"), terminal
    )
    sent, acknowledged, waiting = (int(stalled[0][group]) for group in (1, 2, 3))
    assert abs(sent - acknowledged - waiting) <= 2
    assert 1.0 <= float(stalled[0][4]) <= 2.5
    assert stalled[0][5] == "2"
    assert max(float(match[4]) for match in stalled) > 2.5
    assert any("0/2 up" in text for text in terminal.drawn)
    assert "".join(terminal.seen).replace(" ", "").endswith("120acknowledged,0lost")  # wrapped at a space, maybe
    left = [int(match[1]) for match in matches(re.compile(r" s, (\d+) s left$"), terminal)]
    assert left == sorted(left, reverse=True)
    assert left[0] in (5, 6)


def test_of_two_commands_in_one_terminal_the_one_in_the_background_draws_no_live_line(pair: Pair) -> None:
    talk = "$ELF send $BROKER --duration 2 --interval 0.1"
    script = f"$ELF subscribe $BROKER --duration 30 --count 80 & read -s; {talk}; wait"
    terminal = pair.in_terminal(script=script, columns=300, keys={"listening on": b"\n"})
    assert terminal.status == 0
    assert matches(LIVE_SEND, terminal)
    assert not matches(LIVE_SUBSCRIBE, terminal)
    assert [line for line in terminal.seen if not (SEEN.fullmatch(line) or line.startswith("[1]"))] == []
    assert sum(" ← elf/" in line for line in terminal.seen) == 80


def test_of_two_commands_in_the_foreground_each_writes_whole_lines_above_what_the_other_draws(pair: Pair) -> None:
    talk = "$ELF send $BROKER --duration 2 --interval 0.1"
    script = f"set +m; $ELF subscribe $BROKER --duration 30 --count 80 & read -s; {talk}; wait"
    terminal = pair.in_terminal(script=script, columns=300, keys={"received 0": b"\n"})
    assert terminal.status == 0
    assert matches(LIVE_SUBSCRIBE, terminal)
    assert matches(LIVE_SEND, terminal)
    assert [line for line in terminal.seen if not SEEN.fullmatch(line)] == []
    assert sum(" → elf/" in line for line in terminal.seen) == 40
    assert sum(" ← elf/" in line for line in terminal.seen) == 80


def test_a_quiet_command_clears_the_live_line_of_another(pair: Pair) -> None:
    """As `send --debug` does in the foreground of a shell's script."""
    script = "set +m; $ELF subscribe $BROKER --count 4 & read -s; $ELF send $BROKER -n 2 --debug; wait"
    terminal = pair.in_terminal(script=script, columns=300, keys={"received 0": b"\n"})
    assert matches(LIVE_SUBSCRIBE, terminal)
    assert [line for line in terminal.seen if not SEEN.fullmatch(line)] == []


def test_a_command_that_comes_to_the_foreground_begins_to_draw(pair: Pair) -> None:
    script = "$ELF subscribe $BROKER --duration 3 & read -s; echo now; fg"
    terminal = pair.in_terminal(script=script, columns=300, keys={"listening on": b"\n"})
    before, _, after = terminal.written.partition("now")
    assert not LIVE_SUBSCRIBE.search(before)
    assert LIVE_SUBSCRIBE.search(after)


@pytest.mark.parametrize("columns", [80, 200])
def test_no_line_about_a_message_is_wider_than_the_terminal(pair: Pair, columns: int) -> None:
    listen = "$ELF subscribe $BROKER --count 8 --things 1 & read -s"
    script = f"{listen}; $ELF send $BROKER --count 4 --interval 0.2; wait $!; $ELF send $BROKER -n 1 -t {'long/' * 7}"
    seen = pair.in_terminal(script=script, columns=columns, keys={"listening on": b"\n"}).seen
    *said, long, _ = [line for line in seen if re.search("[→←]", line)]
    assert re.search(r" thing_0 → (long/){7}  {.*…$" if columns == 80 else r" thing_0 → (long/){7}  {.+}$", long)
    assert len(long) <= columns
    assert len(said) == 16
    for line in said:
        assert re.search(r'^\d\d:\d\d:\d\d thing_[01] [→←] elf/thing_[01]  {"msg": "IoT ELF Hello", "ts": "', line)
        assert line.endswith("}")  # ELF's own message fits into 80 columns
    assert [line for line in seen if not (SEEN.fullmatch(line) or line.startswith("[1]"))] == []


def test_nothing_is_left_of_the_live_line_and_what_was_typed_over_it(pair: Pair) -> None:
    """And the counts at the end agree with those on the way, and with each other."""
    script = "$ELF send $BROKER --duration 0 --interval 0.1"
    terminal = pair.in_terminal(script=script, columns=80, keys={"acknowledged 9": b"\x03"})
    assert terminal.status == 130
    assert "^C" in terminal.written
    assert [line for line in terminal.seen if not SEEN.fullmatch(line) or "^C" in line or len(line) > 80] == []
    end = re.search(r"ELF sent (\d+) messages from 2 things: (\d+) acknowledged, (\d+) lost", terminal.written)
    assert end
    sent, acknowledged, lost = map(int, end.groups())
    assert sent == acknowledged + lost == sum(" → elf/" in line for line in terminal.seen)


@pytest.mark.parametrize("columns", [20, 40])
def test_the_live_line_fits_into_a_narrow_terminal(pair: Pair, columns: int) -> None:
    terminal = pair.in_terminal("send", *pair.to_broker, "--count", 5, "--interval", "0.2", columns=columns)
    live = [text for text in terminal.drawn if text.startswith("sent ")]
    assert live
    assert max(map(len, live)) < columns
    assert not any(line.startswith("sent ") for line in terminal.seen)


@pytest.mark.parametrize(
    ("done", "total", "took_s", "width", "is_utf", "bar"),
    [
        (0, 8, 0.2, 50, True, "create:   0%|          | 0/8 [00:00<?, ? things/s]"),
        (2, 8, 1.0, 55, True, "create:  25%|██▎      | 2/8 [00:01<00:03, 2.0 things/s]"),
        (3, 8, 4.0, 55, True, "create:  37%|███▍     | 3/8 [00:04<00:06, 0.8 things/s]"),
        (1, 8, 0.0, 50, True, "create:  12%|█▎        | 1/8 [00:00<?, ? things/s]"),
        (3, 8, 4.0, 55, False, "create:  37%|###      | 3/8 [00:04<00:06, 0.8 things/s]"),
        (8, 8, 80.0, 55, True, "create: 100%|█████████| 8/8 [01:20<00:00, 0.1 things/s]"),
        (29_999, 30_000, 7200.0, 20, True, "create:  99%|| 29999/30000 [120:00<00:00, 4.2 things/s]"),
    ],
)
def test_a_bar_is_as_long_as_its_part_of_the_line(
    module: ModuleType, done: int, total: int, took_s: float, width: int, is_utf: bool, bar: str
) -> None:
    assert progress_bar("create", done, total, took_s, width, is_utf) == bar


def test_bars_are_drawn_in_what_the_terminal_can_show(elf: Elf) -> None:
    def drawn(encoding: str) -> str:
        terminal = elf.in_terminal("create", 8, "--rate", 4, env={"PYTHONIOENCODING": encoding})
        elf("clean")
        return "".join(match[0] for match in matches(BAR, terminal))

    assert drawn("ascii").isascii()
    assert not drawn("utf-8").isascii()


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_warnings_and_errors_are_coloured_unless_the_user_minds(
    elf: Elf, environment: dict[str, str], coloured: bool
) -> None:
    terminal = elf.in_terminal("send", env=environment)
    assert terminal.status == 1
    errors = [line for line in terminal.drawn if re.search("no things yet|what to do", line)]
    assert len(errors) == 2
    for line in errors:
        pattern = r"\x1b\[2m{}\x1b\[0m \x1b\[31m[^\x1b]+\x1b\[0m" if coloured else r"{} ERROR: [^\x1b]+"
        assert re.fullmatch(pattern.format(r"\d\d:\d\d:\d\d"), line)
    assert bool(re.search(r"\x1b\[[\d;]*m", terminal.written)) == coloured
    assert ("\x1b" in terminal.written) == (environment.get("TERM") != "dumb")


def test_warnings_have_another_colour_than_errors_and_news_has_none(elf: Elf) -> None:
    elf("create", 1)
    (elf.misc / "things.json").chmod(0o644)
    warning, *news = (text for text in elf.in_terminal("create", 1).drawn if text != "\x1b[K")
    assert re.fullmatch(r"\x1b\[2m\d\d:\d\d:\d\d\x1b\[0m \x1b\[33m[^\x1b]+\x1b\[0m", warning)
    for line in news:
        assert re.fullmatch(r"\x1b\[2m\d\d:\d\d:\d\d\x1b\[0m [^\x1b]+", line)


def test_the_time_in_a_terminal_is_its_users(elf: Elf) -> None:
    before = time.time()
    line = elf.in_terminal("clean", env={"TZ": "XYZ-5:45"}).seen[-1]
    times = {time.strftime("%H:%M:%S", time.gmtime(before + 5.75 * 3600 + late_s)) for late_s in range(10)}
    assert line.partition(" ")[0] in times


def test_quiet_leaves_warnings_errors_and_the_last_report(elf: Elf) -> None:
    def quiet(*args: object, status: int = 0) -> list[str]:
        (seen, written) = (result := elf.in_terminal(*args, "--quiet")).seen, result.written
        assert result.status == status
        assert "%|" not in written
        assert " | " not in written
        return [line.partition(" ")[2] for line in seen]

    assert quiet("create", 8, "--rate", 100) == ["ELF created 8 things in us-west-2"]
    (elf.misc / "thing_0.prv").unlink()
    (elf.misc / "elf.json").chmod(0o644)
    sent = quiet("send", *elf.to_broker, "--count", 2, "--interval", "0.5", status=1)
    assert "could read" in sent[0]
    assert any("thing_0 has no file" in line for line in sent)
    assert any("ELF sent 14 messages from 7 things: 14 acknowledged, 0 lost" in line for line in sent)
    assert not any("→" in line or "subscribed" in line for line in sent)
    assert elf("clean", "--quiet").lines == ["[clean_up] ELF cleaned up 8 things, 0 left"]


@pytest.mark.parametrize("columns", [30, 50, 80, 300])
def test_a_created_thing_has_one_line_that_fits(elf: Elf, account: Account, columns: int) -> None:
    seen = elf.in_terminal("create", 2, "--prefix", "thing-----", columns=columns).seen
    for name in account.things():
        (line,) = (line for line in seen if f" {name}: " in line)
        assert len(line) <= columns
        said = line.partition(" ")[2]
        if columns >= 50:
            assert said.startswith(f"{name}: certificate {account.certificate_of(name)[:8]}")
        if columns == 80:
            assert said.endswith(f", .../{name}.{{pem,pub,prv}}")
        if columns == 300:
            assert said.endswith(f", {elf.misc}/{name}.{{pem,pub,prv}}")


def test_files_are_named_as_they_would_be_typed(elf: Elf) -> None:
    elf.cwd = elf.misc.parent
    text = "\n".join(elf.in_terminal("create", columns=80).seen)
    assert ", misc/thing_0.{pem,pub,prv}" in text
    assert "wrote 1 thing to misc/things.json" in text
    rows = [text for text in elf.in_terminal("list", columns=30).drawn if text.startswith(("NAME", "thing_0"))]
    assert [len(row) for row in rows] == [30, 30]


@pytest.fixture(scope="module")
def large_fleet(service: AwsService, tmp_path_factory: pytest.TempPathFactory) -> Elf:
    """A fleet that is too large for a line a thing."""
    account = Account(service)
    environment = account.credentials | {"AWS_ENDPOINT_URL": service.url}
    return Elf(tmp_path_factory.mktemp("large_fleet"), environment, service)


def test_a_large_fleet_has_summaries_and_with_verbose_a_line_a_thing(large_fleet: Elf) -> None:
    def assert_brief(command: str, brief: list[str], verbose: list[str], said: Callable[[int], str], each: int) -> None:
        assert len(brief) <= 12, command
        for number in range(MANY):
            assert sum(said(number) in line for line in brief) == 0
            assert sum(said(number) in line for line in verbose) >= each

    create = ("create", MANY, "--rate", 200)
    send = ("send", *large_fleet.to_broker, "--count", 1, "--rate", 200)
    clean = ("clean", "--rate", 200)
    brief = {command[0]: large_fleet(*command).lines for command in (create, send, clean)}
    verbose = {command[0]: large_fleet(*command, "--verbose").lines for command in (create, send, clean)}
    for command, each, said in (
        ("create", 4, "thing_{}"),
        ("send", 2, "thing_{}"),
        ("clean", 1, "Thing:'thing_{}' cleaned up"),
    ):
        assert_brief(command, brief[command], verbose[command], said.format, each)
    assert f"[create_things] ELF created {MANY} things in region:'us-west-2'." in brief["create"]
    assert brief["send"][-1].endswith(f"ELF sent {MANY} messages from {MANY} things: {MANY} acknowledged, 0 lost")
    assert brief["clean"][-1] == f"[clean_up] ELF cleaned up {MANY} things, 0 left"


def test_of_many_things_that_fail_alike_one_is_told_at_once_and_all_are_counted(large_fleet: Elf) -> None:
    large_fleet("create", MANY, "--rate", 200)
    large_fleet("send", *large_fleet.to_broker, "--count", 1, "--rate", 200)
    for path in large_fleet.misc.glob("*.prv"):
        path.write_text("")
    (large_fleet.misc / "thing_3.prv").unlink()
    brief, verbose = (
        large_fleet("send", *large_fleet.to_broker, *more, status=1).lines for more in ((), ("--verbose",))
    )
    large_fleet("clean", "--rate", 200)
    assert len(brief) <= 10
    assert [sum(bool(re.search(r"thing_\d+ is empty", line)) for line in lines) for lines in (brief, verbose)] == [
        1,
        24,
    ]
    names = [f"thing_{number}" for number in range(MANY) if number != 3]
    report = f"24 of {MANY} things failed: the file {large_fleet.misc}/<thing>.prv of <thing> is empty"
    assert f"{report} ({', '.join(names[:20])}, and 4 more)" in brief
    assert f"{report} ({', '.join(names)})" in verbose
    for lines in (brief, verbose):
        assert sum(line.startswith("thing_3 has no file") for line in lines) == 1
        assert f"1 of {MANY} things failed: thing_3" in lines
        assert sum(line.startswith("what to do: restore it") for line in lines) == 1


def test_of_many_things_that_are_not_complete_some_are_named(elf: Elf) -> None:
    elf("create", 1)
    entries = json.loads((elf.misc / "things.json").read_text())
    entries += [{f"thing_{number}": {"elf_stage": "creating"}} for number in range(1, 30)]
    (elf.misc / "things.json").write_text(json.dumps(entries))
    (line,) = (
        line for line in elf("send", *elf.to_broker, "--count", 1).lines if "skipping incomplete things: " in line
    )
    assert line.endswith(f", thing_20, and 9 more; finish with `{elf.typed} create 30`")


def test_json_in_a_pipe_keeps_the_live_line_on_the_terminal(pair: Pair) -> None:
    script = "$ELF send $BROKER --duration 1.5 --interval 0.1 --output json | cat >/dev/null"
    assert matches(LIVE_SEND, pair.in_terminal(script=script, columns=300))


def test_a_terminal_without_utf_8_gets_arrows_of_ascii(pair: Pair) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii:backslashreplace"}
    seen = pair.in_terminal("send", *pair.to_broker, "--count", 1, columns=120, env=ascii_only).seen
    assert sum(bool(re.search(r" thing_[01] -> elf/thing_[01]  {", line)) for line in seen) == 2
