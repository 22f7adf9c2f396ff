"""What a user types, and what comes back: usage, help, exit statuses, the log, the directory that is used."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from calendar import timegm
from pathlib import Path
from types import ModuleType

import pytest
from support.aws import REGION, SECRET, Account, AwsService
from support.mqtt import mqtt_client_of
from support.program import ELF, ROOT, copy_program
from support.shell import Elf, InProcess, Pair

ONCE = ("--duration", "0.01")


def test_no_command_prints_the_commands_and_what_comes_next_and_exits_2(elf: Elf) -> None:
    result = elf(status=2)
    assert elf("--help").out.startswith(result.out)
    assert "  clean  " in result.out
    assert result.err == f"all options: {elf.typed} --help\nnow: {elf.typed} --local create 3\n"
    assert (result.out + result.err).count("\n") < 24  # of a terminal
    elf("create")
    assert elf(status=2).err.endswith(f"\nnow: {elf.typed} send\n")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("create", ["COUNT", "default: 1", "--prefix", "default: thing"]),
        (
            "send",
            [
                *("IoT ELF Hello", "--json-message", "--topic", "elf/<thing>", "--append-thing-name", "--duration"),
                *("default: 10", "--interval", "default: 1", "--qos", "--root-cert", "--mqtt-endpoint", "8883", "443"),
            ],
        ),
        (
            "subscribe",
            [
                *("--topic", "elf/#", "--append-thing-name", "--duration", "default: 10", "--count", "--qos"),
                *("--root-cert", "--mqtt-endpoint", "8883"),
            ],
        ),
        ("list", ["Show", "AWS"]),
        ("env", ["variables", "AWS CLI", "boto3"]),
        ("clean", ["--only-local", "--force"]),
    ],
)
def test_help_has_a_description_its_options_with_defaults_and_examples_and_no_more(
    main: InProcess, command: str, says: list[str]
) -> None:
    text = main(command, "--help").out
    assert text.count("\n") <= (24 if command in ("create", "list", "env", "clean") else 56)  # screens
    description = text.split("\n\n")[1]
    assert description.endswith(".")
    for each in says:
        assert each in text
    examples = [line.strip() for line in text.partition("examples:")[2].splitlines() if command in line]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example.partition(" <")[0])
        assert words[:2] == ["python", "elf.py"]
        main.module.build_parser().parse_args(words[2:])
    assert text.endswith(": python elf.py --help\n")
    of_all = ("--region", REGION, "--profile", "--endpoint-url", "--local", "--misc-dir", "--debug", "--version")
    for each in of_all:
        assert each in main("--help").out
    assert not [each for each in of_all if f"\n  {each}" in text]


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("send -t a/b -q 0 -m hi -n 3", "send --topic a/b --qos 0 --count 3 hi"),
        ("send -ta/b -q0 -mhi -n3", "send hi --topic=a/b --qos=0 --count=3"),
        ("send -m MESSAGE", "send MESSAGE"),
        ("subscribe -t a -t b/# -q 0 -C 2", "subscribe --topic a --topic b/# --qos 0 --count 2"),
    ],
)
def test_short_options_are_those_of_mosquitto(module: ModuleType, short: str, long: str) -> None:
    def parsed(line: str) -> dict[str, object]:
        return vars(module.build_parser().parse_args(line.split(), module.Cli()))

    assert parsed(short) == parsed(long)


def test_help_lists_the_commands(main: InProcess) -> None:
    text = main("-h").out
    for command in ("create", "send", "subscribe", "list", "env", "clean"):
        assert re.search(rf"^ +{command} +\S", text, re.MULTILINE)
    assert "example: " in text


@pytest.mark.parametrize("where", [("--version",), ("-V",), ("clean", "--version"), ("clean", "-V")])
def test_version_is_printed(main: InProcess, where: tuple[str, ...]) -> None:
    assert re.fullmatch(r"\S.* [0-9]+\.[0-9]+\.[0-9]+\n", main(*where).out)


@pytest.mark.parametrize(
    "line",
    [
        "create 0",
        "create -1",
        "create 1.5",
        "create three",
        "create 1 2",
        "create --prefix a/b",
        "create --prefix ../a",
        "create --prefix ü",
        f"create --prefix {'x' * 128}",
        "create --prefix=",
        "send --output payload",
        "--output payload create",
        "send --things 0",
        "create --things 1",
        "send --duration -1",
        "send --duration nan",
        "send --duration inf",
        "send --duration soon",
        "send --interval 0",
        "send --interval 1e-9",
        "send --qos 2",
        "send --count 0",
        "send --count 1 --duration 1",
        "create --output yaml",
        "send a b",
        "send -m a b",
        "send a -m b",
        "send a --json-message b",
        "send --count 1 --json-message b a",
        "send --quiet --debug",
        "send -n 1 --duration 1",
        "subscribe -n 1",
        "create -q",
        "send --mqtt-endpoint host:",
        "send --mqtt-endpoint host:0",
        "send --mqtt-endpoint host:65536",
        "send --mqtt-endpoint https://host",
        "subscribe --duration -0.1",
        "subscribe --count 0",
        "subscribe --count 1.5",
        "subscribe --qos -1",
        "subscribe --interval 1",
        "subscribe topic",
        "clean --endpoint-url nowhere",
        "clean thing_0",
        "env thing_0",
        "env --output payload",
        "clean --only",
        "destroy",
        "--region",
        "--region= create",
        "create --region -",
        "create --profile=",
        "--no-such-option create",
        "--local --profile p create",
        "--local create --endpoint-url http://localhost",
    ],
)
def test_wrong_usage_is_one_line_and_status_2(main: InProcess, line: str) -> None:
    result = main(*line.split(" "), status=2)
    assert result.out == ""
    assert re.fullmatch(r"elf\.py.*: error: .*\n", result.err)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("creat 3", "create"),
        ("suscribe", "subscribe"),
        ("send --durtaion 3", "--duration"),
        ("send --durtaion=3", "--duration"),
        ("--regoin eu-west-1 create", "--region"),
        ("clean --onlylocal", "--only-local"),
        ("create --output jsn", "json"),
        ("create --prefx a", "--prefix"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(main: InProcess, line: str, meant: str) -> None:
    assert f"did you mean {meant}?" in main(*line.split(" "), status=2).err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("send --qos 3", "elf.py send"),
        ("create 1 2", "elf.py create"),
        ("clean --local --profile p", "elf.py clean"),
        ("--local --profile p list", "elf.py list"),
        ("--local --profile p", "elf.py"),
        ("destroy", "elf.py"),
    ],
)
def test_wrong_usage_names_the_help_of_the_command(main: InProcess, line: str, named: str) -> None:
    err = main(*line.split(), status=2).err
    assert err.startswith(f"{named}: error: ")
    assert err.endswith(f"(see `python {named} --help`)\n")


@pytest.mark.parametrize(
    "wrong",
    [("-t", "a/+"), ("-t", ""), ("--json-message", "list.json"), ("--root-cert", "list.json")],
)
def test_what_is_refused_for_its_form_is_wrong_usage(pair: Pair, wrong: tuple[str, str]) -> None:
    (pair.cwd / "list.json").write_text("[]")
    result = pair("send", *pair.to_broker, "-n", 1, *wrong, "--output", "json", status=2)
    assert result.lines[-1].endswith(f"(see `{pair.typed} send --help`)")
    summary = json.loads(result.out)
    assert summary["exitStatus"] == 2
    assert summary["error"]["remedy"].endswith(f"(see `{pair.typed} send --help`)")


@pytest.mark.parametrize(
    ("line", "command", "cause"),
    [
        ("--output json", None, "no command"),
        ("--output json destroy", None, "destroy"),
        ("--output=json --rate x create", None, "--rate"),
        ("--output=json create 1 2", "create", "unrecognized arguments: 2"),
        ("send --qos 3 --output json", "send", "--qos"),
        ("--region - clean --output=json", None, "not a valid region"),
        ("list --local --profile p --output json", "list", "--profile"),
    ],
)
def test_wrong_usage_is_in_the_summary_where_json_was_asked_for(
    main: InProcess, line: str, command: str | None, cause: str
) -> None:
    result = main(*line.split(), status=2)
    (summary,) = map(json.loads, result.out.splitlines())
    error = summary.pop("error")
    assert summary == {"event": "summary", "command": command, "exitStatus": 2}
    assert error["name"] == "WrongUsage"
    assert cause in error["cause"]
    named = f"elf.py {command}" if command else "elf.py"
    assert error["remedy"] == f"see `python {named} --help`"
    assert result.err == f"{named}: error: {error['cause']} ({error['remedy']})\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_wrong_usage_exits_2_even_if_its_message_can_not_be_written(elf: Elf) -> None:
    elf.in_shell("$ELF destroy --output json > /dev/full 2>&1", status=2)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("delete", "clean"),
        ("rm", "clean"),
        ("publish", "send"),
        ("pub", "send"),
        ("ls", "list"),
        ("lst", "list"),
        ("list --json", "--output json"),
        ("send --json x", "--json-message"),
        ("send --tpoic x", "--topic"),
        ("list --topic x", None),
        ("list --vresion", "--version"),
        ("subscribe --adopt x", None),
    ],
)
def test_a_mistake_leads_to_what_is_meant_or_to_nothing(main: InProcess, line: str, meant: str | None) -> None:
    err = main(*line.split(), status=2).err
    assert (f"; did you mean {meant}? (see " in err) if meant else "did you mean" not in err


def test_a_message_of_several_words_is_to_be_quoted(main: InProcess) -> None:
    assert "put it in quotes" in main("send", "hello", "world", status=2).err
    assert "quotes" not in main("send", "--hello", "world", status=2).err


def test_a_word_that_resembles_no_command_gets_no_suggestion(main: InProcess) -> None:
    assert "did you mean" not in main("explode", status=2).err


@pytest.mark.parametrize("command", [(), ("create",), ("send",), ("subscribe",), ("list",), ("env",), ("clean",)])
def test_help_fits_into_80_columns(main: InProcess, command: tuple[str, ...]) -> None:
    main.use({"COLUMNS": "80"})
    assert max(map(len, main(*command, "--help").out.splitlines())) <= 80


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_help_that_can_not_be_written_is_no_success(elf: Elf) -> None:
    assert "the disk is full" in elf.in_shell("$ELF --help > /dev/full", status=1).err


def test_wrong_usage_in_a_shell_exits_2(elf: Elf) -> None:
    assert "create: error: " in elf("create", 0, status=2).err
    assert not elf.misc.exists()


@pytest.mark.parametrize("line", ["--region eu-west-1 create", "create --region eu-west-1"])
def test_global_options_work_before_and_after_the_command(main: InProcess, account: Account, line: str) -> None:
    main(*line.split())
    assert account.things("eu-west-1") == ["thing_0"]
    main(*line.replace("create", "clean").split())
    assert account.things("eu-west-1") == []


@pytest.mark.parametrize("place", ["before", "after"])
def test_each_global_option_is_heard_in_both_places(
    main: InProcess, elf: Elf, account: Account, tmp_path: Path, place: str
) -> None:
    (elf.home / ".aws").mkdir()
    (elf.home / ".aws" / "credentials").write_text(
        f"[p]\naws_access_key_id = {account.id}\naws_secret_access_key = {SECRET}\n"
    )
    main.forget("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "ELF_MISC_DIR")
    options = ["--profile", "p", "--region", "eu-west-1", "--endpoint-url", account.service.url, "--debug"]
    options += ["--misc-dir", str(tmp_path / "other")]
    result = main(*([*options, "create"] if place == "before" else ["create", *options]))
    assert ":DEBUG - " in result.err
    assert account.things("eu-west-1") == ["thing_0"]
    assert (tmp_path / "other" / "thing_0.prv").exists()


def test_a_global_option_after_the_command_wins_over_one_before(main: InProcess, account: Account) -> None:
    main("--region", "eu-west-1", "create", "--region", "eu-west-2")
    assert account.things("eu-west-2") == ["thing_0"]


def test_importing_elf_does_nothing(elf: Elf) -> None:
    code = """
