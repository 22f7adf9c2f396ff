"""What `env` prints for a shell points other tools at the fleet, whatever is set there, and nothing else is printed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.aws import REGION, SECRET, Account
from support.failures import Explained
from support.machine import await_end, kill_servers_of, servers_of
from support.shell import Elf, InProcess, Result

pytestmark = pytest.mark.xdist_group("env")  # they share a fleet

NOWHERE = "http://127.0.0.1:9"
BOTO3 = f"""{shlex.quote(sys.executable)} -c '
import boto3; print(*sorted(thing["thingName"] for thing in boto3.client("iot").list_things()["things"]))'"""
AWS_CLI = "aws iot list-things --query 'sort(things[].thingName)' --output text"
TOOLS = [
    pytest.param(BOTO3, id="boto3"),
    pytest.param(AWS_CLI, id="the AWS CLI", marks=pytest.mark.skipif(not shutil.which("aws"), reason="not installed")),
]
OVERRIDING = ("AWS_ENDPOINT_URL_IOT", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
VPC = "https://vpce-0a1b.iot.eu-west-1.vpce.amazonaws.com"
# What a user's shell may have set for other purposes.
ELSEWHERE = {
    "AWS_PROFILE": "no-such-profile",
    "AWS_DEFAULT_PROFILE": "no-such-profile-either",
    "AWS_ENDPOINT_URL": NOWHERE,
    "AWS_ENDPOINT_URL_IOT": NOWHERE,
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "mine-only",
    "AWS_SESSION_TOKEN": "mine-only-too",
    "AWS_CREDENTIAL_EXPIRATION": "2020-01-01T00:00:00Z",
    "AWS_REGION": "eu-west-1",
    "AWS_DEFAULT_REGION": "eu-west-1",
    "HTTP_PROXY": NOWHERE,
    "http_proxy": NOWHERE,
    "no_proxy": "example.com,example.org",
}


def in_shell(elf: Elf, script: str, environment: Mapping[str, str]) -> str:
    """Run a script in sh after the eval of what `env` prints; return its output."""
    done = elf.in_shell(f'set -eu; eval "$($ELF env)"; {script}', env=environment, shell=("sh",))
    assert done.err == ""
    return done.out


def variables_in(result: Result) -> dict[str, str | None]:
    """The variables that a shell would set, or unset, by `env`."""
    variables: dict[str, str | None] = {}
    for command, *words in map(shlex.split, result.out.splitlines()):
        assert command in ("export", "unset")
        variables |= dict(word.split("=", 1) for word in words) if command == "export" else dict.fromkeys(words)
    return variables


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elf]:
    """A fleet of two things on an embedded AWS IoT, in which nobody changes anything."""
    user = Elf(tmp_path_factory.mktemp("local"), {})
    try:
        user("--local", "--region", "eu-central-1", "create", 2)
        yield user
    finally:
        kill_servers_of(user)


@pytest.fixture
def placed(elf: Elf) -> Elf:
    """A fleet without things yet, in a place of which a test writes more into elf.json."""
    elf("create")
    elf("clean")
    return elf


def place(elf: Elf, **fleet: object) -> None:
    recorded = elf.elf_json() | {"fleet": {"region": "eu-west-1", **fleet}}
    (elf.misc / "elf.json").write_text(json.dumps(recorded))


@pytest.mark.sample(2)
@pytest.mark.parametrize("environment", [ELSEWHERE, {}], ids=["another environment", "an empty one"])
@pytest.mark.parametrize("tool", TOOLS)
def test_other_tools_list_the_things_of_a_local_fleet(started: Elf, tool: str, environment: dict[str, str]) -> None:
    assert in_shell(started, tool, environment).split() == ["thing_0", "thing_1"]


def test_a_local_fleet_has_its_region_and_what_went_around_proxies_still_does(started: Elf) -> None:
    names = "$AWS_REGION $AWS_DEFAULT_REGION $NO_PROXY $no_proxy"
    hosts = "example.com,example.org,127.0.0.1"
    for _ in range(2):  # twice in the same shell
        said = in_shell(started, f'eval "$({started.python} {started.script} env)"; echo {names}', ELSEWHERE)
        assert said.split() == ["eu-central-1", "eu-central-1", hosts, hosts]
    assert in_shell(started, f"echo {names}", {"NO_PROXY": "*"}).split()[2:] == ["*", "*"]


