"""Words and numbers for people, and what nobody may read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.program import constant

from iot_elf import defaults, text

from .stand_ins import logged

KEY = "AKIAIOSFODNN7EXAMPLE"
AWKWARD = 'a/secret+with\\"quotes"\'and\n=more'


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset())


@pytest.mark.parametrize(
    ("secret", "shown", "becomes"),
    [
        (KEY, f"key {KEY}, again {KEY}", "key ***, again ***"),
        (KEY[:16], KEY[:16], "***"),
        (KEY[:15], KEY[:15], KEY[:15]),  # may be a word
        ("", "nothing", "nothing"),
        (None, "None", "None"),
        ("secret/with+16+characters", "secret%2Fwith%2B16%2Bcharacters", "***"),
        ("secret/with+16+characters", "secret/with%2B16%2Bcharacters", "***"),
        ('quote"d-secret-of-some', r"quote\"d-secret-of-some", "***"),
        ("line\nend-in-the-secret", r"line\nend-in-the-secret", "***"),
        ("ünicode-in-the-secret", r"\xfcnicode-in-the-secret", "***"),
        ("ünicode-in-the-secret", r"\u00fcnicode-in-the-secret", "***"),
        ("two-halves-of-a-secret another-half-of-it", "a two-halves-of-a-secret", "a ***"),
    ],
)
def test_a_secret_is_hidden_however_it_is_written(secret: str | None, shown: str, becomes: str) -> None:
    text.add_secret(secret)
    assert text.redacted(shown) == becomes


def test_a_longer_secret_is_hidden_before_a_part_of_it() -> None:
    text.add_secret(KEY, KEY + "/and-a-token", f"{KEY}:of-more")
    assert text.redacted(f"{KEY}/and-a-token {KEY}:of-more") == "*** ***"


def test_a_short_password_is_hidden_if_it_is_known_to_be_one() -> None:
    text.add_secret("four", "abc", least=4)
    assert text.redacted("four abc") == "*** abc"


def test_in_json_values_are_hidden_and_neither_its_words_nor_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset({"true", "null", "name", "1234"}))
    value = {"name": "a true name", "local": True, "endpoint": None, "count": 1234, "things": ["null", ("1234",)]}
    hidden = {"name": "a *** ***", "local": True, "endpoint": None, "count": 1234, "things": ["***", ["***"]]}
    assert text.redacted_values(value) == hidden


@pytest.mark.parametrize(
    ("name", "value", "hidden", "shown"),
    [
        ("AWS_ACCESS_KEY_ID", KEY, KEY, ""),
        ("AWS_SECRET_ACCESS_KEY", KEY, KEY, ""),
        ("AWS_SESSION_TOKEN", KEY, KEY, ""),
        ("AWS_SECURITY_TOKEN", KEY, KEY, ""),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN", KEY, KEY, ""),
        ("AWS_ACCESS_KEY_ID_OF_OTHERS", KEY, "", KEY),
        ("AWS_PROFILE", "a-long-name-of-a-profile", "", "a-long-name-of-a-profile"),
        ("HTTPS_PROXY", "http://me:word@proxy", "me:word word", "me proxy"),
        ("all_proxy", "me:word@proxy", "me:word word", "proxy"),
        ("HTTPS_PROXY", "http://proxy:3128", "", "http://proxy:3128"),
        ("AWS_ENDPOINT_URL_IOT", "https://me:word@iot/path", "word", "iot"),
        ("MY_PROXY_NAME", "http://me:word@proxy", "", "word"),
    ],
)
def test_credentials_in_the_environment_are_hidden(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, hidden: str, shown: str
) -> None:
    monkeypatch.setenv(name, value)
    text.hide_environment()
    for word in hidden.split():
        assert text.redacted(word) == "***"
    assert text.redacted(shown) == shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain, ü and 漢", "plain, ü and 漢"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\u202e", r"\u202e"),  # writes what follows from right to left
        ("", ""),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(given: str, shown: str) -> None:
    assert text.printable(given) == shown


def test_bytes_that_are_no_text_are_shown_as_numbers() -> None:
    assert text.decoded("ü".encode() + b"\xff") == "ü\\xff"


@pytest.mark.parametrize(("number", "said"), [(0, "0 things"), (1, "1 thing"), (2, "2 things")])
def test_one_thing_is_a_thing(number: int, said: str) -> None:
    assert text.plural(number, "thing") == said


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["thing_10", "thing_9", "thing_1"], ["thing_1", "thing_9", "thing_10"]),
        (["b_1", "a_2"], ["a_2", "b_1"]),
        (["a_b_2", "a_b_10", "a_1"], ["a_1", "a_b_2", "a_b_10"]),
        (["thing_x", "thing_1"], ["thing_x", "thing_1"]),
        (["thing", "_5", "thing_²"], ["thing", "_5", "thing_²"]),
    ],
)
def test_things_are_in_the_order_of_their_numbers(names: list[str], ordered: list[str]) -> None:
    assert sorted(names, key=text.by_number) == ordered


@pytest.mark.parametrize(("number", "end"), [(1, ""), (20, ""), (21, ", and 1 more"), (25, ", and 5 more")])
def test_of_many_things_the_first_twenty_are_named(number: int, end: str) -> None:
    assert constant("MAX_LISTED") == 20
    names = [f"t_{each}" for each in range(number)]
    with logged(20):
        assert text.listed(reversed(names)) == ", ".join(names[:20]) + end
    with logged(defaults.VERBOSE):
        assert text.listed(names) == ", ".join(names)


def test_a_time_is_shown_in_utc() -> None:
    assert text.utc_time(1_700_000_000.9) == "2023-11-14 22:13:20 UTC"


def test_a_path_is_shown_as_it_would_be_typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert text.short_path(tmp_path / "here" / "a" / "b") == Path("a/b")
    assert text.short_path(tmp_path / "other") == tmp_path / "other"
    (tmp_path / "here").rmdir()
    assert text.short_path(tmp_path / "here" / "a") == tmp_path / "here" / "a"


@pytest.mark.parametrize(
    ("begun", "uv", "options", "command"),
    [
        (["python", "elf.py", "send"], "", "", "python elf.py"),
        (
            ["venv/bin/python3", "-u", "../elf.py", "list"],
            "",
            "--misc-dir /x ",
            "venv/bin/python3 -u ../elf.py --misc-dir /x",
        ),
        (["/cache/python", "elf.py", "send"], "/bin/uv", "", "uv run elf.py"),
        (["python3", "/an other/elf.py"], "", "", "python3 '/an other/elf.py'"),
        (["python", "-m", "locust"], "", "--misc-dir /x ", "python elf.py --misc-dir /x"),
    ],
)
def test_commands_of_remedies_begin_as_the_user_began(
    begun: list[str], uv: str, options: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = next((word for word in begun if word.endswith("elf.py")), "locust")
    monkeypatch.setattr(sys, "orig_argv", begun)
    monkeypatch.setattr(sys, "argv", [script, *begun[begun.index(script) + 1 :]])
    monkeypatch.setenv("UV", uv)
    monkeypatch.setattr(text, "typed_as", {**text.typed_as, "aws": "aws --region R"})
    text.remember_how_elf_was_typed(options)
    assert text.as_typed("finish with `elf.py clean`") == f"finish with `{command} clean`"
    assert text.as_typed("`elf.py create 3`") == f"`{command} create 3`"
    text.typed_as["elf.py create"] = f"{command} --local create"  # of a local fleet
    assert text.as_typed("`elf.py create`, `elf.py clean`") == f"`{command} --local create`, `{command} clean`"
    assert text.as_typed("`… | elf.py send -`, `aws iot x`, `aws login`, elf.py is a file") == (
        f"`… | {command} send -`, `aws --region R iot x`, `aws login`, elf.py is a file"
    )


@pytest.mark.parametrize(
    ("names", "typed"),
    [
        (["thing_10", "thing_9"], "thing_9 thing_10"),
        (["-a_0", "thing_0"], "-- -a_0 thing_0"),
        ([f"thing_{number}" for number in range(20)], " ".join(f"thing_{number}" for number in range(20))),
        ([f"thing_{number}" for number in range(21)], "NAME…"),
    ],
)
def test_a_command_names_up_to_20_things(names: list[str], typed: str) -> None:
    assert text.typed_names(names) == typed


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ('{\n  "a": 1,\r\n\t"b": 2\n}', '{ "a": 1, "b": 2 }'),
        ("[1,\n 2]", "[1, 2]"),
        ('{"two  words": "a\\nb"}', '{"two  words": "a\\nb"}'),
        ("text\n  as it is", "text\n  as it is"),
        ("", ""),
    ],
)
def test_only_json_is_shown_without_its_line_breaks(message: str, shown: str) -> None:
    assert text.on_one_line(message) == shown
