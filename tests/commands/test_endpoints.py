"""Which of AWS's endpoints are asked, in which regions: botocore chooses, unless the user gave one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.aws import Account, AwsService
from support.aws_hosts import AwsHosts
from support.shell import Elf, InProcess
from support.sign_in import ROLE, Services

FIPS, DUAL_STACK = {"AWS_USE_FIPS_ENDPOINT": "true"}, {"AWS_USE_DUALSTACK_ENDPOINT": "true"}
WEST = "us-west-2"


@pytest.fixture
def hosts(main: InProcess, service: AwsService, tmp_path: Path) -> Iterator[AwsHosts]:
    """AWS's own host names; there are none in a region with a typing error."""
    hosts = AwsHosts(tmp_path, int(service.url.rpartition(":")[2]), unknown=("us-wst-2", "atlantis"))
    main.forget("AWS_ENDPOINT_URL")
    main.use(hosts.environment)
    yield hosts
    hosts.close()


def change(elf: Elf, **fleet: str) -> None:
    """Record something else of where the fleet is; without anything, forget it, as the original program did."""
    recorded = elf.elf_json()
    recorded["fleet"] |= fleet
    if not fleet:
        del recorded["fleet"]
    (elf.misc / "elf.json").write_text(json.dumps(recorded))


PLAIN, EU = "us-west-2.amazonaws.com", "eusc-de-east-1.amazonaws.eu"


@pytest.mark.parametrize(
    ("region", "earlier", "environment", "asked"),
    [
        (WEST, "", {}, [f"iot.{PLAIN}", f"sts.{PLAIN}"]),
        (WEST, "", DUAL_STACK, ["iot.us-west-2.api.aws", "sts.us-west-2.api.aws"]),
        (WEST, f"iot.{PLAIN}", FIPS | DUAL_STACK, ["iot-fips.us-west-2.api.aws", "sts-fips.us-west-2.api.aws"]),
        (WEST, f"iot-fips.{PLAIN}", {}, [f"iot.{PLAIN}", f"sts.{PLAIN}"]),
        (WEST, None, DUAL_STACK, ["iot.us-west-2.api.aws", "sts.us-west-2.api.aws"]),
        ("eusc-de-east-1", f"iot.{EU}", {}, [f"iot.{EU}", f"sts.{EU}"]),
        ("zz-north-1", "", {}, ["iot.zz-north-1.amazonaws.com", "sts.zz-north-1.amazonaws.com"]),
    ],
)
def test_the_endpoints_are_botocores_whatever_an_earlier_elf_has_recorded(
    main: InProcess,
    elf: Elf,
    account: Account,
    hosts: AwsHosts,
    region: str,
    earlier: str | None,
    environment: dict[str, str],
    asked: list[str],
) -> None:
    """`earlier` is the host that an earlier ELF had recorded; None: the original program, which recorded nothing."""
    main("create", "--region", region)
    assert "endpoint_url" not in elf.elf_json()["fleet"]
    hosts.forget()
    if earlier is None:
        change(elf)
    else:
        url = {"endpoint_url": f"https://{earlier}"} if earlier else {}
        change(elf, data_endpoint="other-ats.iot.example.com", **url)  # so that STS is asked
    main.use(environment)
    main("clean")
    assert hosts.asked == asked
    assert account.things(region) == []


def test_an_endpoint_that_was_given_is_recorded_and_stays(
    main: InProcess, elf: Elf, account: Account, service: AwsService, hosts: AwsHosts
) -> None:
    main("create", "--endpoint-url", service.url)
    main.use(FIPS)
    assert elf.elf_json()["fleet"]["endpoint_url"] == service.url
    change(elf, data_endpoint="other-ats.iot.example.com")
    main("clean")
    assert hosts.asked == []
    assert account.is_empty()


def test_a_given_endpoint_of_awss_counts_for_its_command(
    main: InProcess, elf: Elf, account: Account, hosts: AwsHosts
) -> None:
    fips = "iot-fips.us-west-2.amazonaws.com"
    main("create", "--endpoint-url", f"https://{fips}")
    assert hosts.asked == [fips]
    hosts.forget()
    main("clean", "--endpoint-url", "https://iot.us-west-2.api.aws")
    assert hosts.asked == ["iot.us-west-2.api.aws"]
    assert account.is_empty()


def test_sts_of_an_emulator_may_be_elsewhere(main: InProcess, elf: Elf, account: Account, services: Services) -> None:
    main("create")
    change(elf, data_endpoint="other-ats.iot.example.com")
    identity = f"<GetCallerIdentityResult><Account>{account.id}</Account></GetCallerIdentityResult>"
    services.body = f"<GetCallerIdentityResponse>{identity}</GetCallerIdentityResponse>".encode()
    main.use({"AWS_ENDPOINT_URL_STS": services.url})
    main("clean")
    assert services.paths == ["/"]
    assert account.is_empty()


# Regions


@pytest.mark.parametrize(("region", "meant"), [("us-wst-2", "us-west-2"), ("atlantis", "us-west-2")])
def test_a_region_with_a_typing_error_is_said_with_what_was_meant(
    main: InProcess, elf: Elf, hosts: AwsHosts, region: str, meant: str
) -> None:
    refused = main("create", "--region", region, "--output", "json", status=1)
    error = json.loads(refused.out.splitlines()[-1])["error"]
    assert error["name"] == "UnknownRegion"
    assert region in error["cause"]
    assert f"did you mean {meant}?" in error["remedy"]
    assert "fleet" not in "".join(path.read_text() for path in elf.misc.glob("elf.json"))
    main.forget("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    main.use({"AWS_WEB_IDENTITY_TOKEN_FILE": __file__, "AWS_ROLE_ARN": ROLE})
    refused = main("create", "--region", region, "--output", "json", status=1)  # STS is asked first
    assert json.loads(refused.out.splitlines()[-1])["error"]["name"] == "UnknownRegion"


def test_a_region_of_the_users_own_endpoint_needs_no_known_name(main: InProcess, account: Account) -> None:
    main("create", "--region", "us-wst-2")
    assert account.things("us-wst-2") == ["thing_0"]


def test_create_says_where_its_region_comes_from(main: InProcess, elf: Elf) -> None:
    def source(*args: object) -> str:
        lines = main("create", *args).lines
        (where,) = (line for line in lines if line.startswith("in region us-west-2, "))
        is_default = "no region was chosen: using the default, us-west-2 (--region chooses another)" in lines
        return "the default" if is_default else where.rpartition("; region from ")[2]

    assert source() == "the default"
    assert source(2) == "the fleet"
    assert source(3, "--region", "us-west-2") == "--region"
    (elf.home / ".aws").mkdir(exist_ok=True)
    (elf.home / ".aws" / "config").write_text("[profile p]\nregion = us-west-2\n")
    for variable, value in (("AWS_PROFILE", "p"), ("AWS_DEFAULT_REGION", "us-west-2"), ("AWS_REGION", "us-west-2")):
        main("clean")
        main.use({variable: value})
        assert source() == {"AWS_PROFILE": "the profile p"}.get(variable, variable)