@pytest.mark.parametrize("tool", TOOLS)
def test_other_tools_list_the_things_of_a_profile(elf: Elf, account: Account, tool: str) -> None:
    profile = """ 'it"s $(touch x) `touch x` \\ ; ä"""
    (elf.home / ".aws").mkdir()
    keys = f"aws_access_key_id = {account.id}\naws_secret_access_key = {SECRET}\n"
    quoted = profile.replace("\\", "\\\\").replace('"', '\\"')
    (elf.home / ".aws" / "config").write_text(f'[profile "{quoted}"]\n{keys}', encoding="utf-8")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del elf.environment[name]
    elf("create", 2, "--profile", profile)
    del elf.environment["AWS_ENDPOINT_URL"]
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy"), "")
    assert in_shell(elf, tool, ELSEWHERE | proxies).split() == ["thing_0", "thing_1"]
    assert variables_in(elf("env", env={"PYTHONIOENCODING": "ascii"}))["AWS_PROFILE"] == profile
    assert list(elf.cwd.iterdir()) == []


def test_a_fleet_on_aws_without_a_profile_keeps_the_shells_credentials(elf: Elf, account: Account) -> None:
    elf("--region", "eu-west-2", "create", 2)
    assert account.things("eu-west-2") == ["thing_0", "thing_1"]
    assert in_shell(elf, BOTO3, {"AWS_ENDPOINT_URL": NOWHERE}).split() == ["thing_0", "thing_1"]
    assert variables_in(elf("env")) == {
        **dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "eu-west-2"),
        **{"AWS_ENDPOINT_URL": account.service.url, **dict.fromkeys(OVERRIDING)},
    }


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (None, {}),  # as in a fleet of the original program: it is where the environment says
        ("https://iot.eu-west-1.amazonaws.com", dict.fromkeys(("AWS_ENDPOINT_URL", *OVERRIDING))),
        (VPC, {**dict.fromkeys(("AWS_ENDPOINT_URL", *OVERRIDING)), "AWS_ENDPOINT_URL_IOT": VPC}),
        ("http://localhost:5000/x", {**dict.fromkeys(OVERRIDING), "AWS_ENDPOINT_URL": "http://localhost:5000/x"}),
    ],
)
def test_an_endpoint_is_set_if_it_is_not_the_regions_own(
    placed: Elf, url: str | None, expected: dict[str, str | None]
) -> None:
    place(placed, endpoint_url=url)
    region = dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "eu-west-1")
    assert variables_in(placed("env")) == region | expected


def test_options_are_heeded_or_refused_as_by_list(placed: Elf, explained: Explained) -> None:
    place(placed)
    assert variables_in(placed("env", "--profile", "lamp"))["AWS_PROFILE"] == "lamp"
    refused = placed("env", "--region", "eu-west-3", "--output", "json", status=1)
    explained(refused, "PlaceDiffers", "--region eu-west-3 ")
    assert placed("env", "--region", "eu-west-3", status=1).out == ""


def test_json_has_the_same_variables(started: Elf) -> None:
    printed = variables_in(started("env"))
    for environment in ({}, printed):  # the token is no secret of the environment's here
        given = {name: value for name, value in environment.items() if value is not None}
        event, summary = map(json.loads, started("env", "--output", "json", env=given).out.splitlines())
        assert event == {"event": "environment", "variables": printed}
        assert summary == {"event": "summary", "command": "env", "exitStatus": 0}


@pytest.mark.parametrize("option", ["--debug", "--verbose", "--quiet"])
def test_nothing_else_is_on_standard_output(started: Elf, option: str) -> None:
    assert started("env", option).out == started("env").out


def test_without_a_fleet_it_prints_nothing_and_says_what_to_do(main: InProcess, elf: Elf, explained: Explained) -> None:
    result = main("env", status=1)
    assert result.out == ""
    explained(result, "NoThings", "elf.py create`", "elf.py --local create`")
    assert len(result.lines) == 2
    assert not elf.misc.exists()


def test_where_none_runs_it_prints_nothing_and_starts_nothing(local: Elf, explained: Explained) -> None:
    local("--local", "create")
    (server,) = servers_of(local)
    server.kill()
    await_end(server)
    assert local("env", status=1).out == ""
    result = local("env", "--output", "json", status=1)
    explained(result, "LocalNotRunning", local.misc / "local", "elf.py send`")
    assert len(result.lines) == 2
    assert servers_of(local) == []
    local("send", "--duration", "0.01")
    environment = {**ELSEWHERE, "AWS_CONFIG_FILE": os.devnull}  # the user's is broken
    assert in_shell(local, BOTO3, environment) == "thing_0\n"


def test_it_waits_for_no_other_elf(elf: Elf) -> None:
    elf("create")
    window = elf.start("create", 40, "--verbose")
    window.await_line("associated with cert")
    assert variables_in(elf("env"))["AWS_REGION"] == REGION
    assert window.process.poll() is None
    window.end()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_can_not_be_written_is_no_success(started: Elf) -> None:
    with Path("/dev/full").open("wb") as full:
        window = started.start("env", stdout=full)
        assert window.process.wait() == 1
    started.close_windows()
