"""AWS gets no more calls than its quotas allow, and is asked again when that may help: rates, clocks, orders."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import math
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore
import pytest
from botocore import exceptions
from botocore.hooks import HierarchicalEmitter
from support.program import Limits, constant

from iot_elf import aws, defaults, state, text
from iot_elf.aws import RetryLater
from iot_elf.errors import ElfError, NotAwsError
from iot_elf.events import EventQueue, Interrupted
from iot_elf.places import Place

from .stand_ins import Clock, logged, refusal

PATIENCE_S = 10.0
ARN = "arn:aws:iot:us-west-2:123456789012:cert/abc"
# https://docs.aws.amazon.com/general/latest/gr/iot-core.html, calls per second
PUBLISHED = {
    10: """CreateKeysAndCertificate UpdateCertificate DeleteCertificate DescribeCertificate ListCertificates
        ListPrincipalThings ListThings DescribeEndpoint CreatePolicy DeletePolicy DeletePolicyVersion ListPolicyVersions
        CreatePolicyVersion
        GetPolicy ListTargetsForPolicy""",
    15: "AttachPolicy DetachPolicy ListAttachedPolicies",
    20: "ListThingPrincipals",
    100: "CreateThing DeleteThing AttachThingPrincipal DetachThingPrincipal",
    350: "DescribeThing",
}


# Quotas


class Stopping:
    """The event of Ctrl-C; what waits for it is written down, and does not wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def set(self) -> None:
        pass

    def wait(self, timeout_s: float) -> None:
        self.waits.append(timeout_s)


class Account:
    """Calls to AWS, as botocore announces them, and how long each was made to wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, things_per_s: float = 10.0) -> None:
        self.clock, self._stopping = Clock(monkeypatch, aws), Stopping()
        self._hooks = HierarchicalEmitter()
        aws.limit_rate(self._hooks, things_per_s, self._stopping)  # type: ignore[arg-type]

    def call(self, operation: str, times: int = 1) -> list[float]:
        """Call at the same moment, and return the waits."""
        self._stopping.waits.clear()
        for _ in range(times):
            self._hooks.emit(f"before-send.iot.{operation}", request=None)
        return [round(wait_s, 6) for wait_s in self._stopping.waits]

    def answer(self, operation: str, parsed: object) -> None:
        self._hooks.emit(f"response-received.iot.{operation}", parsed_response=parsed, exception=None)


def test_the_quotas_are_those_that_aws_publishes() -> None:
    published = {operation: rate for rate, operations in PUBLISHED.items() for operation in operations.split()}
    assert constant("QUOTAS") == published
    assert constant("THINGS_PER_S") == 10.0


@pytest.mark.parametrize(
    ("operation", "things_per_s", "at_once", "period_s"),
    [
        ("DeletePolicy", 10.0, 10, 0.1),
        ("ListThingPrincipals", 10.0, 20, 0.05),
        ("CreateThing", 10.0, 100, 0.01),
        ("DeletePolicy", 20.0, 20, 0.05),
        ("DeletePolicy", 2.0, 2, 0.5),
        ("DeletePolicy", 1.0, 1, 1.0),
        ("DeletePolicy", 0.1, 1, 10.0),
    ],
)
def test_a_seconds_worth_of_calls_goes_at_once_and_then_each_20_ms_after_its_token(
    monkeypatch: pytest.MonkeyPatch, operation: str, things_per_s: float, at_once: int, period_s: float
) -> None:
    waits = Account(monkeypatch, things_per_s).call(operation, at_once + 3)
    tokens_at = [period_s * number for number in range(1 - at_once, 4)]  # the bucket was full
    assert waits == [max(0.0, round(0.02 + at, 6)) for at in tokens_at]


def test_each_operation_has_a_quota_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account(monkeypatch)
    assert account.call("DeletePolicy", 10)[-1] == 0.02
    assert account.call("CreatePolicy", 10)[-1] == 0.02
    assert account.call("DeletePolicy") == [0.12]


def test_time_without_calls_allows_as_many_calls_later_but_no_more_than_a_burst(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    account = Account(monkeypatch)
    account.call("DeletePolicy", 10)
    account.clock.now += 0.5
    assert account.call("DeletePolicy", 6) == [0.0] * 4 + [0.02, 0.12]
    account.clock.now += 3600
    assert account.call("DeletePolicy", 11) == [0.0] * 9 + [0.02, 0.12]


def test_no_second_has_more_calls_than_the_quota_and_its_burst_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS's token bucket holds as many tokens as the quota allows calls a second, and is filled at that rate."""
    account, tokens, at = Account(monkeypatch), 10.0, 1000.0
    for _ in range(100):
        (wait_s,) = account.call("DeletePolicy")
        account.clock.now += wait_s
        tokens, at = min(10.0, tokens + 10.0 * (account.clock.now - at)) - 1.0, account.clock.now
        assert tokens >= -1e-6
    assert 9.0 <= at - 1000.0 < 9.1


def test_an_operation_that_aws_throttles_pauses_for_a_second_and_this_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    account = Account(monkeypatch)
    with logged() as lines:
        for operation in ("DeletePolicy", "DeletePolicy", "CreateThing"):
            account.answer(operation, {"Error": {"Code": "ThrottlingException"}})
    assert lines == ["WARNING AWS throttles DeletePolicy: slowing down"]
    assert account.call("DeletePolicy", 2) == [1.1, 1.2]
    assert account.call("CreateThing") == [1.01]
    assert account.call("CreatePolicy") == [0.0]


def test_calls_that_already_wait_for_longer_do_not_come_earlier_for_being_throttled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    account = Account(monkeypatch)
    account.call("DeletePolicy", 40)  # the next is due in 4.02 s
    account.answer("DeletePolicy", {"Error": {"Code": "ThrottlingException"}})
    assert account.call("DeletePolicy") == [3.12]


