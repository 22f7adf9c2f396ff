"""Whose credentials are used, where they point, and which of them can't be valid."""

from __future__ import annotations

import datetime
import os
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import ClientError, CredentialRetrievalError, RefreshWithMFAUnsupportedError

from iot_elf import errors, sign_in, text
from iot_elf.errors import ElfError, SignInError
from iot_elf.places import Place

AWS_URL = "https://iot.us-west-2.amazonaws.com"
VPC_URL = "https://vpce-1.iot.us-west-2.vpce.amazonaws.com"
DNS = ("amazonaws.com", "api.aws")
UNSET = dict.fromkeys(("AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
NO_URL = dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_IOT", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"))


@pytest.mark.parametrize(
    ("place", "variables"),
    [
        (Place("us-west-2"), {}),
        (Place("us-west-2", "me"), {**UNSET, "AWS_PROFILE": "me"}),
        (Place("us-west-2", None, AWS_URL), NO_URL),
        (Place("us-west-2", None, "https://iot-fips.us-west-2.api.aws"), NO_URL),
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

    def __init__(self, account: str, **services: Any) -> None:
        self._account = account
        self.asked: list[tuple[str, str | None, str | None]] = []
        self._session = SimpleNamespace(
            full_config={"services": {"mine": services}},
            get_scoped_config=lambda: {"services": "mine"},
            get_config_variable=lambda name: os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"),
        )

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


MOTO, STS = "http://moto:5000", "http://sts:5000"
IGNORE = {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}


@pytest.mark.parametrize(
    ("url", "environment", "services", "sts"),
    [
        (None, {}, {}, None),
        (AWS_URL, {}, {}, None),
        (VPC_URL, {}, {}, None),
        ("https://iot.us-west-2.api.aws", {}, {}, None),
        ("https://iot.eusc-de-east-1.amazonaws.eu", {}, {}, None),
        (MOTO, {}, {}, MOTO),
        (MOTO, {"AWS_ENDPOINT_URL": STS}, {}, MOTO),
        (MOTO, {"AWS_ENDPOINT_URL_STS": STS}, {}, None),
        (MOTO, {}, {"sts": {"endpoint_url": STS}}, None),
        (MOTO, {}, {"s3": {"endpoint_url": STS}}, MOTO),
        (MOTO, {"AWS_ENDPOINT_URL_STS": STS} | IGNORE, {}, MOTO),
    ],
)
def test_sts_is_where_botocore_says_unless_there_is_an_emulator(
    monkeypatch: pytest.MonkeyPatch, url: str | None, environment: dict[str, str], services: Any, sts: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    session = Session(MINE, **services)
    iot = SimpleNamespace(describe_endpoint=lambda **_: {"endpointAddress": "a"})
    sign_in.find_data_endpoint(session, iot, Place("r", None, url, MINE))
    assert session.asked == [("sts", "r", sts)]


@pytest.mark.parametrize(
    ("url", "region", "is_own"),
    [
        *((f"https://{host}.us-west-2.{suffix}", "us-west-2", True) for host in ("iot", "iot-fips") for suffix in DNS),
        ("https://iot.eusc-de-east-1.amazonaws.eu", "eusc-de-east-1", True),
        ("https://iot.cn-north-1.amazonaws.com.cn", "cn-north-1", True),
        ("https://iot.xx-new-1.amazonaws.com", "xx-new-1", True),
        (AWS_URL, "us-east-1", False),
        (AWS_URL.replace("https", "http"), "us-west-2", False),
        (VPC_URL, "us-west-2", False),
        (MOTO, "us-west-2", False),
        (None, "us-west-2", False),
    ],
)
def test_the_endpoints_that_botocore_has_for_a_region_are_awss_own(url: str | None, region: str, is_own: bool) -> None:
    assert sign_in.is_own_endpoint(url, region) == is_own


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


NOW = datetime.datetime(2026, 12, 1, tzinfo=datetime.timezone.utc)


class Renewals:
    """Credentials of botocore's, and a clock. They last for `life_s` whenever they are fetched, unless that fails."""

    def __init__(self, life_s: float) -> None:
        self.now_s, self.life_s, self.fetched = 0.0, life_s, 0
        self.failure: Exception | None = None
        self.credentials = RefreshableCredentials.create_from_metadata(self.fetch(), self.fetch, "test")
        self.credentials._time_fetcher = lambda: NOW + datetime.timedelta(seconds=self.now_s)

    def fetch(self) -> dict[str, str]:
        self.fetched += 1
        if self.failure:
            raise self.failure
        ends = NOW + datetime.timedelta(seconds=self.now_s + self.life_s)
        return {"access_key": KEY, "secret_key": SECRET, "token": TOKEN, "expiry_time": ends.isoformat()}


@pytest.mark.parametrize("life_s", [60.0, 300.0, 900.0, 3600.0, 43200.0])
def test_credentials_are_renewed_once_when_little_of_their_time_is_left(life_s: float) -> None:
    renewals = Renewals(life_s)
    sign_in.fetch_credentials(session_of(renewals.credentials))
    for renewals.now_s, fetched in ((0.0, 1), (0.7 * life_s, 1), (life_s - min(900.0, life_s / 4) + 0.1, 2)):
        for _ in range(3):
            renewals.credentials.get_frozen_credentials()
        assert renewals.fetched == fetched


@pytest.mark.parametrize(
    ("failure", "name"),
    [
        (ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "AssumeRole"), "AccessDenied"),
        (CredentialRetrievalError(provider="custom-process", error_msg="no"), "CredentialProcessFailed"),
        (FileNotFoundError("no"), "CredentialsUnavailable"),
        (RefreshWithMFAUnsupportedError(), "RoleSessionEnded"),
    ],
)
def test_a_refusal_to_renew_credentials_holds_for_a_while_and_for_all(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, name: str
) -> None:
    renewals = Renewals(3600.0)
    monkeypatch.setattr(sign_in, "time", SimpleNamespace(monotonic=lambda: renewals.now_s))
    sign_in.fetch_credentials(session_of(renewals.credentials))
    renewals.failure = failure
    for renewals.now_s, fetched in ((2800.0, 2), (2859.0, 2), (2860.0, 3)):
        for _ in range(3):
            renewals.credentials.get_frozen_credentials()  # they are still valid
        assert renewals.fetched == fetched
    renewals.now_s = 3599.0
    for _ in range(3):
        with pytest.raises(SignInError) as raised:
            renewals.credentials.get_frozen_credentials()
        assert raised.value.name == name
        assert not errors.FATAL_FOR_ALL.isdisjoint(errors.error_names(raised.value))
    assert renewals.fetched == 4


def test_credentials_that_are_old_when_they_come_have_expired_or_the_clock_is_wrong() -> None:
    renewals = Renewals(-60.0)
    with pytest.raises(SignInError) as raised:
        sign_in.fetch_credentials(session_of(renewals.credentials))
    assert raised.value.name == "CredentialsExpired"
    assert "by this machine's clock" in raised.value.cause
