"""Whose credentials are used, where they point, and which of them can't be valid."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from iot_elf import sign_in, text
from iot_elf.errors import ElfError
from iot_elf.state import Place

AWS_URL = "https://iot.us-west-2.amazonaws.com"
VPC_URL = "https://vpce-1.iot.us-west-2.vpce.amazonaws.com"
UNSET = dict.fromkeys(("AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
NO_URL = dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_IOT", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"))


@pytest.mark.parametrize(
    ("place", "variables"),
    [
        (Place("us-west-2"), {}),
        (Place("us-west-2", "me"), {**UNSET, "AWS_PROFILE": "me"}),
        (Place("us-west-2", None, AWS_URL), NO_URL),
        (Place("us-east-1", None, AWS_URL), {**NO_URL, "AWS_ENDPOINT_URL_IOT": AWS_URL}),
        (Place("us-west-2", None, VPC_URL), {**NO_URL, "AWS_ENDPOINT_URL_IOT": VPC_URL}),
        (Place("us-west-2", None, "http://moto:5000"), {**NO_URL, "AWS_ENDPOINT_URL": "http://moto:5000"}),
    ],
)
def test_the_environment_of_a_fleet_points_at_it_and_unsets_what_would_point_elsewhere(
    place: Place, variables: dict[str, str | None]
) -> None:
    assert sign_in.environment_of(place) == variables


# The broker, and whose account it is


class Session:
    """boto3's session, of which only STS is asked."""

    def __init__(self, account: str) -> None:
        self._account = account
        self.asked: list[tuple[str, str | None, str | None]] = []

    def client(self, service: str, region_name: str | None, endpoint_url: str | None) -> Any:
        self.asked.append((service, region_name, endpoint_url))
        return SimpleNamespace(get_caller_identity=lambda: {"Account": self._account})


MINE, YOURS = "123456789012", "210987654321"


@pytest.mark.parametrize(
    ("account", "data_endpoint", "address", "who", "asks", "host"),
    [
        (None, None, "ABC-ats.iot.r.amazonaws.com", MINE, False, "abc-ats.iot.r.amazonaws.com"),
        (None, None, "localhost:8883", MINE, False, "localhost"),
        (MINE, "abc-ats.iot.r.a", "abc-ats.iot.r.b", YOURS, False, "abc-ats.iot.r.b"),
        (MINE, "abc-ats.iot.r.a", "xyz-ats.iot.r.a", MINE, True, "xyz-ats.iot.r.a"),  # moto's, for every answer
        (MINE, "abc-ats.iot.r.a", "xyz-ats.iot.r.a", YOURS, True, None),
        (MINE, None, "xyz-ats.iot.r.a", MINE, True, "xyz-ats.iot.r.a"),
        (MINE, None, "xyz-ats.iot.r.a", YOURS, True, None),
        (None, "abc-ats.iot.r.a", "xyz-ats.iot.r.a", MINE, False, None),
        (None, "abc-ats.iot.r.a", "abc-ats.iot.r.a", MINE, False, "abc-ats.iot.r.a"),
    ],
)
def test_a_fleet_is_used_only_with_credentials_for_its_account(
    account: str | None, data_endpoint: str | None, address: str, who: str, asks: bool, host: str | None
) -> None:
    session = Session(who)
    iot = SimpleNamespace(describe_endpoint=lambda **_: {"endpointAddress": address})
    place = Place("r", None, AWS_URL, account, data_endpoint)
    if host:
        assert sign_in.find_data_endpoint(session, iot, place) == host
    else:
        with pytest.raises(ElfError, match="for another account"):
            sign_in.find_data_endpoint(session, iot, place)
    assert session.asked == [("sts", "r", None)] * asks


@pytest.mark.parametrize(("url", "sts"), [(AWS_URL, None), ("http://moto:5000", "http://moto:5000"), (None, None)])
def test_sts_is_where_the_control_plane_is(url: str | None, sts: str | None) -> None:
    session = Session(MINE)
    iot = SimpleNamespace(describe_endpoint=lambda **_: {"endpointAddress": "a"})
    sign_in.find_data_endpoint(session, iot, Place("r", None, url, MINE))
    assert session.asked == [("sts", "r", sts)]


# Credentials


KEY, SECRET, TOKEN = "AKIA" + "0" * 16, "s" * 40, "t" * 400


@pytest.mark.parametrize(
    ("values", "method", "named"),
    [
        ((KEY, SECRET, None), "env", None),
        ((KEY, SECRET, TOKEN), "env", None),
        ((KEY, SECRET, ""), "env", None),
        ((KEY + "\n", SECRET, None), "env", "access key ID (from env)"),
        ((KEY, "s s" * 9, None), "env", "secret access key (from env)"),
        ((KEY, SECRET, TOKEN + "ü"), "sso", "session token (from sso)"),
        ((KEY, SECRET + "\r", None), "explicit", "secret access key (from a role's source_profile)"),
    ],
)
def test_credentials_with_a_line_end_are_refused_and_all_are_hidden(
    monkeypatch: pytest.MonkeyPatch, values: tuple[str | None, ...], method: str, named: str | None
) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset())
    credentials = SimpleNamespace(get_frozen_credentials=lambda: (*values, "123456789012"), method=method)
    signer = SimpleNamespace(_credentials=credentials)
    if named:
        with pytest.raises(ElfError) as raised:
            sign_in._check_credentials(signer)
        assert named in raised.value.cause
        assert values[1] not in raised.value.cause  # type: ignore[operator]
    else:
        sign_in._check_credentials(signer)
    for value in filter(None, values):
        assert text.redacted(value.strip()) == "***"
    assert text.redacted("123456789012") == "123456789012"


def test_requests_that_are_not_signed_need_no_credentials() -> None:
    sign_in._check_credentials(SimpleNamespace(_credentials=None))


def session_of(credentials: Any, profile: str = "me", **profiles: dict[str, str]) -> Any:
    def get_credentials() -> Any:
        if isinstance(credentials, Exception):
            raise credentials
        return credentials

    return SimpleNamespace(
        get_credentials=get_credentials,
        profile_name=profile,
        _session=SimpleNamespace(full_config={"profiles": profiles}),
    )


def test_no_credentials_are_none() -> None:
    assert sign_in.fetch_credentials(session_of(None)) is None


@pytest.mark.parametrize(
    ("profiles", "environment", "shown"),
    [
        ({}, {}, ""),
        ({"me": {}}, {}, " (profile me)"),
        ({"me": {"source_profile": "you"}, "you": {}}, {}, " (profile me > you)"),
        ({"me": {"source_profile": "me"}}, {}, " (profile me)"),
        ({"me": {"source_profile": "gone"}}, {}, " (profile me)"),
        ({"you": {"role_arn": "r"}}, {}, ""),
        (
            {"me": {"credential_process": "/bin/it --key k", "role_arn": "r", "source_profile": "you"}, "you": {}},
            {},
            " (profile me > you, credential_process /bin/it, role_arn r)",
        ),
        ({}, {"AWS_ROLE_ARN": "r", "AWS_CONTAINER_X": "x"}, " (AWS_ROLE_ARN, AWS_CONTAINER_X)"),
    ],
)
def test_where_credentials_come_from_is_said_without_a_secret(
    monkeypatch: pytest.MonkeyPatch, profiles: dict[str, Any], environment: dict[str, str], shown: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ElfError) as raised:
        sign_in.fetch_credentials(session_of(ValueError("it is broken."), **profiles))
    assert raised.value.cause == f"could not get AWS credentials: ValueError: it is broken{shown}"
