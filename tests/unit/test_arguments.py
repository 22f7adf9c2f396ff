"""What may be typed after an option: each type of argument, and what is next to its limits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.program import constant

from iot_elf import arguments, text
from iot_elf.arguments import Parser
from iot_elf.errors import UsageError
from iot_elf.network import Endpoint


def check(parse: Callable[[str], Any], typed: str, value: object) -> None:
    """What is typed has this value, or none: then it is refused, in a sentence."""
    if value is not None:
        assert parse(typed) == value
        return
    with pytest.raises(argparse.ArgumentTypeError):
        parse(typed)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("1", 1),
        ("007", 7),
        ("999999999", 999_999_999),
        ("1000000000", None),
        *[(typed, None) for typed in ("0", "-1", "1.0", "", " 1", "1_0", "x", "\u0661")],
    ],
)
def test_a_whole_number_is_from_1_to_999999999(typed: str, value: int | None) -> None:
    check(arguments.positive_int, typed, value)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("3", [3]),
        ("thing_3", ["thing_3"]),
        ("hall:lamp_*,thing_[0-2],2", ["hall:lamp_*", "thing_[0-2]", 2]),
        *[(typed, None) for typed in ("0", "-1", "1.5", "", ",", "thing_0,", "thing_0,0")],
    ],
)
def test_things_are_a_number_or_names_and_patterns(typed: str, value: list[int | str] | None) -> None:
    check(arguments.thing_selection, typed, value)
    with pytest.raises(argparse.ArgumentTypeError, match="a number or name is missing in 'thing_0,'"):
        arguments.thing_selection("thing_0,")


@pytest.mark.parametrize(("typed", "value"), [("1", 1), ("100000", 100_000), ("100001", None), ("0", None)])
def test_a_fleet_has_at_most_as_many_things_as_aws_makes_in_three_hours(typed: str, value: int | None) -> None:
    check(arguments.thing_count, typed, value)


YEAR_S = 366 * 24 * 3600.0


@pytest.mark.parametrize(
    ("parse", "typed", "value"),
    [
        ("seconds", "0", 0.0),
        ("seconds", "0.5", 0.5),
        ("seconds", str(YEAR_S), YEAR_S),
        ("seconds", str(YEAR_S + 1), None),
        ("seconds", "1e300", None),
        ("seconds", "-0.001", None),
        ("seconds", "inf", None),
        ("seconds", "nan", None),
        ("seconds", "x", None),
        ("seconds", "", None),
        ("outage", "10/60", (10.0, 60.0)),
        ("outage", ".5/1.5", (0.5, 1.5)),
        *(("outage", typed, None) for typed in ("60/10", "10/10", "0/5", "5", "1/2/3", "-1/2", "1/inf", "1e1/60", "")),
        ("interval_s", "0.01", 0.01),
        ("interval_s", "0.009", None),
        ("interval_s", "0", None),
        ("interval_s", str(YEAR_S), YEAR_S),
        ("interval_s", "1e10", None),
        ("things_per_s", "0.1", 0.1),
        ("things_per_s", "1000", 1000.0),
        ("things_per_s", "0.09", None),
        ("things_per_s", "1001", None),
    ],
)
def test_a_number_is_between_its_limits(parse: str, typed: str, value: Any) -> None:
    check(getattr(arguments, parse), typed, value)


@pytest.mark.parametrize(
    ("typed", "is_valid"),
    [("a", True), ("A:b_-9", True), ("a" * 109, True), ("a" * 110, False), ("", False), ("a b", False), ("ä", False)],
)
def test_a_prefix_leaves_room_for_the_rest_of_a_client_id(typed: str, is_valid: bool) -> None:
    assert constant("MAX_CLIENT_ID_BYTES") == 128
    assert len("_999999999" + "-01234567") == 128 - 109
    check(arguments.thing_prefix, typed, typed if is_valid else None)


@pytest.mark.parametrize(
    ("typed", "endpoint"),
    [
        ("host", Endpoint("host", 0)),
        ("host:443", Endpoint("host", 443)),
        (":443", Endpoint("", 443)),
        ("host:65535", Endpoint("host", 65535)),
        ("host:1", Endpoint("host", 1)),
        ("[::1]", Endpoint("::1", 0)),
        ("[::1]:8883", Endpoint("::1", 8883)),
        ("host:65536", None),
        ("host:0", None),
        ("host:", None),
        (":", None),
        ("", None),
        ("::1", None),
        ("a/b", None),
        ("host:123456", None),
    ],
)
def test_a_broker_is_a_host_a_port_or_both(typed: str, endpoint: Endpoint | None) -> None:
    check(arguments.broker_endpoint, typed, endpoint)


@pytest.mark.parametrize(
    ("typed", "path"), [("/a/b", Path("/a/b")), ("a", Path.cwd() / "a"), ("~/a", Path.home() / "a"), ("", None)]
)
def test_a_directory_is_where_it_was_typed(typed: str, path: Path | None) -> None:
    check(arguments.directory_path, typed, path)


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    check(arguments.directory_path, "~nobody-of-this-name/a", None)


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("region", "US-WEST-2", "us-west-2"),
        ("region", "a b", None),
        ("endpoint_url", "HTTPS://iot/Path", "https://iot/Path"),
        ("endpoint_url", "https://me:password@iot", None),
        ("profile", "Me", "Me"),
        ("profile", "", None),
    ],
)
def test_a_part_of_a_place_is_checked_where_it_is_typed(key: str, typed: str, value: str | None) -> None:
    check(lambda it: arguments.place_part(it, key), typed, value)


@pytest.mark.parametrize(
    ("typed", "is_valid"), [("none", True), ("http://proxy", True), ("proxy:1", True), ("ftp://proxy", False)]
)
def test_a_proxy_is_a_url_or_none(typed: str, is_valid: bool) -> None:
    check(arguments.proxy_url, typed, typed if is_valid else None)


# The parser


@pytest.fixture
def parser() -> Parser:
    its = Parser(prog="elf.py")
    its.add_argument("--duration", type=arguments.seconds)
    its.add_argument("--output", choices=("json", "payload"))
    command = its.add_command(("send 'Hello'",), "have every thing send")
    command.add_argument("--interval", type=arguments.interval_s)
    its.add_command(("list",), "show the things")
    return its


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [
        (["--durations", "5"], "; did you mean --duration?"),
        (["--intervall", "5"], "; did you mean --interval?"),
        (["send", "--intrval=5"], "; did you mean --interval?"),
        (["lsit"], "; did you mean list?"),
        (["--output", "jsn"], "; did you mean json?"),
        (["--zzzz"], ""),
        (["--duration", "x"], ""),
        (["--dura", "5"], "; did you mean --duration?"),  # which a later option could break
    ],
)
def test_a_usage_error_is_one_line_that_says_what_may_have_been_meant(
    parser: Parser, capsys: pytest.CaptureFixture[str], typed: list[str], suggested: str
) -> None:
    with pytest.raises(UsageError) as raised:
        parser.parse_args(typed)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{raised.value.cause} ({raised.value.remedy})\n" in said
    assert (suggested in said) if suggested else ("did you mean" not in said)


def test_a_usage_error_shows_no_password_and_no_control_characters(
    parser: Parser, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset({"a-credential"}))
    with pytest.raises(UsageError):
        parser.parse_args(["send", "http://me:password@host", "\x1b[2J", "a-credential"])
    said = capsys.readouterr().err
    assert "http://***@host" in said
    assert "\x1b" not in said
    assert "a-credential" not in said


def test_an_option_of_a_command_is_an_error_of_this_command(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as raised:
        parser.parse_args(["send", "--interval", "0"])
    assert raised.value.remedy == "see `python elf.py send --help`"
    assert capsys.readouterr().err.startswith("elf.py send: error: ")


UUID = "01234567-89ab-CDEF-0123-456789abcdef"


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("", ""),  # --adopt alone
        (UUID, f"urn:uuid:{UUID}"),
        (f"urn:uuid:{UUID}", f"urn:uuid:{UUID}"),
        *[(typed, None) for typed in ("3", UUID[:-1], f"{UUID}0", f"{UUID}\n", "urn:uuid:", f"urn:{UUID}")],
    ],
)
def test_an_elf_id_may_be_typed_without_what_all_begin_with(typed: str, value: str | None) -> None:
    check(arguments.elf_id, typed, value)