@pytest.mark.parametrize("answer", [None, {}, {"Error": {}}, {"Error": {"Code": "LimitExceededException"}}])
def test_no_other_answer_slows_an_operation_down(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    account = Account(monkeypatch)
    with logged() as lines:
        account.answer("DeletePolicy", answer)
    assert (account.call("DeletePolicy"), lines) == ([0.0], [])


# The client


class Session:
    """boto3's session, as open_session() returns it: its events are botocore's, and its calls are answered at once."""

    region = "eu-west-1"  # of AWS's configuration

    def __init__(self, credentials: Any = None) -> None:
        self.events = HierarchicalEmitter()
        self.credentials, self.made = credentials, dict[str, Any]()

    def get_credentials(self) -> Any:
        return self.credentials

    def client(self, service: str, region_name: str | None, endpoint_url: str | None) -> Any:
        self.made = {"service": service, "region_name": region_name, "endpoint_url": endpoint_url}
        url = endpoint_url or "https://iot.example.com"
        meta = SimpleNamespace(region_name=region_name or self.region, endpoint_url=url, events=self.events)
        answer = {"endpointAddress": "ABC-ats.iot.example.com"}
        return Client(meta=meta, describe_endpoint=lambda **_: answer)


class Client(SimpleNamespace):
    """boto3's client, which makes its classes of exceptions when they are first used, for each thread that is first."""

    made_by: threading.Thread | None = None

    @property
    def exceptions(self) -> None:
        self.made_by = threading.current_thread()


def connect(
    monkeypatch: pytest.MonkeyPatch,
    place: Place,
    session: Session,
    events: EventQueue,
    given: Place = Place(),  # noqa: B008 - it can't be changed
    **headers: str,
) -> Place:
    def open_session(place: Place, of_options: Place, proxies: object, ask_for_code: object) -> tuple[Any, Place]:
        assert (of_options, proxies, ask_for_code) == (given, {"https": "proxy"}, str)
        return session, place._replace(profile=given.profile)

    monkeypatch.setattr(aws, "open_session", open_session)
    iot, place = aws.connect_control_plane(place, given, events, headers, 10.0, {"https": "proxy"}, str)
    assert iot.made_by is threading.current_thread()
    return place


def credentials(account: str | None) -> Any:
    frozen = SimpleNamespace(account_id=account)
    return SimpleNamespace(get_frozen_credentials=lambda: frozen, method="env")


@pytest.mark.parametrize(
    ("local", "recorded", "of_credentials", "account", "source"),
    [
        (False, None, "123456789012", "123456789012", "env"),
        (False, None, "12345678901", None, "env"),
        (False, None, None, None, "env"),
        (True, None, "123456789012", None, None),
    ],
)
def test_the_place_is_completed_with_the_broker_and_with_the_account_if_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
    local: bool,
    recorded: str | None,
    of_credentials: str | None,
    account: str | None,
    source: str | None,
) -> None:
    session = Session(credentials(of_credentials))
    place = Place(region="us-west-2", local=local, account=recorded)
    assert connect(monkeypatch, place, session, EventQueue()) == Place(
        region="us-west-2",
        endpoint_url="https://iot.example.com",
        account=account,
        data_endpoint="abc-ats.iot.example.com",
        local=local,
        source=source,
    )
    assert session.made == {"service": "iot", "region_name": "us-west-2", "endpoint_url": None}


def test_the_account_that_is_recorded_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(region="us-west-2", account="111111111111", data_endpoint="abc-ats.iot.example.com")
    session = Session(credentials("222222222222"))
    assert connect(monkeypatch, place, session, EventQueue()).account == "111111111111"


def test_without_credentials_the_place_has_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    place = connect(monkeypatch, Place(region="us-west-2"), Session(), EventQueue())
    assert (place.account, place.source) == (None, None)


AWSS_OWN, EMULATOR = "https://iot.us-west-2.amazonaws.com", "https://emulator:4566"


@pytest.mark.parametrize(
    ("recorded", "given", "local", "used", "to_record"),
    [
        (EMULATOR, None, False, EMULATOR, EMULATOR),
        (EMULATOR, None, True, EMULATOR, EMULATOR),
        (EMULATOR, "https://other", False, "https://other", "https://other"),
        (None, EMULATOR, False, EMULATOR, EMULATOR),
        (AWSS_OWN, None, False, None, "https://iot.example.com"),  # an earlier ELF recorded it
        (AWSS_OWN, EMULATOR, False, EMULATOR, EMULATOR),
        (None, AWSS_OWN, False, AWSS_OWN, None),
        (EMULATOR, AWSS_OWN, False, AWSS_OWN, None),
    ],
)
def test_an_endpoint_of_the_options_counts_for_more_than_the_fleets_and_one_of_awss_own_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
    recorded: str | None,
    given: str | None,
    local: bool,
    used: str | None,
    to_record: str | None,
) -> None:
    session, place = Session(), Place(region="us-west-2", endpoint_url=recorded, local=local)
    place = connect(monkeypatch, place, session, EventQueue(), Place(endpoint_url=given))
    assert (session.made["endpoint_url"], place.endpoint_url) == (used, to_record)


def test_a_place_without_a_region_gets_the_one_that_the_client_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connect(monkeypatch, Place(local=True), Session(), EventQueue()).region == "eu-west-1"


def test_credentials_for_another_account_are_refused_and_the_fleet_is_named_as_it_was_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Place(region="us-west-2", profile="recorded", data_endpoint="xyz-ats.iot.example.com")
    with pytest.raises(ElfError, match="another account") as raised:
        connect(monkeypatch, place, Session(), EventQueue(), Place(profile="given"))
    assert "profile recorded" in raised.value.cause