import sys
import elf
print(sorted(name for name in ("boto3", "botocore", "AWSIoTPythonSDK", "ministack") if name in sys.modules))
print(*(callable(getattr(elf, name)) for name in ("create_things", "send_messages", "subscribe", "clean_up", "main")))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env=elf.environment | {"PYTHONPATH": str(ROOT)},
        cwd=elf.cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\nTrue True True True True\n"
    assert done.stderr == ""
    assert not elf.misc.exists()


@pytest.mark.parametrize("command", ["send", "subscribe"])
def test_send_and_subscribe_without_things_name_create(main: InProcess, command: str) -> None:
    result = main(command, status=1)
    assert "no things yet" in result.err
    assert "elf.py create" in result.err


def test_the_log_is_on_standard_error_in_utc(elf: Elf) -> None:
    before = time.time()
    result = elf("create", env={"TZ": "Asia/Kathmandu"})
    after = time.time()
    assert result.out == ""
    for line in result.err.splitlines():
        match = re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}):iot-elf:INFO - .+", line)
        assert match, line
        at = timegm(time.strptime(match[1], "%Y-%m-%d %H:%M:%S")) + int(match[2]) / 1000
        assert before - 0.01 <= at <= after


def test_every_command_works_from_another_directory_on_the_misc_beside_elf(
    elf: Elf, account: Account, tmp_path: Path
) -> None:
    elf.script = copy_program(tmp_path / "clone")
    elf.misc = elf.script.parent / "misc"
    del elf.environment["ELF_MISC_DIR"]
    elf("create")
    assert {"elf.json", "things.json", "thing_0.pem", "thing_0.pub", "thing_0.prv"} == set(elf.files())
    elf("subscribe", *elf.to_broker, "--duration", "0.01")
    elf("send", *elf.to_broker, "--duration", "0.01")
    elf("clean")
    assert account.is_empty()
    assert elf.files() == ["elf.json"]
    assert list(elf.cwd.iterdir()) == []


