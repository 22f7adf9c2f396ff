"""create, the first send and clean keep to AWS's quotas, which others use as well, and to an account's limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from support.aws import Account, AwsService
from support.http_proxy import THROTTLED, HttpProxy, aws_error
from support.shell import Elf, InProcess

from iot_elf.adoption import SAMPLE

THINGS = 40
FASTER = 8.0  # times AWS's default quotas, for the sake of the suite's time


@pytest.fixture
def distant(elf: Elf, service: AwsService) -> Iterator[Callable[[float], HttpProxy]]:
    """Put `elf` 20 ms away from AWS, under so many times AWS's default quotas."""
    proxies: list[HttpProxy] = []

    def distant(quotas: float) -> HttpProxy:
        proxies.append(HttpProxy(service.url, round_trip_s=0.02, quota_factor=quotas))
        elf.environment["AWS_ENDPOINT_URL"] = proxies[-1].url
        return proxies[-1]

    yield distant
    for proxy in proxies:
        proxy.close()


def test_a_fleets_life_takes_the_calls_it_needs_many_at_once_and_is_not_throttled(
    elf: Elf, account: Account, distant: Callable[[float], HttpProxy]
) -> None:
    proxy = distant(FASTER)
    rate = ("--rate", 10 * FASTER)
    needed = {
        ("create", THINGS): ["CreateThing", "CreateKeysAndCertificate", "AttachThingPrincipal"],
        ("send", *elf.to_broker, "--duration", "0.01"): ["CreatePolicy", "AttachPolicy"],
        ("clean",): [
            "DescribeThing",
            "ListAttachedPolicies",
            "DetachPolicy",
            "DeletePolicy",
            "UpdateCertificate",
            "DetachThingPrincipal",
            "DeleteCertificate",
            "DeleteThing",
        ],
    }
    looks = {  # at some things, for those of another copy of misc/
        "create": {"DescribeThing": SAMPLE},
        "send": {"ListThingPrincipals": SAMPLE},
        "clean": {"ListThingPrincipals": SAMPLE, "ListThings": 1},
    }
    for command, operations in needed.items():
        proxy.reset()
        elf(*command, *rate)
        throttled = sum(proxy.throttled.values())
        assert throttled < 0.05 * sum(proxy.calls.values())
        calls = {"DescribeEndpoint": 1} | dict.fromkeys(operations, THINGS) | looks[str(command[0])]
        assert proxy.calls - proxy.throttled == calls
        assert proxy.most_at_once > 1
        assert proxy.connections <= 2 * proxy.most_at_once  # they are used again
    assert account.is_empty()


def test_a_quota_that_others_use_slows_elf_down_and_makes_nothing_fail(
    elf: Elf, account: Account, distant: Callable[[float], HttpProxy]
) -> None:
    proxy = distant(0.7)
    elf("create", 15)
    assert len(account.things()) == len(account.certificates()) == 15
    assert sum(proxy.throttled.values()) > 0  # the proxy did throttle
    elf("clean")
    assert account.is_empty()


def test_create_with_the_same_number_only_looks(elf: Elf, distant: Callable[[float], HttpProxy]) -> None:
    proxy = distant(FASTER)
    elf("create", 2)
    proxy.reset()
    elf("create", 2)
    assert proxy.calls == {"DescribeEndpoint": 1, "ListThings": 1, "ListThingPrincipals": 2}


# Limits


def test_a_limit_of_the_account_is_met_once_a_thing_and_stops_the_rest(
    main: InProcess, account: Account, proxy: HttpProxy
) -> None:
    proxy.inject("CreateThing", aws_error(410, "LimitExceededException", "No more things."), onwards=True)
    said = main("create", 300, status=1).err
    assert "the account's limit is reached: No more things." in said
    assert f"{proxy.calls['CreateThing']} of 300 things failed" in said
    assert proxy.calls["CreateThing"] < 300
    assert account.things() == []


def test_throttling_is_said_once(main: InProcess, account: Account, proxy: HttpProxy) -> None:
    for call in range(1, 5):
        proxy.inject("CreateThing", THROTTLED, call=call)
        proxy.inject("AttachThingPrincipal", THROTTLED, call=call)
    said = main("create", 4).err
    assert len(re.findall("AWS throttles CreateThing: slowing down", said)) == 1
    assert said.count("throttles") == 1
    assert len(account.things()) == 4