@pytest.mark.parametrize("local", [True, False])
def test_a_request_has_its_headers_keeps_the_quota_and_is_not_sent_after_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    monkeypatch.setattr(text, "_secrets", frozenset())
    events, session = EventQueue(), Session()
    stopping = events.stopping = Stopping()  # type: ignore[assignment]
    connect(monkeypatch, Place(region="us-west-2", local=local), session, events, key="a-secret-of-the-embedded-aws")
    request = SimpleNamespace(headers={"a": "b"})
    session.events.emit("before-send.iot.DeletePolicy", request=request)
    assert request.headers == {"a": "b", "key": "a-secret-of-the-embedded-aws"}
    assert len(stopping.waits) == (0 if local else 1)
    assert text.redacted("it is a-secret-of-the-embedded-aws") == "it is ***"
    # Ctrl-C counts even when it comes during the wait for the quota
    stopping.wait = lambda _: events.interrupt(2, None)  # type: ignore[method-assign]
    if local:
        events.interrupt(2, None)
    with pytest.raises(Interrupted):
        session.events.emit("before-send.iot.DeletePolicy", request=request)


def test_calls_answers_and_retries_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    connect(monkeypatch, Place(region="us-west-2"), session, EventQueue())
    with logged() as lines:
        session.events.emit("provide-client-params.iot.DeletePolicy", params={"policyName": "p"}, model=model_of())
        response = SimpleNamespace(status_code=200)
        session.events.emit("after-call.iot.X", http_response=response, parsed={}, model=model_of("DescribeThing"))
    assert lines == ["DEBUG AWS Operation(policyName=p)", "DEBUG AWS DescribeThing: HTTP 200 "]
    with pytest.raises(NotAwsError):
        page = {"status_code": 200, "body": b"<html>", "headers": {}}
        session.events.emit("before-parse.iot.X", response_dict=page, operation_model=model_of("DescribeThing"))
    with pytest.raises(exceptions.ClientError):
        session.events.emit("needs-retry.iot.X", **retry("CreateKeysAndCertificate", 500, None, 1))
    for service in ("iot", "sts"):
        bases: list[type] = [Api]
        session.events.emit(f"creating-client-class.{service}", class_attributes={}, base_classes=bases)
        client = type("Made", tuple(bases), {})({})
        with pytest.raises(NotAwsError):
            client._make_api_call("DescribeThing", {})["thingArn"]


# Answers


def model_of(name: str = "Operation", **members: str) -> Any:
    """botocore's model of an operation, whose answer has fields of these types; none: it has no answer."""
    shapes = {field: SimpleNamespace(type_name=kind) for field, kind in members.items()}
    return SimpleNamespace(name=name, output_shape=SimpleNamespace(members=shapes) if members else None)


IS_AWSS = {"x-amzn-RequestId": "0"}


@pytest.mark.parametrize(
    ("status", "body", "headers", "lacking"),
    [
        (200, b"{}", IS_AWSS, None),
        (200, b"", IS_AWSS, None),  # where nothing is due
        (200, b"{}", {}, "request ID"),
        (200, b"", {}, "request ID"),
        (200, b"<html>", {}, "request ID"),
        (200, b"<html>", IS_AWSS, "JSON object"),
        (200, b"[]", IS_AWSS, "JSON object"),
        (200, b'"text"', IS_AWSS, "JSON object"),
        (200, b"\xff", IS_AWSS, "JSON object"),
        (299, b"{}", {}, "request ID"),
        (300, b"{}", {}, None),
        (404, b'{"message": "no"}', {}, None),  # as its code says
        (404, b"<html>", {}, None),  # the code is the status alone, which says that it is not
        (404, b"[]", {}, "JSON object"),
    ],
)
def test_an_answer_is_awss_if_it_is_json_and_has_a_request_id(
    status: int, body: bytes, headers: dict[str, str], lacking: str | None
) -> None:
    answer = {"status_code": status, "body": body, "headers": headers}
    if not lacking:
        aws._refuse_others("https://iot", answer, model_of("DeleteThing"))
        return
    with pytest.raises(NotAwsError) as raised:
        aws._refuse_others("https://iot", answer, model_of("DeleteThing"))
    assert f"https://iot (no {lacking} in its answer to DeleteThing)" in raised.value.cause


class Api:
    """botocore's client, whose answer is given."""

    def __init__(self, answer: dict[str, Any], **members: str) -> None:
        service = SimpleNamespace(operation_model=lambda name: model_of(name, **members))
        self.answer, self.meta = answer, SimpleNamespace(endpoint_url="https://iot:8443", service_model=service)

    def _make_api_call(self, operation: str, parameters: Any) -> Any:
        return self.answer


class Answering(aws._Client, Api):
    pass


@pytest.mark.parametrize(
    ("answer", "read", "lacking"),
    [
        ({}, lambda it: it["thingArn"], "thingArn"),
        ({"thingArn": ""}, lambda it: it["thingArn"], "thingArn"),
        ({"thingArn": None}, lambda it: it["thingArn"], "thingArn"),
        ({"about": {}}, lambda it: it["about"]["status"], "about.status"),
        ({"things": [{"thingName": "t"}, {"other": "u"}]}, lambda it: it["things"][1]["thingName"], "things.thingName"),
    ],
)
def test_a_field_that_is_read_and_lacking_is_named(answer: Any, read: Callable[[Any], Any], lacking: str) -> None:
    with pytest.raises(NotAwsError) as raised:
        read(Answering(answer)._make_api_call("DescribeThing", {}))
    assert f"https://iot:8443 (no {lacking} in its answer to DescribeThing)" in raised.value.cause