@pytest.mark.parametrize("command", ["--help", "create", "send"])
def test_without_its_package_it_says_so_in_a_line(elf: Elf, tmp_path: Path, command: str) -> None:
    elf.script = Path(shutil.copy(ELF, tmp_path / "elf.py"))
    result = elf(command, status=1)
    assert result.out == ""
    assert re.fullmatch(r"elf\.py needs the folder iot_elf/ .*: clone the whole repository \(.*\)\n", result.err)
    assert not elf.misc.exists()


@pytest.mark.parametrize("python", [("-I",), ("-W", "error")], ids=" ".join)
def test_its_package_is_found_where_python_does_not_look_for_it(elf: Elf, python: tuple[str, ...]) -> None:
    link = elf.cwd / "link.py"
    link.symlink_to(ELF)
    done = subprocess.run([elf.python, *python, link, "list"], env=elf.environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no things yet" in done.stdout


def test_misc_dir_wins_over_the_environment(main: InProcess, elf: Elf, tmp_path: Path) -> None:
    main("create", "--misc-dir", tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "er" / "thing_0.prv").exists()
    assert not elf.misc.exists()


def test_a_misc_dir_is_relative_to_the_working_directory(
    main: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main("--misc-dir", "here", "create")
    assert (tmp_path / "here" / "thing_0.prv").exists()


def test_a_misc_dir_without_a_name_is_a_usage_error(main: InProcess, account: Account) -> None:
    """An unset variable in a script, most likely; it is not the working directory."""
    assert "argument --misc-dir: the directory name is empty" in main("--misc-dir", "", "create", status=2).err
    main.use({"ELF_MISC_DIR": ""})
    assert "the directory name is empty, here or in ELF_MISC_DIR" in main("create", status=2).err
    assert account.is_empty()


def test_a_home_directory_that_nobody_has_is_named(main: InProcess, account: Account) -> None:
    refused = main("create", "--misc-dir", "~nobody-of-that-name/misc", status=2).err
    assert "no home directory found for '~nobody-of-that-name/misc': set HOME, or leave ~ out" in refused
    assert account.is_empty()


PYTHONS = sorted(Path(os.environ.get("PYENV_ROOT", "/nonexistent")).glob("versions/3.[89].*/bin/python"))


@pytest.mark.skipif(not PYTHONS, reason="there is no Python 3.8 or 3.9 here")
@pytest.mark.parametrize("python", PYTHONS, ids=lambda python: python.parent.parent.name)
@pytest.mark.parametrize("program", sorted(path.name for path in ROOT.glob("*.py")))
def test_an_old_python_is_refused_before_anything_is_done(python: Path, program: str, tmp_path: Path) -> None:
    command = [str(python), str(ELF.with_name(program)), "create", "--misc-dir", str(tmp_path / "misc")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program} needs Python 3.10 or later")
    assert not list(tmp_path.iterdir())


def test_a_fleet_runs_from_another_directory(elf: Elf, account: Account, service: AwsService, tmp_path: Path) -> None:
    elf("create")
    elf.cwd = tmp_path / "yet" / "another"
    elf.cwd.mkdir(parents=True)
    elf("send", *elf.to_broker, *ONCE)
    client = mqtt_client_of(elf, service, "thing_0", "thing_0-x")
    assert client.connect() == "Success"
    client.close()
    elf("clean")
    assert list(elf.cwd.iterdir()) == []
    assert account.is_empty()
