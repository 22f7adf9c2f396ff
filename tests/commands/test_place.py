"""Where a fleet lives: chosen at its creation, remembered until it is cleaned, and never mistaken for another place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.aws import REGION, SECRET, Account, AwsService
from support.failures import Explained, failure_of
from support.shell import Elf, InProcess

ONCE = ("--duration", "0.01")


@pytest.mark.parametrize(
    ("environment", "options", "region"),
    [
        ({}, (), "us-west-2"),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, (), "eu-west-1"),
        ({"AWS_REGION": "eu-west-2"}, (), "eu-west-2"),
        ({"AWS_REGION": "eu-west-2", "AWS_DEFAULT_REGION": "eu-west-1"}, ("--region", "eu-west-3"), "eu-west-3"),
    ],
)
def test_the_region_is_chosen_by(
    main: InProcess, account: Account, environment: dict[str, str], options: tuple[str, ...], region: str
) -> None:
    main.use(environment)
    main("create", *options)
    assert account.things(region) == ["thing_0"]


def test_later_commands_need_no_options(main: InProcess, elf: Elf, account: Account, service: AwsService) -> None:
    """Not even when the environment has changed in the meantime."""
    main.forget("AWS_ENDPOINT_URL")
    main("--region", "eu-west-1", "create", "--endpoint-url", service.url)
    main.use({"AWS_REGION": "eu-west-2"})
    main("create", 2)
    main("send", *elf.to_broker, *ONCE)
    assert account.things("eu-west-1") == ["thing_0", "thing_1"]
    main("clean")
    assert account.things("eu-west-1") == []


def test_a_profile_is_remembered_and_used(main: InProcess, elf: Elf, account: Account, explained: Explained) -> None:
    (elf.home / ".aws").mkdir()
    (elf.home / ".aws" / "config").write_text("[profile lamp]\nregion = eu-central-1\n")
    (elf.home / ".aws" / "credentials").write_text(
        f"[lamp]\naws_access_key_id = {account.id}\naws_secret_access_key = {SECRET}\n"
    )
    main.forget("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    main("--profile", "lamp", "create")
    assert account.things("eu-central-1") == ["thing_0"]
    assert elf.elf_json()["fleet"]["profile"] == "lamp"
    main("create", 2)
    main("clean")
    assert account.things("eu-central-1") == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--region", "eu-west-1"), "--region eu-west-1"),
        (("--endpoint-url", "http://127.0.0.1:9"), "--endpoint-url http://127.0.0.1:9"),
        (("--local",), "--local"),
    ],
)
def test_an_option_that_contradicts_where_the_fleet_lives_is_an_error_that_says_where(
    main: InProcess, elf: Elf, account: Account, service: AwsService, options: tuple[str, ...], named: str
) -> None:
    main("create")
    before = account.snapshot(), elf.recorded()
    for command in ("create", "send", "subscribe", "clean"):
        result = main(command, *options, status=1)
        (cause, remedy) = result.err.splitlines()
        assert named in cause
        for where in (REGION, account.id, service.url):
            assert where in cause
        assert "what to do: " in remedy
    assert (account.snapshot(), elf.recorded()) == before


@pytest.mark.parametrize("way", ["options", "environment", "configuration"])
def test_what_is_lower_case_by_definition_may_be_written_in_capitals(
    main: InProcess, elf: Elf, account: Account, service: AwsService, way: str
) -> None:
    region, url = "EU-WEST-1", service.url.replace("http", "HTTP")
    options: tuple[str, ...] = ()
    main.forget("AWS_ENDPOINT_URL")
    if way == "options":
        options = ("--region", region, "--endpoint-url", url)
    elif way == "environment":
        main.use({"AWS_REGION": region, "AWS_ENDPOINT_URL": url})
    else:
        (elf.home / ".aws").mkdir()
        (elf.home / ".aws" / "config").write_text(f"[default]\nregion = {region}\nendpoint_url = {url}\n")
    main("create", *options)
    assert account.things("eu-west-1") == ["thing_0"]
    assert elf.elf_json()["fleet"]["region"] == "eu-west-1"
    main("create", 2, *options)
    main("send", *elf.to_broker, *ONCE)
    main("clean")
    assert account.is_empty()


@pytest.mark.parametrize(
    ("options", "environment", "status", "failure", "fact"),
    [
        (("--region", "US West"), {}, 2, None, "'US West'"),
        (("--region", "-"), {}, 2, None, "'-'"),
        ((), {"AWS_REGION": "US West"}, 1, "BadPlace", "'US West'"),
        (("--profile", "a\nb"), {}, 2, None, r"'a\nb'"),
        (("--endpoint-url", "localhost:4566"), {}, 2, None, "'localhost:4566'"),
        (("--endpoint-url", "http://elf:hunter2@localhost:9"), {}, 2, None, "user name or password"),
        (("--endpoint-url", "elf:hunter2@localhost"), {}, 2, None, "user name or password"),
        ((), {"AWS_ENDPOINT_URL": "http://elf:hunter2@localhost:9"}, 1, "LoginInEndpointUrl", "user name or password"),
        ((), {"AWS_ENDPOINT_URL": "elf:hunter2@local_host"}, 1, "BadEndpointUrl", "http:// or https://"),
        ((), {"AWS_ENDPOINT_URL": "localhost:4566"}, 1, "BadEndpointUrl", "http:// or https://"),
        (("--endpoint-url", "http://localstack_main:9"), {}, 1, "BadEndpointUrl", "an underscore (_)"),
        ((), {"AWS_ENDPOINT_URL": "http://-"}, 1, "BadEndpointUrl", "AWS_ENDPOINT_URL"),
    ],
)
def test_a_place_that_could_not_be_recorded_is_refused_before_anything_is_made(
    main: InProcess,
    elf: Elf,
    account: Account,
    options: tuple[str, ...],
    environment: dict[str, str],
    status: int,
    failure: str | None,
    fact: str,
    explained: Explained,
) -> None:
    main.use(environment)
    result = main("create", *options, status=status)
    if failure:
        explained(result, failure, fact)
    assert fact in result.err
    assert "hunter2" not in result.err
    assert "fleet" not in (elf.elf_json() if (elf.misc / "elf.json").exists() else {})
    assert account.is_empty()


@pytest.mark.parametrize(
    "place",
    [
        {"data_endpoint": "a1-ats.iot.us-west-2.localstack_main"},
        {"data_endpoint": "A1-ats.iot.us-west-2.amazonaws.com"},
        {"endpoint_url": "http://localstack_main:4566"},
        {"region": "EU-WEST-1"},
    ],
    ids=str,
)
def test_a_place_that_an_earlier_elf_recorded_can_be_read(main: InProcess, elf: Elf, place: dict[str, str]) -> None:
    elf.misc.mkdir(mode=0o700)
    (elf.misc / "elf.json").write_text(json.dumps({"fleet": {"region": REGION, **place}}))
    assert "ELF has no things to clean up" in main("clean").err
    assert "fleet" not in elf.elf_json()


def test_options_that_agree_with_where_the_fleet_lives_are_fine(
    main: InProcess, account: Account, service: AwsService
) -> None:
    main("create")
    main("clean", "--region", REGION, "--endpoint-url", service.url + "/")
    assert account.is_empty()


def test_after_clean_the_next_fleet_may_live_elsewhere(main: InProcess, account: Account) -> None:
    main("create")
    main("clean")
    main("create", "--region", "eu-west-1")
    assert account.things("eu-west-1") == ["thing_0"]


@pytest.mark.parametrize("command", ["create", "send", "subscribe", "clean"])
def test_credentials_of_another_account_are_refused_and_nothing_is_lost(
    main: InProcess, elf: Elf, account: Account, service: AwsService, command: str, explained: Explained
) -> None:
    main("create")
    stranger = Account(service)
    main.use(stranger.credentials)
    before = account.snapshot(), elf.recorded(), elf.files()
    arguments = {"create": (2,), "clean": ()}.get(command, (*elf.to_broker, *ONCE))
    refused = main(command, *arguments, status=1)
    explained(refused, "OtherAccount", account.id)
    assert (account.snapshot(), elf.recorded(), elf.files()) == before
    assert stranger.is_empty()
    main.use(account.credentials)
    main("clean")
    assert account.is_empty()


def test_each_misc_dir_is_a_fleet_of_its_own(main: InProcess, elf: Elf, account: Account) -> None:
    main("create")
    main("create", "--misc-dir", elf.cwd, "--region", "eu-west-1")
    main("clean", "--misc-dir", elf.cwd)
    assert account.things("eu-west-1") == []
    assert account.things() == ["thing_0"]


def test_a_run_asks_for_the_endpoint_once(main: InProcess, elf: Elf) -> None:
    for command in (("create", 2), ("send", "--mqtt-endpoint", ":1", *ONCE)):
        status = 1 if command[0] == "send" else 0
        lines = main("--debug", *command, status=status).lines
        assert [line for line in lines if "DescribeEndpoint(" in line] == [
            "AWS DescribeEndpoint(endpointType=iot:Data-ATS)"
        ]


# The places of all that misc/ has agree


def set_things(elf: Elf, *entries: dict[str, Any]) -> None:
    (elf.misc / "things.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("has_elf_json", [True, False], ids=["", "without elf.json"])
@pytest.mark.parametrize("differs", ["region", "account", "partition"])
def test_things_of_two_places_are_refused_before_anything_is_done(
    main: InProcess, elf: Elf, account: Account, differs: str, has_elf_json: bool
) -> None:
    main("create")
    mine = elf.recorded()["thing_0"]
    its = {"region": (REGION, "eu-west-1"), "account": (account.id, "1" * 12), "partition": ("arn:aws:", "arn:aws-cn:")}
    lamp = {**mine, "certificateArn": mine["certificateArn"].replace(*its[differs])}
    set_things(elf, {"lamp_0": lamp}, {"thing_0": mine})
    if not has_elf_json:
        (elf.misc / "elf.json").unlink()
    before, files = account.snapshot(), elf.files()
    commands = (("create", 2), ("send", *elf.to_broker, *ONCE), ("subscribe", *ONCE), ("clean",), ("clean", "--adopt"))
    for command in commands:
        refused = main(*command, "--output", "json", status=1)
        assert failure_of(refused) == "PlacesDiffer"
        assert all(fact in refused.err for fact in ("lamp_0", "thing_0", its[differs][1].strip("arn:")))
        assert (account.snapshot(), elf.files()) == (before, files)
    assert "export" not in main("env", status=1).out
    assert "lamp_0" in main("list").out
    said = main("clean", "--only-local").err
    assert all(fact in said for fact in ("lamp_0", "thing_0", REGION))


def test_things_without_a_certificate_do_not_hide_where_the_others_are(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create", 2, "--region", "eu-west-1")
    set_things(elf, {"a_0": {"elf_stage": "creating"}}, *({name: it} for name, it in elf.recorded().items()))
    (elf.misc / "elf.json").unlink()
    main.use({"AWS_REGION": REGION})
    main("clean")
    assert account.things("eu-west-1") == []
    assert not list(elf.misc.glob("*.prv"))


@pytest.mark.parametrize("given", ["AWS_REGION", "--region", "--adopt"])
def test_clean_does_not_guess_a_region_that_nothing_tells(
    main: InProcess, elf: Elf, account: Account, given: str
) -> None:
    main("create")
    set_things(elf, {"thing_0": {"elf_stage": "creating"}})
    for path in (elf.misc / "elf.json", *elf.misc.glob("thing_0.*")):
        path.unlink()
    before = account.snapshot(), elf.files()
    main.use({"AWS_REGION": REGION})
    adopt = ["--adopt", account.iot.describe_thing(thingName="thing_0")["attributes"]["elf_id"]]
    options = adopt if given == "--adopt" else []
    refused = main("clean", *options, "--output", "json", status=1)
    assert failure_of(refused) == "PlaceUnknown"
    assert f"elf.py clean {' '.join([*options, '--region'])} R" in refused.err
    assert (account.snapshot(), elf.files()) == before
    if given != "AWS_REGION":
        said = main("clean", *options, "--region", REGION).err
        assert ("clean --adopt" in said) is (given == "--region")
        main("clean", *adopt, "--region", REGION)
        assert account.is_empty()