@pytest.mark.parametrize("targets", [{}, {"targets": None}, {"targets": []}])
def test_a_list_that_aws_leaves_out_is_empty(targets: dict[str, Any]) -> None:
    api = Answering({**targets, "others": ["a"], "of": {"x": 0}}, targets="list", others="list", of="structure")
    assert api._make_api_call("ListTargetsForPolicy", {}) == {"targets": [], "others": ["a"], "of": {"x": 0}}


def test_the_log_shows_calls_and_codes_and_no_answers() -> None:
    response = SimpleNamespace(status_code=400, url="https://server")
    with logged() as lines:
        aws._log_call({"thingName": "thing_0", "principal": "p"}, model_of("DetachThingPrincipal"))
        aws._log_answer(response, {"Error": {"Code": "ThrottlingException"}}, model_of("DeleteThing"))
        aws._log_answer(response, {"secret": "s"}, model_of("DeleteThing"))
    assert lines == [
        "DEBUG AWS DetachThingPrincipal(thingName=thing_0, principal=p)",
        "DEBUG AWS DeleteThing: HTTP 400 ThrottlingException",
        "DEBUG AWS DeleteThing: HTTP 400 ",
    ]


# Repetitions


LOST = exceptions.ReadTimeoutError(endpoint_url="https://iot")
UNREACHED = exceptions.EndpointConnectionError(endpoint_url="https://iot")


def retry(operation: str, status: int | None, caught: Exception | None, attempts: int, code: str = "E") -> Any:
    """What botocore tells before it tries again; without a status there was no answer."""
    parsed = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    response = (SimpleNamespace(status_code=status), parsed) if status else None
    return {
        "response": response,
        "caught_exception": caught,
        "attempts": attempts,
        "operation": SimpleNamespace(name=operation),
        "request_dict": {"context": {}},
    }


@pytest.mark.parametrize(
    ("operation", "status", "caught", "attempts", "code", "raises"),
    [
        # may have made a certificate
        ("CreateKeysAndCertificate", None, LOST, 1, "", LOST),
        ("CreateKeysAndCertificate", 500, None, 1, "InternalFailure", True),
        ("CreateKeysAndCertificate", 300, None, 1, "E", True),
        ("CreateKeysAndCertificate", 299, None, 1, "E", None),
        ("CreateKeysAndCertificate", 200, None, 1, "", None),
        # may have made a version of a policy
        ("CreatePolicyVersion", None, LOST, 1, "", LOST),
        ("CreatePolicyVersion", 500, None, 1, "InternalFailure", True),
        ("CreatePolicyVersion", 503, None, 1, "ServiceUnavailable", None),
        ("CreatePolicyVersion", None, UNREACHED, 9, "", None),
        # the first calls of a command
        ("DescribeEndpoint", None, UNREACHED, 2, "", None),
        ("DescribeEndpoint", None, UNREACHED, 3, "", UNREACHED),
        ("DescribeEndpoint", None, UNREACHED, 4, "", UNREACHED),
        ("GetCallerIdentity", None, UNREACHED, 3, "", UNREACHED),
        ("AssumeRole", None, UNREACHED, 3, "", UNREACHED),
        ("AssumeRole", None, UNREACHED, 1, "", None),
        ("DescribeEndpoint", 503, None, 3, "ServiceUnavailable", None),
        # later ones
        ("DeleteThing", None, UNREACHED, 9, "", None),
        ("DeleteThing", 503, None, 9, "ServiceUnavailable", None),
        ("DeleteThing", 429, None, 1, "ThrottlingException", None),
        # a limit that does not pass
        ("CreatePolicy", 400, None, 1, "LimitExceededException", True),
        ("DeleteThing", None, None, 1, "", None),
    ],
)
def test_botocore_repeats_a_call_unless_elf_has_to_know(
    operation: str, status: int | None, caught: Exception | None, attempts: int, code: str, raises: object
) -> None:
    arguments = retry(operation, status, caught, attempts, code)
    if not raises:
        aws._raise_instead_of_retry(**arguments)
        return
    with pytest.raises((exceptions.ClientError, exceptions.BotoCoreError)) as raised:
        aws._raise_instead_of_retry(**arguments)
    if isinstance(raises, Exception):
        assert raised.value is raises
    else:
        assert isinstance(raised.value, exceptions.ClientError)
        assert raised.value.operation_name == operation
        assert raised.value.response["Error"]["Code"] == code


@pytest.mark.parametrize("attempts", [1, 3])
def test_an_error_says_how_often_a_call_was_repeated(attempts: int) -> None:
    with pytest.raises(exceptions.ClientError) as raised:
        aws._raise_instead_of_retry(**retry("CreateKeysAndCertificate", 400, None, attempts))
    assert raised.value.response["ResponseMetadata"]["RetryAttempts"] == attempts - 1


@pytest.mark.parametrize(
    ("error", "may_have_arrived"),
    [
        *[(refusal("Any", status), status in (500, 502, 504)) for status in (400, 403, 404, 429, 501, 505)],
        (refusal("InternalFailure", 500), True),
        (refusal("Any", 502), True),
        (refusal("ServiceUnavailable", 503), False),  # an answer: not now
        (refusal("Any", 504), True),
        (LOST, True),
        (exceptions.ConnectionClosedError(endpoint_url="https://iot"), True),
        (exceptions.HTTPClientError(error="any"), True),
        (exceptions.ConnectTimeoutError(endpoint_url="https://iot"), False),
        (UNREACHED, False),
        (NotAwsError("https://iot"), True),
        (ElfError("Name", "a", "b"), False),
        (OSError("any"), False),
    ],
)
def test_a_call_may_have_arrived_unless_aws_refuses_it_or_was_not_reached(
    error: Exception, may_have_arrived: bool
) -> None:
    assert aws.may_have_arrived(error) is may_have_arrived


