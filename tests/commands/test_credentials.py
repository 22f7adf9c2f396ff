"""Which credentials are used, where they come from, and how often ELF asks for them."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest
from support.aws import SECRET, SESSION_TOKEN, Account, AwsService
from support.failures import failure_of
from support.machine import free_port
from support.shell import Elf, InProcess
from support.sign_in import ROLE, Services, a_session

BASE = f"[profile base]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {SECRET}\n"
ASSUME = f"[default]\nrole_arn = {ROLE}\nsource_profile = base\n{BASE}"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def configure(elf: Elf, config: str) -> None:
    (elf.home / ".aws").mkdir(exist_ok=True)
    (elf.home / ".aws" / "config").write_text(config)


def profiles(**accounts: str) -> str:
    keys = "aws_access_key_id = {}\naws_secret_access_key = " + SECRET
    return "\n".join(f"[profile {name}]\n{keys.format(account)}" for name, account in accounts.items())


# The profile is a default; what is checked is the account


@pytest.mark.parametrize(
    ("config", "options", "environment"),
    [
        pytest.param(("old", "new"), ("--profile", "new"), {}, id="another profile"),
        pytest.param(("new",), ("--profile", "new"), {}, id="it has another name now"),
        pytest.param(("new",), (), {"AWS_PROFILE": "new"}, id="AWS_PROFILE"),
        pytest.param(("new",), (), {"AWS_DEFAULT_PROFILE": "new"}, id="AWS_DEFAULT_PROFILE"),
        pytest.param((), (), dict.fromkeys(KEYS, ""), id="keys, and no profile, as in CI"),
        pytest.param(("old",), (), dict.fromkeys(KEYS, ""), id="keys, and the profile"),
        pytest.param(("default",), (), {}, id="the default profile, and no other"),
    ],
)
def test_a_fleet_is_its_owners_whatever_the_profile_is_called(
    main: InProcess,
    elf: Elf,
    account: Account,
    config: tuple[str, ...],
    options: tuple[str, ...],
    environment: dict[str, str],
) -> None:
    main.forget(*KEYS)
    configure(elf, profiles(old=account.id))
    main("create", "--profile", "old")
    configure(elf, profiles(**dict.fromkeys(config, account.id)).replace("profile default", "default"))
    main.use(account.credentials if KEYS[0] in environment else environment)
    main("create", 2, *options)
    expected = "new" if "new" in config else "old"  # keys of the environment are no new default
    assert elf.elf_json()["fleet"]["profile"] == expected
    main("clean", *options)
    assert account.is_empty()


def test_with_another_account_the_message_names_the_recorded_profile_not_todays(
    main: InProcess, elf: Elf, account: Account, service: AwsService
) -> None:
    main.forget(*KEYS)
    configure(elf, profiles(old=account.id, new=Account(service).id))
    main("create", "--profile", "old")
    refused = main("clean", "--profile", "new", "--output", "json", status=1)
    assert failure_of(refused) == "OtherAccount"
    cause = json.loads(refused.out.splitlines()[-1])["error"]["cause"]
    assert account.id in cause
    assert "profile old" in cause
    assert "new" not in cause
    assert account.things() == ["thing_0"]
    main("clean")


def test_a_profile_that_is_asked_for_and_missing_is_an_error(main: InProcess, account: Account) -> None:
    main("create")
    assert failure_of(main("clean", "--profile", "gone", "--output", "json", status=1)) == "BadAwsConfiguration"
    assert account.things() == ["thing_0"]


# The AWS CLI's files


USABLE = {"AccessKeyId": "A", "SecretAccessKey": "s", "SessionToken": "t", "Expiration": "2099-01-01T00:00:00Z"}


DAMAGED = (
    *("", "{", "[]", "{}", '{"Credentials": null}', "\udcff", None),
    json.dumps({"Credentials": {**USABLE, "SessionToken": None}}),
    json.dumps({"Credentials": {**USABLE, "Expiration": "later"}}),
    json.dumps({"Credentials": {**USABLE, "Expiration": "2099-01-01T00:00:00"}}),
)


def test_a_damaged_session_in_the_cache_of_the_aws_cli_is_none(
    signed_out: InProcess, elf: Elf, account: Account, services: Services
) -> None:
    configure(elf, ASSUME)
    services.body = a_session(60, account.id)
    signed_out("create")
    (file,) = (elf.home / ".aws" / "cli" / "cache").iterdir()
    signed_out("create")
    assert len(services.asked) == 1
    for number, content in enumerate(DAMAGED):
        file.unlink()
        if content is None:
            file.mkdir()
        else:
            file.write_text(content, errors="surrogateescape")
        signed_out("create")
        assert len(services.asked) == number + 2
        if content is None:
            file.rmdir()
            file.touch()
    assert account.things() == ["thing_0"]


LEGACY = "sso_start_url = https://example.awsapps.com/start\nsso_region = us-west-2\n"
ROLE_OF_SSO = "[default]\nsso_account_id = 123456789012\nsso_role_name = elf\n"
SSO = f"{ROLE_OF_SSO}sso_session = s\n[sso-session s]\n{LEGACY}"


@pytest.mark.parametrize(("config", "token"), [(SSO, "s"), (ROLE_OF_SSO + LEGACY, "https://example.awsapps.com/start")])
def test_a_damaged_token_of_the_aws_cli_says_how_to_sign_in_again(
    signed_out: InProcess, elf: Elf, monkeypatch: pytest.MonkeyPatch, config: str, token: str
) -> None:
    configure(elf, config)
    directory = elf.home / ".aws" / "sso" / "cache"
    directory.mkdir(parents=True)
    monkeypatch.setattr("botocore.credentials.SSOProvider._SSO_TOKEN_CACHE_DIR", str(directory))
    (directory / f"{hashlib.sha1(token.encode()).hexdigest()}.json").write_text("{")
    refused = signed_out("create", "--output", "json", status=1)
    assert failure_of(refused) == "NotSignedInToSso"
    assert "a file in ~/.aws/sso/cache is damaged" in refused.err


# How often


def process(elf: Elf, account: Account, minutes: float) -> str:
    """A command that prints a session, and notes that it was called."""
    ends = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60 * minutes))
    keys = {"Version": 1, "AccessKeyId": account.id, "SecretAccessKey": SECRET, "SessionToken": SESSION_TOKEN}
    script = elf.home / "process.py"
    script.write_text(
        f"open({str(elf.home / 'calls')!r}, 'a').write('x')\nprint({json.dumps({**keys, 'Expiration': ends})!r})\n"
    )
    return f"[default]\ncredential_process = {sys.executable} {script}\n"


@pytest.mark.parametrize("way", ["a role", "a command"])
@pytest.mark.parametrize("minutes", [5, 12])
def test_a_session_that_is_short_is_fetched_once_for_all_calls(
    signed_out: InProcess, elf: Elf, account: Account, services: Services, minutes: int, way: str
) -> None:
    services.body = a_session(minutes, account.id)
    configure(elf, ASSUME if way == "a role" else process(elf, account, minutes))
    signed_out("create", 3)
    asked = len(services.asked) if way == "a role" else len((elf.home / "calls").read_text())
    assert asked == 1
    assert len(account.things()) == 3


def test_who_is_denied_the_role_in_mid_run_is_denied_it_once(
    signed_out: InProcess, elf: Elf, account: Account, services: Services
) -> None:
    services.body = a_session(0.1, account.id)  # of six seconds, in which a busy machine begins, too
    services.refuses_next = (403, "AccessDenied", "not authorized to perform: sts:AssumeRole")
    configure(elf, ASSUME)
    said = signed_out("create", 120, status=1).err
    assert len(services.asked) == 2
    told = [line for line in said.splitlines() if "AWS denies sts:AssumeRole" in line]
    assert len(told) == 2  # at once, and at the end with how many
    assert "unexpected" not in said
    assert 0 < len(account.things()) < 120


# Instances and containers


@pytest.mark.parametrize(
    ("who", "options", "mode"),
    [
        ("an instance", (), ""),
        ("an instance", ("--proxy", "none"), "defaults_mode = auto\n"),
        ("a container", (), ""),
        ("a container", ("--proxy", "none"), ""),
    ],
)
def test_an_instances_and_a_containers_credentials_go_through_no_proxy(
    signed_out: InProcess,
    elf: Elf,
    account: Account,
    service: AwsService,
    services: Services,
    who: str,
    options: tuple[str, ...],
    mode: str,
) -> None:
    configure(elf, f"[default]\n{mode}")
    fields = {"AccessKeyId": account.id, "SecretAccessKey": SECRET, "Token": SESSION_TOKEN, "Code": "Success"}
    services.body = json.dumps({**fields, "Expiration": "2099-01-01T00:00:00Z"}).encode()
    services.answer_of = {"/token": b"t", "/security-credentials/": b"elf", "/availability-zone/": b"us-west-2a"}
    address = service.url.removeprefix("http://")
    signed_out.use({"HTTP_PROXY": f"http://127.0.0.1:{free_port()}", "NO_PROXY": address})
    signed_out.use({"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": address})
    if who == "an instance":
        signed_out.use({"AWS_EC2_METADATA_DISABLED": "false"})
    else:
        signed_out.use({"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{services.url}/credentials"})
    signed_out("create", *options)
    assert account.things() == ["thing_0"]
    expected = "/latest/meta-data/iam/security-credentials/elf" if who == "an instance" else "/credentials"
    assert expected in services.paths
    has_region = "/latest/meta-data/placement/availability-zone/" in services.paths
    assert has_region == bool(mode and who == "an instance")


# Settings that are not valid


@pytest.mark.parametrize(
    ("config", "environment"),
    [
        ("metadata_service_timeout = soon\n", {}),
        ("", {"AWS_METADATA_SERVICE_NUM_ATTEMPTS": "some"}),
        ("ca_bundle =\n", {}),
        ("defaults_mode =\n  iot = x\n", {}),
        ("request_checksum_calculation = never\n", {}),
        ("s3 =\n", {}),
        ("region =\n  iot = x\n", {}),
        ("", {"AWS_ACCOUNT_ID_ENDPOINT_MODE": "x"}),
    ],
)
def test_a_setting_that_botocore_does_not_take_is_called_that(
    main: InProcess, elf: Elf, config: str, environment: dict[str, str]
) -> None:
    configure(elf, f"[default]\n{config}")
    main.use(environment)
    refused = main("create", "--output", "json", status=1)
    assert failure_of(refused) == "BadAwsConfiguration"
    assert "unexpected" not in refused.err
    assert "package" not in refused.err


def test_the_version_of_an_api_is_elfs_affair(main: InProcess, elf: Elf, account: Account) -> None:
    configure(elf, "[default]\napi_versions =\n  iot = 2000-01-01\n")
    main("create")
    assert account.things() == ["thing_0"]


def test_a_sign_in_with_aws_login_may_be_in_the_credentials_file(elf: Elf) -> None:
    for name in KEYS:
        del elf.environment[name]
    (elf.home / ".aws").mkdir()
    Path(elf.home / ".aws" / "credentials").write_text("[default]\nlogin_session = arn:aws:iam::123456789012:user/x\n")
    assert failure_of(elf("create", "--output", "json", status=1)) == "NotSignedIn"