@pytest.mark.parametrize(
    ("earlier", "may_have_arrived"),
    [((500, None), True), ((None, LOST), True), ((429, None), False), ((503, None), False)],
)
def test_an_error_says_whether_an_earlier_attempt_may_have_arrived(
    earlier: tuple[int | None, Exception | None], may_have_arrived: bool
) -> None:
    request = {"context": dict[str, Any]()}
    unreached = exceptions.EndpointConnectionError(endpoint_url="https://iot")
    for status, caught in (earlier, (404, None), (None, unreached)):
        last = {**retry("DeleteThing", status, caught, 1), "request_dict": request}
        aws._raise_instead_of_retry(**last)
        if status == 404:
            answer = exceptions.ClientError(last["response"][1], "DeleteThing")
            assert aws.may_have_arrived(answer) is may_have_arrived
    assert aws.may_have_arrived(unreached) is may_have_arrived


def test_an_answer_that_can_not_be_read_means_that_the_call_arrived() -> None:
    from botocore.parsers import ResponseParserError

    assert aws.may_have_arrived(ResponseParserError("not JSON"))


@pytest.mark.parametrize(
    ("waited_s", "limit_s", "pause_s"),
    [
        (0.0, 300.0, 1.0),
        (0.5, 300.0, 1.0),
        (1.0, 300.0, 1.0),
        (4.0, 300.0, 4.0),
        (29.0, 300.0, 29.0),
        (31.0, 300.0, 30.0),
        (200.0, 300.0, 30.0),
        (290.0, 300.0, 10.0),
        (300.0, 300.0, 0.0),
        (301.0, 300.0, -1.0),
        (0.0, 0.5, 0.5),
        (0.4, 1.0, 0.6),
    ],
)
def test_each_pause_is_as_long_as_all_before_it_but_no_longer_than_30_s_or_the_rest(
    waited_s: float, limit_s: float, pause_s: float
) -> None:
    assert RetryLater(ElfError("Name", "a", "b"), limit_s, "busy").pause_s(waited_s) == pytest.approx(pause_s)


def test_a_step_to_repeat_says_which_call_and_why() -> None:
    error = refusal("ThrottlingException", operation="CreatePolicy")
    later = RetryLater(error, 60.0, "AWS is busy")
    assert (later.error, later.limit_s, later.reason, later.again()) == (error, 60.0, "CreatePolicy: AWS is busy", None)
    assert RetryLater(UNREACHED, 60.0, "AWS is busy").reason == "AWS: AWS is busy"


# Many at a time


class Impatient(EventQueue):
    """Events of some steps; once none of these is under way, what is due later is due now, and the clock is there."""

    def __init__(self, clock: Clock, under_way: float) -> None:
        super().__init__()
        self.clock, self.under_way, self.deadline = clock, under_way, math.inf
        self.at_get: Callable[[], object] = lambda: None

    def get(self, deadline: float) -> Any:
        self.at_get()
        self.deadline = deadline
        while True:
            self.check()
            if not self.under_way:
                assert deadline < math.inf, "nothing is under way, and nothing is due"
                self.clock.now = max(self.clock.now, deadline)
                self.under_way = 1
                return None
            if (event := self._events.get(timeout=PATIENCE_S)) is not None:
                self.under_way -= 1
                return event


class Steps:
    """A step, which answers what `results` has for a thing, one after the other; the calls are written down."""

    def __init__(self, clock: Clock, results: Mapping[str, Iterable[Any]]) -> None:
        self.calls: list[tuple[float, str]] = []
        self._clock, self._results = clock, {thing: iter(answers) for thing, answers in results.items()}

    def __call__(self, thing: str) -> Any:
        self.calls.append((round(self._clock.now - 1000.0, 3), thing))
        result = next(self._results[thing])
        if isinstance(result, BaseException):
            raise result
        return result

    def run(self) -> list[tuple[str, Any]]:
        events = Impatient(self._clock, len(self._results))
        return list(aws.run_parallel(events, list(self._results), self))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, aws)


@pytest.fixture
def one_at_a_time(limits: Limits) -> None:
    limits(CALLS_IN_FLIGHT=1)


@pytest.mark.usefixtures("one_at_a_time")
def test_each_thing_gets_its_result_or_its_error(clock: Clock) -> None:
    error, end = ElfError("Name", "a", "b"), SystemExit(3)
    assert Steps(clock, {"a": [1], "b": [error], "c": [None], "d": [end], "e": [2]}).run() == [
        ("a", 1),
        ("b", error),
        ("c", None),
        ("d", end),
        ("e", 2),
    ]


def test_without_things_nothing_is_done(clock: Clock) -> None:
    assert Steps(clock, {}).run() == []


def busy(limit_s: float, reason: str = "busy", again: Callable[[], Any] = lambda: None) -> RetryLater:
    return RetryLater(refusal("ThrottlingException", operation="CreatePolicy"), limit_s, reason, again)


def test_a_thing_that_aws_is_not_ready_for_is_asked_about_less_and_less_often_and_then_fails(clock: Clock) -> None:
    attempts = [busy(130.0) for _ in range(20)]
    steps = Steps(clock, {"a": attempts})
    with logged() as lines:
        ((thing, result),) = steps.run()
    times = [at for at, _ in steps.calls]
    assert times == [0, 1, 2, 4, 8, 16, 32, 62, 92, 122, 130]
    assert (thing, result) == ("a", attempts[10].error)
    assert lines == ["INFO CreatePolicy: busy: trying again for up to 130 s"]


def test_a_fleet_that_somebody_else_deleted_costs_one_pause(clock: Clock) -> None:
    names = [f"thing_{number}" for number in range(100)]
    steps = Steps(clock, {name: [absent(), "gone"] for name in names})
    with logged() as lines:
        assert sorted(steps.run()) == sorted((name, "gone") for name in names)
    assert {at for at, _ in steps.calls[:100]} == {0}
    assert {at for at, _ in steps.calls[100:]} == {5}
    assert lines == ["INFO DescribeThing: not found, which may pass: trying again for up to 20 s"]


def absent() -> RetryLater:
    error = refusal("ResourceNotFoundException", 404, operation="DescribeThing")
    return RetryLater(error, 20.0, "not found, which may pass", least_s=5.0)


def test_before_a_step_is_repeated_what_it_waits_for_is_done_again(clock: Clock) -> None:
    calls_before: list[int] = []
    later = busy(10.0, again=lambda: calls_before.append(len(steps.calls)))
    steps = Steps(clock, {"a": [later, "done"]})
    assert steps.run() == [("a", "done")]
    assert (calls_before, steps.calls) == ([1], [(0, "a"), (1, "a")])


def test_a_step_is_not_repeated_while_what_it_waits_for_fails(clock: Clock) -> None:
    error = ElfError("Name", "still", "not")

    def fail() -> None:
        raise error

    steps = Steps(clock, {"a": [busy(10.0, again=fail)]})
    assert steps.run() == [("a", error)]
    assert len(steps.calls) == 1


@pytest.mark.usefixtures("one_at_a_time")
def test_of_things_that_wait_the_one_that_is_due_first_comes_first(clock: Clock) -> None:
    results = {"a": [busy(0.9), 1], "b": [busy(0.3), 2], "c": [busy(0.6), 3], "d": [busy(0.3), 4]}
    steps = Steps(clock, results)
    assert steps.run() == [("b", 2), ("d", 4), ("c", 3), ("a", 1)]
    assert steps.calls[4:] == [(0.3, "b"), (0.3, "d"), (0.6, "c"), (0.9, "a")]


@pytest.mark.usefixtures("one_at_a_time")
def test_each_thing_and_each_reason_has_its_own_time_and_each_reason_is_said_once(clock: Clock) -> None:
    results = {
        "a": [busy(1.0), busy(1.0, "not visible"), 1],
        "b": [busy(1.0), busy(1.0), 2],
    }
    steps = Steps(clock, results)
    with logged() as lines:
        results_of = dict(steps.run())
    assert results_of["a"] == 1  # the second reason began later
    assert isinstance(results_of["b"], exceptions.ClientError)
    assert lines == [
        "INFO CreatePolicy: busy: trying again for up to 1 s",
        "INFO CreatePolicy: not visible: trying again for up to 1 s",
    ]


def test_as_many_calls_are_made_at_the_same_time_as_allowed_and_no_more(clock: Clock, limits: Limits) -> None:
    assert constant("CALLS_IN_FLIGHT") == 20
    limits(CALLS_IN_FLIGHT=3)
    barrier, lock = threading.Barrier(3), threading.Lock()
    now = most = 0

    def step(thing: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        barrier.wait(PATIENCE_S)
        with lock:
            now -= 1
        return thing

    events = Impatient(clock, 9)
    assert sorted(aws.run_parallel(events, range(9), step)) == [(n, n) for n in range(9)]
    assert most == 3


def test_memory_does_not_grow_with_the_number_of_things_that_wait(clock: Clock, limits: Limits) -> None:
    limits(CALLS_IN_FLIGHT=3)
    submitted, submit, kept = [], ThreadPoolExecutor.submit, weakref.WeakSet[Any]()

    def witness(pool: ThreadPoolExecutor, call: Any, number: int) -> Any:
        submitted.append(number)
        future = submit(pool, call, number)
        kept.add(future)
        return future

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", witness)
        results = aws.run_parallel(Impatient(clock, 100), range(100), lambda thing: thing)
        for ended, (thing, result) in enumerate(results, 1):
            assert (thing, result) == (result, thing)
            assert len(submitted) <= ended + 6
            assert len(kept) <= 15  # these six, and those that are just ending
    assert submitted == list(range(100))


FATAL = (
    "ExpiredTokenException ExpiredToken UnrecognizedClientException InvalidClientTokenId InvalidSignatureException "
    "RequestTimeTooSkewed LimitExceededException"
)


@pytest.mark.parametrize("error", [*map(refusal, FATAL.split()), UNREACHED, OSError(28, "full")], ids=str)
def test_after_an_error_that_all_would_get_no_more_are_started(clock: Clock, limits: Limits, error: Exception) -> None:
    """Those that run come to their end, and those that wait or pause are dropped."""
    limits(CALLS_IN_FLIGHT=2)
    running, told = threading.Event(), threading.Event()
    started: list[str] = []

    def step(thing: str) -> str:
        started.append(thing)
        if thing == "pausing":
            raise busy(60.0)
        if thing == "failing":
            assert running.wait(PATIENCE_S)
            raise error
        running.set()
        assert told.wait(PATIENCE_S)
        return "done"

    events = Impatient(clock, math.inf)  # so that nothing is due
    found: list[tuple[str, Any]] = []
    things = ["pausing", "failing", "running", "waiting", "waiting too", *(f"not submitted {n}" for n in range(3))]
    for thing, result in aws.run_parallel(events, things, step):
        found.append((thing, result))
        events.at_get = told.set  # at the next wait those that wait are dropped
    assert found[0] == ("failing", error)
    assert {thing for thing, _ in found} == {*started} - {"pausing"}
    assert events.deadline == math.inf  # nothing pauses any more
    assert {*started} <= {*things[:4]}  # the thread of the first may have begun with "waiting" meanwhile


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("error", [refusal("ResourceNotFoundException"), ElfError("Name", "a", "b"), SystemExit(1)])
def test_after_an_error_of_one_thing_the_others_go_on(clock: Clock, error: BaseException) -> None:
    assert Steps(clock, {"a": [error], "b": [2]}).run() == [("a", error), ("b", 2)]


def test_after_ctrl_c_the_running_calls_finish_and_no_other_begins(
    clock: Clock, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(CALLS_IN_FLIGHT=2)
    events, both, cancelled = Impatient(clock, 5), threading.Barrier(2), threading.Event()
    finished: list[int] = []
    wait = concurrent.futures.wait

    def witness(*arguments: Any) -> Any:
        cancelled.set()  # what has not begun by now
        return wait(*arguments)

    def step(thing: int) -> None:
        both.wait(PATIENCE_S)
        if thing == 0:
            events.interrupt(2, None)
        assert cancelled.wait(PATIENCE_S)
        time.sleep(0.01)
        finished.append(thing)

    monkeypatch.setattr(concurrent.futures, "wait", witness)
    with logged() as lines, pytest.raises(Interrupted):
        list(aws.run_parallel(events, range(5), step))
    assert sorted(finished) == [0, 1]
    assert lines == ["WARNING stopping (up to 4 s); press Ctrl-C again to stop now"]


def test_a_call_that_does_not_finish_holds_up_ctrl_c_for_some_seconds_only(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert defaults.STOP_S == 4.0
    monkeypatch.setattr(defaults, "STOP_S", 0.05)
    events, answer = Impatient(clock, 1), threading.Event()

    def step(thing: int) -> None:
        events.interrupt(2, None)
        answer.wait(PATIENCE_S)

    began = time.monotonic()
    with logged() as lines, pytest.raises(Interrupted):
        list(aws.run_parallel(events, [0], step))
    assert 0.05 <= time.monotonic() - began < PATIENCE_S / 2
    assert lines[1:] == ["WARNING 1 call: no answer within 0.05 s"]
    answer.set()


def test_whoever_loses_interest_waits_for_the_running_calls_too(clock: Clock) -> None:
    both, answer, finished = threading.Barrier(2), threading.Event(), list[int]()

    def step(thing: int) -> None:
        both.wait(PATIENCE_S)
        if thing:
            answer.wait(PATIENCE_S)
            time.sleep(0.02)
        finished.append(thing)

    results = aws.run_parallel(Impatient(clock, 2), [0, 1], step)
    assert next(results) == (0, None)
    answer.set()
    results.close()  # type: ignore[attr-defined]
    assert finished == [0, 1]


def test_a_call_in_a_thread_returns_what_it_does(clock: Clock) -> None:
    threads: list[threading.Thread] = []

    def call() -> int:
        threads.append(threading.current_thread())
        return 7

    assert aws.run_in_thread(Impatient(clock, 1), call) == 7
    assert threads != [threading.current_thread()]


@pytest.mark.parametrize("error", [ElfError("Name", "a", "b"), KeyboardInterrupt()])
def test_a_call_in_a_thread_raises_what_it_does(clock: Clock, error: BaseException) -> None:
    def call() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        aws.run_in_thread(Impatient(clock, 1), call)
    assert raised.value is error


@pytest.mark.usefixtures("one_at_a_time")
def test_the_answers_for_many_things_are_by_thing_and_the_first_error_counts(clock: Clock) -> None:
    first, second = ElfError("Name", "first", ""), ElfError("Name", "second", "")
    steps = Steps(clock, {"a": [1], "b": [None]})
    assert aws.answers_of(Impatient(clock, 2), ["a", "b"], steps) == {"a": 1, "b": None}
    steps = Steps(clock, {"a": [1], "b": [first], "c": [second]})
    with pytest.raises(ElfError) as raised:
        aws.answers_of(Impatient(clock, 3), ["a", "b", "c"], steps)
    assert raised.value is first


def test_independent_calls_are_made_at_the_same_time_and_answered_in_order() -> None:
    barrier = threading.Barrier(3)

    def call(number: int) -> int:
        barrier.wait(PATIENCE_S)
        time.sleep(0.01 * (3 - number))
        return number

    assert aws.concurrently(lambda: call(0), lambda: call(1), lambda: call(2)) == [0, 1, 2]


def test_of_independent_calls_all_are_made_and_the_first_error_counts() -> None:
    made: list[int] = []

    def call(number: int) -> None:
        time.sleep(0.01 * (3 - number))
        made.append(number)
        if number:
            raise ElfError("Name", str(number), "")

    with pytest.raises(ElfError) as raised:
        aws.concurrently(lambda: call(0), lambda: call(1), lambda: call(2))
    assert (raised.value.cause, sorted(made)) == ("1", [0, 1, 2])


# What is there, and what uses it


GONE = refusal("ResourceNotFoundException", 404)
CONFLICT = refusal("DeleteConflictException", 409)
REVOKED = refusal("CertificateStateException", 406)
DENIED = refusal("AccessDeniedException", 403)


class Call:
    """A call to AWS with its answers, one after the other; the parameters are written down."""

    def __init__(self, *answers: Any) -> None:
        self._answers, self.parameters = iter(answers), list[dict[str, Any]]()

    def __call__(self, **parameters: Any) -> Any:
        self.parameters.append(parameters)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_what_aws_does_not_have_is_none() -> None:
    assert aws.unless_missing(Call({"thingName": "a"}), thingName="a") == {"thingName": "a"}
    assert aws.unless_missing(Call(GONE), thingName="a") is None
    with pytest.raises(exceptions.ClientError):
        aws.unless_missing(Call(DENIED), thingName="a")


def test_what_was_just_made_and_is_not_found_is_looked_for_again() -> None:
    call = Call(GONE, GONE, {})
    with pytest.raises(RetryLater) as raised:
        aws.once_visible(call, thingName="a", principal=ARN)
    later = raised.value
    assert (later.error, later.limit_s, later.reason) == (GONE, 10.0, "DeleteThing: not visible in AWS yet")
    with pytest.raises(RetryLater):
        later.again()
    later.again()
    assert call.parameters == [{"thingName": "a", "principal": ARN}] * 3
    with pytest.raises(exceptions.ClientError):
        aws.once_visible(Call(DENIED), thingName="a")


@pytest.mark.parametrize(
    ("answer", "is_done"),
    [({}, True), (GONE, True), (REVOKED, True), (CONFLICT, False), (DENIED, False)],  # what is revoked stays so
)
def test_what_is_gone_is_detached(answer: Any, is_done: bool) -> None:
    call = Call(answer)
    with contextlib.nullcontext() if is_done else pytest.raises(exceptions.ClientError):
        aws.unless_gone(call, thingName="a")
    assert call.parameters == [{"thingName": "a"}]


def test_aws_may_take_five_minutes_to_see_that_something_is_detached() -> None:
    assert constant("CONSISTENCY_S") == 300.0


@pytest.mark.parametrize("parameters", [{"thingName": None}, {"thingName": "a", "principal": None}])
def test_what_is_not_known_is_not_detached(parameters: dict[str, Any]) -> None:
    call = Call()
    aws.unless_gone(call, **parameters)
    assert call.parameters == []


class Iot:
    """What AWS answers about a certificate's policies and things, and about a thing's certificates: two pages each."""

    def get_paginator(self, operation: str) -> Any:
        return SimpleNamespace(paginate=getattr(self, operation))

    def list_attached_policies(self, target: str) -> Iterator[Any]:
        if target != ARN:
            raise GONE
        yield {"policies": [{"policyName": "p"}, {"policyName": "o"}]}
        yield {"policies": [{"policyName": "q"}]}

    def list_principal_things(self, principal: str) -> Iterator[Any]:
        yield {"things": ["a", "p"] if principal == ARN else []}
        yield {"things": ["b"]}

    def list_thing_principals(self, **thing: str) -> Iterator[Any]:
        yield {"principals": [f"{ARN}-of-{thing['thingName']}", ARN]}
        yield {"principals": [f"{ARN}-2"]}


@pytest.mark.parametrize(("arn", "names"), [(ARN, ["p", "o", "q"]), (f"{ARN}-gone", []), ("", []), (None, [])])
def test_a_certificates_policies_are_named_and_one_that_is_gone_has_none(arn: str | None, names: list[str]) -> None:
    assert aws.policies_of(Iot(), arn) == names


def test_a_things_certificates_are_those_of_all_pages_in_their_order() -> None:
    assert aws.principals_of(Iot(), "a") == [f"{ARN}-of-a", ARN, f"{ARN}-2"]


def test_a_certificate_is_used_by_its_things_and_its_policies() -> None:
    policies = {"policy p", "policy o", "policy q"}
    assert aws.users_of(Iot(), ARN) == {"thing a", "thing p", "thing b"} | policies
    assert aws.users_of(Iot(), f"{ARN}-gone") == {"thing b"}


# Root certificates


def names_in(path: Path) -> list[str]:
    context = ssl.create_default_context(cafile=path)
    subjects = [dict(part[0] for part in about["subject"]) for about in context.get_ca_certs()]
    return sorted(about["commonName"] for about in subjects)


AMAZONS = [f"Amazon Root CA {number}" for number in range(1, 5)]
AMAZONS.append("Starfield Services Root Certificate Authority - G2")


def test_things_trust_amazons_roots_and_no_other(tmp_path: Path) -> None:
    path = aws.write_amazon_roots(tmp_path)
    assert path == tmp_path / constant("ROOTS_FILE")
    assert names_in(path) == AMAZONS
    assert path.read_text(encoding="ascii").count("BEGIN CERTIFICATE") == 5


def test_roots_are_written_only_if_they_are_missing_or_others(tmp_path: Path) -> None:
    path = aws.write_amazon_roots(tmp_path)
    number, content = path.stat().st_ino, path.read_text(encoding="ascii")
    aws.write_amazon_roots(tmp_path)
    assert path.stat().st_ino == number
    path.write_text("")
    aws.write_amazon_roots(tmp_path)
    assert path.read_text(encoding="ascii") == content


def test_without_amazons_roots_in_botocore_one_is_told_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distribution's botocore may have other certificates."""
    context = ssl.create_default_context(cafile=Path(botocore.__file__).with_name("cacert.pem"))
    others = [
        der
        for der, about in zip(context.get_ca_certs(binary_form=True), context.get_ca_certs(), strict=True)
        if "Amazon" not in str(about) and "Starfield" not in str(about)
    ]
    pem = "\n".join(["-----BEGIN CERTIFICATE-----", base64.b64encode(others[0]).decode(), "-----END CERTIFICATE-----"])
    (tmp_path / "cacert.pem").write_text(pem + "\n")
    monkeypatch.setattr(botocore, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ElfError) as raised:
        aws.write_amazon_roots(tmp_path)
    assert "AmazonRootCA1.pem" in raised.value.remedy
    assert not (tmp_path / state.ROOTS_FILE).exists()


def test_a_botocore_without_certificates_leaves_it_to_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[object] = []
    make = ssl.create_default_context

    def witness(cafile: Path | None) -> ssl.SSLContext:
        used.append(cafile)
        return make(cafile=bundle)

    bundle = Path(botocore.__file__).with_name("cacert.pem")
    monkeypatch.setattr(ssl, "create_default_context", witness)
    aws.write_amazon_roots(tmp_path)
    monkeypatch.setattr(botocore, "__file__", str(tmp_path / "__init__.py"))
    aws.write_amazon_roots(tmp_path)
    assert used == [bundle, None]
